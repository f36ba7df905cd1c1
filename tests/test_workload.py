"""Workloads: lengths as published, the same for the same seed, and errors of one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nanoflow_jax.config import ConfigError
from nanoflow_jax.workload import BenchRequest, Lengths, load_workload

# Mean prompt and output tokens of NanoFlow's traces, and their coefficients of variation (its Table 4).
PUBLISHED = {
    "sharegpt": (299, 324, 547 / 246, 244 / 322),
    "lmsys": (92, 207, 169 / 102, 210 / 222),
    "splitwise": (1155, 211, 1109 / 1155, 163 / 211),
}


def lengths(requests: list[BenchRequest]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([len(r.prompt_token_ids) for r in requests]), np.array([r.output_tokens for r in requests])


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("limit", [4096, 8192])
def test_means_are_the_published_ones(name: str, limit: int):
    prompt, output, *_ = PUBLISHED[name]
    prompts, outputs = lengths(load_workload(name).requests(1000, limit, 1000, seed=1))
    assert prompts.mean() == pytest.approx(prompt, rel=0.01)
    assert outputs.mean() == pytest.approx(output, rel=0.01)
    assert (prompts + outputs).max() <= limit
    assert min(prompts.min(), outputs.min()) >= 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_spread_is_the_published_one(name: str):
    """Where nothing is cut off, the standard deviation over the mean is Table 4's."""
    _, _, prompt, output = PUBLISHED[name]
    prompts, outputs = lengths(load_workload(name).requests(20_000, 200_000, 10, seed=0))
    assert prompts.std() / prompts.mean() == pytest.approx(prompt, rel=0.05)
    assert outputs.std() / outputs.mean() == pytest.approx(output, rel=0.05)


def test_order_is_random_and_seeded():
    workload = load_workload("lmsys")
    first, same, other = (workload.requests(200, 4096, 500, seed) for seed in (3, 3, 4))
    assert first == same
    assert first != other
    prompts, outputs = lengths(first)
    for drawn in (prompts, outputs):
        assert abs(np.corrcoef(np.arange(200), drawn)[0, 1]) < 0.25
    assert abs(np.corrcoef(prompts, outputs)[0, 1]) < 0.25
    assert {t for r in first for t in r.prompt_token_ids} <= set(range(500))


def test_a_limit_near_the_mean_moves_the_median_to_keep_the_mean():
    drawn = Lengths(100, 1.0).sample(4000, 200, np.random.default_rng(0))
    assert drawn.mean() == pytest.approx(100, rel=0.01)
    assert drawn.max() == 200


def test_constant():
    requests = load_workload("constant:5:7").requests(3, 12, 50, seed=0)
    assert [x.tolist() for x in lengths(requests)] == [[5] * 3, [7] * 3]
    assert requests[0].prompt_token_ids != requests[1].prompt_token_ids
    assert load_workload("constant").limit(4096) == 1024


def test_lines_of_a_file(tmp_path: Path):
    lines = [
        {"prompt_tokens": 4, "output_tokens": 9},
        {"prompt": [1, 2, 3], "max_tokens": 2},
        {"prompt": "ab", "max_tokens": 1},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    workload = load_workload(str(path), lambda text: [ord(c) for c in text])
    requests = workload.requests(5, 13, 128, seed=0)
    assert [len(r.prompt_token_ids) for r in requests] == [4, 3, 2, 4, 3]
    assert [r.output_tokens for r in requests] == [9, 2, 1, 9, 2]
    assert requests[1].prompt_token_ids == [1, 2, 3]
    assert requests[2].prompt_token_ids == [97, 98]
    assert workload.limit(100) == 13
    with pytest.raises(ConfigError, match=r"4 \+ 9 tokens; accepted: at most max_model_len = 12"):
        workload.requests(1, 12, 128, seed=0)
    with pytest.raises(ConfigError, match="token id outside 0 to 50"):
        workload.requests(3, 13, 51, seed=0)
    with pytest.raises(ConfigError, match="a request of 13 tokens; the model takes at most 8"):
        workload.limit(8)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("constant:5", "expected constant:PROMPT:OUTPUT"),
        ("constant:5:0", "expected constant:PROMPT:OUTPUT"),
        ("constant:-5:5", "expected constant:PROMPT:OUTPUT"),
        ("sharegtp", "unknown name 'sharegtp'; accepted: constant, lmsys, sharegpt, splitwise"),
        ("missing.jsonl", "missing.jsonl: cannot be read"),
    ],
)
def test_names_that_are_not_accepted(name: str, message: str):
    with pytest.raises(ConfigError, match=message) as error:
        load_workload(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"prompt_tokens": 1}', "expected an object"),
        ('{"prompt_tokens": 0, "output_tokens": 1}', "'prompt_tokens': 0 is not accepted"),
        ('{"prompt_tokens": 1, "output_tokens": true}', "'output_tokens': True is not accepted"),
        ('{"prompt": [], "max_tokens": 1}', "expected a text or a list of token ids, not empty"),
        ('{"prompt": [1.5], "max_tokens": 1}', "expected a text or a list of token ids, not empty"),
        ('{"prompt": "a", "max_tokens": 1}', "the model has no tokenizer"),
    ],
)
def test_lines_that_are_not_accepted(line: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt_tokens": 1, "output_tokens": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message) as error:
        load_workload(str(path))
    assert str(error.value).startswith(f"{path}:2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[prompt_tokens]\nmean = 5\nsigma = 1\n", r"table \[output_tokens\] must hold"),
        ("speed = 1\n", "unknown field 'speed'"),
        (
            "[prompt_tokens]\nmean = 0.5\nsigma = 1\n[output_tokens]\nmean = 1\nsigma = 1\n",
            r"prompt_tokens.mean = 0.5 is not accepted",
        ),
        ("mean = ", "not a TOML file"),
    ],
)
def test_files_of_lengths_that_are_not_accepted(text: str, message: str, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_workload(str(path))


def test_lengths_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"max_model_len: 700 is too short .* accepted: at least 935"):
        load_workload("sharegpt").requests(10, 700, 100, seed=0)
    load_workload("sharegpt").requests(10, 935, 100, seed=0)


def test_common_beginnings():
    workload = load_workload("shared:6:9:4:3")
    requests = workload.requests(200, 13, 1000, seed=5)
    assert workload.limit(100) == 13
    beginnings = {tuple(r.prompt_token_ids[:6]) for r in requests}
    assert len(beginnings) == 3
    assert len({tuple(r.prompt_token_ids[6:]) for r in requests}) == 200
    assert {(len(r.prompt_token_ids), r.output_tokens) for r in requests} == {(9, 4)}
    one = load_workload("shared:6:9:4").requests(20, 13, 1000, seed=5)
    assert len({tuple(r.prompt_token_ids[:6]) for r in one}) == 1
    assert requests == workload.requests(200, 13, 1000, seed=5)


@pytest.mark.parametrize(
    "text", ["shared:5", "shared:5:6", "shared:7:6:1", "shared:0:6:1", "shared:1:6:1:0", "shared:a:6:1"]
)
def test_common_beginnings_that_are_not_accepted(text: str):
    with pytest.raises(ConfigError, match=r"expected shared:PREFIX:PROMPT:OUTPUT\[:GROUPS\]") as error:
        load_workload(text)
    assert "\n" not in str(error.value)
