"""A Hugging Face folder of safetensors files, memory-mapped: one file, or shards with an index."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from nanoflow_jax.models.params import Index
from nanoflow_jax.system.reading import Malformed, is_plain_name, parse_json, read_text
from nanoflow_jax.weights.source import DTYPES, TIED_HEAD, TensorInfo, WeightsError, is_rotary_buffer, one_line, some

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_CODES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn", "U8": "uint8"}


class SafetensorsFiles:
    """The safetensors of a model folder. Opening reads and checks every header, no data.

    Raises WeightsError when there are none, for a file that is absent, truncated or corrupt, for an index that does not
    match its files, and for a tensor that is in two of them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.table: dict[str, TensorInfo] = {}
        self._bytes: dict[Path, np.ndarray] = {}  # file -> uint8 map of the whole of it
        self._starts: dict[str, int] = {}  # tensor -> first byte in its file
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if index.is_file() and single.is_file():
            raise WeightsError(f"{self.folder}: holds both {SINGLE_FILE} and {INDEX_FILE}; keep the one that is meant")
        if single.is_file():
            self._open(single)
        elif index.is_file():
            self._open_shards(index)
        else:
            raise WeightsError(_nothing_here(self.folder))

    def read_slice(self, name: str, index: Index) -> np.ndarray:
        """A read-only view of the mapped file: pages are read when the values are used."""
        tensor = self.table[name]
        dtype, start = DTYPES[tensor.dtype], self._starts[name]
        data = self._bytes[tensor.file][start : start + math.prod(tensor.shape) * dtype.itemsize]
        return data.view(dtype).reshape(tensor.shape)[index]

    def _open(self, path: Path) -> None:
        """Adds the tensors of one file to the table; safetensors itself checks header, offsets and length."""
        try:
            with safe_open(path, framework="numpy"):
                pass
            data = np.asarray(np.memmap(path, np.uint8, mode="r"))
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path}: truncated, corrupt or not a safetensors file ({one_line(error)}); copy or download it again"
            ) from None
        length = int.from_bytes(data[:8].tobytes(), "little")
        try:
            header: dict[str, Any] = parse_json(data[8 : 8 + length].tobytes().decode())
        except Malformed as error:
            raise WeightsError(f"{path}: its header is not valid JSON ({error}); copy or download it again") from None
        self._bytes[path] = data
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self.table:
                files = f"{self.table[name].file.name} and {path.name}"
                raise WeightsError(f"{self.folder}: {name} is in two files, {files}; each tensor must be in one")
            code = str(entry["dtype"])
            self.table[name] = TensorInfo(tuple(entry["shape"]), _CODES.get(code, code), path)
            self._starts[name] = 8 + length + entry["data_offsets"][0]

    def _open_shards(self, index: Path) -> None:
        weight_map = _read_index(index)
        # Some lists name a head that is tied, and so in no file; others leave out rotary buffers that are. Neither
        # tensor is used; a head that is needed is missed when the tensors are compared with the model.
        needed = {name: file for name, file in weight_map.items() if name != TIED_HEAD and not is_rotary_buffer(name)}
        files = sorted({*needed.values(), *(f for f in weight_map.values() if (self.folder / f).is_file())})
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent:
            raise WeightsError(
                f"{index}: names absent files: {some(absent)}; the folder must hold all {len(files)} of them"
            )
        for file in files:
            self._open(self.folder / file)
        for name, file in weight_map.items():
            if name not in self.table:
                if name not in needed:
                    continue
                raise WeightsError(f"{index}: says that {name} is in {file}, which does not hold it")
            if self.table[name].file.name != file:
                raise WeightsError(f"{index}: says that {name} is in {file}; it is in {self.table[name].file.name}")
        unlisted = [name for name in self.table if name not in weight_map and not is_rotary_buffer(name)]
        if unlisted:
            raise WeightsError(f"{index}: does not list {some(unlisted)} of {self.table[unlisted[0]].file.name}")


def _read_index(path: Path) -> dict[str, str]:
    """The index's tensor name -> file name."""
    try:
        fields = parse_json(read_text(path))
    except Malformed as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(fields, dict) or "weight_map" not in fields:
        raise WeightsError(f"{path}: has no weight_map; an object from tensor names to file names is needed")
    weight_map = fields["weight_map"]
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{path}: weight_map must be an object from tensor names to file names, and not empty")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise WeightsError(
                f"{path}: weight_map has {file!r} for {name}; the name of a file in the folder is accepted"
            )
    return weight_map


def _nothing_here(folder: Path) -> str:
    accepted = f"accepted: {SINGLE_FILE}, or {INDEX_FILE} with its files, or a folder written by nanoflow convert"
    if not folder.is_dir():
        return f"{folder}: no such folder; {accepted}"
    names = sorted(path.name for path in folder.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"{folder}: holds {some(shards)} without {INDEX_FILE}; {accepted}"
    if torch := [name for name in names if name.endswith((".bin", ".pth", ".pt", ".bin.index.json"))]:
        return f"{folder}: holds only PyTorch weights ({some(torch)}), which can run code when read; {accepted}"
    return f"{folder}: holds no weights; {accepted}"
