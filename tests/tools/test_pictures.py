"""The pictures of README and docs are those that `python -m tools.pictures` makes now."""

from __future__ import annotations

from pathlib import Path

from tools.pictures import FOLDER, PICTURES, make, texts

ROOT = FOLDER.parents[1]


def test_pictures_are_not_stale(tmp_path: Path) -> None:
    """Their texts, the figures in titles and ticks among them; letters may be drawn otherwise by another version."""
    for made in make(tmp_path):
        kept = FOLDER / made.name
        assert texts(kept) == texts(made), f"{kept} is stale: run python -m tools.pictures"
        assert kept.stat().st_size < 100_000
    assert {path.name for path in FOLDER.iterdir()} == set(PICTURES)


def test_readme_shows_them_on_its_first_screen() -> None:
    first = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    assert all(f"docs/pictures/{name}" in first for name in PICTURES)


def test_the_first_one_says_what_it_is_for() -> None:
    written = texts(FOLDER / "nanoflow_70b_and_sequential.svg")
    assert {"runs under", "KQV.3 and KQV.4:", "PF 1", "KQV 3"} <= set(written)
    titles = [text for text in written if "compute waits" in text and "layers 2 to 3" in text]
    waits = [float(title.split("waits ")[1].split()[0]) for title in titles]
    assert len(waits) == 2 and waits[0] < waits[1] / 3
