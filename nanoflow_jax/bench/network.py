"""The network's part of a rank slice, which runs without one: modelled from a hardware file, never measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from nanoflow_jax.bench.report import ThroughputOptions
from nanoflow_jax.bench.timeline import Window
from nanoflow_jax.config import ModelConfig
from nanoflow_jax.cost.latency import US, RooflineModel
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.plan.ops import COLLECTIVE, HIDDEN, OPS, WIDTH
from nanoflow_jax.plan.plan import SchedulePlan, row_quantum
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.timeline.jobs import SAMPLER_REDUCTIONS


@dataclass(frozen=True)
class NetworkStep:
    """Seconds of one step's collectives, one after another, and how many there are."""

    seconds: float
    collectives: int


def network_step(
    config: ModelConfig, plan: SchedulePlan, shape: StepShape, hardware: Hardware, devices: int
) -> NetworkStep:
    """The collectives of a step on `devices` GPUs by the roofline of `cost.latency`: the plan's in every layer,
    those of the embedding and of greedy sampling."""
    model, width = RooflineModel(hardware), jnp.dtype(config.dtype).itemsize
    pieces = plan.pieces(shape.decode_rows, shape.prefill_rows, row_quantum(devices))
    columns = {HIDDEN: config.hidden_size, WIDTH: config.num_heads * config.head_dim}
    us = [
        model.collective(op.collective, p.rows * columns[op.columns] * width, devices).us
        for p in pieces
        if (op := OPS[p.op]).kind == COLLECTIVE
    ] * config.num_layers
    us += [
        model.collective("all-reduce", p.rows * config.hidden_size * width, devices).us for p in pieces if p.op == "O"
    ]
    us += [model.collective("all-reduce", shape.sampled_rows * 4, devices).us] * SAMPLER_REDUCTIONS
    return NetworkStep(sum(us) / US, len(us))


def inspected_exposure(
    model: str, plan: str, hardware: str, devices: int, shape: StepShape, layers: int
) -> tuple[float | None, str]:
    """The share of the network's time that `nanoflow inspect` finds exposed in a step compiled for `devices` GPUs, or
    None; and what it is or why it is not there. In a process of its own, which leaves the GPU alone."""
    command = [
        sys.executable, "-m", "nanoflow_jax", "inspect", "--json", "--model", model, "--plan", plan, "--gpu", hardware,
        "--devices", str(devices), "--tokens-per-step", str(shape.rows), "--decode-tokens", str(shape.decode_rows),
        "--layers", str(min(layers, 4)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["nanoflow inspect failed"])[-1]
    totals = json.loads(done.stdout)["totals"]
    share = totals["exposed_network_us"] / totals["network_us"] if totals["network_us"] else 0.0
    return share, f"nanoflow inspect: {share:.0%} of the network's time is exposed in a full step"


def modelled_network(
    options: ThroughputOptions,
    plan: SchedulePlan,
    plan_name: str,
    window: Window,
    hardware: Hardware,
    optimum: float | None,
) -> dict[str, Any]:
    """What the network would add to each step of a rank slice: all of its time (exposed), or only what is longer
    than the step itself (hidden); and by the inspector's share, when it is asked for."""
    assert options.rank_of is not None
    devices = options.rank_of
    by_shape = {
        shape: network_step(options.config, plan, shape, hardware, devices) for shape in {s.shape for s in window.steps}
    }
    network = np.array([by_shape[s.shape].seconds for s in window.steps])
    bounds = {
        "exposed": window.seconds + network.sum(),
        "hidden": window.seconds + np.maximum(network - window.busy, 0).sum(),
    }
    found: dict[str, Any] = {
        "source": f"modelled: link figures of {hardware.name}, not measured",
        "seconds_per_step": float(network.mean()),
        "collectives_per_step": max(n.collectives for n in by_shape.values()),
    }
    if options.inspect:
        largest = max(by_shape, key=lambda shape: shape.rows)
        share, note = inspected_exposure(
            str(options.model), plan_name, hardware.name, devices, largest, options.config.num_layers
        )
        found["inspected"] = note
        if share is not None:
            bounds["inspected"] = window.seconds + share * network.sum()
    for name, seconds in bounds.items():
        rate = float(window.tokens / seconds / devices)
        found[f"tokens_per_second_per_gpu_{name}"] = rate
        if optimum:
            found[f"share_of_optimum_{name}"] = rate / optimum
    return found
