"""`nanoflow inspect` as a user runs it: output forms, files, and one line for each wrong input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nanoflow_jax.cli import main

TINY = str(Path(__file__).parents[2] / "nanoflow_jax" / "assets" / "tiny_llama")


@pytest.fixture(autouse=True)
def unchanged_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h300"], ["hardware", "'h300'", "h200"]),
        (["--plan", "nanoflow"], ["plans", "'nanoflow'", "nanoflow_70b"]),
        (["--model", "llama-9"], ["models", "llama_9", "llama_3_1_70b"]),
        (["--devices", "7"], ["tensor_parallel_size", "7", "sizes that work"]),
        (["--layers", "81"], ["layers", "81", "80"]),
        (["--decode-tokens", "4096"], ["decode_tokens", "4096", "2048"]),
        (["--xla-option", "xla_gpu_dot_merger_threshold_mb"], ["--xla-option", "KEY=VALUE"]),
        (["--gpu", "a100_sxm_80", "--attention-backend", "mosaic"], ["attention_backend", "Hopper", "8.0"]),
        (["--quantization", "int8", "--layers", "1"], ["quantization", "'int8'", "accepted: None, 'fp8'"]),
        (
            ["--gpu", "a100_sxm_80", "--quantization", "fp8", "--layers", "1"],
            ["quantization", "fp8 tensor cores", "8.0"],
        ),
        (["--attention-backend", "cuda"], ["attention_backend", "'cuda'", "'mosaic'"]),
        (["--plot", "absent/folder/plot.png"], ["--plot", "absent/folder/plot.png"]),
        (["--trace", "."], ["--trace", ". is a folder"]),
    ],
)
def test_one_line_names_what_is_wrong(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is compiled; exit status 1, nothing on standard output."""
    assert main(["inspect", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    line = err.splitlines()[-1]
    assert all(word in line for word in words), line
    assert "Traceback" not in err


def test_a_misspelt_plan_is_told_before_any_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "--plan", "sequential", "--compare", "auto", "nanoflow"]) == 1
    out, err = capsys.readouterr()
    assert not out and "compiling" not in err
    assert "'nanoflow'" in err.splitlines()[-1]


def test_a_picture_without_matplotlib_is_told_before_anything_is_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoflow_jax.commands.options.find_spec", lambda name: None)
    assert main(["inspect", "--plot", "plot.png"]) == 1
    err = capsys.readouterr().err
    assert "compiling" not in err and "--plot: matplotlib is needed" in err


@pytest.mark.aot
def test_one_device_and_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No column, row or lane of a network that is not there; one line says which plan `auto` is."""
    trace = tmp_path / "trace.json"
    size = ["--model", TINY, "--gpu", "a100_sxm_80", "--devices", "1", "--tokens-per-step", "128", "--plan", "auto"]
    assert main(["inspect", *size, "--layers", "2", "--trace", str(trace)]) == 0
    out, err = capsys.readouterr()
    (head,) = (line for line in out.splitlines() if line.startswith("layer "))
    assert head.split() == ["layer", "compute", "memory", "lost", "bubbles", "length"]
    assert "exposed" not in out and "Collectives" not in out
    assert err.splitlines()[0].startswith("plan sequential: none is known for this model on 1 x a100")
    lanes = {e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "thread_name"}
    assert lanes == {"compute", "memory", "host"}


@pytest.mark.aot
def test_json_trace_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A small model of the user's own on two A100: the documented JSON, a trace with a lane per resource, a picture."""
    trace, plot, page = tmp_path / "trace.json", tmp_path / "plot.png", tmp_path / "page.html"
    size = [
        "--model",
        TINY,
        "--gpu",
        "a100_sxm_80",
        "--devices",
        "2",
        "--tokens-per-step",
        "128",
        "--plan",
        "two_all_reduce",
    ]
    files = ["--trace", str(trace), "--plot", str(plot), "--html", str(page)]
    assert main(["inspect", *size, "--json", *files]) == 0
    data = json.loads(capsys.readouterr().out)
    assert {"collectives", "findings", "totals", "memory"} <= set(data)
    row = next(c for c in data["collectives"] if c["op"] == "D.AR" and c["layer"] == 1)
    assert {"op", "nano_batch", "layer", "bytes", "is_async", "beside", "predicted_us", "exposed_us"} <= set(row)
    assert row["bytes"] == 128 * 128 * 4  # rows, hidden size, float32
    assert all({"kind", "op", "layer", "detail"} <= set(finding) for finding in data["findings"])
    assert data["attention_backend"] == "xla"
    assert data["memory"]["kv_bytes_per_token"] == 2 * 3 * 4 * 16 * 4  # K and V, layers, KV heads, head size, float32
    lanes = {e["args"]["name"] for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "thread_name"}
    assert {"compute", "memory", "network"} <= lanes
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert set(data["versions"]) >= {"jax", "jaxlib", "ptxas"}
    assert any(name.startswith("jax-cuda") for name in data["versions"])
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found
    shown = json.loads(found.group(1))
    assert all(f"{name} {version}" in shown["about"] for name, version in data["versions"].items())
    (plan,) = shown["plans"]
    assert sum(group["count"] for group in plan["findings"]) == len(data["findings"])
    assert sum(size for _, size in plan["memory"]) == data["memory"]["device"]
    drawn = next(e for e in plan["events"] if (e["label"], e["kind"]) == ("L1/D.AR.1", "collective"))
    assert (drawn["bytes"], drawn["alone"]) == (row["bytes"], pytest.approx(row["predicted_us"], abs=1e-4))


@pytest.mark.aot
def test_the_comparison_stands_first_and_counts_as_the_reports_do(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--model", TINY, "--gpu", "a100_sxm_80", "--devices", "2", "--tokens-per-step", "128"]
    assert main(["inspect", *size, "--plan", "two_all_reduce", "--compare", "sequential"]) == 0
    out = capsys.readouterr().out
    head, first, second = out.splitlines()[1:4]
    assert head.endswith("findings  in a layer") and first.split()[0] == "two_all_reduce"
    reports = re.findall(r"^Findings in the program compiled, its ends included: (\d+)$", out, re.M)
    inner = re.findall(r"^inner layer, us: .*; findings (\d+)$", out, re.M)
    assert [line.split()[-2:] for line in (first, second)] == [list(pair) for pair in zip(reports, inner, strict=True)]
    assert reports[0] != inner[0]
    assert out.index("two_all_reduce  ") < out.index("plan two_all_reduce,") and "compiled by jax " in out
