"""Everything that a GPU is needed for, in calls of a few minutes: does it run, is it right, how fast is it.

    python -m tools.gpu_session results --call a
    python -m tools.gpu_session results --call b    # by what call A said

Each part is a process with a time limit of its own, so that a failure loses that part only; what depends on it is
skipped. RESULTS gets one archive, session.tar.gz, renewed every 15 s and after every part: a JSON file and a log per
part, session.json, and summary.md. A second one, cache.tar.gz, holds the compiled programs. A later call takes both up:
from RESULTS, or from the folder that --from names. Parts that were done with the same sources are not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kernels_pallas.bench.report import commit
from kernels_pallas.tuning import DECODE
from nanoflow_jax.config import configs_root
from nanoflow_jax.system.output_files import create
from nanoflow_jax.system.platform import CUDA, has_gpu
from nanoflow_jax.version import __version__
from tools.gpu_session import archive, new_parser
from tools.gpu_session.parts import SECONDS, TINY_SLOWER, Part, call_a, call_b, cap, later, tiny
from tools.gpu_session.report import summary
from tools.gpu_session.run import Session, result

PROGRAM = "tools.gpu_session"
ROOT = Path(__file__).parents[2]
CACHE_BYTES = 3 * archive.PART_BYTES - 10**6  # of compiled programs that are kept
FLAGS = "--xla_gpu_experimental_enable_fusion_autotuner=false"  # it doubles compiling, and GEMMs are cuBLASLt's


def environment(work: Path, on_cpu: bool) -> dict[str, str]:
    """Of the parts."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found.setdefault("NANOFLOW_COMPILE_CACHE", str(work / "cache"))  # one of the user's own is not archived
    if on_cpu:
        return found | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    found["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
    if (CUDA / "bin" / "ptxas").exists():  # JAX alone would take the folder of CUDA's wheels for the toolkit
        found.setdefault("CUDA_ROOT", str(CUDA))
        found["PATH"] = os.pathsep.join([found.get("PATH", os.defpath), str(CUDA / "bin")])
    return found


def digest() -> str:
    """Of the sources and configs that the parts run."""
    total = hashlib.sha256()
    for root in (ROOT / "nanoflow_jax", ROOT / "kernels_pallas", ROOT / "tools", configs_root()):
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".toml", ".json"):
                total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()[:12]


def gpu_line() -> str:
    """Name, memory and driver, without JAX, which would take the memory."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return "; ".join(done.stdout.strip().splitlines()) or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(PROGRAM, __doc__)
    parser.add_argument("results", type=Path, help="folder for the archives; made when it is not there")
    parser.add_argument("--call", choices=tuple(SECONDS), help="which parts; with --tiny, a and b when not given")
    parser.add_argument("--seconds", type=float, help=f"for all parts together (default: by the call, {SECONDS})")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only (--list names them)")
    parser.add_argument("--list", action="store_true", help="print the parts with their limits and commands, and end")
    parser.add_argument("--tiny", action="store_true", help="all parts at tiny size, on the CPU")
    parser.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="with an earlier call's archives")
    parser.add_argument("--assume", choices=("good", "bad"), help="of call A, for call B, whatever it said")
    parser.add_argument(
        "--work", type=Path, default=Path("build/gpu-session"), metavar="FOLDER",
        help="where parts run and programs are compiled to; the same in every call (default: build/gpu-session)",
    )  # fmt: skip
    parser.add_argument(
        "--transformers-python", metavar="PATH", default=sys.executable, help="a Python with torch and transformers"
    )
    return parser


def parts_of(call: str, options: argparse.Namespace, statuses: dict[str, str], gpu: str) -> list[Part]:
    key = next((key for key in DECODE if key in gpu.lower()), None)
    if call == "b":
        if options.assume:
            statuses = {part.name: "done" if options.assume == "good" else "assumed bad" for part in call_a()}
        parts = call_b(statuses, key)
    else:
        parts = call_a() if call == "a" else later(options.transformers_python, key)
    return [tiny(part) for part in parts] if options.tiny else parts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.call and not options.tiny and not options.list:
        parser.error("--call: a, b or later is needed")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds: {options.seconds:g} is not accepted; it must be above 0")
    calls = [options.call] if options.call else ["a", "b", *(["later"] if options.list else [])]
    if options.list:
        options.assume = options.assume or "good"
        for call in calls:
            parts = parts_of(call, options, {}, "")
            print(f"call {call}: {cap(parts)} s at most")
            for part in parts:
                print(f"  {part.name} ({part.seconds} s): {shlex.join([*part.prefix, 'python', *part.arguments])}")
        return 0
    if not options.tiny and not has_gpu():
        print(f"{PROGRAM}: no NVIDIA GPU on this machine; --tiny runs every part on the CPU", file=sys.stderr)
        return 2
    try:
        options.results.mkdir(parents=True, exist_ok=True)
        work = options.work.resolve()
        (work / "cache").mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    if options.source and not options.source.is_dir():
        parser.error(f"--from: {options.source} is not a folder")
    return _run(parser, options, calls, work, list(sys.argv[1:] if arguments is None else arguments))


def _run(
    parser: argparse.ArgumentParser, options: argparse.Namespace, calls: list[str], work: Path, arguments: list[str]
) -> int:
    began, source = time.monotonic(), options.source or options.results
    folder = archive.emptied(work / "results")
    for name, into in (("session", folder), ("cache", work / "cache")):
        if (data := archive.read(source, name)) is not None:
            archive.unpack(data, into)
    gpu = "none: tiny sizes on the CPU, whose figures mean nothing" if options.tiny else gpu_line()
    header = {
        "GPU": gpu,
        "versions": ", ".join(
            [f"nanoflow_jax {__version__}", *(f"{package} {version(package)}" for package in ("jax", "jaxlib"))]
        ),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": f"{commit() or 'unknown'}, sources {digest()}",
        "command": f"`{shlex.join(['python', '-m', PROGRAM, *arguments])}`",
    }
    known = result(folder / "session.json") or {}
    headers: list[dict[str, str]] = [*known.get("headers", []), header]
    state: dict[str, dict[str, Any]] = known.get("parts", {})
    cached: set[str] = set()

    def save() -> None:
        whole = json.dumps({"headers": headers, "parts": state}, indent=1) + "\n"
        archive.replace(folder / "session.json", whole.encode())
        table = {name: {**one, "result": result(folder / f"{name}.json")} for name, one in state.items()}
        with create(folder / "summary.md") as file:
            file.write(summary(headers, table).encode())
        renewed.now()

    def renew() -> None:
        archive.write(archive.packed(folder), options.results, "session")

    def save_cache() -> None:
        nonlocal cached
        programs = {path.name for path in (work / "cache").rglob("*")}
        if programs != cached:
            archive.write(archive.packed(work / "cache", CACHE_BYTES), options.results, "cache")
            cached = programs

    usual = sum(SECONDS[call] for call in calls) * (TINY_SLOWER if options.tiny else 1)
    seconds = usual if options.seconds is None else options.seconds
    renewed = archive.Renewed(renew)
    session = Session(folder, environment(work, options.tiny), began + seconds, digest(), save, state)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    asked: list[Part] = []
    with renewed:
        try:
            save()
            for call in calls:
                statuses = {name: one["status"] for name, one in state.items()}
                parts = parts_of(call, options, statuses, gpu)
                if unknown := set(options.only or ()) - {part.name for part in parts}:
                    parser.error(f"--only: {sorted(unknown)[0]!r} is no part of call {call}; --list names them")
                parts = [part for part in parts if not options.only or part.name in options.only]
                asked += parts
                session.run(parts)
                save_cache()
        finally:
            signal.signal(signal.SIGTERM, before)
            session.kill()
            save_cache()
    print((folder / "summary.md").read_text())
    return int(any(state.get(part.name, {}).get("status") != "done" for part in asked))


if __name__ == "__main__":
    sys.exit(main())
