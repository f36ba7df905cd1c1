"""The network's part of a rank slice, which runs without one: modelled from a hardware file, never measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import jax.numpy as jnp

from nanoflow_jax.config import ModelConfig
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.schedule.batch import StepShape
from nanoflow_jax.schedule.plan import SchedulePlan, row_quantum
from nanoflow_jax.search.latency import US, RooflineModel

KINDS = {"AG": "all-gather", "AR": "all-reduce", "RS": "reduce-scatter"}
SAMPLER_REDUCTIONS = 2  # of one number per sampled row, in a greedy step


@dataclass(frozen=True)
class NetworkStep:
    """Seconds of one step's collectives, one after another, and how many there are."""

    seconds: float
    collectives: int


def network_step(
    config: ModelConfig, plan: SchedulePlan, shape: StepShape, hardware: Hardware, devices: int
) -> NetworkStep:
    """The collectives of a step on `devices` GPUs by the roofline of `search.latency`: the plan's in every layer,
    those of the embedding and of greedy sampling."""
    model, width = RooflineModel(hardware), jnp.dtype(config.dtype).itemsize
    pieces = plan.pieces(shape.decode_rows, shape.prefill_rows, row_quantum(devices))
    layer = [(KINDS[kind], p) for p in pieces if (kind := p.op.rpartition(".")[2]) in KINDS]
    columns = {"GEMV": config.num_heads * config.head_dim}  # the others move the residual's
    us = [
        model.collective(kind, p.rows * columns.get(p.op.partition(".")[0], config.hidden_size) * width, devices).us
        for kind, p in layer
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
        "--devices", str(devices), "--tokens", str(shape.rows), "--decode-tokens", str(shape.decode_rows),
        "--layers", str(min(layers, 4)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or ["nanoflow inspect failed"])[-1]
    totals = json.loads(done.stdout)["totals"]
    share = totals["exposed_network_us"] / totals["network_us"] if totals["network_us"] else 0.0
    return share, f"nanoflow inspect: {share:.0%} of the network's time is exposed in a full step"
