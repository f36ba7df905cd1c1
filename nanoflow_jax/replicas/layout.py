"""How devices are cut into replicas."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nanoflow_jax.config import ConfigError
from nanoflow_jax.options import AS_MANY_AS_FIT, LLMOptions
from nanoflow_jax.system.platform import num_gpus


@dataclass(frozen=True)
class Layout:
    """replicas  None: as many as the GPUs hold
    devices   of each
    on_cpu    as which JAX runs the CPU, each replica for itself
    cluster   RAY_ADDRESS names one; else all is on this machine"""

    replicas: int | None
    devices: int
    on_cpu: bool
    cluster: bool

    def count(self, gpus: int) -> int:
        """Replicas on so many GPUs. Raises ConfigError where they do not fit."""
        if self.on_cpu:
            return self.replicas or max(1, (os.cpu_count() or 1) // self.devices)
        wanted = self.replicas or gpus // self.devices
        if not 1 <= wanted * self.devices <= gpus:
            where = "the cluster has" if self.cluster else "this machine has"
            raise ConfigError(
                f"data_parallel_size: {max(wanted, 1)} replicas of {self.devices} GPUs (tensor_parallel_size) wanted, "
                f"and {where} {gpus}; accepted: a product of at most {gpus}, or --cpu-devices"
            )
        return wanted


def find_layout(options: LLMOptions) -> Layout:
    """How the devices are cut; JAX is not started. Raises ConfigError, one line."""
    size, devices = options.data_parallel_size, options.tensor_parallel_size
    cluster, cpu = bool(os.environ.get("RAY_ADDRESS")), os.environ.get("JAX_NUM_CPU_DEVICES")
    replicas = None if size == AS_MANY_AS_FIT else int(size)
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu") and (cpu or not cluster):
        present = int(cpu or devices or 1)
        if devices is not None and devices > present:
            raise ConfigError(
                f"tensor_parallel_size: {devices} devices wanted, and each replica has {present}; accepted: at most "
                f"{present}, or --cpu-devices {devices} (JAX_NUM_CPU_DEVICES), which is of each replica"
            )
        return Layout(replicas, devices or present, True, cluster)
    if cluster:
        if devices is None:
            raise ConfigError("tensor_parallel_size: on a Ray cluster it says how many GPUs a replica has; give it")
        return Layout(replicas, devices, False, cluster)
    if not (gpus := num_gpus()):
        return Layout(replicas, devices or 1, True, cluster)
    found = Layout(replicas, devices or max(1, gpus // (replicas or gpus)), False, cluster)
    found.count(gpus)
    return found
