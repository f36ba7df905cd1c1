"""The features that a case's config and weights turn on, and a way to leave out each of them in transformers.

make_reference.py measures what that changes in the last row of the longest prompt, and refuses a case in which it would
hardly show: there a model that ignores the feature would pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from transformers import AutoConfig, PreTrainedConfig

# isort: split
from cases import Case

MIN_EFFECT = 0.05  # relative to the row's norm; 2.5 times what a test allows in bfloat16
MIN_SMALL_EFFECT = 0.02  # of a position more in a window, or of norm weights: these may be within bfloat16's tolerance
MIN_EPS_EFFECT = 5e-3  # of an rms_norm_eps that is larger than usual: a float32 test sees it
MIN_TANH_EFFECT = 1.5e-4  # of GELU's tanh form instead of the exact one: more than what a test allows in float32
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_local_base_freq")
_ROPE_DEFAULTS = {"attention_factor": None, "mscale": None, "beta_fast": 32, "beta_slow": 1, "truncate": True}
_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling", "attention_multiplier")

Edit = Callable[[Any], None]


@dataclass(frozen=True)
class Without:
    """One feature left out: by other fields of the config, by an edit of the loaded model, or both."""

    fields: dict[str, Any] = field(default_factory=dict)
    edit: Edit = lambda model: None
    minimum: float = MIN_EFFECT


def config_of(case: Case, fields: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The case's config as transformers parses it, with some fields replaced; rope is then in the new dialect."""
    config = AutoConfig.for_model(**copy.deepcopy(case.config))
    if fields is None:
        return config
    others = {key: value for key, value in case.config.items() if key not in _ROPE_FIELDS}
    return AutoConfig.for_model(**copy.deepcopy({**others, "rope_parameters": config.rope_parameters, **fields}))


class _PerHead(nn.Module):
    """A norm over the whole projection, computed head by head."""

    def __init__(self, norm: Any, head_dim: int) -> None:
        super().__init__()
        self.norm, self.head_dim = norm, head_dim

    def forward(self, x: Any) -> Any:
        heads = x.unflatten(-1, (-1, self.head_dim))
        scale = torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + self.norm.variance_epsilon)
        return (heads * scale).flatten(-2) * self.norm.weight


def _fill(suffix: str, value: Callable[[Any], Any]) -> Edit:
    """Set each parameter whose name ends so to a function of itself."""

    def edit(model: Any) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(suffix):
                    parameter.copy_(value(parameter))

    return edit


def _replace(names: tuple[str, ...], make: Callable[[Any], nn.Module]) -> Edit:
    """Put another module in the place of each one of these names."""

    def edit(model: Any) -> None:
        for path, module in list(model.named_modules()):
            parent, _, name = path.rpartition(".")
            if name in names:
                setattr(model.get_submodule(parent), name, make(module))

    return edit


def _set_scaling(value: float) -> Edit:
    def edit(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling = value

    return edit


def _rope_features(case: Case) -> Iterator[tuple[str, Without]]:
    parameters = config_of(case).rope_parameters
    by_kind = "full_attention" in parameters
    for kind, rope in parameters.items() if by_kind else [("", parameters)]:
        place = f" of {kind}" if kind else ""

        def replaced(new: dict[str, Any], kind: str = kind) -> dict[str, Any]:
            return {"rope_parameters": {**parameters, kind: new} if kind else new}

        if rope["rope_type"] != "default":
            plain = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
            kept = (
                ("llama_4_scaling_beta", "original_max_position_embeddings") if "llama_4_scaling_beta" in rope else ()
            )
            plain |= {key: rope[key] for key in kept}
            yield f"rope scaling{place}", Without(replaced(plain), minimum=0.1 if kind else 0.2)
        for key, default in _ROPE_DEFAULTS.items():
            if rope.get(key, default) != default:
                dropped = {other: value for other, value in rope.items() if not other.startswith(key)}
                yield f"{key}{place}", Without(replaced(dropped), minimum=MIN_SMALL_EFFECT)
        if "llama_4_scaling_beta" in rope:
            yield "llama_4_scaling_beta", Without(replaced({**rope, "llama_4_scaling_beta": 0.0}))
        if rope["rope_type"] == "longrope":
            swapped = {"short_factor": rope["long_factor"], "long_factor": rope["short_factor"]}
            yield "short and long factors swapped", Without(replaced({**rope, **swapped}))
    if by_kind and parameters["full_attention"] != parameters["sliding_attention"]:
        one = {"full_attention": parameters["full_attention"], "sliding_attention": parameters["full_attention"]}
        yield "one rope for both kinds", Without({"rope_parameters": one})


def _window_features(case: Case) -> Iterator[tuple[str, Without]]:
    config = config_of(case)
    window, kinds = config.sliding_window if hasattr(config, "sliding_window") else None, case.config.get("layer_types")
    kinds = getattr(config, "layer_types", kinds)
    if window is not None and (kinds is None or "sliding_attention" in kinds):
        yield "window", Without({"sliding_window": 10**6})
        yield "window one longer", Without({"sliding_window": window + 1}, minimum=MIN_SMALL_EFFECT)
        yield "window one shorter", Without({"sliding_window": window - 1}, minimum=MIN_SMALL_EFFECT)
        if kinds is not None:
            other = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}
            yield "kinds of layers swapped", Without({"layer_types": [other[kind] for kind in kinds]})
    elif case.config.get("sliding_window") and "use_sliding_window" in case.config:
        yield "unused window", Without({"use_sliding_window": True})


def _expert_features(case: Case) -> dict[str, Without]:
    fields = case.config
    found = {"one expert less": Without({"num_experts_per_tok": max(fields["num_experts_per_tok"] - 1, 0) or 2})}
    if "norm_topk_prob" in fields and fields["num_experts_per_tok"] < case.experts:
        found["norm_topk_prob"] = Without({"norm_topk_prob": not fields["norm_topk_prob"]}, minimum=MIN_SMALL_EFFECT)
    if case.family == "qwen2_moe":
        found["gate of the shared expert"] = Without(edit=_fill("shared_expert_gate.weight", torch.zeros_like))
        found["shared expert"] = Without(edit=_fill("shared_expert.down_proj.weight", torch.zeros_like))
    if case.family == "gpt_oss":
        found["swiglu_alpha"] = Without({"swiglu_alpha": 1.0})
        if "swiglu_limit" in fields:
            found["swiglu_limit"] = Without({"swiglu_limit": 1e6})
        found["sinks"] = Without(edit=_fill("sinks", lambda sinks: sinks - 1e4))
        for bias in ("router.bias", "gate_up_proj_bias", "down_proj_bias"):
            found[bias] = Without(edit=_fill(bias, torch.zeros_like), minimum=MIN_SMALL_EFFECT)
    return found


def features(case: Case, weights: list[str]) -> dict[str, Without]:
    """What the case turns on, by name; `weights` are the names of its weights."""
    found = dict(_rope_features(case)) | dict(_window_features(case))
    fields, head_dim = case.config, case.head_dim
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        if any(name.endswith(f"{part}.bias") for name in weights):
            found[f"{part} bias"] = Without(edit=_fill(f"{part}.bias", torch.zeros_like), minimum=MIN_SMALL_EFFECT)
    norms = sorted({name.split(".")[-2] for name in weights if name.endswith("norm.weight")} - {"norm"})
    gemma = case.family == "gemma3_text"
    for norm in norms:
        found[norm] = Without(edit=_replace((norm,), lambda _: nn.Identity()))
        ones = torch.zeros_like if gemma else torch.ones_like
        found[f"{norm} weight"] = Without(edit=_fill(f"{norm}.weight", ones), minimum=MIN_SMALL_EFFECT)
    if case.family in ("olmo2", "olmo3"):
        per_head = _replace(("q_norm", "k_norm"), lambda norm: _PerHead(norm, head_dim))
        found["q and k normed over the whole projection"] = Without(edit=per_head)
    if gemma:
        found["1 + norm weight"] = Without(edit=_fill("norm.weight", lambda weight: weight - 1))
        found["embedding scale"] = Without(edit=lambda model: model.model.embed_tokens.embed_scale.fill_(1.0))
        found["query_pre_attn_scalar"] = Without({"query_pre_attn_scalar": head_dim})
        found["GELU"] = Without({"hidden_activation": "silu"})
        found["tanh in GELU"] = Without({"hidden_activation": "gelu"}, minimum=MIN_TANH_EFFECT)
    elif head_dim != fields["hidden_size"] // fields["num_attention_heads"]:
        found["head_dim in the query scale"] = Without(
            edit=_set_scaling((fields["hidden_size"] / fields["num_attention_heads"]) ** -0.5)
        )
    if case.experts:
        found |= _expert_features(case)
    for key in _MULTIPLIERS:
        if key in fields:
            found[key] = Without({key: head_dim**-0.5 if key == "attention_multiplier" else 1.0})
    if fields.get("rms_norm_eps", 0.0) > 1e-4:
        found["rms_norm_eps"] = Without({"rms_norm_eps": 1e-6}, minimum=MIN_EPS_EFFECT)
    return found
