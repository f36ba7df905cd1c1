"""Benchmarks the kernels on this machine's GPU: first whether each is right, then its time with a cold L2, beside a
device copy and a GEMM of the same run, and beside other libraries' kernels where there are any. A JSON line per case
on standard output; with --out and --markdown also as one report, whole after every figure."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from kernels_pallas.bench import baselines, kernels, report
from kernels_pallas.bench.cases import CASES, QUICK, TINY, AppendCase, Case, DecodeCase, kind
from kernels_pallas.bench.expert_cases import ExpertCase
from kernels_pallas.bench.experts import time_experts
from kernels_pallas.bench.goals import expected_us, goal, known_gpu
from kernels_pallas.bench.kernels import Setting
from kernels_pallas.bench.measure import TINY_EFFORT, copy_bandwidth, gemm_rate, interpret_on_cpu
from kernels_pallas.targets import mosaic_supported
from kernels_pallas.tuning import DECODE, DEFAULT_GPU, GROUPED, tuned_gpu

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


def implementations(case: Case, setting: Setting, ours_alone: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every implementation in this process, as soon as it is measured: its name and {"error", "seconds"}, or why not.
    Ours is the first."""
    effort = setting.effort

    def ours(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if not mosaic_supported(setting.capability, kind(case)):
            major, minor = setting.capability
            return {"not_available": f"{kind(case)} has no Mosaic path on compute capability {major}.{minor}"}
        return _attempt(measure)

    other: tuple[str, Callable[[], dict[str, Any]]]
    if isinstance(case, ExpertCase):
        sets, calls = setting.sets(case), setting.calls(case)
        yield "mosaic", ours(lambda: time_experts(case, setting.mosaic(GROUPED), effort, sets, calls))
        other = "xla", lambda: time_experts(case, {}, effort, sets, calls)
    elif isinstance(case, AppendCase):
        yield "mosaic", ours(lambda: kernels.time_append(case, setting, "mosaic"))
        other = "xla", lambda: kernels.time_append(case, setting, "xla")
    elif isinstance(case, DecodeCase):
        inputs = kernels.DecodeInputs.make(case, setting)
        call = kernels.decode_call(case, setting)
        yield "mosaic", ours(lambda: kernels.time_decode(call, inputs, effort))
        interpret = setting.interpret is not None
        other = "jax triton", lambda: baselines.time_triton(case, inputs, effort, interpret)
    else:
        prompt = kernels.PrefillInputs.make(case, setting)
        attend = kernels.prefill_call(setting)
        yield "mosaic", ours(lambda: kernels.time_prefill(attend, prompt, effort))
        other = "jax cudnn", lambda: baselines.time_cudnn(case, prompt, effort)
    if not ours_alone:
        yield other[0], _attempt(other[1])


def _setting(options: argparse.Namespace) -> Setting:
    if not options.interpret:
        gpu = options.tuning or tuned_gpu(jax.devices()[0].device_kind)
        return Setting(gpu=gpu, capability=capability())
    from jax.experimental.pallas import mosaic_gpu as plgpu

    gpu = options.tuning or DEFAULT_GPU
    return Setting(gpu=gpu, effort=TINY_EFFORT, interpret=plgpu.InterpretGPUParams())


def _judged(case: Case, ours: dict[str, Any], tuning: str, device: str) -> dict[str, Any]:
    """What the tuning table expects, and on a GPU that has goals, whether the case's is met."""
    gpu = known_gpu(device)
    wanted = None if gpu is None else goal(case, gpu)
    return {"expected_us": expected_us(case, tuning)} | ({} if wanted is None else wanted.judge(ours))


def _ceilings(options: argparse.Namespace, setting: Setting) -> dict[str, float]:
    """Rates of the copy and the GEMM: measured now, or by an earlier process of the same session."""
    if options.ceilings is None:
        return {
            "copy_bytes_per_second": copy_bandwidth(setting.effort),
            "gemm_flops_per_second": gemm_rate(setting.effort),
        }
    try:
        lines = [json.loads(line) for line in options.ceilings.read_text().splitlines()]
    except (OSError, ValueError):
        return {}  # rates then stand without a share
    return {k: v for line in lines for k, v in line.items() if k.endswith("_per_second")}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--case", action="append", metavar="NAME", help="one case; may be repeated (--list names them)")
    parser.add_argument("--quick", action="store_true", help=f"the {len(QUICK)} cases that say most")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    parser.add_argument("--minutes", type=float, default=8.0, help="cases not begun by then are left out")
    parser.add_argument("--tuning", choices=sorted(DECODE), help="of the GPU; of the one at hand when not given")
    parser.add_argument("--ours", action="store_true", help="this package's kernels alone, without other libraries'")
    parser.add_argument("--no-torch", action="store_true", help="without PyTorch and FlashInfer, which come last")
    parser.add_argument("--ceilings", type=Path, metavar="FILE", help="the copy's and GEMM's rates: an earlier output")
    parser.add_argument("--only-ceilings", action="store_true", help="measure the copy and the GEMM, and end")
    parser.add_argument("--out", type=Path, help="JSON file, written after every figure")
    parser.add_argument("--markdown", type=Path, help="the same as tables")
    parser.add_argument("--interpret", action="store_true", help="tiny cases under the interpreter, on the CPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    cases = TINY if options.interpret else CASES
    if options.list:
        print("\n".join(cases))
        return 0
    names = options.case or (QUICK if options.quick and not options.interpret else list(cases))
    names = [] if options.only_ceilings else list(names)
    if unknown := [name for name in names if name not in cases]:
        parser.error(f"--case: {unknown[0]!r} is not a case; --list names them")
    for path in (options.out, options.markdown):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: {path.parent} is not a folder")
    command = list(sys.argv[1:] if arguments is None else arguments)
    if options.interpret:
        interpret_on_cpu()
    elif not Path("/dev/nvidiactl").exists():
        print(f"{PROGRAM}: {no_gpu()}", file=sys.stderr)
        return 2
    elif names and not options.ours and not options.no_torch and importlib.util.find_spec("torch"):
        return _with_torch(options, names, command)
    elif reason := no_gpu():
        print(f"{PROGRAM}: {reason}", file=sys.stderr)
        return 2
    return _measure(options, names, shlex.join(["python", "-m", PROGRAM, *command]))


def _measure(options: argparse.Namespace, names: list[str], command: str) -> int:
    started = time.monotonic()
    cases, setting = TINY if options.interpret else CASES, _setting(options)
    result = report.header(command, options.interpret)
    result |= {"tuning": setting.gpu, **_ceilings(options, setting), "left_out": []}
    print(json.dumps({k: v for k, v in result.items() if k != "cases"}), flush=True)
    copy, gemm = result.get("copy_bytes_per_second"), result.get("gemm_flops_per_second")
    for number, name in enumerate(names):
        if time.monotonic() - started > options.minutes * 60:
            result["left_out"] = names[number:]
            break
        print(f"{number + 1}/{len(names)} {name}", file=sys.stderr)
        case = result["cases"][name] = {"results": {}}
        for library, one in implementations(cases[name], setting, options.ours):
            case["results"][library] = report.with_rates(cases[name], one, copy, gemm)
            if library == "mosaic" and not options.interpret:
                case |= _judged(cases[name], case["results"][library], setting.gpu, result["device"])
            report.save(result, options.out, options.markdown)
        print(json.dumps({"case": name, **case}), flush=True)
    result["finished"] = not result["left_out"]
    report.save(result, options.out, options.markdown)
    ours = [case["results"].get("mosaic", {}) for case in result["cases"].values()]
    return int(any("failed" in one for one in ours))


def _with_torch(options: argparse.Namespace, names: list[str], command: list[str]) -> int:
    """Ours in a process that gives the GPU's memory back at its end, then PyTorch's in another."""
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "kernels.json"
        arguments = [*command, "--no-torch", "--out", str(out)]
        status = subprocess.run([sys.executable, "-m", PROGRAM, *arguments], check=False).returncode
        if not out.exists():
            return status
        result = json.loads(out.read_text())
        copy, gemm = result.get("copy_bytes_per_second"), result.get("gemm_flops_per_second")
        for library, figures in baselines.in_torch(names, timeout=options.minutes * 60 / 4).items():
            for name, case in result["cases"].items():
                absent = {"not_available": figures["not_available"]} if "not_available" in figures else None
                if record := figures.get(name, absent):
                    case["results"][library] = report.with_rates(CASES[name], record, copy, gemm)
                    print(json.dumps({"case": name, "results": {library: case["results"][library]}}), flush=True)
        report.save(result, out, options.markdown)
        return status


if __name__ == "__main__":
    sys.exit(main())
