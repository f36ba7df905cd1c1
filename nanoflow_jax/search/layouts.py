"""Ways to use the GPUs of one node: precision of weights and pages, GPUs of a replica, replicas, plan; and what each is
predicted to give on a workload, by the simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost.demand import Demand
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.cost.latency import LatencyModel, RooflineModel
from nanoflow_jax.hardware import Hardware, hardware_of
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.parallel.mesh import valid_sizes
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.known import AUTO, known_plan, plans_with_target
from nanoflow_jax.plan.plan import SchedulePlan, row_quantum
from nanoflow_jax.search.fit import PAGES, quantizations
from nanoflow_jax.search.predict import TOKENS_PER_STEP, average_step, kv_capacity, predict
from nanoflow_jax.step.attention import check_quantization
from nanoflow_jax.workload import load_workload

PLANS = (AUTO, "sequential", "two_all_reduce", "two_gather_one_reduce")
ALIKE = ("two_all_reduce", "two_gather_one_reduce")  # as `sequential`, or slower, on one device
CLEARLY = 1.2  # times as fast: what is worth a hint
HINT_PROMPT, HINT_OUTPUT = 1024, 512  # tokens of the requests that a hint is about


@dataclass(frozen=True)
class Layout:
    """Replicas that each split the model over `devices` GPUs. Names as `LLM` has them.

    auto              the plan is what plan="auto" takes there
    weight_bytes      on one GPU
    kv_tokens         that fit in one replica
    tokens_per_step, decode_slots
                      of a replica's average step, as workload and memory allow them: what to give `LLM`, whose steps
                      are compiled for their sizes
    tokens_per_second of all replicas, prompts and outputs together
    step_ms           what a request waits for its next token
    refused           why it cannot run, in a few words; the sizes and times are then 0
    """

    quantization: str | None
    kv_cache_dtype: str
    devices: int
    replicas: int
    plan: str = ""
    auto: bool = False
    weight_bytes: int = 0
    kv_tokens: int = 0
    tokens_per_step: int = 0
    decode_slots: int = 0
    tokens_per_second: float = 0.0
    step_ms: float = 0.0
    refused: str | None = None

    @property
    def gpus(self) -> int:
        return self.devices * self.replicas

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_second / self.gpus


def layouts(
    name: str,
    config: ModelConfig,
    model: LatencyModel,
    gpus: int,
    demand: Demand,
    *,
    tokens_per_step: int = TOKENS_PER_STEP,
    plans: Sequence[str] = PLANS,
    pages: Sequence[str] = PAGES,
) -> list[Layout]:
    """Every way to use all of `gpus` GPUs, the fastest first, those that cannot run last.

    name: of the model, for errors; model: of the GPU's times; tokens_per_step: the most rows of a replica's step;
    plans: names, paths, or "auto"; pages: values of kv_cache_dtype. Raises ConfigError for more GPUs than a node has,
    and a plan that there is not.
    """
    hardware = model.hardware
    if not 1 <= gpus <= hardware.node_size:
        raise ConfigError(f"gpus: {gpus} is not accepted; a node of {hardware.name} has 1 to {hardware.node_size}")
    least = 2 * row_quantum(gpus)
    if tokens_per_step < least:
        raise ConfigError(f"tokens_per_step: {tokens_per_step} is not accepted; expected at least {least}")
    files, known = {plan: load_plan(plan) for plan in plans if plan != AUTO}, plans_with_target()

    def chosen(config: ModelConfig, devices: int, kv_cache_dtype: str) -> tuple[dict[str, SchedulePlan], str]:
        """The plans to try, by name, and the name of the one that `auto` takes for the average step."""
        load = average_step(config, hardware, devices, demand, tokens_per_step, kv_cache_dtype=kv_cache_dtype)
        auto, _ = known_plan(config, hardware.name, devices, load.rows, load.decode_rows, known)
        found = {plan.name: plan for plan in (auto if given == AUTO else files[given] for given in plans)}
        if devices == 1:
            found = {n: plan for n, plan in found.items() if n not in ALIKE} or found
        return found, auto.name

    found = []
    for weights in quantizations(config):
        for devices in range(1, gpus + 1):
            if gpus % devices:
                continue
            own = replace(config, quantization=weights)
            for kind in pages:
                bare = Layout(weights, kind, devices, gpus // devices)
                if why := _refusal(own, hardware, devices):
                    found.append(replace(bare, refused=why))
                    continue
                tried, auto = chosen(own, devices, kind)
                each = [
                    _predicted(name, own, model, plan, replace(bare, auto=plan.name == auto), demand, tokens_per_step)
                    for plan in tried.values()
                ]
                found += [layout for layout in each if not layout.refused] or each[:1]
    return sorted(found, key=lambda layout: (-layout.tokens_per_second, layout.step_ms))


def _refusal(config: ModelConfig, hardware: Hardware, devices: int) -> str | None:
    """Why a mesh of so many GPUs cannot run the model at all, in the precision of `config`."""
    if devices not in (sizes := valid_sizes(config)):
        few = ", ".join(str(n) for n in sizes if n <= hardware.node_size)
        return f"the model cannot be split over {devices} GPUs (sizes that work: {few})"
    try:
        check_quantization(config, hardware.capability)
    except ConfigError:
        return "the GPU has no fp8 tensor cores"
    return None


def _predicted(
    name: str, config: ModelConfig, model: LatencyModel, plan: SchedulePlan, layout: Layout, demand: Demand, rows: int
) -> Layout:
    """The layout with a plan. config: in its precision."""
    devices, pages = layout.devices, layout.kv_cache_dtype
    if plan.gathers not in (None, config.quantization):
        return replace(
            layout, plan=plan.name, refused=f"the plan gathers in {plan.gathers}, and the weights are not in it"
        )
    room = kv_capacity(config, plan, model.hardware, devices, rows, kv_cache_dtype=pages, request=round(demand.held))
    if room < demand.request:
        few = f"KV has room for {room:,} tokens, a request has {demand.request:,}"
        return replace(layout, plan=plan.name, refused=few if room > 0 else "the weights do not fit")
    infos = param_infos(config, devices, plan.layouts(config, devices))
    found = predict(name, config, plan, model, devices, demand, tokens_per_step=rows, kv_cache_dtype=pages, sizes=())
    step = found.simulation
    return replace(
        layout,
        plan=plan.name,
        weight_bytes=weight_bytes(infos, devices),
        kv_tokens=room,
        tokens_per_step=step.load.rows,
        decode_slots=step.load.decode_rows,
        tokens_per_second=step.tokens_per_second_per_gpu * layout.gpus,
        step_ms=found.step_ms,
    )


def faster_layout(model: str, config: ModelConfig, device: Any, gpus: int, kv_cache_dtype: str = "auto") -> str | None:
    """One line where the same GPUs are predicted to be clearly faster in another layout than in one mesh of all of them
    with plan="auto"; None where not, and where nothing is known: on a CPU, or a GPU that no file names. Takes a
    fraction of a second. The KV pages stay as they are.

    model   as a command takes it; config: in the precision that runs; device: one of JAX's, which all are like
    """
    hardware = hardware_of(device)
    length = min(HINT_PROMPT + HINT_OUTPUT, config.max_length)
    output = length * HINT_OUTPUT // (HINT_PROMPT + HINT_OUTPUT)
    if hardware is None or not 1 < gpus <= hardware.node_size or output < 2:
        return None
    demand = Demand.of(load_workload(f"constant:{length - output}:{output}"), length)
    found = layouts(model, config, RooflineModel(hardware), gpus, demand, plans=(AUTO,), pages=(kv_cache_dtype,))
    best = found[0]
    here = next(one for one in found if one.replicas == 1 and one.quantization == config.quantization)
    if here.refused or best.tokens_per_second < CLEARLY * here.tokens_per_second:
        return None
    options = [f"data_parallel_size={best.replicas}"] if best.replicas > 1 else []
    options += [f"tensor_parallel_size={best.devices}"]
    options += [f"quantization={best.quantization!r}"] if best.quantization != config.quantization else []
    options += [f"tokens_per_step={best.tokens_per_step}", f"decode_slots={best.decode_slots}"]
    who = f"{best.replicas} replicas" if best.replicas > 1 else "one replica"
    return (
        f"{who} with {', '.join(options)} are predicted to be {best.tokens_per_second / here.tokens_per_second:.1f} "
        f"times as fast on these GPUs, for prompts of {length - output} and outputs of {output} tokens "
        f"(nanoflow layouts --model {model} --gpu {hardware.name} --gpus {gpus})"
    )
