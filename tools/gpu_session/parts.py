"""The parts of a GPU session as data: each is one process with a time limit, in calls that fit a lent machine's time.

Call A asks whether anything runs, whether it is right, and how fast the kernels are; call B, by what A said, measures
whole models or narrows an error down; `later` is what a longer time is for. Parts that are `at_once` run beside their
neighbours that are too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

SECONDS = {"a": 420, "b": 300, "later": 1500}  # of a call
TINY_SLOWER = 4  # times: what two slow processors under the interpreter may take
SANITIZER_SECONDS = 40  # after a part that failed
SANITIZER = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9")
AT_ONCE = 8  # processes, with a share of the memory each
SHARE = (("XLA_PYTHON_CLIENT_MEM_FRACTION", ".11"),)

CHECK = ("-m", "kernels_pallas.bench.check")
KERNELS = ("-m", "kernels_pallas.bench")
TOKENS = ("-m", "tools.gpu_session.attention_check")
THROUGHPUT = ("-m", "nanoflow_jax", "bench", "throughput", "--json", "--quiet")
HOST = ("-m", "nanoflow_jax", "bench", "host", "--json")

# As many as call A's 8B run needs, whose step the tokens' check compiles; and beside all of 8B's weights what fills an
# 80 GB or a 141 GB GPU to four fifths: of more, XLA's scheduler says that its memory is not enough.
RUN_PROMPT, RUN_OUTPUT = 256, 128
RUN_LENGTH = RUN_PROMPT + RUN_OUTPUT
RUN_TOKENS, WHOLE_TOKENS = 300_032, {"h100": 360_000, "h200": 760_000}
# With weights in fp8, whole on one GPU: the model, and what fills it likewise.
WHOLE_FP8 = {"h100": ("qwen3-32b", 120_064), "h200": ("llama-3.1-70b", 140_032)}
RANK_TOKENS = 600_064  # of 4 layers of a 70B rank, 2 KiB each


@dataclass(frozen=True)
class Part:
    """One process.

    arguments    of Python; what it prints is its result, a JSON object or one a line. {out}: the results' folder
    seconds      its time limit
    needs        parts that must be done; otherwise it is skipped
    sanitize     its smallest case, for compute-sanitizer once it has failed; () where there is none
    environment  added to the session's
    prefix       a program that runs Python
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()
    at_once: bool = False
    sanitize: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    prefix: tuple[str, ...] = ()


def grouped(parts: Sequence[Part]) -> list[list[Part]]:
    """What runs together, in order."""
    found: list[list[Part]] = []
    for at_once, some in groupby(parts, key=lambda part: part.at_once):
        members = list(some)
        size = AT_ONCE if at_once else 1
        found += [members[i : i + size] for i in range(0, len(members), size)]
    return found


def cap(parts: Sequence[Part]) -> int:
    """Seconds that they take at most."""
    return sum(max(part.seconds for part in group) for group in grouped(parts))


# -- call A

CHECKED = {  # name: kernel, and more arguments
    "decode": ("decode_attention",),
    "prefill": ("prefill_attention",),
    "append": ("append_kv",),
    "decode-fp8": ("decode_attention", "--fp8"),
    "append-fp8": ("append_kv", "--fp8"),
    "norm": ("add_rms_norm",),
    "norm-fp8": ("add_rms_norm", "--fp8"),
    "rows-fp8": ("rows_to_fp8",),
}
MEASURED = {  # case: seconds, and the check that it needs
    "decode_attention/70b-1280x1k": (16, "decode"),
    "prefill_attention/70b-8k": (22, "prefill"),
    "decode_attention/8b-32x4k": (15, "decode"),
    "append_kv/70b-2048": (13, "append"),
    "decode_attention/70b-1280x1k-fp8": (17, "decode-fp8"),
    "decode_attention/70b-1x32k": (15, "decode"),
    "append_kv/8b-8192": (12, "append"),
}
ATTENTION = [case for case in MEASURED if "attention" in case and "fp8" not in case]
ENGINE = ("check.decode", "check.prefill", "check.append", "check.norm")


def smallest(name: str) -> tuple[str, ...]:
    return (*CHECK, *CHECKED[name], "--smallest")


def check(name: str) -> Part:
    """A kernel's self-check."""
    arguments = (*CHECK, *CHECKED[name], "--repeats", "100")
    return Part(f"check.{name}", arguments, 75, ("machine",), True, smallest(name), SHARE)


def measured(case: str, seconds: int, needs: str) -> Part:
    kernel, _, shape = case.partition("/")
    arguments = (*KERNELS, "--ours", "--ceilings", "{out}/kernels.ceilings.json", "--case", case)
    name = f"kernels.{kernel.partition('_')[0]}-{shape}"
    return Part(name, arguments, seconds, (f"check.{needs}",), sanitize=smallest(needs))


def call_a() -> list[Part]:
    run = (
        *("--model", "llama-3.1-8b", "--layers", "8", "--one-shape", "--kv-cache-tokens", str(RUN_TOKENS)),
        *("--workload", f"constant:{RUN_PROMPT}:{RUN_OUTPUT}", "--seconds", "20", "--plan", "sequential"),
    )
    few = (*TOKENS, "--smallest")
    return [
        Part("machine", ("-m", "tools.gpu_session.machine_check"), 40),
        *map(check, CHECKED),
        Part("kernels.ceilings", (*KERNELS, "--only-ceilings"), 20, ("machine",)),
        *(measured(case, *rest) for case, rest in MEASURED.items()),
        Part("tokens.tiny", (*TOKENS, "--model", "tiny"), 38, ENGINE, sanitize=few),
        Part("tokens.8b", (*TOKENS, "--model", "8b"), 52, ENGINE, sanitize=few),
        Part("8b.8-layers", (*THROUGHPUT, *_mosaic(run)), 85, ("tokens.8b",), sanitize=few),
    ]


def _mosaic(arguments: Sequence[str]) -> tuple[str, ...]:
    return (*arguments, "--attention-backend", "mosaic", "--accept-unsteady", "--tensor-parallel-size", "1")


# -- call B


def failed(state: Mapping[str, str]) -> list[str]:
    """Parts of call A that were not done, by their statuses."""
    return [part.name for part in call_a() if state.get(part.name) != "done"]


def call_b(state: Mapping[str, str], gpu: str | None) -> list[Part]:
    """By what call A said: the statuses of its parts. gpu: a key of the tuning tables."""
    return good(gpu or "h100") if not failed(state) else bad(failed(state))


def good(gpu: str) -> list[Part]:
    whole = (
        *("--model", "llama-3.1-8b", "--one-shape", "--kv-cache-tokens", str(WHOLE_TOKENS[gpu])),
        *("--plan", "sequential"),
    )
    rank = (
        *("--model", "llama-3.1-70b", "--rank-of", "8", "--layers", "4", "--one-shape"),
        *("--kv-cache-tokens", str(RANK_TOKENS), "--workload", "constant:256:128", "--seconds", "12"),
        *("--attention-backend", "mosaic", "--accept-unsteady"),
    )
    return [
        Part("8b.whole", (*THROUGHPUT, *_mosaic((*whole, "--workload", "constant:512:512", "--seconds", "45"))), 125),
        *(Part(f"70b.{plan}", (*THROUGHPUT, *rank, "--plan", plan), 55) for plan in ("nanoflow_70b", "sequential")),
        Part("beside", ("-m", "tools.gpu_session.beside"), 35),
        Part("torch", ("-m", "kernels_pallas.bench.torch_worker", *ATTENTION), 30),
    ]


BISECTED = {
    "decode": ("--stages 2", "--step-pages 1"),
    "prefill": ("--no-ping-pong",),
    "append": ("--stages 2",),
    "decode-fp8": ("--stages 2",),
    "append-fp8": (),  # its kernel is append's
    "norm": ("--stages 2",),
    "norm-fp8": ("--stages 2",),
    "rows-fp8": (),  # of its tuning nothing is known to matter
}


def bad(wrong: Sequence[str]) -> list[Part]:
    """Which kernel, and without what it would be right; then the engine without command buffers."""
    tests = {part.sanitize for part in call_a() if part.name in wrong}
    names = [name for name in CHECKED if smallest(name) in tests]
    changes = [
        Part(
            f"bisect.{name}.{change.split()[0].strip('-')}",
            (*CHECK, *CHECKED[name], *change.split()), 45, at_once=True, environment=SHARE,
        )
        for name in names
        for change in BISECTED[name]
    ]  # fmt: skip
    looked = [
        Part(f"sanitize.{name}", smallest(name), 90, at_once=True, environment=SHARE, prefix=SANITIZER)
        for name in names
    ]
    plain = (*TOKENS, "--no-command-buffers", "--model")
    engine = [Part(f"tokens.{model}.no-command-buffers", (*plain, model), 50) for model in ("tiny", "8b")]
    return [*changes, *looked, *engine]


# -- later


def whole_fp8(gpu: str) -> Part:
    """Steps of as many rows as memory has requests for, by the search's plan for one GPU. Most of it is compiling."""
    model, tokens = WHOLE_FP8[gpu]
    arguments = (
        *("--model", model, "--quantization", "fp8", "--one-shape", "--kv-cache-tokens", str(tokens)),
        *("--tokens-per-step", "384", "--decode-slots", "192", "--workload", "constant:512:512", "--seconds", "60"),
        *("--plan", "sequential"),
    )
    return Part("fp8.whole", (*THROUGHPUT, *_mosaic(arguments)), 420)


def of_experts() -> list[Part]:
    """Grouped GEMMs, gathered rows and weighted sums of Qwen3-235B and gpt-oss-120b on one of eight GPUs: right, then
    how fast. A check of `later` is no part of call A, whose time is full."""
    arguments = (*CHECK, "grouped_gemm")
    cases = ("qwen3-235b-up-1152", "qwen3-235b-up-8192", "gpt-oss-120b-up-2112", "gpt-oss-120b-down-2112")
    moved = ("qwen3-235b-2432", "gpt-oss-120b-2112")
    names = [f"grouped_gemm/{name}" for name in cases]
    names += [f"{kernel}/{name}" for kernel in ("gather_rows", "combine_rows") for name in moved]
    timed = [a for name in names for a in ("--case", name)]
    smallest = (*arguments, "--smallest")
    return [
        Part("experts.check", (*arguments, "--repeats", "100"), 120, sanitize=smallest),
        Part("experts.kernels", (*KERNELS, "--ours", *timed), 240, ("experts.check",), sanitize=smallest),
    ]


def later(transformers_python: str, gpu: str | None) -> list[Part]:
    """What a longer time is for. A window must be as long as a request lives, so runs with 1024 output tokens take
    twice the time. Fewer layers, all alike, keep compiling short."""
    rank = ("--model", "llama-3.1-70b", "--rank-of", "8", "--layers", "20", "--attention-backend", "mosaic")
    eight = ("--model", "llama-3.1-8b", "--tensor-parallel-size", "1", "--attention-backend", "mosaic")
    found = []
    for lengths in ("512:512", "1024:512", "512:1024"):  # NanoFlow's constant workloads
        seconds = 120 if lengths.endswith(":1024") else 60
        arguments = ("--workload", f"constant:{lengths}", "--seconds", str(seconds), "--plan", "nanoflow_70b")
        compared = ("--compare", "sequential", "--one-shape")
        found.append(Part(f"70b.{lengths}", (*THROUGHPUT, *rank, *arguments, *compared), 2 * seconds + 180))
    timed = ("--workload", "constant:512:512", "--seconds", "60")
    shared = ("--workload", "shared:448:512:64", "--seconds", "45", "--layers", "8")
    python = ("--transformers-python", transformers_python, "--transformers-seconds", "120")
    ops = ("--model", "llama-3.1-70b", "--devices", "8", "--points", "few")
    return [
        *found,
        whole_fp8(gpu or "h100"),
        *of_experts(),
        Part("8b.transformers", (*THROUGHPUT, *eight, *timed, "--with-transformers", *python), 400),
        # Decode attention beside GEMMs against one after another: does overlap on one GPU pay?
        Part(
            "8b.lane", (*THROUGHPUT, *eight, *timed, "--layers", "8", "--plan", "auto", "--compare", "sequential"), 240
        ),
        Part("8b.deterministic", (*THROUGHPUT, *eight, *timed, "--layers", "8", "--compare", "deterministic"), 240),
        Part("8b.prefix", (*THROUGHPUT, *eight, *shared, "--compare", "no-prefix-caching"), 240),
        Part("host", HOST, 120),
        Part("profile", _profile("profile-70b-rank.jsonl", *ops), 600),
    ]


def _profile(table: str, *arguments: str) -> tuple[str, ...]:
    """A run that was stopped goes on in the same table."""
    return ("-m", "nanoflow_jax", "profile", "--json", "--quiet", "--output", f"{{out}}/{table}", *arguments)


# -- at tiny size


def tiny(part: Part) -> Part:
    """The same at a size that a laptop's CPU runs: kernels under the interpreter, an engine of one layer."""
    module, arguments = part.arguments[1], list(part.arguments)
    if module == CHECK[1]:
        arguments = [a for a in arguments if a not in ("--repeats", "100", "--smallest")]
        arguments += ["--smallest", "--interpret"]
    elif module == KERNELS[1]:
        for at in (i + 1 for i, argument in enumerate(arguments) if argument == "--case"):
            kernel = arguments[at].partition("/")[0]
            arguments[at] = TINY_CASES[kernel + ("-fp8" if arguments[at].endswith("-fp8") else "")]
        arguments.append("--interpret")
    elif module in (TOKENS[1], "tools.gpu_session.machine_check", "tools.gpu_session.beside"):
        arguments.append("--tiny")
    elif arguments[: len(THROUGHPUT)] == list(THROUGHPUT):
        arguments = [*THROUGHPUT, *_tiny_run(arguments)]
    elif arguments[: len(HOST)] == list(HOST):
        arguments += ["--requests", "64", "--tokens-per-step", "128", "--steps", "40"]
    elif "profile" in arguments:
        arguments = [*_profile("profile-tiny.jsonl", "--points", "few", "--ops", "copy", "gemm", "norm")]
    return replace(part, arguments=tuple(arguments), seconds=TINY_SLOWER * part.seconds, environment=())


TINY_CASES = {
    "decode_attention": "decode_attention/tiny-2xragged",
    "decode_attention-fp8": "decode_attention/tiny-2x70-fp8",
    "prefill_attention": "prefill_attention/tiny-24-after-50",
    "append_kv": "append_kv/tiny-5",
    "grouped_gemm": "grouped_gemm/tiny-up-24",
    "gather_rows": "gather_rows/tiny-24",
    "combine_rows": "combine_rows/tiny-24",
}
KEPT = ("--plan", "--compare", "--transformers-python")  # of a run, with what they name
FLAGS = ("--one-shape", "--accept-unsteady", "--with-transformers")


def _tiny_run(arguments: list[str]) -> list[str]:
    small = (
        *("--model", "tiny", "--layers", "1", "--tokens-per-step", "32", "--decode-slots", "16"),
        *("--page-size", "16", "--workload", "constant:12:20", "--requests", "60", "--accept-unsteady"),
    )
    found = [*small]
    for name in KEPT:
        found += [*arguments[arguments.index(name) : arguments.index(name) + 2]] if name in arguments else []
    found += [flag for flag in FLAGS if flag in arguments and flag not in found]
    if "--rank-of" in arguments:
        return [*found, "--rank-of", "8", "--gpu", "h200"]
    return [*found, "--tensor-parallel-size", "1"]
