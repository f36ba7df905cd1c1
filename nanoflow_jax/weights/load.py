"""Loading: each weight is read slice by slice straight onto the shards that need it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.models.params import Index, ParamInfo, ReadSlice, is_info
from nanoflow_jax.weights.experts import expert_tensors
from nanoflow_jax.weights.orbax_files import OrbaxFiles, is_checkpoint
from nanoflow_jax.weights.safetensors_files import SafetensorsFiles
from nanoflow_jax.weights.source import DTYPES, OnProgress, WeightSource, check_tensors
from nanoflow_jax.weights.text_part import text_part

CHUNK_BYTES = 16 << 20  # values are assembled and cast in pieces of about this many bytes


def open_weights(folder: str | Path) -> WeightSource:
    """Opens safetensors or a converted checkpoint. Raises WeightsError if the folder holds neither, or is damaged."""
    folder = Path(folder)
    return OrbaxFiles(folder) if is_checkpoint(folder) else expert_tensors(text_part(SafetensorsFiles(folder)))


def model_digest(folder: str | Path) -> str:
    """A short digest of a model folder: its config, its tokenizer, and the shape, dtype and first values of every
    tensor. Reads little, and tells models apart that differ in training alone."""
    folder, digest = Path(folder), hashlib.sha256()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"):
        path = folder / name
        digest.update(path.read_bytes() if path.is_file() else b"-")
    source = open_weights(folder)
    for name, info in sorted(source.table.items()):
        digest.update(f"{name} {info.shape} {info.dtype}".encode())
        if info.shape and info.dtype in DTYPES:
            index = (*(slice(0, 1) for _ in info.shape[:-1]), slice(0, info.shape[-1]))
            digest.update(np.ascontiguousarray(source.read_slice(name, index)).tobytes())
    return digest.hexdigest()[:16]


def load_params(
    folder: str | Path | WeightSource, config: ModelConfig, mesh: Mesh, infos: Any, progress: OnProgress | None = None
) -> Any:
    """The weights of a model folder (or of one that is open) on `mesh`: a tree like `infos` (made for `mesh.size`
    devices) of jax.Arrays.

    Everything that can be checked from the headers is checked before anything is allocated. Host memory at any moment
    is one weight (this process's shards of it) and a few CHUNK_BYTES. `progress` is called after each weight.
    Raises WeightsError for files that are absent, damaged, or not those of `config`.
    """
    source = open_weights(folder) if isinstance(folder, str | Path) else folder
    check_tensors(source, config, infos)
    leaves, tree = jax.tree.flatten(infos, is_leaf=is_info)
    done, total = 0, sum(info.nbytes for info in leaves)
    arrays = []
    for info in leaves:
        arrays.append(_load(info, mesh, source.read_slice))
        done += info.nbytes
        if progress is not None:
            progress(info.name, done, total)
    return jax.tree.unflatten(tree, arrays)


def _load(info: ParamInfo, mesh: Mesh, read_slice: ReadSlice) -> jax.Array:
    """One weight. jax calls back once per shard, and only once for a weight that is replicated on all devices."""

    def read(index: Index | None) -> np.ndarray:
        assert index is not None  # jax's type allows it; a NamedSharding never gives it
        return _read_shard(info, read_slice, index)

    array = jax.make_array_from_callback(info.shape, info.sharding(mesh), read, dtype=info.dtype)
    return array.block_until_ready()  # so that host copies of two weights are never in flight at once


def _read_shard(info: ParamInfo, read_slice: ReadSlice, index: Index) -> np.ndarray:
    """The values of a weight at `index`, in its dtype, in memory of their own (never a view of a mapped file)."""
    start, stop, _ = index[0].indices(info.shape[0])
    rest = tuple(slice(*part.indices(size)) for part, size in zip(index[1:], info.shape[1:], strict=True))
    shape = (stop - start, *(part.stop - part.start for part in rest))
    row_bytes = max(1, int(np.prod(shape[1:], dtype=np.int64)) * np.dtype(info.dtype).itemsize)
    rows = max(1, CHUNK_BYTES // row_bytes)
    if rows >= stop - start:
        values = info.read(read_slice, (slice(start, stop), *rest))
        if values.dtype == info.dtype and values.flags.owndata and values.flags.c_contiguous:
            return values
        return np.array(values, info.dtype, order="C")
    out = np.empty(shape, info.dtype)
    for first in range(start, stop, rows):
        last = min(first + rows, stop)
        out[first - start : last - start] = info.read(read_slice, (slice(first, last), *rest))
    return out
