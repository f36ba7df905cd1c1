"""`nanoflow simulate` as a user runs it: output forms, files, and one line for each wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax.cli import main
from nanoflow_jax.config import configs_root
from nanoflow_jax.profile.points import Point
from nanoflow_jax.profile.table import FORMAT, TableWriter, these_versions, this_machine
from nanoflow_jax.profile.timing import Timing

A100 = ["--model", "llama-2-70b", "--gpu", "a100_sxm_80"]


def test_json_of_one_plan_and_of_several(capsys: pytest.CaptureFixture[str]) -> None:
    """A model by name and by its config.json are the same."""
    path = str(configs_root() / "models" / "llama_2_70b.json")
    size = ["--workload", "constant:512:512", "--devices", "8", "--plan", "nanoflow_70b", "--json"]
    found = []
    for model in ("llama-2-70b", path):
        assert main(["simulate", "--model", model, "--gpu", "a100_sxm_80", *size]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    data = found[0]
    assert data["tokens_per_second_per_gpu"] == pytest.approx(1286, rel=0.1)
    assert data["share_of_optimum"] == pytest.approx(
        data["tokens_per_second_per_gpu"] / data["optimum_tokens_per_second_per_gpu"]
    )
    assert data["bound_by"] == "compute"
    assert data["latency_source"] == "published curve; roofline"
    assert data["tokens_per_step"] == 2048 == data["decode_slots"] + data["prefill_rows"]
    assert data["latency_per_token_ms"] == pytest.approx(2048 / 8 / data["tokens_per_second_per_gpu"] * 1e3)
    assert main(["simulate", *A100, *size, "--compare", "sequential"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [one["plan"] for one in both] == ["nanoflow_70b", "sequential"]
    assert both[0] == data


def test_text_trace_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace, plot = tmp_path / "trace.json", tmp_path / "plot.png"
    arguments = ["--trace", str(trace), "--plot", str(plot), "--compare", "sequential"]
    assert main(["simulate", *A100, "--workload", "sharegpt", *arguments]) == 0
    out = capsys.readouterr().out
    assert "predicted from published curve; roofline" in out
    assert [line.split()[0] for line in out.splitlines()[1:]] == ["plan", "nanoflow_70b", "sequential"]
    events = json.loads(trace.read_text())["traceEvents"]
    assert {"L2/D.AR.2", "L2/GEMV.1"} <= {event["name"] for event in events}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["simulate", *A100]) == 0
    assert "best of the step sizes tried" in capsys.readouterr().out


def test_one_device_and_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No figure of a network that is not there; one line says which plan `auto` is."""
    trace, one = tmp_path / "trace.json", ["--model", "llama-3.1-8b", "--gpu", "h200", "--devices", "1"]
    assert main(["simulate", *one, "--plan", "auto", "--trace", str(trace)]) == 0
    out, err = capsys.readouterr()
    assert "plan auto_llama_3_1_8b_1xh200," in out and "network" not in out
    assert err.startswith("plan auto_llama_3_1_8b_1xh200: searched for") and err.count("\n") == 1
    lanes = {e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "thread_name"}
    assert lanes == {"compute", "memory", "host", "memory, stream 1"}
    assert main(["simulate", *one, "--plan", "sequential", "--compare", "auto"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1].split()[:5] == ["plan", "layer", "us", "lost", "us"]
    assert err.startswith("plan auto_llama_3_1_8b_1xh200")
    assert main(["simulate", *one[:4], "--devices", "2", "--plan", "auto"]) == 0
    assert "none is known for this model on 2 x h200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compare", "auto", "nanoflow"], ["plans", "'nanoflow'", "nanoflow_70b"]),
        (["--gpu", "h300"], ["hardware", "'h300'", "h200"]),
        (["--plan", "nanoflow"], ["plans", "'nanoflow'", "nanoflow_70b"]),
        (["--model", "llama-9"], ["models", "llama_9", "llama_3_1_70b"]),
        (["--devices", "7"], ["tensor_parallel_size", "7", "sizes that work"]),
        (["--devices", "16"], ["devices: 16", "h200", "1 to 8"]),
        (["--gpu", "a100_sxm_80", "--devices", "1"], ["room for 0 tokens", "1 x a100_sxm_80", "more GPUs"]),
        (["--quantization", "int8"], ["quantization", "'int8'", "accepted: None, 'fp8'"]),
        (["--gpu", "a100_sxm_80", "--quantization", "fp8"], ["quantization", "fp8 tensor cores", "8.0"]),
        (["--workload", "constant:5"], ["workload", "constant:PROMPT:OUTPUT"]),
        (["--workload", "constant:200000:5"], ["workload", "200005", "131072"]),
        (["--plot", "absent/folder/plot.png"], ["--plot", "absent/folder/plot.png"]),
        (["--plot", "."], ["--plot", ". is a folder"]),
    ],
)
def test_one_line_names_what_is_wrong(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    line = err.splitlines()[-1]
    assert all(word in line for word in words), line
    assert "Traceback" not in err


def table_of_this_machine(path: Path, **versions: str) -> Path:
    """Made-up times: GEMMs, the copy and an all-reduce, of the shapes of `tiny` on eight devices."""
    header = {
        "format": FORMAT, "points": "few", "machine": this_machine() | {"devices": 8}, "commit": "", "date": "",
        "versions": these_versions() | versions, "command": "", "model": {}, "memory_bytes": 2**30,
    }  # fmt: skip
    with TableWriter(path, header, 0) as writer:
        writer.add(Point.of("copy", bytes=2**20), Timing(100.0, 100.0, 100.0, 5))
        for moved in (2**12, 2**20):
            point = Point.of("collective", kind="all-reduce", devices=8, dtype="f32", bytes=moved)
            writer.add(point, Timing(50.0 + moved / 1e4, 50.0, 500.0, 5))
        for m in (8, 256):
            for n, k in ((48, 128), (128, 16), (96, 128), (128, 48)):
                writer.add(Point.of("gemm", dtype="f32", m=m, n=n, k=k), Timing(10.0 + m, 1.0, 500.0, 5))
    return path


def test_a_profile_is_asked_first_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Measured GEMMs that are ten times as slow make the layer that much longer; what the table lacks is estimated."""
    table = table_of_this_machine(tmp_path / "table.jsonl")
    size = ["--model", "tiny", "--plan", "sequential", "--workload", "constant:64:64", "--tokens-per-step", "256"]

    def simulated(path: Path) -> dict[str, Any]:
        assert main(["simulate", *size, "--profile", str(path), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = simulated(table)
    assert set(found["latency_source"].split("; ")) >= {"profile", "roofline"}
    slow = tmp_path / "slow.jsonl"
    slow.write_text(table.read_text().replace('"us": 266.0', '"us": 2660.0'))
    slower = simulated(slow)
    assert found["tokens_per_second_per_gpu"] > 4 * slower["tokens_per_second_per_gpu"]
    assert main(["search", *size[:2], *size[4:], "--profile", str(table), "--quiet"]) == 0
    assert 'gpu = "cpu"' in capsys.readouterr().out


def test_a_profile_of_another_version_or_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = table_of_this_machine(tmp_path / "old.jsonl", jax="0.1")
    own = table_of_this_machine(tmp_path / "own.jsonl")
    tiny = ["simulate", "--model", "tiny", "--plan", "sequential", "--workload", "constant:64:64"]
    for given, word in (
        (["--profile", str(old)], "jax '0.1', here"),
        (["--profile", str(own), "--gpu", "h200"], "not on h200"),
        (["--allow-foreign"], "--profile"),
        (["--profile", str(tmp_path / "none")], "nanoflow profile --output"),
    ):
        assert main([*tiny, *given]) == 1
        out, err = capsys.readouterr()
        assert out == "" and word in err and err.count("\n") == 1
    for path, more in ((old, []), (own, ["--gpu", "h200"])):
        assert main([*tiny, "--profile", str(path), "--allow-foreign", *more]) == 0
        assert "profile" in capsys.readouterr().out
