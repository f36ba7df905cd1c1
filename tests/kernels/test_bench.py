"""The benchmark: its cases compile for the GPU they are meant for, and tiny ones run from end to end on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import decode_attention
from kernels_pallas.bench import __main__ as bench
from kernels_pallas.bench import baselines, cases, experts, goals, kernels, measure, report
from kernels_pallas.bench.cases import CASES, QUICK, TINY, AppendCase, DecodeCase, PrefillCase
from kernels_pallas.bench.expert_cases import ExpertCase
from kernels_pallas.bench.kernels import Setting
from kernels_pallas.bench.measure import TINY_EFFORT


def test_end_to_end_under_the_interpreter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every kernel once, as on a GPU: checked, timed, written as JSON and as Markdown."""
    out, tables = tmp_path / "kernels.json", tmp_path / "kernels.md"
    assert bench.main(["--interpret", "--out", str(out), "--markdown", str(tables)]) == 0
    result = json.loads(out.read_text())
    assert list(result["cases"]) == list(TINY)
    assert result["finished"]
    assert result["interpreted"]
    assert result["versions"]["jax"] == jax.__version__
    assert "--interpret" in result["command"]
    for name, case in result["cases"].items():
        ours = case["results"]["mosaic"]
        if "not_available" in ours:  # only ever said of a kernel that this GPU has not
            assert "has no Mosaic path" in ours["not_available"]
            continue
        assert ours["us"] > 0
        bound = "percent_of_gemm" if "flops_per_second" in ours else "percent_of_copy"
        assert ours[bound] > 0
        assert ours["error"] < (1e-12 if name.startswith("append") else 5e-3)
    triton = {name: case["results"].get("jax triton", {}) for name, case in result["cases"].items()}
    assert triton["decode_attention/tiny-2xragged"]["error"] <= measure.TOLERANCE
    assert "no scale" in triton["decode_attention/tiny-2x70-fp8"]["not_available"]
    text = tables.read_text()
    assert text == report.markdown(result)
    for word in ("tiny-2xragged", "## append_kv", "say nothing about a GPU", "takes no scale per head"):
        assert word in text
    head, *lines = map(json.loads, capfd.readouterr().out.splitlines())
    assert head["copy_bytes_per_second"] == result["copy_bytes_per_second"] > 0
    assert {line.pop("case"): line for line in lines} == result["cases"]


def test_refuses_without_a_gpu(capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("kernels_pallas.bench: no NVIDIA GPU")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "decode"], "--case: 'decode' is not a case; --list names them"),
        (["--out", "/nowhere/x.json"], "/nowhere is not a folder"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments)
    assert caught.value.code == 2
    assert message in capfd.readouterr().err


CHEAP = DecodeCase(model=cases.Model(name="t", q_heads=2, kv_heads=2, head_dim=8), rows=3, context=150, ragged=True)


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """K for V, in fp8 a scale that is ignored, and an append that misses a row: each fails before it is measured."""

    def wrong(q: Any, shared: Any, table: Any) -> Any:
        keys, _, lengths, *scales = shared
        named = {"k_scale": scales[0], "v_scale": scales[1] * 1.1} if scales else {}
        return decode_attention(q, keys, shared[1] if scales else keys, table, lengths, **named)[0]

    def right(q: Any, shared: Any, table: Any) -> Any:
        keys, values, lengths, *scales = shared
        named = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if scales else {}
        return decode_attention(q, keys, values, table, lengths, **named)[0]

    for fp8 in (False, True):
        case = DecodeCase(**{**vars(CHEAP), "fp8": fp8})
        inputs = kernels.DecodeInputs.make(case, Setting(effort=TINY_EFFORT))
        if fp8:  # what is wrong above is its factor alone
            assert kernels.time_decode(right, inputs, TINY_EFFORT)["error"] < 1e-2
        with pytest.raises(RuntimeError, match="a row is off by"):
            kernels.time_decode(wrong, inputs, TINY_EFFORT)

    setting = Setting(effort=TINY_EFFORT)
    append = AppendCase(model=CHEAP.model, rows=5, pages=3)
    assert kernels.time_append(append, setting, "xla")["seconds"] > 0
    plain = kernels.append_kv
    monkeypatch.setattr(kernels, "append_kv", lambda k, v, *rows, **more: (plain(k, v, *rows, **more)[0], v))
    with pytest.raises(RuntimeError, match="a row is off by inf"):
        kernels.time_append(append, setting, "xla")


def test_failures_and_missing_baselines_are_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A kernel that fails, a library that is not there, and a stop after the first case: the report has what it had."""
    out = tmp_path / "kernels.json"
    monkeypatch.setattr(bench, "TINY", {"decode_attention/a": CHEAP, "decode_attention/b": CHEAP})
    calls = []

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        raise RuntimeError("out of memory\nand a long trace")

    monkeypatch.setattr(kernels, "time_decode", fails)
    monkeypatch.setattr(baselines, "TRITON", "jax.no_such_module")
    with pytest.raises(KeyboardInterrupt):
        bench.main(["--interpret", "--out", str(out)])
    result = json.loads(out.read_text())
    assert not result["finished"]
    assert list(result["cases"]) == ["decode_attention/a"]
    found = result["cases"]["decode_attention/a"]["results"]
    assert found["mosaic"] == {"failed": "out of memory"}
    assert found["jax triton"]["not_available"].startswith("jax.no_such_module cannot be imported")
    assert "did not finish" in report.markdown(result)
    capfd.readouterr()


def test_time_that_has_run_out_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--interpret", "--minutes", "0"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert not json.loads(line)["finished"]
    assert bench.main(["--interpret", "--minutes", "0", "--out", str(tmp_path / "k.json")]) == 0
    result = json.loads((tmp_path / "k.json").read_text())
    assert result["left_out"] == list(TINY)
    assert not result["finished"]


def test_torch_is_asked_for_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: None)
    assert baselines.in_torch(QUICK, 1) == {"torch": {"not_available": "torch is not installed"}}

    class Done:
        returncode = 1
        stdout = '{"implementation": "torch", "case": "a", "seconds": 1.0}\nnoise\n'
        stderr = "Traceback\nno GPU"

    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(baselines.subprocess, "run", lambda *_, **__: Done())
    assert baselines.in_torch(QUICK, 1) == {"torch": {"a": {"seconds": 1.0}, "not_available": "no GPU"}}
    Done.returncode, Done.stdout = 0, '{"not_available": "torch sees no GPU"}\n'
    assert baselines.in_torch(QUICK, 1) == {"torch": {"not_available": "torch sees no GPU"}}


def test_torch_comes_last_and_ours_in_a_process_that_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """So that the one does not hold the memory that the other needs, and what takes longest costs no figure of ours."""
    name, out, events = QUICK[0], tmp_path / "k.json", []
    head = {"device": "d", "date": "t", "commit": "c", "versions": {}, "command": "", "interpreted": False}

    def ours(command: list[str], **_: Any) -> Namespace:
        events.append("ours")
        assert "--no-torch" in command
        case = {"results": {"mosaic": {"us": 1.0, "bytes_per_second": 1e12}}}
        out.write_text(json.dumps({**head, "finished": True, "copy_bytes_per_second": 4e12, "cases": {name: case}}))
        return Namespace(returncode=0)

    def torch(names: list[str], timeout: float) -> dict[str, Any]:
        events.append("torch")
        return {"torch": {name: {"error": 1e-3, "seconds": 1e-3}}}

    monkeypatch.setattr(bench.subprocess, "run", ours)
    monkeypatch.setattr(bench.baselines, "in_torch", torch)
    options = bench._parser().parse_args(["--case", name, "--out", str(out)])
    assert bench._with_torch(options, [name], ["--case", name]) == 0
    assert events == ["ours", "torch"]
    found = json.loads(out.read_text())["cases"][name]["results"]["torch"]
    case = CASES[name]
    assert isinstance(case, DecodeCase)
    assert found["percent_of_copy"] == pytest.approx(100 * case.bytes / 1e-3 / 4e12)
    assert json.loads(capfd.readouterr().out)["results"]["torch"] == found


def test_a_run_that_is_killed_has_lost_nothing(tmp_path: Path) -> None:
    """kill -9 as soon as the first case is told: it is on the disk, whole, and on standard output."""
    out, name = tmp_path / "k.json", "append_kv/tiny-5"
    command = [sys.executable, "-m", "kernels_pallas.bench", "--interpret", "--ours", "--out", str(out)]
    process = subprocess.Popen(
        [*command, "--case", name, "--case", "prefill_attention/tiny-24-after-50"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(bench.__file__).parents[2],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as lines:
        next(lines)
        told = json.loads(next(lines))
        process.kill()
    assert process.wait() == -signal.SIGKILL
    result = json.loads(out.read_text())
    assert told["case"] == name
    assert result["cases"][name]["results"] == told["results"]
    assert not result["finished"]


def test_ceilings_of_an_earlier_process(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The session measures the copy and the GEMM once; where they are not known, a rate stands without a share."""
    assert bench.main(["--interpret", "--only-ceilings"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    ceilings = tmp_path / "ceilings"
    ceilings.write_text(line + "\n")
    more = ["--interpret", "--ours", "--case", "append_kv/tiny-5"]
    for path, shares in ((ceilings, True), (tmp_path / "none", False)):
        assert bench.main([*more, "--ceilings", str(path)]) == 0
        head, case = map(json.loads, capfd.readouterr().out.splitlines())
        assert (head.get("gemm_flops_per_second") == json.loads(line)["gemm_flops_per_second"]) == shares
        assert ("percent_of_copy" in case["results"]["mosaic"]) == shares
        assert list(case["results"]) == ["mosaic"]


def test_cases_cover_what_they_should() -> None:
    decode = [case for case in CASES.values() if isinstance(case, DecodeCase)]
    assert {case.rows for case in decode} == {1, 32, 256, 1280}
    assert {case.context for case in decode if not case.ragged} == {512, 1024, 4096, 32768}
    assert {(c.model.name, c.ragged, c.fp8) for c in decode} == {
        (model, ragged, fp8) for model in ("70b", "8b") for ragged in (True, False) for fp8 in (True, False)
    }
    assert all(case.pool_bytes <= cases.POOL_LIMIT for case in decode)
    assert list(CASES)[: len(QUICK)] == [name for name in CASES if name in QUICK]
    assert {name.split("/")[0] for name in QUICK} == {"decode_attention", "append_kv", "prefill_attention"}


def test_bytes_and_operations() -> None:
    """By hand."""
    decode = CASES["decode_attention/70b-32x4k"]
    assert isinstance(decode, DecodeCase)
    assert decode.bytes == 2 * 32 * 4096 * 128 * 2 + 32 * 8 * (128 * 4 + 4)
    fp8 = CASES["decode_attention/8b-32x4k-fp8"]
    assert isinstance(fp8, DecodeCase)
    assert fp8.bytes == 2 * 32 * 4096 * 8 * 128 + 32 * 32 * (128 * 4 + 4)
    append = CASES["append_kv/8b-2048"]
    assert isinstance(append, AppendCase)
    assert append.bytes == 2 * 2 * (2048 * 8 * 128 * 2) + 2048 * 8
    prefill = CASES["prefill_attention/8b-2k-after-30k"]
    assert isinstance(prefill, PrefillCase)
    assert prefill.flops == 4 * 32 * 128 * sum(30720 + i + 1 for i in range(2048))
    rated = report.with_rates(decode, {"seconds": 1e-3}, copy=4e12, gemm=None)
    assert rated["percent_of_copy"] == pytest.approx(100 * decode.bytes / 1e-3 / 4e12)
    assert "percent_of_gemm" not in report.with_rates(prefill, {"seconds": 1e-3}, copy=4e12, gemm=None)


def test_bytes_and_operations_of_experts() -> None:
    """By hand, of 16 experts of gpt-oss-120b: 4096 choices of 8192 tokens. By these few rows are bound by weights,
    many by products, and moving rows by bytes."""
    up = CASES["grouped_gemm/gpt-oss-120b-up-4096"]
    assert isinstance(up, ExpertCase)
    assert up.tokens == 8192 and up.flops == 2 * 4096 * 2 * 2880 * 2880
    assert up.bytes == 2 * (16 * 2 * 2880 * 2880 + 4096 * 2 * 2880)
    assert 4096 <= up.places < 4096 + 16 * 8 and (up.sizes % 8 == 0).all()
    assert up.tile_flops == up.flops * 128 * sum(-(-int(n) // 128) for n in up.sizes) // 4096
    gather, combine = (CASES[f"{kernel}/gpt-oss-120b-4096"] for kernel in ("gather_rows", "combine_rows"))
    assert isinstance(gather, ExpertCase) and isinstance(combine, ExpertCase)
    assert gather.bytes == 2 * 4096 * 2880 * 2 + 4096 * 4
    assert combine.bytes == (4096 + 8192) * 2880 * 2 + 8192 * 4 * 8
    figures = {n: goal.figure for n, c in CASES.items() if (goal := goals.goal(c, "h200")) and "qwen3" in n}
    assert figures["grouped_gemm/qwen3-235b-up-1152"] == "percent_of_copy" == figures["combine_rows/qwen3-235b-8192"]
    assert figures["grouped_gemm/qwen3-235b-up-8192"] == "percent_of_gemm"
    rated = report.with_rates(CASES["grouped_gemm/qwen3-235b-up-8192"], {"seconds": 1e-3}, copy=4e12, gemm=8e14)
    assert rated["percent_of_gemm"] == pytest.approx(100 * 2 * 8192 * 3072 * 4096 / 1e-3 / 8e14)


@pytest.mark.parametrize("name", [name for name in TINY if name.partition("/")[0] in experts.__dict__])
def test_what_is_wrong_of_experts_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin that multiplies with one expert alone, or takes rows of the first token or choice."""
    case = TINY[name]
    assert isinstance(case, ExpertCase)
    assert experts.time_experts(case, {}, TINY_EFFORT, 1, 1)["error"] < 1e-2
    right = getattr(experts, case.kernel)

    def wrong(x: jax.Array, at: jax.Array, *rest: Any, **options: Any) -> jax.Array:
        return right(x, at[:1].repeat(at.shape[0], 0), *rest, **options)

    monkeypatch.setattr(experts, case.kernel, wrong)
    with pytest.raises(RuntimeError, match="a row is off by"):
        experts.time_experts(case, {}, TINY_EFFORT, 1, 1)


def test_goals() -> None:
    """Every goal has a case, and is judged by its own figure; where nothing was measured nothing is met."""
    found = {name: goal for name, case in CASES.items() if (goal := goals.goal(case, "h100")) is not None}
    full = [name for name, goal in found.items() if goal.least == 92 and name.startswith("decode")]
    assert sorted(full) == sorted(f"decode_attention/{m}-{s}" for m in ("70b", "8b") for s in ("32x4k", "1280x1k"))
    assert sum(goal.least == 81 for goal in found.values()) == 4
    assert {n for n, goal in found.items() if goal.least == 80} == {
        n for n in CASES if "ragged" in n and "fp8" not in n
    }
    assert [n for n in found if n.startswith("prefill")] == ["prefill_attention/70b-8k", "prefill_attention/8b-8k"]
    assert all(n in found for n in CASES if n.startswith("append"))
    rate = found["decode_attention/70b-1280x1k"]
    assert rate.judge({"percent_of_copy": 92.5}) == {"goal": "92 % of a copy", "met": True}
    assert rate.judge({"percent_of_copy": 91.5, "bytes_per_second": 9e12})["met"] is False
    assert rate.judge({"failed": "x"})["met"] is None


@pytest.mark.parametrize(("gpu", "copy", "gemm"), [("h100", 3.0e12, 798e12), ("h200", 4.3e12, 788e12)])
def test_expected_times_are_within_the_goals(gpu: str, copy: float, gemm: float) -> None:
    """The tables expect what the goals ask for, no more: a long call reaches them without its start."""
    for name, case in CASES.items():
        us = goals.expected_us(case, gpu)
        assert us is not None
        wanted = goals.goal(case, gpu)
        rated = report.with_rates(case, {"seconds": (us - 3) * 1e-6}, copy=copy, gemm=gemm)
        if wanted is not None and wanted.least != 80:
            assert rated[wanted.figure] == pytest.approx(wanted.least, rel=0.01), name


def test_goals_in_the_report() -> None:
    ours = {"us": 180.0, "bytes_per_second": 3.8e12, "percent_of_copy": 88.0, "error": 2e-3}
    case = {"results": {"mosaic": ours}, "expected_us": 173.8, "goal": "92 % of a copy", "met": False}
    head = {"device": "d", "date": "t", "commit": "c", "versions": {}, "command": "", "interpreted": False}
    text = report.markdown({**head, "finished": True, "cases": {"decode_attention/70b-1280x1k": case}})
    assert "| 2.0e-03 | 173.8 µs | 92 % of a copy: missed |" in text


@pytest.mark.parametrize(
    ("device", "tuning"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H200", "h200"), ("NVIDIA B200", "h200")]
)
def test_a_run_on_a_gpu_is_judged(device: str, tuning: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the goals of the GPU at hand, with its tuning; where none are known, by the table's expectation alone."""
    fake = Namespace(device_kind=device, compute_capability="9.0")
    monkeypatch.setattr(bench.jax, "devices", lambda: [fake])
    setting = bench._setting(bench._parser().parse_args([]))
    assert setting.gpu == tuning
    assert bench._setting(bench._parser().parse_args(["--tuning", "h100"])).gpu == "h100"
    case, ours = CASES["decode_attention/70b-1280x1k"], {"percent_of_copy": 95.0}
    judged = bench._judged(case, ours, setting.gpu, device)
    met = {} if "B200" in device else {"goal": "92 % of a copy", "met": True}
    assert judged == {"expected_us": goals.expected_us(case, tuning), **met}


def test_requests_own_their_pages_and_appends_their_places() -> None:
    for case in CASES.values():
        if isinstance(case, DecodeCase) and case.pages <= 20480:
            tables = kernels.decode_tables(case, 2)
            needed = -(-case.lengths() // 64)
            used = np.concatenate([t[row, :n] for t in tables for row, n in enumerate(needed)])
            assert len(np.unique(used)) == len(used) == 2 * case.pages
        if isinstance(case, AppendCase):
            for pages, slots in kernels.append_places(case, 2):
                assert len(np.unique(pages * 64 + slots)) == case.rows
                assert pages.max() < case.pages


def test_large_pools_repeat_and_do_not_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "DRAWN_PAGES", 5)
    draw = getattr(kernels.draw, "__wrapped__")  # noqa: B009 - not in the type of a jitted function
    pool = np.asarray(draw(jax.random.key(0), (12, 2, 3, 4), jnp.dtype(jnp.float32), 0.5))
    np.testing.assert_array_equal(pool[10], pool[0])
    assert not (pool[5] == pool[1]).any()
    assert pool.std() == pytest.approx(2, rel=0.3)


def test_measures() -> None:
    assert measure.row_error(jnp.zeros((2, 3)), jnp.ones((2, 3))) == 1
    assert measure.row_error(jnp.full((1, 3), jnp.nan), jnp.ones((1, 3))) == np.inf
    with pytest.raises(RuntimeError, match="a row is off by nan"):
        measure.checked(np.nan)
    assert measure.FULL.sets(2**30, calls=8) == 1
    assert measure.FULL.sets(1000, calls=8) == 8


def test_timed_runs_are_long_whatever_a_call_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What starting and waiting takes, here 70 us, would make 16 calls of 7 us, one row of 32K, seem 62 % longer."""
    clock, effort = [0.0], measure.FULL
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    def figure(us: float, calls: int) -> float:
        class Out:
            def block_until_ready(self) -> None:
                clock[0] += 70e-6

        def run() -> Out:
            clock[0] += calls * us * 1e-6
            return Out()

        monkeypatch.setattr(measure.jax, "block_until_ready", lambda out: out.block_until_ready())
        return measure.seconds(run, effort) / calls * 1e6

    for name in (
        "decode_attention/70b-1x32k",
        "append_kv/70b-1",
        "decode_attention/70b-1280x1k",
        "prefill_attention/70b-8k",
    ):
        us = goals.expected_us(CASES[name], "h100")
        assert us is not None
        calls = effort.calls(us * 1e-6)
        assert calls == Setting(gpu="h100").calls(CASES[name])
        assert calls == effort.most_calls or calls * us >= 5000
        assert figure(us, calls) == pytest.approx(us, rel=0.02)
    assert figure(7.0, 16) < 7.15
    assert effort.calls(0.1) == 1
