"""Makes the pictures of README and docs: `python -m tools.pictures`. A test says when they are stale."""

from __future__ import annotations

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.search.simulate import Simulation, simulate_step
from nanoflow_jax.timeline.plot import HEIGHT, INK, plot_inspections
from nanoflow_jax.timeline.timeline import NETWORK

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
PLANS = ("nanoflow_70b", "sequential")
MARKED = "GEMV.AG"  # of the first nano-batch, whose network work runs under the second's GEMMs


def plans() -> list[Simulation]:
    """LLaMA 3.1 70B on eight H200: a step of 1280 decode rows and 768 of prefill, contexts of 1024."""
    model, config = RooflineModel(load_hardware("h200")), model_config("llama-3.1-70b")[1]
    load = StepLoad(1280, 768, 1024, 1024)
    return [simulate_step(load_plan(name), config, model, 8, load) for name in PLANS]


def comparison() -> Figure:
    """Two inner layers of the plan above those of the baseline; a gather that a GEMM hides is marked."""
    steps = plans()
    figure = plot_inspections(steps)
    marked = next(c for c in steps[0].collectives if c.op == MARKED and c.layer in steps[0].inner.layers)
    hiding = [name.partition("/")[2] for name in marked.beside]
    if not hiding or marked.exposed_us > 0:
        raise ValueError(f"pictures: {MARKED} of {PLANS[0]} is not hidden by a GEMM any more; mark something else")
    ax = figure.axes[0]
    first = min(e.start_us for e in steps[0].timeline.events if e.piece and e.piece.layer == marked.layer)
    left, wide = marked.start_us - first, marked.actual_us
    low, high = -HEIGHT / 2 - 0.06, 1 + HEIGHT / 2 + 0.06  # network and compute
    frame = FancyBboxPatch(
        (left - 6, low), wide + 12, high - low, boxstyle="square,pad=0", fill=False, edgecolor=INK, linewidth=2
    )
    ax.add_patch(frame)
    # What it says stands in the next wide gap of the network, with a line below the bars.
    ends = sorted((e.start_us - first, e.end_us - first) for e in steps[0].timeline.events if e.stream == NETWORK)
    gaps = [(a, b) for (_, a), (b, _) in pairwise(ends) if left < a < ax.get_xlim()[1] / 2]
    middle = sum(max(gaps, key=lambda gap: gap[1] - gap[0])) / 2
    ax.plot([left + wide + 6, middle, middle], [low, low, 0], color=INK, linewidth=1.2, zorder=2)
    said = f"{MARKED} {marked.nano_batch}\nruns under\n{' and '.join(hiding)}:\nno waiting"
    ax.text(
        middle, 0, said, fontsize=8, color=INK, ha="center", va="center", zorder=3, linespacing=1.15,
        bbox={"facecolor": "white", "edgecolor": INK, "boxstyle": "square,pad=0.2"},
    )  # fmt: skip
    return figure


PICTURES = {"nanoflow_70b_and_sequential.svg": comparison}


def texts(path: Path) -> list[str]:
    """What is written in an SVG picture: labels, figures of the titles, ticks."""
    return ["".join(e.itertext()).strip() for e in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def make(folder: Path) -> list[Path]:
    """Writes every picture; the same content makes the same bytes."""
    made = []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pictures"}):
        for name, draw in PICTURES.items():
            draw().savefig(folder / name, metadata={"Date": None}, facecolor="white")
            made.append(folder / name)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools.pictures", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they go")
    for path in make(parser.parse_args().folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
