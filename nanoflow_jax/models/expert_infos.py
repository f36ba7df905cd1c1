"""The weights of a layer's experts as `ParamInfo`s, of the tensors that `weights.experts` gives their names."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from nanoflow_jax.config import Mlp, ModelConfig
from nanoflow_jax.models.layout import ExpertParams
from nanoflow_jax.models.params import Index, ParamInfo, ReadSlice, Source
from nanoflow_jax.parallel.mesh import AXIS


def expert_infos(config: ModelConfig, mlp: Mlp, prefix: str, expert_parallel: bool, dtype: Any) -> ExpertParams:
    """Of one layer; prefix: "model.layers.3"."""
    experts = mlp.experts
    assert experts is not None
    E, F, H = experts.count, experts.size, config.hidden_size
    dtype = jnp.dtype(dtype)
    gate = f"{prefix}.mlp.gate"

    def plain(name: str, shape: tuple[int, ...], init: str = "normal") -> ParamInfo:
        return ParamInfo(shape, dtype, P(), init, (Source(name, shape),), lambda read, index: read(name, index))

    def of_experts(parts: tuple[str, ...], kind: str, split: int) -> ParamInfo:
        """[E, parts, out, in], or of biases without `in`; of one part without it. `split`: the dimension over which
        each expert is split; -1: none."""
        size_in, size_out = (H, F) if len(parts) == 2 else (F, H)
        inputs = (size_in,) if kind == "weight" else ()
        names = [[f"{prefix}.mlp.experts.{e}.{part}_proj.{kind}" for part in parts] for e in range(E)]
        several = (len(parts),) if len(parts) > 1 else ()
        shape = (E, *several, size_out, *inputs)
        spec = [AXIS] if expert_parallel else [AXIS if at == split else None for at in range(len(shape))]

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            where = index[1 + len(several) :]
            chosen = range(len(parts))[index[1]] if several else (0,)
            found = [np.stack([read_slice(names[e][part], where) for part in chosen]) for e in range(E)[index[0]]]
            return np.stack(found) if several else np.concatenate(found)

        sources = tuple(Source(name, (size_out, *inputs)) for some in names for name in some)
        return ParamInfo(shape, dtype, P(*spec), "normal" if inputs else "zeros", sources, read)

    return ExpertParams(
        router=plain(f"{gate}.weight", (E, H)),
        router_bias=plain(f"{gate}.bias", (E,), "zeros") if experts.bias else None,
        ug=of_experts(("gate", "up"), "weight", 2),
        ug_bias=of_experts(("gate", "up"), "bias", 2) if mlp.bias else None,
        down=of_experts(("down",), "weight", 2),
        down_bias=of_experts(("down",), "bias", -1) if mlp.bias else None,
        shared_gate=plain(f"{prefix}.mlp.shared_expert_gate.weight", (1, H)) if experts.shared else None,
    )
