"""Attention over a paged KV cache, the append to it, the residual addition with its norm, and the grouped GEMMs of
experts. Usable on their own; imports nothing from nanoflow_jax.

Shapes, everywhere: R rows (one query token each), Hq query heads, Hkv KV heads (Hq a multiple; query heads of one KV
head are neighbours), d head size, pages `[num_pages, Hkv, page_size, d]`: the tokens of one KV head in one page are
contiguous, one tile for a bulk copy. A page table row lists a request's pages in order; its entries past the length
are never used, and
with a window (`window=`) neither are those of pages that no row sees.

Pages hold bfloat16 (the XLA paths take any float), or float8_e4m3fn with one static scale per KV head: K is
k_pages * k_scale[head], V is v_pages * v_scale[head], both [Hkv] float32 and given by the caller (per layer, say the
largest magnitude seen in calibration over 448). Static, because an append then writes its own row and nothing else: a
scale per page would have to be known before the page is full, or every append would rescale its page; and per head,
because heads differ most and such a scale costs one factor per query head. The layout of fp8 pages is that of bfloat16:
V is not stored transposed, so a token stays one contiguous row, for append, prefill and copies alike. The Mosaic kernel
multiplies K as fp8 with queries in two fp8 terms (as good as bfloat16) and upcasts V to float16 on its way to wgmma.
"""

from kernels_pallas.add_norm import add_rms_norm
from kernels_pallas.append_kv import append_kv
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.grouped_gemm import gather_rows, grouped_gemm
from kernels_pallas.kernel_names import name_after_kernel
from kernels_pallas.prefill_attention import prefill_attention

name_after_kernel()

__all__ = ["add_rms_norm", "append_kv", "decode_attention", "gather_rows", "grouped_gemm", "prefill_attention"]
