"""Pictures of timelines: every piece has a label, none is larger than its bar, and two inner layers are shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from matplotlib.patches import Rectangle

from nanoflow_jax.timeline.plot import LABELLED, plot_inspections
from nanoflow_jax.timeline.timeline import Timeline
from nanoflow_jax.timeline.window import window
from tests.timeline.test_page import simulated


@pytest.mark.parametrize("plan", ["nanoflow_70b", "sequential"])
def test_every_piece_is_labelled_within_its_bar(plan: str) -> None:
    step = simulated(plan)
    figure = plot_inspections([step, simulated("sequential")])
    figure.draw_without_rendering()
    ax = figure.axes[0]
    shown = window(step)
    bars = [bar for bar in ax.patches if isinstance(bar, Rectangle) and not bar.get_hatch()]
    texts = {text: text.get_window_extent() for text in ax.texts}
    drawn = [e for e in step.timeline.events if e.start_us < shown.end_us and e.end_us > shown.start_us]
    named = [e for e in drawn if e.piece and e.kind in LABELLED]
    assert len(ax.texts) == len(named) > 10
    written = sorted(text.get_text().split("\n")[0] for text in texts)
    assert written == sorted(f"{e.piece.op} {e.piece.piece}" for e in named if e.piece)
    boxes = [bar.get_window_extent() for bar in bars]
    for text, box in texts.items():
        middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        if (around := [b for b in boxes if b.contains(*middle)]) and text.get_verticalalignment() == "center":
            wide, high = max(b.width for b in around), max(b.height for b in around)
            assert box.width <= wide + 1 and box.height <= high + 1, text.get_text()
    above = [box for text, box in texts.items() if text.get_verticalalignment() == "bottom"]
    assert not any(a.overlaps(b) for i, a in enumerate(above) for b in above[:i])


def test_inner_layers_are_shown_where_there_are_some() -> None:
    step = simulated("sequential")
    assert window(step)[:2] == (2, 3) and window(step).inner

    def of(layers: set[int]) -> Timeline:
        kept = tuple(e for e in step.timeline.events if e.piece and e.piece.layer in layers)
        return replace(step.timeline, events=kept)

    for layers, seen in (({0, 1, 2, 3}, (1, 2)), ({0, 1, 2}, (1, 1)), ({0, 1}, (0, 1))):
        found = window(replace(step, timeline=of(layers)))
        assert (found.first, found.last) == seen
        assert found.inner == (len(layers) > 2) != found.text.endswith("ends of the step among them")
