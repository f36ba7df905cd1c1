"""`nanoflow profile`: a killed run goes on where it was, foreign tables are refused, answers say what they rest on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from nanoflow_jax.cli import main
from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.demand import StepLoad
from nanoflow_jax.cost.latency import EXTRAPOLATED, PROFILE, PUBLISHED, ROOFLINE, LatencyModel, RooflineModel
from nanoflow_jax.cost.shapes import OpCosts, Shapes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import model_config
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.profile import timing
from nanoflow_jax.profile.grid import Curve, SampleGrid
from nanoflow_jax.profile.measured import EXTRAPOLATED_RATE, ProfileModel, load_profile
from nanoflow_jax.profile.points import GRIDS, Grid, Pair, Point, Scope, points, spread
from nanoflow_jax.profile.programs import Bench, Program
from nanoflow_jax.profile.run import Machine, _scope, time_left
from nanoflow_jax.profile.table import FORMAT, TableWriter, read_table, these_versions, this_machine
from nanoflow_jax.profile.timing import PairTiming, Timing, speeds
from tests.reference.checkpoints import write_checkpoint

ROOT = Path(__file__).parents[2]


def arguments(output: Path, *more: str) -> list[str]:
    options = ["--model", "tiny", "--devices", "1", "--tokens-per-step", "32", "--context", "64", "--points", "few"]
    return ["profile", *options, "--ops", "norm", "append", "--output", str(output), "--quiet", *more]


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A process is killed; this one goes on, the same machine with as many devices."""
    output = tmp_path / "profile.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nanoflow_jax", *arguments(output)]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path)
    deadline = time.monotonic() + 300
    while (not output.exists() or output.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    whole = before[: before.rindex(b"\n") + 1]
    output.write_bytes(whole + b'{"op": "gemm", "m"')  # as if the last write had been torn
    assert main(arguments(output, "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert output.read_bytes().startswith(whole)
    keys = [Point.from_json({k: v for k, v in line.items() if k not in TIMES}) for line in lines[1:]]
    assert len(set(keys)) == len(keys) == report["points"]
    assert report["measured_now"] == report["points"] - (whole.count(b"\n") - 1) > 0
    assert report["skipped"] and not report["failed"]

    table = read_table(output)
    other = json.loads(whole.splitlines()[0])
    other["versions"]["jax"] = "0.0.1"
    output.write_text(json.dumps(other) + "\n")
    assert main(arguments(output)) == 1
    refused = capsys.readouterr().err
    assert refused.count("\n") == 1 and "'0.0.1'" in refused
    assert len(table.times) == len(keys)


TIMES = ("us", "low", "high", "runs")


def header() -> dict:
    return {"format": FORMAT, "machine": this_machine(), "versions": these_versions(), "memory_bytes": 2**30}


GEMM = {m: Point.of("gemm", m=m, n=64, k=32, dtype="f32") for m in (8, 64)}
HEADS = {"q_heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "f32"}
DECODE = {
    (r, c): Point.of("decode_attention", requests=r, context=c, sms=0, **HEADS) for r in (1, 16) for c in (64, 256)
}
PAIR = Pair(GEMM[64], DECODE[16, 256])


def write(path: Path) -> None:
    with TableWriter(path, header(), 0) as writer:
        writer.add(Point.of("copy", bytes=2**20), Timing(1000.0, 900.0, 1100.0, 5))
        for m, point in GEMM.items():
            writer.add(point, Timing(float(m), m - 1.0, m + 1.0, 5))
        for (requests, context), point in DECODE.items():
            writer.add(point, Timing(1.0 + requests * context / 100, 1.0, 1e3, 5))
        writer.add(PAIR, PairTiming(64.0, 42.0, ((2, 1, 150.0), (1, 4, 180.0)), 0.6, 0.8))
        writer.add(Point.of("norm", rows=8, hidden=32, dtype="f32"), "out of memory")


def test_every_answer_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "table.jsonl")
    measured = load_profile(tmp_path / "table.jsonl")
    check_sources(measured)
    assert measured.correction == 0
    silent = SampleGrid.at, Curve.at  # twins that extrapolate and do not say so
    for owner, at in zip((SampleGrid, Curve), silent, strict=True):
        with monkeypatch.context() as patch, pytest.raises(AssertionError, match=r"profile"):
            patch.setattr(owner, "at", lambda self, place, at=at: (at(self, place)[0], True))
            check_sources(measured)


def check_sources(model: LatencyModel) -> None:
    assert (model.gemm(64, 64, 32, "f32").us, model.gemm(64, 64, 32, "f32").source) == (64.0, PROFILE)
    assert (model.gemm(36, 64, 32, "f32").us, model.gemm(36, 64, 32, "f32").source) == (pytest.approx(36.0), PROFILE)
    assert model.gemm(65, 64, 32, "f32").source == model.gemm(4, 64, 32, "f32").source == EXTRAPOLATED
    assert model.gemm(64, 64, 33, "f32").source == model.gemm(64, 64, 32, "bf16").source == ROOFLINE
    assert model.kernel(1.0, 1.0).source == model.norm(8, 32, element_bytes=4).source == ROOFLINE
    for (requests, context), us in (((1, 64), 1.64), ((16, 64), 11.24), ((4, 100), 5.0)):
        answer = model.decode_attention(requests, context, 2, 1, 16, kv_bytes=4)
        assert (answer.us, answer.source) == (pytest.approx(us), PROFILE)  # the swapped axes would give another
    assert model.decode_attention(17, 64, 2, 1, 16, kv_bytes=4).source == EXTRAPOLATED
    assert model.rate("memory", 0.5, "compute").source == PROFILE
    assert model.rate("memory", 0.5, "compute").speed == 0.8 and model.rate("compute", 0.5, "memory").speed == 0.6
    assert model.rate("memory", 0.25, "compute").source == EXTRAPOLATED_RATE
    assert model.rate("network", 0.5, "compute").source == PUBLISHED


def test_pairs_of_the_same_kinds_share_a_curve(tmp_path: Path):
    """What bounds an op is its kind. Pairs at one share count by their mean, on both sides."""
    moved = [Point.of("collective", kind=k, devices=8, dtype="f32", bytes=2**20) for k in ("all-gather", "all-reduce")]
    prefill = Point.of("prefill_attention", tokens=4096, context=256, **HEADS)
    timings = {
        Pair(GEMM[64], moved[0]): (0.9, 0.5),
        Pair(GEMM[64], moved[1]): (0.7, 0.6),
        Pair(prefill, moved[1]): (0.5, 0.7),
        Pair(DECODE[16, 256], moved[0]): (0.4, 0.3),
    }
    write(tmp_path / "table.jsonl")
    with TableWriter(tmp_path / "table.jsonl", header(), 0) as writer:
        for pair, speeds_of in timings.items():
            writer.add(pair, PairTiming(64.0, 42.0, ((1, 1, 1.0), (1, 1, 1.0)), *speeds_of))
    model = load_profile(tmp_path / "table.jsonl")
    share = model.hardware.calibration.network_share
    for kind, kept in (("compute", (0.7, 0.6)), ("memory", (0.4, 0.3))):
        mine, other = model.rate(kind, 1 - share, "network"), model.rate("network", share, kind)
        assert (mine.speed, other.speed) == pytest.approx(kept) and mine.source == other.source == PROFILE
    assert model.rate("memory", 0.5, "compute").speed == 0.8  # the pair without a collective is no part of these


def test_force_begins_anew_and_keeps_the_old_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "profile.jsonl"
    small = ["--devices", "1", "--tokens-per-step", "8", "--context", "64", "--points", "few", "--ops", "copy"]
    arguments = ["profile", "--model", "tiny", *small, "--output", str(output), "--quiet"]
    old = "model weights\n"
    output.write_text(old)
    assert main(arguments) == 1 and output.read_text() == old
    assert "--force keeps it aside" in capsys.readouterr().err
    for aside in ("profile.jsonl.1", "profile.jsonl.2"):
        before = output.read_text()
        assert main([*arguments, "--force"]) == 0
        assert (tmp_path / aside).read_text() == before
        assert f"kept aside: {tmp_path / aside}" in capsys.readouterr().err
        assert [point.op for point in read_table(output).times] == ["copy"]
        changed = output.read_text().replace('"name": "tiny"', '"name": "other"')
        output.write_text(changed)
    output.write_text(changed.replace('"name": "other"', '"name": "tiny"'))
    assert main([*arguments, "--force"]) == 0  # the same machine and model: nothing to begin anew
    assert "0 of 1 points measured now" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 3


def test_another_table_is_refused(tmp_path: Path):
    path = tmp_path / "table.jsonl"
    write(path)
    with pytest.raises(ConfigError, match=r"not on h200; --allow-foreign"):
        load_profile(path, load_hardware("h200"))
    lines = path.read_text().splitlines()
    changed = json.loads(lines[0])
    changed["machine"]["cpu"] = "another"
    path.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    with pytest.raises(ConfigError, match="cpu 'another'"):
        load_profile(path)
    assert isinstance(load_profile(path, allow_foreign=True), ProfileModel)
    path.write_text("\n".join([lines[0], '{"op": "gemm", "m": 8, "us": -1}', *lines[1:]]) + "\n")
    with pytest.raises(ConfigError, match=r"table\.jsonl:2: "):
        read_table(path)
    path.write_text("model weights\n")
    with pytest.raises(ConfigError, match=r"table\.jsonl:1: "):
        read_table(path)


def test_one_process_writes(tmp_path: Path):
    with (
        TableWriter(tmp_path / "t", header(), 0),
        pytest.raises(ConfigError, match="another process"),
        TableWriter(tmp_path / "t", header(), 0),
    ):
        pass


@pytest.mark.parametrize(("a", "b"), [(0.64, 0.95), (1.0, 1.0), (0.5, 0.5), (0.9, 0.3)])
def test_speeds_of_a_pair_come_back(a: float, b: float):
    """Two rounds played with known speeds, one outlasting the other each time."""
    assert speeds((1 - a) / b, (1 - b) / a) == pytest.approx((a, b))


@pytest.mark.parametrize("start_us", [0.0, 10.0, 50.0, 59.9])
def test_a_pair_is_timed_against_each_side_alone(start_us: float, monkeypatch: pytest.MonkeyPatch):
    """A second op of 60 us, of which `start_us` do not grow with its work, beside a first of 200 us."""
    keep_first, keep_second = 0.6, 0.8

    def us(a: int, b: int) -> float:
        one, two = 200.0 * a, (start_us + (60.0 - start_us) * b) * bool(b)
        both = min(one / keep_first, two / keep_second)
        return both + one - both * keep_first + two - both * keep_second

    def timed(made: list[tuple[Any, int]], grid: Grid) -> list[Timing]:
        return [Timing(us(*program.calls), 0.0, 0.0, grid.runs) for program, _ in made]

    monkeypatch.setattr(timing, "time_programs", timed)

    def build(a: int, b: int) -> Program:
        return Program(lambda times: None, (a, b))

    if start_us == 59.9:
        with pytest.raises(ValueError, match="too much to time"):
            timing.time_pair(build, GRIDS["few"])
        return
    found = timing.time_pair(build, GRIDS["few"])
    assert (found.first_speed, found.second_speed) == pytest.approx((keep_first, keep_second))
    assert found.rounds[1][1] > 1  # the second outlasts the first by more work


@pytest.mark.parametrize(("backend", "streams"), [("mosaic", True), ("xla", False)])
def test_a_gpu_measures_streams_where_attention_leaves_sms_free(backend: str, streams: bool):
    mesh = Mesh(np.array(jax.devices()[:1]), (AXIS,))
    machine = Machine(Bench(mesh, gpu=True, most_bytes=2**30), backend, 64, load_hardware("h200"))
    found = points(_scope(machine, model_config("llama-3.1-70b")[1], (), 8, 2048, 8192), GRIDS["few"], ["pair"])
    assert bool(found) == streams and all(pair.second["sms"] for pair in found if isinstance(pair, Pair))


def scope(model: str, devices: int, tokens: int, **changes: object) -> Scope:
    plans = tuple(load_plan(name) for name in ("nanoflow_70b", "scatter_70b"))
    shapes = Shapes.of(model_config(model)[1], devices)
    made = Scope(shapes, plans, tokens, 4096, 64, 132, streams=True, network=True, pool_bytes=2**33)
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


def test_points_cover_the_plans():
    found = points(scope("llama-3.1-70b", 8, 2048), GRIDS["normal"])
    assert len({p.op for p in found[:9]}) == 9 and len(set(found)) == len(found)
    gemms = {(p["n"], p["k"]) for p in found if isinstance(p, Point) and p.op == "gemm"}
    assert gemms == {(1280, 8192), (1024, 8192), (8192, 1024), (7168, 8192), (8192, 3584), (16032, 8192)}
    assert {p["m"] for p in found if isinstance(p, Point) and p.op == "gemm"} >= {256, 384, 640, 768, 1408, 2048}
    moved = {p["kind"] for p in found if isinstance(p, Point) and p.op == "collective"}
    assert moved == {"all-gather", "all-reduce", "reduce-scatter"}
    beside = {(p.first.op, p.second["kind"]) for p in found if isinstance(p, Pair) and p.second.op == "collective"}
    assert beside == {(op, kind) for op in ("gemm", "decode_attention", "prefill_attention") for kind in moved}
    assert {p.second["sms"] for p in found if isinstance(p, Pair) and p.second.op == "decode_attention"} > {44, 88}
    alone = points(scope("llama-3.1-70b", 8, 2048, network=False, sms=0), GRIDS["few"])
    assert not any(p.op == "collective" for p in alone) and len(alone) < len(found)
    assert spread(8, 2048, 3, 8) == [8, 128, 2048] and spread(64, 64, 5) == [64]
    assert time_left({"gemm": [1.0, 3.0]}, [found[1], found[3]]) == 4.0


def test_points_cover_experts():
    """Both splits, where plans have both; UG of the experts in pairs, where no other is there."""
    whole, over = (replace(load_plan("two_all_reduce"), expert_parallel=way) for way in (True, False))
    qwen = scope("qwen3-235b-a22b", 8, 2048, plans=(whole, over))
    found = [p for p in points(qwen, GRIDS["few"]) if isinstance(p, Point)]
    grouped = {tuple(p[name] for name in ("experts", "n", "k", "parts", "room")) for p in found if "group" in p.op}
    assert grouped == {(16, 1536, 4096, 2, 8), (16, 4096, 1536, 1, 8), (128, 192, 4096, 2, 1), (128, 4096, 192, 1, 1)}
    rows = {(p["spread"], p["rows"]) for p in found if p.op == "combine"}
    assert rows == {(spread, n) for spread in (1, 8) for n in (8, 128, 2048)}
    assert {p["rows"] for p in found if p.op == "gather" and p["room"] == 1} == {64, 1024, 16384}
    assert (128, 4096) in {(p["n"], p["k"]) for p in found if p.op == "gemm"}  # the router
    pairs = [p for p in points(qwen, GRIDS["few"], ["pair"]) if isinstance(p, Pair)]
    assert {p.first.op for p in pairs} == {"grouped_gemm", "decode_attention", "prefill_attention"}
    assert not {"grouped_gemm", "gather", "combine"} & {
        p.op for p in points(scope("llama-3.1-70b", 8, 64), GRIDS["few"])
    }


def test_a_step_of_experts_is_asked_for_what_was_measured(tmp_path: Path):
    """Every op of a layer that the simulator asks for has its measured time, and 1.5 times the rows of a device take
    longer."""
    config, plan = model_config("qwen3-235b-a22b")[1], load_plan("auto_qwen3_235b_a22b_8xh200")
    tokens = plan.tokens_per_step or 0
    with TableWriter(tmp_path / "t", header(), 0) as writer:
        for point in points(scope("qwen3-235b-a22b", 8, tokens, plans=(plan,)), GRIDS["few"]):
            if isinstance(point, Point) and point.op in ("gemm", "grouped_gemm", "gather", "combine"):
                us = float(point["m" if point.op == "gemm" else "rows"])
                writer.add(point, Timing(us, us, us, 5))
    model = load_profile(tmp_path / "t", load_hardware("h200"), allow_foreign=True)
    costs = OpCosts(model, Shapes.of(config, 8), StepLoad(tokens, 0, 1024.0, 0.0))
    found = [costs.grouped("UG", 1152, True), costs.grouped("D", 1152, True), costs.dispatch(1152, True)]
    found += [costs.combine(1152, True), costs.router(1152)]
    assert [(p.us, p.source) for p in found] == [(pytest.approx(1152), PROFILE)] * 5
    more = replace(costs, imbalance=1.5)
    assert more.grouped("UG", 1152, True).us == more.dispatch(1152, True).us == pytest.approx(1728)
    even, uneven = (replace(c, model=RooflineModel(model.hardware)).combine(1152, True).us for c in (costs, more))
    assert more.combine(1152, True).us == pytest.approx(1152 * uneven / even) and uneven > 1.15 * even
    assert costs.grouped("UG", 1152, False).source == ROOFLINE


def test_a_profile_of_experts_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All of it is measured, by the same model as a step's."""
    folder, output = write_checkpoint("mixtral", tmp_path), tmp_path / "t.jsonl"
    sizes = ["--devices", "1", "--tokens-per-step", "16", "--context", "64", "--points", "few"]
    ops = ["--ops", "grouped_gemm", "gather", "combine", "--output", str(output), "--quiet"]
    assert main(["profile", "--model", str(folder), *sizes, *ops]) == 0, capsys.readouterr().err
    table = read_table(output)
    assert {p.op for p in table.times} == {"grouped_gemm", "gather", "combine"} and not table.failed
