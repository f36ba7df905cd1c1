"""Weighted sums of rows, Mosaic: under the interpreter against float64, and compiled for Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import combine_rows, combine_rows_mosaic
from kernels_pallas.tuning import GROUPED
from tests.kernels.compiled import compiled_report, launched
from tests.tolerances import row_errors

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
LIMIT = 4e-3  # of a row: one rounding to bfloat16


@pytest.fixture(autouse=True)
def _no_races(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    yield
    assert "RACE" not in capfd.readouterr().out


def inputs(tokens: int, choices: int, hidden: int, here: float, shared: bool) -> dict[str, jax.Array]:
    """Some choices are here, in rows of their own in any order; NaN in rows that nobody has."""
    rng = np.random.default_rng(tokens * hidden)
    place = np.full(tokens * choices, -1, np.int32)
    some = np.flatnonzero(rng.random(tokens * choices) < here)
    rows = np.full((len(some) + 3, hidden), np.nan)
    place[some] = rng.permutation(len(some)) + 2
    rows[place[some]] = rng.standard_normal((len(some), hidden))
    found = {
        "rows": jnp.asarray(rows, jnp.bfloat16),
        "place": jnp.asarray(place.reshape(tokens, choices)),
        "weights": jnp.asarray(rng.random((tokens, choices)), jnp.float32),
    }
    if shared:
        found["shared"] = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.bfloat16)
        found["shared_weight"] = jnp.asarray(rng.random(tokens), jnp.float32)
    return found


def by_hand(arrays: dict[str, jax.Array]) -> np.ndarray:
    """float64."""
    a = {name: np.asarray(value.astype(jnp.float32)).astype(np.float64) for name, value in arrays.items()}
    place = np.asarray(arrays["place"])
    total = np.zeros((place.shape[0], a["rows"].shape[1]))
    for token, choice in np.argwhere(place >= 0):
        total[token] += a["weights"][token, choice] * a["rows"][place[token, choice]]
    return total + (a["shared_weight"][:, None] * a["shared"] if "shared" in a else 0)


def call(backend: str) -> Any:
    options = {"interpret": INTERPRET} if backend == "mosaic" else {}
    return jax.jit(partial(combine_rows, backend=backend, **options))


# Pieces: one, two even, a last one that overlaps (of 1088 = 17 x 64, and of gpt-oss' 2880 = 45 x 64).
SHAPES = [(5, 3, 128, 0.4, False), (3, 2, 2048, 0.5, True), (4, 4, 1088, 1.0, True), (3, 4, 2880, 0.3, False)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["xla", "mosaic"])
def test_sums(backend: str, shape: Any) -> None:
    arrays = inputs(*shape)
    out, want = np.asarray(call(backend)(**arrays), np.float32), by_hand(arrays)
    assert out.shape == want.shape
    nothing = ~want.any(axis=1)
    assert (out[nothing] == 0).all()
    assert row_errors(out[~nothing], want[~nothing]).max() < LIMIT


def test_what_the_choices_of_one_token_give_depends_on_no_other() -> None:
    """Bit for bit, wherever rows lie."""
    arrays = inputs(6, 4, 2880, 0.7, False)
    whole = call("mosaic")(**arrays)
    order = np.random.default_rng(3).permutation(arrays["rows"].shape[0])
    place, where = arrays["place"][2:3], np.argsort(order)
    moved = jnp.where(place < 0, -1, jnp.asarray(where, jnp.int32)[jnp.maximum(place, 0)])
    alone = call("mosaic")(rows=arrays["rows"][order], place=moved, weights=arrays["weights"][2:3])
    np.testing.assert_array_equal(alone[0], whole[2])


def test_order_of_choices_counts() -> None:
    """1e8 + 1 - 1e8 in float32 is 0 in the order of choices, and would be 1 in another."""
    rows = jnp.broadcast_to(jnp.asarray([1e8, 1.0, -1e8], jnp.bfloat16)[:, None], (3, 128))
    place = jnp.asarray([[0, 1, 2], [0, 2, 1]], jnp.int32)
    arrays = {"rows": rows, "place": place, "weights": jnp.ones((2, 3), jnp.float32)}
    for backend in ("xla", "mosaic"):
        np.testing.assert_array_equal(call(backend)(**arrays)[:, 0], [0.0, 1.0])


@pytest.mark.parametrize("wrong", ["a choice is left out", "all are here"])
def test_broken_twins_fail(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, body = inputs(4, 3, 1088, 0.5, False), combine_rows_mosaic._body
    want = by_hand(arrays)
    if wrong == "all are here":
        arrays["place"] = jnp.maximum(arrays["place"], 2)
    else:
        monkeypatch.setattr(combine_rows_mosaic, "_body", lambda hidden, k, shared: body(hidden, k - 1, shared))
    out = np.asarray(jax.jit(partial(combine_rows, backend="mosaic", interpret=INTERPRET))(**arrays), np.float32)
    some = want.any(axis=1)
    assert not row_errors(out[some], want[some]).max() < LIMIT


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rows": jnp.zeros((4, 96), jnp.bfloat16)}, "rows: 96 elements; .* multiples of 64 from 128 on"),
        ({"rows": jnp.zeros((4, 128))}, "rows: dtype float32; .* accepts bfloat16"),
        ({"weights": jnp.zeros((2, 3))}, r"weights: float32 \[2, 3\] must be float32 \[2, 2\]"),
        ({"place": jnp.zeros((2, 2), jnp.int16)}, r"rows, place: \[4, 128\], int16 \[2, 2\] must be .*int32 \[n, k\]"),
        ({"shared": jnp.zeros((2, 128), jnp.bfloat16)}, "shared, shared_weight: one is given without the other"),
        (
            {"shared": jnp.zeros((3, 128), jnp.bfloat16), "shared_weight": jnp.zeros(2)},
            r"shared: bfloat16 \[3, 128\] must be bfloat16 \[2, 128\]",
        ),
    ],
)
def test_what_does_not_fit(change: dict[str, jax.Array], says: str) -> None:
    arrays: dict[str, Any] = {
        "rows": jnp.zeros((4, 128), jnp.bfloat16), "place": jnp.zeros((2, 2), jnp.int32), "weights": jnp.zeros((2, 2)),
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"^{says}"):
        combine_rows(**{**arrays, **change}, backend="mosaic", interpret=INTERPRET)


@pytest.mark.aot
@pytest.mark.parametrize(("hidden", "choices", "shared"), [(4096, 8, False), (2880, 4, False), (2048, 4, True)])
def test_compiles_for_hopper(
    hidden: int, choices: int, shared: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Qwen3-235B's, gpt-oss-120b's and Qwen1.5-MoE's rows: one kernel, registers for every thread that an SM can
    have, nothing spilled."""
    tokens = 2048
    shapes = {"rows": ((4 * tokens, hidden), jnp.bfloat16), "place": ((tokens, choices), jnp.int32)}
    shapes["weights"] = (tokens, choices), jnp.float32
    if shared:
        shapes |= {"shared": ((tokens, hidden), jnp.bfloat16), "shared_weight": ((tokens,), jnp.float32)}
    avals = [jax.ShapeDtypeStruct(*shape) for shape in shapes.values()]

    def combine(*arrays: jax.Array) -> jax.Array:
        named: dict[str, Any] = dict(zip(shapes, arrays, strict=True))
        return combine_rows(**named, backend="mosaic", tuning=GROUPED["h200"])

    program, registers = compiled_report(combine, avals, monkeypatch, capfd)
    assert launched(program) == ["combine_rows"]
    assert len(registers) == 1 and registers[0] <= 65536 // 2048 * 2
