"""Compute data/sampler.npz: scores after the logits processors of Hugging Face transformers (README.md says how to run
it).

Each case is one row of random logits with a history. The processors run in float64, in vLLM's order; a case is refused
unless float32 and slightly different settings keep the same tokens.
"""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers
from transformers import (  # pyright: ignore[reportAttributeAccessIssue]
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

OUT = Path(__file__).parent / "data" / "sampler.npz"
VOCAB = 131
PROMPT_TOKENS, OUTPUT_TOKENS = 12, 9
SLACK = 1e-5  # a setting that is off by this fraction must keep the same tokens

BIAS = {3: 4.5, 77: -60.0, 130: 7.25, 0: -1.5}
ALLOWED = [0, 5, 17, 18, 64, 99, 100, 129, 130]
STOP = [2, 41, 128]

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.5},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"repetition_penalty": 3.0, "temperature": 0.7},
    {"logit_bias": BIAS},
    {"logit_bias": BIAS, "temperature": 1.7},
    {"allowed_token_ids": ALLOWED},
    {"allowed_token_ids": ALLOWED, "logit_bias": BIAS, "top_k": 4},
    {"min_tokens": OUTPUT_TOKENS + 1, "stop_token_ids": STOP},
    {"min_tokens": OUTPUT_TOKENS, "stop_token_ids": STOP},
    {"min_p": 0.02},
    {"min_p": 0.4},
    {"min_p": 1.0},
    {"min_p": 0.1, "temperature": 2.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 130},
    {"top_k": 500},
    {"top_p": 0.05},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"top_p": 0.8, "temperature": 1.9},
    {"top_k": 9, "top_p": 0.7},
    {"min_p": 0.05, "top_k": 20, "top_p": 0.9},
    {"min_p": 0.2, "top_p": 0.9, "temperature": 1.5},
    {"repetition_penalty": 1.8, "logit_bias": BIAS, "temperature": 0.8, "min_p": 0.01, "top_k": 30, "top_p": 0.92},
    {
        "allowed_token_ids": ALLOWED, "min_tokens": OUTPUT_TOKENS + 3, "stop_token_ids": [99, 5],
        "repetition_penalty": 1.2, "temperature": 1.3, "top_p": 0.85,
    },
]  # fmt: skip


def processors(case: dict[str, Any], slack: float) -> LogitsProcessorList:
    """Bias and constraints, repetition penalty, temperature, min-p, top-k, top-p."""
    chain: list[Any] = []
    if "logit_bias" in case:
        chain.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in case["logit_bias"].items()]))
    if "allowed_token_ids" in case:
        chain.append(PrefixConstrainedLogitsProcessor(lambda batch, ids: case["allowed_token_ids"], 1))
    if "min_tokens" in case:
        stop = torch.tensor(case["stop_token_ids"])
        chain.append(MinNewTokensLengthLogitsProcessor(PROMPT_TOKENS, case["min_tokens"], stop))
    if "repetition_penalty" in case:
        chain.append(RepetitionPenaltyLogitsProcessor(case["repetition_penalty"]))
    if "temperature" in case:
        chain.append(TemperatureLogitsWarper(case["temperature"]))
    if "min_p" in case:
        chain.append(MinPLogitsWarper(min(1.0, case["min_p"] * (1 + slack))))
    if "top_k" in case:
        chain.append(TopKLogitsWarper(case["top_k"]))
    if "top_p" in case:
        chain.append(TopPLogitsWarper(case["top_p"] * (1 + slack)))
    return LogitsProcessorList(chain)


def scores_of(case: dict[str, Any], logits: np.ndarray, history: np.ndarray, dtype: Any, slack: float) -> np.ndarray:
    ids = torch.tensor(history, dtype=torch.int64)[None]
    return processors(case, slack)(ids, torch.tensor(logits, dtype=dtype)[None]).to(torch.float64)[0].numpy()


def main() -> None:
    rng = np.random.default_rng(20)
    logits = rng.normal(0, 1.5, (len(CASES), VOCAB)).astype(np.float32)
    prompts = rng.integers(0, VOCAB, (len(CASES), PROMPT_TOKENS), np.int32)
    outputs = rng.integers(0, VOCAB, (len(CASES), OUTPUT_TOKENS), np.int32)
    prompts[:, -2:] = prompts[:, :2]  # twice in the prompt
    outputs[:, -1], outputs[:, -2] = outputs[:, 0], prompts[:, 0]  # twice in the output; in both
    scores = np.empty(logits.shape, np.float64)
    for row, case in enumerate(CASES):
        history = np.concatenate([prompts[row], outputs[row]])
        scores[row] = scores_of(case, logits[row], history, torch.float64, 0.0)
        for dtype, slack in ((torch.float32, 0.0), (torch.float64, SLACK), (torch.float64, -SLACK)):
            other = scores_of(case, logits[row], history, dtype, slack)
            assert ((other > -np.inf) == (scores[row] > -np.inf)).all(), f"case {row}, {case}: choose another seed"
    metadata = {
        "made": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    np.savez_compressed(
        OUT, logits=logits, prompts=prompts, outputs=outputs, scores=scores,
        cases=json.dumps(CASES), metadata=json.dumps(metadata),
    )  # fmt: skip
    kept = (scores > -np.inf).sum(axis=1)
    for case, count in zip(CASES, kept, strict=True):
        print(f"{count:4} kept  {case}")


if __name__ == "__main__":
    main()
