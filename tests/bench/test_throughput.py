"""The throughput benchmark: its window, its accounts, a real run, and rank slices."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nanoflow_jax.bench.network import network_step
from nanoflow_jax.bench.timeline import TimedStep, later_half, steady_window, time_lost
from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError, ModelConfig, config_path
from nanoflow_jax.engine import setup
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import random_params, rank_infos
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.compile import Program
from nanoflow_jax.step.slots import SlotSizes, empty_inputs, pack
from nanoflow_jax.step.trace import StepSpec
from nanoflow_jax.weights.hub import EMBEDDED

SHAPE = StepShape(8, 8, 2, 4)


def timed(
    seconds: list[float], running: list[int], *, late: float = 0.0, rows: int = 16, refused: bool = False
) -> list[TimedStep]:
    """Steps of `seconds` each, dispatched `late` after the one before has finished; one request ends in each."""
    steps, now = [], 10.0
    for i, (span, count) in enumerate(zip(seconds, running, strict=True)):
        now += late
        step = TimedStep(SHAPE, 8, rows - 8, count, 5, i, refused, 0, dispatched=now)
        now += span
        step.finished = now
        steps.append(step)
    return steps


def test_window_starts_at_the_plateau_and_ends_when_the_queue_is_empty():
    running = [10 * i for i in range(1, 10)] + [100] * 200 + [90] * 5
    steps = timed([1.0] * len(running), running)
    for step in steps[209:]:
        step.waiting = 0
    window = steady_window(steps, 300, 0)
    assert window.plateau == 100
    assert window.steps == tuple(steps[9:209])
    assert window.seconds == pytest.approx(200)
    assert window.share_of_run == pytest.approx(200 / 214)
    assert window.tokens == 200 * 16


@pytest.mark.parametrize(
    "running",
    [
        list(range(1, 400)),  # all ramp
        list(range(1, 160)) + [160] * 100,  # a plateau, but not half of the time
        [300] * 250,  # long enough, but fewer ended than ran at once
        [7],
    ],
)
def test_a_run_that_was_mostly_ramp_is_refused(running: list[int]):
    with pytest.raises(ConfigError, match="too few for a steady state") as error:
        steady_window(timed([1.0] * len(running), running), 50, 120)
    assert "\n" not in str(error.value)
    advised = re.search(r"--requests (\d+) or more", str(error.value))
    assert advised is not None
    assert int(advised[1]) >= max(120, 6 * max(running))


def test_the_later_half_of_a_run_without_a_steady_state():
    window = later_half(timed([1.0] * 100, list(range(1, 101))))
    assert len(window.steps) == 50
    assert window.seconds == pytest.approx(50)
    assert window.share_of_run == pytest.approx(0.5)
    assert later_half(timed([1.0, 1.0], [1, 1])).seconds == pytest.approx(1)


def test_every_second_has_one_cause():
    steps = timed([3.0] * 60, [20] * 60, late=1.0, rows=12)
    for step in steps[31:]:
        step.refused = True
    steps[-1].recomputed_tokens = 59 * 12 // 3  # a third of what the window computed
    window = steady_window(steps, 60, 0)
    lost = time_lost(window)
    assert sum(lost.values()) == pytest.approx(1)
    assert lost["host"] == pytest.approx(1 / 4)
    assert lost["pages"] == pytest.approx(3 / 4 * 1 / 4 * 29 / 59)
    assert lost["shape_padding"] == pytest.approx(3 / 4 * 1 / 4 * 30 / 59)
    assert lost["preemption"] == pytest.approx(3 / 4 * 3 / 4 / 3, rel=1e-2)
    assert window.tokens == 59 * 12 - 59 * 12 // 3


def test_a_step_dispatched_ahead_leaves_the_device_busy():
    steps = timed([2.0] * 80, [10] * 80)
    for step in steps:
        step.dispatched -= 1.5  # while the one before still ran
    window = steady_window(steps, 80, 0)
    assert time_lost(window)["host"] == 0
    assert window.busy == pytest.approx(np.full(79, 2.0))


# -- a run

SMALL = [
    *("bench", "throughput", "--quiet", "--model", "tiny", "--layers", "1", "--deterministic"),
    *("--tensor-parallel-size", "2", "--tokens-per-step", "32", "--decode-slots", "16", "--page-size", "16"),
]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = main([*SMALL, *arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_a_run(bench: Callable[..., tuple[int, str, str]], tmp_path: Path):
    picture = tmp_path / "run.png"
    status, out, err = bench(
        *("--workload", "constant:12:20", "--gpu", "h200", "--json", "--plot", str(picture), "--requests", "150")
    )
    assert status == 0, err
    found = json.loads(out)
    config = read_config(EMBEDDED["tiny"] / "config.json")
    optimum = load_hardware("h200").bf16_flops / (2 * replace(config, num_layers=1).num_params)
    rate, window = found["tokens_per_second_per_gpu"], found["window"]
    assert found["gpus"] == 2
    assert (found["layers"], found["model_layers"]) == (1, 3)
    assert rate == pytest.approx(window["tokens"] / window["seconds"] / 2)
    assert found["share_of_optimum"] == pytest.approx(rate / optimum)
    assert set(found["lost"]) == {"host", "pages", "shape_padding", "preemption", "useful"}
    assert sum(found["lost"].values()) == pytest.approx(1)
    assert min(found["lost"].values()) >= 0
    assert window["share_of_run"] >= 0.5
    assert window["step_shapes"] == 1
    assert window["running_median"] > 8  # with 16 slots; a deterministic engine's one shape has a row for each
    assert window["tokens"] == window["prefill_tokens"] + window["decode_tokens"] <= 32 * window["steps"]
    # Of a request, 12 rows are of the prompt and 19 of the output (its last token is sampled, not computed).
    assert window["prefill_tokens"] / window["decode_tokens"] == pytest.approx(12 / 19, rel=0.1)
    assert window["requests_ended"] >= window["running_median"]
    assert min(found["compile_seconds"], found["warmup_seconds"], window["ramp_seconds"]) > 0
    assert found["steady"]
    assert window["layer_ms"] == window["step_ms_median"]  # there is one
    assert 0 < window["dispatch_ms_median"] < window["step_ms_median"]
    assert window["gap_ms_median"] >= 0
    assert {"jax", "jaxlib", "nanoflow_jax", "python"} == set(found["versions"])
    assert found["command"].startswith("nanoflow bench throughput --quiet --model tiny")
    assert found["date"][:2] == "20"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert picture.stat().st_size > 10_000


def test_too_few_requests_and_pages_that_run_out(bench: Callable[..., tuple[int, str, str]]):
    status, out, err = bench("--workload", "constant:12:20", "--requests", "9")
    assert (status, out) == (1, "")
    assert re.fullmatch(r"nanoflow bench: throughput: 9 requests are too few .* --requests \d+ or more\n", err)
    # All the same, if it is asked for: the later half of what there was, and told so.
    few = ("--workload", "constant:12:20", "--requests", "9", "--accept-unsteady")
    status, out, err = bench(*few, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert not found["steady"]
    assert 0 < found["window"]["share_of_run"] < 1  # how much: measured steps, so above, with made-up ones
    # Three pages of 16 tokens per request at most, and pages for four requests in 16 slots.
    status, out, err = bench("--workload", "constant:12:20", "--requests", "60", "--kv-cache-tokens", "128", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["lost"]["pages"] > 0.3
    assert found["lost"]["pages"] > 4 * found["lost"]["shape_padding"]  # that of the steps that let somebody in
    assert found["window"]["running_median"] < 8


def test_one_shape_is_compiled_for_a_full_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """And not deterministic, so that any plan can be measured; one line says which `auto` is. Weights are in the dtype
    that is asked for."""
    compiled: list[Any] = []
    real = setup.Runner

    def runner(program: Program, params: Any, shapes: Any, progress: bool) -> Any:
        compiled.append((list(shapes), program.spec.deterministic, params.layers[0].down.values.dtype.name))
        return real(program, params, shapes, progress)

    monkeypatch.setattr(setup, "Runner", runner)
    arguments = [a for a in SMALL if a != "--deterministic"]
    more = ("--one-shape", "--workload", "constant:12:20", "--requests", "60", "--json", "--plan", "auto")
    more += ("--quantization", "fp8")
    assert main([*arguments, *more, "--accept-unsteady", "--gpu", "h200"]) == 0
    (((shape,), deterministic, weights),) = compiled
    assert (shape.decode_rows, shape.prefill_rows, deterministic, weights) == (16, 16, False, "float8_e4m3fn")
    out, err = capsys.readouterr()
    assert json.loads(out)["options"]["one_shape"]
    assert json.loads(out)["plan"].startswith("auto_llama_3_1_70b_8xh200")
    assert err.endswith("none is known for this model on 2 x h200; nanoflow search --quantization fp8 finds one\n")


def test_bad_options(bench: Callable[..., tuple[int, str, str]]):
    for arguments, message in (
        (("--plot", "/nowhere/at/all.png"), "its folder does not exist"),
        (("--workload", "constant:x"), "expected constant:PROMPT:OUTPUT"),
        (("--layers", "4"), "the model has 3"),
        (("--inspect",), "--rank-of N is needed too"),
        (("--workload", "constant:512:513"), "the model takes at most 1024"),
        (("--rank-of", "8"), "does not go together with tensor-parallel-size"),
        (("--plan", "nanoflow"), "unknown name 'nanoflow'"),
        (("--plan", "auto", "--compare", "nanoflow"), "unknown name 'nanoflow'"),
    ):
        status, out, err = bench(*arguments)
        assert (status, out) == (1, ""), arguments
        assert message in err
        assert err.count("\n") == 1


def test_host(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "host", "--requests", "64", "--tokens-per-step", "128", "--steps", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["requests"], found["tokens"], found["steps"]) == (64, 128, 40)
    assert 0 < found["host_ms_median"] <= found["host_ms_p99"]
    assert 0.5 * 128 < found["rows_used_mean"] <= 128
    assert found["arguments"] == (5 * 80 + 4) + (2 + 4) + 1  # of 70B: weights, pages and slots, inputs


# -- rank slices

SIZES, WHOLE_STEP = SlotSizes(320, 8, 4), StepShape(320, 192, 4, 4)


def tiny_config() -> ModelConfig:
    return replace(read_config(EMBEDDED["tiny"] / "config.json"), num_layers=1)


def lowered_step(
    plan_name: str, *, rank_of: int | None, deterministic: bool = False, shape: StepShape = WHOLE_STEP
) -> jax.stages.Lowered:
    config, plan = tiny_config(), load_plan(plan_name)
    infos: Any = param_infos(config, 8, plan.layouts(config, 8))
    mesh = Mesh(np.array(jax.devices()[: 1 if rank_of else 8]), (AXIS,))
    if rank_of:
        infos = rank_infos(infos, rank_of)
    spec = StepSpec(config, plan, shape, deterministic=deterministic, rank_of=rank_of)
    return Program(spec, mesh, infos, SIZES, 16, 8).lower(spec.shape)


def dots(lowered: jax.stages.Lowered) -> Counter[str]:
    """How often each GEMM, by dimensions contracted and types, is in the program."""
    lines = [line for line in lowered.as_text().splitlines() if "stablehlo.dot_general" in line]
    return Counter(re.sub(r".*dot_general \S+ \S+ ", "", line).split(" loc")[0].replace("%", "") for line in lines)


@pytest.mark.parametrize("plan", ["nanoflow_70b", "scatter_70b"])
def test_a_rank_slice_has_the_local_gemms_of_the_whole_program(plan: str):
    whole, part = dots(lowered_step(plan, rank_of=None)), dots(lowered_step(plan, rank_of=8))
    assert sum(whole.values()) > 10
    assert part == whole
    config = tiny_config()
    one_device = param_infos(config, 1)
    assert rank_infos(param_infos(config, 8), 8).layers[0].kqv.shape != one_device.layers[0].kqv.shape


def test_a_rank_slice_has_no_collectives_but_copies_of_their_size():
    collective = r"stablehlo\.(all_gather|all_reduce|reduce_scatter|all_to_all)"
    text = lowered_step("two_gather_one_reduce", rank_of=8).as_text()
    assert not re.search(collective, text)
    assert re.search(collective, lowered_step("two_gather_one_reduce", rank_of=None).as_text())
    for size, count in (("8x32x512", 1), ("8x512x16", 1)):  # GEMV.AG of [w/p, n], O.AG of [n, H/p]
        assert len(re.findall(rf"stablehlo.broadcast_in_dim .*-> tensor<{size}xf32>", text)) == count
    assert len(re.findall(r"stablehlo.reverse .*tensor<512x128xf32>", text)) == 2  # EMBED.AR, D.AR


@pytest.mark.parametrize(
    "name",
    ["all_gather", "all_gather_rows", "all_reduce", "all_reduce_in_order", "reduce_scatter_rows", "all_reduce_max"],
)
def test_copies_have_the_shapes_of_the_collectives(name: str):
    collective = getattr(collectives, name)
    x = jax.ShapeDtypeStruct((16, 6), np.dtype(np.float32))
    mesh = Mesh(np.array(jax.devices()), (AXIS,))

    def shape_of(rank_of: int | None, mesh: Mesh) -> tuple[int, ...]:
        def run(x: jax.Array) -> jax.Array:
            with collectives.rank_slice(rank_of):
                return collective(x)

        spec = jax.sharding.PartitionSpec()
        return jax.eval_shape(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False), x).shape

    assert shape_of(8, Mesh(np.array(jax.devices()[:1]), (AXIS,))) == shape_of(None, mesh)


def test_the_slice_ends_with_its_context():
    assert collectives._slice_of.get() is None
    with pytest.raises(RuntimeError), collectives.rank_slice(4):
        assert collectives.device_count() == 4
        raise RuntimeError
    assert collectives._slice_of.get() is None


def test_a_rank_slice_runs_on_one_device():
    shape = StepShape(16, 16, 2, 4)
    lowered = lowered_step("two_gather_one_reduce", rank_of=8, deterministic=True, shape=shape)
    config, plan = tiny_config(), load_plan("two_gather_one_reduce")
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    infos = rank_infos(param_infos(config, 8, plan.layouts(config, 8)), 8)
    abstract = Program(StepSpec(config, plan, shape, rank_of=8), mesh, infos, SIZES, 16, 8).state
    state = jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), abstract)
    packed = pack(empty_inputs(shape, 16, SIZES.slots, SIZES.bias_rows))
    _, end = lowered.compile()(tuple(jax.tree.leaves(random_params(infos, mesh))), state, packed)
    tokens = np.asarray(end.tokens)
    assert tokens.shape == (18,)
    assert tokens.min() >= 0
    assert tokens.max() < 40  # this rank's rows of the vocabulary


def test_modelled_network():
    config = read_config(config_path("models", "llama_3_1_70b"))
    hardware, shape = load_hardware("h200"), StepShape(1280, 768, 48, 17)
    figures = hardware.calibration

    def seconds(sent: list[float]) -> float:
        rate = hardware.nvlink_bandwidth * figures.network_efficiency
        return sum(sent) / rate + len(sent) * figures.network_latency_us * 1e-6

    wire = 7 / 8 * 2048 * 8192 * 2  # bytes that an all-gather of [2048, 8192] bf16 sends
    sampler = [2 * 7 / 8 * (1280 + 48) * 4] * 2
    two = network_step(config, load_plan("two_all_reduce"), shape, hardware, 8)
    assert two.collectives == 80 * 2 + 1 + 2
    assert two.seconds == pytest.approx(seconds([2 * wire] * 161 + sampler))
    mixed = network_step(config, load_plan("two_gather_one_reduce"), shape, hardware, 8)
    assert mixed.collectives == 80 * 3 + 1 + 2
    assert mixed.seconds == pytest.approx(seconds([wire] * 160 + [2 * wire] * 81 + sampler))


@pytest.mark.parametrize("options", [[], ["--cpu-devices", "1"]], ids=str)
def test_without_a_model_a_cpu_is_refused(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not given one that takes its memory; what is told to take runs."""
    from nanoflow_jax.bench import compare

    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    monkeypatch.setattr(compare, "measure_in_turn", lambda *_: pytest.fail("it runs"))
    assert main(["bench", "throughput", *options]) == 1
    told = capsys.readouterr().err
    assert told.startswith("nanoflow bench: --model: one of a CPU's size is needed") and told.count("\n") == 1

    class Runs(Exception):
        pass

    def runs(options: Any, *_: Any) -> None:
        assert (options.model, options.tokens_per_step, options.decode_slots) == ("tiny", 128, 32)
        raise Runs

    monkeypatch.setattr(compare, "measure_in_turn", runs)
    with pytest.raises(Runs):
        main(["bench", "throughput", *options, *told.partition("accepted: ")[2].split()])
