"""Weights: from a Hugging Face folder or a converted orbax checkpoint straight onto the shards of a mesh."""

from nanoflow_jax.weights.checkpoint import convert
from nanoflow_jax.weights.hub import resolve_model
from nanoflow_jax.weights.load import load_params, open_weights
from nanoflow_jax.weights.source import OnProgress, WeightsError, WeightSource

__all__ = ["OnProgress", "WeightSource", "WeightsError", "convert", "load_params", "open_weights", "resolve_model"]
