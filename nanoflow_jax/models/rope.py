"""Rotary embeddings of every kind: how config.json says them, and their frequencies.

Formulas as transformers has them (modeling_rope_utils), but dynamic and longrope take one length for all sequences
(`RopeConfig.for_length`), where transformers takes that of each call.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from nanoflow_jax.config import ConfigError, RopeConfig
from nanoflow_jax.models.fields import FULL, SLIDING, Fields, max_positions, read_head_dim

_ORIGINAL = "original_max_position_embeddings"


def read_rope(read: Fields, beside: tuple[str, ...] = ()) -> RopeConfig:
    """`rope_scaling` beside `rope_theta`, or `rope_parameters` as transformers 5 writes it. beside: fields of the block
    that are not the embedding's."""
    parameters, scaling = _blocks(read)
    block = "rope_parameters" if parameters is not None else "rope_scaling"
    found = {name: value for name, value in (parameters or scaling or {}).items() if name not in beside}
    return _read_block(read, block, found, read.number("rope_theta", 10000.0))


def read_ropes(read: Fields, full: float, sliding: float, theta_of_sliding: str | None) -> dict[str, RopeConfig]:
    """By kind of layer. `rope_parameters` has a block for each kind; in the older dialect `rope_scaling` and
    `rope_theta` are of full_attention alone.

    full, sliding     theta where the file says none
    theta_of_sliding  the field beside the blocks with it; None: there is none, and rope_theta must then agree
    """
    parameters, scaling = _blocks(read)
    thetas = {FULL: read.number("rope_theta", full), SLIDING: sliding}
    if theta_of_sliding is not None:
        thetas[SLIDING] = read.number(theta_of_sliding, sliding)
    elif parameters is None and thetas[FULL] != sliding:
        raise ConfigError(f"rope_theta: {thetas[FULL]!r} is not supported without rope_parameters; accepted: {sliding}")
    if parameters is None:
        blocks = {FULL: ("rope_scaling", scaling or {}), SLIDING: ("rope_scaling", {})}
    else:
        if not all(kind in thetas and isinstance(block, dict) for kind, block in parameters.items()):
            raise ConfigError(f"rope_parameters: a block for each of {FULL!r} and {SLIDING!r} is needed")
        blocks = {kind: (f"rope_parameters.{kind}", parameters.get(kind, {})) for kind in thetas}
        for name, block in blocks.values():
            if not block.get("truncate", True):
                raise ConfigError(f"{name}.truncate: False is not supported; accepted: True")
    return {kind: _read_block(read, name, dict(block), thetas[kind]) for kind, (name, block) in blocks.items()}


def _blocks(read: Fields) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    parameters = read.take("rope_parameters", dict, None)
    scaling = read.take("rope_scaling", dict, None)
    if parameters is not None and scaling not in (None, parameters):
        raise ConfigError("rope_parameters: given together with a different rope_scaling; keep one of them")
    return parameters, scaling


def _read_block(read: Fields, block: str, fields: dict[str, Any], theta: float) -> RopeConfig:
    rope = Fields(fields)
    positions, half = max_positions(read), read_head_dim(read) // 2
    try:
        kind = rope.take("rope_type", str, None) or rope.take("type", str, "default")
        rope.seen.update({"type", "rope_type"})
        if kind not in _READERS:
            raise ConfigError(f"rope_type: {kind!r} is not supported; accepted: {', '.join(map(repr, _READERS))}")
        if kind in ("llama3", "yarn", "longrope") and (beside := read.take(_ORIGINAL, int, None)) is not None:
            rope.fields[_ORIGINAL] = beside  # as Phi 3 has it, and before that in the block
        config = RopeConfig(kind, rope.number("rope_theta", theta), **_READERS[kind](rope, positions, half))
        if kind in ("yarn", "dynamic") and (config.theta <= 1 or half < 2):
            raise ConfigError(f"rope_type: {kind!r} needs a rope_theta above 1 and a head_dim above 2")
        rope.finish()
    except ConfigError as error:
        raise ConfigError(f"{block}.{error}") from None
    return config


def _linear(rope: Fields, positions: int, half: int) -> dict[str, Any]:
    return {"factor": rope.number("factor")}


def _dynamic(rope: Fields, positions: int, half: int) -> dict[str, Any]:
    return {"factor": rope.number("factor"), _ORIGINAL: positions}


def _llama3(rope: Fields, positions: int, half: int) -> dict[str, Any]:
    low, high = (rope.number(name) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise ConfigError(f"high_freq_factor: {high} must be above low_freq_factor = {low}")
    original = rope.positive(_ORIGINAL, positions)
    return {"factor": rope.number("factor"), "low_freq_factor": low, "high_freq_factor": high, _ORIGINAL: original}


def _yarn(rope: Fields, positions: int, half: int) -> dict[str, Any]:
    original = rope.positive(_ORIGINAL, positions)
    factor = rope.number("factor", positions / original if rope.fields.get(_ORIGINAL) else None)

    def grown(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    mscale, of_all = (rope.take(name, (int, float), None) for name in ("mscale", "mscale_all_dim"))
    usual = grown(mscale) / grown(of_all) if mscale and of_all else grown(1.0)
    return {
        "factor": factor, _ORIGINAL: original, "attention_factor": rope.number("attention_factor", usual),
        "beta_fast": rope.number("beta_fast", 32.0), "beta_slow": rope.number("beta_slow", 1.0),
        "truncate": rope.take("truncate", bool, True),
    }  # fmt: skip


def _longrope(rope: Fields, positions: int, half: int) -> dict[str, Any]:
    original = rope.positive(_ORIGINAL, positions)
    factor = rope.number("factor", positions / original)
    if factor > 1 and original < 2:
        raise ConfigError(f"{_ORIGINAL}: {original} must be at least 2")
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    made = {"factor": factor, _ORIGINAL: original, "attention_factor": rope.number("attention_factor", usual)}
    for name in ("short_factor", "long_factor"):
        values = rope.take(name, list, [])
        if len(values) != half or not all(type(v) in (int, float) and 0 < v <= 1e30 for v in values):
            raise ConfigError(f"{name}: must be head_dim / 2 = {half} positive numbers, not {values!r:.80}")
        made[name] = tuple(map(float, values))
    return made


_READERS = {
    "default": lambda rope, positions, half: {}, "linear": _linear, "llama3": _llama3, "yarn": _yarn,
    "dynamic": _dynamic, "longrope": _longrope,
}  # fmt: skip


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies [head_dim / 2], float32.

    llama3: long wavelengths are divided by `factor`, short ones kept, those between interpolated (Llama 3.1 model
    card). yarn: the same with a ramp over the indices. dynamic: of a larger theta beyond the original positions.
    """
    theta, original = rope.theta, rope.original_max_position_embeddings
    if rope.kind == "dynamic":
        grown = rope.factor * max(rope.length, original) / original - (rope.factor - 1)
        theta = theta * grown ** (head_dim / (head_dim - 2))
    inv = 1.0 / (theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    if rope.kind == "linear":
        inv = inv / rope.factor
    elif rope.kind == "llama3":
        wavelength = 2 * math.pi / inv
        ratio = original / wavelength
        smooth = (ratio - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        inv = (1 - smooth) * inv / rope.factor + smooth * inv
    elif rope.kind == "yarn":
        smooth = _yarn_ramp(rope, head_dim)
        inv = smooth * inv / rope.factor + (1 - smooth) * inv
    elif rope.kind == "longrope":
        inv = inv / np.array(rope.long_factor if rope.length > original else rope.short_factor)
    return inv.astype(np.float32)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """0 at indices that make more than beta_fast turns over the original positions, 1 at those of less than beta_slow,
    linear between: how far each is interpolated. [head_dim / 2]."""

    def index(turns: float) -> float:
        of_one_turn = rope.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(of_one_turn) / (2 * math.log(rope.theta))

    low, high = index(rope.beta_fast), index(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return np.clip((np.arange(head_dim // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)
