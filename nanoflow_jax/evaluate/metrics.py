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


def pass_at(k: int, n: int, right: int) -> float:
    """The probability that at least one of k outputs is right, drawn from n of which `right` are: the unbiased estimate
    of Chen et al. (2021), 1 - C(n - right, k) / C(n, k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(answers: Sequence[str | None], targets: Sequence[str]) -> float:
    """The answer that most outputs give is right; of answers given equally often one is drawn, so their share counts.
    An output without an answer has no vote."""
    votes = Counter(answer.strip() for answer in answers if answer is not None)
    most = [answer for answer, count in votes.items() if count == max(votes.values())]
    return sum(any(exact_match(answer, t) for t in targets) for answer in most) / len(most) if most else 0.0


MAJORITY = "majority"
_PASS = re.compile(r"pass@([1-9][0-9]{0,3})")


def passes(metric: str) -> int | None:
    """The k of "pass@k"; None: it is another metric."""
    found = _PASS.fullmatch(metric)
    return int(found[1]) if found else None


def score_outputs(metrics: Sequence[str], answers: Sequence[str | None], targets: Sequence[str]) -> dict[str, float]:
    """Scores of one question by the answers of its n outputs, None where there is none: pass@k and majority of all by
    exact_match, the mean over the outputs of any other metric, each by the best of the targets."""

    def score(metric: str, answer: str | None) -> float:
        return 0.0 if answer is None else max(TEXT_METRICS[metric](answer, target) for target in targets)

    found = {}
    for metric in metrics:
        if (k := passes(metric)) is not None:
            right = sum(score("exact_match", answer) == 1 for answer in answers)
            found[metric] = pass_at(k, len(answers), right)
        elif metric == MAJORITY:
            found[metric] = majority(answers, targets)
        else:
            found[metric] = sum(score(metric, answer) for answer in answers) / len(answers)
    return found


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
