"""The parts of a GPU session, in order of importance: each is one command with a time limit of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

THROUGHPUT = ("-m", "nanoflow_jax", "bench", "throughput", "--json", "--quiet")
HOST = ("-m", "nanoflow_jax", "bench", "host", "--json")
LENGTHS = ("512:512", "1024:512", "512:1024")  # NanoFlow's constant workloads


@dataclass(frozen=True)
class Part:
    """arguments: of Python. seconds: its time limit. What it prints is its result, a JSON object; {out} in an argument
    is the session's folder."""

    name: str
    arguments: tuple[str, ...]
    seconds: int


def parts(transformers_python: str, tiny: bool = False) -> list[Part]:
    """All parts; tiny: the same at a size that a laptop runs."""
    return _tiny(transformers_python) if tiny else _full(transformers_python)


def throughput_commands(chosen: list[Part]) -> list[list[str]]:
    """What each throughput part asks of `nanoflow`, for those that want to compile it beforehand."""
    return [list(part.arguments[2:]) for part in chosen if part.arguments[: len(THROUGHPUT)] == THROUGHPUT]


def _full(python: str) -> list[Part]:
    """A window must be as long as a request lives, so runs with 1024 output tokens take twice the time. Where two ways
    are compared, fewer layers (all are alike) keep the slower one within its limit."""

    def run(name: str, seconds: int, limit: int, *arguments: str) -> Part:
        return Part(name, (*THROUGHPUT, "--seconds", str(seconds), *arguments), limit)

    model = ("--model", "llama-3.1-8b", "--tensor-parallel-size", "1")
    rank = ("--model", "llama-3.1-70b", "--rank-of", "8", "--attention-backend", "mosaic")
    found = [
        Part("correctness", ("-m", "nanoflow_jax.bench.attention_check"), 180),
        Part("kernels", _kernels("--quick", "--minutes", "3"), 300),
    ]
    for lengths in LENGTHS:
        seconds = 150 if lengths.endswith(":1024") else 90
        workload = ("--workload", f"constant:{lengths}", "--attention-backend", "mosaic")
        found.append(run(f"8b_{_slug(lengths)}", seconds, seconds + 150, *model, *workload))
    # The whole 70B model for one workload: 80 layers compile for minutes, and a request lives long.
    whole = (*rank, "--workload", "constant:512:512", "--plan")
    found += [run(f"70b_rank_512_512_{p}", 100, 540, *whole, p) for p in ("nanoflow_70b", "sequential")]
    for lengths in LENGTHS[1:]:
        workload = ("--layers", "20", "--workload", f"constant:{lengths}")
        compared = ("--plan", "nanoflow_70b", "--compare", "sequential")
        found.append(run(f"70b_rank_{_slug(lengths)}", 60, 300, *rank, *workload, *compared))
    peer = ("--with-transformers", "--transformers-python", python, "--transformers-seconds", "120")
    eight = (*model, "--workload", "constant:512:512", "--attention-backend", "mosaic")
    found.append(run("8b_transformers", 90, 480, *eight, *peer))
    found.append(run("8b_deterministic", 60, 240, *eight, "--layers", "8", "--compare", "deterministic"))
    for lengths in LENGTHS:
        workload = ("--workload", f"constant:{lengths}", "--attention-backend", "mosaic", "--layers", "8")
        found.append(run(f"8b_attention_{_slug(lengths)}", 60, 240, *model, *workload, "--compare", "xla-attention"))
    shared = ("--workload", "shared:448:512:64", "--attention-backend", "mosaic", "--layers", "8")
    found.append(run("8b_prefix", 45, 240, *model, *shared, "--compare", "no-prefix-caching"))
    found.append(Part("host", HOST, 120))
    ops = ("--model", "llama-3.1-70b", "--devices", "8", "--points", "few")
    found.append(Part("profile", _profile("profile-70b-rank.jsonl", *ops), 600))
    return found


def _tiny(python: str) -> list[Part]:
    small: Any = (
        *("--model", "tiny", "--layers", "1", "--tokens-per-step", "32", "--decode-slots", "16"),
        *("--page-size", "16", "--workload", "constant:12:20", "--requests", "150"),
    )
    one = (*small, "--tensor-parallel-size", "1")
    peer = ("--with-transformers", "--transformers-python", python, "--transformers-seconds", "60")
    return [
        Part("correctness", ("-m", "nanoflow_jax.bench.attention_check", "--tiny"), 300),
        Part("kernels", _kernels("--interpret"), 300),
        Part("8b_512_512", (*THROUGHPUT, *one, "--compare", "deterministic"), 300),
        Part("8b_transformers", (*THROUGHPUT, *one, *peer), 300),
        Part("70b_rank_512_512", (*THROUGHPUT, *small, "--rank-of", "8", "--gpu", "h200"), 300),
        Part("host", (*HOST, "--requests", "64", "--tokens", "128", "--steps", "40"), 120),
        Part("profile", _profile("profile-tiny.jsonl", "--points", "few", "--ops", "copy", "gemm", "norm"), 120),
    ]


def _kernels(*arguments: str) -> tuple[str, ...]:
    return ("-m", "kernels_pallas.bench", "--markdown", "{out}/kernels.md", *arguments)


def _profile(table: str, *arguments: str) -> tuple[str, ...]:
    """A run that was stopped goes on in the same table."""
    return ("-m", "nanoflow_jax", "profile", "--json", "--quiet", "--output", f"{{out}}/{table}", *arguments)


def _slug(lengths: str) -> str:
    return lengths.replace(":", "_")
