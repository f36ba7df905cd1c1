"""The model against `transformers`: logits of every prompt position and greedy tokens of every reference checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.models.layout import LayerParams, ModelParams
from nanoflow_jax.models.llama import forward
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel.mesh import valid_sizes
from nanoflow_jax.plan.plan import load_plan
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.trace import KVCache
from nanoflow_jax.weights.hub import resolve_model
from tests.reference.checkpoints import (
    CASES,
    GREEDY_TOKENS,
    PROMPT_LENGTHS,
    Reference,
    load_reference,
    write_checkpoint,
)
from tests.step.step_driver import FAST_COMPILE, Driver, Packer, Steps, against_reference, logits_of
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

COUNT = len(PROMPT_LENGTHS)
# One shape for everything: all prompts at once, or any chunks of them, or one decode row each (and one left empty).
SHAPE = StepShape(COUNT + 1, sum(PROMPT_LENGTHS) + 1, COUNT + 1, pages_per_request=14)
PLANS = ("two_all_reduce", "two_gather_one_reduce")
PLAN_OF = {case: PLANS[i % 2] for i, case in enumerate(CASES)}  # both plans are used in each dtype

GetDriver = Callable[[str, str], Driver]


@pytest.fixture(scope="module")
def driver_of(tmp_path_factory: pytest.TempPathFactory) -> GetDriver:
    """(case, dtype) -> its step on the most devices it divides into, compiled once."""
    drivers: dict[tuple[str, str], Driver] = {}

    def get(case: str, dtype: str) -> Driver:
        if (case, dtype) not in drivers:
            folder = write_checkpoint(case, tmp_path_factory.mktemp(case))
            sizes = valid_sizes(read_config(folder / "config.json"))
            devices = max(n for n in sizes if n <= jax.device_count())
            drivers[case, dtype] = Driver(folder, load_plan(PLAN_OF[case]), SHAPE, devices, dtype)
        return drivers[case, dtype]

    return get


def whole_prompts(reference: Reference, driver: Driver, order: tuple[int, ...] = (3, 0, 4, 2, 1)) -> Steps:
    packer = Packer(reference.prompts, driver.shape, driver.num_pages)
    return [packer.pack(prefill=[(s, 0, len(reference.prompts[s])) for s in order])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, dtype: str, driver_of: GetDriver) -> None:
    """Every position of every prompt, packed into one step in a shuffled order, with page tables in random order."""
    reference, driver = load_reference(case), driver_of(case, dtype)
    got, want = against_reference(logits_of(driver, whole_prompts(reference, driver)), reference, dtype)
    assert got.shape == (sum(PROMPT_LENGTHS), driver.config.vocab_size)
    assert_rows_close(got, want, dtype)


@pytest.mark.parametrize("case", CASES)
def test_the_plain_forward(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What steps are compared with where `transformers` has no answer. As exact as a step; one that sees later
    tokens is not."""
    reference, folder = load_reference(case), write_checkpoint(case, tmp_path)
    driver = Driver(folder, load_plan("two_all_reduce"), SHAPE)
    run = jax.jit(partial(forward, driver.config), compiler_options=FAST_COMPILE)
    prompt = max(reference.prompts, key=len)
    place = reference.prompts.index(prompt)
    got, want = np.asarray(run(driver.params, np.array(prompt))), reference.logits["float32"][place]
    assert_rows_close(got, want, "float32")
    monkeypatch.setattr(jnp, "tril", lambda x: x)
    blind = jax.jit(partial(forward, driver.config), compiler_options=FAST_COMPILE)
    foreseen = np.asarray(blind(driver.params, np.array(prompt)))[:-1]
    assert (row_errors(foreseen, want[:-1]) > TOLERANCES["float32"]).all()


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(case: str, driver_of: GetDriver) -> None:
    """64 greedy tokens after each prompt in float32, one decode row per request: equal, EOS ignored."""
    reference, driver = load_reference(case), driver_of(case, "float32")
    packer = Packer(reference.prompts, SHAPE, driver.num_pages, room=GREEDY_TOKENS, seed=1)
    batch, rows = packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(reference.prompts)])
    cache = driver.new_cache()
    for _ in range(GREEDY_TOKENS):
        cache, logits = driver.run(cache, batch)
        for row, sequence, position in rows:
            if position == len(packer.tokens[sequence]) - 1:
                packer.tokens[sequence].append(int(logits[row].argmax()))
        batch, rows = packer.pack([None, *((s, len(t) - 1) for s, t in enumerate(packer.tokens))])
    got = [tokens[-GREEDY_TOKENS:] for tokens in packer.tokens]
    np.testing.assert_array_equal(got, reference.greedy_tokens)


def chunked(reference: Reference, packer: Packer, chunk: int) -> Steps:
    steps = []
    for start in range(0, max(PROMPT_LENGTHS), chunk):
        ends = {s: min(start + chunk, len(p)) for s, p in enumerate(reference.prompts)}
        steps.append(packer.pack(prefill=[(s, start, end) for s, end in ends.items() if end > start]))
    return steps


def one_by_one(reference: Reference, packer: Packer) -> Steps:
    """Decode rows only; a prompt that has ended leaves its row empty."""
    prompts = reference.prompts
    return [
        packer.pack([(s, at) if at < len(p) else None for s, p in enumerate(prompts)])
        for at in range(max(PROMPT_LENGTHS))
    ]


def mixed(reference: Reference, packer: Packer) -> Steps:
    """Each step decodes the prompts of even number by one token and prefills those of odd number by five."""
    steps = []
    for step in range(max(PROMPT_LENGTHS)):
        lengths = list(enumerate(map(len, reference.prompts)))
        decode = [(s, step) if s % 2 == 0 and step < n else None for s, n in lengths]
        prefill = [(s, 5 * step, min(5 * step + 5, n)) for s, n in lengths if s % 2 and 5 * step < n]
        steps.append(packer.pack(decode, prefill))
    return steps


@pytest.mark.parametrize("how", [1, 3, 8, 16, 17, 39, "one by one", "mixed"])
@pytest.mark.parametrize("case", ["biases", "llama3_old_rope"])
def test_chunking_changes_nothing(case: str, how: int | str, driver_of: GetDriver) -> None:
    """Prompts in chunks of any size, token by token through decode rows, or both kinds in one step: the same logits."""
    reference, driver = load_reference(case), driver_of(case, "float32")
    packer = Packer(reference.prompts, SHAPE, driver.num_pages, seed=3)
    if isinstance(how, int):
        steps = chunked(reference, packer, how)
    else:
        steps = {"one by one": one_by_one, "mixed": mixed}[how](reference, packer)
    found = logits_of(driver, steps)
    assert len(found) == sum(PROMPT_LENGTHS)
    assert_rows_close(*against_reference(found, reference, "float32"), "float32")


def test_broken_pages_fail(driver_of: GetDriver) -> None:
    """Mistakes with the pages, made between prefill and the last token's decode, are far outside either tolerance."""
    case = "biases"
    reference, driver = load_reference(case), driver_of(case, "float32")
    prompts = reference.prompts
    want = np.stack([logits[-1] for logits in reference.logits["float32"]])

    def last_logits(
        change: Callable[[KVCache], KVCache] = lambda cache: cache,
        lost: int | None = None,
        tables: Callable[[np.ndarray], np.ndarray] = lambda tables: tables,
    ) -> np.ndarray:
        packer = Packer(prompts, SHAPE, driver.num_pages, seed=4)
        batch, _ = packer.pack(prefill=[(s, 0, len(p) - 1) for s, p in enumerate(prompts)])
        if lost is not None:  # every prompt loses the K and V of this position
            batch.write_pages[batch.positions == lost] = driver.num_pages
        cache, _ = driver.run(driver.new_cache(0.0), batch)
        packer.tables = tables(packer.tables)
        batch, rows = packer.pack([(s, len(p) - 1) for s, p in enumerate(prompts)])
        _, logits = driver.run(change(cache), batch)
        return np.stack([logits[row] for row, _, _ in rows])

    def identity(tables: np.ndarray) -> np.ndarray:
        return np.arange(tables.size, dtype=np.int32).reshape(tables.shape)

    assert_rows_close(last_logits(), want, "float32")
    found = {
        "K and V swapped": last_logits(lambda cache: KVCache(cache.v, cache.k)),
        "a position lost": last_logits(lost=1),
        "tables of the neighbour": last_logits(tables=lambda tables: np.roll(tables, 1, axis=0)),
        "identity tables": last_logits(tables=identity),
    }
    for name, logits in found.items():
        assert row_errors(logits, want).min() > TOLERANCES["bfloat16"], name


def test_broken_models_fail(driver_of: GetDriver) -> None:
    """Mistakes in the weights and the rope are far outside either tolerance at most positions."""
    case = "biases"
    reference, driver = load_reference(case), driver_of(case, "float32")
    steps = whole_prompts(reference, driver)
    layers = driver.params.layers
    swapped = layers[0].kqv[:, [*range(layers[0].kqv.shape[1] - 2), -1, -2]]
    shuffled = layers[0].kqv[::-1]
    no_bias = replace(layers[1], o_bias=layers[1].o_bias * 0)
    lost_row = layers[1].down.at[5].set(0.0)

    def with_layers(*new: LayerParams) -> ModelParams:
        return jax.device_put(replace(driver.params, layers=new), jax.tree.map(lambda x: x.sharding, driver.params))

    twins = {
        "K for V": with_layers(replace(layers[0], kqv=swapped), layers[1]),
        "heads on the wrong device": with_layers(replace(layers[0], kqv=shuffled), layers[1]),
        "a bias forgotten": with_layers(layers[0], no_bias),
        "a row of a weight lost": with_layers(layers[0], replace(layers[1], down=lost_row)),
        "layers in the wrong order": with_layers(layers[1], layers[0]),
    }
    found = {name: logits_of(driver, steps, params) for name, params in twins.items()}
    (layer,) = driver.config.pattern
    rope = replace(layer.attention.rope, theta=layer.attention.rope.theta * 1.5)
    pattern = (replace(layer, attention=replace(layer.attention, rope=rope)),)
    found["another rope_theta"] = logits_of(replace(driver, config_changes=(("pattern", pattern),)), steps)
    for name, logits in found.items():
        got, want = against_reference(logits, reference, "float32")
        assert np.median(row_errors(got, want)) > TOLERANCES["bfloat16"], name


def test_reference_files_are_of_these_checkpoints(tmp_path: Path) -> None:
    """Another seed's weights are told apart: the comparison is with this very checkpoint."""
    case = "bare_config"
    reference = load_reference(case)
    folder = write_checkpoint(case, tmp_path, seed=CASES[case].seed + 1)
    driver = Driver(folder, load_plan(PLANS[0]), SHAPE, 1)
    got, want = against_reference(logits_of(driver, whole_prompts(reference, driver)), reference, "float32")
    assert row_errors(got, want).min() > TOLERANCES["bfloat16"]


@pytest.mark.parametrize("case", ["linear_new_rope_sharded", "llama3_new_rope_tied"])
def test_greedy_tokens_of_an_llm_on_all_devices(case: str, tmp_path: Path) -> None:
    """Through LLM.generate on eight devices: a share of the vocabulary is 16 entries, so that with 101 or 112 of them
    the last device holds nothing but padding."""
    llm = LLM(
        write_checkpoint(case, tmp_path), tokenizer=str(resolve_model("tiny")), dtype="float32",
        tensor_parallel_size=8, max_model_len=112, decode_slots=8, tokens_per_step=64, page_size=8,
        kv_cache_tokens=5 * 112, deterministic=True, progress=False,
    )  # fmt: skip
    reference = load_reference(case)
    params = SamplingParams(temperature=0.0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
    found = [o.outputs[0].token_ids for o in llm.generate(reference.prompts, params, use_tqdm=False)]
    np.testing.assert_array_equal(found, reference.greedy_tokens)
