"""`nanoflow generate`: prompts in, completions out."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoflow_jax.commands.options import add_chat_options, add_model_options, make_llm, positive

if TYPE_CHECKING:
    from nanoflow_jax.engine.request import CompletionOutput, RequestOutput
    from nanoflow_jax.sampling_params import StructuredOutputsParams


def add(commands: Any) -> None:
    p = commands.add_parser(
        "generate",
        help="complete prompts from arguments, a file or standard input",
        description="Completes prompts and prints each with its completion (with --n completions), in order.\n\n"
        "  nanoflow generate '12+30=' 'reverse abc='\n"
        "  nanoflow generate --chat --system 'Be brief.' 'What is 12+30?'\n"
        "  nanoflow generate '12+30=' --n 3 --temperature 0.8 --json --logprobs 2\n"
        "  nanoflow generate 'My name is' --json-schema person.json --max-tokens 200\n"
        "  nanoflow generate --chat 'Is this good? I like it.' --choice yes --choice no\n"
        "  nanoflow generate --input prompts.txt --json > results.jsonl\n"
        "  echo '12+30=' | nanoflow generate --input -",
    )
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="prompts; each is completed")
    p.add_argument("--input", metavar="FILE", help="read prompts from FILE, one per line ('-': standard input)")
    p.add_argument("--output", metavar="FILE", help="write results to FILE instead of standard output")
    p.add_argument(
        "--json",
        action="store_true",
        help="one JSON object per completion and line: prompt, text, token_ids, finish_reason; with --n index; with "
        "--chat reasoning_content, content; with --logprobs those",
    )
    p.add_argument(
        "--chat",
        action="store_true",
        help="each prompt is a user's message, through the chat template; without --json only the answer is printed",
    )
    p.add_argument("--system", metavar="TEXT", help="with --chat: the system's message, before the user's")
    add_chat_options(p, "each chat (--chat)")
    sampling = p.add_argument_group("sampling (defaults: the model's generation_config.json, else greedy)")
    sampling.add_argument("--max-tokens", type=positive, default=64, help="tokens to generate at most")
    sampling.add_argument(
        "--n", type=positive, default=1, help="completions of each prompt; more than 1 need a temperature above 0"
    )
    for name, kind, text in (
        ("temperature", float, "0 is greedy"),
        ("top-p", float, "keep the likeliest tokens that reach this probability together"),
        ("top-k", int, "keep this many likeliest tokens; 0 keeps all"),
        ("seed", int, "noise of the first prompt; prompt i has seed + i"),
    ):
        sampling.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
    sampling.add_argument(
        "--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT",
        help="end a completion before this text; may be given several times",
    )  # fmt: skip
    sampling.add_argument(
        "--stop-token-ids", type=int, nargs="+", default=argparse.SUPPRESS, help="tokens that end a completion"
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", default=argparse.SUPPRESS, help="go on past the model's end token"
    )
    form = sampling.add_mutually_exclusive_group()
    form.add_argument(
        "--json-schema", metavar="FILE|TEXT", help="completions are JSON that fits this schema; a text begins with '{'"
    )
    form.add_argument("--regex", metavar="TEXT", help="completions match this regular expression as a whole")
    form.add_argument(
        "--choice", action="append", metavar="TEXT", help="completions are one of these; may be given several times"
    )
    sampling.add_argument(
        "--logprobs", type=int, default=argparse.SUPPRESS, metavar="N",
        help="with --json: of each token its logprob, and those of the N likeliest",
    )  # fmt: skip
    add_model_options(p)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from nanoflow_jax.engine.structured import check_form
    from nanoflow_jax.sampling_params import SamplingParams

    prompts = list(args.prompts) + (_read_lines(args.input) if args.input else [])
    if not prompts:
        print(
            "nanoflow generate: no prompts; give them as arguments, or --input FILE ('-' for standard input)",
            file=sys.stderr,
        )
        return 2
    for name, needed in (("system", "chat"), ("tools", "chat"), ("documents", "chat"), ("logprobs", "json")):
        if getattr(args, name, None) is not None and not getattr(args, needed):
            print(f"nanoflow generate: --{name}: --{needed} is needed with it", file=sys.stderr)
            return 2
    if empty := [i for i, prompt in enumerate(prompts, start=1) if not prompt]:
        raise ValueError(f"prompt {empty[0]} is empty; every line must hold a prompt")
    names = ("n", "max_tokens", "temperature", "top_p", "top_k", "stop", "stop_token_ids", "ignore_eos", "logprobs")
    wanted = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if (form := _form(args)) is not None:
        check_form(form)
        wanted["structured_outputs"] = form
    seeds = [{"seed": args.seed + i} if hasattr(args, "seed") else {} for i in range(len(prompts))]
    for seed in (seeds[0], seeds[-1]):
        SamplingParams(**wanted, **seed)  # a bad setting is told before the model is loaded
    # --seed is that of the prompts.
    with _open_output(args.output) as write, closing(make_llm(args, seed=0)) as llm:
        params = [llm.default_sampling_params(**wanted, **seed) for seed in seeds]
        if args.chat:
            system = [{"role": "system", "content": args.system}] if args.system is not None else []
            conversations = [[*system, {"role": "user", "content": p}] for p in prompts]
            outputs = llm.chat(
                conversations, params, use_tqdm=not args.quiet, tools=args.tools, documents=args.documents
            )
        else:
            outputs = llm.generate(prompts, params, use_tqdm=not args.quiet)
        for prompt, output in zip(prompts, outputs, strict=True):
            for done in output.outputs:
                if args.json:
                    write(json.dumps(_record(args, prompt, output, done), ensure_ascii=False))
                else:
                    write((done.content or "") if args.chat else prompt + done.text)
    failed = False
    for number, output in enumerate(outputs, start=1):
        for done in output.outputs:
            where = f"nanoflow generate: prompt {number}" + f", completion {done.index + 1}" * (args.n > 1)
            if done.error is not None:
                failed = True
                print(f"{where}: {done.error}", file=sys.stderr)
            elif args.chat and done.content is None:
                print(
                    f"{where}: no answer; its thought had not ended after {len(done.token_ids)} tokens",
                    file=sys.stderr,
                )
    return 1 if failed else 0


def _form(args: argparse.Namespace) -> StructuredOutputsParams | None:
    """What form the completions must have. Raises ValueError."""
    from nanoflow_jax.sampling_params import StructuredOutputsParams
    from nanoflow_jax.system.reading import read_text

    if args.json_schema is not None:
        text = args.json_schema
        return StructuredOutputsParams(json=text if text.lstrip().startswith("{") else read_text(text))
    if args.regex is not None or args.choice is not None:
        return StructuredOutputsParams(regex=args.regex, choice=args.choice)
    return None


def _record(args: argparse.Namespace, prompt: str, output: RequestOutput, done: CompletionOutput) -> dict[str, Any]:
    """A completion as --json prints it."""
    record: dict[str, Any] = {"prompt": prompt}
    if args.n > 1:
        record["index"] = done.index
    record["text"] = done.text
    if args.chat:
        record |= {"reasoning_content": done.reasoning_content, "content": done.content}
    record |= {
        "token_ids": done.token_ids,
        "finish_reason": done.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
    }
    if done.logprobs is not None:
        record["cumulative_logprob"] = done.cumulative_logprob
        record["logprobs"] = [
            [
                {"token_id": token, "token": at.decoded_token, "logprob": at.logprob, "rank": at.rank}
                for token, at in step.items()
            ]
            for step in done.logprobs
        ]
    if done.error is not None:
        record["error"] = done.error
    return record


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


@contextmanager
def _open_output(path: str | None) -> Iterator[Callable[[str], None]]:
    """A function that writes a line to `path`, or to stdout. The path is tried before any work is done, never
    truncated on failure."""
    if path is not None and os.path.exists(path) and os.path.getsize(path):
        raise ValueError(f"--output: {path} exists and is not empty; name a new file")
    with nullcontext(sys.stdout) if path is None else open(path, "a", encoding="utf-8") as file:
        yield lambda line: print(line, file=file, flush=True)
