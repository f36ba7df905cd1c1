"""The command line: results on stdout or in a file, everything else on stderr, exit status 0, 1 or 2, and errors of
one line."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax import LLM, api
from nanoflow_jax.cli import main
from nanoflow_jax.models.registry import read_config
from tests.step.step_driver import FAST_FLAGS

SMALL = [
    *("--tensor-parallel-size", "2", "--max-model-len", "512", "--decode-slots", "8", "--tokens-per-step", "72"),
    *("--page-size", "16", "--kv-cache-tokens", "4096"),
]

Cli = Callable[..., tuple[int, str, str]]
_made: dict[str, LLM] = {}


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process and returns (status, stdout, stderr). The same model and options give the
    same LLM, so that
    steps are compiled once; standard input holds `stdin`."""
    for name in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.setenv(name, os.environ[name])  # what the command changes is put back

    def make(model: str, *, progress: bool, **options: Any) -> LLM:
        key = repr((model, sorted(options.items())))
        if key not in _made:
            _made[key] = LLM(model, progress=progress, **options)
        return _made[key]

    monkeypatch.setattr(api, "LLM", make)

    def run(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            status = main(arguments)
        except SystemExit as stop:  # argparse's way
            assert isinstance(stop.code, int)
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def generate(cli: Cli, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
    return cli("generate", *arguments, "--quiet", *SMALL, stdin=stdin)


SYSTEM = ("--system", "Be brief.")

# -- generate


def test_prompts_from_arguments(cli: Cli) -> None:
    """One completion per line, behind its prompt, in order."""
    assert generate(cli, "12+30=", "25+25=") == (0, "12+30=42\n25+25=50\n", "")


def test_prompts_from_a_file_and_from_standard_input(cli: Cli, tmp_path: Path) -> None:
    """Lines end with \\n or \\r\\n, the last with or without; a form feed does not end one. Arguments come first."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"12+30=\r\n25+25=\n10+11=")
    assert generate(cli, "--input", str(file)) == (0, "12+30=42\n25+25=50\n10+11=21\n", "")
    assert generate(cli, "--input", "-", stdin=b"12+30=\n")[1] == "12+30=42\n"
    assert generate(cli, "25+25=", "--input", "-", stdin=b"12+30=")[1] == "25+25=50\n12+30=42\n"
    status, out, _ = generate(cli, "--input", "-", "--json", stdin="12\x0c30\u2028=\n".encode())
    assert status == 0
    assert [json.loads(line)["prompt"] for line in out.rstrip("\n").split("\n")] == ["12\x0c30\u2028="]


def test_json(cli: Cli) -> None:
    """One object per line, with what a program needs."""
    status, out, err = generate(cli, "12+30=", "25+25=", "--json")
    assert (status, err) == (0, "")
    first, second = (json.loads(line) for line in out.splitlines())
    assert first == {
        "prompt": "12+30=",
        "text": "42",
        "token_ids": [*b"42", 257],
        "finish_reason": "stop",
        "prompt_tokens": 7,
    }
    assert second["text"] == "50"


def test_forms(cli: Cli, tmp_path: Path) -> None:
    """A schema as text or in a file, a regular expression, choices; two of them are wrong usage."""
    schema = '{"enum": ["yes", "no"]}'
    (tmp_path / "schema.json").write_text(schema)
    for form, wanted in (
        (["--json-schema", schema], ('"yes"', '"no"')),
        (["--json-schema", str(tmp_path / "schema.json")], ('"yes"', '"no"')),
        (["--regex", "[xyz]{3}k"], tuple("".join(p) + "k" for p in product("xyz", repeat=3))),
        (["--choice", "abc", "--choice", "abd"], ("abc", "abd")),
    ):
        status, out, _ = generate(cli, "12+30=", *form)
        assert status == 0 and out.removeprefix("12+30=").rstrip("\n") in wanted
    refused(generate(cli, "12+30=", "--json-schema", '{"type": "objec"}'), "structured_outputs", "Invalid type: objec")
    refused(generate(cli, "12+30=", "--json-schema", "no_such.json"), "no_such.json", "cannot be read")
    # Before the model is loaded, and so before it is found missing.
    refused(generate(cli, "12+30=", "--model", str(tmp_path), "--regex", "("), "regex: '('", "cannot be compiled")


def test_output_goes_to_a_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    assert generate(cli, "12+30=", "--json", "--output", str(file)) == (0, "", "")
    assert json.loads(file.read_text())["text"] == "42"
    before = file.read_bytes()
    status, out, err = generate(cli, "25+25=", "--json", "--output", str(file))
    assert (status, out) == (1, "")
    assert "--output" in err
    assert str(file) in err
    assert file.read_bytes() == before, "what was written before is lost"
    empty = tmp_path / "empty"
    empty.touch()
    assert generate(cli, "12+30=", "--output", str(empty))[0] == 0
    assert empty.read_text() == "12+30=42\n"


def test_chat(cli: Cli) -> None:
    """Each prompt is a user's message; only the answer is printed."""
    status, out, _ = generate(cli, "What is 12+30?", "--chat", "--json")
    record = json.loads(out)
    assert status == 0
    assert record["prompt"] == "What is 12+30?"
    assert record["prompt_tokens"] == len("What is 12+30?") + 4  # begin of text, user, end of turn, assistant
    assert record["finish_reason"] == "stop"
    assert generate(cli, "What is 12+30?", "--chat") == (0, record["text"] + "\n", "")


def test_sampling_options_are_applied(cli: Cli) -> None:
    """max-tokens, stop-token-ids, ignore-eos; a seed repeats, prompt i has seed + i, and top-k 1 or temperature 0
    are greedy."""

    def ids(*arguments: str) -> list[list[int]]:
        status, out, err = generate(cli, *arguments, "--json")
        assert status == 0, err
        return [json.loads(line)["token_ids"] for line in out.splitlines()]

    assert ids("12+30=", "--max-tokens", "1") == [[*b"4"]]
    assert ids("12+30=", "--stop-token-ids", "50", "7") == [[*b"42"]]
    assert len(ids("12+30=", "--ignore-eos", "--max-tokens", "9")[0]) == 9
    hot = ["--temperature", "3", "--max-tokens", "12", "--ignore-eos"]
    one, two, three = ids("12+30=", "12+30=", "12+30=", *hot, "--seed", "5")
    assert len({tuple(t) for t in (one, two, three)}) == 3
    assert ids("12+30=", "12+30=", *hot, "--seed", "6") == [two, three]
    greedy = ids("12+30=", "--max-tokens", "12", "--ignore-eos")
    assert ids("12+30=", *hot, "--top-k", "1") == greedy
    assert ids("12+30=", *hot, "--top-p", "1e-9") == greedy
    assert ids("12+30=", *hot, "--temperature", "0") == greedy


def test_progress_is_on_stderr_unless_quiet(cli: Cli) -> None:
    status, out, err = cli("generate", "12+30=", *SMALL)
    assert (status, out) == (0, "12+30=42\n")
    assert "generating: 1/1 requests" in err


def test_several_completions_with_logprobs_and_a_stop(cli: Cli) -> None:
    """--n completions per prompt, each a line; --stop ends before its text and may be repeated; --logprobs are of each
    token and the likeliest."""
    sampled = ["--n", "3", "--temperature", "3", "--max-tokens", "6", "--ignore-eos", "--seed", "5"]
    status, out, err = generate(cli, "12+30=", "25+25=", *sampled, "--json")
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["prompt"], one["index"]) for one in found] == [(p, i) for p in ("12+30=", "25+25=") for i in range(3)]
    assert len({one["text"] for one in found}) > 3, "completions are copies"
    assert generate(cli, "12+30=", *sampled)[1].count("12+30=") == 3
    record = json.loads(generate(cli, "12+30=", "--stop", "!", "--stop", "2", "--json", "--logprobs", "2")[1])
    assert (record["text"], record["finish_reason"], record["token_ids"]) == ("4", "stop", [*b"42"])
    assert [step[0]["token"] for step in record["logprobs"]] == ["4", "2"]
    assert all(
        {"token_id", "logprob", "rank"} <= {*top} and len(step) >= 2 for step in record["logprobs"] for top in step
    )
    assert record["cumulative_logprob"] == pytest.approx(sum(step[0]["logprob"] for step in record["logprobs"]))
    refused(generate(cli, "12+30=", "--n", "2"), "n: 2", "temperature")


def test_a_system_message(cli: Cli) -> None:
    """It stands before the user's: of the prompt, its text and the two tokens of a turn."""
    count = [json.loads(generate(cli, "hi", "--chat", "--json", *more)[1])["prompt_tokens"] for more in ((), SYSTEM)]
    assert count[1] == count[0] + len("Be brief.") + 2


# -- refusals


def refused(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    assert (status, out) == (1, "")
    assert "Traceback" not in err
    assert err.count("\n") == 1, f"not one line: {err}"
    assert err.startswith("nanoflow ")
    for word in words:
        assert word in err, f"{word!r} is not named by: {err}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "./no/such/model"], ["./no/such/model", "'tiny'", "Hub id"]),
        (["--plan", "no_such_plan"], ["no_such_plan", "two_all_reduce"]),
        (["--plan", "./no_such_plan.toml"], ["./no_such_plan.toml"]),
        (["--tokenizer", "./no/such/tokenizer"], ["./no/such/tokenizer"]),
        (["--dtype", "int4"], ["dtype", "int4", "bfloat16"]),
        (["--tensor-parallel-size", "3"], ["tensor_parallel_size", "3"]),
        (["--memory-utilization", "7"], ["memory_utilization", "7"]),
        (["--input", "no_such_file.txt"], ["no_such_file.txt"]),
        (["--input", "."], ["'.'", "directory"]),
        (["--output", "./no/such/folder/out.txt"], ["./no/such/folder/out.txt"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "0"], ["top_p", "0"]),
        (["--seed", "4294967296"], ["seed", "4294967296"]),
        (["--stop-token-ids", "-3"], ["stop_token_ids", "-3"]),
        (["12" * 300], ["prompt", "601 tokens", "511"]),
        ([""], ["prompt 2 is empty"]),
    ],
    ids=str,
)
def test_bad_values_are_one_line(cli: Cli, arguments: list[str], words: list[str]) -> None:
    """Status 1, nothing on stdout, no stack trace; the line names what is wrong."""
    refused(cli("generate", "--quiet", *SMALL, "12+30=", *arguments), *words)


def test_bad_sampling_is_told_before_the_model_is_loaded(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "LLM", lambda *_, **__: pytest.fail("a model was loaded"))
    refused(generate(cli, "12+30=", "--top-k", "-7"), "top_k", "-7")


@pytest.mark.parametrize("stdin", [False, True])
def test_binary_prompts_are_refused(cli: Cli, tmp_path: Path, stdin: bool) -> None:
    data = b"12+30=\n\xff\xfe\x00binary"
    (tmp_path / "prompts.bin").write_bytes(data)
    source = "-" if stdin else str(tmp_path / "prompts.bin")
    name = "standard input" if stdin else source
    refused(generate(cli, "--input", source, stdin=data), "--input", name, "not UTF-8", "byte 7")


def test_a_bad_plan_file_is_named(cli: Cli, tmp_path: Path) -> None:
    plan = tmp_path / "mine.toml"
    for text, words in (("nano_batches = [", []), ('order = ["KQV.1"]\ncolour = "red"\n', ["colour"])):
        plan.write_text(text)
        refused(generate(cli, "12+30=", "--plan", str(plan)), str(plan), *words)


def test_a_bad_model_folder_is_named(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    refused(generate(cli, "12+30=", "--model", str(tmp_path)), str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], ["no prompts", "--input FILE"]),
        (["generate", "--input", os.devnull], ["no prompts"]),
        (["generate", "x", "--page-size", "0"], ["--page-size", "'0'", "at least 1"]),
        (["generate", "x", "--max-tokens", "ten"], ["--max-tokens", "'ten'"]),
        (["generate", "x", "--temperature", "warm"], ["--temperature", "'warm'"]),
        (["generate", "x", "--beam-width", "4"], ["--beam-width"]),
        (["generate", "x", "--chat-template", "no.jinja"], ["--chat-template", "no.jinja", "a Jinja file"]),
        (["generate", "x", "--chat-template-kwargs", "[1]"], ["--chat-template-kwargs", "'[1]'", "JSON object"]),
        (["batch", "-i", "a", "-o", "b", "--chat-template-kwargs", '{"tools": 1}'], ["-kwargs", "'tools' is not"]),
        (["convert", "tiny"], ["FOLDER"]),
        (["compress", "tiny"], ["compress", "generate", "convert"]),
        (["genrate", "x"], ["'genrate'", "did you mean generate?"]),
        (["generate", "x", "--system", "y"], ["--system", "--chat is needed"]),
        (["generate", "x", "--logprobs", "2"], ["--logprobs", "--json is needed"]),
    ],
    ids=str,
)
def test_wrong_usage_is_status_2(cli: Cli, arguments: list[str], words: list[str]) -> None:
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, f"not one line: {err}"
    for word in words:
        assert word in err


def test_an_interruption_is_one_line(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "LLM", interrupted)
    refused(generate(cli, "12+30="), "interrupted")


# -- help


OPTIONS = {
    "generate": [
        "--input",
        "--output",
        "--json",
        "--chat",
        "--system",
        "--tools",
        "--documents",
        "--max-tokens",
        "--n",
        "--temperature",
        "--top-p",
        "--top-k",
        "--seed",
        "--stop",
        "--stop-token-ids",
        "--ignore-eos",
        "--logprobs",
        "--json-schema",
        "--regex",
        "--choice",
        "--model",
        "--revision",
        "--tokenizer",
        "--dtype",
        "--tensor-parallel-size",
        "--data-parallel-size",
        "--plan",
        "--max-model-len",
        "--tokens-per-step",
        "--decode-slots",
        "--page-size",
        "--kv-cache-tokens",
        "--memory-utilization",
        "--prefix-caching",
        "--kv-offload-gib",
        "--kv-offload-disk-gib",
        "--kv-offload-folder",
        "--deterministic",
        "--kv-cache-dtype",
        "--quantization",
        "--attention-backend",
        "--chat-template",
        "--chat-template-kwargs",
        "--reasoning-parser",
        "--cpu-devices",
        "--quiet",
        "--verbose",
        "--distributed",
        "--coordinator",
        "--num-processes",
        "--process-id",
        "--peer-timeout",
    ],
    "convert": ["--revision", "--dtype", "--quantization", "--quiet"],
}


@pytest.mark.parametrize("command", list(OPTIONS))
def test_help_lists_every_option_with_its_default(cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A default that is nothing, or off, is not told."""
    monkeypatch.setenv("COLUMNS", "200")
    status, out, err = cli(command, "--help")
    assert (status, err) == (0, "")
    entries = dict(re.findall(r"^  (?:-h, )?(--[a-z-]+)((?:.*\n)(?:    .*\n)*)", out, re.MULTILINE))
    assert set(entries) == {*OPTIONS[command], "--help"}
    assert not re.search(r"\(default: (None|False|\[\])", out)
    defaults = {
        "generate": {"--max-tokens": "64", "--n": "1", "--model": "tiny", "--page-size": "64", "--peer-timeout": "60"},
        "convert": {"--dtype": "auto", "--quantization": "as stored"},
    }
    for option, default in defaults[command].items():
        assert f"(default: {default})" in entries[option]
    if command == "generate":
        assert "sampling (defaults: the model's generation_config.json, else greedy)" in out
        assert "(default: all that are present)" in entries["--tensor-parallel-size"]


def test_version(cli: Cli) -> None:
    assert cli("--version")[:2] == (0, "nanoflow_jax 0.1.0\n")


# -- convert


def test_convert_and_generate_from_it(cli: Cli, tmp_path: Path) -> None:
    """The checkpoint answers as its source does; its folder is named on stdout, and a second conversion does not
    touch it."""
    folder = tmp_path / "checkpoint"
    status, out, err = cli("convert", "tiny", str(folder))
    assert (status, out) == (0, f"{folder}\n"), err
    assert "converting: " in err
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert generate(cli, "12+30=", "25+25=", "--model", str(folder)) == (0, "12+30=42\n25+25=50\n", "")
    refused(cli("convert", "tiny", str(folder), "--quiet"), str(folder), "not an empty folder")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == files
    refused(cli("convert", "./no/such/model", str(tmp_path / "other"), "--quiet"), "./no/such/model")
    refused(cli("convert", "tiny", str(tmp_path / "other"), "--dtype", "int4", "--quiet"), "dtype", "int4")
    refused(cli("convert", "tiny", str(tmp_path / "other"), "--quantization", "int4"), "quantization", "int4", "'fp8'")
    fp8 = tmp_path / "fp8"
    assert cli("convert", "tiny", str(fp8), "--quantization", "fp8", "--quiet")[0] == 0
    assert read_config(fp8 / "config.json").quantization == "fp8"
    assert not (tmp_path / "other").exists()


# -- a process of its own


def process(*arguments: str, stdin: str = "", **environment: str | None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "XLA_FLAGS": FAST_FLAGS, **environment}
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in env.items() if value is not None},
    )


def test_process_json_from_standard_input() -> None:
    """stdout is JSON lines and nothing else; progress, one plain line each as there is no terminal, is on stderr."""
    command = ["-m", "nanoflow_jax", "generate", "--input", "-", "--json", *SMALL]
    done = process(*command, stdin="12+30=\n25+25=\n")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["42", "50"]
    titles = [line.split(":")[0] for line in done.stderr.splitlines()]
    assert set(titles) == {"loading weights", "compiling steps", "generating"}, done.stderr


def test_process_output_file_and_cpu_devices(tmp_path: Path) -> None:
    """--cpu-devices makes the mesh whatever the environment says; with --output stdout is empty, with --verbose the
    choices are told."""
    file = tmp_path / "out.txt"
    command = ["-m", "nanoflow_jax.cli", "generate", "12+30=", "--output", str(file), "--quiet", "--verbose", *SMALL]
    done = process(*command, "--cpu-devices", "8", JAX_NUM_CPU_DEVICES="1")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert file.read_text() == "12+30=42\n"
    assert done.stderr.splitlines() == [
        "end tokens: 257 '<|end_of_text|>' (generation_config.json), 261 '<|end_of_turn|>' (generation_config.json)",
        "plan two_gather_one_reduce: no plan is known for this device",
        "attention backend: xla; KV pages: float32; plan: two_gather_one_reduce; mesh: 2 devices",
    ]


def test_quiet_is_quiet(tmp_path: Path) -> None:
    """Nothing on stderr, whatever libraries warn of; without --quiet they may."""
    hush = "import os, sys, warnings, logging; from nanoflow_jax import api, cli; made = api.Tokenizer\n"
    hush += "def noisy(*source):\n"
    hush += "    import transformers\n"
    hush += "    transformers.utils.logging.get_logger('transformers.some').warning('a class is not the same')\n"
    hush += "    warnings.warn('an option is deprecated', UserWarning); logging.getLogger('jax._src').warning('slow')\n"
    hush += "    return made(*source) if '--quiet' in sys.argv else sys.exit('that was all')\n"
    hush += "api.Tokenizer = noisy; sys.exit(cli.main(sys.argv[1:]))"
    command = ["-c", hush, "generate", "12+30=", *SMALL]
    unset = dict.fromkeys(("TRANSFORMERS_VERBOSITY", "TF_CPP_MIN_LOG_LEVEL"))  # where other tests have been quiet
    done = process(*command, "--quiet", **unset)
    assert (done.returncode, done.stdout, done.stderr) == (0, "12+30=42\n", "")
    loud = process(*command, **unset)  # what comes after is of no interest
    assert loud.stderr.endswith("that was all\n")
    for words in ("a class is not the same", "an option is deprecated", "slow"):
        assert words in loud.stderr, "the test would not see it"


def test_no_parser_guesses() -> None:
    """Wherever the project reads options, those of tools included."""
    root, found = Path(__file__).parents[1], 0
    for path in [p for name in ("nanoflow_jax", "kernels_pallas", "tests") for p in (root / name).rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "ArgumentParser" in text else ():
            if not isinstance(node, ast.Call) or "ArgumentParser" not in ast.unparse(node.func):
                continue
            options = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert options.get("allow_abbrev") == "False", f"{path}:{node.lineno}"
            found += 1
    assert found >= 5


def test_importing_loads_no_jax_and_prints_nothing() -> None:
    """Nor do prompts that replicas are handed."""
    code = "import sys, nanoflow_jax, nanoflow_jax.cli, nanoflow_jax.engine.feed; sys.exit('jax' in sys.modules)"
    done = process("-W", "error", "-c", code, JAX_PLATFORMS=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_a_gpu_the_cuda_plugin_is_silent() -> None:
    """With the plugin installed and JAX_PLATFORMS unset, JAX runs on the CPU without a word about CUDA or cuDNN."""
    if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        pytest.skip("the CUDA plugin is not installed")
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("there is a GPU")
    code = "import nanoflow_jax, jax; nanoflow_jax.LLM; print(jax.devices()[0].platform)"
    done = process("-c", code, JAX_PLATFORMS=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")
