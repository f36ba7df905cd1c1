"""The GEMMs after attention, with arrays: a part of `step.trace`. What an fp8 GEMM reads is made ahead of it, in one
kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from kernels_pallas import rows_to_fp8
from kernels_pallas.gate import Gate
from nanoflow_jax.config import Mlp, ModelConfig
from nanoflow_jax.models import parts
from nanoflow_jax.models.layout import LayerParams
from nanoflow_jax.models.quantised import Quantised, QuantisedRows, Weight, join_parts, product_fp8
from nanoflow_jax.plan.plan import OpPiece
from nanoflow_jax.step.attention import KernelOptions, adds_products, gated_in_one
from nanoflow_jax.step.order import IssueOrder
from nanoflow_jax.step.rows import RowSpan

# Traced once per shape and lowered once per module, as the kernels of `step.trace`.
_rows_to_fp8 = jax.jit(
    rows_to_fp8, static_argnames=("cuts", "gate", "bound", "power_of_two", "backend", "tuning"), inline=True
)


class GemmOps:
    """HEADS, O, UG and D of a `step.layer.Machine`, which has the rest and sets these."""

    config: ModelConfig
    order: IssueOrder
    options: KernelOptions
    devices: int
    fp8_gathers: bool
    layer: LayerParams
    mlp: Mlp

    def _scaled(self, x: jax.Array) -> jax.Array:
        """Of the residual's multiplier. What O and D read, not what they give: their input is smaller, and the kernel
        that writes it multiplies it, too."""
        return parts.scaled(x, self.config.residual_multiplier)

    def ready(self, span: RowSpan, weight: Weight, *pieces: Any) -> Any:
        """A span's rows as `weight` is multiplied with them, of pieces that may be in fp8 already."""
        if isinstance(weight, Quantised) and not isinstance(pieces[0], QuantisedRows):
            return self._in_fp8(
                span.cuts, weight, *(x if v is None else v(x) for x, v in zip(pieces, span.views, strict=True))
            )
        return span(*pieces)

    def _in_fp8(
        self, cuts: tuple[tuple[int, int], ...] | None, weight: Quantised, *pieces: jax.Array, **more: Any
    ) -> QuantisedRows:
        values, scale = _rows_to_fp8(*pieces, cuts=cuts, bound=weight.bound, **more, **self.options.rows)
        return QuantisedRows(values, scale, pieces[0].dtype)

    def _attention(self, span: RowSpan, weight: Quantised, *pieces: jax.Array, **more: Any) -> QuantisedRows:
        """Attention's output for O."""
        if self.config.residual_multiplier != 1.0:
            return self._in_fp8(None, weight, self._scaled(span(*pieces)), **more)
        return self._in_fp8(span.cuts, weight, *pieces, **more)

    def heads(self, piece: OpPiece, span: RowSpan, attention: Sequence[jax.Array]) -> Any:
        """Transposed on the shard, the cheapest place: gathered along its leading axis it is [w, n], which O contracts
        as it is. In fp8 as it is, over powers of two: O puts the devices' columns side by side with the scales of whole
        rows."""
        weight = self.layer.o_by_output
        if self.fp8_gathers and isinstance(weight, Quantised):
            return self.order.run(lambda *x: self._attention(span, weight, *x, power_of_two=True), *attention)
        return self.order.run(lambda *x: self._scaled(span(*x)).T, *attention)

    def o_over_n(self, piece: OpPiece, gathered: Any) -> jax.Array:
        """[w, n], or in fp8 [p, n, w/p], x [H/p, w] -> [n, H/p]."""
        weight = self.layer.o_by_output
        if isinstance(gathered, QuantisedRows):
            return self.order.run(lambda x: parts.contract(join_parts(x), weight, 1), gathered)
        return self.order.run(lambda x: parts.contract(x, weight, 0), gathered)

    def o_over_k(self, piece: OpPiece, span: RowSpan, attention: Sequence[jax.Array]) -> jax.Array:
        """[n, w/p] x [H, w/p] -> partial sums [n, H]."""
        weight = self.layer.o_by_input

        def project(*x: jax.Array) -> jax.Array:
            rows = self._attention(span, weight, *x) if isinstance(weight, Quantised) else self._scaled(span(*x))
            return self._update(rows, weight)

        return self.order.run(project, *attention)

    def _update(self, x: Any, weight: Weight) -> Any:
        """What O or D adds to the residual. On one device, where no sum comes between, whoever adds it multiplies it by
        the scales."""
        if isinstance(weight, Quantised) and adds_products(self.config, self.devices):
            return product_fp8(x, weight, 1, x.dtype)
        return parts.contract(x, weight, 1)

    def up_gate(self, piece: OpPiece, span: RowSpan, normed: Sequence[Any]) -> Any:
        """[n, F/p], as D takes it."""
        layer, mlp = self.layer, self.mlp

        def project(*pieces: Any) -> Any:
            x = self.ready(span, layer.ug, *pieces)
            if not isinstance(layer.down, Quantised):
                return self._scaled(parts.gated_mlp_up(x, layer, mlp))
            if isinstance(layer.ug, Quantised) and gated_in_one(self.config, mlp):
                product = product_fp8(x, layer.ug, 1, x.dtype)
                scales = product.token, product.channel
                return self._in_fp8(None, layer.down, product.values, gate=Gate(), scales=scales)
            return self._in_fp8(None, layer.down, self._scaled(parts.gated_mlp_up(x, layer, mlp)))

        return self.order.run(project, *normed)

    def down(self, piece: OpPiece, activated: Any) -> jax.Array:
        weight = self.layer.down
        return self.order.run(lambda x: self._update(x, weight), activated)
