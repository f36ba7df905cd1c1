"""The command line: `nanoflow COMMAND`. Results go to stdout or a file, progress and messages to stderr.

Exit status: 0 done, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nanoflow_jax import __version__
from nanoflow_jax.bench import command as bench_command
from nanoflow_jax.evaluate import batch_command, eval_command, lm_eval_command
from nanoflow_jax.inspect import command as inspect_command
from nanoflow_jax.platform import UTILIZATION, claim_gpu_memory
from nanoflow_jax.search import search_command, simulate_command
from nanoflow_jax.search.profile import command as profile_command


class _Defaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that names every default and keeps examples as written."""


class _Parser(argparse.ArgumentParser):
    """The program's and, because they are made of the same class, each command's: an option is spelled out, so that a
    misspelt one is never taken for another."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _Parser(prog="nanoflow", description=__doc__, formatter_class=_Defaults)
    parser.add_argument("--version", action="version", version=f"nanoflow_jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_generate, _add_convert):
        add(commands)
    inspect_command.add(commands, _Defaults)
    bench_command.add(commands, _Defaults)
    lm_eval_command.add(commands, _Defaults)
    batch_command.add(commands, _Defaults, _add_model_options)
    eval_command.add(commands, _Defaults, _add_model_options)
    simulate_command.add(commands, _Defaults)
    search_command.add(commands, _Defaults)
    profile_command.add(commands, _Defaults)
    args = parser.parse_args(arguments)
    args.arguments = list(sys.argv[1:] if arguments is None else arguments)
    if getattr(args, "quiet", False):
        _hush_libraries()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("nanoflow_jax").setLevel(logging.INFO if getattr(args, "verbose", False) else logging.WARNING)
    if getattr(args, "cpu_devices", None):
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["JAX_NUM_CPU_DEVICES"] = str(args.cpu_devices)
    claim_gpu_memory(
        getattr(args, "memory_utilization", UTILIZATION)
    )  # commands look for devices before there is an LLM

    def report(error: BaseException) -> int:
        if isinstance(error, KeyboardInterrupt):
            line = "interrupted"
        elif isinstance(error, (ValueError, OSError)):  # ConfigError and WeightsError are ValueErrors
            line = " ".join(str(error).split())
        else:
            raise error
        print(f"nanoflow {args.command}: {line}", file=sys.stderr)
        return 1

    try:
        if getattr(args, "distributed", False) or getattr(args, "coordinator", None):
            from nanoflow_jax import distributed

            distributed.join(args.coordinator, args.num_processes, args.process_id, peer_timeout=args.peer_timeout)
            return distributed.run(lambda: args.run(args), report)
        return args.run(args)
    except BaseException as error:
        return report(error)


def _hush_libraries() -> None:
    """No warnings and no progress of other libraries, most of which are not imported yet; our own stay."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TF_CPP_MIN_LOG_LEVEL", "2"),
    ):
        os.environ.setdefault(name, value)
    logging.captureWarnings(True)
    for name in ("py.warnings", "jax", "transformers", "huggingface_hub", "absl", "orbax", "tensorstore"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it must be an integer of at least 1")
    return int(text)


def _add_generate(commands: Any) -> None:
    p = commands.add_parser(
        "generate",
        formatter_class=_Defaults,
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
        "--json", action="store_true", help="one JSON object per line: prompt, text, token_ids, finish_reason"
    )
    p.add_argument(
        "--chat", action="store_true", help="each prompt is a user's message, through the model's chat template"
    )
    sampling = p.add_argument_group("sampling (defaults: the model's generation_config.json, else greedy)")
    sampling.add_argument("--max-tokens", type=_positive, default=64, help="tokens to generate at most")
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
    _add_model_options(p)
    p.set_defaults(run=_generate)


def _add_model_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("model")
    group.add_argument("--model", default="tiny", help="'tiny' (embedded), a local folder, or a Hub id")
    group.add_argument("--revision", help="branch, tag or commit of a Hub id")
    group.add_argument("--tokenizer", help="folder or Hub id of another tokenizer")
    group.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    group.add_argument(
        "--tensor-parallel-size", type=_positive, help="devices in the mesh; all local devices when not given"
    )
    group.add_argument("--plan", default="auto", help="a name in configs/plans, or a path to a TOML file")
    group.add_argument(
        "--max-model-len", type=_positive, help="tokens of prompt and output together; the model's own when not given"
    )
    group.add_argument(
        "--tokens-per-step", type=_positive, default=2048, help="rows of the largest step, decode and prefill together"
    )
    group.add_argument(
        "--decode-slots",
        type=_positive,
        help="requests that run at once; 5/8 of --tokens-per-step when not given, 64 on a CPU",
    )
    group.add_argument("--page-size", type=_positive, default=64, help="tokens per KV page")
    group.add_argument(
        "--kv-cache-tokens", type=_positive, help="size of the KV pool; what memory allows when not given"
    )
    group.add_argument(
        "--memory-utilization", type=float, default=0.9, help="share of a GPU's memory for weights and pages"
    )
    group.add_argument(
        "--kv-cache-dtype",
        default="auto",
        help="of the KV pages: auto (the model's), or fp8 (fp8_e4m3), half the bytes",
    )
    group.add_argument("--attention-backend", default="auto", help="auto (mosaic on Hopper, else xla), mosaic or xla")
    group.add_argument("--cpu-devices", type=_positive, metavar="N", help="run on the CPU as N devices")
    several = p.add_argument_group(
        "several processes as one replica",
        "The same command in each; process 0 alone reads input, writes output and shows progress.",
    )
    several.add_argument(
        "--distributed", action="store_true", help="join the processes that JAX finds: SLURM, Kubernetes, Open MPI"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 listens")
    several.add_argument("--num-processes", type=_positive, metavar="N", help="and how many there are")
    several.add_argument("--process-id", type=int, metavar="I", help="and which one this is, from 0")
    several.add_argument(
        "--peer-timeout", type=float, default=60, metavar="SECONDS",
        help="without a sign of life from another process, the run ends after so long",
    )  # fmt: skip
    group.add_argument(
        "--quiet", action="store_true", help="no progress, and no warnings of libraries, on standard error"
    )
    group.add_argument("--verbose", action="store_true", help="log what was chosen (attention backend, plan, mesh)")


MODEL_OPTIONS = (
    "revision", "tokenizer", "dtype", "tensor_parallel_size", "plan", "max_model_len", "tokens_per_step",
    "decode_slots", "page_size", "kv_cache_tokens", "memory_utilization", "kv_cache_dtype", "attention_backend",
)  # fmt: skip


def _make_llm(args: argparse.Namespace) -> Any:
    from nanoflow_jax.api import LLM

    return LLM(args.model, progress=not args.quiet, **{name: getattr(args, name) for name in MODEL_OPTIONS})


def _generate(args: argparse.Namespace) -> int:
    from nanoflow_jax.engine.sampling_params import SamplingParams

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
        llm = _make_llm(args)
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
                    "token_ids": done.token_ids,
                    "finish_reason": done.finish_reason,
                    "prompt_tokens": len(output.prompt_token_ids),
                    **({"error": done.error} if done.error is not None else {}),
                }
                write(json.dumps(record, ensure_ascii=False))
            else:
                write(done.text if args.chat else prompt + done.text)
    failed = [(i, o.outputs[0].error) for i, o in enumerate(outputs, start=1) if o.outputs[0].error is not None]
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


def _add_convert(commands: Any) -> None:
    p = commands.add_parser(
        "convert",
        formatter_class=_Defaults,
        help="write a model as an orbax checkpoint",
        description="Writes a Hugging Face model as an orbax checkpoint that loads onto any mesh size.\n\n"
        "  nanoflow convert meta-llama/Llama-3.1-8B-Instruct ./llama-8b",
    )
    p.add_argument("model", metavar="MODEL", help="'tiny', a local folder, or a Hub id")
    p.add_argument("output", metavar="FOLDER", help="the checkpoint's folder; it must not exist, or be empty")
    p.add_argument("--revision", help="branch, tag or commit of a Hub id")
    p.add_argument("--dtype", default="auto", help="auto (as stored; float16 becomes bfloat16), bfloat16 or float32")
    p.add_argument("--quiet", action="store_true", help="no progress on standard error")
    p.set_defaults(run=_convert, cpu_devices=1)


def _convert(args: argparse.Namespace) -> int:
    from nanoflow_jax.interrupts import held_interrupts

    with held_interrupts():  # which some libraries would lose while they are imported
        from nanoflow_jax.progress import Progress
        from nanoflow_jax.weights.checkpoint import convert
        from nanoflow_jax.weights.hub import resolve_model

    bar: Progress | None = None
    seen = 0

    def report(_: str, done: int, total: int) -> None:
        nonlocal bar, seen
        if bar is None:
            bar = Progress(total, "converting", "B", not args.quiet).__enter__()
        bar.advance(done - seen)
        seen = done

    try:
        folder = convert(resolve_model(args.model, args.revision), Path(args.output), dtype=args.dtype, progress=report)
    finally:
        if bar is not None:
            bar.__exit__()
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
