"""`nanoflow bench host`: what the host does per step, without the model.

The engine is the real one: scheduling, pages, building and packing the inputs, sending them, calling a compiled program
with as many arguments as a large model's step, booking the tokens. Only the program's content is a stand-in, which
returns a token per row at once, so that the machine's cores are free for what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.engine.engine import Engine, StepRecord, step_shapes
from nanoflow_jax.engine.pages import root_key
from nanoflow_jax.engine.runner import Runner
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import is_info
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.extras import Extra, Sample
from nanoflow_jax.step.sampler_tables import SamplerTables
from nanoflow_jax.step.slots import BIAS_ROWS, CACHE_SPECS, SLOT_SPECS, SlotSizes, StepState, packed_length, unpack
from nanoflow_jax.step.trace import StepEnd
from nanoflow_jax.tokenizer import Tokenizer

PAGE_SIZE = 64
SAMPLED = Sample(top_k=False, top_p=True)  # as all requests here
PROMPT, OUTPUT = 614, 1024  # tokens of a request: 768 prefill rows then feed 1280 decode rows


@dataclass(frozen=True)
class HostReport:
    """Milliseconds of the host's work per step, over the steps in which nearly all requests were running."""

    requests: int
    tokens: int
    arguments: int  # of the compiled program
    steps: int
    host_ms_median: float
    host_ms_p99: float
    host_ms_mean: float
    host_cpu_ms_median: float  # on a processor; less than the first where other programs use it too
    rows_used_mean: float

    def text(self) -> str:
        return (
            f"host work per step, {self.requests} running requests, {self.tokens} tokens per step, "
            f"{self.arguments} program arguments, {self.steps} steps:\n"
            f"median {self.host_ms_median:.3f} ms, 99th percentile {self.host_ms_p99:.3f} ms, "
            f"mean {self.host_ms_mean:.3f} ms; "
            f"on a processor, median {self.host_cpu_ms_median:.3f} ms; rows used {self.rows_used_mean:.0f}"
        )


class StandInRunner(Runner):
    """With programs that do nothing but take a step's arguments and return tokens."""

    def __init__(
        self, config: ModelConfig, shapes: list[StepShape], sizes: SlotSizes, num_pages: int, tokens: int = 1000
    ):
        self.sizes, self.num_pages, self.page_size = sizes, num_pages, PAGE_SIZE
        self.on_dispatch, self.mesh = None, Mesh(np.array(jax.devices()[:1]), (AXIS,))
        weights = jax.tree.leaves(param_infos(config, 1), is_leaf=is_info)
        self._params = tuple(jnp.zeros(1, jnp.int32) for _ in weights)
        self.state = jax.tree.map(lambda _: jnp.zeros(1, jnp.int32), StepState(CACHE_SPECS, SLOT_SPECS))
        self.arguments = len(jax.tree.leaves((self._params, self.state))) + 1
        nothing = jnp.zeros(1, jnp.int32)

        def choose(packed: jax.Array, shape: StepShape) -> jax.Array:
            sampling = unpack(packed, shape).sampling
            return (sampling.position * 7 + sampling.seed.astype(jnp.int32) % 1000) % tokens

        self._steps: dict[StepShape, Any] = {}
        self._extras: dict[tuple[Extra, StepShape], Any] = {}
        for shape in shapes:

            def step(params: Any, state: Any, packed: jax.Array, shape: StepShape = shape) -> Any:
                return state, StepEnd(choose(packed, shape), jnp.zeros_like(nothing), jnp.zeros_like(nothing))

            def sample(slots: Any, packed: jax.Array, logits: jax.Array, shape: StepShape = shape) -> Any:
                return slots, choose(packed, shape)

            packed = jax.ShapeDtypeStruct((packed_length(shape),), jnp.int32)
            self._steps[shape] = jax.jit(step, donate_argnums=1).lower(self._params, self.state, packed).compile()
            compiled = jax.jit(sample, donate_argnums=0).lower(self.state.slots, packed, nothing).compile()
            self._extras[SAMPLED, shape] = compiled

    def reset(self) -> None:
        pass


def stand_in_engine(
    config: ModelConfig,
    slots: int,
    rows: int,
    length: int,
    tokenizer: Tokenizer | None = None,
    tokens: int = 1000,
    on_step: Callable[[StepRecord], None] | None = None,
) -> Engine:
    """An engine with a StandInRunner, whose requests have at most `length` tokens."""
    table = -(-length // PAGE_SIZE)
    shapes, sizes = step_shapes(rows, slots, table), SlotSizes(slots, BIAS_ROWS, table)
    runner = StandInRunner(config, shapes, sizes, slots * (table + 1), tokens)
    return Engine(
        runner, shapes, SamplerTables(runner), tokenizer, max_model_len=length, vocab_size=config.vocab_size,
        eos_token_ids=(), seed=0, root=root_key("bench"), on_step=on_step,
    )  # fmt: skip


def measure(requests: int, tokens: int, config: ModelConfig, steps: int) -> HostReport:
    """Runs `steps` steps with `requests` running and takes the times of the full ones."""
    records: list[StepRecord] = []
    engine = stand_in_engine(config, requests, tokens, PROMPT + OUTPUT, on_step=records.append)
    runner: Any = engine.runner
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=OUTPUT, detokenize=False)

    def add(output: int) -> None:
        engine.add(None, rng.integers(0, 1000, PROMPT).tolist(), params, max_tokens=output)

    # Ages of the first ones are spread, as in the middle of a long run.
    for i in range(requests):
        add(max(1, (i * OUTPUT) // requests))
    running = 0
    while running < steps:
        while len(engine.scheduler.waiting) < 16:
            add(OUTPUT)
        engine.step()
        if engine.running.num_running >= 0.95 * requests:
            running += 1
        else:
            records.clear()
            running = 0 if len(records) == 0 else running
    host = np.array([r.host for r in records[-steps:]]) * 1e3
    used = float(np.mean([r.rows_used for r in records[-steps:]]))
    return HostReport(
        requests, tokens, runner.arguments, len(host), float(np.median(host)), float(np.percentile(host, 99)),
        float(host.mean()), float(np.median([r.host_cpu for r in records[-steps:]])) * 1e3, used,
    )  # fmt: skip
