"""The notebooks run from a fresh kernel. Those with timelines are stored with what they printed, and print it again;
the others are stored without."""

from __future__ import annotations

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="needs the notebooks extra")
nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra")

from tools.notebooks import told  # noqa: E402

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STORED = ("02", "03")  # with outputs
SECONDS = 600  # for one cell, on a busy machine


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_without_outputs_or_small(path: Path):
    notebook = nbformat.read(path, as_version=4)
    if path.stem.startswith(STORED):
        assert path.stat().st_size < 300_000, f"{path.name} is large; store it with python -m tools.notebooks"
        assert sum(pictures for _, _, pictures in told(notebook)) >= 2
        return
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            assert not cell.outputs, f"{path.name}: cell {i} has outputs; clear them"
            assert cell.execution_count is None, f"{path.name}: cell {i} has an execution count; clear it"


# Jupyter's own machinery (sockets, event loops) may warn; the notebook's code runs in another process.
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    stored = told(notebook)
    client.execute()  # raises CellExecutionError, which shows the cell and the kernel's traceback
    if path.stem.startswith(STORED):
        again = f"{path.name} prints something else; look at it, then: python -m tools.notebooks {path.stem[:2]}"
        assert told(notebook) == stored, again


def test_a_difference_that_matters_is_seen():
    """Figures and pictures are compared, seconds and versions are not."""
    path = next(path for path in NOTEBOOKS if path.stem.startswith("03"))

    def changed(old: str, new: str) -> bool:
        read = nbformat.read(path, as_version=4)
        text = path.read_text(encoding="utf-8")
        assert old in text
        return told(nbformat.reads(text.replace(old, new, 1), as_version=4)) != told(read)

    assert changed("merged_gemm UG x 2", "merged_gemm UG x 1")
    assert changed("image/png", "image/gif")
    assert not changed("compiled by jax 0.", "compiled by jax 1.")
