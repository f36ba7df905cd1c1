"""What a layer of experts does with arrays: the part of `step.trace` that layers without do not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from kernels_pallas.group_tiles import GROUP_ROWS, list_tiles
from nanoflow_jax.config import Mlp
from nanoflow_jax.models.experts import Places, Routing, by_expert, combine, experts_down, experts_up, places, route
from nanoflow_jax.models.layout import LayerParams
from nanoflow_jax.parallel import collectives
from nanoflow_jax.plan.plan import OpPiece
from nanoflow_jax.step.attention import KernelOptions
from nanoflow_jax.step.order import IssueOrder
from nanoflow_jax.step.rows import RowSpan


class ExpertOps:
    """ROUTE, DISPATCH, UG, D and COMBINE of a `step.layer.Machine`, which has the rest and sets these."""

    order: IssueOrder
    options: KernelOptions
    devices: int
    expert_parallel: bool  # each expert is whole, on one device
    layer: LayerParams
    mlp: Mlp

    def _scaled(self, x: jax.Array) -> jax.Array:
        raise NotImplementedError

    def route(self, piece: OpPiece, span: RowSpan, normed: Sequence[jax.Array]) -> tuple[Routing, Places]:
        layer, mlp = self.layer.experts, self.mlp

        def decide(*x: jax.Array) -> tuple[Routing, Places]:
            routing = route(span(*x), layer, mlp)
            count = layer.ug.shape[0]
            first = collectives.device_index() * count if self.expert_parallel else 0
            if self.options.experts["backend"] != "mosaic":
                return routing, places(routing.chosen, first, count, 1)
            at = places(routing.chosen, first, count, GROUP_ROWS)
            return routing, replace(at, tiles=list_tiles(at.rows.shape[0], at.sizes))

        return self.order.run(decide, *normed)

    def dispatch(
        self, piece: OpPiece, routing: tuple[Routing, Places], span: RowSpan, normed: Sequence[jax.Array]
    ) -> jax.Array:
        options = self._expert_options(piece)
        return self.order.run(lambda at, *x: by_expert(span(*x), at, **options), routing[1], *normed)

    def _expert_options(self, piece: OpPiece) -> dict[str, Any]:
        """Of the kernels; rows are spread evenly, as far as the scheduler knows."""
        options, experts = self.options.experts, self.mlp.experts
        if options["backend"] == "xla" or experts is None:
            return options
        share = self.devices if self.expert_parallel else 1
        return options | {"expected_rows": piece.rows * experts.per_token // share}

    def experts_up(self, piece: OpPiece, routing: tuple[Routing, Places], rows: jax.Array) -> jax.Array:
        layer, mlp = self.layer.experts, self.mlp
        options = self._expert_options(piece)
        return self.order.run(lambda x, at: experts_up(x, at, layer, mlp, **options), rows, routing[1])

    def experts_down(self, piece: OpPiece, routing: tuple[Routing, Places], activated: jax.Array) -> jax.Array:
        layer, here = self.layer.experts, self.expert_parallel or collectives.device_index() == 0
        options = self._expert_options(piece)

        def down(x: jax.Array, at: Places) -> jax.Array:
            return experts_down(x, at, layer, bias_here=here, **options)

        return self.order.run(down, activated, routing[1])

    def combine(
        self, piece: OpPiece, routing: tuple[Routing, Places], projected: jax.Array, shared: jax.Array | None
    ) -> jax.Array:
        weights, at = routing
        options = self._expert_options(piece)
        return self.order.run(lambda *x: self._scaled(combine(*x, **options)), projected, at, weights, shared)
