"""How many KV pages fit beside the weights and a step's temporaries, by the compiled step's own analysis."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from nanoflow_jax.config import ConfigError, ModelConfig
from nanoflow_jax.cost import footprint
from nanoflow_jax.cost.footprint import weight_bytes
from nanoflow_jax.models.infos import param_infos
from nanoflow_jax.models.layout import ModelParams
from nanoflow_jax.parallel.mesh import valid_sizes
from nanoflow_jax.step.attention import page_dtype
from nanoflow_jax.system.platform import MOST, SPARE, memory_fraction

logger = logging.getLogger("nanoflow_jax")

GIB = 2**30
FIRST_GUESS = 0.05  # share of the memory for temporaries, before a step has been compiled
CLOSE = 0.02  # a pool that is smaller than could be by this share is not worth another compilation


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one device. `limit`: what may be used."""

    limit: int
    weights: int
    slots: int
    temporaries: int
    page: int
    num_pages: int

    def text(self) -> str:
        return (
            f"memory per device, GiB: weights {self.weights / GIB:.2f}, slots {self.slots / GIB:.2f}, step "
            f"{self.temporaries / GIB:.2f}, {self.num_pages} KV pages {self.num_pages * self.page / GIB:.2f}, "
            f"of {self.limit / GIB:.2f}"
        )


def usable_memory(stats: Mapping[str, int] | None, utilization: float) -> int | None:
    """Bytes of one device that may be used, from its allocator's statistics; None where it has no limit (a CPU).

    utilization  share of the GPU's whole memory

    Warns, in one line, when JAX was started with less than that.
    """
    if stats is None or "bytes_limit" not in stats:
        return None
    taken, fraction = stats["bytes_limit"], memory_fraction()
    wanted, reach = taken / fraction * utilization, taken * (1 - SPARE)
    if wanted > reach * (1 + CLOSE):
        logger.warning(
            "memory_utilization: JAX runs with %g of the GPU's memory (XLA_PYTHON_CLIENT_MEM_FRACTION), so %.1f of the "
            "%.1f GiB that %g allows are out of reach; set it to %g before JAX starts, or make the LLM first",
            fraction, (wanted - reach) / GIB, wanted / GIB, utilization, round(min(MOST, utilization + SPARE), 3),
        )  # fmt: skip
    return int(min(wanted, reach))


def page_bytes(config: ModelConfig, devices: int, page_size: int, kv_cache_dtype: str = "auto") -> int:
    """Bytes of one page on one device."""
    return footprint.page_bytes(config, devices, page_size, page_dtype(config, kv_cache_dtype).itemsize)


def check_weights(config: ModelConfig, infos: ModelParams, devices: int, limit: int) -> None:
    """Raises ConfigError, saying what would fit, when the weights alone are too many."""
    weights = weight_bytes(infos, devices)
    if weights < limit:
        return
    more = [n for n in valid_sizes(config) if n > devices and weight_bytes(param_infos(config, n), n) < 0.9 * limit]
    would = f"tensor_parallel_size={more[0]} would" if more else "no tensor_parallel_size of this model would"
    if config.dtype == "float32":
        would += "; dtype='bfloat16' halves them"
    raise ConfigError(
        f"model: its weights take {weights / GIB:.2f} GiB on each of {devices} device{'s' * (devices != 1)}, "
        f"of which {limit / GIB:.2f} GiB may be used; {would}"
    )


def host_memory() -> int:
    """Bytes of memory that this process may have: the machine's, or its control group's."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(found)


def check_requested(
    config: ModelConfig,
    devices: int,
    limit: int,
    *,
    page: int,
    page_size: int,
    tokens_per_step: int,
    decode_slots: int,
    kv_cache_tokens: int | None,
) -> None:
    """Raises ConfigError for a size of which the least that it takes is more than a device has: at once, where
    compiling or allocating would take all memory first.

    limit  bytes of one device
    page   bytes of one page on one device
    """
    residual = 2 * config.hidden_size * jnp.dtype(config.dtype).itemsize  # of a row, and what is added to it
    counts = 4 + 2 * config.vocab_size // devices
    for name, value, unit, size in (
        ("kv_cache_tokens", kv_cache_tokens or 0, page_size, page),
        ("tokens_per_step", tokens_per_step, 1, residual),
        ("decode_slots", decode_slots, 1, counts),
    ):
        if (needed := value // unit * size) > limit:
            raise ConfigError(
                f"{name}: {value} take {needed // GIB} GiB at least on each device, of which {limit / GIB:.2f} GiB may "
                f"be used; accepted: fewer than {max(1, limit // size) * unit}"
            )


def plan_pages(
    limit: int,
    weights: int,
    slots: int,
    page: int,
    most_pages: int,
    pages_needed: int,
    temporaries_with: Callable[[int], int],
) -> MemoryPlan:
    """The largest pool that fits, compiling the largest step once or twice.

    most_pages        more are of no use
    pages_needed      of one request of the length that is wanted
    temporaries_with  compiles the step with so many pages; returns its temporaries' bytes

    Raises ConfigError naming what would fit when the pool could not hold one request.
    """
    left = limit - weights - slots
    guess = max(1, min(most_pages, int(left - FIRST_GUESS * limit) // page))
    temporaries = temporaries_with(guess)
    fits = min(most_pages, (left - temporaries) // page)
    if fits >= 1 and not (1 - CLOSE) * fits <= guess <= fits:
        guess = fits
        temporaries = temporaries_with(guess)
        fits = min(most_pages, (left - temporaries) // page)
    plan = MemoryPlan(limit, weights, slots, temporaries, page, min(guess, fits))
    if plan.num_pages < pages_needed:
        raise ConfigError(
            f"max_model_len: one request needs {pages_needed} KV pages and {max(plan.num_pages, 0)} fit "
            f"({plan.text()}); accepted: a smaller max_model_len or tokens_per_step, or more devices"
        )
    return plan
