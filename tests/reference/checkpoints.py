"""Small random checkpoints, made from their names, and the reference outputs committed for them.

`write_checkpoint` makes a Hugging Face style folder; `load_reference` returns what `transformers` computed from exactly
that folder (see make_reference.py). Only NumPy is needed: neither torch nor jax is imported here.

Every weight is an integer of at most 8 bits times a power of two, so it is exact in float32, float16 and bfloat16: a
run in any dtype, from files in any dtype, starts from the same numbers. PCG64 gives the same integers everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

# isort: split
from cases import CASES, Case
from expert_cases import EXPERT_CASES
from family_cases import FAMILY_CASES

DATA = Path(__file__).parent / "data"
PROMPT_LENGTHS = (3, 16, 17, 27, 40)
GREEDY_TOKENS = 64

ALL_CASES: dict[str, Case] = CASES | FAMILY_CASES | EXPERT_CASES

Weights = dict[str, np.ndarray]


def _generator(*names: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Uniform float32 of about this standard deviation: integers of at most 8 bits times a power of two."""
    mantissa, exponent = math.frexp(std * math.sqrt(3))  # the half width, as mantissa in [0.5, 1) times 2**exponent
    width = round(mantissa * 256)
    return np.ldexp(rng.integers(-width, width + 1, shape).astype(np.float32), exponent - 8)


_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_NORMS = {  # a layer's norms; LLaMA's, in the default below, are named alike but both come before their block
    "olmo2": _POST_NORMS,
    "olmo3": _POST_NORMS,
    "gemma3_text": ("input_layernorm", _POST_NORMS[0], "pre_feedforward_layernorm", _POST_NORMS[1]),
}


def make_weights(name: str, seed: int | None = None) -> Weights:
    """The weights of a case in float32, under their Hugging Face names; matrices are [outputs, inputs]."""
    case = ALL_CASES[name]
    config, family, seed = case.config, case.family, case.seed if seed is None else seed
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_dim, kv_dim = config["num_attention_heads"] * case.head_dim, case.num_kv_heads * case.head_dim
    gemma = family == "gemma3_text"
    tied = config.get("tie_word_embeddings", gemma)
    qkv_bias = config.get("attention_bias", family == "seed_oss") or family == "qwen2" or config.get("qkv_bias", False)
    o_bias = (
        config.get("attention_out_bias", False)
        if family == "seed_oss"
        else qkv_bias and family not in ("qwen2", "qwen2_moe")
    )
    depth = min(1.0, math.sqrt(3 / config["num_hidden_layers"]))  # keeps what deeper models round in bfloat16 small
    halved = _POST_NORMS if family in _NORMS and config["num_hidden_layers"] > 4 else ()  # likewise
    attention = (
        ("q", q_dim, hidden, 1.0, qkv_bias),
        ("k", kv_dim, hidden, 1.0, qkv_bias),
        ("v", kv_dim, hidden, 1.5, qkv_bias),
        ("o", hidden, q_dim, 1.5 * depth, o_bias),
    )
    mlp = (("gate", inter, hidden, 1.25), ("up", inter, hidden, 1.25), ("down", hidden, inter, 1.25 * depth))
    norms = _NORMS.get(family, ("input_layernorm", "post_attention_layernorm"))
    qk_norm_sizes = {
        "qwen3": (case.head_dim,) * 2,
        "qwen3_moe": (case.head_dim,) * 2,
        "gemma3_text": (case.head_dim,) * 2,
    }
    qk_norm_sizes |= {"olmo2": (q_dim, kv_dim), "olmo3": (q_dim, kv_dim)}
    weights: Weights = {}

    def matrix(key: str, outputs: int, inputs: int, gain: float) -> None:
        weights[key] = _uniform(_generator(name, seed, key), (outputs, inputs), gain / math.sqrt(inputs))

    def linear(key: str, outputs: int, inputs: int, gain: float, bias: bool) -> None:
        matrix(f"{key}.weight", outputs, inputs, gain)
        if bias:
            weights[f"{key}.bias"] = _uniform(_generator(name, seed, key, "bias"), (outputs,), 0.3)

    def norm(key: str, size: int = hidden, factor: np.ndarray | float = 1.0) -> None:
        """0.75 to 1.25 times a factor; Gemma stores it less 1, in steps that leave both exact."""
        steps = _generator(name, seed, key).integers(*((48, 81) if gemma else (96, 161)), size) / (64 if gemma else 128)
        weights[key] = (steps * factor - gemma).astype(np.float32)

    # Hidden states start with a standard deviation of 2, and logits end with one of 2 or 3, whatever is multiplied in.
    embedding_std = 2.0 / (math.sqrt(hidden) if gemma else config.get("embedding_multiplier", 1.0))
    matrix("model.embed_tokens.weight", vocab, hidden, embedding_std * math.sqrt(hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.{norms[0]}.weight", factor=0.5 if norms[0] in halved else 1.0)
        for part, outputs, inputs, gain, bias in attention:
            linear(f"{prefix}.self_attn.{part}_proj", outputs, inputs, gain, bias)
        for part, size in zip("qk", qk_norm_sizes.get(family, ()), strict=False):
            norm(f"{prefix}.self_attn.{part}_norm.weight", size)
        for other in norms[1:]:
            norm(f"{prefix}.{other}.weight", factor=0.5 if other in halved else 1.0)
        if case.has_experts(layer):
            weights |= _experts(case, prefix, lambda key: _generator(name, seed, key))
            continue
        for part, outputs, inputs, gain in mlp:
            linear(f"{prefix}.mlp.{part}_proj", outputs, inputs, gain, config.get("mlp_bias", False))
    if case.experts:
        _with_routes(weights, case, _generator(name, seed, "routes"))
    logits_scaling = config.get("logits_scaling", 1.0)
    if not tied:
        norm("model.norm.weight")
        matrix("lm_head.weight", vocab, hidden, 3.0 * logits_scaling)
        return weights
    # Random signs, or every logit row would favour its own input token; a power of two, for logits of a usual size.
    signs = _generator(name, seed, "signs").integers(0, 2, hidden) * 2 - 1
    norm("model.norm.weight", factor=signs * 2.0 ** round(math.log2(2 * logits_scaling / embedding_std / hidden**0.5)))
    return weights


def _experts(case: Case, prefix: str, generator: Callable[[str], np.random.Generator]) -> Weights:
    """Of one layer, under the family's names. The router reads E hidden dimensions above all."""
    config, hidden, count, size = case.config, case.config["hidden_size"], case.experts, case.expert_size
    depth = min(1.0, math.sqrt(3 / config["num_hidden_layers"])) ** 2  # as elsewhere, and for what experts add up to
    weights: Weights = {}

    def matrix(key: str, shape: tuple[int, ...], inputs: int, gain: float) -> None:
        weights[f"{prefix}.{key}"] = _uniform(generator(f"{prefix}.{key}"), shape, gain / math.sqrt(inputs))

    def router(key: str) -> None:
        matrix(key, (count, hidden), hidden, 0.25)
        read = weights[f"{prefix}.{key}"][:, :count]
        read[:] = np.round((read + np.eye(count)) * 64) / 64

    if case.family == "gpt_oss":
        router("mlp.router.weight")
        matrix("mlp.router.bias", (count,), 1, 0.1)
        matrix("mlp.experts.gate_up_proj", (count, hidden, 2 * size), hidden, 1.25)
        matrix("mlp.experts.gate_up_proj_bias", (count, 2 * size), 1, 0.3)
        matrix("mlp.experts.down_proj", (count, size, hidden), size, 1.25)
        matrix("mlp.experts.down_proj_bias", (count, hidden), 1, 0.3)
        matrix("self_attn.sinks", (config["num_attention_heads"],), 1, 1.0)
        return weights
    mixtral = case.family == "mixtral"
    place, parts = ("block_sparse_moe", "w1 w3 w2") if mixtral else ("mlp", "gate_proj up_proj down_proj")
    router(f"{place}.gate.weight")
    sizes = {f"{place}.experts.{e}": (size, 1.5) for e in range(count)}
    if case.family == "qwen2_moe":
        matrix("mlp.shared_expert_gate.weight", (1, hidden), hidden, 1.0)
        sizes["mlp.shared_expert"] = config["shared_expert_intermediate_size"], 1.25
    for at, (width, gain) in sizes.items():
        for part, (outputs, inputs) in zip(parts.split(), [(width, hidden)] * 2 + [(hidden, width)], strict=True):
            matrix(f"{at}.{part}.weight", (outputs, inputs), inputs, gain * (depth if outputs == hidden else 1.0))
    return weights


def _with_routes(weights: Weights, case: Case, rng: np.random.Generator) -> None:
    """Gives each token experts of its own, in the dimensions that routers read: those by which a token's experts are
    chosen are far from those by which others are not, and little is added to them."""
    count, chosen = case.experts, case.config["num_experts_per_tok"]
    for name, weight in weights.items():
        if ".layers." in name and any(part in name for part in ("o_proj", "down_proj", ".w2")):
            fused = case.family == "gpt_oss" and "down_proj" in name
            (weight[..., :count] if fused else weight[:count])[:] *= 0.25
    for row in weights["model.embed_tokens.weight"]:
        row[:count] = np.round(np.abs(row[:count]) * 8) / 32 - 3.0
        row[rng.permutation(count)[:chosen]] += 6.0


def make_prompts(name: str) -> list[list[int]]:
    """Ragged prompts of random token ids, one per entry of PROMPT_LENGTHS."""
    rng = _generator(name, "prompts")
    return [rng.integers(0, ALL_CASES[name].config["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]


def fingerprint(weights: Weights) -> str:
    """SHA-256 over names, shapes and float32 values: says whether two checkpoints hold the same weights."""
    digest = hashlib.sha256()
    for key in sorted(weights):
        digest.update(f"{key}{weights[key].shape}".encode() + weights[key].astype("<f4").tobytes())
    return digest.hexdigest()


def _encode(values: np.ndarray, dtype: str) -> tuple[str, bytes]:
    """safetensors' name of the dtype, and little-endian bytes; refuses values that the dtype cannot hold exactly."""
    if dtype == "float32":
        return "F32", values.astype("<f4").tobytes()
    if dtype == "float16":
        half = values.astype("<f2")
        assert np.array_equal(half.astype(np.float32), values)
        return "F16", half.tobytes()
    assert dtype == "bfloat16", dtype
    bits = values.astype(np.float32).view(np.uint32)
    assert not np.any(bits & 0xFFFF)
    return "BF16", (bits >> 16).astype("<u2").tobytes()


def _write_safetensors(path: Path, tensors: Weights, dtype: str) -> int:
    """Write one file (header length, JSON header padded to 8 bytes, data) and return the bytes of data in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for key, values in tensors.items():
        code, raw = _encode(values, "float32" if key.endswith("inv_freq") else dtype)
        header[key] = {"dtype": code, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return len(data)


def write_checkpoint(case_name: str, folder: str | Path, seed: int | None = None) -> Path:
    """Write config.json and the safetensors file, or shards with their index, of a case; returns the folder."""
    case, folder = ALL_CASES[case_name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    tensors = dict(make_weights(case_name, seed))
    if case.store_tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if case.store_inv_freq:
        inv_freq = np.float32(10000.0) ** (-np.arange(0, case.head_dim, 2, dtype=np.float32) / case.head_dim)
        for layer in range(case.config["num_hidden_layers"]):
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = inv_freq
    if case.shards == 1:
        _write_safetensors(folder / "model.safetensors", tensors, case.file_dtype)
        return folder
    weight_map, total_size = {}, 0
    for shard, keys in enumerate(np.array_split(list(tensors), case.shards), start=1):
        file = f"model-{shard:05d}-of-{case.shards:05d}.safetensors"
        total_size += _write_safetensors(folder / file, {str(key): tensors[str(key)] for key in keys}, case.file_dtype)
        weight_map.update({str(key): file for key in keys})
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


@dataclass(frozen=True)
class Reference:
    """What `transformers` computed for one case; P prompts of L_p tokens, a vocabulary of V, G = GREEDY_TOKENS."""

    prompts: list[list[int]]  # P lists of L_p token ids
    logits: dict[str, list[np.ndarray]]  # "float32", "bfloat16" -> P arrays [L_p, V], all stored as float32
    greedy_tokens: np.ndarray  # int32 [P, G], computed in float32, EOS ignored
    greedy_gaps: np.ndarray  # float32 [P, G], the best logit minus the second best at that step
    metadata: dict[str, Any] = field(repr=False)  # versions, date, seed, weights_sha256, measured errors and effects
    # Where rope depends on the length of the sequence (dynamic, longrope), greedy_tokens come of whole sequences
    # computed anew at each step; these, int32 [P, G], of a KV cache, whose keys keep the frequencies they came with.
    cached_greedy_tokens: np.ndarray | None = None


def load_reference(case_name: str) -> Reference:
    """Read data/<case>.npz; raises if the checkpoint made today is not the one that the data was computed from."""
    with np.load(DATA / f"{case_name}.npz") as data:
        metadata = json.loads(str(data["metadata"]))
        if metadata["weights_sha256"] != fingerprint(make_weights(case_name)):
            raise ValueError(f"{case_name}.npz is of other weights: run tests/reference/make_reference.py {case_name}")
        cuts = np.cumsum(data["prompt_lengths"])[:-1]
        return Reference(
            prompts=[part.tolist() for part in np.split(data["prompt_tokens"], cuts)],
            logits={dtype: np.split(data[f"logits_{dtype}"], cuts) for dtype in ("float32", "bfloat16")},
            greedy_tokens=data["greedy_tokens"],
            greedy_gaps=data["greedy_gaps"],
            metadata=metadata,
            cached_greedy_tokens=data.get("cached_greedy_tokens"),
        )


def load_rope_reference(path: Path = DATA / "rope.npz") -> list[tuple[dict[str, Any], np.ndarray]]:
    """Settings of published models, with the attention factor and the float32 [head_dim / 2] inverse frequencies.

    Settings: about, head_dim, rope_theta, max_position_embeddings, rope_scaling, length (of the sequence), and
    attention_factor, the outcome that multiplies cos and sin.
    """
    with np.load(path) as data:
        parts = np.split(data["inv_freq"], np.cumsum(data["lengths"])[:-1])
        return list(zip(json.loads(str(data["settings"])), parts, strict=True))


@dataclass(frozen=True)
class Continuation:
    """One greedy continuation by the embedded tiny model, in float32."""

    prompt: str  # a chat is here as its template rendered it; tokenize with add_special_tokens = not chat
    chat: list[dict[str, str]] | None
    prompt_token_ids: list[int]
    token_ids: list[int]  # ends with the EOS token if that came before the limit
    text: str  # without special tokens
    logprobs: np.ndarray  # float32 [len(token_ids)], of the raw logits
    gaps: np.ndarray  # float32 [len(token_ids)], the best logit minus the second best


def load_tiny_reference(path: Path = DATA / "tiny_llama.npz") -> tuple[list[Continuation], dict[str, Any]]:
    """The continuations in data/tiny_llama.npz, and its metadata (versions, date, max_tokens, model_sha256)."""
    with np.load(path) as data:
        prompt_cuts, cuts = np.cumsum(data["prompt_lengths"])[:-1], np.cumsum(data["lengths"])[:-1]
        rows = zip(
            json.loads(str(data["prompts"])),
            np.split(data["prompt_tokens"], prompt_cuts),
            np.split(data["tokens"], cuts),
            json.loads(str(data["texts"])),
            np.split(data["logprobs"], cuts),
            np.split(data["gaps"], cuts),
            strict=True,
        )
        continuations = [
            Continuation(prompt["text"], prompt["chat"], prompt_ids.tolist(), ids.tolist(), text, logprobs, gaps)
            for prompt, prompt_ids, ids, text, logprobs, gaps in rows
        ]
        return continuations, json.loads(str(data["metadata"]))
