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
        """[E, in, parts, out] of weights [out, in], or [E, parts, out] of biases, without the parts where there is one;
        `split`: the dimension that is not whole where each expert is split."""
        size_in, size_out = (H, F) if len(parts) == 2 else (F, H)
        inputs = (size_in,) if kind == "weight" else ()
        middle = (len(parts),) if len(parts) == 2 else ()
        names = [[f"{prefix}.mlp.experts.{e}.{part}_proj.{kind}" for part in parts] for e in range(E)]
        shape = (E, *inputs, *middle, size_out)
        spec = [AXIS] if expert_parallel else [None] * split + [AXIS] * (0 <= split < len(shape))

        def read(read_slice: ReadSlice, index: Index) -> np.ndarray:
            where = (index[-1], *index[1 : 1 + len(inputs)])
            chosen = range(len(parts))[index[-2]] if middle else (0,)
            found = [[read_slice(names[e][part], where).T for part in chosen] for e in range(E)[index[0]]]
            stacked = np.stack([np.stack(some, axis=-2) for some in found])
            return stacked if middle else stacked[..., 0, :]

        sources = tuple(Source(name, (size_out, *inputs)) for some in names for name in some)
        return ParamInfo(shape, dtype, P(*spec), "normal" if inputs else "zeros", sources, read)

    return ExpertParams(
        router=plain(f"{gate}.weight", (E, H)),
        router_bias=plain(f"{gate}.bias", (E,), "zeros") if experts.bias else None,
        ug=of_experts(("gate", "up"), "weight", 3),
        ug_bias=of_experts(("gate", "up"), "bias", 2) if mlp.bias else None,
        down=of_experts(("down",), "weight", 1),
        down_bias=of_experts(("down",), "bias", -1) if mlp.bias else None,
        shared_gate=plain(f"{prefix}.mlp.shared_expert_gate.weight", (1, H)) if experts.shared else None,
    )
