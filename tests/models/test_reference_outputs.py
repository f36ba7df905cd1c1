"""Every family against `transformers`: logits of every position and greedy tokens of every reference checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.config import Mlp, ModelConfig
from nanoflow_jax.models import parts
from nanoflow_jax.models.layout import LayerParams, ModelParams
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.parallel import collectives
from nanoflow_jax.parallel.mesh import valid_sizes
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step import trace
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.slots import KVCache
from nanoflow_jax.weights.hub import resolve_model
from tests.reference.checkpoints import (
    ALL_CASES,
    CASES,
    GREEDY_TOKENS,
    PROMPT_LENGTHS,
    Reference,
    load_reference,
    write_checkpoint,
)
from tests.reference.plain_forward import forward
from tests.step.step_driver import FAST_COMPILE, Driver, Packer, Steps, against_reference, logits_of
from tests.tolerances import TOLERANCES, assert_rows_close, row_errors

COUNT = len(PROMPT_LENGTHS)
# One shape for everything: all prompts at once, or any chunks of them, or one decode row each (and one left empty).
SHAPE = StepShape(COUNT + 1, sum(PROMPT_LENGTHS) + 1, COUNT + 1, pages_per_request=14)
PLANS = ("two_all_reduce", "two_gather_one_reduce")
BY_LENGTH = ("llama_dynamic", "llama_longrope")  # transformers takes another rope for each of their prompts
RUN = [case for case in ALL_CASES if case not in BY_LENGTH]
PLAN_OF = {case: PLANS[i % 2] for i, case in enumerate(ALL_CASES)}
# Of each family one, the one with most in it: where a value is rounded is the same in all others of the family.
IN_BFLOAT16 = (
    "biases", "mistral_window", "ministral3", "qwen2_biases", "qwen3_window_biases", "seed_oss_biases",
    "granite_biases", "olmo2_gqa", "olmo3", "gemma3", "mixtral_window", "qwen2_moe_mixed", "qwen3_moe_mixed", "gpt_oss",
)  # fmt: skip
STEPS = 24  # of decoding: past the next edge of a page, and past every window

Changes = Callable[[ModelConfig], tuple[tuple[str, Any], ...]]
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
    packer = driver.packer(reference.prompts)
    return [packer.pack(prefill=[(s, 0, len(reference.prompts[s])) for s in order])]


def test_every_family_runs_in_bfloat16() -> None:
    """And both plans do."""
    assert {ALL_CASES[case].family for case in IN_BFLOAT16} == {case.family for case in ALL_CASES.values()}
    assert {PLAN_OF[case] for case in IN_BFLOAT16} == set(PLANS)


@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, "float32") for case in RUN), *((case, "bfloat16") for case in IN_BFLOAT16)]
)
def test_logits(case: str, dtype: str, driver_of: GetDriver) -> None:
    """Every position of every prompt, packed into one step in a shuffled order, with page tables in random order. Half
    of the families have windows shorter than the prompts."""
    reference, driver = load_reference(case), driver_of(case, dtype)
    found = logits_of(driver, whole_prompts(reference, driver))
    assert len(found) == sum(PROMPT_LENGTHS)
    assert_rows_close(*against_reference(found, reference, dtype), dtype)


@pytest.fixture(scope="module")
def plain_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Driver]:
    """case -> its config and weights on one device, loaded once; its step is not compiled."""

    @cache
    def get(case: str) -> Driver:
        folder = write_checkpoint(case, tmp_path_factory.mktemp(case))
        longest = max(PROMPT_LENGTHS) if case in BY_LENGTH else None
        return Driver(folder, load_plan("two_all_reduce"), SHAPE, max_length=longest)

    return get


def plain_errors(case: str, driver: Driver, config: ModelConfig | None = None, **params: Any) -> np.ndarray:
    """Of each position of the longest prompt, by the plain forward; `params` replaces some."""
    config, reference = config or driver.config, load_reference(case)
    prompt = max(reference.prompts, key=len)
    run = jax.jit(partial(forward, config), compiler_options=FAST_COMPILE)
    got = np.asarray(run(replace(driver.params, **params), np.array(prompt)))
    return row_errors(got, reference.logits["float32"][reference.prompts.index(prompt)])


@pytest.mark.parametrize("case", [*RUN, *BY_LENGTH])
def test_the_plain_forward(case: str, plain_of: Callable[[str], Driver]) -> None:
    """What steps are compared with where `transformers` has no answer. As exact as a step."""
    assert (plain_errors(case, plain_of(case)) <= TOLERANCES["float32"]).all()


@pytest.mark.parametrize("case", IN_BFLOAT16)
def test_a_plain_forward_that_sees_later_tokens_fails(
    case: str, plain_of: Callable[[str], Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jnp, "tril", lambda x: x)
    assert (plain_errors(case, plain_of(case))[:-1] > TOLERANCES["float32"]).all()


@pytest.mark.parametrize("case", RUN)
def test_greedy_tokens(case: str, driver_of: GetDriver) -> None:
    """Greedy tokens after each prompt in float32, one decode row per request: equal, EOS ignored."""
    reference, driver = load_reference(case), driver_of(case, "float32")
    packer = driver.packer(reference.prompts, room=STEPS, seed=1)
    batch, rows = packer.pack(prefill=[(s, 0, len(p)) for s, p in enumerate(reference.prompts)])
    cache = driver.new_cache()
    for _ in range(STEPS):
        cache, logits = driver.run(cache, batch)
        for row, sequence, position in rows:
            if position == len(packer.tokens[sequence]) - 1:
                packer.tokens[sequence].append(int(logits[row].argmax()))
        batch, rows = packer.pack([None, *((s, len(t) - 1) for s, t in enumerate(packer.tokens))])
    got = [tokens[-STEPS:] for tokens in packer.tokens]
    np.testing.assert_array_equal(got, reference.greedy_tokens[:, :STEPS])


@pytest.mark.parametrize(
    ("case", "length"),
    [
        ("llama_dynamic", 24),
        ("llama_dynamic", 27),
        ("llama_dynamic", 40),
        ("llama_longrope", 32),
        ("llama_longrope", 40),
    ],
)
def test_a_rope_by_length_is_that_of_the_longest_sequence(case: str, length: int, tmp_path: Path) -> None:
    """The dynamic rope is the default up to 24 tokens and then another for each length; longrope has one up to 32 and
    one beyond. `transformers` takes that of the prompt, a step that of `max_model_len`, whatever the prompts."""
    reference, devices = load_reference(case), 8 if length == 40 else 1
    driver = Driver(write_checkpoint(case, tmp_path), load_plan(PLAN_OF[case]), SHAPE, devices, max_length=length)
    found = logits_of(driver, whole_prompts(reference, driver))
    errors = row_errors(*against_reference(found, reference, "float32"))
    last = {s: error for (s, position), error in zip(sorted(found), errors, strict=True)}
    here, first = length, 24 if case == "llama_dynamic" else 32
    for sequence, tokens in enumerate(PROMPT_LENGTHS):
        same = max(tokens, first) == max(here, first) or (case == "llama_longrope" and (tokens > 32) == (here > 32))
        assert (last[sequence] <= TOLERANCES["float32"]) == same, (tokens, last[sequence])


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
@pytest.mark.parametrize(
    "case", ["biases", "llama3_old_rope", "qwen3", "granite_biases", "olmo3", "gemma3_new_rope", "gpt_oss"]
)
def test_chunking_changes_nothing(case: str, how: int | str, driver_of: GetDriver) -> None:
    """Prompts in chunks of any size, token by token through decode rows, or both kinds in one step: the same logits."""
    reference, driver = load_reference(case), driver_of(case, "float32")
    packer = driver.packer(reference.prompts, seed=3)
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
        packer = driver.packer(prompts, seed=4)
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


def attention(**changes: Any) -> Changes:
    """Attention of every layer changed."""
    return lambda config: (
        ("pattern", tuple(replace(at, attention=replace(at.attention, **changes)) for at in config.pattern)),
    )


def no_attention_factor(config: ModelConfig) -> tuple[tuple[str, Any], ...]:
    return attention(rope=replace(config.pattern[0].attention.rope, attention_factor=1.0))(config)


def experts(**changes: Any) -> Changes:
    """Those of every layer changed."""
    return lambda config: (
        (
            "pattern",
            tuple(
                replace(at, mlp=replace(at.mlp, experts=at.mlp.experts and replace(at.mlp.experts, **changes)))
                for at in config.pattern
            ),
        ),
    )


def windows(change: Callable[[int], int | None]) -> Changes:
    """Those of all layers that have one."""
    return lambda config: (
        (
            "pattern",
            tuple(
                replace(at, attention=replace(at.attention, window=at.attention.window and change(at.attention.window)))
                for at in config.pattern
            ),
        ),
    )


def one_rope(config: ModelConfig) -> tuple[tuple[str, Any], ...]:
    """That of the layers which see all, for both kinds."""
    full = next(layer.attention.rope for layer in config.pattern if layer.attention.window is None)
    return attention(rope=full)(config)


def pattern_with(config: ModelConfig, **changes: Any) -> tuple[tuple[str, Any], ...]:
    return (("pattern", tuple(replace(at, mlp=replace(at.mlp, **changes)) for at in config.pattern)),)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("qwen3", attention(qk_norm=None)),
        ("olmo2_gqa", attention(qk_norm=None)),
        ("gemma3", attention(qk_norm=None)),
        ("granite", attention(scale=None)),
        ("granite", lambda config: (("embedding_multiplier", 1.0),)),
        ("granite_biases", lambda config: (("residual_multiplier", 1.0),)),
        ("granite_biases", lambda config: (("logits_divisor", 1.0),)),
        ("qwen2_yarn", no_attention_factor),
        ("qwen2_longrope_long", no_attention_factor),
        ("mistral_window", windows(lambda window: window + 1)),
        ("mistral_window", windows(lambda window: window - 1)),
        ("gemma3", windows(lambda window: window + 1)),
        ("olmo3", windows(lambda window: window - 1)),
        ("olmo3", one_rope),
        ("gemma3_new_rope", one_rope),
        ("olmo2", lambda config: (("norms", "before"),)),
        ("gemma3", lambda config: (("embedding_multiplier", 1.0),)),
        ("gemma3", lambda config: (("pattern", tuple(replace(at, mlp=Mlp()) for at in config.pattern)),)),
        ("ministral3_tied", attention(query_growth=0.0)),
        ("qwen3_moe", experts(normalized=False)),
        ("qwen2_moe", experts(normalized=True)),
        ("mixtral", experts(per_token=1)),
        ("gpt_oss", lambda config: pattern_with(config, limit=float("inf"))),
        ("gpt_oss", lambda config: pattern_with(config, alpha=1.0)),
    ],
)
def test_families_without_what_makes_them_fail(case: str, changes: Changes, plain_of: Callable[[str], Driver]) -> None:
    """A forward that leaves out one thing of a family is far outside either tolerance: a step that is inside has it."""
    driver = plain_of(case)
    broken = replace(driver.config, **dict(changes(driver.config)))
    assert np.median(plain_errors(case, driver, broken)) > TOLERANCES["bfloat16"]


@pytest.mark.parametrize(
    ("case", "forget"),
    [
        ("gpt_oss", lambda layer: replace(layer, sinks=layer.sinks - 1e4)),
        (
            "qwen2_moe",
            lambda layer: replace(layer, experts=replace(layer.experts, shared_gate=layer.experts.shared_gate * 0)),
        ),
        (
            "gpt_oss",
            lambda layer: replace(layer, experts=replace(layer.experts, router_bias=layer.experts.router_bias * 0)),
        ),
    ],
    ids=["sinks", "the shared expert's gate", "the router's bias"],
)
def test_experts_without_what_makes_them_fail(
    case: str, forget: Callable[[LayerParams], LayerParams], driver_of: GetDriver
) -> None:
    reference, driver = load_reference(case), driver_of(case, "float32")
    layers = tuple(map(forget, driver.params.layers))
    found = logits_of(driver, whole_prompts(reference, driver), replace(driver.params, layers=layers))
    assert np.median(row_errors(*against_reference(found, reference, "float32"))) > TOLERANCES["bfloat16"]


@pytest.mark.parametrize("how", ["in each other's place", "without their 1"])
def test_norms_of_gemma_fail(how: str, driver_of: GetDriver) -> None:
    reference, driver = load_reference("gemma3"), driver_of("gemma3", "float32")
    norms = driver.params.norms
    broken = norms[:, jnp.array([0, 2, 1, 3])] if how.startswith("in") else norms - 1
    found = logits_of(driver, whole_prompts(reference, driver), replace(driver.params, norms=broken))
    assert np.median(row_errors(*against_reference(found, reference, "float32"))) > TOLERANCES["bfloat16"]


@pytest.mark.parametrize(
    ("case", "bias"), [("qwen2_biases", "kqv_bias"), ("seed_oss", "kqv_bias"), ("seed_oss_biases", "o_bias")]
)
def test_families_without_their_biases_fail(case: str, bias: str, driver_of: GetDriver) -> None:
    reference, driver = load_reference(case), driver_of(case, "float32")
    layers = tuple(replace(layer, **{bias: getattr(layer, bias) * 0}) for layer in driver.params.layers)
    found = logits_of(driver, whole_prompts(reference, driver), replace(driver.params, layers=layers))
    assert np.median(row_errors(*against_reference(found, reference, "float32"))) > TOLERANCES["bfloat16"]


def test_norms_of_heads_after_the_rope_fail(driver_of: GetDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, driver = load_reference("qwen3"), driver_of("qwen3", "float32")
    rope, late = parts.apply_rope, list[jax.Array]()

    def put_off(fused: jax.Array, weights: jax.Array, *others: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        late.extend(weights)
        return parts.split_kqv(fused)

    def rope_and_norm(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
        return parts.rms_norm(rope(x, cos, sin), late.pop(0), driver.config.rms_norm_eps)

    monkeypatch.setattr(trace, "norm_queries_and_keys", put_off)
    monkeypatch.setattr(parts, "apply_rope", rope_and_norm)
    found = logits_of(replace(driver), whole_prompts(reference, driver), driver.params)
    assert not late
    assert np.median(row_errors(*against_reference(found, reference, "float32"))) > TOLERANCES["bfloat16"]


def test_projections_normed_by_device_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OLMo's norm of all heads is not that of each device's: sums that stay on a device are outside the tolerance, and
    so is a KV head that is counted on each of the devices that have it."""
    reference, folder = load_reference("olmo2_gqa"), write_checkpoint("olmo2_gqa", tmp_path)
    reduce = collectives.all_reduce

    def alone(x: jax.Array) -> jax.Array:
        return x * 8 if x.dtype == jnp.float32 and x.shape[-1] == 2 else reduce(x)

    def doubled(x: jax.Array) -> jax.Array:
        return reduce(x) * jnp.array([[1.0, 4.0]]) if x.shape[-1] == 2 else reduce(x)

    for broken in (alone, doubled):
        monkeypatch.setattr(collectives, "all_reduce", broken)
        driver = Driver(folder, load_plan("two_gather_one_reduce"), SHAPE, 8)
        found = logits_of(driver, whole_prompts(reference, driver))
        assert np.median(row_errors(*against_reference(found, reference, "float32"))) > TOLERANCES["bfloat16"]


def test_reference_files_are_of_these_checkpoints(tmp_path: Path) -> None:
    """Another seed's weights are told apart: the comparison is with this very checkpoint."""
    case = "bare_config"
    reference = load_reference(case)
    folder = write_checkpoint(case, tmp_path, seed=CASES[case].seed + 1)
    driver = Driver(folder, load_plan(PLANS[0]), SHAPE, 1)
    got, want = against_reference(logits_of(driver, whole_prompts(reference, driver)), reference, "float32")
    assert row_errors(got, want).min() > TOLERANCES["bfloat16"]


@pytest.mark.parametrize("case", ["linear_new_rope_sharded", "gemma3"])
def test_greedy_tokens_of_an_llm_on_all_devices(case: str, tmp_path: Path) -> None:
    """Through LLM.generate on eight devices: a share of the vocabulary is 16 entries, so that with 101 of them the last
    device holds nothing but padding; layers of two kinds, whose pages are in two tables."""
    llm = LLM(
        write_checkpoint(case, tmp_path), tokenizer=str(resolve_model("tiny")), dtype="float32",
        tensor_parallel_size=8, max_model_len=112, decode_slots=8, tokens_per_step=64, page_size=8,
        kv_cache_tokens=5 * 112, deterministic=True, progress=False,
    )  # fmt: skip
    reference = load_reference(case)
    params = SamplingParams(temperature=0.0, max_tokens=GREEDY_TOKENS, ignore_eos=True)
    found = [o.outputs[0].token_ids for o in llm.generate(reference.prompts, params, use_tqdm=False)]
    np.testing.assert_array_equal(found, reference.greedy_tokens)
