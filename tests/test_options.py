"""Options are written once: what `LLM`, the commands, manifests and other processes make of them."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoflow_jax import LLM, api, generate
from nanoflow_jax.commands import batch, bench, bench_pairs, eval
from nanoflow_jax.commands import generate as generate_command
from nanoflow_jax.commands.options import llm_options
from nanoflow_jax.commands.parser import Parser
from nanoflow_jax.options import KINDS, OPTIONS, VLLM_NAMES, LLMOptions
from nanoflow_jax.step.attention import BACKENDS, KV_CACHE_DTYPES, QUANTIZATIONS

# The interface that others write code against.
DEFAULTS = {
    "revision": None, "tokenizer": None, "dtype": "auto", "tensor_parallel_size": None,
    "data_parallel_size": 1, "plan": "auto",
    "max_model_len": None, "tokens_per_step": 2048, "decode_slots": None, "page_size": 64, "kv_cache_tokens": None,
    "memory_utilization": 0.9, "enable_prefix_caching": True, "kv_offload_gib": 0, "kv_offload_disk_gib": 0,
    "kv_offload_folder": None, "deterministic": False, "attention_backend": "auto", "quantization": None,
    "kv_cache_dtype": "auto", "chat_template": None, "chat_template_kwargs": None, "reasoning_parser": None, "seed": 0,
    "progress": True,
}  # fmt: skip
COMMANDS = {
    "generate": (generate_command.add, ["12+30="]),
    "batch": (batch.add, ["-i", "in", "-o", "out"]),
    "eval": (eval.add, []),
}
# Of each flag, arguments that say something else than the default, and what that is.
SAID: dict[str, tuple[list[str], Any]] = {
    "model": (["--model", "m"], "m"),
    "revision": (["--revision", "r"], "r"),
    "tokenizer": (["--tokenizer", "t"], "t"),
    "dtype": (["--dtype", "float32"], "float32"),
    "tensor_parallel_size": (["--tensor-parallel-size", "2"], 2),
    "data_parallel_size": (["--data-parallel-size", "4"], 4),
    "plan": (["--plan", "sequential"], "sequential"),
    "max_model_len": (["--max-model-len", "77"], 77),
    "tokens_per_step": (["--tokens-per-step", "72"], 72),
    "decode_slots": (["--decode-slots", "8"], 8),
    "page_size": (["--page-size", "16"], 16),
    "kv_cache_tokens": (["--kv-cache-tokens", "512"], 512),
    "memory_utilization": (["--memory-utilization", "0.5"], 0.5),
    "deterministic": (["--deterministic"], True),
    "attention_backend": (["--attention-backend", "xla"], "xla"),
    "kv_cache_dtype": (["--kv-cache-dtype", "fp8"], "fp8"),
    "quantization": (["--quantization", "fp8"], "fp8"),
    "kv_offload_gib": (["--kv-offload-gib", "0.5"], 0.5),
    "kv_offload_disk_gib": (["--kv-offload-disk-gib", "2"], 2),
    "kv_offload_folder": (["--kv-offload-folder", "spill"], "spill"),
    "enable_prefix_caching": (["--no-prefix-caching"], False),
    "chat_template": (["--chat-template", "{{ messages }}"], "{{ messages }}"),
    "chat_template_kwargs": (["--chat-template-kwargs", '{"enable_thinking": false}'], {"enable_thinking": False}),
    "reasoning_parser": (["--reasoning-parser", "<a> </a>"], "<a> </a>"),
}
CHATS = ("chat_template", "chat_template_kwargs", "reasoning_parser")
NEEDED = {
    "kv_offload_disk_gib": ("kv_offload_gib",),
    "kv_offload_folder": ("kv_offload_gib", "kv_offload_disk_gib"),
}


def parsed(add: Callable[[Any], None], *arguments: str) -> argparse.Namespace:
    parser = Parser()
    add(parser.add_subparsers())
    return parser.parse_args(arguments)


# -- LLM


def test_the_signature_of_llm() -> None:
    parameters = inspect.signature(LLM).parameters
    assert {name: p.default for name, p in parameters.items()} == {"model": inspect.Parameter.empty, **DEFAULTS}
    assert {name: p.annotation for name, p in parameters.items()} == KINDS
    others = {p.kind for name, p in parameters.items() if name != "model"}
    assert others == {inspect.Parameter.KEYWORD_ONLY}
    assert LLMOptions("tiny").arguments() == {"model": "tiny", **DEFAULTS}


def test_each_option_is_documented() -> None:
    text = inspect.getdoc(LLM.__init__) or ""
    assert [line.split()[0] for line in text.splitlines() if not line.startswith(" ")] == list(OPTIONS)
    for name, about in OPTIONS.items():
        assert about.help.partition(". ")[0][:40] in " ".join(text.split()), name
        assert bool(about.none) == (type(None) in getattr(KINDS[name], "__args__", ())), name
    assert max(map(len, text.splitlines())) <= 112


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("max_modellen", "did you mean max_model_len?"),
        ("temperture", None),
        ("gpu_memory_utilization", "did you mean memory_utilization?"),
        ("max_num_seqs", "did you mean decode_slots?"),
        ("max_num_batched_tokens", "did you mean tokens_per_step?"),
        ("block_size", "did you mean page_size?"),
        ("swap_space", "did you mean kv_offload_gib?"),
    ],
)
def test_an_unknown_option_is_told_its_neighbour(given: str, told: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """TypeError, as for any unexpected keyword of Python. Nothing is loaded."""
    monkeypatch.setattr(api, "resolve_model", lambda *_: pytest.fail("a model was looked for"))
    unknown: dict[str, Any] = {given: 1}
    with pytest.raises(TypeError) as error:
        LLM("tiny", **unknown)
    assert str(error.value) == f"LLM: no option {given!r}; {told or 'accepted: ' + ', '.join(OPTIONS)}"
    with pytest.raises(TypeError) as error:
        generate("tiny", "12+30=", **unknown)
    assert str(error.value) == f"generate: no option {given!r}; {told or 'did you mean temperature?'}"


def test_other_wrong_arguments_name_the_class() -> None:
    wrong: Any = LLM
    for arguments, message in (
        ((), "LLM: missing a required argument: 'model'"),
        (("a", "b"), "LLM: too many positio"),
    ):
        with pytest.raises(TypeError, match=message):
            wrong(*arguments)


def test_the_comparison_page_has_vllms_names() -> None:
    """All of them, with ours, and nothing else; what it calls the same is an option."""
    page = (Path(__file__).parents[1] / "docs" / "comparison.md").read_text().partition("## vLLM's names")[2]
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| \S.* \|$", page, re.MULTILINE)
    assert rows == list(VLLM_NAMES.items())
    same = re.findall(r"`(\w+)`", page.partition("The same in both:")[2].partition(". ")[0])
    assert len(same) > 10 and set(same) <= set(OPTIONS)


def test_names_of_vllm_are_none_of_ours() -> None:
    assert set(VLLM_NAMES.values()) <= set(OPTIONS)
    assert not set(VLLM_NAMES) & set(OPTIONS)


def test_accepted_values_are_those_that_are_used() -> None:
    used_by_name = {"kv_cache_dtype": KV_CACHE_DTYPES, "attention_backend": BACKENDS, "quantization": QUANTIZATIONS}
    for name, used in used_by_name.items():
        accepted = OPTIONS[name].accepted
        assert accepted is not None and set(accepted.values) == set(used)


# -- commands


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", [None, *SAID])
def test_flags_become_arguments_of_llm(command: str, name: str | None) -> None:
    """And change none of the others."""
    add, needed = COMMANDS[command]
    names = (*NEEDED.get(name, ()), name) if name else ()
    flags = [flag for n in names for flag in SAID[n][0]]
    found = llm_options(parsed(add, command, *needed, *flags)).arguments()
    assert found == {"model": "tiny", **DEFAULTS, **{n: SAID[n][1] for n in names}}


def test_each_option_with_a_choice_has_a_flag() -> None:
    assert set(SAID) == {name for name in OPTIONS if name not in ("seed", "progress")}


def test_flags_of_benchmarks() -> None:
    """Their own defaults, and every flag that they have had."""
    common = {"plan": "two_gather_one_reduce"}
    args = parsed(bench.add, "bench", "throughput", "--model", "tiny", "--quiet")
    assert llm_options(args).arguments() == {"model": "tiny", **DEFAULTS, **common, "progress": False}
    names = {
        name
        for name in SAID
        if not name.startswith("kv_offload") and name not in ("revision", "tokenizer", "data_parallel_size", *CHATS)
    }
    said = {name: SAID[name] for name in names}
    flags = [flag for arguments, _ in said.values() for flag in arguments]
    found = llm_options(parsed(bench.add, "bench", "throughput", *flags, "--seed", "3")).arguments()
    assert found == {**DEFAULTS, **{name: value for name, (_, value) in said.items()}, "seed": 3}
    assert llm_options(parsed(bench_pairs.add_batch, "batch")).arguments() == {"model": "tiny", **DEFAULTS, **common}


def test_help_says_what_none_is_and_names_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    parser = Parser()
    generate_command.add(commands := parser.add_subparsers())
    text = " ".join(commands.choices["generate"].format_help().split())
    assert "requests that run at once (default: 5/8 of --tokens-per-step, on a CPU at most 64)" in text
    assert "tokens per KV page (default: 64)" in text
    assert "Before Mosaic kernels" not in text and "(default: None) (default" not in text


# -- runs


def test_what_belongs_to_a_run() -> None:
    assert list(LLMOptions("tiny").identity()) == [
        "tokenizer", "dtype", "tensor_parallel_size", "plan", "max_model_len", "tokens_per_step", "decode_slots",
        "page_size", "deterministic", "attention_backend", "quantization", "kv_cache_dtype", *CHATS, "seed",
    ]  # fmt: skip
