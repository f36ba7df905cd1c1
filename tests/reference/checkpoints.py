"""Small random LLaMA checkpoints, made from their names, and the reference outputs committed for them.

`write_checkpoint` makes a Hugging Face style folder; `load_reference` returns what `transformers` computed from exactly
that folder (see make_reference.py). Only NumPy is needed: neither torch nor jax is imported here.

Every weight is an integer of at most 8 bits times a power of two, so it is exact in float32, float16 and bfloat16: a
run in any dtype, from files in any dtype, starts from the same numbers. PCG64 gives the same integers everywhere.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

DATA = Path(__file__).parent / "data"
PROMPT_LENGTHS = (3, 16, 17, 27, 40)
GREEDY_TOKENS = 64

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One checkpoint: `config` is config.json verbatim; the rest says how its weights are made and stored."""

    about: str
    config: dict[str, Any]
    seed: int = 0  # chosen so that make_reference.py accepts the case
    file_dtype: str = "float32"  # float32, float16 or bfloat16
    shards: int = 1
    store_inv_freq: bool = False  # old checkpoints hold rotary buffers, which a loader must skip
    store_tied_head: bool = False  # some tied checkpoints hold lm_head.weight as well

    @property
    def num_kv_heads(self) -> int:
        return self.config.get("num_key_value_heads") or self.config["num_attention_heads"]

    @property
    def head_dim(self) -> int:
        return self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"]


def _config(hidden: int, inter: int, layers: int, heads: int, vocab: int, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **fields,
    }


_LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_type": "llama3",
}

# "Old dialect": rope_scaling and rope_theta side by side; "new dialect": rope_parameters, as transformers 5 writes it.
CASES: dict[str, Case] = {
    "llama2_mha": Case(
        "Llama-2 style: no num_key_value_heads, head_dim or rope_theta; float16 file with rotary buffers",
        _config(
            64, 176, 2, 8, 96,
            _name_or_path="some/llama-2", bos_token_id=1, eos_token_id=2, hidden_act="silu", initializer_range=0.02,
            max_position_embeddings=256, pad_token_id=0, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
            tie_word_embeddings=False, torch_dtype="float16", transformers_version="4.31.0.dev0", use_cache=True,
        ),
        seed=5, file_dtype="float16", store_inv_freq=True,
    ),
    "llama3_old_rope": Case(
        "Llama-3.1 style: 8 query heads on 1 KV head, llama3 rope in the old dialect, EOS list; 2 bfloat16 shards",
        _config(
            64, 128, 3, 8, 128,
            num_key_value_heads=1, attention_bias=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=[2, 3, 4],
            hidden_act="silu", max_position_embeddings=256, mlp_bias=False, pretraining_tp=1, rms_norm_eps=1e-05,
            rope_scaling=dict(_LLAMA3_SCALING), rope_theta=10000.0, tie_word_embeddings=False,
            torch_dtype="bfloat16", transformers_version="4.42.3", use_cache=True,
        ),
        seed=5, file_dtype="bfloat16", shards=2,
    ),
    "llama3_new_rope_tied": Case(
        "Llama-3.2 style: 16 query heads on 8 KV heads, tied, head_dim given, llama3 rope in the new dialect",
        _config(
            96, 112, 2, 16, 112,
            num_key_value_heads=8, head_dim=8, attention_bias=False, bos_token_id=1, dtype="float32", eos_token_id=2,
            hidden_act="silu", max_position_embeddings=256, mlp_bias=False, rms_norm_eps=1e-05,
            rope_parameters={**_LLAMA3_SCALING, "rope_theta": 10000.0}, tie_word_embeddings=True,
            transformers_version="5.0.0", use_cache=True,
        ),
    ),
    "biases": Case(
        "attention_bias, mlp_bias, rms_norm_eps that matters, 8 query heads on 2 KV heads, default rope, new dialect",
        _config(
            64, 128, 2, 8, 104,
            num_key_value_heads=2, head_dim=8, attention_bias=True, mlp_bias=True, dtype="float32", eos_token_id=2,
            max_position_embeddings=128, rms_norm_eps=0.05, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        ),
        seed=11,
    ),
    "linear_old_rope_head_dim": Case(
        "head_dim 16 where hidden_size / heads is 8, 8 query heads on 8 KV heads, linear rope spelled 'type', tied",
        _config(
            64, 96, 2, 8, 120,
            num_key_value_heads=8, head_dim=16, eos_token_id=2, max_position_embeddings=512, rms_norm_eps=1e-05,
            rope_scaling={"type": "linear", "factor": 4.0}, rope_theta=10000.0, tie_word_embeddings=True,
            torch_dtype="float32",
        ),
        seed=1,
    ),
    "linear_new_rope_sharded": Case(
        "16 query heads on 2 KV heads, linear rope in the new dialect, vocabulary of 101, 3 float32 shards",
        _config(
            64, 120, 3, 16, 101,
            num_key_value_heads=2, head_dim=8, dtype="float32", eos_token_id=2, max_position_embeddings=512,
            rms_norm_eps=1e-05, rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 500000.0},
            tie_word_embeddings=False,
        ),
        seed=6, shards=3,
    ),
    "odd_vocab_tied": Case(
        "vocabulary of 131, tied with lm_head.weight stored as well, 8 query heads on 1 KV head, bfloat16 file",
        _config(
            96, 160, 2, 8, 131,
            num_key_value_heads=1, dtype="bfloat16", eos_token_id=2, max_position_embeddings=128, rms_norm_eps=1e-05,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, tie_word_embeddings=True,
        ),
        seed=10, file_dtype="bfloat16", store_tied_head=True,
    ),
    "bare_config": Case(
        "only sizes in config.json, the rest by default (its logits show rope and untied; rms_norm_eps hardly)",
        _config(64, 128, 2, 8, 96, num_key_value_heads=4, max_position_embeddings=128),
        seed=3,
    ),
}  # fmt: skip


def _generator(*names: object) -> np.random.Generator:
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], std: float) -> np.ndarray:
    """Uniform float32 of about this standard deviation: integers of at most 8 bits times a power of two."""
    mantissa, exponent = math.frexp(std * math.sqrt(3))  # the half width, as mantissa in [0.5, 1) times 2**exponent
    width = round(mantissa * 256)
    return np.ldexp(rng.integers(-width, width + 1, shape).astype(np.float32), exponent - 8)


def make_weights(name: str, seed: int | None = None) -> Weights:
    """The weights of a case in float32, under their Hugging Face names; matrices are [outputs, inputs]."""
    case = CASES[name]
    config, seed = case.config, case.seed if seed is None else seed
    hidden, inter, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q_dim, kv_dim = config["num_attention_heads"] * case.head_dim, case.num_kv_heads * case.head_dim
    tied = config.get("tie_word_embeddings", False)
    attention = (
        ("q", q_dim, hidden, 1.0),
        ("k", kv_dim, hidden, 1.0),
        ("v", kv_dim, hidden, 1.5),
        ("o", hidden, q_dim, 1.5),
    )
    mlp = (("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter))
    weights: Weights = {}

    def matrix(key: str, outputs: int, inputs: int, gain: float) -> None:
        weights[key] = _uniform(_generator(name, seed, key), (outputs, inputs), gain / math.sqrt(inputs))

    def linear(key: str, outputs: int, inputs: int, gain: float, bias: bool) -> None:
        matrix(f"{key}.weight", outputs, inputs, gain)
        if bias:
            weights[f"{key}.bias"] = _uniform(_generator(name, seed, key, "bias"), (outputs,), 0.3)

    def norm(key: str) -> None:  # 0.75 to 1.25
        weights[key] = (_generator(name, seed, key).integers(96, 161, hidden) / 128).astype(np.float32)

    matrix("model.embed_tokens.weight", vocab, hidden, 2.0 * math.sqrt(hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        norm(f"{prefix}.input_layernorm.weight")
        for part, outputs, inputs, gain in attention:
            linear(f"{prefix}.self_attn.{part}_proj", outputs, inputs, gain, config.get("attention_bias", False))
        norm(f"{prefix}.post_attention_layernorm.weight")
        for part, outputs, inputs in mlp:
            linear(f"{prefix}.mlp.{part}_proj", outputs, inputs, 1.25, config.get("mlp_bias", False))
    norm("model.norm.weight")
    if tied:  # random signs, or every logit row would favour its own input token; an eighth, for logits of a usual size
        signs = _generator(name, seed, "signs").integers(0, 2, hidden) * 2 - 1
        weights["model.norm.weight"] *= (signs / 8).astype(np.float32)
    else:
        matrix("lm_head.weight", vocab, hidden, 3.0)
    return weights


def make_prompts(name: str) -> list[list[int]]:
    """Ragged prompts of random token ids, one per entry of PROMPT_LENGTHS."""
    rng = _generator(name, "prompts")
    return [rng.integers(0, CASES[name].config["vocab_size"], length).tolist() for length in PROMPT_LENGTHS]


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
    case, folder = CASES[case_name], Path(folder)
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
    metadata: dict[str, Any] = field(repr=False)  # versions, date, seed, weights_sha256, measured errors


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
        )


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
