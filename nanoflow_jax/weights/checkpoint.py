"""`nanoflow convert`: a model folder rewritten as an orbax checkpoint, block by block, and wholly or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nanoflow_jax.models.fp8_formats import SCALE, find_weight_scales, fp8_dynamic, is_gemm_weight
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.kv_scales import find_kv_scales, is_kv_scale
from nanoflow_jax.models.quantised import rounded, weight_scale
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.system.interrupts import held_interrupts
from nanoflow_jax.system.output_files import no_link
from nanoflow_jax.weights import orbax_files
from nanoflow_jax.weights.load import open_weights
from nanoflow_jax.weights.source import (
    DTYPES,
    FP8,
    OnProgress,
    WeightsError,
    WeightSource,
    check_tensors,
    expected_tensors,
    one_line,
)

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_SAMPLE_ROWS = 16  # rows of each tensor that enter the fingerprint
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "tokenizer*", "LICENSE*", "USE_POLICY*")
_NOT_COPIED = ("config.json", "*.index.json", orbax_files.MANIFEST)


def convert(
    model_folder: str | Path, output: str | Path, dtype: str = "auto", progress: OnProgress | None = None,
    quantization: str | None = None,
) -> Path:  # fmt: skip
    """Writes a checkpoint of `model_folder` (safetensors or another checkpoint) to the new folder `output`; returns it.

    dtype: "float32", "bfloat16", or "auto": each tensor's own, but bfloat16 for float16, as which the library runs it;
    the config.json written says so too.
    quantization: "fp8" rounds the weights of the layers, exactly as `LLM(quantization="fp8")` does while it loads, and
    writes them with their scales and a config.json that says so: half the bytes. A checkpoint that comes in fp8 is
    written as it is, as all are by None.
    `output` appears only when it is complete: it is written beside its final place and renamed last; what an
    interrupted conversion to the same `output` left is removed. Host memory stays at about one block.
    Ctrl-C is seen between two blocks. Raises ConfigError for a bad config.json, WeightsError for bad weights or an
    `output` that is not new or empty.
    """
    with held_interrupts() as check_interrupt:
        output = Path(os.path.abspath(output))
        return _convert(Path(model_folder), output, dtype, quantization, progress, check_interrupt)


def _convert(
    model_folder: Path,
    output: Path,
    dtype: str,
    quantization: str | None,
    progress: OnProgress | None,
    check_interrupt: Callable[[], None],
) -> Path:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise WeightsError(f"dtype: {dtype!r} is not supported; accepted: 'auto' (as stored), 'float32', 'bfloat16'")
    if quantization not in (None, "fp8"):
        raise WeightsError(f"quantization: {quantization!r} is not supported; accepted: None (as stored), 'fp8'")
    config = read_config(model_folder / "config.json")
    if quantization is not None and config.experts is not None:
        raise WeightsError("quantization: 'fp8' is not there for models with experts; accepted: None (as stored)")
    source = open_weights(model_folder)
    kv_scales = find_kv_scales({name: tensor.shape for name, tensor in source.table.items()}, config)
    scales = find_weight_scales(source.table, config)
    infos = param_infos(config, devices=1, kv_scales=kv_scales, weight_scales=scales)
    check_tensors(source, config, infos)
    quantise = quantization is not None and scales is None
    kept = {scale.source.name for scale in (scales or {}).values()}
    blocks: dict[str, list[_Tensor]] = {}
    for name in expected_tensors(infos):
        stored = DTYPES[source.table[name].dtype] if name in kept else _stored_dtype(source, name, dtype)
        if quantise and is_gemm_weight(name):
            stored = DTYPES[FP8]
        blocks.setdefault(_block(name), []).append(_Tensor(name, source.table[name].shape, stored))

    try:
        with _workspace(output) as folder:
            tensors = _write_blocks(source, folder, blocks, progress, check_interrupt)
            config_json = _copy_side_files(model_folder, folder, dtype, quantise)
            manifest = {
                "format": orbax_files.FORMAT,
                "version": orbax_files.VERSION,
                "dtype": dtype,
                "fingerprint": orbax_files.fingerprint(config_json, tensors),
                "tensors": tensors,
                "files": orbax_files.weight_files(folder),
            }
            _sync(folder)  # the data is on the disk before the manifest says so
            (folder / orbax_files.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            _sync_path(folder / orbax_files.MANIFEST)
            _sync_path(folder)
            check_interrupt()
            os.rename(folder, output)  # refuses a folder that is no longer empty
            _sync_path(output.parent)
    except OSError as error:
        raise WeightsError(f"{output}: could not be written ({one_line(error)})") from None
    return output


def _block(name: str) -> str:
    if layer := re.search(r"\blayers\.(\d+)\.", name):
        return f"layer_{int(layer[1]):04d}"
    return "embedding" if "embed" in name else "head"


@dataclass(frozen=True)
class _Tensor:
    """One of the model that is converted; dtype: as which it is written. fp8 of another is rounded, and a second one is
    written beside it, its scales."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _write_blocks(
    source: WeightSource,
    folder: Path,
    blocks: dict[str, list[_Tensor]],
    progress: OnProgress | None,
    check_interrupt: Callable[[], None],
) -> dict[str, Any]:
    """Writes every block below `folder`; returns the manifest's entry per tensor."""
    import orbax.checkpoint as ocp  # here: its import takes seconds, and reading does not need it

    tensors: dict[str, Any] = {}
    done, total = 0, sum(tensor.nbytes for members in blocks.values() for tensor in members)
    (folder / orbax_files.WEIGHTS).mkdir()
    with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)) as checkpointer:
        for block, members in blocks.items():
            stored = {}  # of the last block, freed before the next is read
            check_interrupt()
            for tensor in members:
                for name, values in _read_whole(source, tensor).items():
                    entry = {"shape": list(values.shape), "dtype": values.dtype.name, "block": block}
                    tensors[name] = {**entry, "sample_sha256": _sample(values)}
                    stored[name] = _padded(values)
            options = {name: ocp.SaveArgs(chunk_byte_size=orbax_files.CHUNK_BYTES) for name in stored}
            path = (folder / orbax_files.WEIGHTS / block).resolve()
            try:
                checkpointer.save(path, args=ocp.args.PyTreeSave(stored, save_args=options))
            except ValueError as error:  # how tensorstore reports a full disk, among others
                code = re.search(r"os_error_code='(\d+)'", str(error))
                what = os.strerror(int(code[1])) if code else one_line(error)
                raise WeightsError(f"{path}: could not be written ({what})") from None
            done += sum(tensor.nbytes for tensor in members)
            if progress is not None:
                progress(block, done, total)
    return tensors


def _stored_dtype(source: WeightSource, name: str, dtype: str) -> np.dtype:
    own = source.table[name].dtype
    if is_kv_scale(name) or own == FP8:
        return DTYPES[own]
    return DTYPES[dtype if dtype != "auto" else "bfloat16" if own == "float16" else own]


def _read_whole(source: WeightSource, tensor: _Tensor) -> dict[str, np.ndarray]:
    """What is written for a tensor: itself, or itself in fp8 and the scales [N, 1] float32 of its rows."""
    values = source.read_slice(tensor.name, tuple(slice(0, size) for size in tensor.shape))
    if tensor.dtype != DTYPES[FP8] or values.dtype == tensor.dtype:
        return {tensor.name: np.require(values, tensor.dtype, ["C", "A"])}
    values = values.astype(np.float32)
    scale = weight_scale(values)
    return {tensor.name: rounded(values, scale), tensor.name + SCALE: scale[:, None]}


def _padded(values: np.ndarray) -> np.ndarray:
    """In the stored shape: zero rows at the end."""
    shape = orbax_files.stored_shape(values.shape, values.itemsize)
    if shape == values.shape:
        return values
    padded = np.zeros(shape, values.dtype)
    padded[: len(values)] = values
    return padded


def _sample(values: np.ndarray) -> str:
    """SHA-256 of up to _SAMPLE_ROWS evenly spaced rows, the first and last among them."""
    values = np.atleast_1d(values)
    rows = np.unique(np.linspace(0, len(values) - 1, _SAMPLE_ROWS).astype(np.int64))
    return hashlib.sha256(values[rows].tobytes()).hexdigest()


def _copy_side_files(model_folder: Path, folder: Path, dtype: str, quantised: bool) -> dict[str, Any]:
    """Copies what makes `folder` a model folder of its own; returns the fields of the config.json written."""
    for path in sorted(model_folder.iterdir()):
        wanted = any(path.match(pattern) for pattern in _COPIED) and not any(path.match(p) for p in _NOT_COPIED)
        if wanted and path.is_file():
            shutil.copyfile(path, folder / path.name)
    fields: dict[str, Any] = json.loads((model_folder / "config.json").read_text())
    if dtype == "auto" and "float16" in (fields.get("dtype"), fields.get("torch_dtype")):
        dtype = "bfloat16"
    if dtype != "auto":
        fields.pop("torch_dtype", None)
        fields["dtype"] = dtype
    if (fields.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        del fields["quantization_config"]  # its values are written in bfloat16
    if quantised:
        fields["quantization_config"] = fp8_dynamic()
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return fields


@contextmanager
def _workspace(output: Path) -> Iterator[Path]:
    """A new folder beside `output`, locked while this process lives, removed if it is still there at the end.

    Raises WeightsError when `output` is not new or empty.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise WeightsError(f"output: {output} exists and is not an empty folder; give a new one")
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output.name}{orbax_files.PARTIAL}"
    _remove_leftovers(output.parent, prefix)
    folder = output.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    with _lock(folder) as locked:
        if not locked:  # only in the instant between creating the lock and taking it
            raise WeightsError(f"output: another conversion to {output} has just begun; try again")
        try:
            folder.mkdir()
            yield folder
        finally:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Also from under orbax's other writers, which may still be ending when one has failed."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _remove_leftovers(parent: Path, prefix: str) -> None:
    """Removes the temporary folders of conversions whose process has ended; one that still runs holds its lock."""
    names = {path.name.removesuffix(".lock") for path in parent.iterdir() if path.name.startswith(prefix)}
    for name in names:
        with _lock(parent / name) as locked:
            if locked:
                shutil.rmtree(parent / name, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Takes the lock file beside `folder`, which the system frees when the process ends; yields whether it was free."""
    path = folder.with_name(folder.name + ".lock")
    with open(path, "w", opener=no_link) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes a folder with all that it holds durable."""
    for path in (*folder.rglob("*"), folder):
        _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax's log (absl) off the user's stderr: its errors are raised as well. And what its other writers print
    when one has failed: each that ends later finds its event loop closed, and prints a trace."""
    logger, print_unraisable = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level

    def printed(found: UnraisableHookArgs) -> None:
        if not (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == "Event loop is closed"):
            print_unraisable(found)

    logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = printed
    try:
        yield
        sys.unraisablehook = print_unraisable  # after a failure it stays: nobody knows when the last write ends
    finally:
        logger.setLevel(level)
