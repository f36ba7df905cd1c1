"""Decode attention on some SMs beside a GEMM, on two streams of one GPU: what each keeps of its speed alone.

    python -m tools.gpu_session.beside --sms 48

One rank of eight of LLaMA-3.1-70B, half a step: 1024 rows, contexts of 1024 tokens, and the GEMM UG. A JSON line per
budget, as soon as it is known; `nanoflow profile --ops pair` measures more of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from nanoflow_jax.hardware import hardware_of
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.profile.kernels import Kernel, kernel
from nanoflow_jax.profile.points import GRIDS, Pair, Point
from nanoflow_jax.profile.programs import Bench, pair
from nanoflow_jax.profile.timing import time_pair
from tools.gpu_session import new_parser

PAGE_SIZE, L2_BYTES, MOST_BYTES = 64, 64 * 2**20, 8 * 2**30


def points(sms: int, tiny: bool) -> Pair:
    """The GEMM, and decode attention on so many SMs."""
    rows = 16 if tiny else 1024
    n, k = (64, 64) if tiny else (7168, 8192)
    heads = {"q_heads": 8, "kv_heads": 1, "head_dim": 64 if tiny else 128, "dtype": "f32" if tiny else "bf16"}
    gemm = Point.of("gemm", m=rows, n=n, k=k, dtype=heads["dtype"])
    return Pair(gemm, Point.of("decode_attention", requests=rows, context=64 if tiny else 1024, sms=sms, **heads))


def kernels_of(both: Pair, times: int, backend: str) -> tuple[Kernel, Kernel]:
    """The GEMM, and attention with so many times the rows."""
    return kernel(both.first, PAGE_SIZE, backend), kernel(both.second.times(max(1, times)), PAGE_SIZE, backend)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = new_parser("tools.gpu_session.beside", __doc__)
    parser.add_argument("--sms", type=int, nargs="+", default=[48], help="budgets of decode attention (default: 48)")
    parser.add_argument("--tiny", action="store_true", help="anywhere: two loops of a CPU program")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    hardware = hardware_of(device)
    l2 = hardware.l2_bytes if hardware else L2_BYTES
    bench = Bench(Mesh(np.array([device]), (AXIS,)), not options.tiny, 0 if options.tiny else l2, MOST_BYTES)
    backend = "xla" if options.tiny else "mosaic"
    for sms in options.sms:
        both = points(sms, options.tiny)

        def attention(times: int, both: Pair = both) -> Kernel:
            return kernels_of(both, times, backend)[1]

        found = time_pair(pair(bench, kernels_of(both, 1, backend)[0], attention), GRIDS["few"])
        record = {
            "sms": sms,
            "gemm_us": found.first_us,
            "attention_us": found.second_us,
            "gemm_keeps": found.first_speed,
            "attention_keeps": found.second_speed,
            "rounds": found.rounds,
        }
        print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
