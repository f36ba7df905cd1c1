"""What fp8 weights do to next-token distributions, of the trained model that is embedded and of random ones: KL
divergence and greedy agreement against the same model in bfloat16, on the same tokens. The figures are in
docs/results/fp8_predicted.md; `-s` prints them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax.config import EMBEDDED
from nanoflow_jax.evaluate.prompts import samples
from nanoflow_jax.evaluate.tasks import load_task
from nanoflow_jax.models.quantised import Quantised
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.tokenizer import Tokenizer
from tests.reference.checkpoints import write_checkpoint
from tests.step.step_driver import Driver, Packer, logits_of

PROMPTS, LENGTH = 16, 40
SHAPE = StepShape(PROMPTS + 1, PROMPTS * LENGTH, PROMPTS + 1, pages_per_request=14)
TASKS = ("addition", "reverse", "sort", "lookup")


def texts(folder: Path) -> list[list[int]]:
    """Of tasks that the embedded model was trained for, solved examples: what it knows and what it cannot know."""
    tokenizer = Tokenizer(folder)
    found = [s for name in TASKS for s in samples(load_task(name), PROMPTS // len(TASKS))]
    return [tokenizer.encode(s.prompt, True)[:LENGTH] for s in found]


def distributions(driver: Driver, prompts: list[list[int]], change: Callable[[Quantised], Quantised]) -> np.ndarray:
    """Logprobs [positions, V] float64."""
    packer = Packer(prompts, SHAPE, driver.num_pages)
    steps = [packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(prompts)])]
    params = driver.params
    if driver.quantization:
        params = replace(params, layers=tuple(replace(x, down=change(x.down)) for x in params.layers))
    found = logits_of(driver, steps, params)
    logits = np.stack([found[place] for place in sorted(found)]).astype(np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        - logits.max(axis=1, keepdims=True)
    )


# Mean KL in nats and greedy agreement that must hold: a little worse than measured.
@pytest.mark.parametrize(("model", "most_kl", "least_same"), [("tiny", 0.02, 0.9), ("biases", 0.015, 0.9)])
def test_kl_and_greedy_agreement(model: str, most_kl: float, least_same: float, tmp_path: Path) -> None:
    """Of all positions, and of those where bfloat16 prefers its likeliest token by a factor of two."""
    trained = model == "tiny"
    folder = EMBEDDED["tiny"] if trained else write_checkpoint(model, tmp_path)
    plain, fp8 = (Driver(folder, load_plan("sequential"), SHAPE, 1, "bfloat16", quantization=q) for q in (None, "fp8"))
    rng = np.random.default_rng(0)
    prompts = texts(folder) if trained else rng.integers(0, plain.config.vocab_size, (PROMPTS, LENGTH)).tolist()
    p = distributions(plain, prompts, lambda w: w)

    def compared(change: Callable[[Quantised], Quantised]) -> tuple[float, float, float]:
        q = distributions(fp8, prompts, change)
        kl, same = (np.exp(p) * (p - q)).sum(axis=1), p.argmax(axis=1) == q.argmax(axis=1)
        best = np.sort(p, axis=1)
        sure = best[:, -1] - best[:, -2] > np.log(2)
        print(f"{model}: {len(kl)} positions, KL {kl.mean():.5f}, same {same.mean():.4f}, sure {sure.mean():.3f} "
              f"of them same {same[sure].mean():.4f}")  # fmt: skip
        return kl.mean(), same.mean(), same[sure].mean()

    kl, same, where_sure = compared(lambda w: w)
    assert 1e-5 < kl < most_kl
    assert same > least_same and where_sure > 0.97
    uneven = jnp.array([0.5, 1.5])
    broken, fewer, _ = compared(lambda w: replace(w, scale=w.scale * uneven[jnp.arange(w.scale.size) % 2]))
    coarse, *_ = compared(lambda w: replace(w, values=w.values.astype(jnp.float8_e5m2).astype(w.values.dtype)))
    assert broken > 2 * kl and fewer < same
    assert coarse > 1.1 * kl
