"""How right an answer is, from 0 to 1, and what a mean of such scores is worth."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Scores = Sequence[float] | np.ndarray


def exact_match(answer: str, target: str) -> float:
    """Equal, but for white space around."""
    return float(answer.strip() == target.strip())


def contains(answer: str, target: str) -> float:
    """The target is somewhere in the answer."""
    return float(target.strip() in answer)


def f1(answer: str, target: str) -> float:
    """Harmonic mean of precision and recall over words, as in SQuAD: lower case, no punctuation, no articles."""
    given, wanted = _words(answer), _words(target)
    if not given or not wanted:
        return float(given == wanted)
    same = sum((Counter(given) & Counter(wanted)).values())
    return 2 * same / (len(given) + len(wanted))


def _words(text: str) -> list[str]:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def accuracy(logprobs: Sequence[float], choices: Sequence[str], right: int) -> float:
    """The likeliest choice is the right one; of equally likely ones the first counts."""
    return float(int(np.argmax(logprobs)) == right)


def accuracy_norm(logprobs: Sequence[float], choices: Sequence[str], right: int) -> float:
    """The same, with the log-probability of each choice divided by its length in characters."""
    return float(int(np.argmax([lp / max(1, len(c)) for lp, c in zip(logprobs, choices, strict=True)])) == right)


TEXT_METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "contains": contains, "f1": f1}
CHOICE_METRICS: dict[str, Callable[[Sequence[float], Sequence[str], int], float]] = {
    "accuracy": accuracy,
    "accuracy_norm": accuracy_norm,
}


@dataclass(frozen=True)
class Mean:
    """The mean of n scores and its standard error, the sample's standard deviation over sqrt(n); NaN for n = 1."""

    value: float
    stderr: float
    n: int


def mean(scores: Scores) -> Mean:
    values = np.asarray(scores, np.float64)
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Mean(float(values.mean()), stderr, len(values))


@dataclass(frozen=True)
class PairedDifference:
    """Mean of the differences of n samples that both runs answered, its standard error, and the two-sided p-value of
    no difference (normal approximation; 1 where no sample differs)."""

    value: float
    stderr: float
    p_value: float
    n: int


def paired_difference(new: Scores, old: Scores) -> PairedDifference:
    """new - old, sample by sample."""
    found = mean(np.asarray(new, np.float64) - np.asarray(old, np.float64))
    if found.n == 1:
        p_value = math.nan
    elif found.stderr == 0:
        p_value = 1.0 if found.value == 0 else 0.0
    else:
        p_value = math.erfc(abs(found.value) / found.stderr / math.sqrt(2))
    return PairedDifference(found.value, found.stderr, p_value, found.n)
