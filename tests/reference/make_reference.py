"""Compute the reference outputs in data/ with Hugging Face transformers on the CPU (README.md says how to run it).

Each checkpoint is written to a temporary folder and loaded from it unmodified, with eager attention. Greedy decoding
runs the whole sequence anew at every step, one prompt at a time: no cache, no padding.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# isort: split
from checkpoints import (
    ALL_CASES,
    DATA,
    GREEDY_TOKENS,
    PROMPT_LENGTHS,
    fingerprint,
    make_prompts,
    make_weights,
    write_checkpoint,
)
from effects import config_of, features

MIN_GAP = 1e-3  # a smaller gap between the two best logits would let rounding choose another greedy token
MIN_ROUTER_GAP = 0.1  # a smaller one would let bfloat16 choose another expert
MIN_DISTINCT = 8  # of the tokens of one greedy continuation
MAX_BFLOAT16_ERROR = 0.016  # per row: a bfloat16 test, which rounds on its own, may allow 0.02 from the bfloat16 logits
TINY_MODEL = Path(__file__).parents[2] / "nanoflow_jax" / "assets" / "tiny_llama"
TINY_TOKENS = 80
_KEYS = [first + second for first in "kvz" for second in "abcdefghijklmnopqr"]
LONG_LOOKUP = "".join(f"{key}={37 * n % 100:02d};" for n, key in enumerate(_KEYS))  # 324 tokens
TINY_PROMPTS: list[str | list[dict[str, str]]] = [
    "12+30=",
    "97+68=",
    "reverse abcdef=",
    "sort 52917=",
    "kx=48;ab=17;kx?",
    f"{LONG_LOOKUP}vc?",
    [{"role": "user", "content": "What is 12+30?"}],
    [{"role": "user", "content": "Who are you?"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! I can add, reverse, sort and look things up."},
        {"role": "user", "content": "Reverse xyz"},
    ],
]


def load_model(folder: Path, dtype: torch.dtype, **overrides: Any) -> PreTrainedModel:
    """The model of a folder, every weight accounted for; rotary frequencies stay float32 (`.to` would round them)."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True,
        **overrides,
    )  # fmt: skip
    model, info = loaded
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert all("inv_freq" in key for key in info["unexpected_keys"]), info
    buffers = dict(model.model.rotary_emb.named_buffers())
    assert buffers and all(buffer.dtype == torch.float32 for buffer in buffers.values())
    return model.eval()


def forget_lengths(model: PreTrainedModel) -> None:
    """Dynamic rope keeps the frequencies of the longest sequence so far, whatever that was: back to the first ones."""
    rope: Any = model.model.rotary_emb
    if rope.rope_type == "dynamic":
        rope.max_seq_len_cached = rope.original_max_seq_len
        rope.inv_freq = rope.original_inv_freq.clone()


@torch.inference_mode()
def all_logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits of every position, float32 [len(tokens), V], from one forward pass without a cache."""
    forget_lengths(model)
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def router_gap(model: PreTrainedModel, prompts: list[list[int]]) -> float:
    """How far the last score that chooses an expert is from the first that does not, over the scores' deviation, where
    it is least; infinite without experts."""
    gaps = [float("inf")]

    def measure(module: Any, _: Any, output: Any) -> None:
        scores = output[0].flatten(0, -2).sort(dim=-1, descending=True).values
        if module.top_k < scores.shape[-1]:
            gaps.append(float(((scores[:, module.top_k - 1] - scores[:, module.top_k]) / scores.std()).min()))

    hooks = [m.register_forward_hook(measure) for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    for prompt in prompts:
        all_logits(model, prompt)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def greedy(
    model: PreTrainedModel, prompt: list[int], max_tokens: int, stop_ids: tuple[int, ...] = ()
) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, up to and with the first of stop_ids, and the logits [T, V] that chose each of them."""
    tokens: list[int] = []
    rows: list[np.ndarray] = []
    while len(tokens) < max_tokens and not (tokens and tokens[-1] in stop_ids):
        rows.append(all_logits(model, prompt + tokens)[-1])
        tokens.append(int(rows[-1].argmax()))
    return tokens, np.stack(rows)


@torch.inference_mode()
def cached_greedy(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> tuple[list[int], np.ndarray]:
    """As `greedy`, but one step after the other over a KV cache, whose keys keep the frequencies they came with."""
    forget_lengths(model)
    cache, new, tokens, rows = transformers.DynamicCache(config=model.config), prompt, [], []
    for _ in range(max_tokens):
        logits = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True).logits
        rows.append(logits[0, -1].float().numpy())
        new = [int(rows[-1].argmax())]
        tokens += new
    return tokens, np.stack(rows)


def top_gaps(logits: np.ndarray) -> np.ndarray:
    """The best logit minus the second best: [..., V] -> [...]."""
    best = np.sort(logits, axis=-1)[..., -2:]
    return best[..., 1] - best[..., 0]


def row_errors(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Norm of the difference of each row over the norm of the reference's row: [N, V] -> [N]."""
    return np.linalg.norm(values - reference, axis=-1) / np.linalg.norm(reference, axis=-1)


def metadata_json(**fields: Any) -> str:
    versions = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return json.dumps({"date": datetime.date.today().isoformat(), "versions": versions, **fields})


def rope_by_length(rope: dict[str, Any]) -> bool:
    """Whether the frequencies change with the length of the sequence within a case."""
    if rope.get("rope_type") == "longrope":
        return PROMPT_LENGTHS[0] <= rope["original_max_position_embeddings"] < PROMPT_LENGTHS[-1] + GREEDY_TOKENS
    return rope.get("rope_type") == "dynamic"


def make_case(name: str, seed: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays of data/<name>.npz, and the figures measured on the way that `check` judges."""
    case, prompts, weights = ALL_CASES[name], make_prompts(name), make_weights(name, seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_checkpoint(name, temporary, seed)
        model = load_model(folder, torch.float32)
        logits = np.concatenate([all_logits(model, prompt) for prompt in prompts])
        gap_of_routers = router_gap(model, prompts)
        rows = [greedy(model, prompt, GREEDY_TOKENS) for prompt in prompts]
        rope: Any = model.config.rope_parameters
        cached = [cached_greedy(model, prompt, GREEDY_TOKENS) for prompt in prompts] if rope_by_length(rope) else []
        effects, minima = {}, {}
        for feature, without in features(case, list(weights)).items():
            other = load_model(folder, torch.float32, config=config_of(case, without.fields))
            without.edit(other)
            effects[feature] = float(row_errors(all_logits(other, prompts[-1])[-1:], logits[-1:])[0])
            minima[feature] = without.minimum
        double = load_model(folder, torch.float64)
        logits_double = np.concatenate([all_logits(double, prompt) for prompt in prompts])
        half = load_model(folder, torch.bfloat16)
        logits_bfloat16 = np.concatenate([all_logits(half, prompt) for prompt in prompts])

    gaps = np.stack([top_gaps(step_logits) for _, step_logits in rows])
    tokens = np.array([step_tokens for step_tokens, _ in rows], np.int32)
    figures = {
        "min_gap": float(gaps.min()),
        "min_router_gap": min(gap_of_routers, 100.0),
        "min_distinct_greedy_tokens": min(len(set(row)) for row in tokens.tolist()),
        "max_row_error_float32": float(row_errors(logits, logits_double).max()),
        "max_row_error_bfloat16": float(row_errors(logits_bfloat16, logits).max()),
        "mean_row_error_bfloat16": float(row_errors(logits_bfloat16, logits).mean()),
        "logit_std": float(logits.std()),
        "effects": effects,
        "minimum_effects": minima,
    }
    arrays = {
        "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
        "prompt_tokens": np.concatenate(prompts).astype(np.int32),
        "logits_float32": logits,
        "logits_bfloat16": logits_bfloat16,
        "greedy_tokens": tokens,
        "greedy_gaps": gaps,
        "metadata": metadata_json(
            case=name,
            seed=case.seed if seed is None else seed,
            parameters=sum(values.size for values in weights.values()),
            weights_sha256=fingerprint(weights),
            **figures,
        ),
    }
    if cached:
        cached_tokens = np.array([step_tokens for step_tokens, _ in cached], np.int32)
        figures["min_gap"] = min(figures["min_gap"], *(float(top_gaps(step_logits).min()) for _, step_logits in cached))
        figures["cache_changes_tokens"] = not np.array_equal(cached_tokens, tokens)
        arrays["cached_greedy_tokens"] = cached_tokens
    return arrays, figures


def check(name: str, figures: dict[str, Any]) -> None:
    """Refuse a case whose greedy tokens are near ties or collapse, or one of whose features hardly matters."""
    weak = {key: value for key, value in figures["effects"].items() if not value > figures["minimum_effects"][key]}
    assert not weak, f"{name}: hardly matters, so give it another seed or config: {weak}"
    hint = f"{name}: give it another seed; {figures}"
    assert figures["min_gap"] > MIN_GAP, hint
    assert figures["min_router_gap"] > MIN_ROUTER_GAP, hint
    assert figures["min_distinct_greedy_tokens"] >= MIN_DISTINCT, hint
    assert figures["max_row_error_bfloat16"] < MAX_BFLOAT16_ERROR, hint
    assert figures.get("cache_changes_tokens", True), hint


def make_tiny(folder: Path) -> dict[str, Any]:
    """Arrays of data/tiny_llama.npz: greedy continuations of TINY_PROMPTS in float32, stopping at EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(folder, torch.float32)
    eos = model.generation_config.eos_token_id
    stop_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    prompts, prompt_ids, continuations = [], [], []
    for prompt in TINY_PROMPTS:
        if isinstance(prompt, str):
            prompts.append({"text": prompt, "chat": None})
            prompt_ids.append(tokenizer(prompt)["input_ids"])
        else:
            text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            prompts.append({"text": text, "chat": prompt})
            prompt_ids.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        continuations.append(greedy(model, prompt_ids[-1], TINY_TOKENS, stop_ids))
    tokens = np.concatenate([tokens for tokens, _ in continuations]).astype(np.int32)
    logits = np.concatenate([logits for _, logits in continuations])
    logprobs = torch.from_numpy(logits).double().log_softmax(-1).numpy()
    gaps = top_gaps(logits)
    if gaps.min() < MIN_GAP:
        print(f"tiny: the smallest gap is {gaps.min():.1e}: a test must allow another token there", file=sys.stderr)
    return {
        "prompts": np.array(json.dumps(prompts)),
        "prompt_lengths": np.array([len(ids) for ids in prompt_ids], np.int32),
        "prompt_tokens": np.concatenate(prompt_ids).astype(np.int32),
        "lengths": np.array([len(tokens) for tokens, _ in continuations], np.int32),
        "tokens": tokens,
        "texts": np.array(json.dumps([tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in continuations])),
        "logprobs": logprobs[np.arange(len(tokens)), tokens].astype(np.float32),
        "gaps": gaps,
        "metadata": metadata_json(
            max_tokens=TINY_TOKENS,
            stop_token_ids=stop_ids,
            min_gap=float(gaps.min()),
            model_sha256={
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(folder.glob("*.safetensors"))
            },
        ),
    }


def _save(name: str, arrays: dict[str, Any], folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.npz"
    np.savez_compressed(path, **arrays)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("cases", nargs="*", metavar="case", help=f"default: all of {', '.join(ALL_CASES)}")
    parser.add_argument("--tiny", action="store_true", help="make tiny_llama.npz, of the embedded model, instead")
    parser.add_argument("--model", type=Path, default=TINY_MODEL, help="folder for --tiny (the embedded model)")
    parser.add_argument("--output", type=Path, default=DATA, help="folder to write to (data/ beside this file)")
    options = parser.parse_args()
    if unknown := sorted(set(options.cases) - set(ALL_CASES)):
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(ALL_CASES)}")
    torch.set_num_threads(1)
    if options.tiny:
        arrays = make_tiny(options.model)
        size = _save("tiny_llama", arrays, options.output)
        for prompt, text in zip(json.loads(str(arrays["prompts"])), json.loads(str(arrays["texts"])), strict=True):
            print(f"{prompt['text']!r} -> {text!r}")
        print(f"tiny_llama: {size} bytes")
        return
    for name in options.cases or ALL_CASES:
        arrays, figures = make_case(name)
        check(name, figures)
        size = _save(name, arrays, options.output)
        print(f"{name}: {size} bytes; " + ", ".join(f"{key} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
