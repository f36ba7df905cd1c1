"""The steps that a GPU session runs, compiled for an H200 that is not there: two layers at full width."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest

from nanoflow_jax.bench import command
from nanoflow_jax.bench.compare import sides
from nanoflow_jax.bench.report import ThroughputOptions
from nanoflow_jax.bench.session_parts import parts, throughput_commands
from nanoflow_jax.engine.engine import step_shapes
from nanoflow_jax.hardware import load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh, saving_options
from nanoflow_jax.models.llama import param_infos
from nanoflow_jax.models.params import rank_infos
from nanoflow_jax.schedule.attention import why_not_mosaic
from nanoflow_jax.schedule.compile import compile_step, lower_step
from nanoflow_jax.schedule.plan import load_plan, row_quantum
from nanoflow_jax.schedule.slots import BIAS_ROWS, SlotSizes
from nanoflow_jax.schedule.step import StepSpec

LAYERS, PAGES = 2, 4096


def asked() -> dict[str, tuple[ThroughputOptions, str]]:
    """What differs in the compiled step among all runs of the session, with its options and plan."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add(parser.add_subparsers(), argparse.HelpFormatter)
    found: dict[str, tuple[ThroughputOptions, str]] = {}
    for arguments in throughput_commands(parts("python")):
        args: Any = parser.parse_args(arguments)
        options = command._options(args)
        both = sides(options, args.plan, args.compare) if args.compare else sides(options, args.plan, args.plan)
        for side in both:
            o = side.options
            name = f"{o.model} rank {o.rank_of} {side.plan} {o.attention_backend} {o.deterministic}"
            found.setdefault(name, (o, side.plan))
    return found


def test_the_session_covers_what_it_should():
    assert set(asked()) == {
        "llama-3.1-8b rank None two_gather_one_reduce mosaic False",
        "llama-3.1-8b rank None two_gather_one_reduce mosaic True",
        "llama-3.1-8b rank None two_gather_one_reduce xla False",
        "llama-3.1-70b rank 8 nanoflow_70b mosaic False",
        "llama-3.1-70b rank 8 sequential mosaic False",
    }


@pytest.mark.aot
@pytest.mark.parametrize("name", sorted(asked()))
def test_its_largest_step_compiles(name: str):
    options, plan_name = asked()[name]
    hardware, plan = load_hardware("h200"), load_plan(plan_name)
    config = replace(options.config, num_layers=LAYERS)
    assert why_not_mosaic(config, hardware.capability, options.page_size) is None
    devices, mesh = options.rank_of or 1, gpu_mesh(hardware, 1)
    infos: Any = param_infos(config, devices, o_rows=plan.needs_o_rows, o_columns=plan.needs_o_columns)
    if options.rank_of:
        infos = rank_infos(infos, devices)
    slots = options.tokens_per_step * 5 // 8
    pages = -(-options.workload.limit(config.max_position_embeddings) // options.page_size)
    shapes = step_shapes(options.tokens_per_step, slots, pages, row_quantum(devices))
    shape = max(shapes, key=lambda s: (s.rows, s.decode_rows))
    assert shape.rows == 2048
    spec = StepSpec(
        config, plan, shape, options.attention_backend, deterministic=options.deterministic, rank_of=options.rank_of,
        enforce_order=options.rank_of is not None,
    )  # fmt: skip
    sizes = SlotSizes(slots, BIAS_ROWS, pages)
    lowered = lower_step(spec, mesh, infos, sizes, num_pages=PAGES, page_size=options.page_size)
    compiled = compile_step(
        lowered, "cuda", plan, pin_starts=options.rank_of is not None, options=saving_options(hardware)
    )
    assert ("mosaic" in compiled.as_text()) == (options.attention_backend == "mosaic")
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * hardware.memory_bytes
