"""What the commands share: the parser, and the options of a model with the LLM that they make. Nothing heavy is
imported."""

from __future__ import annotations

import argparse
from typing import Any


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help that names every default and keeps examples as written."""


class Parser(argparse.ArgumentParser):
    """The program's and, because they are made of the same class, each command's: an option is spelled out, so that a
    misspelt one is never taken for another."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, allow_abbrev=False, **{"formatter_class": Formatter, **options})


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not accepted; it must be an integer of at least 1")
    return int(text)


def add_model_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("model")
    group.add_argument("--model", default="tiny", help="'tiny' (embedded), a local folder, or a Hub id")
    group.add_argument("--revision", help="branch, tag or commit of a Hub id")
    group.add_argument("--tokenizer", help="folder or Hub id of another tokenizer")
    group.add_argument("--dtype", default="auto", help="auto, bfloat16 or float32")
    group.add_argument(
        "--tensor-parallel-size", type=positive, help="devices in the mesh; all local devices when not given"
    )
    group.add_argument("--plan", default="auto", help="a name in configs/plans, or a path to a TOML file")
    group.add_argument(
        "--max-model-len", type=positive, help="tokens of prompt and output together; the model's own when not given"
    )
    group.add_argument(
        "--tokens-per-step", type=positive, default=2048, help="rows of the largest step, decode and prefill together"
    )
    group.add_argument(
        "--decode-slots",
        type=positive,
        help="requests that run at once; 5/8 of --tokens-per-step when not given, 64 on a CPU",
    )
    group.add_argument("--page-size", type=positive, default=64, help="tokens per KV page")
    group.add_argument(
        "--kv-cache-tokens", type=positive, help="size of the KV pool; what memory allows when not given"
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
    group.add_argument("--cpu-devices", type=positive, metavar="N", help="run on the CPU as N devices")
    several = p.add_argument_group(
        "several processes as one replica",
        "The same command in each; process 0 alone reads input, writes output and shows progress.",
    )
    several.add_argument(
        "--distributed", action="store_true", help="join the processes that JAX finds: SLURM, Kubernetes, Open MPI"
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: where process 0 listens")
    several.add_argument("--num-processes", type=positive, metavar="N", help="and how many there are")
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


def llm_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of a command with model options, `LLM`'s arguments."""
    repeatable = ("deterministic", "seed") if hasattr(args, "deterministic") else ()
    given = {name: getattr(args, name) for name in repeatable}
    return {"model": args.model, **{name: getattr(args, name) for name in MODEL_OPTIONS}, **given}


def make_llm(args: argparse.Namespace, **more: Any) -> Any:
    """The LLM of a command with model options."""
    from nanoflow_jax.api import LLM

    return LLM(**llm_options(args), progress=not args.quiet, **more)
