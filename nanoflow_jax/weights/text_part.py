"""The text model of a checkpoint that has a vision tower, too: the same tensors under the names of a text model."""

from __future__ import annotations

from nanoflow_jax.weights.source import Renamed, WeightSource

# As transformers 4 and 5 name them.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_OTHERS = tuple(f"{at}{part}." for at in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))


def text_part(source: WeightSource) -> WeightSource:
    """The source itself where it is a text model's."""
    if not any(name.startswith(tuple(_TEXT)) for name in source.table):
        return source
    found = Renamed(source)
    for name, tensor in source.table.items():
        if not name.startswith(_OTHERS):
            found.add(_text_name(name), tensor, name)
    return found


def _text_name(stored: str) -> str:
    return next((new + stored.removeprefix(old) for old, new in _TEXT.items() if stored.startswith(old)), stored)
