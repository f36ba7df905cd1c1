"""`nanoflow generate`: prompts in, completions out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoflow_jax.commands.options import add_model_options, make_llm, positive


def add(commands: Any) -> None:
    p = commands.add_parser(
        "generate",
        help="complete prompts from arguments, a file or standard input",
        description="Completes prompts and prints one completion per prompt, in order.\n\n"
        "  nanoflow generate '12+30=' 'reverse abc='\n"
        "  nanoflow generate --input prompts.txt --json > results.jsonl\n"
        "  echo '12+30=' | nanoflow generate --input -",
    )
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; each is completed")
    p.add_argument("--input", metavar="FILE", help="read prompts from FILE, one per line ('-': standard input)")
    p.add_argument("--output", metavar="FILE", help="write results to FILE instead of standard output")
    p.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per line: prompt, text, token_ids, finish_reason; with --chat reasoning_content, content",
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a user's message, through the chat template; without --json only the answer is printed",
    )
    sampling = p.add_argument_group("sampling (defaults: the model's generation_config.json, else greedy)")
    sampling.add_argument("--max-tokens", type=positive, default=64, help="tokens to generate at most")
    for name, kind, text in (
        ("temperature", float, "0 is greedy"),
        ("top-p", float, "keep the likeliest tokens that reach this probability together"),
        ("top-k", int, "keep this many likeliest tokens; 0 keeps all"),
        ("seed", int, "noise of the first prompt; prompt i has seed + i"),
    ):
        sampling.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
    sampling.add_argument(
        "--stop-token-ids", type=int, nargs="+", default=argparse.SUPPRESS, help="tokens that end a completion"
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="go on past the model's end token"
    )
    add_model_options(p)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.sampling_params import SamplingParams

    prompts = list(args.prompts) + (_read_lines(args.input) if args.input else [])
    if not prompts:
        print(
            "nanoflow generate: no prompts; give them as arguments, or --input FILE ('-' for standard input)",
            file=sys.stderr,
        )
        return 2
    if empty := [i for i, prompt in enumerate(prompts, start=1) if not prompt]:
        raise ValueError(f"prompt {empty[0]} is empty; every line must hold a prompt")
    names = ("max_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos")
    wanted = {name: getattr(args, name) for name in names if hasattr(args, name)}
    seeds = [{"seed": args.seed + i} if hasattr(args, "seed") else {} for i in range(len(prompts))]
    for seed in (seeds[0], seeds[-1]):
        SamplingParams(**wanted, **seed)  # a bad setting is told before the model is loaded
    with _open_output(args.output) as write:
        llm = make_llm(args, seed=0)  # --seed is that of the prompts
        params = [llm.default_sampling_params(**wanted, **seed) for seed in seeds]
        if args.chat:
            outputs = llm.chat([[{"role": "user", "content": p}] for p in prompts], params, use_tqdm=not args.quiet)
        else:
            outputs = llm.generate(prompts, params, use_tqdm=not args.quiet)
        for prompt, output in zip(prompts, outputs, strict=True):
            done = output.outputs[0]
            if args.json:
                record = {
                    "prompt": prompt,
                    "text": done.text,
                    **({"reasoning_content": done.reasoning_content, "content": done.content} if args.chat else {}),
                    "token_ids": done.token_ids,
                    "finish_reason": done.finish_reason,
                    "prompt_tokens": len(output.prompt_token_ids),
                    **({"error": done.error} if done.error is not None else {}),
                }
                write(json.dumps(record, ensure_ascii=False))
            else:
                write((done.content or "") if args.chat else prompt + done.text)
    failed = [(i, o.outputs[0].error) for i, o in enumerate(outputs, start=1) if o.outputs[0].error is not None]
    for number, output in enumerate(outputs, start=1):
        if args.chat and (done := output.outputs[0]).content is None and done.error is None:
            print(
                f"nanoflow generate: prompt {number}: no answer; its thought had not ended after "
                f"{len(done.token_ids)} tokens",
                file=sys.stderr,
            )
    for number, error in failed:
        print(f"nanoflow generate: prompt {number}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _read_lines(source: str) -> list[str]:
    """The lines of a UTF-8 file, or of standard input for "-"."""
    name, data = ("standard input", sys.stdin.buffer.read()) if source == "-" else (source, Path(source).read_bytes())
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--input: {name} is not UTF-8 text (byte {error.start}); one prompt per line is needed"
        ) from None
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines, which also cuts at form feeds and the like
    return lines[:-1] if not lines[-1] else lines


class _open_output:
    """A function that writes a line to `path`, or to stdout. The path is tried before any work is done, never
    truncated on failure."""

    def __init__(self, path: str | None):
        self._path = path
        self._file: Any = None

    def __enter__(self) -> Callable[[str], None]:
        if self._path is not None:
            if os.path.exists(self._path) and os.path.getsize(self._path):
                raise ValueError(f"--output: {self._path} exists and is not empty; name a new file")
            self._file = open(self._path, "a", encoding="utf-8")
        return lambda line: print(line, file=self._file or sys.stdout, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
