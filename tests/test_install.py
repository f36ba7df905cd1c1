"""What the pages and messages say to install is there; a wheel has all it needs, outside the checkout."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nanoflow_jax.system.install import install_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
QUIET = ["--quiet", "--no-index", "--no-build-isolation"]  # from what is here, without a network


def run(command: list[str], folder: Path) -> str:
    """What a command prints, far from the checkout, and with nothing set for tests: its programs are compiled as a
    user's."""
    ours = ("PYTHONPATH", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    inherited = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(command, cwd=folder, env=inherited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
    return done.stdout


# -- what is said


def test_what_pages_install_is_constrained_and_exists() -> None:
    found = 0
    for page in PAGES:
        for line in page.read_text().splitlines():
            for rest in re.findall(r"pip install -e (.*)", line):
                found += 1
                assert "-c constraints.txt" in rest, f"{page.name}: {line}"
                for extras in re.findall(r"^\\?\"\.\[([a-z,-]+)\]", rest):
                    assert set(extras.split(",")) <= set(EXTRAS), f"{page.name}: {line}"
    assert found > 10


def test_messages_name_extras_that_exist_and_nothing_else_says_how_to_install() -> None:
    named = set()
    for path in (ROOT / "nanoflow_jax").rglob("*.py"):
        text = path.read_text()
        named |= set(re.findall(r"install_command\([\"']([a-z-]+)[\"']\)", text))
        assert path.name == "install.py" or "pip install" not in text, path
    assert named == {"cuda", "inspect", "lm-eval", "plot", "ray", "serve", "structured"}
    assert named <= set(EXTRAS)


def test_what_a_message_says_works_in_a_checkout(tmp_path: Path) -> None:
    """pip takes it, from any folder, and the constraints agree with the extra."""
    program, *arguments = shlex.split(install_command("plot"))
    assert program == "pip" and f"{ROOT}[plot]" in arguments
    run([*PIP, *arguments, *QUIET, "--dry-run"], tmp_path)


def _required(names: list[str]) -> Iterator[Requirement]:
    """Of these and of all that they require here; extras of our own are opened."""
    left, seen = [Requirement(name) for name in names], set()
    while left:
        found = left.pop()
        if found.name == PROJECT["name"]:
            left += [Requirement(name) for extra in found.extras for name in EXTRAS[extra]]
            continue
        if (found.name, *sorted(found.extras)) in seen:
            continue
        seen.add((found.name, *sorted(found.extras)))
        yield found
        try:
            inner = [Requirement(text) for text in requires(found.name) or ()]
        except PackageNotFoundError:
            pytest.fail(f"{found.name} is in no environment that `make test` makes")
        wanted = [{"extra": extra} for extra in ("", *found.extras)]
        left += [r for r in inner if r.marker is None or any(r.marker.evaluate(e) for e in wanted)]


def test_everything_of_dev_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(set(lines), key=str.lower)
    pinned: dict[str, str] = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)
    }
    wrong = [
        str(r)
        for r in _required([*PROJECT["dependencies"], *EXTRAS["dev"]])
        if not r.specifier.contains(pinned.get(canonicalize_name(r.name), "0"), prereleases=True)
    ]
    assert wrong == []
    assert pinned["jaxlib"] == pinned["jax-cuda13-plugin"] == pinned["jax-cuda13-pjrt"]


def test_the_plugin_is_that_of_jax() -> None:
    """By JAX's own extra: a range of ours would take the newest plugin, which refuses an older jaxlib."""
    assert not [r for names in EXTRAS.values() for r in names if r.startswith("jax-cuda")]
    inside = [Requirement(text) for text in requires("jax") or ()]
    (plugin,) = (r for r in inside if r.name == "jax-cuda13-plugin" and '"cuda13-local"' in str(r.marker))
    (lib,) = (r for r in inside if r.name == "jaxlib" and r.marker is None)
    assert plugin.specifier == lib.specifier


# -- a wheel


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nanoflow`, from a wheel, in an environment of its own that sees the packages of this one."""
    at = tmp_path_factory.mktemp("wheel")
    run([*PIP, "wheel", *QUIET, "--no-deps", "--wheel-dir", str(at), str(ROOT)], at)
    (wheel,) = at.glob("*.whl")
    venv.EnvBuilder(symlinks=True, with_pip=False).create(at / "env")
    scripts = at / "env" / "bin"
    run([*PIP, "--python", str(scripts / "python"), "install", *QUIET, "--no-deps", str(wheel)], at)
    (site,) = (at / "env" / "lib").glob("*/site-packages")
    (site / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # after the installation, which is its own
    return scripts / "nanoflow"


def test_commands_run_from_a_wheel(program: Path, tmp_path: Path) -> None:
    where = "import nanoflow_jax, kernels_pallas; print(nanoflow_jax.__file__); print(kernels_pallas.__file__)"
    for file in run([str(program.with_name("python")), "-c", where], tmp_path).split():
        assert program.parents[1] in Path(file).parents
    assert "nanoflow generate" in run([str(program), "--help"], tmp_path)
    small = ("--max-model-len", "128", "--tokens-per-step", "72", "--decode-slots", "8", "--page-size", "16")
    answered = run([str(program), "generate", "--cpu-devices", "2", "--quiet", *small, "12+30="], tmp_path)
    assert answered == "12+30=42\n"
    shown = run([str(program), "simulate", "--gpu", "h200", "--plan", "nanoflow_70b", "--json"], tmp_path)
    assert json.loads(shown)
    assert "addition" in run([str(program), "eval", "--list"], tmp_path)


def test_what_a_message_says_works_with_a_wheel(program: Path, tmp_path: Path) -> None:
    """pip opens the extra of what is installed, and looks for no such package elsewhere."""
    python = str(program.with_name("python"))
    ask = "from nanoflow_jax.system.install import install_command; print(install_command('plot'))"
    said = shlex.split(run([python, "-c", ask], tmp_path))
    assert said[:2] == ["pip", "install"]
    run([*PIP, "--python", python, *said[1:], *QUIET, "--dry-run"], tmp_path)
