"""Kill -9 at random points: the results are those of an undisturbed run, byte for byte after sorting."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from nanoflow_jax.evaluate.journal import record_number
from tests.evaluate.flags import FLAGS, Cli
from tests.evaluate.stand_in import answer_file

KILLS = 20
LINES = 700


def requests(count: int, most: int) -> bytes:
    """Prompts of several lengths, sampled with and without a seed, and some lines that cannot be served."""
    rng, lines = random.Random(5), []
    for i in range(count):
        line = {"custom_id": f"r{i % (count - 5)}", "prompt": f"{rng.randrange(10, 99)}+{rng.randrange(10, 99)}="}
        line |= {"max_tokens": rng.randrange(1, most), "temperature": float(i % 2)}
        line |= {"seed": i} if i % 4 == 1 else {}
        lines.append(b"{broken" if i % 50 == 7 else json.dumps(line).encode())
    return b"\n".join(lines) + b"\n"


def in_order(path: Path) -> list[bytes]:
    """The records, each whole, each once."""
    lines = path.read_bytes().splitlines(keepends=True)
    numbers = [record_number(line) for line in lines]
    assert None not in numbers
    assert len(set(numbers)) == len(numbers)
    return [line for _, line in sorted(zip(numbers, lines, strict=True))]


def killed(command: list[str], output: Path, growth: int, pause: float) -> bool:
    """Starts the command and kills it once its output has grown so much, and a moment later; False when it was done
    before that."""
    before = output.stat().st_size if output.exists() else 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and (output.stat().st_size if output.exists() else 0) < before + growth:
        time.sleep(0.002)
    time.sleep(pause)
    process.kill()
    return process.wait() == -signal.SIGKILL


def test_twenty_kills_in_one_run(tmp_path: Path) -> None:
    """A stand-in for the model; half of the kills at random times, half in the middle of a write."""
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_bytes(requests(LINES, 60))
    answer_file(source, whole)
    command = [sys.executable, str(Path(__file__).parent / "stand_in.py"), str(source), str(output), "--pause", "0.002"]
    rng, torn, done = random.Random(8), 0, 0
    for kill in range(KILLS):
        if kill % 2:
            assert killed(command, output, growth=rng.choice([0, 1, 3000]), pause=rng.random() * 0.05), kill
        else:
            assert killed([*command, "--tear", str(rng.randrange(1, 4))], output, growth=10**9, pause=0), kill
            torn += not output.read_bytes().endswith(b"\n")
        done = len(in_order_of_whole_lines(output))
        assert done < LINES, f"the run was over after {kill} kills"
    assert torn == KILLS // 2
    assert done > 50, "the kills came too early to say anything"
    subprocess.run(command, check=True, timeout=60)
    assert in_order(output) == in_order(whole)
    assert len(in_order(output)) == LINES


def in_order_of_whole_lines(path: Path) -> list[bytes]:
    return [] if not path.exists() else [x for x in path.read_bytes().splitlines(keepends=True) if record_number(x)]


def test_kills_of_the_real_thing(cli: Cli, tmp_path: Path) -> None:
    """`nanoflow batch` with a model, in deterministic mode: killed twice in processes of its own, then continued in
    this one; the undisturbed run happens in this one."""
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    source.write_bytes(requests(150, 60))
    assert cli("batch", "-i", str(source), "-o", str(whole))[0] == 0
    often = "from nanoflow_jax.evaluate import journal; journal.SYNC_SECONDS = 0.01"
    start = f"import sys; {often}; from nanoflow_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "batch", "-i", str(source), "-o", str(output), *FLAGS]
    assert killed(command, output, growth=1, pause=0.1)
    first = len(in_order_of_whole_lines(output))
    assert killed(command, output, growth=1, pause=0.0)
    second = len(in_order_of_whole_lines(output))
    assert 0 < first < second < 150, (first, second)
    status, printed, _ = cli("batch", "-i", str(source), "-o", str(output), "--json")
    assert status == 0
    report = json.loads(printed)
    assert report["lines"] == 150
    assert report["done_before"] == second
    assert in_order(output) == in_order(whole)
