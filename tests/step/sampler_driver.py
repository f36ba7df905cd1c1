"""Runs the sampler over a mesh of CPU devices, and defines in float64 NumPy what it should compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step import sampler
from nanoflow_jax.step.batch import SamplingArrays
from nanoflow_jax.step.extras import Sample, sample_wanted
from nanoflow_jax.step.logprobs import TokenLogprobs, token_logprobs
from nanoflow_jax.step.sampler_tables import BiasVector
from nanoflow_jax.step.slots import SLOT_SPECS, SlotState

MESHES = (1, 2, 8)
ROWS = 64  # in each batch and table, or more
VOCAB, PADDED = 131, 160  # 29 padding columns: on 8 devices the last shard holds nothing else
NO_ROW = 1_000_000  # past every table


def settings(rows: int, **columns: Any) -> SamplingArrays:
    """Greedy rows without options, except for the columns given: one value, or one per row."""
    kinds = {"top_k": np.int32, "seed": np.uint32} | dict.fromkeys(
        ("position", "history", "bias", "top_logprobs"), np.int32
    )
    defaults = {"top_p": 1, "repetition_penalty": 1, "history": NO_ROW, "bias": NO_ROW, "top_logprobs": -1}
    names = SamplingArrays.__dataclass_fields__  # pyright: ignore[reportAttributeAccessIssue]
    assert set(columns) <= set(names), columns
    values = {name: columns.get(name, defaults.get(name, 0)) for name in names}
    return SamplingArrays(
        **{
            name: np.broadcast_to(np.asarray(v), (rows,)).astype(kinds.get(name, np.float32))
            for name, v in values.items()
        }
    )


class Case(NamedTuple):
    """Everything that the sampler reads for some rows; vocabulary unpadded."""

    logits: np.ndarray  # [B, V]
    params: SamplingArrays
    counts: np.ndarray | None = None  # [S, V]
    biases: np.ndarray | None = None  # [K, V]


def pad(x: np.ndarray, fill: float) -> np.ndarray:
    """At least ROWS rows of zeros, so that few programs are compiled; a vocabulary that eight devices share equally."""
    columns = -x.shape[1] % 8 if x.shape[1] != VOCAB else PADDED - VOCAB
    x = np.pad(x, ((0, max(ROWS - len(x), 0)), (0, 0)))
    return np.pad(x, ((0, 0), (0, columns)), constant_values=np.asarray(fill, x.dtype))


def make_mesh(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), (AXIS,))


def sharded(devices: int, function: Callable[..., Any], out: Any) -> Callable[[Case], Any]:
    """`function(local logits, first column, params, slots)` over a mesh, jitted."""

    def local(logits: jax.Array, params: SamplingArrays, slots: SlotState) -> Any:
        return function(logits, collectives.device_index() * logits.shape[1], params, slots)

    run = jax.jit(
        jax.shard_map(
            local,
            mesh=make_mesh(devices),
            in_specs=(P(None, AXIS), P(), SLOT_SPECS),
            out_specs=out,
            check_vma=False,
        )
    )

    def call(case: Case) -> Any:
        rows, vocab = case.logits.shape
        nothing = np.zeros((0, vocab))
        slots = SlotState(
            tokens=np.zeros(1, np.int32),
            tables=np.zeros((1, 1), np.int32),
            counts=pad((nothing if case.counts is None else case.counts).astype(np.uint16), 0),
            biases=pad((nothing if case.biases is None else case.biases).astype(np.float32), 0),
        )
        params = jax.tree.map(lambda x, y: np.concatenate([x, y]), case.params, settings(max(ROWS - rows, 0)))
        result = run(pad(case.logits.astype(np.float32), -np.inf), params, slots)
        return jax.tree.map(np.asarray, result)

    return call


EVERYTHING = Sample(top_k=True, top_p=True)


class Chosen(NamedTuple):
    tokens: np.ndarray  # [B]
    logprobs: TokenLogprobs  # [B]


def make_sample(devices: int, how: Sample | None) -> Callable[[Case], tuple[tuple[Any, TokenLogprobs], SlotState]]:
    """As after a step: `how` says which program chooses, None the step itself."""

    def local(logits: jax.Array, first: jax.Array, params: SamplingArrays, slots: SlotState) -> Any:
        if how is None:
            tokens = sampler.likeliest(logits, first)
        else:
            tokens, slots = sampler.sample(logits, first, params, slots, top_k=how.top_k, top_p=how.top_p)
        return (tokens, token_logprobs(logits, first, tokens, params.top_logprobs)), slots

    return sharded(devices, local, (P(), SLOT_SPECS))


_sample_padded = cache(make_sample)


def sample_on(devices: int, case: Case, *, least: bool = False) -> tuple[Chosen, np.ndarray]:
    """What was sampled, and the counts afterwards. least: by the smallest program, as the engine, not by one that can
    do everything (each is compiled)."""
    how = wanted_by(case)
    sampled, slots = _sample_padded(devices, how if least or how is None else EVERYTHING)(case)
    counts = slots.counts if case.counts is None else slots.counts[: len(case.counts)]
    return Chosen(*jax.tree.map(lambda x: x[: len(case.logits)], sampled)), counts


def wanted_by(case: Case) -> Sample | None:
    """What the host asks for; tables have ROWS rows or more."""
    tables = (max(ROWS, 0 if x is None else len(x)) for x in (case.biases, case.counts))
    return sample_wanted(case.params, *tables)


def tokens_on(devices: int, logits: np.ndarray, params: SamplingArrays, *tables: Any) -> np.ndarray:
    return sample_on(devices, Case(logits, params, *tables))[0].tokens


Scores = Callable[[Case], np.ndarray]


def make_scores(devices: int, temper: Callable[..., jax.Array] | None = None) -> Scores:
    """The scores that the noise is added to, [B, V]; of greedy rows meaningless."""

    @cache
    def run(how: Sample | None) -> Callable[[Case], np.ndarray]:
        searches = {"top_k": how.top_k, "top_p": how.top_p} if how else {}

        def local(logits: jax.Array, first: jax.Array, params: SamplingArrays, slots: SlotState) -> jax.Array:
            return (temper or partial(sampler.temper, **searches))(sampler.adjust(logits, params, slots), params)

        return sharded(devices, local, P(None, AXIS))

    return lambda case: run(wanted_by(case))(case)[: case.logits.shape[0], : case.logits.shape[1]]


scores_on = cache(make_scores)


# -- what it should compute


def kept_set(scaled: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> np.ndarray:
    """By the definition: tokens at least min_p as likely as the likeliest; of these the top_k likeliest, ties with the
    last included; of their renormalised probabilities, a token is kept when all that are likelier together have not
    yet reached top_p."""
    mass = np.exp(scaled.astype(np.float64) - scaled.max())
    kept = mass >= min_p
    if top_k > 0:
        kept &= scaled >= np.sort(scaled)[::-1][min(top_k, len(scaled)) - 1]
    if top_p < 1:
        mass = np.where(kept, mass, 0.0)
        mass /= mass.sum()
        kept &= np.array([mass[scaled > value].sum() < top_p for value in scaled])
    return kept


def margin(scaled: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> float:
    """Distance of top_p from the nearest cumulative mass and of min_p from the nearest mass, at which float32 may
    decide either way."""
    kept = kept_set(scaled, top_k, 1.0, min_p)
    mass = np.exp(scaled.astype(np.float64) - scaled.max())
    by_min_p = np.abs(mass - min_p).min() if 0 < min_p < 1 else 1.0
    mass = np.where(kept, mass, 0.0)
    mass /= mass.sum()
    by_top_p = min(abs(mass[scaled >= value].sum() - top_p) for value in np.unique(scaled)) if top_p < 1 else 1.0
    return min(by_min_p, by_top_p)


def adjusted(logits: np.ndarray, params: SamplingParams, prompt: Any, output: Any, stop: Any = ()) -> np.ndarray:
    """float64 logits [V] of one row after bias, constraints and penalties; `stop` is forbidden below min_tokens."""
    x = logits.astype(np.float64)
    for token, value in (params.logit_bias or {}).items():
        x[token] += value
    if params.allowed_token_ids is not None:
        x[np.setdiff1d(np.arange(len(x)), list(params.allowed_token_ids))] = -np.inf
    if len(output) < params.min_tokens:
        x[list(stop)] = -np.inf
    for token in {*prompt, *output}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
    return x


def probabilities(adjusted: np.ndarray, params: SamplingParams) -> np.ndarray:
    """float64 [V]: the distribution that a token is drawn from."""
    if params.temperature == 0:
        return (np.arange(len(adjusted)) == adjusted.argmax()).astype(np.float64)
    scaled = (adjusted - adjusted.max()) / params.temperature
    kept = kept_set(scaled, params.top_k, params.top_p, params.min_p)
    mass = np.where(kept, np.exp(scaled), 0.0)
    return mass / mass.sum()


class Row(NamedTuple):
    """One row as a request has it."""

    logits: np.ndarray  # [V]
    params: SamplingParams
    prompt: list[int]
    output: list[int]

    @property
    def adjusted(self) -> np.ndarray:
        return adjusted(self.logits, self.params, self.prompt, self.output, self.params.stop_token_ids)


def case_of(rows: list[Row], **columns: Any) -> Case:
    """The rows in one batch, with a row of counts and a row of biases each; named where they need one."""
    vocab = len(rows[0].logits)
    count = len(rows)
    counts, biases = np.zeros((count, vocab), np.uint16), np.zeros((count, vocab), np.float32)
    names = (
        "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    )  # fmt: skip
    params: dict[str, Any] = {name: [getattr(row.params, name) for row in rows] for name in names}
    params["top_k"] = [max(row.params.top_k, 0) for row in rows]
    params["history"], params["bias"] = np.full(count, NO_ROW), np.full(count, NO_ROW)
    for i, row in enumerate(rows):
        p = row.params
        if (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0, 0, 1):
            params["history"][i] = i
            np.add.at(counts[i], row.output, 1)
            counts[i, row.prompt] |= 1 << 15
        below = len(row.output) < p.min_tokens
        if vector := BiasVector.of(p, p.stop_token_ids if below else ()):
            params["bias"][i] = i
            biases[i] = vector.fill
            biases[i, np.frombuffer(vector.ids, np.int32)] = np.frombuffer(vector.values, np.float32)
    return Case(np.stack([row.logits for row in rows]), settings(count, **(params | columns)), counts, biases)


@cache
def transformers_rows() -> tuple[list[Row], np.ndarray]:
    """The rows of tests/reference/make_sampler_reference.py, and the scores [rows, V] float64 that `transformers`
    computed for them."""
    data = np.load(Path(__file__).parents[1] / "reference" / "data" / "sampler.npz")
    rows = []
    for fields, logits, prompt, output in zip(
        json.loads(str(data["cases"])), data["logits"], data["prompts"], data["outputs"], strict=True
    ):
        if "logit_bias" in fields:
            fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
        rows.append(Row(logits, SamplingParams(**fields, max_tokens=None), prompt.tolist(), output.tolist()))
    return rows, data["scores"]


# -- rows to try

OPTIONS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.8},
    "top_k": {"top_k": 6},
    "min_p": {"min_p": 0.07},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -0.7},
    "repetition_penalty": {"repetition_penalty": 1.4},
    "logit_bias": {"logit_bias": {0: 3.0, 64: -2.5, 130: 6.0}},
    "allowed_token_ids": {"allowed_token_ids": [1, 20, 21, 77, 90, 130]},
    "min_tokens": {"min_tokens": 100, "max_tokens": None, "stop_token_ids": [4, 19, 130]},
}


def random_rows(seed: int, count: int) -> list[Row]:
    """Random settings of all options together; none whose kept set hangs on a rounding."""
    rng = np.random.default_rng(seed)

    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.5 else default

    rows = []
    while len(rows) < count:
        params = SamplingParams(
            temperature=float(maybe(rng.uniform(0.3, 3), 1.0)),
            top_p=float(maybe(rng.uniform(0.05, 1), 1.0)),
            top_k=int(maybe(rng.integers(1, VOCAB + 10), 0)),
            min_p=float(maybe(rng.uniform(0, 0.3), 0.0)),
            presence_penalty=float(maybe(rng.uniform(-2, 2), 0.0)),
            frequency_penalty=float(maybe(rng.uniform(-2, 2), 0.0)),
            repetition_penalty=float(maybe(rng.uniform(0.4, 2.5), 1.0)),
            logit_bias=maybe({int(t): float(rng.uniform(-9, 9)) for t in rng.integers(0, VOCAB, 5)}, None),
            allowed_token_ids=maybe(rng.choice(VOCAB, 60, replace=False).tolist(), None),
            min_tokens=int(maybe(20, 0)),
            max_tokens=None,
            stop_token_ids=rng.integers(0, VOCAB, 3).tolist(),
        )
        few = rng.integers(0, VOCAB, 6)  # tokens that come again
        row = Row(
            rng.normal(0, 2, VOCAB).astype(np.float32),
            params,
            rng.choice(few, 7).tolist() + rng.integers(0, VOCAB, 10).tolist(),
            rng.choice(few, 12).tolist(),
        )
        x = row.adjusted
        scaled = (x - x.max()) / params.temperature
        ordered = np.sort(scaled[scaled > -np.inf])[::-1]
        near_tie = 0 < params.top_k < len(ordered) and ordered[params.top_k - 1] - ordered[params.top_k] < 1e-4
        if margin(scaled, params.top_k, params.top_p, params.min_p) > 1e-4 and not near_tie:
            rows.append(row)
    return rows
