"""Converted checkpoints: what a folder written by `convert` holds, and reading slices of it.

    nanoflow_checkpoint.json  the manifest: format, version, dtype, fingerprint, every tensor and the size of every file
    config.json, tokenizer    as in the model folder that was converted
    weights/<block>/          one orbax PyTree checkpoint per block (embedding, layer_0000, ..., head)

Tensors keep their Hugging Face names and shapes, so that the files know nothing of a mesh: any mesh size loads from
them, by the same `ParamInfo.read` as from safetensors. The slices are read with tensorstore, in which orbax stores
arrays (zarr3 chunks in an OCDBT key-value store): orbax restores shards of a stored array, not parts of it to the host.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from nanoflow_jax.models.params import Index
from nanoflow_jax.system.reading import is_plain_name, parse_json, read_text
from nanoflow_jax.weights.source import TensorInfo, WeightsError, one_line, some

MANIFEST = "nanoflow_checkpoint.json"
WEIGHTS = "weights"
FORMAT, VERSION = "nanoflow_jax checkpoint", 1
PARTIAL = ".partial-"  # part of the name of a conversion's temporary folder

ROW_MULTIPLE = 256  # the stored rows of a tensor above CHUNK_BYTES are padded to this: orbax's chunks must divide them
CHUNK_BYTES = 2 << 20
_NODE_CACHE_BYTES = 16 << 20
_PARALLEL_CHUNKS = 8  # read and decoded at once; bounds the memory beside the slice
_AGAIN = "; run nanoflow convert again"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is, or was to become, a converted checkpoint."""
    begun = (folder / WEIGHTS).is_dir() and not any(folder.glob("*.safetensors"))
    return (folder / MANIFEST).exists() or begun or _is_partial(folder)


def _is_partial(folder: Path) -> bool:
    name = folder.resolve().name
    return name.startswith(".") and PARTIAL in name


def stored_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape on disk: zero rows follow a large tensor whose rows have few divisors (a vocabulary of 32,003)."""
    if not shape or int(np.prod(shape, dtype=np.int64)) * itemsize <= CHUNK_BYTES:
        return shape
    return (-(-shape[0] // ROW_MULTIPLE) * ROW_MULTIPLE, *shape[1:])


def fingerprint(config_json: dict[str, Any], tensors: dict[str, Any]) -> str:
    """SHA-256 of config.json's fields and the manifest's tensors (names, shapes, dtypes, digests of sampled values)."""
    text = json.dumps({"config": config_json, "tensors": tensors}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def weight_files(folder: Path) -> dict[str, int]:
    """Path below `folder` -> bytes, of every file of the blocks."""
    paths = (path for path in (folder / WEIGHTS).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths)}


class OrbaxFiles:
    """A converted checkpoint, opened.

    Opening checks the manifest against config.json, every file's size, and every tensor's shape and dtype; it reads no
    values, so a file altered without a change of size is not noticed.

    Raises WeightsError for an unfinished conversion, another version, and anything damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if _is_partial(self.folder) or not (self.folder / MANIFEST).is_file():
            raise WeightsError(f"{self.folder}: not a finished checkpoint (no {MANIFEST}){_AGAIN}")
        path = self.folder / MANIFEST
        manifest = _read_object(path)
        kind = (manifest.get("format"), manifest.get("version"))
        if kind != (FORMAT, VERSION):
            raise WeightsError(
                f"{path}: format {kind[0]!r} version {kind[1]!r}; accepted: {FORMAT!r} version {VERSION}"
            )
        tensors, files = manifest.get("tensors"), manifest.get("files")
        if not isinstance(tensors, dict) or not isinstance(files, dict):
            raise WeightsError(f"{path}: damaged (it must hold the objects tensors and files){_AGAIN}")
        self.table = {name: self._tensor(path, name, entry) for name, entry in tensors.items()}
        if fingerprint(_read_object(self.folder / "config.json"), tensors) != manifest.get("fingerprint"):
            raise WeightsError(f"{path}: fingerprint is not that of config.json and the tensors listed{_AGAIN}")
        self._check_files(files)
        self._stores = self._open_all()

    def read_slice(self, name: str, index: Index) -> np.ndarray:
        """The values at `index`; decodes the chunks (CHUNK_BYTES each) that it touches."""
        inside = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, self.table[name].shape, strict=True))
        try:
            return np.asarray(self._stores[name][inside].read().result())
        except (ValueError, OSError) as error:
            raise WeightsError(f"{self.table[name].file}: {name} cannot be read ({_cause(error)}){_AGAIN}") from None

    def _tensor(self, path: Path, name: str, entry: Any) -> TensorInfo:
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        shape, dtype, block = fields.get("shape"), fields.get("dtype"), fields.get("block")
        if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise WeightsError(f"{path}: damaged (shape {shape!r} of {name}){_AGAIN}")
        if not isinstance(dtype, str) or not is_plain_name(name):
            raise WeightsError(f"{path}: damaged (tensor {name!r} has dtype {dtype!r}){_AGAIN}")
        if not isinstance(block, str) or not is_plain_name(block):
            raise WeightsError(f"{path}: block {block!r} of {name}; the name of a folder in {WEIGHTS} is accepted")
        return TensorInfo(tuple(shape), dtype, self.folder / WEIGHTS / block)

    def _check_files(self, files: dict[str, int]) -> None:
        found = weight_files(self.folder)
        if absent := [name for name in files if name not in found]:
            raise WeightsError(f"{self.folder}: files are absent: {some(absent)}{_AGAIN}")
        for name, size in files.items():
            if found[name] != size:
                raise WeightsError(f"{self.folder / name}: has {found[name]} bytes, not the {size} written{_AGAIN}")

    def _open_all(self) -> dict[str, ts.TensorStore]:
        # Decoded chunks are not cached, so that reading takes little more memory than the slice; the store's nodes are.
        context = ts.Context(
            {
                "cache_pool": {"total_bytes_limit": 0},
                "cache_pool#nodes": {"total_bytes_limit": _NODE_CACHE_BYTES},
                "file_io_concurrency": {"limit": _PARALLEL_CHUNKS},
                "data_copy_concurrency": {"limit": _PARALLEL_CHUNKS},
            }
        )
        opening = {
            name: ts.open(
                {
                    "driver": "zarr3",
                    "kvstore": {
                        "driver": "ocdbt",
                        "base": {"driver": "file", "path": f"{tensor.file.resolve()}/"},
                        "path": f"{name}/",
                        "cache_pool": "cache_pool#nodes",
                    },
                },
                open=True,
                read=True,
                context=context,
            )
            for name, tensor in self.table.items()
        }
        stores = {}
        for name, future in opening.items():
            tensor = self.table[name]
            try:
                store = future.result()
            except (ValueError, OSError) as error:
                raise WeightsError(f"{tensor.file}: {name} cannot be opened ({_cause(error)}){_AGAIN}") from None
            dtype = store.dtype.numpy_dtype
            if store.shape != stored_shape(tensor.shape, dtype.itemsize) or dtype.name != tensor.dtype:
                found, said = f"{dtype.name} {store.shape}", f"{tensor.dtype} {tensor.shape}"
                raise WeightsError(f"{tensor.file}: {name} is {found}, {MANIFEST} says {said}{_AGAIN}")
            stores[name] = store
        return stores


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path))
    except ValueError as error:
        raise WeightsError(f"{path}: not readable as JSON ({error}){_AGAIN}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: must hold a JSON object{_AGAIN}")
    return value


def _cause(error: Exception) -> str:
    """tensorstore's message up to its source locations."""
    return one_line(error).split(" [", 1)[0][:200]
