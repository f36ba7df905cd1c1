"""Every file that the library reads may be damaged, or written to do harm: one line says so, and no stack trace.

By hand, with as many mutants as wanted of every parser: `python tests/system/test_hostile_files.py 4000`.
"""

from __future__ import annotations

import json
import random
import struct
import sys
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoflow_jax.commands.batch import chat_time
from nanoflow_jax.config import EMBEDDED, ConfigError, configs_root
from nanoflow_jax.evaluate.manifest import Manifest
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.report import compare, summarize
from nanoflow_jax.evaluate.tasks import Task, load_task
from nanoflow_jax.generation_config import end_tokens, generation_defaults
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.profile.measured import load_profile
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights import orbax_files
from nanoflow_jax.weights.orbax_files import OrbaxFiles
from nanoflow_jax.weights.safetensors_files import INDEX_FILE, SINGLE_FILE, SafetensorsFiles
from nanoflow_jax.workload import load_workload
from tests.reference.fp8_checkpoints import BLOCKS, FORMS
from tests.system.mutants import mutants, read_lines, write_json, write_lines, write_toml, write_yaml

LONGEST = 500  # characters of a message
COUNT = 300  # mutants of each kind of file
TINY = EMBEDDED["tiny"]


@dataclass(frozen=True)
class Kind:
    """A kind of file. valid: the contents of good ones; load: reads a file in a folder made for it, which `prepare`
    has filled; share: of COUNT, for those that take long."""

    name: str
    valid: Callable[[], list[bytes]]
    load: Callable[[Path], Any]
    parse: Callable[[bytes], Any] = json.loads
    write: Callable[[Any], bytes] = write_json
    prepare: Callable[[Path], None] = lambda folder: None
    also: Any = field(default=None)
    share: float = 1.0


def _configs(pattern: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(configs_root().glob(pattern))]


def _fp8_configs() -> list[bytes]:
    fields = json.loads((TINY / "config.json").read_text())
    forms = [form.config for form in (FORMS | BLOCKS).values() if not form.beside]
    return [write_json({**fields, "quantization_config": config}) for config in forms]


def _read_toml(data: bytes) -> Any:
    import tomllib

    return tomllib.loads(data.decode())


def _task(path: Path) -> None:
    samples(load_task(str(path)), 3)


# -- contents of files that no folder holds


def _task_lines() -> list[bytes]:
    asked = [{"prompt": f"{i}+{i}=", "target": str(2 * i), "id": f"q{i}"} for i in range(3)]
    return [write_lines(asked), write_lines([{**line, "choices": [line["target"], "x"]} for line in asked])]


def _workload_lines() -> list[bytes]:
    return [
        write_lines([{"prompt_tokens": 300, "output_tokens": 200}, {"prompt_tokens": 3, "output_tokens": 2}]),
        write_lines([{"prompt": "12+30=", "max_tokens": 8}, {"prompt": [1, 2, 3], "max_tokens": 8}]),
    ]


def _profile() -> list[bytes]:
    gemm = {"op": "gemm", "dtype": "f32", "k": 32, "m": 8, "n": 64}
    heads = {"q_heads": 2, "kv_heads": 1, "head_dim": 16, "dtype": "f32"}
    decode = {"op": "decode_attention", "requests": 1, "context": 64, "sms": 0, **heads}
    taken = {"us": 8.0, "low": 7.0, "high": 9.0, "runs": 5}
    pair = {
        "op": "pair", "first": gemm, "second": decode, "first_us": 64.0, "second_us": 42.0,
        "rounds": [[2, 1, 150.0], [1, 4, 180.0]], "first_speed": 0.6, "second_speed": 0.8,
    }  # fmt: skip
    machine = {"platform": "gpu", "device": "NVIDIA H100 80GB HBM3", "devices": 1, "cpu": "x", "cpus": 2}
    header = {"format": 1, "machine": machine, "versions": {"jax": "0.11.2"}, "memory_bytes": 2**30}
    lines = [
        header, {"op": "copy", "bytes": 2**20, **taken}, {**gemm, **taken}, {**gemm, "m": 64, **taken},
        {**decode, **taken}, pair, {"op": "norm", "rows": 8, "hidden": 32, "dtype": "f32", "failed": "out of memory"},
    ]  # fmt: skip
    return [write_lines(lines)]


def _sample_log() -> list[bytes]:
    answered = {"prompt": "1+1=", "target": "2", "output": "2", "answer": "2", "finish_reason": "stop"}
    lines = [
        {"id": "sample_0", "error": None, "sample": "q0", **answered, "scores": {"exact_match": 1.0}},
        {"id": "sample_1", "error": {"message": "failed"}, "sample": "q1", "prompt": "2+2=", "target": ["4", "four"],
         "scores": {"exact_match": 0.0}},
    ]  # fmt: skip
    return [write_lines(lines)]


def _summarize(path: Path) -> None:
    task = load_task("addition")
    assert isinstance(task, Task)
    name = path.name.removesuffix(".samples.jsonl")
    summarize(task, path)
    compare(name, task.metrics, path.parent / "good", path.parent)


def _good_log(folder: Path) -> None:
    (folder / "good").mkdir(exist_ok=True)
    (folder / "good" / "t.samples.jsonl").write_bytes(_sample_log()[0])


def _run_manifest() -> list[bytes]:
    identity = {"model": "0" * 64, "dtype": "auto", "sampling": {"seed": 1}, "chat_time": "2026-01-02T03:04:05"}
    return [write_json({"format": 1, "kind": "batch", "identity": identity, "about": {"input_lines": 3}})]


def _load_manifest(path: Path) -> None:
    found = Manifest.read(path)
    found.differences(Manifest("batch", {"model": "1"}))
    chat_time(found)


# -- model folders


def _copied(*names: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        for name in names:
            (folder / name).write_bytes((TINY / name).read_bytes())

    return prepare


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


def _generation(path: Path) -> None:
    generation_defaults(path.parent)
    end_tokens(path.parent, read_config(TINY / "config.json"), _tokenizer())


def _tokenizer_of(path: Path) -> None:
    found = Tokenizer(path.parent)
    tokens = found.encode("12+30=", True)
    [found.token_bytes(token) for token in tokens]


def _tensors() -> dict[str, Any]:
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }


def _with_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(32)


def _read_all(files: Any) -> None:
    for name, info in files.table.items():
        if info.dtype in ("float32", "bfloat16", "float16"):
            files.read_slice(name, tuple(slice(0, n) for n in info.shape))


def _safetensors(path: Path) -> None:
    _read_all(SafetensorsFiles(path.parent))


def _two_shards(folder: Path) -> None:
    header = _tensors()
    for file, name in (("model-1.safetensors", "a"), ("model-2.safetensors", "b")):
        entry = {**header[name]}
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        text = write_json({name: {**entry, "data_offsets": [0, size]}})
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def _index() -> list[bytes]:
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    return [write_json({"metadata": {"total_size": 32}, "weight_map": shards})]


def _orbax_manifest() -> list[bytes]:
    tensors = {"a": {"shape": [2, 3], "dtype": "float32", "block": "layer_0000", "sample_sha256": "0" * 64}}
    fields = {"format": orbax_files.FORMAT, "version": orbax_files.VERSION, "dtype": "auto", "tensors": tensors}
    return [write_json({**fields, "fingerprint": orbax_files.fingerprint({}, tensors), "files": {"weights/a": 1}})]


def _orbax(path: Path) -> None:
    """With the fingerprint made to fit, so that what comes after it is reached."""
    try:
        fields = json.loads(path.read_bytes())
        fields["fingerprint"] = orbax_files.fingerprint({}, fields["tensors"])
        path.write_bytes(write_json(fields))
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    OrbaxFiles(path.parent)


def _orbax_folder(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "a").write_bytes(b"x")


KINDS = {
    kind.name: kind
    for kind in (
        Kind("config.json", lambda: _configs("models/*.json"), read_config),
        Kind("fp8_config.json", _fp8_configs, read_config),
        Kind(
            "hf_quant_config.json", lambda: [write_json(form.config) for form in FORMS.values() if form.beside],
            lambda path: read_config(path.with_name("config.json")), prepare=_copied("config.json"),
        ),
        Kind(
            "generation_config.json",
            lambda: [
                (TINY / "generation_config.json").read_bytes(),
                b'{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2], "num_beams": 1}',
            ],
            _generation,
        ),
        Kind(
            "tokenizer_config.json", lambda: [(TINY / "tokenizer_config.json").read_bytes()], _tokenizer_of,
            prepare=_copied("tokenizer.json", "config.json"), share=0.4,
        ),
        Kind(
            "tokenizer.json", lambda: [(TINY / "tokenizer.json").read_bytes()], _tokenizer_of,
            prepare=_copied("tokenizer_config.json"), share=0.4,
        ),
        Kind("hardware.toml", lambda: _configs("hardware/*.toml"), load_hardware, _read_toml, write_toml),
        Kind("workload.toml", lambda: _configs("workloads/*.toml"), lambda path: load_workload(str(path)), _read_toml,
             write_toml),
        Kind("workload.jsonl", _workload_lines, lambda path: load_workload(str(path), lambda text: [1]), read_lines,
             write_lines),
        Kind("plan.toml", lambda: _configs("plans/*.toml"), lambda path: load_plan(str(path)), _read_toml, write_toml),
        Kind("task.yaml", lambda: _configs("tasks/*.yaml"), _task, yaml.safe_load, write_yaml),
        Kind("task.jsonl", _task_lines, _task, read_lines, write_lines),
        Kind("profile.jsonl", _profile, partial(load_profile, allow_foreign=True), read_lines, write_lines),
        Kind("t.samples.jsonl", _sample_log, _summarize, read_lines, write_lines, _good_log),
        Kind("run.manifest.json", _run_manifest, _load_manifest),
        Kind(
            SINGLE_FILE, lambda: [_with_length(write_json(_tensors()))], _safetensors,
            lambda data: json.loads(data[8:-32]), lambda value: _with_length(write_json(value)),
        ),
        Kind(INDEX_FILE, _index, _safetensors, prepare=_two_shards),
        Kind(orbax_files.MANIFEST, _orbax_manifest, _orbax, prepare=_orbax_folder),
    )
}  # fmt: skip


def problem_of(kind: Kind, path: Path, data: bytes) -> str | None:
    """What is wrong with how a file is refused, in one line with the place; None when nothing is."""
    path.write_bytes(data)
    try:
        kind.load(path)
    except ConfigError as error:
        text = str(error)
        if len(text) > LONGEST or not text.isprintable():
            return f"a message of {len(text)} characters: {text[:100]!a}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "nanoflow_jax" in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}: {str(error)[:100]!a}"
    return None


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_damaged_file_is_refused_in_one_line(kind: Kind, tmp_path: Path):
    kind.prepare(tmp_path)
    valid = kind.valid()
    for data in valid if kind.name != orbax_files.MANIFEST else ():
        path = tmp_path / kind.name
        path.write_bytes(data)
        kind.load(path)
    rng = random.Random(zlib.crc32(kind.name.encode()))
    for number in range(int(COUNT * kind.share)):
        data = mutants(rng.choice(valid), rng, kind.parse, kind.write)
        wrong = problem_of(kind, tmp_path / kind.name, data)
        assert wrong is None, f"mutant {number} of {kind.name}: {wrong}\n{data[:300]!r}"


def _by_hand(count: int, names: list[str]) -> None:
    import logging
    import tempfile

    logging.disable()
    for kind in KINDS.values():
        if names and kind.name not in names:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kind.prepare(folder)
            rng, found, valid = random.Random(0), Counter[str](), kind.valid()
            for _ in range(int(count * kind.share)):
                data = mutants(rng.choice(valid), rng, kind.parse, kind.write)
                if wrong := problem_of(kind, folder / kind.name, data):
                    found["a long message" if wrong.startswith("a message") else wrong.split(": ")[0]] += 1
            print(f"{kind.name}: {sum(found.values())} of {int(count * kind.share)}", dict(found), flush=True)


if __name__ == "__main__":
    _by_hand(int(sys.argv[1]), sys.argv[2:])
