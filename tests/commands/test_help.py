"""What a newcomer meets first: help by task, the nearest word for a misspelt one, and a reader that stops reading."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from nanoflow_jax.cli import main, make_parser


def test_nanoflow_alone_teaches_by_task(capsys: pytest.CaptureFixture[str]) -> None:
    """On standard output, the same as --help; every command has an example, and every example is one that is taken."""
    assert main([]) == 0
    out, err = capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert (out, err) == capsys.readouterr()
    parser = make_parser()
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    examples = re.findall(r"^  nanoflow (.*)\n      \S", out, re.MULTILINE)
    assert [shlex.split(line)[0] for line in examples] == list(commands or ())
    for line in examples:
        parser.parse_args(shlex.split(line))


@pytest.mark.parametrize("command", list(make_parser()._subparsers._group_actions[0].choices or ()))  # type: ignore[union-attr]
def test_no_help_tells_a_default_that_is_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command == "lm-eval":
        pytest.skip("lm-eval's own")
    kinds = (
        ([command, kind] for kind in ("throughput", "host", "batch", "structured"))
        if command == "bench"
        else [[command]]
    )
    for words in kinds:
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert out.startswith(f"usage: nanoflow {' '.join(words)} ") and "(default: None)" not in out
        assert "(default: False)" not in out and "(default: [])" not in out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--versoin", "no option --versoin; did you mean --version?"),
        ("generate x --num 3", "no option --num; did you mean --n?"),
        ("generate x --zzz 3", "no option --zzz; `nanoflow generate --help` lists those there are"),
        ("generate x --stop-token 3", "no option --stop-token; did you mean --stop-token-ids?"),
        ("generate x --temprature=1", "no option --temprature; did you mean --temperature?"),
        ("generate x --gpu-memory-utilization 0.5", "did you mean --memory-utilization?"),
        ("generate x --max-num-seqs 4", "did you mean --decode-slots?"),
        ("generate x --max-num-batched-tokens 4", "did you mean --tokens-per-step?"),
        ("generate x --max-new-tokens 4", "did you mean --max-tokens?"),
        ("batch -i a -o b --decode 8", "no option --decode; "),
        ("batch --inptu a", "no option --inptu; did you mean --input?"),
        ("eval addition --out x", "did you mean --output?"),
        ("bench throughput --request 3", "did you mean --requests?"),
        ("bench host --step 3", "did you mean --steps?"),
        ("bench through", "'through' is not accepted; did you mean throughput?"),
        ("simulate --mod tiny", "did you mean --model?"),
        ("layouts --devices 8", "did you mean --gpus?"),
        ("profile --points noraml", "'noraml' is not accepted; did you mean normal?"),
    ],
    ids=str,
)
def test_a_misspelt_word_is_told_the_nearest(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 2, and never taken for another option: --num is not --num-processes."""
    with pytest.raises(SystemExit) as stop:
        main(line.split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert told in err


@pytest.mark.parametrize("command", ["inspect", "simulate", "search", "profile"])
def test_the_mesh_has_one_name(command: str) -> None:
    """That of `LLM`; --devices is short for it."""
    parser = make_parser()
    for flag in ("--tensor-parallel-size", "--devices"):
        assert parser.parse_args([command, flag, "4"]).devices == 4


def test_values_that_look_like_options_are_values() -> None:
    """After --, behind =, or with a space in them."""
    args = make_parser().parse_args(["generate", "--stop=--x", "--stop", "--a b", "--", "--n"])
    assert (args.stop, args.prompts) == (["--x", "--a b"], ["--n"])


@pytest.mark.parametrize(("arguments", "unbuffered"), [("models", "1"), ("models", ""), ("models --help", "")])
def test_a_reader_that_stops_reading(arguments: str, unbuffered: str) -> None:
    """`| head -1`: not a word on standard error, whether the pipe breaks in the middle or as Python ends."""
    code = "import sys; sys.stdin.readline(); from nanoflow_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments.split()], env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as done:  # fmt: skip
        assert done.stdout is not None and done.stderr is not None and done.stdin is not None
        done.stdout.close()
        done.stdin.write("\n")
        done.stdin.close()
        assert done.stderr.read() == ""
        assert done.wait() == 1
