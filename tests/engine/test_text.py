"""Text that grows token by token is the text of all tokens, whatever the tokens' bytes are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nanoflow_jax.engine.text import REPLACEMENT, GrowingText, find_stop
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights.hub import resolve_model

SAMPLE = "the cat sat on the mat; 数字数字数字 ééé ëë 🙂🙂🙃 👩‍👩‍👧 the end, the end. 12+30=42 42 42\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """The embedded one, and one trained here whose tokens are of one to many bytes."""
    bpe = HFTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([SAMPLE] * 3, trainer)
    folder: Path = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return {"tiny": Tokenizer(resolve_model("tiny")), "many bytes": Tokenizer(folder)}


TEXTS = st.one_of(st.text(max_size=25), st.text(alphabet=SAMPLE, max_size=25), st.sampled_from([SAMPLE, ""]))


@pytest.mark.parametrize("name", ["tiny", "many bytes"])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(prompt=TEXTS, output=TEXTS)
def test_growing_text_is_the_whole_text(tokenizers: dict[str, Tokenizer], name: str, prompt: str, output: str) -> None:
    """After each token it is a beginning of the text of all, with whole characters only; at the end it is all of it."""
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(output, False)
    growing, so_far = GrowingText(tokenizer, tokenizer.encode(prompt, False), True), ""
    for token in ids:
        added = growing.add(token)
        so_far += added
        assert growing.text == so_far
        assert REPLACEMENT not in added or REPLACEMENT in output
        assert output.startswith(so_far)
    if not output.endswith(REPLACEMENT):
        assert so_far == output


@pytest.mark.parametrize("name", ["tiny", "many bytes"])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_any_tokens_give_a_beginning_of_their_text(tokenizers: dict[str, Tokenizer], name: str, ids: list[int]) -> None:
    """Also bytes that make no characters: once the text goes on with whole ones, nothing is missing."""
    tokenizer = tokenizers[name]
    ids = [*ids, *tokenizer.encode("abc and on", False)]
    growing = GrowingText(tokenizer, [], True)
    for token in ids:
        growing.add(token)
    assert growing.text == tokenizer.decode(ids, True)


def test_half_a_character_waits(tokenizers: dict[str, Tokenizer]) -> None:
    """A character of four bytes comes with its last byte."""
    growing = GrowingText(tokenizers["tiny"], [], True)
    ids = tokenizers["tiny"].encode("a🙂b", False)
    added = [growing.add(token) for token in ids]
    assert added == ["a", "", "", "", "🙂", "b"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text(alphabet="ab", max_size=3), max_size=8), st.lists(st.text("ab", min_size=1, max_size=4)))
def test_a_stop_string_is_found_where_it_first_appears(pieces: list[str], stops: list[str]) -> None:
    """Across the pieces' boundaries: at the piece that completes it, and not before."""
    text = ""
    for piece in pieces:
        text += piece
        found = find_stop(text, len(piece), stops) if piece else None
        places = [(text.find(stop), stop) for stop in stops if stop in text]
        assert found == min(places, default=None)
        if found:
            break
