"""Tokenizers of the styles that people run, and models that say what they are told to: the right text is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

WORDS = (
    "the", "capital", "of", "France", "is", "Paris", "Rome", "and", "answer", "yes", "no", "what", "return", "x", "one",
    "two", "user",
)  # fmt: skip
LETTERS = sorted(set("".join(WORDS)) | set("TCQAdINS.,:!?+=-()[]/'\n0123456789"))
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")


def _pieces(words: Sequence[str], alphabet: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """A BPE vocabulary in which each word is one token, and its merges: letter after letter from the left."""
    vocabulary, merges = dict.fromkeys(alphabet), {}
    for word in words:
        for at in range(1, len(word)):
            merges[word[:at], word[at]] = None
            vocabulary[word[: at + 1]] = None
    return list(vocabulary), list(merges)


def llama2(dummy_prefix: bool = True, metaspace: bool = False) -> Tokenizer:
    """▁ for a space, bytes as <0x0A>; with dummy_prefix a text begins with a ▁ of its own.

    metaspace  as newer files have it: one pre-tokenizer and decoder instead of a normalizer and a row of decoders
    """
    special = ["<unk>", "<s>", "</s>"]
    pieces, merges = _pieces(["▁▁", "▁▁▁", *("▁" + w for w in WORDS), "Paris", "▁[INST]", "[/INST]"], ["▁", *LETTERS])
    tokens = dict.fromkeys([*special, *(f"<0x{i:02X}>" for i in range(256)), *pieces])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    if metaspace:
        scheme: Any = "first" if dummy_prefix else "never"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    else:
        made.normalizer = normalizers.Sequence(
            [*([normalizers.Prepend("▁")] if dummy_prefix else []), normalizers.Replace(" ", "▁")]
        )
        strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return made


def llama3(special: Sequence[str] = LLAMA3_SPECIAL) -> Tokenizer:
    """Byte-level, special tokens at the end; a text begins with the first of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = _pieces(["Ġ" + word for word in WORDS], alphabet)
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(pieces)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    first = made.token_to_id(special[0])
    made.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], first)]
    )
    return made


LLAMA2_CONFIG = {
    "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False, "legacy": False, "tokenizer_class": "LlamaTokenizer",
}  # fmt: skip
LLAMA3_CONFIG = {
    "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "clean_up_tokenization_spaces": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
}  # fmt: skip


def write_tokenizer(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_model(
    folder: Path,
    tokenizer: Tokenizer,
    tokenizer_config: Mapping[str, Any],
    follows: Mapping[int, int],
    otherwise: int,
    *,
    second: Mapping[int, int] | None = None,
    generation: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A model whose next token depends on the last one alone: `follows`, else `otherwise`; `second` is less likely.

    Attention and MLP give zero; the embedding is one-hot, and the head reads the next token from it.
    """
    write_tokenizer(folder, tokenizer, tokenizer_config)
    vocab = tokenizer.get_vocab_size()
    hidden = -(-vocab // 64) * 64
    fields = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "torch_dtype": "float32", "bos_token_id": 1, "eos_token_id": 2, **config,
    }  # fmt: skip
    embedding, head = np.zeros((2, vocab, hidden), np.float32)
    embedding[np.arange(vocab), np.arange(vocab)] = 1
    for token in range(vocab):
        head[follows.get(token, otherwise), token] = 1.0
    for token, other in (second or {}).items():
        head[other, token] = 0.8
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.norm.weight": np.ones(hidden)}
    layer = {"input_layernorm": np.ones(hidden), "post_attention_layernorm": np.ones(hidden)}
    layer |= {f"self_attn.{n}_proj": np.zeros((hidden, hidden)) for n in "qkvo"}
    layer |= {f"mlp.{n}_proj": np.zeros((64, hidden)) for n in ("gate", "up")} | {
        "mlp.down_proj": np.zeros((hidden, 64))
    }
    weights |= {f"model.layers.0.{name}.weight": value for name, value in layer.items()}
    save_file({name: value.astype(np.float32) for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def script(*tokens: int) -> dict[int, int]:
    """`follows` of a row of different tokens."""
    assert len(set(tokens[:-1])) == len(tokens) - 1, tokens
    return dict(itertools.pairwise(tokens))
