"""Converted checkpoints: they load onto every mesh, and a conversion that is killed leaves nothing that loads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.registry import parse_config, read_config
from nanoflow_jax.weights import WeightsError, convert, open_weights, orbax_files
from nanoflow_jax.weights import resolve_model as resolve
from nanoflow_jax.weights.source import check_tensors
from tests.reference.checkpoints import CASES, make_weights, write_checkpoint
from tests.weights.unfuse import MESH_SIZES, assert_same_tensors, hugging_face_tensors, load

MANIFEST = orbax_files.MANIFEST


@pytest.mark.parametrize("case", CASES)
def test_every_case_loads_on_every_mesh(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = convert(write_checkpoint(case, tmp_path / "model"), tmp_path / "converted")
    for devices in MESH_SIZES:
        config, _, params = load(folder, devices)
        assert_same_tensors(hugging_face_tensors(params, config), make_weights(case))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "model"]
    assert capfd.readouterr().err == ""


def test_the_folder_is_a_model_folder_of_its_own(tmp_path: Path) -> None:
    tiny = resolve("tiny")
    folder = convert(tiny, tmp_path / "converted")
    assert resolve(str(folder)) == folder
    side = {path.name for path in tiny.iterdir()} - {"model.safetensors"}
    assert {path.name for path in folder.iterdir()} == side | {MANIFEST, "weights"}
    for name in side - {"config.json"}:
        assert (folder / name).read_bytes() == (tiny / name).read_bytes()
    assert read_config(folder / "config.json") == read_config(tiny / "config.json")


@pytest.mark.parametrize(
    ("case", "dtype", "stored"),
    [("biases", "bfloat16", "bfloat16"), ("odd_vocab_tied", "float32", "float32"), ("llama2_mha", "auto", "bfloat16")],
)
def test_dtype(case: str, dtype: str, stored: str, tmp_path: Path) -> None:
    folder = convert(write_checkpoint(case, tmp_path / "model"), tmp_path / "converted", dtype)
    assert {tensor.dtype for tensor in open_weights(folder).table.values()} == {stored}
    assert read_config(folder / "config.json").dtype == stored
    config, _, params = load(folder, 2)
    assert_same_tensors(hugging_face_tensors(params, config), make_weights(case))
    with pytest.raises(WeightsError, match="dtype: 'float16' is not supported; accepted: 'auto'"):
        convert(folder, tmp_path / "other", "float16")


def test_a_checkpoint_converts_again_and_the_fingerprint_is_of_the_values(tmp_path: Path) -> None:
    first = convert(write_checkpoint("biases", tmp_path / "model"), tmp_path / "first")
    second = convert(first, tmp_path / "second")
    other = convert(write_checkpoint("biases", tmp_path / "model_2", seed=99), tmp_path / "other")
    prints = [json.loads((folder / MANIFEST).read_text())["fingerprint"] for folder in (first, second, other)]
    assert prints[0] == prints[1] != prints[2]


def test_plain_orbax_restores_a_block(tmp_path: Path) -> None:
    folder = convert(write_checkpoint("biases", tmp_path / "model"), tmp_path / "converted")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        block = checkpointer.restore(folder / "weights" / "layer_0001")
    expected = {name: values for name, values in make_weights("biases").items() if ".layers.1." in name}
    assert_same_tensors({name: np.asarray(values) for name, values in block.items()}, expected)
    load(folder, 1)  # and has changed nothing


def test_rows_without_divisors_and_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_files, "CHUNK_BYTES", 4096)  # several chunks per matrix, and padded rows
    for case in ("odd_vocab_tied", "linear_new_rope_sharded"):
        folder = convert(write_checkpoint(case, tmp_path / case), tmp_path / f"{case}_converted")
        for devices in (1, 8):
            config, _, params = load(folder, devices)
            assert_same_tensors(hugging_face_tensors(params, config), make_weights(case))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    convert(write_checkpoint("biases", tmp_path / "m"), tmp_path / "c", progress=lambda *call: calls.append(call))
    total = sum(values.nbytes for values in make_weights("biases").values())
    assert [call[0] for call in calls] == ["embedding", "layer_0000", "layer_0001", "head"]
    assert calls[-1][1:] == (total, total)


# ---- bad outputs and damaged checkpoints ----------------------------------------------------------------------------


def test_output_must_be_new_or_empty(tmp_path: Path) -> None:
    model = write_checkpoint("biases", tmp_path / "model")
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    (full / "precious").write_text("kept")
    file.write_text("kept")
    empty.mkdir()
    for output in (full, file, model):
        with pytest.raises(WeightsError, match=f"output: {output} exists and is not an empty folder; give a new one"):
            convert(model, output)
    assert (full / "precious").read_text() == file.read_text() == "kept"
    assert convert(model, empty) == empty
    load(empty, 1)
    with pytest.raises(WeightsError, match="could not be written"):
        convert(model, file / "below" / "a_file")


def test_an_error_midway_leaves_nothing(tmp_path: Path) -> None:
    model = write_checkpoint("biases", tmp_path / "model")

    def stop(block: str, *_: int) -> None:
        if block == "layer_0000":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "converted", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _edit_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        fields = json.loads((folder / name).read_text())
        change(fields)
        (folder / name).write_text(json.dumps(fields))

    return damage


def _reseal(change: Callable[[dict], object]) -> Callable[[Path], object]:
    """Changes the manifest's tensors and makes its fingerprint fit, so that the next check must notice."""

    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest["tensors"])
        config = json.loads((folder / "config.json").read_text())
        manifest["fingerprint"] = orbax_files.fingerprint(config, manifest["tensors"])
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def _data_files(folder: Path) -> list[Path]:
    return sorted((folder / "weights" / "layer_0001").rglob("d/*"))


def _garble(folder: Path) -> None:
    """The same number of other bytes, in the store's entry point."""
    path = folder / "weights" / "layer_0001" / "manifest.ocdbt"
    path.write_bytes(bytes(path.stat().st_size))


NORM = "model.norm.weight"
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / MANIFEST).unlink(), f"not a finished checkpoint .no {MANIFEST}"),
    "manifest cut short": (lambda f: (f / MANIFEST).write_text("{"), f"{MANIFEST}: not readable as JSON"),
    "another version": (_edit_json(MANIFEST, lambda m: m.update(version=9)), "version 9; accepted: .* version 1"),
    "manifest without tensors": (
        _edit_json(MANIFEST, lambda m: m.pop("tensors")),
        "damaged .it must hold",
    ),
    "another config": (_edit_json("config.json", lambda c: c.update(rms_norm_eps=0.1)), "fingerprint is not that of"),
    "manifest edited": (_edit_json(MANIFEST, lambda m: m["tensors"].pop(NORM)), "fingerprint is not that of"),
    "block absent": (lambda f: shutil.rmtree(f / "weights" / "head"), "files are absent: weights/head/"),
    "file absent": (lambda f: _data_files(f)[0].unlink(), "files are absent: weights/layer_0001"),
    "file cut short": (lambda f: os.truncate(_data_files(f)[0], 10), "has 10 bytes, not the"),
    "store garbled": (_garble, "layer_0001: .* cannot be opened"),
    "missing": (_reseal(lambda t: t.pop(NORM)), f"missing {NORM} "),
    "unknown": (
        _reseal(lambda t: t.update({"model.norm.weight2": t.pop(NORM)})),
        "model.norm.weight2 cannot be opened",
    ),
    "wrong shape": (
        _reseal(lambda t: t[NORM].update(shape=[65])),
        rf"{NORM} is float32 \(64,\), .* says float32 \(65,\)",
    ),
    "wrong dtype": (_reseal(lambda t: t[NORM].update(dtype="bfloat16")), f"{NORM} is float32 .* says bfloat16"),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    return convert(write_checkpoint("biases", folder / "model"), folder / "checkpoint")


@pytest.mark.parametrize("problem", DAMAGED)
def test_damaged_checkpoint_is_one_line_before_any_allocation(
    problem: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = DAMAGED[problem]
    folder = shutil.copytree(converted, tmp_path / "checkpoint")
    damage(folder)
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *_, **__: pytest.fail("allocated before the check"))
    with pytest.raises(WeightsError, match=message) as caught:
        load(folder, 2)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_checkpoint_of_another_model(converted: Path) -> None:
    """The shape that the caller's configuration asks for is checked as it is for safetensors."""
    fields = json.loads((converted / "config.json").read_text())
    wider = parse_config(fields | {"intermediate_size": 256})
    with pytest.raises(WeightsError, match=r"gate_proj.weight has shape \(128, 64\); config.json asks for \(256, 64\)"):
        check_tensors(open_weights(converted), wider, param_infos(wider, 1))
    deeper = parse_config(fields | {"num_hidden_layers": 1})
    with pytest.raises(WeightsError, match=r"num_hidden_layers is 1 in config.json; the checkpoint has 2"):
        check_tensors(open_weights(converted), deeper, param_infos(deeper, 1))


# ---- killed conversions ---------------------------------------------------------------------------------------------

# Converts, and stops to be killed at a moment: "begin" goes on (the parent kills it as soon as it sees the folder), an
# integer waits after that many blocks, "rename" waits when all that remains is the rename.
_CONVERT = """
import os, sys, time
from nanoflow_jax.weights import convert

model, output, moment = sys.argv[1:]
blocks = 0

def wait():
    print("now", flush=True)
    time.sleep(600)

def progress(block, done, total):
    global blocks
    blocks += 1
    if moment == str(blocks):
        wait()

if moment == "rename":
    rename = os.rename
    def stop(source, target, **options):
        if str(target) == output:
            wait()
        rename(source, target, **options)
    os.rename = stop
convert(model, output, progress=progress)
"""
MOMENTS = ("7", "rename")
LAYERS = 12


def _deep_checkpoint(folder: Path) -> Path:
    """A layer of the embedded model over and over, so that there is time to kill."""
    tiny = resolve("tiny")
    fields = json.loads((tiny / "config.json").read_text())
    tensors = load_file(tiny / "model.safetensors")
    layer = {name: values for name, values in tensors.items() if name.startswith("model.layers.0.")}
    tensors = {name: values for name, values in tensors.items() if ".layers." not in name}
    for i in range(LAYERS):
        tensors |= {name.replace(".0.", f".{i}.", 1): values for name, values in layer.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": LAYERS}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def _partial(parent: Path) -> list[Path]:
    """Temporary folders of conversions; none of them may load."""
    folders = [path for path in parent.iterdir() if path.is_dir() and path.name != "converted"]
    for folder in folders:
        with pytest.raises(WeightsError, match="not a finished checkpoint"):
            open_weights(folder)
    return folders


def test_killed_conversions_leave_nothing_that_loads(tmp_path: Path) -> None:
    model, parent = _deep_checkpoint(tmp_path / "model"), tmp_path / "outputs"
    output = parent / "converted"
    parent.mkdir()
    processes: list[subprocess.Popen[str]] = []

    def start(moment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _CONVERT, str(model), str(output), moment]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    try:
        first = start("begin")
        deadline = time.monotonic() + 60
        while not any(parent.glob(".converted.partial-*/weights")):
            assert first.poll() is None, "the conversion ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        first.kill()
        first.wait()
        assert len(_partial(parent)) == 1
        for process in [start(moment) for moment in MOMENTS]:
            assert process.stdout is not None
            assert process.stdout.readline() == "now\n"
        assert not output.exists()
        convert(model, output)  # removes what the killed one left, and leaves alone those that still run
        assert len(_partial(parent)) == len(MOMENTS)
        shutil.rmtree(output)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert len(_partial(parent)) == len(MOMENTS)
    assert not output.exists()
    convert(model, output)
    assert [path.name for path in parent.iterdir()] == ["converted"]
    config, _, params = load(output, 8)
    assert_same_tensors(hugging_face_tensors(params, config), hugging_face_tensors(load(model, 1)[2], config))


def in_a_process(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)


FULL = """
import resource, signal, sys
from nanoflow_jax.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
raise SystemExit(main(["convert", "tiny", sys.argv[1], "--quiet"]))
"""


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    """All of orbax's writers fail, and most of them after the first has been told."""
    done = in_a_process(FULL, str(tmp_path / "out"))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("nanoflow convert: ") and "could not be written (File too large)" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


# Ctrl-C comes while a garbage collector's callback runs (JAX has one), in which Python drops a KeyboardInterrupt.
PRESSED = """
import gc, os, signal, sys
from pathlib import Path
from nanoflow_jax.cli import main
from nanoflow_jax.weights import checkpoint
signal.signal(signal.SIGINT, signal.default_int_handler)
def press(phase, info):
    gc.callbacks.remove(press)
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
def pressing(name):
    call = getattr(checkpoint, name)
    def wrapped(*arguments):
        gc.callbacks.append(press)
        gc.collect()
        setattr(checkpoint, name, call)
        return call(*arguments)
    setattr(checkpoint, name, wrapped)
for name in ("check_tensors", "_read_whole", "_sample", "_copy_side_files", "_sync"):
    out = Path(sys.argv[1]) / name
    pressing(name)
    print(name, main(["convert", "tiny", str(out), "--quiet"]), out.exists(), file=sys.stderr)
"""


def test_no_interrupt_is_lost(tmp_path: Path) -> None:
    """A real SIGINT, from the first look at the weights to just before the folder gets its name."""
    done = in_a_process(PRESSED, str(tmp_path))
    names = ("check_tensors", "_read_whole", "_sample", "_copy_side_files", "_sync")
    assert done.stderr == "".join(f"nanoflow convert: interrupted\n{name} 1 False\n" for name in names)
    assert not list(tmp_path.iterdir())
