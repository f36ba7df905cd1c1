"""The reader of HLO: excerpts of real compiles (jax 0.11.2 and 0.12.0), and hand-written lines for older and
unknown forms.

The excerpts in `data` were compiled from the stand-in of `conftest.py`, without the tables of source lines and
without the computations of plain arithmetic; the Mosaic kernels' code is cut short.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoflow_jax.cost.latency import RooflineModel
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.costs import CostModel, collective_kind, group_size
from nanoflow_jax.inspect.hlo import Module, Piece, Shape, Unknown, expand_names, parse, parse_pieces, parse_shapes

DATA = Path(__file__).parent / "data"


def read(name: str) -> Module:
    return parse((DATA / f"{name}.txt").read_text())


@pytest.mark.parametrize(
    ("op_name", "pieces"),
    [
        ("jit(step)/shard_map/L3/GEMV.AG.2/all_gather", [(3, "GEMV.AG", 2)]),
        ("jit(step)/L10/KV.APPEND.1/scatter", [(10, "KV.APPEND", 1)]),
        ("jit(step)/EMBED.AR.1/psum", [(None, "EMBED.AR", 1)]),
        ("L0/KQV.1/reduce_sum", [(0, "KQV", 1)]),
        ("jit(s)/shard_map/L0/(D.AR.1/psum:D.AR.2/psum)", [(0, "D.AR", 1), (0, "D.AR", 2)]),
        ("jit(s)/(L0/D.2/x:L1/(O.1:O.2)/dot)/y", [(0, "D", 2), (1, "O", 1), (1, "O", 2)]),
        ("jit(s)/L0/UG.1/jit(silu)/mul", [(0, "UG", 1)]),
        ("jit(s)/L0/KQV.3/KV.APPEND.3/scatter", [(0, "KV.APPEND", 3)]),
        ("jit(s)/L0/FOO.1/mul", []),
        ("jit(s)/L0/SAMPLE.1/mul", []),
        ("jit(s)/KQV.1/mul", []),
        ("jit(s)/L0/KQV.12x/mul", []),
        ("", []),
    ],
)
def test_pieces_of_an_op_name(op_name: str, pieces: list) -> None:
    assert list(parse_pieces(op_name)) == [Piece(*piece) for piece in pieces]


def test_only_a_group_is_a_merge() -> None:
    assert expand_names("jit(f)/a(b)/c") == ["jit(f)/a(b)/c"]
    assert expand_names("f/(jit(g):h)/x") == ["f/jit(g)/x", "f/h/x"]


def test_shapes_and_bytes() -> None:
    shapes = parse_shapes(
        "(bf16[640,8192]{1,0}, /*index=1*/f8e4m3fn[16]{0}, s4[3]{0}, f32[], pred[7]{0:S(5)}, token[])"
    )
    assert [shape.bytes for shape in shapes] == [640 * 8192 * 2, 16, 2, 4, 7, 0]
    assert shapes[0] == Shape("bf16", (640, 8192), "1,0", False)
    assert shapes[4].host


@pytest.mark.parametrize("name", [path.stem for path in sorted(DATA.glob("*.txt"))])
def test_excerpts_are_read_whole(name: str) -> None:
    module, text = read(name), (DATA / f"{name}.txt").read_text()
    assert module.unknown == ()
    assert module.is_scheduled
    assert module.entry.root.is_root
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert sum(len(c.instructions) for c in module.computations.values()) == len(lines)
    for computation in module.computations.values():
        for instruction in computation.instructions:
            assert all(operand in computation.by_name for operand in instruction.operands), instruction.name


def test_async_pairs_and_their_order() -> None:
    entry = read("split_jax0.11").entry
    starts = [i for i in entry.instructions if i.opcode.endswith("-start")]
    names = [i.name for i in entry.instructions]
    assert [str(i.piece) for i in starts] == ["L0/O.AG.1", "L0/O.AR.2", "L0/D.AR.1", "L0/D.AR.2"]
    for start in starts:
        done = next(i for i in entry.instructions if i.opcode.endswith("-done") and i.operands == (start.name,))
        assert done.opcode == start.opcode.replace("start", "done")
        assert names.index(done.name) > names.index(start.name)
        assert done.pieces == start.pieces
        assert done.bytes == start.bytes


def test_forms_of_async() -> None:
    module = read("forms_jax0.11")
    by_opcode = {i.opcode: i for i in module.entry.instructions}
    region = by_opcode["call-start"]
    assert '_xla_stream_annotation="1"' in region.attributes["frontend_attributes"]
    assert [c.root.operands for c in module.called(region)] != []
    copy = by_opcode["copy-start"]
    assert copy.base == "copy"
    assert copy.shapes[0].host
    assert not copy.shapes[1].host
    assert collective_kind(module, by_opcode["collective-permute-start"]) == "collective-permute"
    assert collective_kind(module, by_opcode["reduce-scatter"]) == "reduce-scatter"
    assert collective_kind(module, by_opcode["collective-permute-done"]) == ""
    assert by_opcode["custom-call"].target == "__cublas$lt$matmul"


def test_a_fusion_that_wraps_a_collective_is_one() -> None:
    module = read("merged_jax0.12")
    wrapped = next(i for i in module.entry.instructions if i.opcode == "fusion-start")
    assert collective_kind(module, wrapped) == "all-reduce"
    assert str(wrapped.piece) == "L0/O.AR.2"


def test_a_loop_and_its_body() -> None:
    module = read("loop_jax0.11")
    loop = next(i for i in module.entry.instructions if i.opcode == "while")
    assert set(loop.called) == {loop.attributes["body"].lstrip("%"), loop.attributes["condition"].lstrip("%")}
    assert all(name in module.computations for name in loop.called)


OLDER = """HloModule older, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(f32[] %a, f32[] %b)
}

%wrapped (p: f32[64,8]) -> f32[8,8] {
  %p = f32[64,8]{1,0} parameter(0)
  ROOT %rs = f32[8,8]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
}, execution_thread="network"

ENTRY %main (x: f32[64,8]) -> (f32[8,8], f32[64,8], f32[64,8]) {
  %x = f32[64,8]{1,0} parameter(0)
  %rs-start = ((f32[64,8]{1,0}), f32[8,8]{1,0}, u32[]) async-start(%x), async_execution_thread="network", calls=%wrapped
  %ar-start = f32[64,8]{1,0} all-reduce-start(%x), replica_groups=[2,4]<=[8], metadata={op_name="a=\\"b, {c\\""}
  %rs-update = ((f32[64,8]{1,0}), f32[8,8]{1,0}, u32[]) async-update(%rs-start)
  %ar-done = f32[64,8]{1,0} all-reduce-done(%ar-start)
  %rs-done = f32[8,8]{1,0} async-done(%rs-update)
  %big = f32[64,8]{1,0} constant({ { 1, 2 }, /*i0=1*/ { 3, %x } })
  ROOT %out = (f32[8,8]{1,0}, f32[64,8]{1,0}, /*index=2*/f32[64,8]{1,0}) tuple(%rs-done, %ar-done, /*index=2*/%big)
}
"""


def test_older_forms_of_async_and_of_groups() -> None:
    module = parse(OLDER)
    assert module.unknown == ()
    by_name = module.entry.by_name
    assert collective_kind(module, by_name["rs-start"]) == "reduce-scatter"
    assert by_name["rs-start"].shapes[0].dims == (8, 8)
    assert by_name["ar-start"].op_name == 'a=\\"b, {c\\"'
    assert group_size(by_name["ar-start"], 16) == 4
    assert group_size(module.computations["wrapped"].by_name["rs"], 16) == 8
    assert by_name["out"].operands == ("rs-done", "ar-done", "big")
    assert by_name["big"].operands == ()
    assert module.computations["sum"].by_name["add"].operands == ("a", "b")


@pytest.mark.parametrize(
    ("old", "new", "unknown"),
    [
        ("async-update(%rs-start)", "teleport(%rs-start)", Unknown("opcode", "teleport", "main/rs-update")),
        ("replica_groups=[2,4]<=[8]", "warp_factor=9", Unknown("attribute", "warp_factor=9", "main/ar-start")),
        ("replica_groups=[2,4]<=[8]", "hovering", Unknown("attribute", "hovering", "main/ar-start")),
        (
            "  %ar-done = f32",
            "  ~ %ar-done f32",
            Unknown("line", "~ %ar-done f32[64,8]{1,0} all-reduce-done(%ar-start)", "main"),
        ),
        ("\nENTRY", "\nStrange table\nENTRY", Unknown("line", "Strange table", "module")),
        ("f32[64,8]{1,0} constant", "floaty[64,8]{1,0} constant", Unknown("dtype", "floaty", "main/big")),
        (
            "all-reduce-start(%x), replica_groups=[2,4]<=[8]",
            'custom-call(%x), custom_call_target="mystery"',
            Unknown("custom_call", "mystery", "main/ar-start"),
        ),
    ],
)
def test_what_the_reader_does_not_know_is_collected(old: str, new: str, unknown: Unknown) -> None:
    assert old in OLDER
    assert unknown in parse(OLDER.replace(old, new)).unknown


def test_an_unscheduled_module_is_not_trusted() -> None:
    assert any("is_scheduled" in u.text for u in parse(OLDER.replace(", is_scheduled=true", "")).unknown)
    with pytest.raises(ValueError, match="ENTRY"):
        parse("module @jit_f {}")


def test_costs_of_the_excerpt() -> None:
    """GEMM FLOP from shapes; an append into pages counts its rows, not the pool."""
    h200 = load_hardware("h200")
    module = read("split_jax0.11")
    model = CostModel.of(module, RooflineModel(h200), 8, {("GEMV", 2): (5e9, 4e8)})
    costs = [model.of_instruction(module.entry, i) for i in module.entry.instructions]
    weights = 8192 * 1280 + 8192 * 1024 + 2 * 8192 * 3584  # per GPU; O over N and over K have the same size
    assert sum(c.flops for c in costs if c.kind == "gemm") == 2 * 2048 * weights
    assert [(c.flops, c.bytes) for c in costs if c.kind == "attention"] == [(0, 2 * 2 * 640 * 1024), (5e9, 4e8)]
    assert sorted(c.bytes for c in costs if c.kind == "collective") == [
        2 * 8192 * n for n in (640, 640, 640, 1408, 1408)
    ]
    forms = read("forms_jax0.11")
    append = next(i for i in forms.entry.instructions if i.piece and i.piece.op == "KV.APPEND")
    pool = 65536 * 128 * 2
    assert append.bytes == pool
    assert CostModel.of(forms, RooflineModel(h200), 8, None).of_instruction(forms.entry, append).bytes < pool / 3


@pytest.mark.aot
def test_a_compile_here_is_read_whole(compile_stand_in) -> None:
    module = parse(compile_stand_in(layers=2, mosaic=True, ways=("gather", "scatter")).as_text())
    assert module.unknown == ()
    pieces = {str(p) for i in module.entry.instructions for p in i.pieces}
    assert {"L0/GEMV.AG.1", "L1/O.RS.2", "L1/O.AG.2", "L1/D.AR.1", "L0/GEMV.2"} <= pieces
