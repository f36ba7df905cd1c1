"""Loading onto 1, 2, 4 and 8 devices gives the checkpoint's tensors, one slice at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.registry import parse_config
from nanoflow_jax.weights import convert
from nanoflow_jax.weights import load as load_module
from tests.reference.checkpoints import CASES, make_weights, write_checkpoint
from tests.weights.unfuse import MESH_SIZES, assert_same_tensors, hugging_face_tensors, load


@pytest.mark.parametrize("case", CASES)
def test_every_case_on_every_mesh(case: str, tmp_path: Path) -> None:
    folder, expected = write_checkpoint(case, tmp_path), make_weights(case)
    for devices in MESH_SIZES:
        config, mesh, params = load(folder, devices)
        assert_same_tensors(hugging_face_tensors(params, config), expected)
        infos = param_infos(config, devices, dtype="float32")
        for info, array in zip(jax.tree.leaves(infos), jax.tree.leaves(params), strict=True):
            assert (array.shape, array.dtype, array.sharding) == (info.shape, info.dtype, info.sharding(mesh))


@pytest.mark.parametrize("case", ["llama2_mha", "biases"])
def test_files_are_cast_to_bfloat16(case: str, tmp_path: Path) -> None:
    """From float16 and from float32; the weights of the cases are exact in all three."""
    config, _, params = load(write_checkpoint(case, tmp_path), 4, dtype="bfloat16")
    assert {array.dtype for array in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert_same_tensors(hugging_face_tensors(params, config), make_weights(case))


def test_small_pieces_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "CHUNK_BYTES", 1000)  # a few rows, and less than one of the fused weights
    for case in ("linear_new_rope_sharded", "llama3_old_rope"):
        folder = write_checkpoint(case, tmp_path / case)
        for devices in (1, 8):
            config, _, params = load(folder, devices)
            assert_same_tensors(hugging_face_tensors(params, config), make_weights(case))


def test_each_value_is_read_once_however_many_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replicated norm once and not eight times; a column shard without its row's other columns."""
    folder = write_checkpoint("llama3_new_rope_tied", tmp_path)  # 8 KV heads: none is replicated
    read: dict[str, int] = {}
    opened = load_module.open_weights(folder)
    inner = opened.read_slice

    def counting(name: str, index: tuple[slice, ...]) -> np.ndarray:
        values = inner(name, index)
        read[name] = read.get(name, 0) + values.size
        return values

    monkeypatch.setattr(opened, "read_slice", counting)
    monkeypatch.setattr(load_module, "open_weights", lambda _: opened)
    load(folder, 8)
    for name, values in make_weights("llama3_new_rope_tied").items():
        layouts = 2 if "o_proj" in name else 1
        assert read[name] == layouts * values.size, name


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    _, _, params = load(write_checkpoint("biases", tmp_path), 2, progress=lambda *call: calls.append(call))
    total = sum(array.nbytes for array in jax.tree.leaves(params))
    done = [call[1] for call in calls]
    assert done == sorted(done)
    assert calls[-1][1:] == (total, total)
    assert len(calls) == len(jax.tree.leaves(params))


# ---- host memory ----------------------------------------------------------------------------------------------------

# A process of its own, in which nothing else is allocated. Two figures, each over the largest weight:
# `transient`: numpy memory while one weight is loaded, its shards included (tracemalloc), the worst weight;
# `resident`: the process's private memory (which mapped files are not), less what the arrays on the "devices" hold.
# glibc is told to give every freed buffer back: left alone, its arenas keep up to some 300 MB of what tensorstore's
# threads freed, however large the checkpoint is.
_MEASURE = """
import json, sys, threading, time, tracemalloc
from pathlib import Path
import jax, numpy as np
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.weights import load as loading, resolve_model

folder, devices, dtype, wasteful = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] == "wasteful"
config = read_config(Path(folder, "config.json"))
mesh, infos = make_mesh(config, devices), param_infos(config, devices, dtype=dtype)

def private():
    return 1024 * next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))

make, transient = jax.make_array_from_callback, [0]
def traced_make(*args, **options):
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    array = make(*args, **options).block_until_ready()
    transient.append(tracemalloc.get_traced_memory()[1] - before)
    return array
jax.make_array_from_callback = traced_make

if wasteful:  # the broken twin: whole tensors, kept
    opener, kept = loading.open_weights, {}
    def open_weights(folder):
        source = opener(folder)
        read = source.read_slice
        def whole(name, index):
            if (folder, name) not in kept:
                kept[folder, name] = np.array(read(name, tuple(slice(0, n) for n in source.table[name].shape)))
            return kept[folder, name][index]
        source.read_slice = whole
        return source
    loading.open_weights = open_weights

tiny = resolve_model("tiny")  # what the first load of a process allocates for good is no matter of the weights
tiny_config = read_config(tiny / "config.json")
loading.load_params(tiny, tiny_config, mesh, param_infos(tiny_config, devices))
loading.open_weights(folder)
start, peak, running = private(), 0, True
def watch():
    global peak
    while running:
        peak = max(peak, private())
        time.sleep(0.001)
thread = threading.Thread(target=watch, daemon=True)
thread.start()
tracemalloc.start()
params = loading.load_params(folder, config, mesh, infos)
running = False
thread.join()
arrays = jax.tree.leaves(params)
held = sum(s.data.nbytes for a in arrays for s in a.addressable_shards)
largest = max(a.nbytes for a in arrays)
print(json.dumps({"transient": max(transient) / largest, "resident": (peak - start - held) / largest,
                  "largest_MB": largest / 1e6, "held_MB": held / 1e6}))
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 260 MB in bfloat16; the largest tensor has 66 MB, and a number of rows that nothing divides."""
    folder = tmp_path_factory.mktemp("large")
    fields = {"vocab_size": 32001, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    fields |= {"num_attention_heads": 8, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(fields))
    random = np.random.default_rng(0)
    tensors = {
        source.name: random.integers(-128, 128, source.shape, np.int8).astype(ml_dtypes.bfloat16)
        for info in jax.tree.leaves(param_infos(parse_config(fields), 1))
        for source in info.sources
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def _measure(folder: Path, devices: int, dtype: str = "bfloat16", mode: str = "") -> dict[str, Any]:
    command = [sys.executable, "-c", _MEASURE, str(folder), str(devices), dtype, mode]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment, timeout=120)
    return json.loads(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_host_memory_stays_below_twice_the_largest_weight(large_checkpoint: Path, tmp_path: Path) -> None:
    converted = convert(large_checkpoint, tmp_path / "converted")
    for folder, devices, dtype in [(large_checkpoint, 8, "float32"), (converted, 1, "bfloat16")]:
        figures = _measure(folder, devices, dtype)
        print(folder.name, devices, dtype, figures)  # shown with -s
        assert figures["transient"] < 2, figures
        assert figures["resident"] < 2, figures
    assert _measure(large_checkpoint, 8, mode="wasteful")["resident"] > 2
