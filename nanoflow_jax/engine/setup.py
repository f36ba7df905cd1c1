"""From a model and options to an engine: sizes, memory, weights, compiled steps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from kernels_pallas.checks import FP8
from kernels_pallas.self_check_cases import Heads
from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.engine.engine import Engine, step_shapes
from nanoflow_jax.engine.kernel_check import check_mosaic_kernels
from nanoflow_jax.engine.memory import (
    GIB,
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
from nanoflow_jax.engine.runner import Runner, compile_extra, compile_steps
from nanoflow_jax.engine.windows import Windows
from nanoflow_jax.models.experts import gate_of
from nanoflow_jax.models.fp8_formats import find_weight_scales
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.kv_scales import find_kv_scales
from nanoflow_jax.models.layout import ModelParams, PageTables, kv_groups, page_tables
from nanoflow_jax.models.params import rank_infos
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.parallel.processes import Processes, joined
from nanoflow_jax.plan.ops import ATTENTION, OPS
from nanoflow_jax.plan.plan import SchedulePlan, row_quantum
from nanoflow_jax.step.attention import KernelBackends, check_quantization, choose_backend, page_dtype
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.step.compile import Program, extras_of, step_bytes
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
class Sizes:
    """What is known before any memory is taken.

    devices       that the model is split over: those of the mesh, or what a rank slice is a slice of
    max_length    tokens of prompt and output together, before the pool is known
    attention     the kernels' backends and the pages' dtype
    spec          of the steps, with any shape
    source        of the weights; None: they are made
    usable        bytes of a GPU; None: a CPU
    one_shape     only the largest step is compiled
    """

    options: LLMOptions
    mesh: Mesh
    devices: int
    decode_slots: int
    max_length: int
    attention: str
    spec: StepSpec
    infos: ModelParams
    source: WeightSource | None
    usable: int | None
    one_shape: bool

    def slots(self, length: int) -> SlotSizes:
        return SlotSizes(self.decode_slots, BIAS_ROWS, self.tables.count * self.pages(length))

    def program(self, length: int, num_pages: int) -> Program:
        """Where a request has at most `length` tokens."""
        return Program(self.spec, self.mesh, self.infos, self.slots(length), num_pages, self.options.page_size)

    def shapes(self, length: int) -> list[StepShape]:
        """Of the steps, where a request has at most `length` tokens."""
        rows, quantum = self.options.tokens_per_step, row_quantum(self.devices)
        shapes = step_shapes(rows, self.decode_slots, self.pages(length), quantum, self.tables.count)
        return [max(shapes, key=_size)] if self.one_shape else shapes

    @property
    def tables(self) -> PageTables:
        return page_tables(self.spec.config)

    def pages(self, tokens: int) -> int:
        """Of a sequence, in one page table."""
        return -(-tokens // self.options.page_size)

    def request_pages(self, tokens: int) -> int:
        """Of a sequence, in all page tables, at most."""
        windows = Windows(self.tables.windows, self.options.page_size)
        return windows.pages_while_chunked(tokens, self.options.tokens_per_step)

    def page_bytes(self) -> int:
        return page_bytes(self.spec.config, self.devices, self.options.page_size, self.options.kv_cache_dtype)


def build_engine(
    folder: Path,
    config: ModelConfig,
    plan: SchedulePlan,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    eos_token_ids: tuple[int, ...],
    options: LLMOptions,
    make_params: Callable[[ModelParams, Mesh], ModelParams] | None = None,
    *,
    one_shape: bool = False,
    rank_of: int | None = None,
) -> Engine:
    """Loads the weights of `folder`, compiles the steps and allocates the pages. Raises ConfigError, one line.

    config, plan, mesh  what the options' model, dtype, plan and tensor_parallel_size have led to
    make_params         (infos, mesh) -> weights, instead of loading them
    one_shape           compile the largest step alone, as `deterministic` does
    rank_of             run the first rank's program of so many devices on a mesh of one, to measure it
    """
    processes = joined()
    if processes is not None:
        _check_processes(processes, folder, options)
    sizes = _sizes(None if make_params else folder, config, plan, mesh, options, one_shape, rank_of)
    num_pages, max_model_len = _pool(sizes, processes)

    root = None
    if options.enable_prefix_caching:
        root = prefix_root(folder, sizes.spec.config, plan, sizes.attention, options.deterministic)
    offload = _offload(options) if options.kv_offload_gib else None
    if make_params is not None:
        params = make_params(sizes.infos, mesh)
    else:
        assert sizes.source is not None
        with Progress(None, "loading weights", "B", options.progress) as bar:
            read = (sizes.source, sizes.spec.config, mesh, sizes.infos)
            params = load_params(*read, lambda _, done, total: bar.report(done, total))
    shapes = sizes.shapes(max_model_len)
    runner = Runner(sizes.program(max_model_len, num_pages), params, shapes, options.progress)
    make: Callable[..., Engine] = Engine
    if processes is not None:
        processes.exchange("ready")  # whoever compiles longer would be missed by the first collective
        make = partial(LeaderEngine if processes.leads else FollowerEngine, processes)
    return make(
        runner, shapes, SamplerTables(runner), tokenizer, max_model_len=max_model_len, vocab_size=config.vocab_size,
        eos_token_ids=eos_token_ids, seed=options.seed, root=root, deterministic=options.deterministic, offload=offload,
        windows=sizes.tables.windows,
    )  # fmt: skip


def _sizes(
    folder: Path | None,
    config: ModelConfig,
    plan: SchedulePlan,
    mesh: Mesh,
    options: LLMOptions,
    one_shape: bool,
    rank_of: int | None,
) -> Sizes:
    """Everything that can be refused at once is, and the kernels are checked. Raises ConfigError.

    folder: of the weights; None: they are made
    """
    devices, device = rank_of or mesh.size, mesh.devices.flat[0]
    pages = page_dtype(config, options.kv_cache_dtype)
    check_quantization(config, capability(device))
    backend = choose_backend(options.attention_backend, config, capability(device), options.page_size)
    backends = KernelBackends.of(backend, pages, config, devices, plan.layouts(config, devices).expert_parallel)
    logger.info(
        "attention backend: %s; KV pages: %s; plan: %s; mesh: %d devices", backends.text(), pages, plan.name, devices
    )
    decode_slots = _decode_slots(options, devices, device.platform == "cpu")
    if options.deterministic:
        _check_deterministic(plan, decode_slots, options.tokens_per_step, devices, config.experts is not None)
    max_length = config.max_length if options.max_model_len is None else options.max_model_len
    if not 1 < max_length <= config.max_length:
        raise ConfigError(f"max_model_len: {max_length}; accepted: 2 to the model's {config.max_length}")
    if options.kv_offload_gib and page_tables(config).windows != (None,):
        raise ConfigError("kv_offload_gib: pages of layers with a sliding window cannot be offloaded yet; accepted: 0")
    config = config.for_length(max_length)
    source = None if folder is None else open_weights(folder)
    kv_scales = None if pages != FP8 else {} if source is None else _kv_scales(source, config)
    infos = param_infos(
        config, devices, plan.layouts(config, devices), kv_scales=kv_scales,
        weight_scales=None if source is None else find_weight_scales(source.table, config),
    )  # fmt: skip
    if source is not None:
        check_tensors(source, config, infos)  # before sizes of config.json that are wrong are told as too large
    if rank_of is not None:
        infos = rank_infos(infos, rank_of)
    usable = usable_memory(mesh.local_devices[0].memory_stats(), options.memory_utilization)
    if device.platform == "gpu":
        warn_without_ptxas()
    if usable is not None:
        check_weights(config, infos, mesh.size, usable)
    spec = StepSpec(
        config, plan, StepShape(decode_slots, 0, 0, 1), backend, options.kv_cache_dtype,
        deterministic=options.deterministic, rank_of=rank_of,
    )  # fmt: skip
    sizes = Sizes(
        options=options, mesh=mesh, devices=devices, decode_slots=decode_slots, max_length=max_length,
        attention=f"{backends.text()} {pages}", spec=spec, infos=infos, source=source, usable=usable,
        one_shape=one_shape or options.deterministic,
    )  # fmt: skip
    check_requested(
        config, devices, usable or host_memory() // len(mesh.local_devices), decode_slots=decode_slots,
        page=sizes.page_bytes() * sizes.tables.count, page_size=options.page_size,
        tokens_per_step=options.tokens_per_step, kv_cache_tokens=options.kv_cache_tokens,
    )  # fmt: skip
    if backend == "mosaic":  # what takes seconds comes after what can be refused at once
        heads = heads_of(config, devices, pages == FP8)
        check_mosaic_kernels(backends, heads, mesh.local_devices[0])
    return sizes


def heads_of(config: ModelConfig, devices: int, fp8: bool) -> Heads:
    """What the kernels of one device are checked with; fp8: the pages."""
    windows = {window for window in page_tables(config).windows if window is not None}
    return Heads(
        q_heads=config.num_heads // devices, kv_heads=kv_groups(config, devices) // devices,
        head_dim=config.head_dim, fp8=fp8, quantised=config.quantization == "fp8", hidden=config.hidden_size,
        ffn=config.intermediate_size // devices, windows=tuple(sorted(windows)),
        sinks=any(layer.attention.sinks for layer in config.pattern),
        gate=next((gate_of(layer.mlp) for layer in config.pattern if layer.mlp.experts is not None), None),
    )  # fmt: skip


def _pool(sizes: Sizes, processes: Processes | None) -> tuple[int, int]:
    """How many pages there are, the same in all processes, and the tokens that a request may have. Raises
    ConfigError."""
    options, page_size, limit = sizes.options, sizes.options.page_size, sizes.max_length
    most_pages = sizes.decode_slots * sizes.request_pages(limit + page_size)  # more could not be used at once
    if options.kv_cache_tokens is not None:
        num_pages = options.kv_cache_tokens // page_size * sizes.tables.count
    elif sizes.usable is None:
        num_pages = min(CPU_CACHE_TOKENS // page_size * sizes.tables.count, most_pages)
    else:

        def temporaries(pages: int) -> int:
            largest, program = max(sizes.shapes(limit), key=_size), sizes.program(limit, pages)
            step = step_bytes(compile_steps(program, [largest], options.progress)[largest])
            # An extra of the step before may still have its arrays.
            return step + max(step_bytes(compile_extra(program, extra, largest)) for extra in extras_of(largest))

        needed = sizes.request_pages(limit) if options.max_model_len is not None else 1
        planned = plan_pages(
            sizes.usable, weight_bytes(sizes.infos, sizes.mesh.size),
            _slot_bytes(sizes.spec.config, sizes.devices, sizes.slots(limit)),
            sizes.page_bytes(), most_pages, needed, temporaries,
        )  # fmt: skip
        logger.info(planned.text())
        num_pages = planned.num_pages
    if processes is not None:
        num_pages = min(map(int, processes.exchange(str(num_pages))))
    if num_pages < (needed := sizes.request_pages(limit)):
        fits = [n for n in range(sizes.pages(limit)) if sizes.request_pages(n * page_size) <= num_pages]
        if options.max_model_len is not None or fits[-1] * page_size < 2:
            raise ConfigError(
                f"kv_cache_tokens: {num_pages} pages of {page_size} tokens "
                f"cannot hold one request of max_model_len = {limit}; "
                f"accepted: at least {-(-needed // sizes.tables.count) * page_size}, or a smaller max_model_len"
            )
        limit = fits[-1] * page_size
    return num_pages, limit


def _check_processes(processes: Processes, folder: Path, options: LLMOptions) -> None:
    """Raises ConfigError, in all processes, unless they can run as one."""
    if options.kv_offload_gib:
        raise ConfigError("kv_offload_gib: pages split over several processes cannot be offloaded yet; accepted: 0")
    packages = [f"{name} {version(name)}" for name in ("jax", "jaxlib", "llguidance") if find_spec(name)]
    processes.agree("packages", ", ".join([f"nanoflow_jax {__version__}", *packages]))
    processes.agree(f"model: {folder.name}", model_digest(folder))


def prefix_root(folder: Path, config: ModelConfig, plan: SchedulePlan, attention: str, deterministic: bool) -> Key:
    """Key of the empty prefix. Anything that changes keys and values, or their rounding, changes it. `attention`: the
    kernels' backends and the pages' dtype."""
    return root_key(str(folder.resolve()), repr(asdict(config)), plan.digest, attention, str(deterministic))


def _offload(options: LLMOptions) -> OffloadStore:
    memory, disk = (int(gib * GIB) for gib in (options.kv_offload_gib, options.kv_offload_disk_gib))
    try:
        return OffloadStore(memory, disk, options.kv_offload_folder)
    except ValueError as error:
        raise ConfigError(f"kv_offload_folder: {error}") from None


def _decode_slots(options: LLMOptions, devices: int, on_cpu: bool) -> int:
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


def _check_deterministic(plan: SchedulePlan, decode: int, rows: int, devices: int, experts: bool = False) -> None:
    """Raises ConfigError unless every row of a step goes through the same GEMMs and sums, wherever it stands."""
    pieces = plan.pieces(decode, rows - decode, row_quantum(devices), experts=experts)
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
