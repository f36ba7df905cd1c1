"""What every store of weights offers (a table and slice reads), and the check of that table against the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.models.fp8_formats import is_activation_scale
from nanoflow_jax.models.kv_scales import is_kv_scale
from nanoflow_jax.models.params import Index, Source, is_info

OnProgress = Callable[[str, int, int], None]  # (what is done now, bytes done, bytes in all)

FP8 = "float8_e4m3fn"
FLOATS = ("float32", "bfloat16", "float16")  # of all tensors but the fp8 weights of a checkpoint that comes quantised
DTYPES = {name: np.dtype(getattr(ml_dtypes, name, name)) for name in (*FLOATS, FP8, "uint8")}

# Buffers that old checkpoints hold; they follow from config.json.
_ROTARY = re.compile(r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
TIED_HEAD = "lm_head.weight"


class WeightsError(ConfigError):
    """Weights that cannot be used; the message is one line naming the file or tensor and what would be accepted."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor stored in `file`; `dtype` is a key of DTYPES, or the file's own word for one that is not accepted."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


class WeightSource(Protocol):
    """A model folder, opened: `table` says what it holds, `read_slice` reads no more than the part asked for."""

    @property
    def folder(self) -> Path: ...

    @property
    def table(self) -> Mapping[str, TensorInfo]: ...

    def read_slice(self, name: str, index: Index) -> np.ndarray:
        """Tensor `name` at `index` (one slice per dimension, step 1), in its stored dtype; may be a view."""
        ...


class Renamed:
    """A `WeightSource` whose tensors have other names than in `source`, or are parts of those."""

    def __init__(self, source: WeightSource):
        self._source, self.folder = source, source.folder
        self.table: dict[str, TensorInfo] = {}
        self._read: dict[str, Callable[[Index], np.ndarray]] = {}

    def add(self, name: str, tensor: TensorInfo, read: str | Callable[[Index], np.ndarray]) -> None:
        """read: the name in `source`, or what reads a part. Raises WeightsError for a name that is there."""
        if name in self.table:
            raise WeightsError(f"{self.folder}: {name} is there under two names; each tensor must be there once")
        self.table[name] = tensor
        self._read[name] = partial(self._source.read_slice, read) if isinstance(read, str) else read

    def read_slice(self, name: str, index: Index) -> np.ndarray:
        return self._read[name](index)


def one_line(error: BaseException) -> str:
    """The first line of another library's message, for use inside ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def some(names: Iterable[str]) -> str:
    """At most three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def expected_tensors(infos: Any) -> dict[str, Source]:
    """The checkpoint tensors that a tree of ParamInfo is made of, by name."""
    leaves = jax.tree.leaves(infos, is_leaf=is_info)
    return {source.name: source for info in leaves for source in info.sources}


def check_tensors(source: WeightSource, config: ModelConfig, infos: Any) -> None:
    """Accounts for every tensor. Raises WeightsError for a missing or unknown one, or a wrong shape or dtype."""
    expected = expected_tensors(infos)
    used = (name for name in source.table if not _ignored(name, config))
    layers = {int(found[1]) for name in used if (found := _LAYER.match(name))}
    if layers and len(layers) == max(layers) + 1 != config.num_layers:
        raise WeightsError(
            f"{source.folder}: num_hidden_layers is {config.num_layers} in config.json; "
            f"the checkpoint has {len(layers)}"
        )
    missing = [name for name in expected if name not in source.table]
    unknown = [name for name in source.table if name not in expected and not _ignored(name, config)]
    if missing or unknown:
        parts = [f"missing {some(missing)}"] if missing else []
        parts += [f"unknown {some(unknown)}"] if unknown else []
        hint = "exactly the tensors of the model in config.json are accepted"
        if missing == [TIED_HEAD]:
            hint = "needed because tie_word_embeddings is false in config.json"
        raise WeightsError(f"{source.folder}: tensors do not match the model: {'; '.join(parts)} ({hint})")
    for name, wanted in expected.items():
        tensor, accepted = source.table[name], (FP8,) if wanted.fp8 else FLOATS
        if tensor.dtype not in accepted:
            raise WeightsError(f"{tensor.file}: {name} has dtype {tensor.dtype}; accepted: {', '.join(accepted)}")
        if tensor.shape != wanted.shape:
            raise WeightsError(f"{tensor.file}: {name} has shape {tensor.shape}; config.json asks for {wanted.shape}")


def _ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor that no weight is made of may be there: rotary buffers, the copy of a tied embedding, scales of
    fp8 KV pages where the pages are not, static scales of activations that are quantised per token."""
    if config.fp8_checkpoint is not None and is_activation_scale(name):
        return True
    return is_rotary_buffer(name) or is_kv_scale(name) or (name == TIED_HEAD and config.tie_word_embeddings)


def is_rotary_buffer(name: str) -> bool:
    return bool(_ROTARY.search(name))
