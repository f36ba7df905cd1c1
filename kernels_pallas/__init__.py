"""Attention over a paged KV cache, and the append to it. Usable on its own; imports nothing from nanoflow_jax.

Shapes, everywhere: R rows (one query token each), Hq query heads, Hkv KV heads (Hq a multiple; query heads of one KV
head are neighbours), d head size, pages `[num_pages, Hkv, page_size, d]`: the tokens of one KV head in one page are
contiguous, one tile for a bulk copy. A page table row lists a request's pages in order; its entries past the length
are never used.
"""

from kernels_pallas.append_kv import append_kv
from kernels_pallas.decode_attention import decode_attention
from kernels_pallas.prefill_attention import prefill_attention

__all__ = ["append_kv", "decode_attention", "prefill_attention"]
