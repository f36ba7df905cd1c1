"""The README's code runs and prints what the README shows.

A ```python block is executed, all of them in order in one interpreter; ```text right after it is what it prints.
A ```console block holds lines `$ command`, each followed by the output it must give, where /home/you is the folder
it runs in. `<!-- not tested: reason -->` on the line before a block leaves it out; REASONS lists the accepted ones.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.step.step_driver import FAST_FLAGS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
MARK = re.compile(r"<!-- not tested: (.+) -->")
REASONS = {
    "takes a minute",
    "takes minutes",
    "needs a cluster",
    "needs a network",
    "needs a GPU",
    "installs packages",
    "runs all tests",
    "runs in make demo",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, the line it starts at and why it is not run (None: it is)."""

    language: str
    text: str
    line: int
    reason: str | None


def read_blocks(markdown: str) -> list[Block]:
    blocks, lines, i = [], markdown.splitlines(), 0
    while i < len(lines):
        if lines[i].startswith("```"):
            end = lines.index("```", i + 1)
            mark = MARK.fullmatch(lines[i - 1]) if i else None
            text = "\n".join(lines[i + 1 : end])
            blocks.append(Block(lines[i][3:].strip(), text, i + 1, mark.group(1) if mark else None))
            i = end
        i += 1
    return blocks


BLOCKS = read_blocks(README.read_text(encoding="utf-8"))
CONSOLE = [b for b in BLOCKS if b.language == "console" and not b.reason]


def commands(block: Block) -> list[tuple[str, str]]:
    """The block's (command, output) pairs."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"README line {block.line}: a console block starts with '$ command'"
            found[-1][1].append(line)
    return [(command, "\n".join(output).strip()) for command, output in found]


def run(arguments: list[str], folder: Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Without LLVM's optimisations a step that reads fp8 pages takes seconds, more than compiling saves.
    flags = os.environ["XLA_FLAGS"] if "--kv-cache-dtype" in arguments else FAST_FLAGS
    environment = {**os.environ, "PATH": path, "XLA_FLAGS": flags}
    return subprocess.run(
        arguments, cwd=folder, input=text, env=environment, capture_output=True, text=True, timeout=400
    )


def test_every_block_is_run_or_says_why_not():
    assert [b for b in BLOCKS if b.language == "python" and not b.reason]
    assert CONSOLE
    previous: Block | None = None
    for block in BLOCKS:
        where = f"README line {block.line}"
        assert block.language in ("python", "console", "text"), f"{where}: unknown language {block.language!r}"
        if block.reason:
            assert block.reason in REASONS, f"{where}: {block.reason!r} is no reason to leave a block out: {REASONS}"
        elif block.language == "text":
            assert previous is not None, where
            assert previous.language == "python", f"{where}: a text block follows the python block that prints it"
        previous = block


def test_python_blocks_print_what_is_shown(tmp_path: Path):
    """All blocks in one fresh interpreter, which prints a line of its own between them."""
    run_blocks = [b for b in BLOCKS if not b.reason and b.language in ("python", "text")]
    script, shown = [], []
    for block in run_blocks:
        if block.language == "python":
            script.append(f"{block.text}\nprint('--- block at line {block.line}')")
            shown.append(f"--- block at line {block.line}")
        else:
            shown.insert(len(shown) - 1, block.text)
    (tmp_path / "readme.py").write_text("\n".join(script))
    done = run([sys.executable, "-W", "error", "readme.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines() == "\n".join(shown).splitlines()


@pytest.mark.parametrize("block", CONSOLE, ids=lambda b: f"line{b.line}")
def test_commands_print_what_is_shown(block: Block, tmp_path: Path):
    for command, output in commands(block):
        first, *rest = command.split(" | ")
        text = None
        if rest:  # echo or printf into the command, without a shell
            assert first.startswith("echo "), command
            text = shlex.split(first)[1] + "\n"
            command = rest[0]
        arguments = shlex.split(command)
        assert arguments[0] == "nanoflow", (
            f"README line {block.line}: only nanoflow commands are run, not {arguments[0]!r}"
        )
        done = run(arguments, tmp_path, text)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip().replace(str(tmp_path.resolve()), "/home/you") == output, command


def test_make_targets_and_files_named_exist():
    text = README.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b", text)) <= targets
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), f"README links to {link}"
    for plan in re.findall(r"`(two_\w+)`", text):
        assert (ROOT / "configs/plans" / f"{plan}.toml").is_file(), plan


def test_ci_runs_the_test_command_of_the_readme():
    assert "`make test`" in README.read_text(encoding="utf-8")
    assert re.search(r"^exec make test\b", (ROOT / ".ci/run").read_text(), re.MULTILINE)


def test_docs_name_tests_and_files_that_exist():
    for page in (README, *(ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        names = set(re.findall(r"\b((?:\w+/)*test_\w+\.py)\b", text))
        missing = [name for name in names if not list((ROOT / "tests").rglob(name.removeprefix("tests/")))]
        links = [m for m in re.findall(r"\]\(([^)#:]+)\)", text) if not (page.parent / m).exists()]
        assert missing + links == [], page.name
