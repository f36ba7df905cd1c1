"""PyTorch's scaled_dot_product_attention and FlashInfer, timed in a process of their own: one JSON line per figure.

    python -m kernels_pallas.bench.torch_worker decode_attention/70b-1280x1k prefill_attention/70b-8k

`baselines.in_torch` starts it too. SDPA reads contiguous K and V, so its work is easier than a paged kernel's. Calls
run in a CUDA graph, over sets of inputs of several times the L2's size, as ours do.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable
from typing import Any

from kernels_pallas.bench.cases import CASES, Case, DecodeCase, PrefillCase, scale_of
from kernels_pallas.bench.kernels import Setting, decode_tables
from kernels_pallas.bench.measure import TOLERANCE, Effort
from kernels_pallas.tuning import PAGE_TOKENS, tuned_gpu

INSTALLED = importlib.util.find_spec("torch") is not None
torch: Any = importlib.import_module("torch") if INSTALLED else None  # without its types, which are not needed here


def _seconds(calls: list[Callable[[], Any]], count: int, effort: Effort) -> float:
    """Median time of one call: `count` of them in a graph, in turn, and the graph as often as makes a run last."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:  # before the capture, as PyTorch asks
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            calls[i % len(calls)]()

    def timed(times: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / times

    timed(1)
    times = max(1, math.ceil(effort.run_seconds / timed(1)))
    return statistics.median([timed(times) for _ in range(effort.runs)]) / count


def _error(got: Any, q: Any, k: Any, v: Any, seen: Any, scale: float) -> float:
    """Largest relative error of the rows q [n, Hq, d] over k, v [n, context, Hkv, d], of which a row sees `seen`."""
    repeats = q.shape[1] // k.shape[2]
    k, v = (x.float().repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("nhd,nthd->nht", q.float(), k) * scale
    inside = torch.arange(k.shape[1], device=q.device)[None, None, :] < seen[:, None, None]
    weights = torch.softmax(scores.masked_fill(~inside, float("-inf")), dim=-1)
    want = torch.einsum("nht,nthd->nhd", weights, v)
    return float(((got.float() - want).norm(dim=-1) / want.norm(dim=-1)).max())


def sdpa(case: Case, setting: Setting, device: str = "cuda") -> tuple[list[Callable[[], Any]], float]:
    """The calls, and the error of one. Raises RuntimeError for what it has not."""
    if not isinstance(case, DecodeCase | PrefillCase) or getattr(case, "fp8", False):
        raise RuntimeError("it has no such kernel")
    if getattr(case, "ragged", False) or getattr(case, "prefix", 0):
        raise RuntimeError("it has no lengths, and its causal mask no prefix")
    decode = isinstance(case, DecodeCase)
    rows, context, tokens = (case.rows, case.context, 1) if decode else (1, case.rows, case.rows)
    heads = case.model
    sets = setting.sets(case)

    def make(*shape: int) -> Any:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    q = make(rows, heads.q_heads, tokens, heads.head_dim)
    pairs = [tuple(make(rows, heads.kv_heads, context, heads.head_dim) for _ in range(2)) for _ in range(sets)]
    attend = torch.nn.functional.scaled_dot_product_attention
    calls = [lambda k=k, v=v: attend(q, k, v, is_causal=not decode, enable_gqa=True) for k, v in pairs]
    out = calls[0]()
    k, v = pairs[0]
    if decode:
        some = min(rows, 8)
        seen = torch.full((some,), context, device=device)
        got, rows_q = out[:some, :, 0], q[:some, :, 0]
        k, v = k[:some].transpose(1, 2), v[:some].transpose(1, 2)
    else:
        picked = torch.linspace(0, tokens - 1, min(tokens, 8), device=device).long()
        seen, got, rows_q = picked + 1, out[0][:, picked].transpose(0, 1), q[0][:, picked].transpose(0, 1)
        k, v = (x[0].transpose(0, 1)[None].expand(len(picked), -1, -1, -1) for x in (k, v))
    return calls, _error(got, rows_q, k, v, seen, scale_of(case))


def flashinfer(case: Case, setting: Setting) -> tuple[list[Callable[[], Any]], float]:
    """Its paged decode attention over the same tables as ours; bf16."""
    library = importlib.import_module("flashinfer")
    if not isinstance(case, DecodeCase) or case.fp8:
        raise RuntimeError("only its bf16 decode attention is measured")
    heads = case.model
    sets = setting.sets(case)
    pool = (sets * case.pages, heads.kv_heads, PAGE_TOKENS, heads.head_dim)
    keys, values = (torch.randn(pool, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q = torch.randn((case.rows, heads.q_heads, heads.head_dim), dtype=torch.bfloat16, device="cuda")
    lengths = torch.from_numpy(case.lengths())
    needed = (lengths + PAGE_TOKENS - 1) // PAGE_TOKENS
    starts = torch.nn.functional.pad(needed.cumsum(0), (1, 0)).int().cuda()
    last = (lengths - (needed - 1) * PAGE_TOKENS).int().cuda()
    tables = torch.from_numpy(decode_tables(case, sets))
    used = torch.arange(case.row_pages)[None, :] < needed[:, None]
    calls = []
    for table in tables:
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(
            starts,
            table[used].int().cuda(),
            last,
            heads.q_heads,
            heads.kv_heads,
            heads.head_dim,
            PAGE_TOKENS,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
        calls.append(lambda wrapper=wrapper: wrapper.run(q, (keys, values)))
    some = torch.linspace(0, case.rows - 1, min(case.rows, 8)).long()
    ids = tables[0][some].cuda()
    k, v = (x[ids].transpose(2, 3).reshape(len(some), -1, heads.kv_heads, heads.head_dim) for x in (keys, values))
    return calls, _error(calls[0]()[some.cuda()], q[some.cuda()], k, v, lengths[some].cuda(), scale_of(case))


def main(names: list[str]) -> None:
    why = "torch is not installed" if not INSTALLED else "" if torch.cuda.is_available() else "torch sees no GPU"
    if why:
        print(json.dumps({"not_available": why}), flush=True)
        return
    setting = Setting(gpu=tuned_gpu(torch.cuda.get_device_name(0)))
    for name in names:
        for implementation, make in (("torch", sdpa), ("flashinfer", flashinfer)):
            record: dict[str, Any] = {"implementation": implementation, "case": name, "torch": torch.__version__}
            try:
                calls, error = make(CASES[name], setting)
                record["error"] = error
                if not error <= TOLERANCE:
                    raise RuntimeError(f"a row is off by {error:.3g} of its norm, tolerance {TOLERANCE:g}")
                record["seconds"] = _seconds(calls, setting.calls(CASES[name]), setting.effort)
                del calls
            except ImportError as error:
                record["not_available"] = str(error)
            except Exception as error:  # of other projects' code: whatever it is, the next case still counts
                record["not_available"] = f"{type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.empty_cache()
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
