"""A stand-in for the step: two nano-batches (or one) of LLaMA-shaped layers, traced under the same scopes as the
real one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh

DEVICES = 8
SPLIT = {
    "xla_gpu_dot_merger_threshold_mb": 0,
    "xla_gpu_all_gather_combine_threshold_bytes": 0,
    "xla_gpu_all_reduce_combine_threshold_bytes": 0,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 0,
    "xla_gpu_enable_triton_gemm": False,
}


def norm(x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + 1e-5)).astype(x.dtype)


def gather(x: jax.Array) -> jax.Array:
    """[n, c] local → [n, 8c]: gathered along the leading axis of [c, n], which needs no transpose before the
    collective."""
    return jax.lax.all_gather(x, "tp", axis=1, tiled=True)


def layer(
    index: int, xs: list[jax.Array], w: dict[str, jax.Array], ways: tuple[str, ...], attention: Any
) -> list[jax.Array]:
    def scope(op: str, batch: int):
        return jax.named_scope(f"L{index}/{op}.{batch + 1}")

    attended, out = [], []
    for i, x in enumerate(xs):
        with scope("KQV", i):
            kqv = norm(x) @ w["kqv"]
        with scope("GEMV", i):
            attended.append(attention(kqv[:, : w["o_k"].shape[0]]))
    for i, x in enumerate(xs):
        if ways[i] == "gather":
            with scope("GEMV.AG", i):
                full = gather(attended[i])
            with scope("O", i):
                o = full @ w["o_n"]
            with scope("O.AG", i):
                x = x + gather(o)
        elif ways[i] == "reduce":
            with scope("O", i):
                o = attended[i] @ w["o_k"]
            with scope("O.AR", i):
                x = x + jax.lax.psum(o, "tp")
        else:
            with scope("O", i):
                o = attended[i] @ w["o_k"]
            with scope("O.RS", i):
                o = jax.lax.psum_scatter(o, "tp", scatter_dimension=0, tiled=True)
            with scope("O.AG", i):
                x = x + jax.lax.all_gather(o, "tp", axis=0, tiled=True)
        with scope("UG", i):
            up = jax.nn.relu(norm(x) @ w["up"])
        with scope("D", i):
            down = up @ w["down"]
        with scope("D.AR", i):
            out.append(x + jax.lax.psum(down, "tp"))
    return out


def mosaic_attention(q: jax.Array) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(q_ref, out_ref, tile):
        rows = pl.ds(jax.lax.axis_index("i") * 64, 64)
        tile[...] = q_ref[rows, pl.ds(0, 128)]
        out_ref[rows, pl.ds(0, 128)] = tile[...]

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(q.shape[0] // 64,),
        grid_names=("i",),
        scratch_types=[plgpu.SMEM((64, 128), q.dtype)],
    )(q)


@functools.cache
def stand_in(
    gpu: str = "h200",
    layers: int = 3,
    rows: tuple[int, ...] = (640, 1408),
    ways: tuple[str, ...] = ("gather", "reduce"),
    hidden: int = 8192,
    ffn: int = 28672,
    mosaic: bool = False,
    options: tuple[tuple[str, Any], ...] = tuple(SPLIT.items()),
) -> Any:
    """The compiled stand-in. rows and ways: per nano-batch; mosaic: attention as a (copying) Mosaic kernel."""
    mesh = gpu_mesh(load_hardware(gpu), DEVICES)
    attention = mosaic_attention if mosaic else jnp.tanh

    def step(xs: tuple[jax.Array, ...], weights: list[dict[str, jax.Array]]) -> tuple[jax.Array, ...]:
        current = list(xs)
        for index, w in enumerate(weights):
            current = layer(index, current, w, ways, attention)
        return tuple(current)

    columns, whole = P(None, "tp"), tuple(P() for _ in rows)
    spec = {"kqv": columns, "o_n": columns, "o_k": P("tp", None), "up": columns, "down": P("tp", None)}
    wide = hidden * 10 // 8
    shape = {"kqv": (hidden, wide), "o_n": (hidden, hidden), "o_k": (hidden, hidden)}
    shape |= {"up": (hidden, ffn), "down": (ffn, hidden)}

    def aval(dims: tuple[int, ...], where: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=NamedSharding(mesh, where))

    weights = [{name: aval(shape[name], spec[name]) for name in spec} for _ in range(layers)]
    sharded = jax.shard_map(step, mesh=mesh, in_specs=(whole, [spec] * layers), out_specs=whole, check_vma=False)
    lowered = jax.jit(sharded).lower(tuple(aval((n, hidden), P()) for n in rows), weights)
    return lowered.compile(compiler_options=dict(options))


@pytest.fixture(scope="session")
def compile_stand_in() -> Callable[..., Any]:
    """The cached compiler of stand-ins: see `stand_in` for its arguments."""
    return stand_in


@pytest.fixture(scope="session")
def compile_mapped() -> Callable[..., Any]:
    """Compiles a function of per-GPU arrays for 8 x H200; arrays: (shape, dtype) of the whole array, per argument."""

    def compiled(f: Any, in_specs: Any, out_specs: Any, arrays: list, donate: tuple[int, ...] = ()) -> Any:
        mesh = gpu_mesh(load_hardware("h200"), DEVICES)
        avals = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for (shape, dtype), spec in zip(arrays, in_specs, strict=True)
        ]
        sharded = jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(sharded, donate_argnums=donate).lower(*avals).compile()

    return compiled
