"""What masks allow, with tokenizers of every style: any walk along them gives a text of the asked form. A walk takes
tokens evenly, so it finds what a model that knows nothing would."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tokenizers import AddedToken

from nanoflow_jax.engine.structured import Constraint, Grammars
from nanoflow_jax.engine.text import output_text
from nanoflow_jax.parallel.mesh import AXIS
from nanoflow_jax.sampling_params import StructuredOutputsParams as Form
from nanoflow_jax.step.extras import MASK_SPECS, room_for_masks
from nanoflow_jax.step.sampler import Masks, allowed
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights.hub import resolve_model
from tests.scripted import LLAMA2_CONFIG, LLAMA3_CONFIG, llama2, llama3, write_tokenizer
from tests.step.sampler_driver import make_mesh

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["the", "capital", 7, None]}, "minItems": 1, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "ok"],
    "additionalProperties": False,
}
REGEX = r"[a-c]{2,5}-[0-9]{3}( the)?"
CHOICES = ["the capital", "the capital of", 'a "quoted"\nline', "é√😀", "{"]
SPANNING = ('":', '","', '"}', '{"', "},", "]}", '": "', " 12", "1,")  # over the borders of what a grammar knows


def fits_schema(text: str) -> bool:
    try:
        jsonschema.validate(json.loads(text), SCHEMA)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


FORMS: dict[str, tuple[Form, Callable[[str], bool]]] = {
    "json": (Form(json=SCHEMA, disable_any_whitespace=True), fits_schema),
    "json, spaced": (Form(json=json.dumps(SCHEMA), whitespace_pattern=r"[ \n]?"), fits_schema),
    "regex": (Form(regex=REGEX), lambda text: bool(re.fullmatch(REGEX, text))),
    "choice": (Form(choice=CHOICES), lambda text: text in CHOICES),
    "lark": (
        Form(grammar='start: pair ("," pair){0,2}\npair: WORD "=" /[0-9]{1,3}/\nWORD: "the" | "capital"'),
        lambda text: bool(re.fullmatch(r"((the|capital)=[0-9]{1,3},){0,2}(the|capital)=[0-9]{1,3}", text)),
    ),
    "gbnf": (Form(grammar='root ::= "u" ("v" | " the")* "w"'), lambda text: bool(re.fullmatch("u(v| the)*w", text))),
}  # fmt: skip
STYLES = ("tiny", "llama3", "llama2", "llama2-metaspace", "llama2-bare")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("styles")
    found = {"tiny": Tokenizer(resolve_model("tiny"))}
    made: dict[str, tuple[Any, Any]] = {
        "llama3": (llama3(), LLAMA3_CONFIG),
        "llama2": (llama2(), LLAMA2_CONFIG),
        "llama2-metaspace": (llama2(metaspace=True), LLAMA2_CONFIG),
        "llama2-bare": (llama2(dummy_prefix=False), LLAMA2_CONFIG),
    }
    for name, (tokenizer, config) in made.items():
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in SPANNING])
        found[name] = Tokenizer(write_tokenizer(root / name, tokenizer, config))
    return found


def grammars_of(tokenizer: Tokenizer, padding: int = 5) -> Grammars:
    """The model's vocabulary is larger than the tokenizer's."""
    size = tokenizer.hugging_face.backend_tokenizer.get_vocab_size() + padding
    end = tokenizer.end_token_id
    assert end is not None
    return Grammars(tokenizer, size, (end,))


def tokens_of(mask: np.ndarray, size: int) -> np.ndarray:
    bits = np.unpackbits(mask, bitorder="little")
    assert not bits[size:].any()
    return np.flatnonzero(bits[:size])


def walk(
    grammars: Grammars, form: Form, tokenizer: Tokenizer, rng: np.random.Generator, masked: bool = True
) -> list[int]:
    """Tokens of a text, taken evenly from what is allowed (or from all: no mask is applied)."""
    end = tokenizer.end_token_id
    assert end is not None
    constraint = grammars.constraint(form, stop_tokens=[end])
    found: list[int] = []
    for _ in range(400):
        some = tokens_of(grammars.masks([constraint])[0], grammars._vocab_size)
        assert len(some), "nothing is allowed"
        token = int(rng.choice(some)) if masked else int(rng.integers(grammars._vocab_size))
        if token == end:
            return found
        found.append(token)
        if not masked:
            continue
        constraint.take(np.array(found, np.int32))
        if constraint.is_complete:
            return found
    return found


@pytest.mark.parametrize("style", STYLES)
def test_any_walk_gives_the_asked_form(style: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer, rng = tokenizers[style], np.random.default_rng(0)
    grammars, prompt = grammars_of(tokenizer), tokenizer.encode("x", True)
    for name, (form, fits) in FORMS.items():
        for masked in (True, False):
            walks = [walk(grammars, form, tokenizer, rng, masked) for _ in range(12)]
            texts = [output_text(tokenizer, prompt, ids, True) for ids in walks]
            whole = [output_text(tokenizer, prompt, ids, False) for ids in walks]
            if masked:
                assert all(fits(text) for text in texts), (name, texts)
                assert texts == whole, "a special token stands in a text"
                assert len(set(texts)) > 1, name  # it has a choice
            else:
                assert not any(fits(text) for text in texts), name


def test_the_ends_are_the_requests_own(tokenizers: dict[str, Tokenizer]) -> None:
    """End tokens are allowed where the text may end, and nowhere else: whatever ends this request."""
    tokenizer = tokenizers["tiny"]
    end, other = tokenizer.end_token_id, next(i for i in tokenizer.special_ids if i != tokenizer.end_token_id)
    assert end is not None
    for ends in ((), (end,), (end, other), (other, 10**6)):
        grammars = grammars_of(tokenizer)
        constraint = grammars.constraint(Form(regex="ab*"), stop_tokens=ends)
        seen = []
        for text in (b"", b"a", b"ab"):
            constraint.take(np.frombuffer(text, np.uint8).astype(np.int32))
            seen.append(set(tokens_of(grammars.masks([constraint])[0], grammars._vocab_size).tolist()))
        own = {token for token in ends if token < 1000}
        assert seen == [{97}, {98} | own, {98} | own]


def test_many_are_computed_as_each_alone(tokenizers: dict[str, Tokenizer]) -> None:
    """By threads, from PARALLEL on: each mask in its own row, each token to its own matcher."""
    grammars = grammars_of(tokenizers["tiny"])
    grammars.threads = 3
    forms = [Form(regex=f"[{a}x]{{3}}") for a in "abcdefghABCDEFGH"]
    together = [grammars.constraint(form) for form in forms]
    alone = [grammars.constraint(form) for form in forms]
    for text in (b"axcxexgxAxCxExGx", b"xbxdxfxhxBxDxFxH"):
        masks = grammars.masks(together)
        for row, (constraint, token) in enumerate(zip(alone, text, strict=True)):
            np.testing.assert_array_equal(masks[row], grammars.masks([constraint])[0])
            constraint.take(np.full(constraint.taken + 1, token))
        grammars.advance(together, list(text))
    assert [c.taken for c in together] == [2] * 16
    assert len({mask.tobytes() for mask in grammars.masks(together)}) == 16
    assert "_executor" in vars(grammars)


def test_a_token_that_is_not_allowed_is_told(tokenizers: dict[str, Tokenizer]) -> None:
    """A matcher that has been given a wrong token would allow the end everywhere."""
    constraint = grammars_of(tokenizers["tiny"]).constraint(Form(regex="abc"))
    with pytest.raises(RuntimeError, match=r"structured_outputs: .*doesn't satisfy the grammar") as told:
        constraint.take(np.frombuffer(b"ax", np.uint8).astype(np.int32))
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


REFUSED: list[tuple[Form, str]] = [
    (Form(json={"type": "objec"}), "json: {'type': 'objec'} cannot be compiled: Invalid type: objec"),
    (Form(json={"type": "object", "not": {}}), 'Unimplemented keys: ["not"]'),
    (Form(json={"not": {}, "x-guidance": {"lenient": True}}), 'Unimplemented keys: ["not"]'),
    (Form(json={"$ref": "http://localhost:1/a"}), "Resource"),
    (Form(json={"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
    (Form(regex="[a-c"), "regex: '[a-c' cannot be compiled"),
    (Form(grammar="start: nothing"), 'unknown name: "nothing"'),
    (Form(grammar='root ::= "a" b'), "Rule 'b' not found"),
]


@pytest.mark.parametrize(("form", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_compiled_is_one_line(form: Form, words: str, tokenizers: dict[str, Tokenizer]) -> None:
    grammars = grammars_of(tokenizers["tiny"])
    for _ in range(2):  # also what is remembered
        with pytest.raises(ValueError, match=f"^structured_outputs: .*{re.escape(words)}") as told:
            grammars.constraint(form)
        assert str(told.value).isprintable() and len(str(told.value)) < 600


def test_each_text_is_compiled_once(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, real, compiled = grammars_of(tokenizers["tiny"]), Grammars._compile, list[Form]()

    def spy(self: Grammars, form: Form) -> Any:
        compiled.append(form)
        return real(self, form)

    monkeypatch.setattr(Grammars, "_compile", spy)
    monkeypatch.setattr("nanoflow_jax.engine.structured.MOST_GRAMMARS", 2)
    forms = [
        Form(regex="a"),
        Form(choice=["a"]),
        Form(regex="a"),
        Form(json={}),
        Form(json={}, disable_any_whitespace=True),
    ]
    found: list[Constraint] = [grammars.constraint(form) for form in forms]
    assert compiled == [forms[0], forms[1], forms[3], forms[4]]
    assert len({id(constraint.matcher) for constraint in found}) == 5
    grammars.constraint(forms[0])  # which two others have pushed out
    assert compiled[4:] == [forms[0]]


def test_no_others_among_named_properties(tokenizers: dict[str, Tokenizer]) -> None:
    grammars = grammars_of(tokenizers["tiny"])
    schema = {"properties": {"a": {"type": "object", "properties": {"b": {}}}}, "type": "object"}
    for closed in (False, True):
        form = Form(json=schema, disable_additional_properties=closed, disable_any_whitespace=True)
        constraint = grammars.constraint(form)
        constraint.take(np.frombuffer(b'{"a":{"', np.uint8).astype(np.int32))
        some = set(tokens_of(grammars.masks([constraint])[0], grammars._vocab_size).tolist())
        assert (some == {ord("b")}) is closed


def test_without_the_package(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"llguidance is needed; accepted: pip install "):
        grammars_of(tokenizers["tiny"]).constraint(Form(regex="a"))


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("share", [8, 24, 40])  # of a device: 8 tokens at least, rarely a multiple of 32
def test_masks_on_shards(devices: int, share: int) -> None:
    """Against NumPy: every bit is that of its own token, on whichever device it is; rows without a mask stay."""
    rng, vocab = np.random.default_rng(0), devices * share
    rows = np.array([2, 4, 0, 4, 1], np.int32)  # of four masks; 4: none
    logits = rng.normal(size=(5, vocab)).astype(np.float32)
    logits[1, 3] = np.nan
    has = rng.random((4, vocab)) < 0.5
    bits = np.packbits(has, axis=1, bitorder="little")
    run = jax.shard_map(
        allowed, mesh=make_mesh(devices), in_specs=(P(None, AXIS), MASK_SPECS), out_specs=P(None, AXIS), check_vma=False
    )
    found = np.asarray(jax.jit(run)(logits, Masks(bits, rows)))
    free = np.append(has, np.ones((1, vocab), bool), axis=0)[rows]
    np.testing.assert_array_equal(found, np.where(free, logits, -np.inf))


def test_few_programs_are_compiled() -> None:
    rooms = [room_for_masks(count, 1280) for count in range(1, 1281)]
    assert all(room >= count for count, room in enumerate(rooms, start=1))
    assert sorted(set(rooms)) == [8, 32, 128, 512, 1280]
    assert room_for_masks(3, 4) == 8
