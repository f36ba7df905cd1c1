"""What an `LLM` is made with. Each option is written once: its default, what is accepted, what it is for.

From here come the signature, the checks and the documentation of `LLM`, the flags of the commands, what the manifest of
a run compares, and what process 0 sends to the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import wraps
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Concatenate, NamedTuple, get_type_hints

from nanoflow_jax.chat import check_kwargs
from nanoflow_jax.config import ConfigError
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.system.platform import UTILIZATION
from nanoflow_jax.system.reading import check_names

# vLLM's names of what has another one here.
VLLM_NAMES = {
    "gpu_memory_utilization": "memory_utilization",
    "max_num_seqs": "decode_slots",
    "max_num_batched_tokens": "tokens_per_step",
    "block_size": "page_size",
    "num_gpu_blocks_override": "kv_cache_tokens",
    "kv_cache_memory_bytes": "kv_cache_tokens",
    "swap_space": "kv_offload_gib",
    "cpu_offload_gb": "kv_offload_gib",
    "kv_offloading_size": "kv_offload_gib",
    "default_chat_template_kwargs": "chat_template_kwargs",
}


class Accepted(NamedTuple):
    """Which values an option takes, how others are refused, and all there are where they can be counted."""

    holds: Callable[[Any], bool]
    refusal: str
    values: tuple[Any, ...] = ()


def _one_of(*values: Any) -> Accepted:
    return Accepted(lambda v: v in values, f"is not supported; accepted: {', '.join(map(repr, values))}", values)


def _number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _at_least(low: int) -> Accepted:
    return Accepted(
        lambda v: _number(v, int) and low <= v < 2**62,
        f"is not accepted; it must be an integer of at least {low}, below 2**62",
    )


_MODEL = Accepted(lambda v: isinstance(v, (str, Path)), "is not accepted; it must be 'tiny', a folder, or a Hub id")
_SHARE = Accepted(lambda v: _number(v) and 0 < v <= 1, "is not accepted; it must be above 0 and at most 1")
_AMOUNT = Accepted(lambda v: _number(v) and 0 <= v < float("inf"), "is not accepted; it must be a number of at least 0")
_SWITCH = _one_of(True, False)
AS_MANY_AS_FIT = "auto"
_REPLICAS = Accepted(
    lambda v: v == AS_MANY_AS_FIT or (_number(v, int) and 1 <= v < 2**16),
    f'is not accepted; it must be an integer of at least 1, or "{AS_MANY_AS_FIT}"',
)
REASONING_PARSERS = ("none", "harmony")  # by name; any other is a pair of tags
_PARSER = Accepted(
    lambda v: isinstance(v, str) and (v in REASONING_PARSERS or len(set(v.split())) == len(v.split()) == 2),
    'is not accepted; it must be "none", "harmony" or two tags with a space between, such as "<think> </think>"',
)


class About(NamedTuple):
    """An option of `LLM`.

    help      what it is for; the first sentence is for `--help`, all of it for the documentation of `LLM`
    accepted  None: whoever uses it says what it takes
    none      what None stands for
    identity  it can change a bit of a result, and so belongs to what a run is
    flag      it has a flag that means the same in all commands
    """

    help: str
    accepted: Accepted | None = None
    none: str = ""
    identity: bool = False
    flag: bool = True

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError, one line."""
        if self.accepted is not None and not (value is None and self.none) and not self.accepted.holds(value):
            raise ConfigError(f"{name}: {value!r} {self.accepted.refusal}")


@dataclass(frozen=True)
class LLMOptions:
    """The arguments of `LLM`, checked: raises ConfigError, one line, for a value that can never be used. What depends
    on the model or on the devices is checked when the LLM is made."""

    model: Annotated[str | Path, About(  # its identity is in its files
        '"tiny" (embedded), a local folder, or a Hub id. A folder is in Hugging Face format, or written by '
        "`nanoflow convert`",
        _MODEL,
    )]  # fmt: skip
    _: KW_ONLY
    revision: Annotated[str | None, About("branch, tag or commit of a Hub id", none="its main branch")] = None
    tokenizer: Annotated[str | None, About(
        "folder or Hub id of another tokenizer", none="the model's own", identity=True,
    )] = None  # fmt: skip
    dtype: Annotated[str, About(
        'of weights and pages: "auto" (the checkpoint\'s; float16 becomes bfloat16), "bfloat16" or "float32"',
        _one_of("auto", "bfloat16", "float32"), identity=True,
    )] = "auto"  # fmt: skip
    tensor_parallel_size: Annotated[int | None, About(
        "devices in the mesh", _at_least(1), none="all that are present", identity=True,
    )] = None  # fmt: skip
    data_parallel_size: Annotated[int | str, About(
        "replicas of the model, each with tensor_parallel_size devices and a process of its own: 8 x 1, 4 x 2, 2 x 4 "
        'GPUs; "auto": as many as the GPUs hold. Ray starts them on this machine, or where RAY_ADDRESS says, and again '
        "when one dies", _REPLICAS,
    )] = 1  # fmt: skip
    plan: Annotated[str | Path | SchedulePlan, About(
        'a name in configs/plans, or the path of a TOML file; "auto" is the best one known for model, GPU and load, '
        "else two_gather_one_reduce. A SchedulePlan is taken as it is", identity=True,
    )] = "auto"  # fmt: skip
    max_model_len: Annotated[int | None, About(
        "tokens of prompt and output together", _at_least(1),
        none="the model's own limit, or what the KV pool holds", identity=True,
    )] = None  # fmt: skip
    tokens_per_step: Annotated[int, About(
        "rows of the largest step, decode and prefill together", _at_least(1), identity=True,
    )] = 2048  # fmt: skip
    decode_slots: Annotated[int | None, About(
        "requests that run at once", _at_least(1), none="5/8 of tokens_per_step, on a CPU at most 64", identity=True,
    )] = None  # fmt: skip
    page_size: Annotated[int, About("tokens per KV page", _at_least(1), identity=True)] = 64
    kv_cache_tokens: Annotated[int | None, About(
        "size of the KV pool", _at_least(1),
        none="what memory_utilization leaves beside the weights and a step's temporaries, on a CPU 65,536",
    )] = None  # fmt: skip
    memory_utilization: Annotated[float, About(
        "share of a GPU's memory that may be used. JAX is started with a little more, unless it runs already or "
        "XLA_PYTHON_CLIENT_MEM_FRACTION is set; what it then lacks is said in one line", _SHARE,
    )] = UTILIZATION  # fmt: skip
    enable_prefix_caching: Annotated[bool, About(
        "reuse the pages of a prefix that another request has computed", _SWITCH,
    )] = True  # fmt: skip
    kv_offload_gib: Annotated[float, About(
        "host memory for pages that the device has no room for. They come back instead of being computed again",
        _AMOUNT,
    )] = 0  # fmt: skip
    kv_offload_disk_gib: Annotated[float, About(
        "disk space for the pages that the host memory has no room for, in kv_offload_folder", _AMOUNT,
    )] = 0  # fmt: skip
    kv_offload_folder: Annotated[str | Path | None, About(
        "where the pages on disk are", none="a temporary folder",
    )] = None  # fmt: skip
    deterministic: Annotated[bool, About(
        "tokens and logprobs are bitwise the same alone, in a crowd, in another order, with prefix hits, after "
        "preemption or a resumed run. One step shape, and sums over devices in a fixed order", _SWITCH, identity=True,
    )] = False  # fmt: skip
    attention_backend: Annotated[str, About(
        '"mosaic" on Hopper, "xla" everywhere; "auto" is "mosaic" where GPU and model allow it. Before Mosaic kernels '
        'are used on a GPU each is checked against the XLA path; one that is wrong is an error that says to pass "xla",'
        " never a silent fallback", _one_of("auto", "xla", "mosaic"), identity=True,
    )] = "auto"  # fmt: skip
    quantization: Annotated[str | None, About(
        'of the weights: "fp8", half the bytes and twice the FLOP/s on Hopper. Those of layers are rounded to '
        "float8_e4m3fn as they are loaded, with a scale per output channel, and activations as they run, per token; "
        "those of an fp8 checkpoint are taken as they are",
        _one_of(None, "fp8"), none="as the checkpoint", identity=True,
    )] = None  # fmt: skip
    kv_cache_dtype: Annotated[str, About(
        'of the KV pages: "auto" (the model\'s), or "fp8" ("fp8_e4m3"), half the bytes. K and V are rounded to '
        "float8_e4m3fn with the checkpoint's scales (per layer, or layer and KV head), or with 1 where it has none",
        _one_of("auto", "fp8", "fp8_e4m3"), identity=True,
    )] = "auto"  # fmt: skip
    chat_template: Annotated[str | Path | None, About(
        "a Jinja file (or its text) through which conversations become prompts", none="the model's own", identity=True,
    )] = None  # fmt: skip
    chat_template_kwargs: Annotated[dict[str, Any] | None, About(
        "variables of the chat template (enable_thinking, reasoning_effort, date_string, ...) as a JSON object. What a "
        "conversation brings itself comes before them; one that the template does not know changes nothing",
        none="those that a conversation brings", identity=True,
    )] = None  # fmt: skip
    reasoning_parser: Annotated[str | None, About(
        "what keeps a thought apart from its answer: two tags such as '<think> </think>', harmony (channels) or none",
        _PARSER,
        none="what the tokenizer and the chat template name", identity=True,
    )] = None  # fmt: skip
    seed: Annotated[int, About("of requests that bring none", _at_least(0), identity=True, flag=False)] = 0
    progress: Annotated[bool, About("show on standard error how far loading and compiling are", flag=False)] = True

    def __post_init__(self) -> None:
        for name, about in OPTIONS.items():
            about.check(name, getattr(self, name))
        try:
            check_kwargs(self.chat_template_kwargs)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.kv_offload_disk_gib and not self.kv_offload_gib:
            raise ConfigError(
                "kv_offload_disk_gib: pages reach the disk through the host; kv_offload_gib is needed too"
            )
        if self.kv_offload_folder is not None and not self.kv_offload_disk_gib:
            raise ConfigError("kv_offload_folder: kv_offload_disk_gib says how much of it to use, and is needed too")
        if self.kv_offload_gib and not self.enable_prefix_caching:
            raise ConfigError("kv_offload_gib: offloaded pages are found as prefixes; enable_prefix_caching is needed")

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of `LLM`."""
        return {name: getattr(self, name) for name in OPTIONS}

    def identity(self) -> dict[str, Any]:
        """What can change a bit of a result. An option that is not in an earlier run's counts there as None."""
        return {name: getattr(self, name) for name, about in OPTIONS.items() if about.identity}


_HINTS = {name: hint for name, hint in get_type_hints(LLMOptions, include_extras=True).items() if name != "_"}
OPTIONS: dict[str, About] = {name: hint.__metadata__[0] for name, hint in _HINTS.items()}
KINDS: dict[str, Any] = {name: hint.__origin__ for name, hint in _HINTS.items()}  # their types


def documentation() -> str:
    """All options, as a docstring has them."""
    width = max(map(len, OPTIONS)) + 1
    lines = []
    for name, about in OPTIONS.items():
        text = about.help + (f"; None: {about.none}" if about.none else "")
        lines += wrap(text, 112, initial_indent=f"{name:{width}}", subsequent_indent=" " * width)
    return "\n".join(lines)


def takes[**P, O](make: Callable[P, O]) -> Callable[[Callable[[Any, O], None]], Callable[Concatenate[Any, P], None]]:
    """Gives an `__init__` that wants options the arguments of the options, for people, tools and type checkers alike.
    Raises TypeError for others."""
    known = [p.replace(annotation=KINDS[p.name]) for p in inspect.signature(make).parameters.values()]
    signature = inspect.Signature(known)

    def decorate(init: Callable[[Any, O], None]) -> Callable[Concatenate[Any, P], None]:
        who = init.__qualname__.partition(".")[0]

        @wraps(init)
        def wrapped(self: Any, /, *args: P.args, **given: P.kwargs) -> None:
            check_names(who, "option", given, signature.parameters, VLLM_NAMES)
            try:
                signature.bind(*args, **given)
            except TypeError as error:
                raise TypeError(f"{who}: {error}") from None
            init(self, make(*args, **given))

        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        wrapped.__dict__["__signature__"] = inspect.Signature([me, *known])
        wrapped.__doc__ = documentation()
        return wrapped

    return decorate
