"""An inspection as data, text and picture: a small model of three layers compiled for two A100 without one."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from nanoflow_jax.config import ConfigError
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.compare import compare
from nanoflow_jax.inspect.gpu_target import saving_options
from nanoflow_jax.inspect.step import StepInspection, inspect_step
from nanoflow_jax.step.compile import compile_step
from nanoflow_jax.timeline.plot import plot, plot_inspections

pytestmark = pytest.mark.aot

TINY = str(Path(__file__).parents[2] / "nanoflow_jax" / "assets" / "tiny_llama")
TOKENS, HIDDEN, LAYERS, DEVICES = 128, 128, 3, 2


def compiled(
    tokens: int = TOKENS, plan: str = "two_all_reduce", layers: int | None = None, **options: str | int | bool
) -> StepInspection:
    return inspect_step(TINY, "a100_sxm_80", plan, devices=DEVICES, tokens=tokens, layers=layers, options=options)


@cache
def inspected() -> StepInspection:
    return compiled()


def test_the_inner_layer_is_the_one_between() -> None:
    step = inspected()
    inner, whole = step.inner_layer, TOKENS * HIDDEN * 4
    assert inner.layers == (1,)
    assert (inner.collectives, inner.bytes) == (2, 2 * whole)
    assert inner.wire_bytes == 2 * 2 * whole * (DEVICES - 1) / DEVICES  # an all-reduce sends its tensor twice
    (middle,) = (layer for layer in step.report.totals.layers if layer.layer == 1)
    for name in ("compute_us", "memory_us", "network_us", "exposed_network_us"):
        assert getattr(inner, name) == getattr(middle, name)
    assert inner.findings == sum(f.layer == 1 for f in step.report.findings) > 0
    assert step.to_json()["inner_layer"]["collectives"] == 2


def test_compare_names_the_gpus_when_they_differ() -> None:
    step = inspected()
    other = replace(step, hardware=load_hardware("h200"))
    head, *rows = compare([step, other]).splitlines()[1:]
    assert head.split()[:3] == ["plan", "GPU", "collectives"]
    assert [row.split()[1] for row in rows] == ["a100_sxm_80", "h200"]
    assert "GPU" not in compare([step, step]).splitlines()[1].split()


def test_one_device_has_no_network_row() -> None:
    """Neither in the table nor in the picture; beside two devices, both have it."""
    step = inspect_step(TINY, "a100_sxm_80", "sequential", devices=1, tokens=TOKENS)
    assert compare([step]).splitlines()[1].split()[:3] == ["plan", "layer", "us"]
    assert "collectives" in compare([step, inspected()]).splitlines()[1]
    figure = plot_inspections([step])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["Compute", "Memory"]
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # pyright: ignore
    assert not any(
        "network" in text for text in [*texts, figure.axes[0].get_title(loc="left"), step.inner_layer.text()]
    )
    (panel,) = plot_inspections([inspected()]).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["Network", "Compute", "Memory"]


def test_temporaries_say_which_layers_they_are_of() -> None:
    step = inspected()
    assert "may need more" not in step.text()
    assert "(of 2 layers; all 3 may need more)" in replace(step, layers=2).text()


def test_plot_takes_the_nano_batches_of_an_inspection() -> None:
    """KQV.3 is of nano-batch 2: its own number would give it a third colour."""
    step = compiled(tokens=2048, plan="nanoflow_70b", layers=1)
    assert step.nano_batches["KQV", 3] == 2
    labels = [text.get_text() for text in plot(step, layers=(0, 0)).axes[0].get_legend().get_texts()]  # pyright: ignore
    assert [text for text in labels if text.startswith("nano-batch")] == ["nano-batch 1", "nano-batch 2"]
    bare = plot(step.report, layers=(0, 0)).axes[0].get_legend().get_texts()  # pyright: ignore
    assert "nano-batch 3" in [text.get_text() for text in bare]


def test_plots_of_chosen_layers() -> None:
    step = inspected()
    titles = [ax.get_title(loc="left") for ax in plot_inspections([step, step], layers=(1, 1)).axes]
    assert len(titles) == 2 and all("a100_sxm_80, layer 1: compute waits" in title for title in titles)
    assert ", layer 1: compute waits" in plot_inspections([step]).axes[0].get_title(loc="left")  # the inner one
    with pytest.raises(ConfigError, match="layers: 7 to 8"):
        plot_inspections([step], layers=(7, 8))


def test_what_saves_compile_time_changes_nothing() -> None:
    """The same program without the saving options, but for the fusion tuner's note that it kept the default."""
    slow = {"xla_gpu_experimental_enable_fusion_autotuner": True, "xla_gpu_kernel_cache_file": ""}
    assert set(slow) == set(saving_options(load_hardware("a100_sxm_80")))
    plain, saved = [compiled(layers=1, **options) for options in (slow, {})]

    def program(step: StepInspection) -> str:
        default = ',"native_emitter_backend_config":{"type":"NATIVE_EMITTER_TYPE_INVALID","unroll_factor":0}'
        text = step.hlo.partition("\n")[2].replace(default, "")  # the first line holds a hash of all the others
        return re.sub(r', backend_config=\{"operation_queue_id":"0"[^{}]*\}', "", text)

    assert "native_emitter_backend_config" in plain.hlo
    assert "native_emitter_backend_config" not in saved.hlo
    assert program(plain) == program(saved)
    assert plain.memory == saved.memory


def test_a_program_is_compiled_once_and_kept_beside_the_compile_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in JAX's: it would write the executable and, the second time, warn that it cannot be read. What is damaged,
    and what another option makes, is compiled."""
    runs: list[Any] = []

    def counted(*args: Any, **settings: Any) -> Any:
        runs.append(settings["options"])
        if "xla_gpu_dot_merger_threshold_mb" in settings["options"]:
            raise RuntimeError("compiling")
        return compile_step(*args, **settings)

    monkeypatch.setattr("nanoflow_jax.inspect.compiled.compile_step", counted)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path), 0.0), strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        jax.jit(lambda x: x + 1)(jax.numpy.zeros(3))
        written = {path.name for path in tmp_path.iterdir()}
        assert written
        first, again = compiled(layers=1), compiled(layers=1)
        assert len(runs) == 1 and again == first
        (kept,) = (tmp_path / "absent").iterdir()
        kept.write_bytes(kept.read_bytes()[:-100])
        second = compiled(layers=1)  # warnings are errors
        assert len(runs) == 2 and second.report.totals == first.report.totals and second.memory == first.memory
        with pytest.raises(RuntimeError, match="compiling"):
            compiled(layers=1, xla_gpu_dot_merger_threshold_mb=32)
        assert {path.name for path in tmp_path.iterdir() if path.suffix != ".pbtxt"} == written | {"absent"}
        jax.jit(lambda x: x + 2)(jax.numpy.zeros(3))
        assert len(list(tmp_path.glob("*-cache"))) > len(written & {p.name for p in tmp_path.glob("*-cache")})
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_a_kernel_is_traced_once_per_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per layer: 80 layers of Mosaic kernels would take minutes to lower."""
    traced = []
    module = importlib.import_module("kernels_pallas.decode_attention")  # the package's attribute is the function
    attend = module.attend_paged

    def counted(q, *rest):
        traced.append(q.shape)
        return attend(q, *rest)

    monkeypatch.setattr(module, "attend_paged", counted)
    compiled(tokens=TOKENS + 64, layers=2)
    assert len(traced) == 1
