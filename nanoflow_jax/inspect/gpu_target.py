"""Compile for a GPU that is not there: `Hardware` → XLA's target description → a mesh of compile-only devices."""

from __future__ import annotations

import atexit
import functools
import importlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from nanoflow_jax.config import ConfigError
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.step.compile import Option
from nanoflow_jax.system.install import install_command

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
MISSING = f"compiling for a GPU needs the CUDA plugin: {install_command('inspect')}"


def target_config(hardware: Hardware) -> str:
    """Text of XLA's `GpuTargetConfigProto`. Field names and the constants common to these GPUs: XLA's own specs.

    `dnn_version_info` stays out, because XLA then loads cuDNN. ACCELERATED_FEATURES makes sm_90a of sm_90.
    """
    major, minor = hardware.capability
    accelerated = major >= 9
    capability = f"{major}.{minor}{'a' if accelerated else ''}"
    model = (
        f"sm_{capability} with {hardware.memory_bytes}B RAM, {hardware.sm_count} cores, "
        f"{hardware.clock_ghz * 1e6:.0f}KHz clock, {hardware.l2_bytes}B L2$"
    )
    minor_line = f"    minor: {minor}\n" if minor else ""
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {hardware.shared_memory_per_sm}
  threads_per_core_limit: 2048
  core_count: {hardware.sm_count}
  fpus_per_core: {hardware.fpus_per_sm}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {hardware.memory_bandwidth:.0f}
  l2_cache_size: {hardware.l2_bytes}
  clock_rate_ghz: {hardware.clock_ghz}
  device_memory_size: {hardware.memory_bytes}
  shared_memory_per_block_optin: {hardware.shared_memory_per_sm - 1024}
  cuda_compute_capability {{
    major: {major}
{minor_line}    feature_extension: {"ACCELERATED_FEATURES" if accelerated else "NONE"}
  }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {capability}"
  model_str: "{model}"
  device_address_bits: 64
  pcie_bandwidth: {hardware.pcie_bandwidth:.0f}
  ecc_enabled: true
  name: "{hardware.device_name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  device_interconnect_info {{
    active_links: {hardware.nvlink_links}
  }}
}}
platform_name: "CUDA"
device_description_str: "{hardware.device_name}"
"""


def _plugin() -> str:
    """Module name of the installed CUDA plugin. Raises ConfigError when there is none."""
    for name in PLUGINS:
        try:
            if importlib.util.find_spec(name) is not None:
                return name
        except ModuleNotFoundError:
            continue
    raise ConfigError(MISSING)


def _register_late(plugin: str) -> None:
    """Registers a plugin that refused at JAX's start, as it does without cuDNN; compiling needs no cuDNN."""
    before = os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    try:
        importlib.import_module(plugin).initialize()
    finally:
        if before is None:
            del os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"]
        else:
            os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = before


def gpu_mesh(hardware: Hardware, devices: int) -> Mesh:
    """Mesh of `devices` compile-only GPUs of one node, axis "tp".

    On a machine without an NVIDIA GPU, and with no JAX platform chosen, this chooses "cpu" for the process: looking for
    CUDA devices there prints a long cuDNN error and finds nothing. Raises ConfigError, one line.
    """
    if not 1 <= devices <= hardware.node_size:
        raise ConfigError(
            f"devices: {devices} is not accepted; a node of {hardware.name} has 1 to {hardware.node_size}"
        )
    plugin = _plugin()
    if not jax.config.jax_platforms and not Path("/dev/nvidiactl").exists():
        jax.config.update("jax_platforms", "cpu")
    arguments = {"target_config": target_config(hardware), "topology": f"1x1x{devices}"}
    try:
        topology = topologies.get_topology_desc(platform="cuda", **arguments)
    except NotImplementedError:
        _register_late(plugin)
        topology = topologies.get_topology_desc(platform="cuda", **arguments)
    return topologies.make_mesh(topology, (devices,), ("tp",))


def saving_options(hardware: Hardware) -> dict[str, Option]:
    """Compiler options that save most of the time of compiling for an absent GPU; the scheduled program is the same.

    A fusion is tuned by measuring: without the GPU, each would be compiled alone only to keep the default. A kernel
    that this process has compiled for the same kind of GPU is read from a file.
    """
    major, minor = hardware.capability
    return {
        "xla_gpu_experimental_enable_fusion_autotuner": False,
        "xla_gpu_kernel_cache_file": str(_kernel_folder() / f"sm_{major}{minor}"),
    }


@functools.cache
def _kernel_folder() -> Path:
    """A private folder that goes with the process."""
    folder = tempfile.mkdtemp(prefix="nanoflow-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
