"""Stand-ins for the data sets of gsm8k and mmlu, for the dry run of docs/nightly.md: `python -m tools.nightly_data
FOLDER`.

In FOLDER, lm-evaluation-harness finds `openai/gsm8k` and `cais/mmlu` on the disk before it looks for those of the Hub:
its own tasks of these names run, with their prompts, filters and figures, on sums that the embedded model knows. The
columns and splits are those of the real sets, the questions are ours.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval

from nanoflow_jax.assets.tasks import problems

GSM8K, MMLU = {"train": 8, "test": 40}, {"dev": 5, "test": 4}  # questions of each split; of mmlu in each subject


def sums(split: Any, count: int, seed: int) -> Iterator[tuple[str, str]]:
    return ((p.prompt, p.answer) for p in islice(problems("addition", split, seed), count))


def gsm8k(split: str, count: int) -> Iterator[dict[str, Any]]:
    for prompt, answer in sums(split, count, 1):
        yield {"question": f"What is {prompt.rstrip('=')}?", "answer": f"{prompt}{answer}\n#### {answer}"}


def mmlu(subject: str, split: str, count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(f"{subject} {split}")
    for prompt, answer in sums("train" if split == "dev" else "test", count, rng.randrange(10**6)):
        choices = [str(int(answer) + by) for by in rng.sample([-10, -1, 1, 10], 3)]
        right = rng.randrange(4)
        choices.insert(right, answer)
        yield {"question": f"{prompt}?", "subject": subject, "choices": choices, "answer": right}


def write(folder: Path, configs: dict[str, dict[str, Iterator[dict[str, Any]]]]) -> None:
    """A data set with its configurations, each with splits."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, rows in splits.items():
            file = f"{name}-{split}.jsonl"
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            lines.append(f"  - {{split: {split}, path: {file}}}")
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def subjects() -> list[str]:
    """Of mmlu, as lm-eval names them."""
    tasks = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    found = [re.search(r'"dataset_name": "(\w+)"', path.read_text()) for path in sorted(tasks.glob("mmlu_*.yaml"))]
    return [match[1] for match in found if match]


def write_both(folder: Path) -> None:
    write(folder / "openai" / "gsm8k", {"main": {split: gsm8k(split, n) for split, n in GSM8K.items()}})
    write(folder / "cais" / "mmlu", {s: {split: mmlu(s, split, n) for split, n in MMLU.items()} for s in subjects()})


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools.nightly_data", description=__doc__)
    parser.add_argument("folder", type=Path)
    write_both(parser.parse_args().folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
