"""The timeline on programs whose times are known by hand, findings with their twins, and compiled stand-ins."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import ConfigError
from nanoflow_jax.cost.latency import Prediction, Rate, RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.report import Report, inspect_compiled, render
from nanoflow_jax.timeline.chrome_trace import trace, write_trace
from nanoflow_jax.timeline.play import LEAST_SHARE
from nanoflow_jax.timeline.plot import plot

DATA = Path(__file__).parent / "data"
H200 = load_hardware("h200")


class Free(RooflineModel):
    """Ops side by side cost nothing."""

    def rate(self, kind: str, share: float, beside: str) -> Rate:
        return Rate(1.0, "free")


def excerpt(name: str, old: str = "", new: str = "") -> Report:
    text = (DATA / f"{name}.txt").read_text()
    assert old in text
    return inspect_compiled(text.replace(old, new), None, H200, 8)


def kinds(report: Report) -> Counter[tuple[str, str | None]]:
    return Counter((finding.kind, finding.op) for finding in report.findings)


GEMM = (
    '%{name} = (bf16[{m},5120]{{1,0}}, s8[64]{{0}}) custom-call(%{x}, %w), custom_call_target="__cublas$lt$matmul", '
    'metadata={{op_name="jit(s)/{scope}/dot_general"}}, backend_config={{"gemm_backend_config":'
    '{{"dot_dimension_numbers":{{"lhs_contracting_dimensions":["1"]}}}}}}'
)
START = (
    "%{name} = ((bf16[{m},8192]{{1,0}}), bf16[{m},8192]{{1,0}}) all-reduce-start(%{x}), "
    "replica_groups={{{{0,1,2,3,4,5,6,7}}}}, "
    'metadata={{op_name="jit(s)/{scope}/psum"}}'
)


def program(*lines: str) -> str:
    """A scheduled program over %a and %b [1024, 8192] and a weight %w [8192, 5120]."""
    parameters = [
        '%a = bf16[1024,8192]{1,0} parameter(0), metadata={op_name="a"}',
        '%b = bf16[1024,8192]{1,0} parameter(1), metadata={op_name="b"}',
        '%w = bf16[8192,5120]{1,0} parameter(2), metadata={op_name="layers[0].w"}',
    ]
    body = "\n".join("  " + line for line in (*parameters, *lines, "ROOT %out = () tuple()"))
    return f"HloModule m, is_scheduled=true\n\nENTRY %main (a: bf16[]) -> () {{\n{body}\n}}\n"


def report_of(*lines: str) -> Report:
    return inspect_compiled(program(*lines), None, H200, 8)


NET = RooflineModel(H200).collective("all-reduce", 1024 * 8192 * 2, 8).us
MUL = RooflineModel(H200).gemm(1024, 5120, 8192).us
AR1 = START.format(name="ar1", m=1024, x="a", scope="L0/D.AR.1")
AR2 = START.format(name="ar2", m=1024, x="b", scope="L0/D.AR.2")
KEPT = 0.7  # of its speed, by a GEMM and by a collective beside each other: P(1 - 0.3) and P(0.3)
DONE1, DONE2 = (f"%done{i} = bf16[1024,8192]{{1,0}} all-reduce-done(%ar{i})" for i in (1, 2))
UG2 = GEMM.format(name="ug2", m=1024, x="b", scope="L0/UG.2")
D2 = GEMM.format(name="d2", m=1024, x="b", scope="L0/D.2")


def test_a_collective_is_hidden_by_what_is_between_start_and_done() -> None:
    assert MUL < NET < 2 * MUL
    report = report_of(AR1, UG2, D2, DONE1)
    (row,) = report.collectives
    assert (row.op, row.nano_batch, row.layer, row.is_async) == ("D.AR", 1, 0, True)
    assert row.beside == ("L0/UG.2", "L0/D.2")
    assert row.bytes == 1024 * 8192 * 2
    assert row.wire_bytes == row.bytes * 14 // 8
    assert row.exposed_us == 0
    assert row.predicted_us == pytest.approx(NET)
    totals = report.totals
    assert totals.exposed_network_us == totals.bubble_us == 0
    assert (totals.compute_us, totals.network_us) == pytest.approx((2 * MUL, NET))  # each as if alone
    assert totals.interference_us == pytest.approx(
        NET / KEPT - NET
    )  # while the collective runs, the GEMMs do 0.7 of it
    assert totals.us == pytest.approx(2 * MUL + NET / KEPT - NET)
    assert totals.layers[0].interference_us == pytest.approx(totals.interference_us)


def test_what_stands_before_the_done_but_runs_later_is_not_beside() -> None:
    """The table, the trace and the picture say the same: the collective is over before the third GEMM begins."""
    third = GEMM.format(name="kqv", m=1024, x="b", scope="L1/KQV.2")
    report = report_of(AR1, UG2, D2, third, DONE1)
    (row,) = report.collectives
    assert row.beside == ("L0/UG.2", "L0/D.2")
    assert row.between == (*row.beside, "L1/KQV.2")
    assert row.actual_us == pytest.approx(NET / KEPT)
    (drawn,) = (e for e in trace(report)["traceEvents"] if e["name"] == "L0/D.AR.1" and e["ph"] == "X")
    assert row.actual_us == drawn["dur"]
    begins = next(e["ts"] for e in trace(report)["traceEvents"] if e["name"] == "L1/KQV.2")
    assert begins > drawn["ts"] + drawn["dur"]
    cells = next(line for line in render(report).splitlines() if " D.AR " in line).split("  ")
    assert [f"{NET:.1f}", f"{NET / KEPT:.1f}"] == [cell.strip() for cell in cells if cell.strip()][5:7]


def test_a_layer_is_as_long_as_what_it_takes_of_the_compute_stream() -> None:
    """Wherever XLA puts its ops: one of layer 0 runs last. What has no op counts for none."""
    untraced = "%n = bf16[1024,8192]{1,0} negate(%a)"
    one, two = (GEMM.format(name=f"g{i}", m=1024, x="b", scope=f"L{i}/UG.2") for i in (1, 2))
    totals = report_of(UG2, one, untraced, two, D2).totals
    small = RooflineModel(H200).kernel(0, 2 * 1024 * 8192 * 2).us
    assert [layer.layer for layer in totals.layers] == [0, 1, 2, None]
    assert [layer.us for layer in totals.layers] == pytest.approx([2 * MUL, MUL, MUL, small])


def test_without_interference_nothing_is_lost() -> None:
    """The broken twin: a model in which ops side by side keep their speed."""
    report = inspect_compiled(program(AR1, UG2, D2, DONE1), None, H200, 8, latency=Free(H200))
    assert report.totals.us == pytest.approx(2 * MUL)
    assert report.totals.interference_us == pytest.approx(0, abs=1e-9)


def test_what_is_not_hidden_is_exposed() -> None:
    report = report_of(AR1, UG2, DONE1, D2)
    (row,) = report.collectives
    assert row.beside == ("L0/UG.2",)
    assert row.exposed_us == pytest.approx(NET - MUL)
    assert report.totals.us == pytest.approx(MUL / KEPT + NET - MUL + MUL)
    assert report.totals.exposed_network_us == pytest.approx(NET - MUL)
    assert report.totals.bubble_us == 0
    report = report_of(AR1, DONE1, UG2, D2)
    assert report.collectives[0].exposed_us == pytest.approx(NET)
    assert kinds(report)["exposed_collective", "D.AR"] == 1


def test_the_network_is_one_queue() -> None:
    """Two collectives started together run one after the other; the wait is shared out, each at most its own time."""
    first, second = report_of(AR1, AR2, UG2, DONE2, DONE1).collectives
    assert second.start_us == pytest.approx(MUL / KEPT + NET - MUL)
    assert first.exposed_us == pytest.approx(NET - MUL)
    assert second.exposed_us == pytest.approx(NET)


def test_a_synchronous_collective_stops_compute() -> None:
    result = "bf16[1024,8192]{1,0}"
    plain = AR1.replace(f"(({result}), {result}) all-reduce-start", f"{result} all-reduce")
    assert plain != AR1
    marked = AR1 + ', backend_config={"collective_backend_config":{"is_sync":true}}'
    for lines in ((plain, UG2), (marked, UG2, DONE1)):
        report = report_of(*lines)
        (row,) = report.collectives
        assert not row.is_async
        assert row.beside == ()
        assert row.exposed_us == pytest.approx(NET)
        assert report.totals.us == pytest.approx(NET + MUL)
        assert kinds(report)["synchronous_collective", "D.AR"] == 1


def test_a_side_stream_runs_beside_compute() -> None:
    """The excerpt's `call-start` region (tanh of 32 MiB) hides under two small GEMMs only in part: the rest is a
    bubble."""
    report = excerpt("forms_jax0.11")
    region = next(e for e in report.timeline.events if e.stream == "stream 1")
    assert region.start_us == 0
    assert region.us == pytest.approx(RooflineModel(H200).kernel(0, 2 * 4096 * 4096 * 2).us)
    assert report.totals.bubble_us > 0
    assert report.totals.host_us == pytest.approx(4096 * 4096 * 2 / 64e9 * 1e6 + 2)
    lanes = {e["args"]["name"] for e in trace(report)["traceEvents"] if e["name"] == "thread_name"}
    assert "memory, stream 1" in lanes


ATTEND = (
    "%attend = ((bf16[1024,8192]{1,0}), bf16[1024,8192]{1,0}) call-start(%a), to_apply=%region, "
    'frontend_attributes={_xla_stream_annotation="2"}, metadata={op_name="jit(s)/L0/GEMV.1/compute_on"}'
)
ATTENDED = "%attended = bf16[1024,8192]{1,0} call-done(%attend)"
REGION = """%region (q: bf16[1024,8192]) -> bf16[1024,8192] {
  %q = bf16[1024,8192]{1,0} parameter(0)
  ROOT %k = bf16[1024,8192]{1,0} custom-call(%q), custom_call_target="mosaic_gpu", metadata={op_name="L0/GEMV.1/jit(k)"}
}
"""


def beside_attention(us: float, sms: int | None, *lines: str) -> Report:
    """A program with decode attention of so many microseconds on a stream of its own."""
    text = program(*lines).replace("\n\nENTRY", f"\n\n{REGION}\nENTRY")
    costs = {("GEMV", 1): Prediction(us, "memory", "given")}
    return inspect_compiled(text, None, H200, 8, costs=costs, budgets={"GEMV": sms} if sms else None)


def test_attention_on_a_lane_keeps_its_sms() -> None:
    """With a budget of 44 of the 132 SMs attention takes the time that it was costed with, and a GEMM beside it has 2/3
    of its speed; without one it takes all SMs but the least share."""
    report = beside_attention(60.0, 44, ATTEND, UG2, ATTENDED, D2)
    attention = next(e for e in report.timeline.events if e.kind == "attention")
    assert (attention.stream, attention.us, attention.alone_us) == ("stream 2", pytest.approx(60), 60)
    assert report.totals.us == pytest.approx(2 * MUL + 60 * (1 - 2 / 3))
    assert report.totals.bubble_us == 0
    long = beside_attention(1000.0, 44, ATTEND, UG2, ATTENDED, D2).totals
    assert long.us == pytest.approx(1000 + MUL)
    assert long.bubble_us == pytest.approx(1000 - MUL * 3 / 2)  # not the network's: nothing is exposed
    assert long.exposed_network_us == 0
    free = beside_attention(60.0, None, ATTEND, UG2, ATTENDED, D2).totals
    assert free.us == pytest.approx(60 + 2 * MUL - 60 * LEAST_SHARE)


def test_a_wait_for_attention_and_the_network_is_the_networks_until_it_is_done() -> None:
    """AR1 ends first: until then the wait is exposed, the rest is a bubble. And the other way round."""
    late = beside_attention(1000.0, 44, ATTEND, AR1, ATTENDED, DONE1, UG2)
    assert late.collectives[0].beside == ("L0/GEMV.1",)  # although issued before it, in the region
    assert late.collectives[0].between == ()
    assert ("exposed_collective", "D.AR") not in kinds(late)
    assert late.totals.exposed_network_us + late.totals.bubble_us == pytest.approx(1000)
    assert late.totals.exposed_network_us == pytest.approx(late.timeline.events[1].us) == pytest.approx(NET / KEPT)
    early = beside_attention(60.0, 44, ATTEND, AR1, ATTENDED, DONE1, UG2).totals
    assert early.exposed_network_us == pytest.approx(60 + NET - 60 * KEPT)
    assert early.bubble_us == 0


def test_a_copy_to_the_host_slows_nothing() -> None:
    start = "%c = (bf16[1024,8192]{1,0:S(5)}, bf16[1024,8192]{1,0}, u32[]) copy-start(%a)"
    done = "%d = bf16[1024,8192]{1,0:S(5)} copy-done(%c)"
    copy = RooflineModel(H200).host_copy(1024 * 8192 * 2).us
    assert copy > 2 * MUL
    totals = report_of(start, UG2, D2, done).totals
    assert totals.interference_us == 0
    assert (totals.us, totals.host_us, totals.bubble_us) == pytest.approx((copy, copy, copy - 2 * MUL))


BRANCHES = """%plain (p: bf16[1024,8192]) -> bf16[1024,8192] {
  ROOT %p = bf16[1024,8192]{1,0} parameter(0)
}

%asked (q: bf16[1024,8192]) -> bf16[1024,8192] {
  %q = bf16[1024,8192]{1,0} parameter(0)
  ROOT %n = bf16[1024,8192]{1,0} negate(%q)
}
"""


def test_a_conditional_takes_the_branch_of_a_plain_step() -> None:
    """What no request asks for is left out, and the notes say how much longer a step with all of it would be."""
    either = (
        "%c = bf16[1024,8192]{1,0} conditional(%w, %a, %a), true_computation=%asked, false_computation=%plain, "
        'metadata={op_name="jit(s)/SAMPLE.1/cond"}'
    )
    text = program(either, UG2).replace("\n\nENTRY", f"\n\n{BRANCHES}\nENTRY")
    report = inspect_compiled(text, None, H200, 8)
    assert [e.label for e in report.timeline.events] == ["L0/UG.2"]
    more = RooflineModel(H200).kernel(0, 2 * 1024 * 8192 * 2).us
    assert report.timeline.left_out_us == pytest.approx(more)
    assert any(f"{more:.0f} us more" in note for note in report.notes)


def test_a_loop_runs_as_often_as_it_says() -> None:
    report = excerpt("loop_jax0.11")
    assert [(c.op, c.layer) for c in report.collectives] == [("D.AR", 0)] * 4
    twice = excerpt("loop_jax0.11", '"known_trip_count":{"n":"4"}', '"known_trip_count":{"n":"2"}')
    assert len(twice.collectives) == 2
    assert twice.totals.us < report.totals.us
    unknown = excerpt("loop_jax0.11", '"known_trip_count":{"n":"4"}', '"x":{"n":"4"}')
    assert len(unknown.collectives) == 1
    assert unknown.timeline.unknown_loops


def test_findings_of_a_merged_program() -> None:
    found = kinds(excerpt("merged_jax0.12"))
    assert {op for kind, op in found if kind == "merged_gemm"} == {"KQV", "UG", "D"}
    assert found["merged_collective", "D.AR"] == 1
    assert found["synchronous_collective", "D.AR"] == found["synchronous_collective", "GEMV.AG"] == 1


def test_findings_of_a_split_program_and_of_its_broken_twins() -> None:
    report = excerpt("split_jax0.11")
    assert {kind for kind, _ in kinds(report)} == {
        "synchronous_collective",
        "transpose_before_collective",
        "exposed_collective",
    }
    untraced = kinds(excerpt("split_jax0.11", "L0/UG.1/dot", "L0/dot"))
    assert untraced["untraced_gemm", None] == 1
    assert untraced["merged_gemm", "UG"] == 1
    lost = kinds(excerpt("split_jax0.11", "/L0/D.AR.1/psum", "/psum"))
    assert lost["untraced_collective", None] == 1
    named = kinds(excerpt("split_jax0.11", "L0/D.1/dot_general", "L0/(D.1/dot_general:D.2/dot_general)"))
    assert named["merged_gemm", "D"] == 1
    strange = kinds(excerpt("split_jax0.11", ", use_global_device_ids=true", ", use_the_force=true"))
    assert strange["unknown_hlo", None] == 1


def test_one_piece_without_a_gemm_is_a_merge() -> None:
    """XLA names a merged GEMM after one of its pieces only; the other piece's collective gives it away."""
    lines = (UG2, D2, AR1, AR2, DONE1, DONE2)
    found = [f for f in report_of(*lines).findings if f.kind == "merged_gemm"]
    assert {(f.op, f.layer) for f in found} == {("UG", 0), ("D", 0)}
    assert any("D.1 has no GEMM" in f.detail for f in found)
    both = (UG2, D2, *(g.replace("%ug2", "%ug1").replace("%d2", "%d1").replace(".2/", ".1/") for g in (UG2, D2)))
    assert not [f for f in report_of(*both, AR1, AR2, DONE1, DONE2).findings if f.kind == "merged_gemm"]


def test_copies_of_weights_are_found_and_activations_are_not() -> None:
    turned = '%t = bf16[8192,5120]{0,1} copy(%w), metadata={op_name="jit(s)/L0/UG.1/transpose"}'
    (finding,) = [f for f in report_of(turned).findings if f.kind == "weight_copy"]
    assert (finding.op, finding.layer) == ("UG", 0)
    assert "layers[0].w" in finding.detail
    assert "83886080 bytes" in finding.detail
    small = "%t = bf16[16,5120]{1,0} slice(%w), slice={[0:16], [0:5120]}"
    assert not [f for f in report_of(small).findings if f.kind == "weight_copy"]
    made = "%n = bf16[8192,5120]{1,0} negate(%w)"
    again = "%t = bf16[8192,5120]{0,1} copy(%n)"
    assert not [f for f in report_of(made, again).findings if f.kind == "weight_copy"]


def test_costs_from_the_caller() -> None:
    without, text = excerpt("split_jax0.11"), (DATA / "split_jax0.11.txt").read_text()
    given = inspect_compiled(text, None, H200, 8, costs={("GEMV", 1): (1e9, 4e8)})
    slow = {e.label: e for e in given.timeline.events if e.kind == "attention"}
    assert slow["L0/GEMV.1"].alone_us == pytest.approx(RooflineModel(H200).kernel(1e9, 4e8).us)
    assert "caller" in slow["L0/GEMV.1"].source
    assert "operand bytes" in slow["L0/GEMV.2"].source
    assert any("GEMV" in note and "operands' bytes" in note for note in given.notes)
    assert given.totals.memory_us > without.totals.memory_us + 80


def test_report_is_plain_data_and_text() -> None:
    text = (DATA / "split_jax0.11.txt").read_text()
    report = inspect_compiled(text, None, H200, 8, tokens=2048, parameters=70e9 / 80)
    data = json.loads(json.dumps(report.to_json()))
    assert {"collectives", "findings", "totals", "memory"} <= set(data)
    assert data["memory"] is None
    wanted = {"op", "nano_batch", "layer", "bytes", "is_async", "beside", "predicted_us", "exposed_us"}
    assert all(wanted <= set(row) for row in data["collectives"])
    assert data["collectives"][1]["beside"][0] == "L0/KQV.2"
    assert all(set(row) == {"kind", "op", "layer", "detail"} for row in data["findings"])
    totals = report.totals
    assert totals.exposed_network_us == pytest.approx(sum(c.exposed_us for c in report.collectives))
    parts = totals.compute_us + totals.memory_us + totals.exposed_network_us + totals.bubble_us
    assert totals.us == pytest.approx(parts + totals.interference_us)
    assert totals.interference_us > 0
    assert sum(layer.compute_us for layer in totals.layers) == pytest.approx(totals.compute_us)
    assert sum(layer.us for layer in totals.layers) == pytest.approx(totals.us)
    assert totals.tokens_per_second_per_gpu == pytest.approx(2048 / totals.us * 1e6 / 8)
    assert totals.tokens_per_second_per_gpu is not None
    assert totals.share_of_optimum == pytest.approx(
        totals.tokens_per_second_per_gpu / (989e12 * 0.797 / (2 * 70e9 / 80))
    )
    shown = render(report)
    assert "GEMV.AG" in shown
    assert "synchronous_collective" in shown
    assert "tokens/s/GPU" in shown


def test_trace_has_a_lane_per_resource_without_overlaps(tmp_path: Path) -> None:
    report = excerpt("split_jax0.11")
    write_trace(report, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(lanes.values()) == {"compute", "memory", "network", "host", "waiting"}
    for tid in lanes:
        spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == tid)
        assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(spans))
    named = {e["name"] for e in events if e["ph"] == "X" and lanes[e["tid"]] == "network"}
    assert {"L0/GEMV.AG.1", "L0/O.AR.2"} <= named


def test_plot_draws_the_window(tmp_path: Path) -> None:
    figure = plot(excerpt("split_jax0.11"), tmp_path / "plot.png", nano_batches={("KQV", 2): 1})
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert any("O.AR 2" in text for text in texts)
    with pytest.raises(ConfigError, match="layers: 7 to 8 is not accepted; the program has 0 to 0"):
        plot(excerpt("split_jax0.11"), layers=(7, 8))


@pytest.mark.aot
def test_split_program_overlaps_and_the_merged_one_does_not(compile_stand_in) -> None:
    """Three layers, left to XLA's scheduler: most collectives are covered; with the dot merger on, the inspector
    says what went."""
    compiled = compile_stand_in(layers=3)
    report = inspect_compiled(compiled.as_text(), compiled.memory_analysis(), H200, 8)
    assert not {f.kind for f in report.findings} & {"merged_gemm", "merged_collective", "unknown_hlo", "weight_copy"}
    inner = [c for c in report.collectives if c.layer == 1]
    assert Counter(c.op for c in inner) == {"GEMV.AG": 1, "O.AG": 1, "O.AR": 1, "D.AR": 2}
    covered = [c for c in inner if any(not name.endswith(f".{c.nano_batch}") for name in c.beside)]
    assert len(covered) >= 3
    assert all(c.is_async for c in covered)
    assert report.memory
    assert report.memory.headroom > 100e9
    assert report.memory.arguments > 3 * 2 * 86e6

    merged = compile_stand_in(layers=3, options=(("xla_gpu_enable_triton_gemm", False),))
    loss = inspect_compiled(merged.as_text(), None, H200, 8)
    assert {(f.op, f.layer) for f in loss.findings if f.kind == "merged_gemm"} == {
        (op, layer) for op in ("KQV", "UG", "D") for layer in range(3)
    }
    assert loss.totals.exposed_network_us > report.totals.exposed_network_us * 1.2


@pytest.mark.aot
def test_one_nano_batch_exposes_every_collective(compile_stand_in) -> None:
    compiled = compile_stand_in(layers=2, rows=(2048,), ways=("gather",))
    report = inspect_compiled(compiled.as_text(), None, H200, 8)
    assert len(report.collectives) == 6
    assert not any(c.beside for c in report.collectives)
    assert report.totals.exposed_network_us == pytest.approx(sum(c.predicted_us for c in report.collectives))
    blamed = {(f.op, f.layer) for f in report.findings if f.kind in ("synchronous_collective", "exposed_collective")}
    assert blamed == {(op, layer) for op in ("GEMV.AG", "O.AG", "D.AR") for layer in (0, 1)}


@pytest.mark.aot
def test_bytes_per_layer_are_the_closed_form(compile_stand_in) -> None:
    """n·h·2 bytes per gather of n rows, twice that on the wire for an all-reduce: 2 AG + 1 AR and 2 AR move the
    same."""
    compiled = compile_stand_in(layers=3)
    report = inspect_compiled(compiled.as_text(), None, H200, 8)
    whole = {1: 640 * 8192 * 2, 2: 1408 * 8192 * 2}
    sent = Counter()
    for c in report.collectives:
        assert c.nano_batch is not None
        assert c.bytes == whole[c.nano_batch]
        assert c.wire_bytes == c.bytes * 7 // 8 * (2 if c.kind == "all-reduce" else 1)
        sent[c.layer, c.nano_batch] += c.wire_bytes
    assert all(sent[layer, n] == whole[n] * 7 // 8 * 4 for layer in range(3) for n in (1, 2))


@pytest.mark.aot
def test_a_page_pool_that_is_not_donated_is_copied(compile_mapped) -> None:
    def append(x: jax.Array, kv_pages: jax.Array, rows: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.named_scope("L0/KQV.1"):
            k = x @ w
        with jax.named_scope("L0/KV.APPEND.1"):
            kv_pages = kv_pages.at[rows].set(k)
        return kv_pages[rows], kv_pages

    bf16 = jnp.bfloat16
    arrays = [((64, 1024), bf16), ((65536, 128), bf16), ((64,), jnp.int32), ((1024, 128), bf16)]
    for donate, copies in (((), 1), ((1,), 0)):
        compiled = compile_mapped(append, (P(),) * 4, (P(), P()), arrays, donate)
        report = inspect_compiled(compiled.as_text(), None, H200, 8)
        assert [f.kind for f in report.findings] == ["kv_copy"] * copies


@pytest.mark.aot
def test_a_scan_copies_each_layers_weights(compile_mapped) -> None:
    def scan(x: jax.Array, w: jax.Array, d: jax.Array) -> jax.Array:
        def body(x: jax.Array, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            with jax.named_scope("L0/UG.1"):
                up = jax.nn.relu(x @ layer[0])
            with jax.named_scope("L0/D.1"):
                return x + up @ layer[1], None

        return jax.lax.scan(body, x, (w, d))[0]

    arrays = [((64, 1024), jnp.bfloat16), ((4, 1024, 1024), jnp.bfloat16), ((4, 1024, 1024), jnp.bfloat16)]
    text = compile_mapped(scan, (P(),) * 3, P(), arrays).as_text()
    report = inspect_compiled(text, None, H200, 8)
    copied = [f.detail for f in report.findings if f.kind == "weight_copy"]
    assert any(detail.endswith(" of w") for detail in copied)
    assert any(detail.endswith(" of d") for detail in copied)


LOOP = """HloModule m, is_scheduled=true

%body (p: (s32[], bf16[1024,8192])) -> (s32[], bf16[1024,8192]) {
  %p = (s32[], bf16[1024,8192]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[1024,8192]{1,0} get-tuple-element(%p), index=1
  %y = bf16[1024,8192]{1,0} negate(%x), metadata={op_name="jit(s)/L0/GEMV.1/while/body/neg"}
  ROOT %r = (s32[], bf16[1024,8192]{1,0}) tuple(%i, %y)
}

ENTRY %main (x: bf16[1024,8192]) -> bf16[1024,8192] {
  %x = bf16[1024,8192]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %in = (s32[], bf16[1024,8192]{1,0}) tuple(%zero, %x)
  %one = (s32[], bf16[1024,8192]{1,0}) while(%in), body=%body, metadata={op_name="jit(s)/L0/GEMV.1/while"}
  ROOT %two = (s32[], bf16[1024,8192]{1,0}) while(%one), body=%body, metadata={op_name="jit(s)/L7/GEMV.1/while"}
}
"""


def test_a_shared_loop_body_belongs_to_the_loop_that_runs_it() -> None:
    report = inspect_compiled(LOOP, None, H200, 8)
    assert [e.label for e in report.timeline.events] == ["L0/GEMV.1", "L7/GEMV.1"]
    assert any("unknown length" in note for note in report.notes)
    given = inspect_compiled(LOOP, None, H200, 8, costs={("GEMV", 1): (0.0, 4e8)})
    assert [e.kind for e in given.timeline.events] == ["attention", "attention"]
    assert given.totals.us == pytest.approx(2 * RooflineModel(H200).kernel(0, 4e8).us)
    assert not any("unknown length" in note for note in given.notes)


def test_a_library_gemm_inside_a_fusion_of_slices_is_a_gemm() -> None:
    """cuBLAS reads a slice of the rows in place; the fusion itself carries no op_name."""
    inner = GEMM.format(name="g", m=768, x="s", scope="L2/KQV.3").replace("%w", "%q")
    fused = "\n".join(
        [
            "%fused (p: bf16[1408,8192], q: bf16[8192,5120]) -> (bf16[768,5120], s8[64]) {",
            "  %p = bf16[1408,8192]{1,0} parameter(0)",
            "  %q = bf16[8192,5120]{1,0} parameter(1)",
            "  %s = bf16[768,8192]{1,0} slice(%p), slice={[0:768], [0:8192]}",
            f"  ROOT {inner}",
            "}",
        ]
    )
    call = "%f = (bf16[768,5120]{1,0}, s8[64]{0}) fusion(%n, %w), kind=kCustom, calls=%fused"
    text = program("%n = bf16[1408,8192]{1,0} constant({...})", call).replace("\n\nENTRY", f"\n\n{fused}\n\nENTRY")
    report = inspect_compiled(text, None, H200, 8)
    (event,) = report.timeline.events
    assert (event.label, event.kind, event.flops) == ("L2/KQV.3", "gemm", 2 * 768 * 8192 * 5120)
    assert event.bytes == 2 * (768 * 8192 + 8192 * 5120 + 768 * 5120)
    assert report.findings == ()
