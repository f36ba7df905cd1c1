"""Compiles what a GPU session will, for GPUs that are not there, and prints how long each program took.

    python -m tools.gpu_session.aot                          # calls A and B, and fp8, for an H100 and an H200
    python -m tools.gpu_session.aot --gpu h200 --only beside --layers 1

Seconds of a processor, of all threads and of ptxas: about what a machine takes that has nothing else to do. On the GPU
XLA also tunes cuBLASLt's GEMMs, about 10 s for all shapes of a model, and small programs that make inputs come on top.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas.bench import check, kernels, measure
from kernels_pallas.bench.cases import CASES, AppendCase, Case, DecodeCase
from kernels_pallas.bench.expert_cases import ExpertCase
from kernels_pallas.bench.experts import expert_call
from kernels_pallas.bench.kernels import Setting
from kernels_pallas.self_check_cases import make_check
from kernels_pallas.tuning import GROUPED, tuned_gpu
from nanoflow_jax.bench.report import ThroughputOptions
from nanoflow_jax.commands import bench as command
from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.engine import step_shapes
from nanoflow_jax.hardware import Hardware, load_hardware
from nanoflow_jax.inspect.gpu_target import gpu_mesh, saving_options
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.params import rank_infos
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.plan import row_quantum
from nanoflow_jax.profile.programs import Bench, compile_pair
from nanoflow_jax.step.compile import Program, compile_step
from nanoflow_jax.step.extras import Extra, Logprobs
from nanoflow_jax.step.slots import BIAS_ROWS, SlotSizes
from nanoflow_jax.step.trace import StepSpec
from nanoflow_jax.system.platform import without_compile_cache
from tools.gpu_session import attention_check, beside, new_parser
from tools.gpu_session.parts import CHECK, KERNELS, THROUGHPUT, TOKENS, Part, call_a, good, of_experts, whole_fp8

PROGRAM = "tools.gpu_session.aot"
GPUS = ("h100_sxm", "h200")


@dataclass(frozen=True)
class Compiled:
    """A compiled program, and the seconds that took."""

    program: Any
    lowering: float
    compiling: float


Compile = Callable[[Mesh, Hardware], Compiled]
Named = Iterator[tuple[str, Compile]]


def _spent() -> float:
    """Seconds of a processor, of this process and of those it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def programs(part: Part, layers: int | None = None) -> Named:
    """What the process of a part compiles, by name. layers: at most so many of a model."""
    module = part.arguments[1]
    if module == CHECK[1]:
        return _checks(part)
    if module == KERNELS[1]:
        return _kernels(part)
    if module == TOKENS[1]:
        return _tokens(part, layers)
    if part.arguments[: len(THROUGHPUT)] == THROUGHPUT:
        return _steps(*run_options(part), layers)
    return _beside() if module == beside.__name__ else iter(())


def _jitted(function: Callable[..., Any], *avals: Any) -> Compile:
    """A function of one device's arrays."""

    def build(mesh: Mesh, hardware: Hardware) -> Compiled:
        sharding = NamedSharding(mesh, P())
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), avals)
        jitted: Any = function if hasattr(function, "trace") else jax.jit(function)
        began = _spent()
        lowered = jitted.trace(*placed).lower(lowering_platforms=("cuda",))
        middle = _spent()
        compiled = lowered.compile(saving_options(hardware))
        return Compiled(compiled, middle - began, _spent() - middle)

    return build


def _checks(part: Part) -> Named:
    options = check._parser().parse_args(part.arguments[2:])
    models, variants = check.chosen(options)

    for heads in models:
        name = f"{heads.q_heads}/{heads.kv_heads}x{heads.head_dim}"

        def build(mesh: Mesh, hardware: Hardware, variant: Any, heads: Any = heads) -> Compiled:
            tuning = check.tuning_of(options, tuned_gpu(hardware.device_name))
            one = make_check(options.kernel, heads, tuning=tuning)
            return _jitted(one.reference if variant is None else partial(one.run, variant), *one.arrays)(mesh, hardware)

        yield f"{name}, XLA", partial(build, variant=None)
        for variant in variants:
            yield f"{name}, {variant.text}", partial(build, variant=variant)


def _kernels(part: Part) -> Named:
    if "--only-ceilings" in part.arguments:
        effort = measure.FULL
        square = jax.ShapeDtypeStruct((effort.gemm, effort.gemm), jnp.bfloat16)
        bytes_ = jax.ShapeDtypeStruct((effort.copy_bytes // 4,), jnp.uint32)
        yield "copies", _jitted(measure.copies(effort.calls(measure.COPY_SECONDS)), bytes_)
        yield "GEMMs", _jitted(measure.gemm_program(effort.calls(measure.GEMM_SECONDS)), square, square, [()])
        return

    def build(mesh: Mesh, hardware: Hardware, case: Case) -> Compiled:
        setting = Setting(gpu=tuned_gpu(hardware.device_name), capability=hardware.capability)
        calls, sets = setting.calls(case), setting.sets(case)
        if isinstance(case, ExpertCase):
            first, shared, own = case.avals()
            call = expert_call(case, setting.mosaic(GROUPED))
            return _jitted(measure.chained(call, sets, calls), first, shared, [own] * sets)(mesh, hardware)
        if isinstance(case, AppendCase):
            keys, values, *own = case.avals()
            program = kernels.appends(kernels.append_call(case, setting, "mosaic"), sets, calls)
            return _jitted(program, (keys, values), [tuple(own[:4])] * sets, tuple(own[4:]))(mesh, hardware)
        if isinstance(case, DecodeCase):
            q, k, v, table, *rest = case.avals(sets * case.pages)
            call = kernels.decode_call(case, setting)
        else:
            q, k, v, table, *rest = case.avals()
            call = kernels.prefill_call(setting)
        return _jitted(measure.chained(call, sets, calls), q, (k, v, *rest), [table] * sets)(mesh, hardware)

    names = [part.arguments[i + 1] for i, argument in enumerate(part.arguments) if argument == "--case"]
    for name in names:
        yield "timed" if len(names) == 1 else f"{name}, timed", partial(build, case=CASES[name])


def _tokens(part: Part, layers: int | None) -> Named:
    arguments = part.arguments
    model = arguments[arguments.index("--model") + 1] if "--model" in arguments else "tiny"
    chosen = attention_check.setting(model)
    other = replace(chosen.options, attention_backend=chosen.backend)
    yield from _steps(chosen.options, chosen.plan, layers, Logprobs())
    yield from _steps(other, chosen.other, layers, Logprobs())


def run_options(part: Part) -> tuple[ThroughputOptions, str]:
    """What a part of `nanoflow bench throughput` asks for, and its plan."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command.add(parser.add_subparsers())
    args: Any = parser.parse_args(part.arguments[2:])
    return command._options(args), args.plan


def _steps(options: ThroughputOptions, plan_name: str, layers: int | None, *extras: Extra) -> Named:
    """The steps that `engine.setup.build_engine` compiles, and what their rows want beyond the likeliest tokens."""
    config = replace(options.config, num_layers=min(layers or options.config.num_layers, options.config.num_layers))
    plan, devices, page_size = load_plan(plan_name), options.rank_of or 1, options.page_size
    slots = options.decode_slots or options.tokens_per_step * 5 // 8
    limit = options.max_model_len or options.workload.limit(config.max_position_embeddings)
    shapes = step_shapes(options.tokens_per_step, slots, -(-limit // page_size), row_quantum(devices))
    if options.one_shape or options.deterministic:
        shapes = [max(shapes, key=lambda shape: (shape.rows, shape.decode_rows))]
    ranked = options.rank_of is not None

    def build(mesh: Mesh, hardware: Hardware, shape: Any, extra: Extra | None) -> Compiled:
        infos: Any = param_infos(config, devices, plan.layouts(config, devices))
        spec = StepSpec(
            config, plan, shape, options.attention_backend, options.kv_cache_dtype,
            deterministic=options.deterministic, rank_of=options.rank_of, enforce_order=ranked,
        )  # fmt: skip
        sizes = SlotSizes(slots, BIAS_ROWS, -(-limit // page_size))
        pages = (options.kv_cache_tokens or 4096 * page_size) // page_size
        began = _spent()
        local = rank_infos(infos, devices) if ranked else infos
        program = Program(spec, mesh, local, sizes, pages, page_size)
        lowered = program.lower(shape) if extra is None else program.lower_extra(extra, shape)
        middle, chosen = _spent(), saving_options(hardware)
        if extra is None:
            compiled = compile_step(lowered, "cuda", plan, pin_starts=ranked, options=chosen)
        else:
            compiled = compile_step(lowered, "cuda", None, options=chosen)
        return Compiled(compiled, middle - began, _spent() - middle)

    for shape in shapes:
        rows = f"{shape.decode_rows} + {shape.prefill_rows} rows"
        name = f"{options.model}, {config.num_layers} layers, {plan_name}, {options.attention_backend}, {rows}"
        for extra in (None, *extras):
            after = f"{options.model}, after a step, {type(extra).__name__}, {rows}"
            yield after if extra else name, partial(build, shape=shape, extra=extra)


def _beside() -> Named:
    """Each alone, and the rounds of `profile.timing.time_pair`, whose counts it finds by measuring."""
    both = beside.points(48, tiny=False)
    for a, b in ((1, 0), (0, 1), (3, 1), (1, 4)):

        def build(mesh: Mesh, hardware: Hardware, a: int = a, b: int = b) -> Compiled:
            bench = Bench(mesh, True, hardware.l2_bytes, beside.MOST_BYTES)
            began = _spent()
            first, second = beside.kernels_of(both, b, "mosaic")
            program = compile_pair(bench, first, second, a, min(b, 1), saving_options(hardware))
            return Compiled(program, 0.0, _spent() - began)

        yield f"{a} GEMMs beside {b} of attention", build


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser(PROGRAM, __doc__)
    parser.add_argument("--gpu", nargs="+", default=list(GPUS), help=f"names in configs/hardware (default: {GPUS})")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts only")
    parser.add_argument("--layers", type=int, help="of a model, at most; all that a part runs when not given")
    options = parser.parse_args(arguments)
    names = [part.name for part in [*call_a(), *good("h100"), whole_fp8("h100"), *of_experts()]]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"--only: {sorted(unknown)[0]!r} is no part; accepted: {', '.join(names)}")
    try:
        gpus = {gpu: load_hardware(gpu) for gpu in options.gpu}
    except ConfigError as error:
        parser.error(f"--gpu: {error}")
    status = 0
    for gpu, hardware in gpus.items():
        mesh = gpu_mesh(hardware, 1)
        tuned = tuned_gpu(hardware.device_name)
        for part in [*call_a(), *good(tuned), whole_fp8(tuned), *of_experts()]:
            if options.only and part.name not in options.only:
                continue
            total = 0.0
            for name, build in programs(part, options.layers):
                with without_compile_cache():
                    found = build(mesh, hardware)
                total += found.lowering + found.compiling
                print(
                    f"{gpu} {part.name}: {name}: lowered {found.lowering:.1f} s, compiled {found.compiling:.1f} s",
                    flush=True,
                )
            if total:
                status |= total > part.seconds
                print(f"{gpu} {part.name}: {total:.1f} s of its {part.seconds} s", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
