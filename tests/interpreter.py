"""What takes JAX's interpreter of Mosaic GPU kernels most of its time, done on the host instead.

Interpreted kernels call Python for every load, store, copy and barrier. JAX makes a `jax.Array` on a device of each
argument of such a call, scalars too, which takes longer than the calls themselves; and whether two accesses are ordered
is asked for every pair of them. A release of JAX without these modules only makes the tests slower.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from jax._src import callback
    from jax._src.pallas.mosaic.interpret import vector_clock
except ImportError:
    callback = vector_clock = None


def _plain(x: Any) -> Any:
    x = np.asarray(x)
    return int(x) if x.shape == () and x.dtype == np.int32 else x  # names of buffers and threads must be int


def _call(*args: Any, callback: Any, **_: Any) -> list[np.ndarray]:
    """`io_callback`'s call of Python."""
    return [np.asarray(x) for x in callback(*map(_plain, args))]


def _ordered(self: Any, other: Any) -> bool:
    """One is nowhere later than the other, and somewhere earlier."""
    a, b = self.clock.tolist(), other.clock.tolist()  # of a few threads: faster than arrays
    return a != b and (all(map(int.__le__, a, b)) or all(map(int.__ge__, a, b)))


def on_the_host() -> None:
    """For all kernels that this process interprets."""
    if callback is None or vector_clock is None:
        return
    callback.io_callback_impl = _call
    vector_clock.NpVectorClock.ordered = _ordered
