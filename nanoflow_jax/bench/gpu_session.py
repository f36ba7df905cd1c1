"""Everything that a GPU is needed for, in one command: correctness first, then kernels, throughput and host.

    python -m nanoflow_jax.bench.gpu_session results --minutes 25

Each part is a process of its own with a time limit, so that a failure loses that part only. The folder gets a JSON file
and a log per part, and `summary.md`, written anew after each part. Called again, parts that are done with the same
command and commit are not run again; those that failed, or for which no time was left, are.
"""

from __future__ import annotations

import argparse
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
from nanoflow_jax.bench.session_parts import Part, parts
from nanoflow_jax.bench.session_report import summary

PROGRAM = "nanoflow_jax.bench.gpu_session"
LEAST_SECONDS = 45  # of time left: less is not worth beginning a part


def run_part(part: Part, folder: Path, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """Runs one part and writes NAME.json and NAME.log. Returns its status, "done" or one line, and its seconds."""
    began = time.monotonic()
    command = [sys.executable, *(a.replace("{out}", str(folder)) for a in part.arguments)]
    draft, log = folder / f"{part.name}.part", folder / f"{part.name}.log"
    with draft.open("w") as out, log.open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)
        try:
            code = process.wait(limit)
            status = "done" if code == 0 else _last_line(log) or f"exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if _read(draft) is None:
        if status == "done":
            status = "printed no JSON"
        draft.unlink()
    else:  # also of one that failed: it says what
        os.replace(draft, folder / f"{part.name}.json")
    return {"status": status, "seconds": time.monotonic() - began}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].replace("|", "/")[:300] if lines else ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _gpu() -> str:
    """Name, memory and driver, without JAX, which would take the memory."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return "; ".join(done.stdout.strip().splitlines()) or "unknown"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for the results; made when it is not there")
    parser.add_argument("--minutes", type=float, default=25.0, help="for all parts together (default: 25)")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only (--list names them)")
    parser.add_argument("--list", action="store_true", help="print the parts with their limits and commands, and end")
    parser.add_argument("--tiny", action="store_true", help="all parts at tiny size, on the CPU")
    parser.add_argument(
        "--transformers-python", metavar="PATH", default=sys.executable, help="a Python with torch and transformers"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    all_parts = parts(options.transformers_python, options.tiny)
    if unknown := set(options.only or ()) - {p.name for p in all_parts}:
        parser.error(f"--only: {sorted(unknown)[0]!r} is no part; --list names them")
    chosen = [p for p in all_parts if not options.only or p.name in options.only]
    if options.list:
        for part in chosen:
            print(f"{part.name} ({part.seconds} s): {shlex.join(['python', *part.arguments])}")
        return 0
    if not options.tiny and not Path("/dev/nvidiactl").exists():
        print(f"{PROGRAM}: no NVIDIA GPU on this machine; --tiny runs every part on the CPU", file=sys.stderr)
        return 2
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{options.folder}: {error.strerror}")
    return _run(chosen, all_parts, options, sys.argv[1:] if arguments is None else list(arguments))


def _run(chosen: list[Part], all_parts: list[Part], options: argparse.Namespace, arguments: list[str]) -> int:
    folder, end, name = options.folder, time.monotonic() + options.minutes * 60, commit() or "unknown"
    environment = (
        {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} if options.tiny else dict(os.environ)
    )
    header = {
        "GPU": "none: tiny sizes on the CPU, whose figures mean nothing" if options.tiny else _gpu(),
        "versions": ", ".join(f"{package} {version(package)}" for package in ("nanoflow_jax", "jax", "jaxlib")),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "commit": name,
        "command": f"`{shlex.join(['python', '-m', PROGRAM, *arguments])}`",
    }
    state_file = folder / "session.json"
    state: dict[str, dict[str, Any]] = (_read(state_file) or {}).get("parts", {})

    def same(part: Part) -> bool:
        known = state.get(part.name, {})
        return known.get("command") == list(part.arguments) and known.get("commit") == name

    def save() -> None:
        draft = folder / "session.json.part"
        draft.write_text(json.dumps({"header": header, "parts": state}, indent=1) + "\n")
        os.replace(draft, state_file)
        table = {
            p.name: {**state[p.name], "result": _read(folder / f"{p.name}.json") if same(p) else None}
            if p.name in state
            else {"status": "not run", "seconds": 0, "result": None}
            for p in all_parts
        }
        (folder / "summary.md").write_text(summary(header, table))

    for part in chosen:
        if same(part) and state[part.name]["status"] == "done":
            print(f"{part.name}: done before", file=sys.stderr)
            continue
        limit = min(part.seconds, end - time.monotonic())
        (folder / f"{part.name}.json").unlink(missing_ok=True)
        found = {"status": "no time was left", "seconds": 0.0}
        if limit >= min(LEAST_SECONDS, part.seconds):
            found = run_part(part, folder, limit, environment)
        state[part.name] = {**found, "command": list(part.arguments), "commit": name}
        print(f"{part.name}: {found['status']} ({found['seconds']:.0f} s)", file=sys.stderr)
        save()
    save()
    print(folder / "summary.md")
    return int(any(state[p.name]["status"] != "done" for p in chosen))


if __name__ == "__main__":
    sys.exit(main())
