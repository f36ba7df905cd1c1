"""What a benchmark asks for: lengths of prompts and outputs, from published figures or from a file of the user's.

A workload is `constant:PROMPT:OUTPUT`, `shared:PREFIX:PROMPT:OUTPUT[:GROUPS]` (each prompt of PROMPT tokens begins with
one of GROUPS common prefixes of PREFIX tokens), a name in `configs/workloads` (mean and sigma of log-normal lengths,
with their source), or a JSONL file with one request per line:

    {"prompt_tokens": 300, "output_tokens": 200}
    {"prompt": "text, or a list of token ids", "max_tokens": 200}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from nanoflow_jax.config import ConfigError, config_path
from nanoflow_jax.system.reading import Malformed, parse_json, read_text, read_toml

ROOM = 1.5  # a length limit below so many mean lengths would change the shape of the distribution
LONGEST = 4096  # tokens of prompt and output together where nothing says otherwise
CONSTANT = {
    "constant": "constant:PROMPT:OUTPUT, both at least 1",
    "shared": "shared:PREFIX:PROMPT:OUTPUT[:GROUPS], all at least 1, PREFIX at most PROMPT",
}
QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / 4096) for i in range(4096)])


@dataclass(frozen=True)
class Lengths:
    """Log-normal with this mean, in tokens; sigma is that of the logarithm, 0 makes all alike."""

    mean: float
    sigma: float

    def sample(self, count: int, longest: int, rng: np.random.Generator) -> np.ndarray:
        """Lengths [count], 1 to `longest`, whose mean is the published one: one of each of `count` equally likely
        strata, in random order, around a median that makes up for the tail cut off at `longest`."""
        if self.sigma == 0:
            return np.full(count, round(self.mean))
        strata = (np.arange(count) + rng.random(count)) / count
        normal = np.array([NormalDist().inv_cdf(min(max(p, 1e-9), 1 - 1e-9)) for p in strata.tolist()])
        lengths = np.exp(self._log_median(longest) + self.sigma * normal)
        return rng.permutation(np.clip(np.rint(lengths), 1, longest).astype(np.int64))

    def _log_median(self, longest: int) -> float:
        low, high = 0.0, float(np.log(longest))
        for _ in range(50):
            middle = (low + high) / 2
            mean = np.clip(np.exp(middle + self.sigma * QUANTILES), 1, longest).mean()
            low, high = (middle, high) if mean < self.mean else (low, middle)
        return low


@dataclass(frozen=True)
class BenchRequest:
    """What one request asks for: the prompt's tokens, and exactly so many tokens of output."""

    prompt_token_ids: list[int]
    output_tokens: int


@dataclass(frozen=True)
class Entry:
    """A line of a workload file. prompt_token_ids None: random ones."""

    prompt_tokens: int
    output_tokens: int
    prompt_token_ids: list[int] | None = None


@dataclass(frozen=True)
class Workload:
    """Length distributions, or the entries of a file, which are used in order and again from the first.

    prefix  tokens that a random prompt begins with, one of `groups` beginnings; 0: all prompts differ
    """

    name: str
    prompt: Lengths
    output: Lengths
    entries: tuple[Entry, ...] = ()
    prefix: int = 0
    groups: int = 1

    @property
    def mean_tokens(self) -> float:
        return self.prompt.mean + self.output.mean

    def limit(self, model_limit: int) -> int:
        """Length limit of prompt and output together that suits the workload and a model."""
        if self.entries:
            wanted = max(e.prompt_tokens + e.output_tokens for e in self.entries)
        elif self.prompt.sigma == self.output.sigma == 0:
            wanted = round(self.prompt.mean) + round(self.output.mean)
        else:
            return min(LONGEST, model_limit)
        if wanted > model_limit:
            raise ConfigError(
                f"workload: {self.name!r} has a request of {wanted} tokens; the model takes at most {model_limit}"
            )
        return wanted

    def requests(self, count: int, limit: int, vocabulary: int, seed: int) -> list[BenchRequest]:
        """`count` requests of at most `limit` tokens each, the same for the same seed. Random prompts draw their
        tokens from [0, vocabulary). Raises ConfigError when the lengths do not fit."""
        rng = np.random.default_rng(seed)
        chosen = self._chosen(count, limit, rng)
        prefixes = rng.integers(0, vocabulary, (self.groups, self.prefix))
        requests = []
        for entry in chosen:
            if entry.prompt_tokens + entry.output_tokens > limit:
                raise ConfigError(
                    f"workload: {self.name!r} has a request of {entry.prompt_tokens} + {entry.output_tokens} tokens; "
                    f"accepted: at most max_model_len = {limit} together"
                )
            ids = entry.prompt_token_ids
            if ids is None:
                ids = rng.integers(0, vocabulary, entry.prompt_tokens - self.prefix).tolist()
                if self.prefix:
                    ids = prefixes[rng.integers(self.groups)].tolist() + ids
            elif not 0 <= min(ids) <= max(ids) < vocabulary:
                raise ConfigError(f"workload: {self.name!r} has a token id outside 0 to {vocabulary - 1}")
            requests.append(BenchRequest(ids, entry.output_tokens))
        return requests

    def lengths(self, count: int, limit: int, seed: int) -> list[tuple[int, int]]:
        """Tokens of prompt and output of the same requests."""
        chosen = self._chosen(count, limit, np.random.default_rng(seed))
        return [(entry.prompt_tokens, entry.output_tokens) for entry in chosen]

    def _chosen(self, count: int, limit: int, rng: np.random.Generator) -> list[Entry]:
        if self.entries:
            return [self.entries[i % len(self.entries)] for i in range(count)]
        constant = self.prompt.sigma == self.output.sigma == 0
        if not constant and limit < ROOM * self.mean_tokens:
            raise ConfigError(
                f"max_model_len: {limit} is too short for workload {self.name!r}, whose requests have "
                f"{self.mean_tokens:.0f} tokens on average; accepted: at least {int(np.ceil(ROOM * self.mean_tokens))}"
            )
        # Each part may fill its share of the limit.
        longest = int(limit * self.prompt.mean / self.mean_tokens)
        prompts = self.prompt.sample(count, longest, rng)
        outputs = self.output.sample(count, limit - longest, rng)
        return [Entry(p, o) for p, o in zip(prompts.tolist(), outputs.tolist(), strict=True)]


def load_workload(text: str, encode: Callable[[str], list[int]] | None = None) -> Workload:
    """The workload that a command line names. `encode` turns a prompt's text into tokens; None: the model has no
    tokenizer. Raises ConfigError, one line."""
    if text.startswith(("constant:", "shared:")):
        return _constant(text)
    if text.endswith((".jsonl", ".json")):
        return _from_lines(Path(text), encode)
    return _from_toml(config_path("workloads", text))


def _constant(text: str) -> Workload:
    kind, *parts = text.split(":")
    numbers = [int(part) for part in parts if part.isdecimal()]
    good = len(numbers) == len(parts) and 0 not in numbers
    if good and kind == "constant" and len(parts) == 2:
        return Workload(text, Lengths(numbers[0], 0), Lengths(numbers[1], 0))
    if good and kind == "shared" and len(parts) in (3, 4) and numbers[0] <= numbers[1]:
        prefix, prompt, output, groups = (*numbers, 1)[:4]
        return Workload(text, Lengths(prompt, 0), Lengths(output, 0), prefix=prefix, groups=groups)
    raise ConfigError(f"workload: {text!r} is not accepted; expected {CONSTANT[kind]}")


def _from_toml(path: Path) -> Workload:
    table = read_toml(path)
    kinds = ("prompt_tokens", "output_tokens")
    if unknown := set(table) - {"description", *kinds}:
        raise ConfigError(f"{path}: unknown field {sorted(unknown)[0]!r}; accepted: description, {', '.join(kinds)}")
    found = []
    for kind in kinds:
        values = table.get(kind)
        if not isinstance(values, dict) or set(values) != {"mean", "sigma"}:
            raise ConfigError(f"{path}: table [{kind}] must hold 'mean' (tokens) and 'sigma' (0: all alike)")
        for name, low in (("mean", 1), ("sigma", 0)):
            value = values[name]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < 1e9:
                raise ConfigError(f"{path}: {kind}.{name} = {value!r} is not accepted; expected a number >= {low}")
        found.append(Lengths(values["mean"], values["sigma"]))
    return Workload(path.stem, found[0], found[1])


def _from_lines(path: Path, encode: Callable[[str], list[int]] | None) -> Workload:
    try:
        lines = read_text(path).splitlines()
    except ConfigError as error:
        raise ConfigError(f"workload: {error}; expected a JSONL file") from None
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entries.append(_entry(line, encode))
        except ConfigError as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
    if not entries:
        raise ConfigError(f"workload: {path} is empty; expected one JSON object per line")
    prompt, output = (float(np.mean([getattr(e, n) for e in entries])) for n in ("prompt_tokens", "output_tokens"))
    return Workload(path.stem, Lengths(prompt, 0), Lengths(output, 0), tuple(entries))


def _entry(line: str, encode: Callable[[str], list[int]] | None) -> Entry:
    try:
        fields = parse_json(line)
    except Malformed as error:
        raise ConfigError(f"not JSON ({error})") from None
    if isinstance(fields, dict) and set(fields) == {"prompt_tokens", "output_tokens"}:
        return Entry(_count("prompt_tokens", fields["prompt_tokens"]), _count("output_tokens", fields["output_tokens"]))
    if not isinstance(fields, dict) or set(fields) != {"prompt", "max_tokens"}:
        raise ConfigError("expected an object with prompt_tokens and output_tokens, or with prompt and max_tokens")
    prompt, output = fields["prompt"], _count("max_tokens", fields["max_tokens"])
    if isinstance(prompt, str):
        if encode is None:
            raise ConfigError("'prompt' is a text, and the model has no tokenizer; expected token ids")
        prompt = encode(prompt)
    if not isinstance(prompt, list) or not prompt or any(type(token) is not int for token in prompt):
        raise ConfigError("'prompt' is not accepted; expected a text or a list of token ids, not empty")
    return Entry(len(prompt), output, prompt)


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value < 10**9:
        raise ConfigError(f"{name!r}: {value!r} is not accepted; expected a whole number of at least 1, below 1e9")
    return value
