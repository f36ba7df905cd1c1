"""`LLM`: a model, its engine and its tokenizer behind a few methods; `generate` for one line of Python."""

from __future__ import annotations

import json
import logging
import operator
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanoflow_jax.config import ConfigError, ModelConfig, token_id_tuple
from nanoflow_jax.engine.engine import Engine, step_shapes
from nanoflow_jax.engine.request import Request, RequestOutput
from nanoflow_jax.engine.runner import Runner
from nanoflow_jax.engine.sampling_params import SamplingParams
from nanoflow_jax.models.llama import LlamaParams, kv_groups, param_infos
from nanoflow_jax.models.params import is_info
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.platform import use_compile_cache
from nanoflow_jax.progress import Progress
from nanoflow_jax.schedule.attention import why_not_mosaic
from nanoflow_jax.schedule.plan import SchedulePlan, load_plan, row_quantum
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights.hub import resolve_model
from nanoflow_jax.weights.load import load_params

logger = logging.getLogger("nanoflow_jax")

Prompt = str | Sequence[int]
Message = Mapping[str, str]

CPU_DECODE_SLOTS = 64
CPU_CACHE_TOKENS = 65536


class LLM:
    """A model ready to generate, sharded over a mesh of local devices.

    model                 "tiny" (embedded), a local folder in Hugging Face format or written by `nanoflow convert`,
                          or a Hub id
    revision              branch, tag or commit of a Hub id
    tokenizer             folder or Hub id of another tokenizer
    dtype                 "auto" (the checkpoint's; float16 becomes bfloat16), "bfloat16" or "float32"
    tensor_parallel_size  devices in the mesh; None takes all that are present
    plan                  name in `configs/plans`, path of a TOML file, or a SchedulePlan; "auto" is
                          two_gather_one_reduce
    attention_backend     of decode attention: "xla", or "mosaic" on Hopper; "auto" is "xla" until Mosaic's is measured
    max_model_len         tokens of prompt and output together; None: the model's own limit, or what the KV pool holds
    tokens_per_step       rows of the largest step, decode and prefill together
    decode_slots          requests that run at once; None: 5/8 of tokens_per_step, on a CPU at most 64
    page_size             tokens per KV page
    kv_cache_tokens       size of the KV pool; None: what `memory_utilization` leaves beside the weights, on a CPU
                          65,536
    memory_utilization    share of a GPU's memory for weights and pages
    seed                  of requests that bring none

    Options of the interface that are not there yet are accepted only at the value that leaves them off.
    Raises ConfigError (a ValueError), one line, for anything that cannot be used.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int | None = None,
        plan: str | Path | SchedulePlan = "auto",
        max_model_len: int | None = None,
        tokens_per_step: int = 2048,
        decode_slots: int | None = None,
        page_size: int = 64,
        kv_cache_tokens: int | None = None,
        memory_utilization: float = 0.9,
        enable_prefix_caching: bool = False,
        kv_offload_gib: float = 0,
        deterministic: bool = False,
        attention_backend: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        seed: int = 0,
        progress: bool = True,
    ):
        _only("enable_prefix_caching", enable_prefix_caching, False)
        _only("kv_offload_gib", kv_offload_gib, 0)
        _only("deterministic", deterministic, False)
        _only("attention_backend", attention_backend, "auto", "xla", "mosaic")
        _only("quantization", quantization, None)
        _only("kv_cache_dtype", kv_cache_dtype, "auto")
        _only("dtype", dtype, "auto", "bfloat16", "float32")
        for name, value in (("page_size", page_size), ("tokens_per_step", tokens_per_step)):
            _at_least(name, value, 1)
        for name, value in (
            ("tensor_parallel_size", tensor_parallel_size),
            ("max_model_len", max_model_len),
            ("decode_slots", decode_slots),
            ("kv_cache_tokens", kv_cache_tokens),
        ):
            if value is not None:
                _at_least(name, value, 1)
        _at_least("seed", seed, 0)
        if not _is_number(memory_utilization) or not 0 < memory_utilization <= 1:
            raise ConfigError(
                f"memory_utilization: {memory_utilization!r} is not accepted; it must be above 0 and at most 1"
            )
        use_compile_cache()
        folder = resolve_model(str(model), revision)
        config = ModelConfig.from_file(folder / "config.json")
        if dtype == "auto":
            dtype = "bfloat16" if config.dtype == "float16" else config.dtype
        self.config = replace(config, dtype=dtype)
        if not isinstance(plan, SchedulePlan):
            plan = load_plan("two_gather_one_reduce" if plan == "auto" else str(plan))
        self.plan = plan
        self.mesh = make_mesh(self.config, tensor_parallel_size)
        self.tokenizer = Tokenizer(tokenizer or folder)
        self._defaults, eos = _generation_defaults(folder, self.config)
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        backend = _attention_backend(attention_backend, self.mesh.devices.flat[0], self.config, page_size)
        logger.info("attention backend: %s; plan: %s; mesh: %d devices", backend, self.plan.name, self.mesh.size)

        infos = param_infos(
            self.config, self.mesh.size, o_rows=self.plan.needs_o_rows, o_columns=self.plan.needs_o_columns
        )
        params = _load(folder, self.config, self.mesh, infos, progress)
        if decode_slots is None:
            decode_slots = tokens_per_step * 5 // 8
            decode_slots = min(decode_slots, CPU_DECODE_SLOTS) if on_cpu else decode_slots
        quantum = row_quantum(self.mesh.size)
        if decode_slots % quantum or tokens_per_step % quantum or tokens_per_step <= decode_slots:
            raise ConfigError(
                f"decode_slots: {decode_slots} of tokens_per_step = {tokens_per_step}; "
                f"accepted: multiples of {quantum}, decode_slots "
                f"the smaller, so that prefill rows are left"
            )
        limit = self.config.max_position_embeddings if max_model_len is None else max_model_len
        if not 1 < limit <= self.config.max_position_embeddings:
            raise ConfigError(
                f"max_model_len: {limit}; accepted: 2 to the model's {self.config.max_position_embeddings}"
            )
        if kv_cache_tokens is None:
            kv_cache_tokens = CPU_CACHE_TOKENS if on_cpu else self._tokens_that_fit(memory_utilization)
            kv_cache_tokens = min(kv_cache_tokens, decode_slots * (limit + page_size))
        num_pages = kv_cache_tokens // page_size
        if num_pages * page_size < limit:
            if max_model_len is not None or num_pages * page_size < 2:
                raise ConfigError(
                    f"kv_cache_tokens: {num_pages} pages of {page_size} tokens "
                    f"cannot hold one request of max_model_len = {limit}; "
                    f"accepted: at least {-(-limit // page_size) * page_size}, or a smaller max_model_len"
                )
            limit = num_pages * page_size
        self.max_model_len = limit
        shapes = step_shapes(tokens_per_step, decode_slots, -(-limit // page_size), quantum)
        runner = Runner(
            self.config,
            self.mesh,
            infos,
            params,
            self.plan,
            shapes,
            num_pages=num_pages,
            page_size=page_size,
            attention_backend=backend,
            progress=progress,
        )
        self.engine = Engine(runner, shapes, page_size=page_size, max_model_len=limit, eos_token_ids=eos, seed=seed)

    def _tokens_that_fit(self, memory_utilization: float) -> int:
        """KV tokens that fit beside the weights, with a twentieth of the memory left to a step's temporaries."""
        stats = self.mesh.devices.flat[0].memory_stats()
        free = stats["bytes_limit"] * (memory_utilization - 0.05) - stats["bytes_in_use"]
        groups = kv_groups(self.config, self.mesh.size) // self.mesh.size
        per_token = (
            2 * self.config.num_layers * groups * self.config.head_dim * (4 if self.config.dtype == "float32" else 2)
        )
        return max(0, int(free / per_token))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes the prompts (text, token ids, or a list of either), all together; results in their order.

        `sampling_params`: one for all, or one per prompt; None takes the model's own defaults (generation_config.json).
        Raises ValueError for a prompt that cannot be served, before any is run.
        """
        return self._run(
            [self._tokens(p, add_special_tokens=True) for p in _as_list(prompts)], sampling_params, use_tqdm
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of {"role", "content"}) or a list of them, through the model's chat
        template."""
        one = len(messages) > 0 and isinstance(messages[0], Mapping)
        rendered = [self.tokenizer.chat(m) for m in ([messages] if one else messages)]  # type: ignore[list-item]
        return self._run([self._tokens(p, add_special_tokens=False) for p in rendered], sampling_params, use_tqdm)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's own defaults (generation_config.json), with fields replaced."""
        return SamplingParams(**{**self._defaults, **overrides})

    def _tokens(self, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt, add_special_tokens)
        try:
            return None, [operator.index(t) for t in prompt]
        except TypeError:
            raise ValueError(f"prompt: {prompt!r} is not accepted; it must be text or a list of token ids") from None

    def _run(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.default_sampling_params()
        params = (
            [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else list(sampling_params)
        )
        if wrong := [p for p in params if not isinstance(p, SamplingParams)]:
            raise ValueError(
                f"sampling_params: {wrong[0]!r} is not accepted; it must be a SamplingParams, or one per prompt"
            )
        if len(params) != len(prompts):
            raise ValueError(
                f"sampling_params: {len(params)} given for {len(prompts)} prompts; accepted: one, or one per prompt"
            )
        for _, tokens in prompts:
            self.engine.check(tokens, self.config.vocab_size)
        requests = [self.engine.add(text, tokens, p) for (text, tokens), p in zip(prompts, params, strict=True)]
        start, produced = time.monotonic(), 0
        try:
            with Progress(len(requests), "generating", "requests", use_tqdm) as bar:
                while self.engine.has_work:
                    for request in self.engine.step():
                        produced += len(request.output_token_ids)
                        bar.advance(note=f"{produced / (time.monotonic() - start):.0f} tokens/s")
        finally:
            if self.engine.has_work:  # after an interruption, the engine must be usable again
                for request in requests:
                    self.engine.abort(request)
        return [self._output(r) for r in requests]

    def _output(self, request: Request) -> RequestOutput:
        text = ""
        if request.params.detokenize:
            ids = request.output_token_ids
            ids = ids[:-1] if request.finish_reason == "stop" else ids
            text = self.tokenizer.decode(ids, request.params.skip_special_tokens)
        return request.output(text)


def generate(model: str | Path, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[str]:
    """Completions of `prompts`, one string each, in order: `generate("tiny", ["12+30="], max_tokens=8)`.

    Options are those of SamplingParams (defaults: the model's own, greedy where it names none) and of LLM. The model
    is loaded for this call; make an LLM to keep it.
    """
    sampling = {k: options.pop(k) for k in list(options) if k in SamplingParams.__dataclass_fields__ and k != "seed"}
    if "seed" in options:
        sampling["seed"] = options["seed"]
    llm = LLM(model, **{"progress": False, **options})
    return [o.outputs[0].text for o in llm.generate(prompts, llm.default_sampling_params(**sampling), use_tqdm=False)]


def _load(folder: Path, config: ModelConfig, mesh: Mesh, infos: LlamaParams, progress: bool) -> LlamaParams:
    total = sum(info.nbytes for info in jax.tree.leaves(infos, is_leaf=is_info))
    seen = 0
    with Progress(total, "loading weights", "B", progress) as bar:

        def report(_: str, done: int, __: int) -> None:
            nonlocal seen
            bar.advance(done - seen)
            seen = done

        return load_params(folder, config, mesh, infos, report)


def _attention_backend(wanted: str, device: Any, config: ModelConfig, page_size: int) -> str:
    """The backend of decode attention. "auto" is XLA's everywhere until the Mosaic kernel has been measured on a
    GPU."""
    if wanted != "mosaic":
        return "xla"
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    capability = (int(major), int(minor)) if device.platform == "gpu" else None
    if reason := why_not_mosaic(config, capability, page_size):
        raise ConfigError(f"attention_backend: 'mosaic' cannot be used: {reason}; accepted: 'auto', 'xla'")
    return "mosaic"


def _only(name: str, value: Any, *accepted: Any) -> None:
    if value not in accepted:
        raise ConfigError(f"{name}: {value!r} is not supported; accepted: {', '.join(map(repr, accepted))}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}: {value!r} is not accepted; it must be an integer of at least {low}")


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _generation_defaults(folder: Path, config: ModelConfig) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Sampling defaults and end tokens of generation_config.json; greedy, and config.json's end tokens, without one."""
    path = folder / "generation_config.json"
    try:
        fields = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: must hold a JSON object, not {type(fields).__name__}")
    eos = token_id_tuple("eos_token_id", fields.get("eos_token_id")) or config.eos_token_ids
    if not fields.get("do_sample"):
        return {"temperature": 0.0}, eos
    defaults = {k: fields[k] for k in ("temperature", "top_p", "top_k") if fields.get(k) is not None}
    try:
        SamplingParams(**defaults)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return defaults, eos
