"""Experts by one name each, however a checkpoint stores them.

    model.layers.0.mlp.gate.weight                   the router [E, H]; .bias
    model.layers.0.mlp.experts.3.gate_proj.weight    [F, H]; up_proj, down_proj [H, F]; .bias

so Qwen's are. Others, that are given these names here:

    block_sparse_moe.experts.3.w1                    Mixtral's: w1 gate, w3 up, w2 down
    mlp.experts.gate_up_proj, .down_proj             all experts fused, [E, 2 F, H] and [E, H, F] (transformers 5)
    the same with mlp.router                         gpt-oss's: [E, H, 2 F], gate and up in turn, and [E, F, H]; _bias
    mlp.experts.gate_up_proj_blocks, _scales         gpt-oss's in MXFP4: [E, 2 F, H / 32, 16] bytes of two values each,
                                                     and exponents [E, 2 F, H / 32]

MXFP4: OCP Microscaling Formats v1.0, section 5.3; the order of values is that of transformers' integrations/mxfp4.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from nanoflow_jax.models.params import Index
from nanoflow_jax.weights.source import Renamed, TensorInfo, WeightsError, WeightSource

BLOCK = 32  # values of MXFP4 that share an exponent
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # e2m1

_ROUTER = re.compile(r"(?P<layer>model\.layers\.\d+)\.(mlp\.router|block_sparse_moe\.gate)\.(?P<kind>weight|bias)")
_NUMBERED = re.compile(
    r"(?P<layer>model\.layers\.\d+)\.block_sparse_moe\.experts\.(?P<e>\d+)\.(?P<part>w[123])\.weight"
)
_FUSED = re.compile(
    r"(?P<layer>model\.layers\.\d+)\.mlp\.experts\.(?P<part>gate_up|down)_proj(?P<kind>|_bias|_blocks|_scales)"
)
_W = {"w1": "gate", "w2": "down", "w3": "up"}


def expert_tensors(source: WeightSource) -> WeightSource:
    """The source itself where it has no experts, or has them by these names."""
    return ExpertTensors(source) if any(_is_other(name) for name in source.table) else source


def _is_other(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_ROUTER, _NUMBERED, _FUSED))


@dataclass(frozen=True)
class _Fused:
    """Where one expert's weight or bias is in the tensor of all.

    rows       the first of its outputs there, how many, and how far apart they are
    transposed [E, in, out]
    """

    name: str
    expert: int
    rows: tuple[int, int, int]
    transposed: bool

    def read(self, source: WeightSource, index: Index) -> np.ndarray:
        first, count, step = self.rows
        start, stop, _ = index[0].indices(count)
        rows = slice(first + start * step, first + stop * step)
        if self.name.endswith("_blocks"):
            return _mxfp4(source, self.name, self.expert, rows, index[1])[::step]
        one = slice(self.expert, self.expert + 1)
        if self.transposed and len(index) == 2:
            return source.read_slice(self.name, (one, index[1], rows))[0, :, ::step].T
        return source.read_slice(self.name, (one, rows, *index[1:]))[0, ::step]


class ExpertTensors(Renamed):
    def __init__(self, source: WeightSource):
        super().__init__(source)
        for name, tensor in source.table.items():
            if (found := _ROUTER.fullmatch(name)) is not None:
                self.add(f"{found['layer']}.mlp.gate.{found['kind']}", tensor, name)
            elif (found := _NUMBERED.fullmatch(name)) is not None:
                new = f"{found['layer']}.mlp.experts.{found['e']}.{_W[found['part']]}_proj.weight"
                self.add(new, tensor, name)
            elif (found := _FUSED.fullmatch(name)) is not None:
                self._unfuse(found, name, tensor)
            else:
                self.add(name, tensor, name)

    def _unfuse(self, found: re.Match[str], name: str, tensor: TensorInfo) -> None:
        kind, shape, dtype = found["kind"], tensor.shape, tensor.dtype
        if kind == "_scales":
            return  # read with their blocks
        in_turn = f"{found['layer']}.mlp.router.weight" in self._source.table
        wanted = {"_bias": 2, "_blocks": 4}.get(kind, 3)
        if len(shape) != wanted:
            raise WeightsError(f"{tensor.file}: {name} has shape {shape}; {wanted} dimensions are needed")
        transposed = in_turn and kind == ""
        if kind == "_blocks":
            self._check_scales(name, tensor)
            shape, dtype = (shape[0], shape[1], shape[2] * BLOCK), "bfloat16"
        count, *rest = shape
        out, inputs = (rest[1], rest[:1]) if transposed else (rest[0], rest[1:])
        if found["part"] == "down":
            parts = {"down": (0, out, 1)}
        elif in_turn:
            parts = {"gate": (0, out // 2, 2), "up": (1, out // 2, 2)}
        else:
            parts = {"gate": (0, out // 2, 1), "up": (out // 2, out // 2, 1)}
        for part, rows in parts.items():
            virtual = TensorInfo((rows[1], *inputs), dtype, tensor.file)
            for e in range(count):
                at = _Fused(name, e, rows, transposed)
                new = f"{found['layer']}.mlp.experts.{e}.{part}_proj.{'bias' if kind == '_bias' else 'weight'}"
                self.add(new, virtual, lambda index, at=at: at.read(self._source, index))

    def _check_scales(self, name: str, tensor: TensorInfo) -> None:
        scales = self._source.table.get(name.replace("_blocks", "_scales"))
        if scales is None or scales.shape != tensor.shape[:3] or (tensor.dtype, scales.dtype) != ("uint8", "uint8"):
            raise WeightsError(
                f"{tensor.file}: {name} needs uint8 blocks with uint8 _scales of shape {tensor.shape[:3]}"
            )


def _mxfp4(source: WeightSource, name: str, expert: int, rows: slice, columns: slice) -> np.ndarray:
    """[rows, columns] of one expert, bfloat16, which holds every such value."""
    blocks = source.table[name].shape[2]
    start, stop, _ = columns.indices(blocks * BLOCK)
    within = slice(start // BLOCK, -(-stop // BLOCK))
    one = slice(expert, expert + 1)
    packed = source.read_slice(name, (one, rows, within, slice(0, BLOCK // 2)))[0]
    exponents = source.read_slice(name.replace("_blocks", "_scales"), (one, rows, within))[0].astype(np.int32) - 127
    values = np.stack([_VALUES[packed & 15], _VALUES[packed >> 4]], axis=-1).reshape(*packed.shape[:2], BLOCK)
    whole = np.ldexp(values, exponents[..., None]).reshape(packed.shape[0], -1)
    first = within.start * BLOCK
    return whole[:, start - first : stop - first].astype(ml_dtypes.bfloat16)
