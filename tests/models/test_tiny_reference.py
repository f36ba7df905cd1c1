"""The embedded model through the library's own tokenizer, template and engine, against `transformers` outputs."""

from __future__ import annotations

from nanoflow_jax import LLM, SamplingParams
from tests.reference.checkpoints import load_tiny_reference


def test_tokens_and_texts_equal_transformers() -> None:
    """Greedy continuations of plain prompts and of chats, token for token, on eight devices."""
    continuations, metadata = load_tiny_reference()
    llm = LLM("tiny", tokens_per_step=256, decode_slots=16, progress=False)
    params = SamplingParams(temperature=0, max_tokens=metadata["max_tokens"])
    outputs = llm.generate([c.prompt_token_ids for c in continuations], params, use_tqdm=False)
    assert len(outputs) == len(continuations) >= 8
    for want, got in zip(continuations, outputs, strict=True):
        assert got.outputs[0].token_ids == list(want.token_ids), want.prompt
        special = not want.chat
        assert llm.tokenizer.encode(want.prompt, special) == list(want.prompt_token_ids)
