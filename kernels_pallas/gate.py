"""What an MLP makes of its two first products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Gate:
    """min(gate, limit) * sigmoid(alpha * that) * (clip(up, -limit, limit) + shift): SwiGLU by default."""

    alpha: float = 1.0
    limit: float = float("inf")
    shift: float = 0.0

    def __call__(
        self, gate: jax.Array, up: jax.Array, sigmoid: Callable[[jax.Array], jax.Array] = jax.nn.sigmoid
    ) -> jax.Array:
        if self.limit != float("inf"):
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        product = gate * sigmoid(gate if self.alpha == 1.0 else self.alpha * gate)
        return product * (up + self.shift) if self.shift else product * up
