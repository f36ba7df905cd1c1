"""What the site of docs/ is made of; that it is whole is `make docs`, which builds it with warnings as errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the docs extra")

from tools.docs import pages
from tools.docs.docstrings import as_markdown

ROOT = Path(__file__).parents[2]


def test_lists_of_docstrings_keep_their_lines() -> None:
    text = "Compiles a step.\n\nmodel, gpu  names\nlayers      how many;\n            None: all\n\nRaises ConfigError."
    table = "model, gpu  names\nlayers      how many;\n            None: all"
    assert as_markdown(text) == f"Compiles a step.\n\n\n```text\n{table}\n```\n\n\nRaises ConfigError."
    prose = "A plan of `configs/plans` by name: or a file.\nRaises ConfigError."
    assert as_markdown(prose) == prose


def test_links_of_the_repository_lead_to_pages() -> None:
    """Files of docs/, of the rest, folders, notebooks, from any page; what is code stays."""
    for origin, link, page in (
        ("docs/search.md", "results/README.md", "results/README.md"),
        ("docs/results/README.md", "../benchmarks.md", "benchmarks.md"),
        ("README.md", "docs/engine.md", "engine.md"),
        ("README.md", "docs/results", "results/README.md"),
        ("docs/architecture.md", "../nanoflow_jax/options.py", "source/nanoflow_jax/options.py.md"),
        ("README.md", "configs/plans", "source/configs/plans.md"),
        ("docs/search.md", "../notebooks/04_search.ipynb", "notebooks/04_search.md"),
        ("docs/index.md", "../README.md", "readme.md"),
    ):
        target = pages._resolved(origin, link)
        assert target is not None and pages._page(target) == page
    assert pages._resolved("docs/index.md", "../../elsewhere") is None
    assert pages._resolved("docs/index.md", "nope.md") is None
    found = pages._links("docs/index.md", "[a](search.md#x)\n```\n[b](engine.md)\n```\n[c](nope.md)")
    assert found == {"docs/search.md"}


def test_reference_has_every_command_and_option() -> None:
    from nanoflow_jax.options import OPTIONS

    commands, options = pages._commands(), pages._options()
    for name in ("generate", "batch", "eval", "simulate", "bench throughput", "lm-eval"):
        assert f"# nanoflow {name}\n" in commands
    assert re.findall(r"^\| `(\w+)` \|", options, re.MULTILINE) == list(OPTIONS)


def test_a_fence_is_longer_than_those_inside() -> None:
    assert pages._fence("a\n```\nb").startswith("````text\n")


def test_warnings_are_counted() -> None:
    """mkdocs counts none when it is told to be quiet."""
    (command,) = re.findall(r"mkdocs build.*", (ROOT / "Makefile").read_text())
    assert "--quiet" not in command.partition("#")[0] and " -q" not in command
    assert re.search(r"^strict: true$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert re.search(r"^test: checks pytest\n(.*\n)+checks:\n.* docs ", (ROOT / "Makefile").read_text(), re.MULTILINE)
