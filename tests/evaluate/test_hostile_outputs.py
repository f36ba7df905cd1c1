"""An output folder that others can write to: links that they put there lead nothing out of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.batch import write_in_order
from nanoflow_jax.evaluate.journal import Journal, manifest_path
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.plot import plot_results
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.weights.checkpoint import _lock
from tests.evaluate.flags import Cli
from tools.gpu_session import archive as session_archive

MANIFEST = Manifest("batch", {"model": "abc"})
RECORD = b'{"id": "batch_req_1", "error": null, "custom_id": "a"}\n'


class NoRequests:
    """An input that has none of the requests of before."""

    def number(self, record: dict[str, Any]) -> int | None:
        return None

    def is_known(self, record: dict[str, Any]) -> bool:
        return False

    def renumbered(self, record: dict[str, Any], number: int) -> dict[str, Any]:
        raise AssertionError("none has a number")


def _journal(folder: Path) -> None:
    with Journal.open(folder / "out.jsonl", MANIFEST) as journal:
        journal.write(RECORD)


def _changed_run(folder: Path) -> None:
    (folder / "out.jsonl").write_bytes(RECORD)
    MANIFEST.write(manifest_path(folder / "out.jsonl"))
    other = Manifest("batch", {"model": "other"})
    Journal.open(folder / "out.jsonl", other, allow_changed=True, pairing=NoRequests).close()


def _in_order(folder: Path) -> None:
    (folder / "out.jsonl").write_bytes(RECORD)
    write_in_order(folder / "out.jsonl")


def _convert_lock(folder: Path) -> None:
    with _lock(folder / ".model.partial-1"):
        pass


WRITERS: list[tuple[str, Callable[[Path], Any]]] = [
    ("out.jsonl", _journal),
    ("out.jsonl.manifest.json", _journal),
    ("out.jsonl.manifest.json.part", _journal),
    ("out.jsonl.part", _in_order),
    ("out.jsonl.part", _changed_run),
    ("out.jsonl.old-1", _changed_run),
    ("out.jsonl.old-1.manifest.json", _changed_run),
    ("results.png", lambda folder: plot_results([], folder / "results.png")),
    (".model.partial-1.lock", _convert_lock),
    ("session.tar.gz.part", lambda folder: session_archive.write(b"data", folder, "session")),
]


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("name", "writer"), WRITERS)
def test_links_are_not_followed(there: bool, name: str, writer: Callable[[Path], Any], tmp_path: Path):
    """there: whether what the link names exists."""
    victim, folder = tmp_path / "victim", tmp_path / "shared"
    folder.mkdir()
    if there:
        victim.write_text("precious\n")
    (folder / name).symlink_to(victim)
    try:
        writer(folder)
    except (ConfigError, OSError) as error:
        assert name in str(error) and "\n" not in str(error)
    assert (victim.read_text() if victim.exists() else None) == ("precious\n" if there else None)


def test_a_link_of_the_users_own_is_followed(cli: Cli, tmp_path: Path):
    source, link, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "disk" / "results.jsonl"
    source.write_text('{"prompt": "12+30=", "max_tokens": 2}\n')
    target.parent.mkdir()
    link.symlink_to(target)
    status, _, err = cli("batch", "-i", str(source), "-o", str(link), "--ordered")
    assert status == 0, err
    assert link.is_symlink() and len(target.read_text().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "in.jsonl", "out.jsonl"]
    assert manifest_path(target).exists()


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "", "a/b", "a\\b", "a\nb", "\0", ".hidden", "a" * 300])
def test_a_task_names_nothing_outside_its_folder(name: str, tmp_path: Path, cli: Cli):
    path = tmp_path / "task.yaml"
    fields = {"name": name, "data": {"problems": "addition", "count": 1}, "prompt": "{{ prompt }}",
              "target": "{{ answer }}", "metrics": ["exact_match"]}  # fmt: skip
    path.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match=r"name: .* is not accepted") as found:
        load_task(str(path))
    assert str(found.value).isprintable()
    status, _, err = cli("eval", str(path), "-o", str(tmp_path / "runs" / "one"))
    assert status == 1 and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["task.yaml"]
