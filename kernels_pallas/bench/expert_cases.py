"""What is measured of experts: grouped GEMMs, rows gathered for them, weighted sums of what they gave. Data alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.gate import Gate
from kernels_pallas.group_tiles import GROUP_ROWS, TILE, most_tiles

BALANCE = 788e12 / 4.3e12  # FLOP per byte: of an H200's GEMM and copy, as `goals.CEILINGS` has them
Aval = jax.ShapeDtypeStruct


@dataclass(frozen=True, kw_only=True)
class ExpertModel:
    """On one device of `devices`, which have so many experts each: a token has `choices`, spread over all of them."""

    name: str
    hidden: int
    size: int
    experts: int = 16
    choices: int
    devices: int = 8
    gate: Gate = Gate()  # noqa: RUF009
    bias: bool = False


QWEN3_235B = ExpertModel(name="qwen3-235b", hidden=4096, size=1536, choices=8)
GPT_OSS_120B = ExpertModel(
    name="gpt-oss-120b", hidden=2880, size=2880, choices=4, gate=Gate(1.702, 7.0, 1.0), bias=True
)


@dataclass(frozen=True, kw_only=True)
class ExpertCase:
    """rows: choices that are on this device, which fall to its experts at random; part: of the grouped GEMMs."""

    kernel: Literal["grouped_gemm", "gather_rows", "combine_rows"]
    model: ExpertModel
    rows: int
    part: Literal["", "up", "down"] = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.model.name, self.part, str(self.rows))))

    @property
    def tokens(self) -> int:
        return self.rows * self.model.devices // self.model.choices

    @cached_property
    def sizes(self) -> np.ndarray:
        """[experts] int32: rows of each group, which begin at multiples of 8."""
        drawn = np.random.default_rng(0).multinomial(self.rows, [1 / self.model.experts] * self.model.experts)
        return (-(-drawn // GROUP_ROWS) * GROUP_ROWS).astype(np.int32)

    @property
    def places(self) -> int:
        return int(self.sizes.sum())

    @property
    def weight(self) -> tuple[int, ...]:
        m = self.model
        return (m.experts, 2, m.size, m.hidden) if self.part == "up" else (m.experts, m.hidden, m.size)

    @property
    def flops(self) -> int:
        """Of the rows, none of which is in vain."""
        return 0 if self.kernel != "grouped_gemm" else 2 * self.rows * int(np.prod(self.weight[1:]))

    @property
    def tile_flops(self) -> int:
        """Of whole tiles."""
        return self.flops * TILE * int((-(-self.sizes // TILE)).sum()) // self.rows

    @property
    def bytes(self) -> int:
        """Weights of the groups that have rows, rows read and written."""
        m = self.model
        if self.kernel == "gather_rows":
            return 2 * self.rows * m.hidden * 2 + self.rows * 4
        if self.kernel == "combine_rows":
            return (self.rows + self.tokens) * m.hidden * 2 + self.tokens * m.choices * 8
        weights = int((self.sizes > 0).sum()) * int(np.prod(self.weight[1:]))
        return 2 * (weights + self.rows * (self.weight[-1] + self.weight[-2]))

    @property
    def compute_bound(self) -> bool:
        """By the GPU's ceilings."""
        return self.flops > BALANCE * self.bytes

    def avals(self) -> tuple[Aval, tuple[Aval, ...], tuple[Aval, ...]]:
        """What all calls share: of grouped GEMMs rows, of the others where they lie, and what goes with it; and what
        each call has alone: weights, or rows."""
        m, bf16 = self.model, jnp.bfloat16
        if self.kernel == "gather_rows":
            return Aval((self.places,), jnp.int32), (Aval((), jnp.int32),), (Aval((self.tokens, m.hidden), bf16),)
        if self.kernel == "combine_rows":
            shape = self.tokens, m.choices
            return Aval(shape, jnp.int32), (Aval(shape, jnp.float32),), (Aval((self.rows, m.hidden), bf16),)
        tiles = Aval((most_tiles(self.places, m.experts) + 1, 3), jnp.int32)
        own = (Aval(self.weight, bf16), *([Aval(self.weight[:-1], bf16)] if m.bias else []))
        return Aval((self.places, self.weight[-1]), bf16), (Aval((m.experts,), jnp.int32), tiles), own


def expert_cases(model: ExpertModel, rows: tuple[int, ...]) -> list[ExpertCase]:
    grouped = [
        ExpertCase(kernel="grouped_gemm", model=model, rows=n, part=part) for part in ("up", "down") for n in rows
    ]
    moved = [ExpertCase(kernel=kernel, model=model, rows=n) for kernel in ("gather_rows", "combine_rows") for n in rows]
    return [*grouped, *moved]
