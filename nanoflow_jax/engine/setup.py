"""From a model and options to an engine: sizes, memory, weights, compiled steps."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from kernels_pallas.checks import FP8
from kernels_pallas.self_check import Heads
from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.engine.engine import Engine, step_shapes
from nanoflow_jax.engine.kernel_check import check_mosaic_kernels
from nanoflow_jax.engine.memory import (
    check_requested,
    check_weights,
    host_memory,
    page_bytes,
    plan_pages,
    usable_memory,
)
from nanoflow_jax.engine.multiprocess import FollowerEngine, LeaderEngine
from nanoflow_jax.engine.offload import OffloadStore
from nanoflow_jax.engine.pages import Key, root_key
from nanoflow_jax.engine.runner import Runner, compile_steps
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.kv_scales import find_kv_scales
from nanoflow_jax.models.layout import ModelParams, kv_groups
from nanoflow_jax.models.params import is_info, rank_infos
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.parallel.processes import Processes, joined
from nanoflow_jax.plan.ops import ATTENTION, OPS
from nanoflow_jax.plan.plan import SchedulePlan, row_quantum
from nanoflow_jax.step.attention import KernelBackends, choose_backend, page_dtype
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.sampler_tables import SamplerTables
from nanoflow_jax.step.slots import BIAS_ROWS, SlotSizes, abstract_slots
from nanoflow_jax.step.trace import StepSpec
from nanoflow_jax.system.platform import warn_without_ptxas
from nanoflow_jax.system.progress import Progress
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.version import __version__
from nanoflow_jax.weights.load import load_params, model_digest, open_weights
from nanoflow_jax.weights.source import WeightSource, check_tensors

logger = logging.getLogger("nanoflow_jax")

CPU_DECODE_SLOTS = 64
CPU_CACHE_TOKENS = 65536


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """As `LLM` documents them."""

    max_model_len: int | None
    tokens_per_step: int
    decode_slots: int | None
    page_size: int
    kv_cache_tokens: int | None
    memory_utilization: float
    enable_prefix_caching: bool
    kv_offload_bytes: int
    kv_offload_disk_bytes: int
    kv_offload_folder: str | Path | None
    deterministic: bool
    attention_backend: str
    kv_cache_dtype: str
    seed: int
    progress: bool
    one_shape: bool = False  # compile the largest step alone, as `deterministic` does
    rank_of: int | None = None  # run the first rank's program of so many devices on a mesh of one, to measure it


def build_engine(
    folder: Path,
    config: ModelConfig,
    plan: SchedulePlan,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    eos_token_ids: tuple[int, ...],
    options: EngineOptions,
    make_params: Callable[[ModelParams, Mesh], ModelParams] | None = None,
) -> Engine:
    """Loads the weights of `folder`, compiles the steps and allocates the pages. Raises ConfigError, one line.

    make_params  (infos, mesh) -> weights, instead of loading them
    """
    processes = joined()
    if processes is not None:
        _check_processes(processes, folder, options)
    devices = options.rank_of or mesh.size
    device, on_cpu, page_size = mesh.devices.flat[0], mesh.devices.flat[0].platform == "cpu", options.page_size
    pages = page_dtype(config, options.kv_cache_dtype)
    backend = choose_backend(options.attention_backend, config, capability(device), page_size)
    groups = kv_groups(config, devices) // devices
    backends = KernelBackends.of(backend, pages, config, devices)
    logger.info(
        "attention backend: %s; KV pages: %s; plan: %s; mesh: %d devices", backends.text(), pages, plan.name, devices
    )
    decode_slots = _decode_slots(options, devices, on_cpu)
    if options.deterministic:
        _check_deterministic(plan, decode_slots, options.tokens_per_step, devices)
    limit = config.max_length if options.max_model_len is None else options.max_model_len
    windowed = config.max_length < config.full_length
    if not 1 < limit <= config.max_length:
        until = ", its sliding window (longer sequences are not supported)" if windowed else ""
        raise ConfigError(f"max_model_len: {limit}; accepted: 2 to the model's {config.max_length}{until}")
    if windowed:
        logger.info(
            "sliding_window: sequences are at most its %d tokens, of the model's %d: longer ones are not supported",
            config.max_length, config.full_length,
        )  # fmt: skip
    config = config.for_length(limit)
    source = None if make_params else open_weights(folder)
    kv_scales = None if pages != FP8 else {} if source is None else _kv_scales(source, config)
    infos = param_infos(
        config, devices, o_by_output=plan.needs_o_by_output, o_by_input=plan.needs_o_by_input, kv_scales=kv_scales
    )
    if source is not None:
        check_tensors(source, config, infos)  # before sizes of config.json that are wrong are told as too large
    if options.rank_of is not None:
        infos = rank_infos(infos, options.rank_of)
    usable = usable_memory(mesh.local_devices[0].memory_stats(), options.memory_utilization)
    if device.platform == "gpu":
        warn_without_ptxas()
    if usable is not None:
        check_weights(config, infos, mesh.size, usable)
    check_requested(
        config, devices, usable or host_memory() // len(mesh.local_devices),
        page=page_bytes(config, devices, page_size, options.kv_cache_dtype), page_size=page_size,
        tokens_per_step=options.tokens_per_step, decode_slots=decode_slots, kv_cache_tokens=options.kv_cache_tokens,
    )  # fmt: skip
    if backend == "mosaic":  # what takes seconds comes after what can be refused at once
        heads = Heads(
            q_heads=config.num_heads // devices, kv_heads=groups, head_dim=config.head_dim, fp8=pages == FP8,
            hidden=config.hidden_size,
        )  # fmt: skip
        check_mosaic_kernels(backends, heads, mesh.local_devices[0])

    def sizes_for(length: int) -> SlotSizes:
        return SlotSizes(decode_slots, BIAS_ROWS, -(-length // page_size))

    def shapes_for(length: int) -> list[StepShape]:
        shapes = step_shapes(options.tokens_per_step, decode_slots, -(-length // page_size), row_quantum(devices))
        return [max(shapes, key=_size)] if options.deterministic or options.one_shape else shapes

    some_shape = StepShape(decode_slots, 0, 0, 1)
    spec = StepSpec(
        config, plan, some_shape, backend, options.kv_cache_dtype,
        deterministic=options.deterministic, rank_of=options.rank_of,
    )  # fmt: skip
    most_pages = -(-decode_slots * (limit + page_size) // page_size)  # more could not be used at once
    if options.kv_cache_tokens is not None:
        num_pages = options.kv_cache_tokens // page_size
    elif usable is None:
        num_pages = min(CPU_CACHE_TOKENS // page_size, most_pages)
    else:

        def temporaries(pages: int) -> int:
            largest = max(shapes_for(limit), key=_size)
            steps = compile_steps(
                spec, mesh, infos, [largest], sizes_for(limit),
                num_pages=pages, page_size=page_size, progress=options.progress,
            )  # fmt: skip
            return steps[largest].memory_analysis().temp_size_in_bytes

        needed = -(-limit // page_size) if options.max_model_len is not None else 1
        planned = plan_pages(
            usable, weight_bytes(infos, mesh.size), _slot_bytes(config, devices, sizes_for(limit)),
            page_bytes(config, devices, page_size, options.kv_cache_dtype), most_pages, needed, temporaries,
        )  # fmt: skip
        logger.info(planned.text())
        num_pages = planned.num_pages
    if processes is not None:
        num_pages = min(map(int, processes.exchange(str(num_pages))))
    if num_pages * page_size < limit:
        if options.max_model_len is not None or num_pages * page_size < 2:
            raise ConfigError(
                f"kv_cache_tokens: {num_pages} pages of {page_size} tokens "
                f"cannot hold one request of max_model_len = {limit}; "
                f"accepted: at least {-(-limit // page_size) * page_size}, or a smaller max_model_len"
            )
        limit = num_pages * page_size

    root = None
    if options.enable_prefix_caching:
        root = prefix_root(folder, config, plan, f"{backends.text()} {pages}", options.deterministic)
    offload = _offload(options, root) if options.kv_offload_bytes and root is not None else None
    if make_params is not None:
        params = make_params(infos, mesh)
    else:
        assert source is not None
        params = _load(source, config, mesh, infos, options.progress)
    shapes, sizes = shapes_for(limit), sizes_for(limit)
    runner = Runner(
        spec, mesh, infos, params, shapes, sizes,
        num_pages=num_pages, page_size=page_size, progress=options.progress,
    )  # fmt: skip
    make: Callable[..., Engine] = Engine
    if processes is not None:
        processes.exchange("ready")  # whoever compiles longer would be missed by the first collective
        make = partial(LeaderEngine if processes.leads else FollowerEngine, processes)
    return make(
        runner,
        shapes,
        SamplerTables(runner),
        tokenizer,
        max_model_len=limit,
        vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids,
        seed=options.seed,
        root=root,
        deterministic=options.deterministic,
        offload=offload,
    )


def _check_processes(processes: Processes, folder: Path, options: EngineOptions) -> None:
    """Raises ConfigError, in all processes, unless they can run as one."""
    if options.kv_offload_bytes:
        raise ConfigError("kv_offload_gib: pages split over several processes cannot be offloaded yet; accepted: 0")
    processes.agree("packages", f"nanoflow_jax {__version__}, jax {version('jax')}, jaxlib {version('jaxlib')}")
    processes.agree(f"model: {folder.name}", model_digest(folder))


def prefix_root(folder: Path, config: ModelConfig, plan: SchedulePlan, attention: str, deterministic: bool) -> Key:
    """Key of the empty prefix. Anything that changes keys and values, or their rounding, changes it. `attention`: the
    kernels' backends and the pages' dtype."""
    plan_text = hashlib.sha256(repr(plan).encode()).hexdigest()
    return root_key(str(folder.resolve()), repr(asdict(config)), plan_text, attention, str(deterministic))


def _offload(options: EngineOptions, root: Key) -> OffloadStore:
    try:
        return OffloadStore(
            options.kv_offload_bytes, options.kv_offload_disk_bytes, options.kv_offload_folder, fingerprint=root
        )
    except ValueError as error:
        raise ConfigError(f"kv_offload_folder: {error}") from None


def _decode_slots(options: EngineOptions, devices: int, on_cpu: bool) -> int:
    rows, slots, quantum = options.tokens_per_step, options.decode_slots, row_quantum(devices)
    if slots is None:
        slots = rows * 5 // 8
        slots = min(slots, CPU_DECODE_SLOTS) if on_cpu else slots
    if slots % quantum or rows % quantum or rows <= slots:
        raise ConfigError(
            f"decode_slots: {slots} of tokens_per_step = {rows}; accepted: multiples of {quantum}, decode_slots "
            f"the smaller, so that prefill rows are left"
        )
    return slots


def _check_deterministic(plan: SchedulePlan, decode: int, rows: int, devices: int) -> None:
    """Raises ConfigError unless every row of a step goes through the same GEMMs and sums, wherever it stands."""
    pieces = plan.pieces(decode, rows - decode, quantum=row_quantum(devices))
    sizes = {(p.op, p.rows) for p in pieces if OPS[p.op].kind != ATTENTION}
    ops = {op for op, _ in sizes}
    if len(sizes) > len(ops) or len(plan.strategies) > 1 or "scatter" in plan.strategies:
        raise ConfigError(
            f"deterministic: plan {plan.name!r} treats rows differently by their place; accepted: a plan whose "
            "nano-batches are equally large and all 'gather' or all 'reduce', such as 'two_gather_one_reduce'"
        )


def _size(shape: StepShape) -> tuple[int, int]:
    """Of shapes with equally many rows, the one with all decode rows is the larger."""
    return shape.rows, shape.decode_rows


def _slot_bytes(config: ModelConfig, devices: int, sizes: SlotSizes) -> int:
    state = abstract_slots(config, AbstractMesh((devices,), (AXIS,)), sizes)
    whole = state.tokens.size * 4 + state.tables.size * 4
    return whole + (state.counts.size * 2 + state.biases.size * 4) // devices


def capability(device: Any) -> tuple[int, int] | None:
    """Compute capability of a GPU; None of anything else."""
    if device.platform != "gpu":
        return None
    major, _, minor = str(device.compute_capability).partition(".")
    return int(major), int(minor)


def _kv_scales(source: WeightSource, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The checkpoint's scales of fp8 pages, as `param_infos` takes them. Logs whether there are any."""
    found = find_kv_scales({name: tensor.shape for name, tensor in source.table.items()}, config)
    logger.info("scales of the fp8 KV pages: %s", "the checkpoint's" if found else "1, the checkpoint has none")
    return found


def _load(source: WeightSource, config: ModelConfig, mesh: Mesh, infos: ModelParams, progress: bool) -> ModelParams:
    total = sum(info.nbytes for info in jax.tree.leaves(infos, is_leaf=is_info))
    seen = 0
    with Progress(total, "loading weights", "B", progress) as bar:

        def report(_: str, done: int, __: int) -> None:
            nonlocal seen
            bar.advance(done - seen)
            seen = done

        return load_params(source, config, mesh, infos, report)
