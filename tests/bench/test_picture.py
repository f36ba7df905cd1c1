"""The picture of a run says what its white is, where steps have several shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nanoflow_jax.bench.plot import plot_reports
from nanoflow_jax.bench.timeline import TimedStep, Window
from nanoflow_jax.step.batch import StepShape
from tests.bench.test_compare import OPTIONS, report


def test_smaller_steps_are_explained(tmp_path: Path) -> None:
    def label(*shapes: StepShape) -> str:
        steps = tuple(
            TimedStep(shape, 4, 2, 1, 0, 0, False, 0, float(i), float(i + 1)) for i, shape in enumerate(shapes)
        )
        lost = dict.fromkeys(("host", "shape_padding", "pages", "preemption"), 0.0)
        shown = replace(
            report("a", OPTIONS, 8.0), device="cpu", steps=steps, lost=lost, span=Window(steps, 0.0, 1, 1, 1.0)
        )
        (ax,) = plot_reports([shown], tmp_path / "run.png").axes
        assert any("4 tokens/s/device" in text.get_text() for text in ax.texts)
        return ax.get_xlabel()

    large, small = StepShape(8, 8, 1, 2), StepShape(8, 0, 0, 2)
    assert "white within: steps of a smaller shape" in label(large, small, large)
    assert "white" not in label(large, large)
