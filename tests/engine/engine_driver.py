"""Small LLMs for the engine's tests, and what many of those tests do with them.

The models are random checkpoints of tests/reference in float32, on two devices; tokens and logits that `transformers`
computed for them are committed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from nanoflow_jax import LLM, SamplingParams
from nanoflow_jax.engine.admission import Expectation
from nanoflow_jax.engine.pages import PagePool
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.engine.scheduler import Scheduler, SchedulerStats
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.step.batch import StepShape
from nanoflow_jax.weights.hub import resolve_model
from tests.reference.checkpoints import GREEDY_TOKENS, write_checkpoint
from tests.step.step_driver import Driver, Packer, logits_of

CASE = "llama3_new_rope_tied"  # 16 query heads on 8 KV heads, 2 layers, vocabulary of 112, EOS is 2
VOCAB, EOS = 112, 2
PAGE = 8
MAX_MODEL_LEN = 128


def make_llm(folder: Path, **options: Any) -> LLM:
    """An LLM of CASE, its checkpoint written into `folder`; without options, with room for eight full requests."""
    return LLM(
        write_checkpoint(CASE, folder),
        **{
            # Its tokens are bytes: every id has a text.
            "tokenizer": str(resolve_model("tiny")),
            "dtype": "float32",
            "tensor_parallel_size": 2,
            "max_model_len": MAX_MODEL_LEN,
            "decode_slots": 8,
            "tokens_per_step": 64,
            "page_size": PAGE,
            "kv_cache_tokens": 8 * MAX_MODEL_LEN,
            "progress": False,
            **options,
        },
    )


@cache
def shared_llm() -> LLM:
    """One for all modules of a process: compiling takes longer than most tests. Tokenizer: `write_tokenizer`."""
    with TemporaryDirectory() as folder:
        tokenizer, _ = write_tokenizer(Path(folder) / "tokenizer")
        return make_llm(Path(folder) / "model", tokenizer=str(tokenizer))


@cache
def oracle() -> Oracle:
    with TemporaryDirectory() as folder:
        return Oracle(Path(folder))


def assert_idle(llm: LLM) -> None:
    """Nothing is queued or running, and every page is available."""
    engine = llm.engine
    assert not engine.has_work
    assert engine.running.num_running == 0
    assert engine.scheduler.pool.num_available == engine.scheduler.pool.num_pages
    assert not engine.scheduler.orphans
    assert not engine.scheduler.hooks._biases
    assert not engine._booking.texts


def bytes_of_a_page(llm: LLM) -> int:
    """On all devices."""
    runner = llm.engine.runner
    return 2 * runner.state.cache.k.nbytes // runner.num_pages


def small_pool(llm: LLM, monkeypatch: pytest.MonkeyPatch, num_pages: int, hopeful: bool = False) -> SchedulerStats:
    """Lets the scheduler use only some of the pages of the compiled pool; nothing is known of earlier requests.

    hopeful  admits whatever fits now, without a thought of growth: preemptions are many
    """
    scheduler = llm.engine.scheduler
    scheduler.pool.reset()  # what its pages hold will be overwritten
    monkeypatch.setattr(scheduler, "pool", PagePool(num_pages, scheduler.hooks.evict))
    monkeypatch.setattr(scheduler, "expectation", Expectation())
    if hopeful:
        monkeypatch.setattr(Scheduler, "_fits_later", lambda self, request, own, needed, available: needed <= available)
    stats = SchedulerStats()
    monkeypatch.setattr(scheduler, "stats", stats)
    return stats


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in outputs]


def greedy(max_tokens: int | None = GREEDY_TOKENS, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **fields})


def crowd(**fields: Any) -> tuple[list[list[int]], list[SamplingParams]]:
    """Forty ragged requests: prompts of 1 to 60 tokens, 1 to 50 new ones, half greedy, half sampled."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in rng.permutation(np.linspace(1, 60, 40).astype(int))]
    params = [
        SamplingParams(
            temperature=float(i % 2), top_p=0.9, seed=i, max_tokens=int(rng.integers(1, 51)), ignore_eos=True, **fields
        )
        for i in range(40)
    ]
    return prompts, params


class Oracle:
    """Raw logits of whole sequences, by a step of its own on one device (itself compared with `transformers`)."""

    SHAPE = StepShape(8, 4 * MAX_MODEL_LEN, 4, pages_per_request=MAX_MODEL_LEN // PAGE)

    def __init__(self, folder: Path):
        self._driver = Driver(write_checkpoint(CASE, folder), load_plan("two_all_reduce"), self.SHAPE)
        assert self._driver.step is not None and self._driver.params is not None  # what they need of the folder is read

    def logits(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Of each sequence of L tokens [L, V] float32."""
        found = []
        for at in range(0, len(sequences), 4):
            some = sequences[at : at + 4]
            packer = Packer(some, self.SHAPE, self._driver.num_pages)
            by_place = logits_of(self._driver, [packer.pack(prefill=[(i, 0, len(s)) for i, s in enumerate(some)])])
            found += [np.stack([by_place[i, at] for at in range(len(s))]) for i, s in enumerate(some)]
        return found

    def output_logits(self, outputs: Sequence[RequestOutput]) -> list[np.ndarray]:
        """What each token of the outputs was sampled from [n, V]."""
        whole = self.logits([o.prompt_token_ids + o.outputs[0].token_ids for o in outputs])
        return [x[len(o.prompt_token_ids) - 1 : -1] for x, o in zip(whole, outputs, strict=True)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# Pieces of text for the ids after the special tokens: letters, longer pieces, and bytes that are no character alone.
PIECES = [bytes([c]) for c in b"abcdefghijklmnopqrstuvwxyz ,.\n"]
PIECES += [b"ab", b" th", b"e s", b"ing", b"onion", b"xyz", b"zz", b"..", b", a", b"\n\n"]
PIECES += [bytes([c]) for c in "éßñ√☃😀🎉".encode()]
PIECES += [b"A%c" % c for c in b"abcdefghijklmnopqrstuvwxyz"]
PIECES += [b"%cQ" % c for c in b"abcdefghijklmnopqrstuvwxyz"]
PIECES += [bytes([c]) for c in b"0123456789"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def write_tokenizer(folder: Path) -> tuple[Path, list[bytes]]:
    """A tokenizer of VOCAB tokens: SPECIAL, then PIECES. Returns its folder, and the bytes of each id (none of special
    ones)."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    from transformers import PreTrainedTokenizerFast

    pieces = list(dict.fromkeys(PIECES))[: VOCAB - len(SPECIAL)]
    assert len(pieces) == VOCAB - len(SPECIAL), len(pieces)
    # Byte-level tokenizers write bytes as characters: printable ones as themselves, others from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    written = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab = {text: i for i, text in enumerate(SPECIAL)}
    vocab |= {"".join(written[b] for b in piece): len(SPECIAL) + i for i, piece in enumerate(pieces)}
    model = Tokenizer(BPE(vocab, [], unk_token="<unk>"))
    model.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model.decoder = ByteLevelDecoder()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)
    return folder, [b""] * len(SPECIAL) + pieces
