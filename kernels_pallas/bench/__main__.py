"""Benchmarks the kernels on this machine's GPU: first whether each is right, then its time with a cold L2, beside a
device copy and a GEMM of the same run, and beside other libraries' kernels where there are any. JSON, and Markdown."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.bench import baselines, kernels, report
from kernels_pallas.bench.cases import CASES, QUICK, TINY, AppendCase, Case, DecodeCase, kind
from kernels_pallas.bench.goals import GOALS_FOR, expected_us, goal
from kernels_pallas.bench.kernels import Setting
from kernels_pallas.bench.measure import TINY_EFFORT, copy_bandwidth, gemm_rate
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import DECODE, DEFAULT_GPU

PROGRAM = "kernels_pallas.bench"


def no_gpu() -> str | None:
    if not Path("/dev/nvidiactl").exists():  # asked first: looking for a GPU through JAX may print long errors
        return "no NVIDIA GPU on this machine; --interpret runs every kernel once, on the CPU"
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()!r} here, not on the GPU"
    return None


def capability() -> tuple[int, int]:
    major, minor = str(jax.devices()[0].compute_capability).split(".")
    return int(major), int(minor)


def _attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What is wrong, or does not fit into memory, is written down; the other cases still count."""
    try:
        return measure()
    except baselines.Missing as reason:
        return {"not_available": str(reason)}
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return {"failed": str(error).splitlines()[0]}


def implementations(case: Case, setting: Setting) -> dict[str, dict[str, Any]]:
    """Every implementation in this process: {"error", "seconds"}, or why not. Ours is the first."""
    effort, results = setting.effort, {}

    def ours(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not mosaic_supported(setting.capability, kind(case)):
            major, minor = setting.capability
            return {"not_available": f"{kind(case)} has no Mosaic path on compute capability {major}.{minor}"}
        return _attempt(measure)

    if isinstance(case, AppendCase):
        results["mosaic"] = ours(lambda: kernels.time_append(case, setting, "mosaic"))
        results["xla"] = _attempt(lambda: kernels.time_append(case, setting, "xla"))
    elif isinstance(case, DecodeCase):
        inputs = kernels.DecodeInputs.make(case, effort)
        call = kernels.decode_call(case, setting)
        results["mosaic"] = ours(lambda: kernels.time_decode(call, inputs, effort))
        interpret = setting.interpret is not None
        results["jax triton"] = _attempt(lambda: baselines.time_triton(case, inputs, effort, interpret))
    else:
        prompt = kernels.PrefillInputs.make(case, effort)
        attend = kernels.prefill_call(setting)
        results["mosaic"] = ours(lambda: kernels.time_prefill(attend, prompt, effort))
        results["jax cudnn"] = _attempt(lambda: baselines.time_cudnn(case, prompt, effort))
    return results


def _setting(interpret: bool, gpu: str) -> Setting:
    if not interpret:
        return Setting(gpu=gpu, capability=capability())
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return Setting(effort=TINY_EFFORT, interpret=plgpu.InterpretGPUParams())


def _judged(case: Case, ours: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What the tuning table expects, and on the GPU that has goals, whether the case's is met."""
    if options.interpret:
        return {}
    wanted = goal(case) if options.tuning == GOALS_FOR else None
    return {"expected_us": expected_us(case, options.tuning)} | ({} if wanted is None else wanted.judge(ours))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--case", action="append", metavar="NAME", help="one case; may be repeated (--list names them)")
    parser.add_argument("--quick", action="store_true", help=f"the {len(QUICK)} cases that say most")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--minutes", type=float, default=8.0, help="cases not begun by then are left out")
    parser.add_argument("--tuning", choices=sorted(DECODE), default=DEFAULT_GPU, help="of the GPU")
    parser.add_argument("--out", type=Path, help="JSON file, written after every case; standard output without it")
    parser.add_argument("--markdown", type=Path, help="the same as tables")
    parser.add_argument("--interpret", action="store_true", help="tiny cases under the interpreter, on the CPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    cases = TINY if options.interpret else CASES
    if options.list:
        print("\n".join(cases))
        return 0
    names = options.case or (QUICK if options.quick and not options.interpret else list(cases))
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"--case: {unknown[0]!r} is not a case; --list names them")
    for path in (options.out, options.markdown):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: {path.parent} is not a folder")
    elsewhere: dict[str, dict[str, Any]] = {}
    if options.interpret:
        jax.config.update("jax_platforms", "cpu")
    else:
        if not Path("/dev/nvidiactl").exists():
            print(f"{PROGRAM}: {no_gpu()}", file=sys.stderr)
            return 2
        # Before JAX takes the GPU's memory.
        elsewhere = baselines.in_torch(names, timeout=options.minutes * 60 / 4)
        if reason := no_gpu():
            print(f"{PROGRAM}: {reason}", file=sys.stderr)
            return 2
    setting = _setting(options.interpret, options.tuning)
    command = shlex.join(["python", "-m", PROGRAM, *(sys.argv[1:] if arguments is None else arguments)])
    result = report.header(command, options.interpret)
    copy, gemm = copy_bandwidth(setting.effort), gemm_rate(setting.effort)
    result |= {"copy_bytes_per_second": copy, "gemm_flops_per_second": gemm, "left_out": []}

    def save() -> None:
        if options.out:
            report.write(result, options.out)
        if options.markdown:
            options.markdown.write_text(report.markdown(result))

    for number, name in enumerate(names):
        if time.monotonic() - started > options.minutes * 60:
            result["left_out"] = list(names[number:])
            break
        print(f"{number + 1}/{len(names)} {name}", file=sys.stderr)
        found = implementations(cases[name], setting)
        for library, figures in elsewhere.items():
            absent = {"not_available": figures["not_available"]} if "not_available" in figures else None
            if record := figures.get(name, absent):
                found[library] = record
        rated = {library: report.with_rates(cases[name], one, copy, gemm) for library, one in found.items()}
        result["cases"][name] = {"results": rated} | _judged(cases[name], rated["mosaic"], options)
        save()
    result["finished"] = not result["left_out"]
    save()
    if not options.out:
        print(json.dumps(result, indent=2))
    ours = [case["results"].get("mosaic", {}) for case in result["cases"].values()]
    return int(any("failed" in one for one in ours))


if __name__ == "__main__":
    sys.exit(main())
