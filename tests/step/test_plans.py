"""Plans: what is refused, how pieces cover a step, and that no plan, mesh or order changes an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.models.registry import parse_config
from nanoflow_jax.parallel.mesh import check_divides, make_mesh, valid_sizes
from nanoflow_jax.plan.file import load_plan, parse_plan
from nanoflow_jax.plan.ops import OPS, STRATEGIES
from nanoflow_jax.plan.plan import SPLIT_ABOVE, NanoBatch, OpPiece, SchedulePlan, needs
from nanoflow_jax.step.batch import StepShape
from tests.reference.checkpoints import load_reference, write_checkpoint
from tests.step.step_driver import Driver, Packer, Steps, against_reference, logits_of
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

# ---- parsing


def fields(**changes: Any) -> dict[str, Any]:
    """A plan in parsed TOML: two nano-batches of 32 rows, 40 of the 64 rows decode."""
    plan: dict[str, Any] = {
        "tokens_per_step": 64,
        "decode_tokens": 40,
        "nano_batches": [{"rows": 32, "attention_output": "gather"}, {"rows": 32, "attention_output": "reduce"}],
        "splits": {"KQV": [16, 16, 32], "GEMV": [24, 16], "PF": [24]},
    }
    return {k: v for k, v in {**plan, **changes}.items() if v is not ...}


def batch(**changes: Any) -> list[dict[str, Any]]:
    first = {k: v for k, v in {"rows": 32, "attention_output": "gather", **changes}.items() if v is not ...}
    return [first, {"rows": 32, "attention_output": "reduce"}]


def default_order(**changes: Any) -> list[str]:
    return [p.name for p in parse_plan("p", fields(**changes)).pieces(40, 24)]


def test_parse() -> None:
    plan = parse_plan("mine", fields(description="why"))
    assert plan == SchedulePlan(
        "mine",
        (NanoBatch(32, "gather"), NanoBatch(32, "reduce")),
        "why",
        64,
        40,
        {"KQV": (16, 16, 32), "GEMV": (24, 16), "PF": (24,)},
    )
    assert plan.needs_o_by_output
    assert plan.needs_o_by_input
    assert parse_plan("mine", fields(order=default_order())).order == tuple(default_order())


def test_named_plans() -> None:
    """The two plans of the repository: their strategy, and which layout of O they need."""
    reduce, gather = load_plan("two_all_reduce"), load_plan("two_gather_one_reduce")
    assert reduce.strategies == {"reduce"}
    assert gather.strategies == {"gather"}
    assert (reduce.needs_o_by_output, reduce.needs_o_by_input) == (False, True)
    assert (gather.needs_o_by_output, gather.needs_o_by_input) == (True, False)
    scatter = SchedulePlan("s", (NanoBatch(None, "scatter"),))
    assert (scatter.needs_o_by_output, scatter.needs_o_by_input) == (False, True)
    assert [p.op for p in scatter.pieces(8, 8)] == ["KQV", "GEMV", "PF", *DENSE["scatter"]]


def test_what_attention_reads() -> None:
    """Decode rows their own keys; a prompt's later rows those of its earlier ones too."""
    plan = parse_plan("p", fields(splits={"KQV": [32, 16, 16], "GEMV": [24, 16], "PF": [8, 16]}))
    pieces = {p.name: p for p in plan.pieces(40, 24)}
    read = {name: needs(pieces[name], pieces) for name in ("KQV.3", "GEMV.1", "GEMV.2", "PF.1", "PF.2")}
    assert read == {
        "KQV.3": [], "GEMV.1": ["KQV.1"], "GEMV.2": ["KQV.1", "KQV.2"], "PF.1": ["KQV.2"], "PF.2": ["KQV.2", "KQV.3"],
    }  # fmt: skip


def swapped(order: list[str], a: str, b: str) -> list[str]:
    return [{a: b, b: a}.get(name, name) for name in order]


DENSE = {name: tuple(op for op in ops if not OPS[op].experts) for name, ops in STRATEGIES.items()}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lanes": 2}, "lanes: 2 must be dict"),
    ({"lanes": {"KQV": {"stream": 1}}}, "lanes.KQV: op 'KQV' cannot leave the main stream; accepted: GEMV"),
    ({"lanes": {"GEMV": {"sms": 8}}}, "lanes.GEMV: needs stream (1 or more)"),
    ({"lanes": {"GEMV": {"stream": 1, "core": 8}}}, "lanes.GEMV.core: unknown field; accepted: stream, sms"),
    ({"streams": 2}, "streams: unknown field; accepted: decode_tokens, description, expert_parallel, for, gathers"),
    ({"gathers": ["fp8"]}, "gathers: ['fp8'] is not accepted; expected 'fp8', or no such line"),
    ({"nano_batches": ...}, "nano_batches: None must be list"),
    ({"nano_batches": []}, "nano_batches: at least one is needed"),
    ({"nano_batches": ["gather"]}, "nano_batches[1]: 'gather' must be dict"),
    ({"nano_batches": batch(lane=1)}, "nano_batches[1].lane: unknown field; accepted: attention_output, rows"),
    ({"nano_batches": batch(rows="32")}, "nano_batches[1].rows: '32' must be int"),
    ({"nano_batches": batch(rows=True)}, "nano_batches[1].rows: True must be int"),
    ({"nano_batches": batch(attention_output="ring")}, "nano_batches[1].attention_output: 'ring' is unknown"),
    ({"nano_batches": batch(attention_output=...)}, "nano_batches[1].attention_output: 'None' is unknown"),
    ({"nano_batches": batch(rows=...)}, "nano_batches: every size must be a positive number of rows"),
    ({"nano_batches": batch(rows=0)}, "nano_batches: every size must be a positive number of rows"),
    ({"nano_batches": batch(rows=24)}, "nano_batches: sizes [24, 32] add up to 56, not to tokens_per_step = 64"),
    ({"tokens_per_step": ...}, "tokens_per_step: needed by a plan that gives rows, splits or decode_tokens"),
    ({"tokens_per_step": 64.0}, "tokens_per_step: 64.0 must be int"),
    ({"decode_tokens": ...}, "decode_tokens: None must be between 0 and tokens_per_step = 64"),
    ({"decode_tokens": 65}, "decode_tokens: 65 must be between 0 and tokens_per_step = 64"),
    ({"decode_tokens": -1}, "decode_tokens: -1 must be between 0 and tokens_per_step = 64"),
    ({"splits": [1]}, "splits: [1] must be dict"),
    ({"splits": {"KQV": 64}}, "splits.KQV: 64 must be list"),
    ({"splits": {"KQV": [32, "32"]}}, "splits.KQV[2]: '32' must be int"),
    ({"splits": {"KQV": [32, 31]}}, "splits.KQV: sizes [32, 31] add up to 63, not to tokens_per_step = 64"),
    ({"splits": {"KQV": [40, 24]}}, "splits.KQV: pieces must end where nano-batches end, at row 32"),
    ({"splits": {"GEMV": [24, 24]}}, "splits.GEMV: sizes [24, 24] add up to 48, not to decode_tokens = 40"),
    ({"splits": {"GEMV": [40, 0]}}, "splits.GEMV: every size must be a positive number of rows"),
    ({"splits": {"PF": [40]}}, "splits.PF: sizes [40] add up to 40, not to tokens_per_step - decode_tokens = 24"),
    ({"splits": {"O": [32, 32]}}, "splits.O: op 'O' is not one that can be split; accepted: KQV, GEMV, PF"),
    ({"description": 3}, "description: 3 must be str"),
    ({"order": "KQV.1"}, "order: 'KQV.1' must be list"),
    ({"order": [1]}, "order: must be a list of strings such as 'KQV.1'"),
    ({"order": ["QKV.1"]}, "order: 'QKV.1' is not a known op; accepted: KQV, GEMV, PF"),
    ({"order": ["KQV.4"]}, "order: 'KQV.4' is not a piece of this plan; its pieces: KQV.1, KQV.2, KQV.3, GEMV.1"),
    ({"order": ["KQV.1", "O.AR.1"]}, "order: 'O.AR.1' is not a piece of this plan"),  # nano-batch 1 gathers
    ({"order": ["KQV.1", "KQV.1"]}, "order: 'KQV.1' is listed twice"),
    ({"order": default_order()[:-1]}, "order: 'D.AR.2' is missing"),
    ({"order": ["KQV.1", "GEMV.1"]}, "order: 'GEMV.1' needs KQV.2, which must come before it"),
    ({"order": swapped(default_order(), "KQV.2", "PF.1")}, "order: 'PF.1' needs KQV.3, which must come before it"),
    ({"order": swapped(default_order(), "GEMV.AG.1", "GEMV.2")}, "order: 'GEMV.AG.1' needs GEMV.2, which must"),
    ({"order": swapped(default_order(), "UG.2", "D.2")}, "order: 'D.2' needs UG.2, which must come before it"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes: dict[str, Any], message: str) -> None:
    """Every plan that cannot run is refused in one line that starts with the field."""
    with pytest.raises(ConfigError) as caught:
        parse_plan("p", fields(**changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


FILE = """# a comment that says GEMV and rows
description = "two halves"
tokens_per_step = 64
decode_tokens = 40
order = [
    "KQV.1", "KQV.2",
    "GEMV.1", "PF.1",
]

[[nano_batches]]
rows = 64
attention_output = "gather"

[splits]
KQV = [32, 32]
"""


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ('"GEMV.1"', '"GEMM.1"', 7, "order: 'GEMM.1' is not a known op"),
        ("decode_tokens = 40", "decode_tokens = 65", 4, "decode_tokens: 65 must be between"),
        ('"gather"', '"ring"', 12, "nano_batches[1].attention_output: 'ring' is unknown"),
        ("KQV = [32, 32]", "O = [32, 32]", 15, "splits.O: op 'O' is not one that can be split"),
        ("description", "describtion", 2, "describtion: unknown field"),
        ("decode_tokens = 40", "decode_tokens =", 4, "not valid TOML: Invalid value"),
    ],
)
def test_file_errors_name_file_and_line(old: str, new: str, line: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        load_plan(str(path))
    where, _, rest = str(caught.value).partition(": ")
    assert rest.startswith(message)
    assert where == f"{path}:{line}"


def test_load_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(FILE.replace(FILE[FILE.index("order") : FILE.index("[[")], ""))
    assert load_plan(str(path)) == SchedulePlan(
        "mine", (NanoBatch(64, "gather"),), "two halves", 64, 40, {"KQV": (32, 32)}
    )
    with pytest.raises(ConfigError, match=r"plans: unknown name 'absent'; accepted: .*two_all_reduce"):
        load_plan("absent")


# ---- pieces


@st.composite
def plans(draw: st.DrawFn) -> SchedulePlan:
    """Any valid plan with rows of both kinds, in a random order that its data dependences allow."""
    decode, prefill = draw(st.integers(1, 600)), draw(st.integers(1, 600))
    total = decode + prefill

    def cuts(rows: int, most: int) -> set[int]:
        return set(draw(st.lists(st.integers(1, max(1, rows - 1)), max_size=most))) - {rows}

    def sizes(cut: set[int], rows: int) -> tuple[int, ...]:
        return tuple(b - a for a, b in pairwise([0, *sorted(cut), rows]))

    edges = cuts(total, 3)
    batches = tuple(NanoBatch(n, draw(st.sampled_from(list(STRATEGIES)))) for n in sizes(edges, total))
    splits = {}
    if draw(st.booleans()):
        splits["KQV"] = sizes(edges | cuts(total, 4), total)
    if draw(st.booleans()):
        splits["GEMV"] = sizes(cuts(decode, 4), decode)
    if draw(st.booleans()):
        splits["PF"] = sizes(cuts(prefill, 2), prefill)
    plan = SchedulePlan("random", batches, "", total, decode, splits)
    return shuffled(plan, np.random.default_rng(draw(st.integers(0, 2**32 - 1)))) if draw(st.booleans()) else plan


def shuffled(plan: SchedulePlan, rng: np.random.Generator) -> SchedulePlan:
    """The plan with a random order among those that its data dependences allow."""
    assert plan.tokens_per_step is not None
    assert plan.decode_tokens is not None
    pieces = {p.name: p for p in plan.pieces(plan.decode_tokens, plan.tokens_per_step - plan.decode_tokens)}
    order: list[str] = []
    while len(order) < len(pieces):
        ready = [n for n, p in pieces.items() if n not in order and set(needs(p, pieces)) <= set(order)]
        order.append(ready[rng.integers(len(ready))])
    return replace(plan, order=tuple(order))


def check_cover(pieces: list[OpPiece], first: int, last: int, what: str) -> None:
    """The pieces, by row, cover [first, last) without gap or overlap; none is empty."""
    edges = sorted((p.start, p.stop) for p in pieces)
    at = first
    for start, stop in edges:
        assert start == at, f"{what}: rows {at} to {start}"
        assert start < stop, f"{what}: an empty piece at {start}"
        at = stop
    assert at == last, f"{what}: ends at row {at}, not {last}"


def check_pieces(plan: SchedulePlan, decode: int, prefill: int) -> None:
    """Everything a step needs of its pieces, whatever the plan."""
    pieces, total = plan.pieces(decode, prefill), decode + prefill
    assert len({p.name for p in pieces}) == len(pieces)
    of: Callable[[str], list[OpPiece]] = lambda op: [p for p in pieces if p.op == op]  # noqa: E731
    check_cover(of("KQV"), 0, total, "KQV")
    check_cover(of("GEMV"), 0, decode, "GEMV")
    check_cover(of("PF"), decode, total, "PF")
    for op in ("O", "UG", "D"):
        check_cover(of(op), 0, total, op)
    place = {p.name: i for i, p in enumerate(pieces)}
    for o in of("O"):
        # A nano-batch's ops are those of one strategy, on the same rows, in the strategy's order.
        chain = [p for p in pieces if p.op not in ("KQV", "GEMV", "PF") and p.piece == o.piece]
        assert tuple(p.op for p in chain) in DENSE.values()
        assert {(p.start, p.stop) for p in chain} == {(o.start, o.stop)}
        before = [p for p in pieces if p.op in ("GEMV", "PF") and p.start < o.stop and o.start < p.stop]
        assert all(place[p.name] < place[chain[0].name] for p in before), f"{chain[0].name} before its attention"
    holder = {p.piece: p for p in of("O")}
    for piece in pieces:
        assert holder[piece.nano_batch].start <= piece.start < holder[piece.nano_batch].stop
    for kqv in of("KQV"):
        assert kqv.stop <= holder[kqv.nano_batch].stop, f"{kqv.name} spans nano-batches"
        for reader in (*of("GEMV"), *of("PF")):
            # A prefill piece also sees the rows before its own, of the same chunk.
            first = decode if reader.op == "PF" else reader.start
            if first < kqv.stop and kqv.start < reader.stop:
                assert place[kqv.name] < place[reader.name], f"{reader.name} before {kqv.name}"


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plan=plans())
def test_pieces_at_the_plans_own_size(plan: SchedulePlan) -> None:
    """Exactly the plan's rows, in the plan's order."""
    assert plan.tokens_per_step is not None
    assert plan.decode_tokens is not None
    decode, prefill = plan.decode_tokens, plan.tokens_per_step - plan.decode_tokens
    check_pieces(plan, decode, prefill)
    pieces = plan.pieces(decode, prefill)
    for op, sizes in plan.splits.items():
        assert [p.rows for p in pieces if p.op == op and p.piece] == [sizes[p.piece - 1] for p in pieces if p.op == op]
    by_number = sorted((p for p in pieces if p.op == "O"), key=lambda p: p.piece)
    assert [p.rows for p in by_number] == [nb.rows for nb in plan.nano_batches]
    if plan.order:
        assert tuple(p.name for p in pieces) == plan.order


@settings(max_examples=300, deadline=None, derandomize=True)
@given(plan=plans(), decode=st.integers(0, 1500), prefill=st.integers(0, 1500), quantum=st.sampled_from([8, 16]))
def test_pieces_at_any_size(plan: SchedulePlan, decode: int, prefill: int, quantum: int) -> None:
    """Rescaled: still covering, nested and ordered; cuts at multiples of the quantum, decode and prefill rows apart."""
    assume(decode + prefill > 0)
    check_pieces(plan, decode, prefill)
    pieces = plan.pieces(decode, prefill, quantum)
    if (decode, decode + prefill) == (plan.decode_tokens, plan.tokens_per_step):
        return
    for piece in pieces:
        offset = piece.start if piece.start < decode else piece.start - decode
        assert offset % quantum == 0
    names = [p.name for p in pieces]
    if plan.order and decode + prefill >= SPLIT_ABOVE:
        assert names == [n for n in plan.order if n in names]
    if decode + prefill < SPLIT_ABOVE:
        last = plan.nano_batches[-1].attention_output
        expected = ["KQV", *["GEMV"] * (decode > 0), *["PF"] * (prefill > 0), *DENSE[last]]
        assert names == [f"{op}.1" for op in expected]


@pytest.mark.parametrize("planned", [(0, 64), (64, 64)])
@pytest.mark.parametrize("rows", [(256, 512), (0, 768), (768, 0)])
def test_plan_of_one_kind_of_rows(planned: tuple[int, int], rows: tuple[int, int]) -> None:
    """A plan made for prefill rows only, or decode rows only, still covers a step that has both."""
    plan = SchedulePlan("one kind", (NanoBatch(32, "gather"), NanoBatch(32, "reduce")), "", planned[1], planned[0])
    check_pieces(plan, *rows)


@pytest.mark.parametrize("rows", [(0, 1), (1, 0), (3, 5), (40, 1000)])
def test_plan_without_sizes_fits_every_step(rows: tuple[int, int]) -> None:
    for strategy in STRATEGIES:
        plan = SchedulePlan("plain", (NanoBatch(None, strategy),))
        check_pieces(plan, *rows)
        assert max(p.piece for p in plan.pieces(*rows)) == 1


# ---- mesh sizes


def config_of(heads: int, kv_heads: int, hidden: int, intermediate: int) -> ModelConfig:
    return parse_config(
        {
            "vocab_size": 101, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": 1,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8,
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "works"),
    [
        ((8, 8, 64, 128), [1, 2, 4, 8]),
        ((8, 1, 64, 128), [1, 2, 4, 8]),  # one KV head, replicated
        ((12, 4, 96, 96), [1, 2, 4, 12]),  # 3 and 6 split the heads, but neither split nor replicate 4 KV heads
        ((8, 2, 64, 100), [1, 2, 4]),
        ((6, 3, 64, 128), [1]),
    ],
)
def test_check_divides(sizes: tuple[int, int, int, int], works: list[int]) -> None:
    """Sizes that divide pass; any other is an error that lists those that do."""
    config = config_of(*sizes)
    assert valid_sizes(config) == works
    for size in range(1, 17):
        if size in works:
            check_divides(config, size)
            continue
        with pytest.raises(
            ConfigError,
            match=rf"^tensor_parallel_size: {size} does not divide .*; sizes that work: {', '.join(map(str, works))}$",
        ):
            check_divides(config, size)


def test_make_mesh() -> None:
    config = config_of(8, 2, 64, 128)
    assert make_mesh(config).shape == {"tp": 8}
    assert make_mesh(config, 2).size == 2
    for size in (0, 9):
        with pytest.raises(
            ConfigError, match=f"tensor_parallel_size: {size} devices wanted, 8 present; accepted: 1 to 8"
        ):
            make_mesh(config, size)
    with pytest.raises(ConfigError, match="tensor_parallel_size: 3 does not divide"):
        make_mesh(config, 3)


# ---- no plan changes an answer

SHAPE = StepShape(decode_rows=40, prefill_rows=64, prefill_segments=7, pages_per_request=6)
PROMPT_OF = tuple(range(5)) * 4  # 20 sequences: four of each of the reference's prompts, cut at different places
NUM_PAGES = 112


@cache
def crowd(case: str) -> Steps:
    """Steps of ragged requests: chunks of up to 13 tokens share the prefill rows; others decode, in any row."""
    prompts, rng = load_reference(case).prompts, np.random.default_rng(12)
    packer = Packer([prompts[p] for p in PROMPT_OF], SHAPE, NUM_PAGES, seed=5)
    lengths = [len(t) for t in packer.tokens]
    contexts = [int(rng.integers(0, n)) for n in lengths]  # what is prefilled; then up to 3 tokens are decoded
    ends = [min(n, c + 3) for n, c in zip(lengths, contexts, strict=True)]
    done, steps = [0] * len(lengths), []
    while done != ends:
        decode: list[tuple[int, int] | None] = [None] * SHAPE.decode_rows
        slots = rng.permutation(SHAPE.decode_rows)
        prefill, left = [], SHAPE.prefill_rows
        for s in map(int, rng.permutation(len(lengths))):
            if contexts[s] <= done[s] < ends[s]:
                decode[slots[s]] = (s, done[s])
                done[s] += 1
            elif done[s] < contexts[s] and left and len(prefill) < SHAPE.prefill_segments:
                stop = min(contexts[s], done[s] + int(rng.integers(1, 14)), done[s] + left)
                prefill.append((s, done[s], stop))
                left -= stop - done[s]
                done[s] = stop
        steps.append(packer.pack(decode, prefill))
    return steps


def random_plan(strategies: tuple[str, ...], seed: int, pieces: dict[str, int]) -> SchedulePlan:
    """Random nano-batch sizes (multiples of 8, so that scatter divides), random splits of any size, a random order."""
    rng = np.random.default_rng(seed)
    total, decode = SHAPE.rows, SHAPE.decode_rows

    def sizes(cuts: Any, rows: int) -> tuple[int, ...]:
        return tuple(int(b - a) for a, b in pairwise([0, *sorted(cuts), rows]))

    edges = 8 * rng.choice(np.arange(1, total // 8), len(strategies) - 1, replace=False)
    batches = tuple(NanoBatch(n, s) for n, s in zip(sizes(edges, total), strategies, strict=True))
    splits = {}
    for op, (first, rows) in {"KQV": (edges, total), "GEMV": ((), decode), "PF": ((), total - decode)}.items():
        rest = np.setdiff1d(np.arange(1, rows), first)
        splits[op] = sizes({*first, *rng.choice(rest, max(0, pieces[op] - 1 - len(first)), replace=False)}, rows)
    return shuffled(SchedulePlan(f"random {seed}", batches, "", total, decode, splits), rng)


RANDOM_PLANS = [
    random_plan(("gather", "reduce", "scatter"), 1, {"KQV": 4, "GEMV": 4, "PF": 1}),
    random_plan(("gather", "gather"), 2, {"KQV": 4, "GEMV": 4, "PF": 1}),
    random_plan(("scatter", "reduce", "gather"), 3, {"KQV": 5, "GEMV": 1, "PF": 2}),
    random_plan(("scatter",), 4, {"KQV": 1, "GEMV": 2, "PF": 2}),
]
RUNS = [(0, 1), (0, 8), (1, 2), (1, 8), (2, 8), (3, 4)]

GetFolder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> GetFolder:
    return cache(lambda case: write_checkpoint(case, tmp_path_factory.mktemp(case)))


def run_crowd(driver: Driver, case: str) -> tuple[np.ndarray, np.ndarray]:
    """(logits of every row, those of transformers)."""
    return against_reference(logits_of(driver, crowd(case)), load_reference(case), "float32", PROMPT_OF)


def test_crowd_is_ragged() -> None:
    """What the plans are compared on: both kinds of rows at once, empty rows between, prompts in several chunks."""
    rows = [[(row < SHAPE.decode_rows) for row, _, _ in rows] for _, rows in crowd("biases")]
    assert sum(any(kinds) and not all(kinds) for kinds in rows) >= 3
    assert sum(map(sum, rows)) >= 40
    assert len({(s, p) for _, rows in crowd("biases") for _, s, p in rows}) >= 200


@pytest.fixture(scope="module")
def random_plan_logits(folder_of: GetFolder) -> Callable[[int, int], tuple[np.ndarray, np.ndarray]]:
    """(plan, devices) -> what `run_crowd` gives; run once."""

    @cache
    def get(plan: int, devices: int) -> tuple[np.ndarray, np.ndarray]:
        return run_crowd(Driver(folder_of("biases"), RANDOM_PLANS[plan], SHAPE, devices, num_pages=NUM_PAGES), "biases")

    return get


@pytest.mark.parametrize(("plan", "devices"), RUNS)
def test_random_plans(plan: int, devices: int, random_plan_logits: Any) -> None:
    """Random nano-batches, strategies, splits and orders on any mesh; the model has biases and 2 KV heads."""
    got, want = random_plan_logits(plan, devices)
    assert_rows_close(got, want, "float32")
    assert_rows_close(got, random_plan_logits(0, 1)[0], "float32")


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("plan", ["two_all_reduce", "two_gather_one_reduce"])
def test_named_plans_on_every_mesh(plan: str, devices: int, folder_of: GetFolder) -> None:
    """Both plans on 1, 2, 4 and 8 devices, with one KV head (replicated) and a vocabulary of 131 (padded)."""
    driver = Driver(folder_of("odd_vocab_tied"), load_plan(plan), SHAPE, devices, num_pages=NUM_PAGES)
    got, want = run_crowd(driver, "odd_vocab_tied")
    assert got.shape[1] == 131
    assert_rows_close(got, want, "float32")


@pytest.mark.parametrize(
    ("case", "plan", "devices", "enforce_order"),
    [("qwen3", 0, 8, False), ("granite_biases", 2, 8, False), ("olmo2_gqa", 0, 8, True), ("olmo2_gqa", 3, 2, False)],
)
def test_families_in_random_plans(
    case: str, plan: int, devices: int, enforce_order: bool, folder_of: GetFolder
) -> None:
    """What families norm and multiply is right whichever rows or columns a collective leaves on a device."""
    driver = Driver(
        folder_of(case), RANDOM_PLANS[plan], SHAPE, devices, num_pages=NUM_PAGES, enforce_order=enforce_order
    )
    assert_rows_close(*run_crowd(driver, case), "float32")


def test_enforced_order_changes_nothing(folder_of: GetFolder, random_plan_logits: Any) -> None:
    """The issue order as data dependence: bitwise the same logits."""
    driver = Driver(folder_of("biases"), RANDOM_PLANS[0], SHAPE, 8, num_pages=NUM_PAGES, enforce_order=True)
    np.testing.assert_array_equal(run_crowd(driver, "biases")[0], random_plan_logits(0, 8)[0])


def test_dropped_reduction_fails(folder_of: GetFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective that does nothing is far outside the tolerance: the comparison sees every shard."""
    from nanoflow_jax.parallel import collectives

    reduce_scatter = collectives.reduce_scatter_rows
    monkeypatch.setattr(collectives, "reduce_scatter_rows", lambda x: reduce_scatter(x) * 0.5)
    driver = Driver(folder_of("biases"), RANDOM_PLANS[3], SHAPE, 2, num_pages=NUM_PAGES)
    assert row_errors(*run_crowd(driver, "biases")).min() > TOLERANCES["bfloat16"]
