"""Stores notebooks with their outputs, small: `python -m tools.notebooks 02 03` executes those whose names begin so.

The tests execute them again, and fail where what is printed, or the number of pictures, differs from what is stored.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from PIL import Image

FOLDER = Path(__file__).parents[1] / "notebooks"
WIDEST, COLORS = 1300, 48  # of a stored picture, pixels; its palette
PICTURE = "image/png"
# What may differ: rounding errors, seconds, versions, and numbers that XLA gives its instructions.
VARIES = (r"\d\.\d+e-\d+", r"\(\d+ s\)", r"^compiled by .*$", r"(?<=[a-z_])\.\d+(\.\d+)*(?= \(| rearranges| blocks|$)")


def small_png(encoded: str) -> str:
    """A PNG in base64, narrower and with a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.quantize(COLORS, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def store(notebook: Any) -> None:
    """Leaves of an executed notebook what is kept: printed text and small pictures; no times, no warnings."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if PICTURE in (data := output.get("data", {})):
                output.data = {PICTURE: small_png(data[PICTURE])}


def told(notebook: Any) -> list[tuple[int, str, int]]:
    """By code cell: its place, the text that it printed without what may differ, and how many pictures it drew."""
    found = []
    for place, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        text = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for pattern in VARIES:
            text = re.sub(pattern, "~", text, flags=re.M)
        pictures = sum(PICTURE in output.get("data", {}) for output in cell.outputs)
        found.append((place, text, pictures))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools.notebooks", description=__doc__)
    parser.add_argument("names", nargs="+", help="how the notebooks' names begin")
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for path in sorted(path for name in parser.parse_args().names for path in FOLDER.glob(f"{name}*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as folder:
            resources = {"metadata": {"path": folder}}
            nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
        store(notebook)
        nbformat.write(notebook, path)
        print(path, path.stat().st_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
