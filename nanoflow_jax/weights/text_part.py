"""The text model of a checkpoint that has a vision tower, too: the same tensors under the names of a text model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nanoflow_jax.models.params import Index
from nanoflow_jax.weights.source import TensorInfo, WeightSource

# As transformers 4 and 5 name them.
_TEXT = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model."}
_OTHERS = tuple(f"{at}{part}." for at in ("", "model.") for part in ("vision_tower", "multi_modal_projector"))


def text_part(source: WeightSource) -> WeightSource:
    """The source itself where it is a text model's."""
    return TextPart(source) if any(name.startswith(tuple(_TEXT)) for name in source.table) else source


class TextPart:
    """A `WeightSource`."""

    def __init__(self, source: WeightSource):
        self._source = source
        self._stored = {_text_name(name): name for name in source.table if not name.startswith(_OTHERS)}
        self.table: Mapping[str, TensorInfo] = {name: source.table[stored] for name, stored in self._stored.items()}

    @property
    def folder(self) -> Path:
        return self._source.folder

    def read_slice(self, name: str, index: Index) -> np.ndarray:
        return self._source.read_slice(self._stored[name], index)


def _text_name(stored: str) -> str:
    return next((new + stored.removeprefix(old) for old, new in _TEXT.items() if stored.startswith(old)), stored)
