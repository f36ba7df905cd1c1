"""The plain forward of every family, without plan, mesh, pages or kernels: what each step must compute, by
`ModelConfig` alone, and what steps are compared with where `transformers` has no answer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from nanoflow_jax.config import Attention, Mlp, ModelConfig
from nanoflow_jax.models import parts
from nanoflow_jax.models.experts import route
from nanoflow_jax.models.layout import LayerParams, ModelParams
from nanoflow_jax.models.parts import contract, rms_norm, scaled


def forward(config: ModelConfig, params: ModelParams, tokens: jax.Array) -> jax.Array:
    """tokens [n] of one sequence -> logits [n, vocabulary] float32. Whole weights of one device, with O in either
    layout; to the norms' weights `config.norm_offset` has been added."""
    x, eps, by = params.embedding[tokens], config.rms_norm_eps, config.residual_multiplier
    x = scaled(x, config.embedding_factor)
    for i, (kind, layer) in enumerate(zip(config.layers, params.layers, strict=True)):
        weights = iter(params.norms[i])  # in the order in which a layer meets them

        def normed(x: jax.Array, not_where: str, weights=weights) -> jax.Array:
            return x if config.norms == not_where else rms_norm(x, next(weights), eps)

        q, k, v = parts.split_kqv(parts.fused_kqv(normed(x, "after"), layer))
        if config.qk_norm == "head":
            q, k = (rms_norm(y, params.qk_norms[i, at], eps) for at, y in enumerate((q, k)))
        elif config.qk_norm == "projection":
            q = rms_norm(q.reshape(tokens.size, -1), params.qk_norms[i, :, :-1].reshape(-1), eps).reshape(q.shape)
            k = rms_norm(k.reshape(tokens.size, -1), params.qk_norms[i, :, -1].reshape(-1), eps).reshape(k.shape)
        o = layer.o_by_output if layer.o_by_input is None else layer.o_by_input
        attention = parts.linear(self_attention(q, k, v, kind.attention, layer.sinks), o, layer.o_bias)
        x = x + scaled(normed(attention, "before"), by)
        read = normed(x, "after")
        x = x + scaled(normed(mlp(read, layer, kind.mlp), "before"), by)
    head = params.embedding if params.head is None else params.head
    logits = contract(rms_norm(x, params.final_norm, eps), head, 1, out_dtype=jnp.float32)
    return logits[:, : config.vocab_size] / config.logits_divisor


def self_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, kind: Attention, sinks: jax.Array | None = None
) -> jax.Array:
    """Of one whole sequence, from its first token on: rotary embedding, then each row on those up to itself, and no
    more than the window of them; softmax in float32, with sinks [g, r] beside the scores. q [n, g, r, d], k and v
    [n, g, d] -> [n, g * r * d]."""
    positions, exact = jnp.arange(q.shape[0]), lax.Precision.HIGHEST
    tables = parts.rope_tables(kind.rope, q.shape[-1], positions)
    q = parts.apply_rope(q, *parts.query_tables(kind, *tables, positions))
    k = parts.apply_rope(k, *tables)
    scores = jnp.einsum("igrd,jgd->grij", q, k, precision=exact, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
    seen = seen if kind.window is None else jnp.triu(seen, 1 - kind.window)
    scores = scores * (q.shape[-1] ** -0.5 if kind.scale is None else kind.scale)
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        beside = jnp.broadcast_to(sinks[:, :, None, None], (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, beside], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[0]]
    return jnp.einsum("grij,jgd->igrd", weights.astype(v.dtype), v, precision=exact).reshape(q.shape[0], -1)


def mlp(x: jax.Array, layer: LayerParams, kind: Mlp) -> jax.Array:
    """x [n, H] -> [n, H]; of experts every one on every row."""
    if kind.experts is None:
        return parts.linear(parts.gated_mlp_up(x, layer, kind), layer.down, layer.down_bias)
    experts, routing = layer.experts, route(x, layer.experts, kind)
    total = jnp.zeros(x.shape, jnp.float32)
    for e in range(experts.router.shape[0]):
        weight = jnp.sum(jnp.where(routing.chosen == e, routing.weights, 0), axis=1)[:, None]
        biases = [None if bias is None else bias[e] for bias in (experts.ug_bias, experts.down_bias)]
        both = parts.linear(x, experts.ug[e], biases[0])
        inner = parts.gated(both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :], kind)
        total += weight * parts.linear(inner, experts.down[e], biases[1]).astype(jnp.float32)
    if routing.shared is not None:
        every = parts.linear(parts.gated_mlp_up(x, layer, kind), layer.down, None)
        total += routing.shared[:, None] * every.astype(jnp.float32)
    return total.astype(x.dtype)
