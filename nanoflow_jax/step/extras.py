"""What some rows of a step want beyond the likeliest token: sampling, masks, bias, penalties, logprobs, scores of the
prompt.

Each is a small program of its own, which the host starts after the step when some row wants it: the host knows that
ahead, so no conditional asks for it on the device. Outside of a command buffer, as beside a lane or with collectives
inside, the host would wait for each predicate, and dispatch the next step when this one is nearly done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.models.params import is_info
from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.step.batch import SamplingArrays
from nanoflow_jax.step.head import first_token, head_logits
from nanoflow_jax.step.logprobs import SCORE_CHUNK, Scores, TokenLogprobs, score_chunk, token_logprobs
from nanoflow_jax.step.sampler import Masks, biased, penalized, sample
from nanoflow_jax.step.slots import SLOT_SPECS, SlotSizes, SlotState, StepInputs, unpack
from nanoflow_jax.step.trace import END_SPECS, StepSpec


@dataclass(frozen=True)
class Sample:
    """`(slots, packed, logits) -> (slots, tokens [B])`, slots donated; which searches it needs. masks: of constrained
    rows, there is room for so many in a fourth argument, `Masks`; 0: there is none."""

    top_k: bool
    top_p: bool
    masks: int = 0


@dataclass(frozen=True)
class Logprobs:
    """`(packed, logits, tokens) -> TokenLogprobs [B]`, of the tokens that were chosen."""


@dataclass(frozen=True)
class Score:
    """`(leaves, packed, hidden, scores) -> scores`, a chunk of prompt rows further (`logprobs.score_chunk`)."""


Extra = Sample | Logprobs | Score
FEW_MASKS = 8
LARGEST: tuple[Extra, ...] = (Sample(True, True, FEW_MASKS), Logprobs(), Score())
MASK_SPECS = Masks(bits=P(None, AXIS), rows=P())


@dataclass(frozen=True)
class Wanted:
    """By the rows of a step. chunks: how often Score is run."""

    sample: Sample | None
    logprobs: bool
    chunks: int


def wanted(inputs: StepInputs, sizes: SlotSizes) -> Wanted:
    """inputs: NumPy arrays."""
    params = inputs.sampling
    scored = int(np.count_nonzero(inputs.targets >= 0))
    return Wanted(
        sample_wanted(params, sizes.bias_rows, sizes.slots),
        bool((params.top_logprobs >= 0).any()),
        -(-scored // SCORE_CHUNK),
    )


def sample_wanted(params: SamplingArrays, bias_rows: int, histories: int) -> Sample | None:
    """By rows [B] of NumPy arrays; None: the likeliest tokens will do. bias_rows, histories: rows of the tables."""
    sampled = params.temperature > 0
    if not (sampled.any() or biased(params, bias_rows).any() or penalized(params, histories).any()):
        return None
    return Sample(bool((sampled & (params.top_k > 0)).any()), bool((sampled & (params.top_p < 1)).any()))


def room_for_masks(count: int, rows: int) -> int:
    """How many masks a program takes where `count` of its `rows` rows have one: few programs are compiled."""
    room = FEW_MASKS
    while room < count:
        room *= 4
    return min(room, max(rows, FEW_MASKS))


def build_extra(extra: Extra, spec: StepSpec, mesh: Mesh, infos: ModelParams) -> jax.stages.Wrapped:
    """The jitted program, for steps of `spec.shape`."""
    shape, config = spec.shape, spec.config
    declared, tree = jax.tree.flatten(infos, is_leaf=is_info)

    def choose(
        slots: SlotState, packed: jax.Array, logits: jax.Array, masks: Masks | None = None
    ) -> tuple[SlotState, jax.Array]:
        assert isinstance(extra, Sample)
        inputs = unpack(packed, shape)
        with jax.named_scope("SAMPLE.1"):
            tokens, slots = sample(
                logits, first_token(logits), inputs.sampling, slots, masks=masks, top_k=extra.top_k, top_p=extra.top_p
            )
            return replace(slots, tokens=slots.tokens.at[inputs.slots].set(tokens, mode="drop")), tokens

    def logprobs(packed: jax.Array, logits: jax.Array, tokens: jax.Array) -> TokenLogprobs:
        with jax.named_scope("SCORE.1"):
            tops = unpack(packed, shape).sampling.top_logprobs
            return token_logprobs(logits, first_token(logits), tokens, tops)

    def score(leaves: tuple[jax.Array, ...], packed: jax.Array, hidden: jax.Array, scores: Scores) -> Scores:
        params, inputs = jax.tree.unflatten(tree, leaves), unpack(packed, shape)

        def head(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = head_logits(config, params, rows)
            return logits, first_token(logits)

        with jax.named_scope("SCORE.1"):
            return score_chunk(head, hidden, inputs.targets, inputs.target_logprobs[0], scores)

    function: Callable[..., Any]
    if isinstance(extra, Sample):
        given = SLOT_SPECS, P(), END_SPECS.logits, *((MASK_SPECS,) if extra.masks else ())
        function, out = choose, (SLOT_SPECS, P())
    elif isinstance(extra, Logprobs):
        function, given, out = logprobs, (P(), END_SPECS.logits, P()), P()
    else:
        function, given, out = score, (tuple(info.spec for info in declared), P(), END_SPECS.hidden, P()), P()

    def run(*arguments: Any) -> Any:
        with collectives.rank_slice(spec.rank_of):
            return function(*arguments)

    sharded = jax.shard_map(run, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
    return jax.jit(sharded, donate_argnums=(0,) if isinstance(extra, Sample) else ())
