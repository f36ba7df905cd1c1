"""Token ids are tokenizer.json's, and bytes of tokens make the text, for every label and style."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers, processors

from nanoflow_jax.config import ConfigError
from nanoflow_jax.engine.text import output_text
from nanoflow_jax.tokenizer import Tokenizer
from tests.scripted import LLAMA2_CONFIG, LLAMA3_CONFIG, llama2, llama3, write_tokenizer

LABELS = (None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer", "TokenizersBackend")
STYLES: dict[str, tuple[Callable[[], Raw], dict[str, Any]]] = {
    "llama2": (llama2, LLAMA2_CONFIG),
    "llama2 without dummy prefix": (lambda: llama2(False), LLAMA2_CONFIG),
    "llama2, metaspace": (lambda: llama2(metaspace=True), LLAMA2_CONFIG),
    "llama2, metaspace, without dummy prefix": (lambda: llama2(False, metaspace=True), LLAMA2_CONFIG),
    "llama3": (llama3, LLAMA3_CONFIG),
}
TEXTS = [
    "<s>[INST] what is it? [/INST] yes </s><s>[INST] no", " return x", "the answer", "  return x", "", " ", "x != y ,",
    "what is the answer", "def f(x):\n    return x + 1\n", "it isn't , don't !", "é 😀 数字", "\n\n\tyes", "yes ",
    "<|begin_of_text|><|im_start|>user\nwhat<|im_end|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("styles")
    return {name: write_tokenizer(root / name, make(), config) for name, (make, config) in STYLES.items()}


@pytest.fixture(scope="module")
def tokenizers(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {name: Tokenizer(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_the_file(tmp_path: Path, style: str, label: str | None) -> None:
    """Classes that are picked by the label rebuild normalizer, pre-tokenizer and decoder their own way."""
    make, config = STYLES[style]
    config = {**config, "tokenizer_class": label}
    if label is None:
        del config["tokenizer_class"]
    folder = write_tokenizer(tmp_path, make(), config)
    tokenizer, raw = Tokenizer(folder), Raw.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        for special in (False, True):
            ids = raw.encode(text, add_special_tokens=special).ids
            assert tokenizer.encode(text, special) == ids, text
            for skip in (False, True):
                assert tokenizer.decode(ids, skip) == raw.decode(ids, skip_special_tokens=skip)


def test_a_llama2_chat_is_as_its_makers_write_it(tmp_path: Path) -> None:
    """A space belongs after each <s>: the model was trained on '▁[INST]', never on '['."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = Tokenizer(write_tokenizer(tmp_path, llama2(), {**LLAMA2_CONFIG, "chat_template": template}))
    turns = [("user", "what is the answer"), ("assistant", "yes"), ("user", "no")]
    text = tokenizer.chat([{"role": role, "content": content} for role, content in turns])
    assert text == "<s>[INST] what is the answer [/INST] yes </s><s>[INST] no [/INST]"
    names = [tokenizer.hugging_face.convert_ids_to_tokens(i) for i in tokenizer.encode(text, False)]
    assert [name for name in names if "[INST]" in name] == ["▁[INST]"] * 2


@pytest.mark.parametrize("asked", [True, False])
def test_the_file_says_which_special_tokens_are_added(tmp_path: Path, asked: bool) -> None:
    """And not add_bos_token of tokenizer_config.json, where the two do not agree."""
    with_first, without = llama3(), llama3()
    without.post_processor = processors.ByteLevel(trim_offsets=False)
    for number, made in enumerate((with_first, without)):
        for label in ("LlamaTokenizerFast", "PreTrainedTokenizerFast"):
            config = {**LLAMA3_CONFIG, "add_bos_token": asked, "tokenizer_class": label}
            tokenizer = Tokenizer(write_tokenizer(tmp_path / f"{number}{label}", made, config))
            first = [tokenizer.first_token_id] if made is with_first else []
            assert tokenizer.encode("yes", True) == [*first, *tokenizer.encode("yes", False)]


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompt=st.text(alphabet="the answer\né😀", max_size=12),
    output=st.text(alphabet="the answer x.\né😀<s>", max_size=16) | st.sampled_from(TEXTS),
    skip=st.booleans(),
)
def test_text_of_an_output(tokenizers: dict[str, Tokenizer], style: str, prompt: str, output: str, skip: bool) -> None:
    """The whole decoded, minus the prompt decoded."""
    tokenizer = tokenizers[style]
    before, after = tokenizer.encode(prompt, True), tokenizer.encode(output, False)
    whole, known = tokenizer.decode(before + after, skip), tokenizer.decode(before, skip)
    assert whole.startswith(known)
    assert output_text(tokenizer, before, after, skip) == whole[len(known) :]
    assert output_text(tokenizer, [], after, skip) == tokenizer.decode(after, skip)


@pytest.mark.parametrize("style", STYLES)
def test_bytes_of_tokens_make_the_text(tokenizers: dict[str, Tokenizer], style: str) -> None:
    """Every token's own: with its space, and half a character's bytes as they are."""
    tokenizer = tokenizers[style]
    for text in TEXTS:
        ids = tokenizer.encode(text, False)
        if "<" in text:  # some styles put a dummy prefix after each special token
            continue
        dummy = b" " if style in ("llama2", "llama2, metaspace") and text else b""
        if style == "llama2, metaspace" and text.startswith(" "):  # it adds none where there is a space
            continue
        assert b"".join(map(tokenizer.token_bytes, ids)) == dummy + text.encode()
        first = b"".join([*map(tokenizer.first_bytes, ids[:1]), *map(tokenizer.token_bytes, ids[1:])])
        assert first == text.encode()
    smile = "😀".encode()
    ids = tokenizer.encode("😀", False)
    assert [tokenizer.token_bytes(i) for i in ids][-4:] == [bytes([b]) for b in smile]
    assert tokenizer.token_bytes(10**6) == b""


def test_a_decoder_that_is_not_known_is_refused(tmp_path: Path) -> None:
    made = llama3()
    made.decoder = decoders.WordPiece()
    with pytest.raises(ConfigError, match=r'^tokenizer: .*decoder \{"type": "WordPiece".*accepted: ByteLevel'):
        Tokenizer(write_tokenizer(tmp_path / "a", made, LLAMA3_CONFIG))
    made.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])
    with pytest.raises(ConfigError, match=r"^tokenizer: .*ByteLevel\+Replace.* accepted: ByteLevel alone$"):
        Tokenizer(write_tokenizer(tmp_path / "b", made, LLAMA3_CONFIG))


def test_words_without_a_decoder(tmp_path: Path) -> None:
    """A word-level vocabulary, as toy models have it: words with a space between."""
    made = Raw(models.WordLevel({"one": 0, "two": 1, "[?]": 2}, unk_token="[?]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Tokenizer(write_tokenizer(tmp_path, made, {"tokenizer_class": "PreTrainedTokenizerFast"}))
    assert tokenizer.decode([0, 1, 1]) == output_text(tokenizer, [], [0, 1, 1], True) == "one two two"
    assert output_text(tokenizer, [0], [1], True) == " two"


@pytest.mark.parametrize("style", STYLES)
def test_loading_is_silent(folders: dict[str, Path], style: str, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    """A label of another class, or clean_up_tokenization_spaces, is no news to a user."""
    transformers = logging.getLogger("transformers")
    propagates, transformers.propagate = transformers.propagate, True
    transformers.setLevel(logging.WARNING)
    try:
        for label in ("LlamaTokenizerFast", "GPT2Tokenizer"):
            path = folders[style] / "tokenizer_config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": label}))
            Tokenizer(folders[style])
    finally:
        transformers.propagate = propagates
    assert caplog.records == []
    assert capfd.readouterr().err == ""


# -- the time


def test_templates_that_write_the_time(tmp_path: Path) -> None:
    template = "\n{% macro day() %}{{ strftime_now('%d %b %Y %H:%M, %-d') }}{% endmacro %}\n "
    template += "{{ day() }} {% if true %}\n{{ messages[0].content }}{% endif %}"
    folder = write_tokenizer(tmp_path / "a", llama3(), {**LLAMA3_CONFIG, "chat_template": template})
    other = write_tokenizer(tmp_path / "b", llama3(), LLAMA3_CONFIG)
    third = write_tokenizer(tmp_path / "c", llama3(), LLAMA3_CONFIG)
    (third / "chat_template.jinja").write_text(template)
    assert [Tokenizer(f).writes_the_time for f in (folder, other, third)] == [True, False, True]
    assert Tokenizer(other, chat_template=template).writes_the_time
    messages = [{"role": "user", "content": "yes"}]
    for f in (folder, third):
        now = datetime(2031, 2, 3, 4, 5)
        tokenizer = Tokenizer(f)
        assert tokenizer.chat(messages, now=now) == "\n 03 Feb 2031 04:05, 3 yes"
        before, text, after = datetime.now(), tokenizer.chat(messages), datetime.now()
        assert text in (tokenizer.chat(messages, now=before), tokenizer.chat(messages, now=after))
