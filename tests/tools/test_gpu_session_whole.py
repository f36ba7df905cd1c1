"""Both calls of the GPU session from end to end at tiny size, from a copy of the checkout that nobody has installed: as
on a lent machine, where there is no metadata of this package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from tests.step.step_driver import FAST_FLAGS
from tools.gpu_session.parts import call_a, good

ROOT = Path(__file__).parents[2]
SECONDS = 1200  # it takes more than a minute of a processor's time


@pytest.fixture
def plain(tmp_path: Path) -> tuple[list[str], dict[str, str]]:
    """The copy's Python and its environment: everything that is installed here, but not this package."""
    copy, packages = tmp_path / "checkout", tmp_path / "packages"
    for name in ("nanoflow_jax", "kernels_pallas", "configs", "tools"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    packages.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if "nanoflow" not in entry.name and entry.suffix != ".pth":
                (packages / entry.name).symlink_to(entry)
    # The interpreter that this environment was made of does not see what is installed in it, the links aside.
    python = getattr(sys, "_base_executable", sys.executable)
    environment = {**os.environ, "PYTHONPATH": f"{copy}{os.pathsep}{packages}", "PYTHONNOUSERSITE": "1"}
    environment["XLA_FLAGS"] = FAST_FLAGS
    return [python, "-P"], environment


def test_the_whole_session_from_a_plain_checkout(plain: tuple[list[str], dict[str, str]], tmp_path: Path) -> None:
    python, environment = plain
    asked = "import importlib.metadata as m; print([d.name for d in m.distributions() if 'nanoflow' in (d.name or '')])"
    done = subprocess.run([*python, "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

    command = [*python, "-m", "tools.gpu_session", "out", "--tiny"]
    ran = subprocess.run(
        command, env=environment, cwd=tmp_path, timeout=SECONDS, capture_output=True, text=True, check=False
    )
    with tarfile.open(tmp_path / "out" / "session.tar.gz") as archive:
        archive.extractall(tmp_path / "found", filter="data")
    state = json.loads((tmp_path / "found" / "session.json").read_text())["parts"]
    wrong = [name for name, part in state.items() if part["status"] != "done"]
    logs = {name: (tmp_path / "found" / f"{name}.log").read_text()[-2000:] for name in wrong}
    assert ran.returncode == 0, (ran.stderr[-2000:], logs)
    assert set(state) == {part.name for part in [*call_a(), *good("h100")]}
    assert json.loads((tmp_path / "found" / "machine.json").read_text())["package"] == str(tmp_path / "checkout")
    assert json.loads((tmp_path / "found" / "tokens.8b.json").read_text())["mismatches"] == 0
    page = (tmp_path / "found" / "summary.md").read_text()
    assert "versions: nanoflow_jax 0.1.0, jax " in page
    assert page.count("| done |") == len(state)
    assert all(f"{name}: done (" in ran.stderr for name in state)
