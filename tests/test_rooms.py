"""Imports point one way: files have no circle, and a room knows nothing of what stands above it."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from nanoflow_jax.models.registry import FAMILIES

ROOT = Path(__file__).parents[1]
PACKAGES = ("nanoflow_jax", "kernels_pallas", "tools")
# From the ground up: a room imports those of lines above its own, and none of its own line's neighbours.
FLOORS = (
    ("system",),
    ("chat", "config", "sampling_params", "version"),
    ("prompts",),
    ("hardware", "workload", "tokenizer", "parallel"),
    ("plan", "models"),
    ("options",),
    ("step", "weights", "generation_config"),
    ("cost",),  # what it costs depends on which kernels the step takes
    ("timeline", "profile", "engine"),
    ("inspect", "search", "replicas"),
    ("api",),
    ("evaluate", "distributed"),
    ("bench", "serve"),
    ("commands",),
    ("cli",),
)
Graph = dict[str, set[str]]


def _imported(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, at the top or where it needs them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return found & known


@pytest.fixture(scope="module")
def graph() -> Graph:
    """Module -> the modules that it imports."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files}
    known = set(names.values())
    return {name: _imported(path, known) - {name} for path, name in names.items()}


def in_order(graph: Graph) -> list[str]:
    return list(TopologicalSorter(graph).static_order())


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_no_circle_between_files(graph: Graph) -> None:
    assert set(in_order(graph)) == set(graph)
    with pytest.raises(CycleError, match="cycle"):
        in_order({**graph, "nanoflow_jax.plan.ops": {"nanoflow_jax.plan.plan"}})


def test_rooms_know_only_those_below(graph: Graph) -> None:
    floor = {f"nanoflow_jax.{name}": number for number, names in enumerate(FLOORS) for name in names}
    told = {"nanoflow_jax", "nanoflow_jax.__main__", "nanoflow_jax.assets"}
    assert {room(m) for m in graph if m.startswith("nanoflow_jax")} == set(floor) | told
    wrong = [
        f"{module} imports {used}"
        for module, found in graph.items()
        if (here := floor.get(room(module))) is not None
        for used in found
        if room(used) != room(module) and used != "nanoflow_jax.assets.tasks" and floor.get(room(used), -1) >= here
    ]
    assert wrong == []


def test_kernels_stand_alone(graph: Graph) -> None:
    """And nothing of the package needs tools, which are not installed with it."""
    for module, found in graph.items():
        if module.startswith("kernels_pallas"):
            assert not [m for m in found if not m.startswith("kernels_pallas")], module
        elif module.startswith("nanoflow_jax"):
            assert not [m for m in found if m.startswith("tools")], module


def test_only_models_knows_families() -> None:
    """No name of one stands elsewhere, in a string or an import. What a command loads by default does."""
    families = {name.lower() for f in FAMILIES.values() for name in (f.name, *f.architectures)}
    wrong = []
    for path in (ROOT / "nanoflow_jax").rglob("*.py"):
        if path.parent.name == "models":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = (
                node.value if isinstance(node, ast.Constant) else getattr(node, "id", None) or getattr(node, "attr", "")
            )
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            if (isinstance(text, str) and text.lower() in families) or module.rpartition(".")[2] in families:
                wrong.append(f"{path.name}:{getattr(node, 'lineno', 0)}")
    assert wrong == []
