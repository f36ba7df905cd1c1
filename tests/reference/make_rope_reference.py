"""Compute data/rope.npz: rotary frequencies of transformers for RoPE settings of published models, at their own sizes.

README.md says how to run it. The small checkpoints cannot show what these settings do to 64 frequencies.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# isort: split
from checkpoints import DATA
from make_reference import metadata_json

_LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0 + index / 32 for index in range(48)],
    "long_factor": [1.0 + index**1.05 for index in range(48)],
}


def _yarn(factor: float, original: int, **fields: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **fields}


def _llama3(factor: float) -> dict[str, Any]:
    lengths = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "factor": factor, **lengths}


# Name: head_dim, rope_theta, max_position_embeddings, rope_scaling, lengths of sequences.
SETTINGS: dict[str, tuple[int, float, int, dict[str, Any], tuple[int, ...]]] = {
    "linear, as Gemma 3's full layers": (128, 1e6, 131072, {"rope_type": "linear", "factor": 8.0}, (100,)),
    "llama3, as Llama 3.1": (128, 5e5, 131072, _llama3(8.0), (100,)),
    "llama3, as Llama 3.2": (64, 5e5, 131072, _llama3(32.0), (100,)),
    "dynamic": (128, 1e4, 4096, {"rope_type": "dynamic", "factor": 2.0}, (100, 4096, 4097, 16384)),
    "yarn, as Qwen2.5": (128, 1e6, 32768, {**_yarn(4.0, 32768), "type": "yarn"}, (100,)),
    "yarn, as OLMo 3": (128, 5e5, 65536, _yarn(8.0, 8192, attention_factor=1.2079441541679836), (100,)),
    "yarn, as Ministral 3": (128, 1e6, 262144, _yarn(16.0, 16384, mscale=1.0, mscale_all_dim=1.0), (100,)),
    "yarn, as gpt-oss": (64, 150000.0, 131072, _yarn(32.0, 4096, truncate=False), (100,)),
    "yarn, unlike mscales": (64, 1e4, 163840, _yarn(40.0, 4096, mscale=1.0, mscale_all_dim=0.707), (100,)),
    "yarn, betas": (128, 1e6, 32768, _yarn(4.0, 8192, beta_fast=16.0, beta_slow=2.0), (100,)),
    "longrope, as Phi-3": (
        96, 1e4, 131072, {**_LONGROPE, "original_max_position_embeddings": 4096}, (100, 4096, 4097),
    ),
    "longrope, attention factor": (
        96, 1e4, 8192, {**_LONGROPE, "original_max_position_embeddings": 4096, "attention_factor": 1.25}, (100, 8000),
    ),
}  # fmt: skip


def main() -> None:
    settings, frequencies = [], []
    for about, (head_dim, theta, positions, scaling, tried) in SETTINGS.items():
        for length in tried:
            config = AutoConfig.for_model(
                "llama",
                head_dim=head_dim,
                max_position_embeddings=positions,
                rope_theta=theta,
                rope_scaling=dict(scaling),
            )
            kind = config.rope_parameters["rope_type"]
            inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
            fields = {"head_dim": head_dim, "rope_theta": theta, "max_position_embeddings": positions}
            fields |= {"rope_scaling": scaling, "length": length, "attention_factor": float(attention_factor)}
            settings.append({"about": about, **fields})
            frequencies.append(inv_freq.numpy())
    lengths = np.array([len(values) for values in frequencies], np.int32)
    path, arrays = DATA / "rope.npz", {"lengths": lengths, "inv_freq": np.concatenate(frequencies)}
    np.savez_compressed(path, settings=json.dumps(settings), metadata=metadata_json(), **arrays)
    print(f"rope: {len(settings)} settings, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
