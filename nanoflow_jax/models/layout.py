"""The weights of a model as the step takes them, and what a mesh makes of its sizes.

Weights keep Hugging Face's [out, in] order, so that every GEMM contracts the last dimension of both operands and
loading never transposes. Fused weights are laid out so that a contiguous shard is what one device needs, whatever
the mesh size: KQV groups each KV head with the query heads it serves; UG keeps gate and up on a leading axis.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from flax import struct

from nanoflow_jax.config import ModelConfig

VOCAB_MULTIPLE = 8  # a device's share of the vocabulary is a multiple of this, for aligned GEMMs


@struct.dataclass
class LayerParams:
    """One decoder layer. G: KV groups (KV heads, replicated up to the mesh size); r: query heads per group; d: head
    size.

    `o_by_output` and `o_by_input` are the same matrix split over its outputs (N) and over its inputs (K); a plan that
    needs one layout only has None for the other.
    """

    kqv: Any  # [G, r + 2, d, H]: per group the query heads, then K, then V
    kqv_bias: Any  # [G, r + 2, d] or None
    o_by_output: Any  # [H, heads * d] split over H, for O split over N
    o_by_input: Any  # [H, heads * d] split over heads, for O split over K
    o_bias: Any  # [H] or None
    ug: Any  # [2, F, H]: gate, up; None in a layer of experts without a shared one, whose weights these are
    ug_bias: Any  # [2, F] or None
    down: Any  # [H, F]
    down_bias: Any  # [H] or None
    sinks: Any = None  # [G, r] float32: a logit of each query head, or None
    experts: Any = None  # ExpertParams, or None


@struct.dataclass
class ExpertParams:
    """E experts of size F, split over their number, or each over F (`Layouts.expert_parallel`)."""

    router: Any  # [E, H]
    router_bias: Any  # [E] or None
    ug: Any  # [E, 2, F, H]: gate, up
    ug_bias: Any  # [E, 2, F] or None
    down: Any  # [E, H, F]
    down_bias: Any  # [E, H] or None
    shared_gate: Any  # [1, H] of the shared expert, or None


@struct.dataclass
class ModelParams:
    """All weights. L: layers; V: vocabulary padded to the mesh.

    The layers' norms are one array: a step's start costs the host time for every argument.
    """

    embedding: Any  # [V, H] split over V
    norms: Any  # [L, 2, H]: of attention and of the MLP, ahead of each or after it; [L, 4, H]: ahead and after of each
    layers: tuple[LayerParams, ...]
    final_norm: Any  # [H]
    head: Any  # [V, H] split over V; None when tied to the embedding
    qk_norms: Any = (
        None  # [L, 2, d]: of a head of q, of k; or [L, G, r + 1, d] split over G: per group q's heads, then k's
    )
    kv_scales: Any = None  # [2 (K, V), layers, G] float32 split over G, of fp8 pages; None without


def kv_groups(config: ModelConfig, devices: int) -> int:
    """Number of KV groups: the KV heads, or the mesh size when there are fewer of them (each is then replicated)."""
    return max(config.num_kv_heads, devices)


MOST_TABLES = 8  # of a request


@dataclass(frozen=True)
class PageTables:
    """Which page tables a request has, and which one a layer reads.

    Layers with one window keep the same tokens, so they may share a table; those with another keep others. A page
    holds one token block of `depth` layers, for every table as many: any page can serve any table, so that one pool
    serves all, whatever a request's length. (Where a kind's number of layers is no multiple of `depth`, some of it is
    left empty.) As vLLM's hybrid KV cache manager has it.

    windows  of each table's layers, None where they see all
    table, place
             of each layer: its table, and its place among the `depth` layers of a page
    """

    windows: tuple[int | None, ...]
    table: tuple[int, ...]
    place: tuple[int, ...]
    depth: int

    @property
    def count(self) -> int:
        return len(self.windows)


@lru_cache(maxsize=64)
def page_tables(config: ModelConfig) -> PageTables:
    """With at most MOST_TABLES tables, those that leave the least empty, above all of layers that see everything."""
    windows = [layer.attention.window for layer in config.layers]
    layers = Counter(windows)

    def empty(depth: int) -> tuple[int, int, int]:
        left = {window: -count % depth for window, count in layers.items()}
        return left.get(None, 0), sum(left.values()), sum(-(-count // depth) for count in layers.values())

    fits = [depth for depth in range(1, config.num_layers + 1) if empty(depth)[2] <= MOST_TABLES]
    depth = min(fits, key=empty)
    found: list[int | None] = []
    seen, table, place, newest = Counter[int | None](), [], [], dict[int | None, int]()
    for window in windows:
        if seen[window] % depth == 0:
            newest[window] = len(found)
            found.append(window)
        table.append(newest[window])
        place.append(seen[window] % depth)
        seen[window] += 1
    return PageTables(tuple(found), tuple(table), tuple(place), depth)


def padded_vocab(config: ModelConfig, devices: int) -> int:
    multiple = VOCAB_MULTIPLE * devices
    return -(-config.vocab_size // multiple) * multiple
