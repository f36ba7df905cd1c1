"""`LLM`: a model, its engine and its tokenizer behind a few methods; `generate` for one line of Python."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nanoflow_jax.chat import PLAIN, ChatSettings, as_conversations, read_template
from nanoflow_jax.config import ModelConfig
from nanoflow_jax.engine.calls import Calls
from nanoflow_jax.engine.feed import Score, Work, feed
from nanoflow_jax.engine.multiprocess import lead
from nanoflow_jax.engine.outputs import Gathered, run_steps
from nanoflow_jax.engine.reasoning import find_reasoning
from nanoflow_jax.engine.request import RequestOutput
from nanoflow_jax.engine.setup import build_engine
from nanoflow_jax.engine.structured import Grammars
from nanoflow_jax.generation_config import end_tokens, generation_defaults
from nanoflow_jax.hardware import hardware_of
from nanoflow_jax.models.registry import read_config
from nanoflow_jax.options import OPTIONS, VLLM_NAMES, LLMOptions, takes
from nanoflow_jax.parallel.mesh import make_mesh
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.known import AUTO, DEFAULT, check_sms, known_plan
from nanoflow_jax.plan.plan import SchedulePlan
from nanoflow_jax.prompts import Prompt, as_list, as_pairs, check_prompt, text_and_tokens
from nanoflow_jax.replicas.front import Replicas
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.system.interrupts import held_interrupts
from nanoflow_jax.system.platform import claim_gpu_memory, use_compile_cache
from nanoflow_jax.system.progress import Progress
from nanoflow_jax.system.reading import check_names
from nanoflow_jax.tokenizer import Tokenizer
from nanoflow_jax.weights.hub import resolve_model, resolve_tokenizer

logger = logging.getLogger("nanoflow_jax")

Message = Mapping[str, Any]
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A model ready to generate, sharded over a mesh of devices: the local ones, or those of all processes that have
    joined (nanoflow_jax.distributed).

    `help(LLM.__init__)` lists the options; `nanoflow_jax.options.LLMOptions` has them with all that is accepted.

    Several threads may call its methods at once: their requests share the steps, and each call gets what it gets alone.
    With data_parallel_size, prompts are answered by replicas in processes of their own (nanoflow_jax.replicas); then
    there is no `engine` and no `mesh` here, and `close` ends them.
    A request without a seed has one by its order of arrival; give seeds where threads must repeat what they sampled.

    Options of the interface that are not there yet are accepted only at the value that leaves them off.
    Raises ConfigError (a ValueError), one line, for a value that cannot be used, and TypeError for an unknown option.
    """

    @takes(LLMOptions)
    def __init__(self, options: LLMOptions):
        claim_gpu_memory(options.memory_utilization)
        use_compile_cache()
        template = read_template(options.chat_template)
        options = replace(options, chat_template=template)
        lead(options)
        self.folder = folder = resolve_model(str(options.model), options.revision)
        config = read_config(folder / "config.json")
        dtype = options.dtype
        if dtype == "auto":
            dtype = "bfloat16" if config.dtype == "float16" else config.dtype
        self.config = replace(config, dtype=dtype, quantization=options.quantization or config.quantization)
        spoken = resolve_tokenizer(options.tokenizer) if options.tokenizer else folder
        self.tokenizer = Tokenizer(spoken, template, options.chat_template_kwargs)
        self.reasoning = find_reasoning(self.tokenizer, options.reasoning_parser)
        self._defaults = generation_defaults(folder)
        self._eos = end_tokens(folder, self.config, self.tokenizer)
        self.last_outputs: list[RequestOutput | None] = []  # of the `generate` or `chat` begun last, interrupted or not
        self.last_scores: list[tuple[float, bool] | None] = []  # of the `score` that ended last
        self.replicas: Replicas | None = None
        if options.data_parallel_size != 1:
            self.grammars = Grammars(self.tokenizer, self.config.vocab_size, self._eos)
            self.replicas = Replicas(LLM, options, folder)
            self.plan, self.max_model_len = self.replicas.plan, self.replicas.max_model_len
            self.prefill_rows = self.replicas.prefill_rows
        else:
            self._build(options)
            self.grammars = self.engine.grammars
        self.grammars.reasoning = self.reasoning

    def _build(self, options: LLMOptions) -> None:
        """The engine, in this process."""
        self.mesh = make_mesh(self.config, options.tensor_parallel_size)
        if isinstance(options.plan, SchedulePlan):
            self.plan = options.plan
        elif options.plan == AUTO:
            rows = (options.tokens_per_step, options.decode_slots, options.deterministic)
            self.plan = auto_plan(self.config, self.mesh.devices.flat[0], self.mesh.size, *rows)
            self._hint(options)
        else:
            self.plan = load_plan(str(options.plan))
        check_sms(self.plan, hardware_of(self.mesh.devices.flat[0]))
        self.engine = build_engine(self.folder, self.config, self.plan, self.mesh, self.tokenizer, self._eos, options)
        self.calls = Calls(self.engine)  # the engine as several threads share it
        self.max_model_len = self.engine.max_model_len
        # Of prompts, that a step computes at most.
        self.prefill_rows = max(shape.prefill_rows for shape in self.engine.scheduler.shapes)

    def close(self) -> None:
        """Ends the replicas, where there are some."""
        if self.replicas is not None:
            self.replicas.close()

    def _hint(self, options: LLMOptions) -> None:
        """One line where the same GPUs are predicted to be much faster in another layout."""
        device = self.mesh.devices.flat[0]
        if device.platform == "gpu" and not options.deterministic:
            from nanoflow_jax.search.layouts import faster_layout

            hint = faster_layout(str(self.folder), self.config, device, self.mesh.size, options.kv_cache_dtype)
            if hint is not None:
                logger.warning("layout: %s", hint)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        """Completes the prompts (text, token ids, vLLM's {"prompt": ...} or {"prompt_token_ids": ...}, or a list of
        these), all together; results in their order.

        `sampling_params`: one for all, or one per prompt; None takes the model's own defaults (generation_config.json).
        Raises ValueError for a prompt that cannot be served, before any is run. A completion that fails on the way
        (logits that are not finite) has finish_reason "error" and says why in `error`. After Ctrl-C, `last_outputs`
        holds what had been finished, in order, and None for the others.
        """
        self.last_outputs = []
        return self._run([self._tokens(p, True) for p in as_list(prompts)], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation (a list of {"role", "content"}) or a list of them, through the chat template. A
        content is a text or a list of text parts ({"type": "text", "text": ...}).

        The other arguments are those of `nanoflow_jax.chat.ChatSettings`, for all conversations. Of each output,
        `content` is the answer, and `reasoning_content` the thought before it. Raises ValueError, one line.
        """
        self.last_outputs = []
        settings = ChatSettings(
            chat_template, chat_template_kwargs, tools, documents, add_generation_prompt, continue_final_message
        )
        conversations = as_conversations(messages)
        rendered = [self.tokenizer.chat(conversation, settings) for conversation in conversations]
        return self._run([self._tokens(p, False) for p in rendered], sampling_params, use_tqdm)

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Generator[RequestOutput]:
        """Completes the prompts like `generate`, yielding a prompt's output so far whenever it has grown; the last one
        of each has `finished` set. Closing the iterator ends what is still running."""
        checked = self._checked([self._tokens(p, True) for p in as_list(prompts)], sampling_params)
        return self._stream(checked) if self.replicas is None else self.replicas.stream(checked)

    def _stream(self, work: list[Work]) -> Generator[RequestOutput]:
        gathered = Gathered(self.tokenizer, self.reasoning)
        with closing(feed(self.calls, work, watched=True)) as steps:
            while True:
                with held_interrupts():
                    changed = next(steps, None)
                    if changed is None:
                        return
                    ended, grown = changed
                    outputs: dict[Work, RequestOutput] = {}
                    with self.calls.alone():
                        for item, request in ended + [(w, r) for w, r in grown if not r.finish_reason]:
                            outputs[item] = gathered.take(item, request, self.engine.running)
                # What the user holds does not grow with what comes.
                yield from [replace(output, outputs=list(output.outputs)) for output in outputs.values()]

    def score(self, pairs: Sequence[tuple[Prompt, Prompt]], use_tqdm: bool = True) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability after the context, and whether it is
        what greedy decoding would give. Text is encoded as lm-evaluation-harness does: together, spaces at the end of a
        context with the continuation, an empty context as the model's first token.

        Raises RuntimeError when one of them has failed; `last_scores` then holds the others, in order, and None for
        those that have.
        """
        self.last_scores = []
        work = [self.prepare_score(*pair, key=i) for i, pair in enumerate(as_pairs(pairs))]
        found: dict[int, Score] = {}
        for item, score in self._answered(work, "scoring", use_tqdm):
            assert isinstance(score, Score)
            found[item.key] = score
        scores = [found[i] for i in range(len(work))]
        done = [(s.logprob, s.is_greedy) if s.error is None else None for s in scores]
        self.last_scores = done
        for number, score in enumerate(scores):
            if score.error is not None:
                raise RuntimeError(f"pair {number}: {score.error}")
        return [score for score in done if score is not None]

    def prepare(self, prompt: Prompt, params: SamplingParams, key: Any = None) -> Work:
        """A prompt for `run_stream`. Raises ValueError when it cannot be served."""
        text, tokens = self._tokens(prompt, True)
        self.check(tokens, params)
        return Work(key, text, tokens, params)

    def prepare_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        key: Any = None,
        now: datetime | None = None,
        settings: ChatSettings = PLAIN,
    ) -> Work:
        """A conversation for `run_stream`; `now` is the time for templates that write it, the clock's when not given.
        Raises ValueError when it cannot be served."""
        text, tokens = self._tokens(self.tokenizer.chat(messages, settings, now), False)
        self.check(tokens, params)
        return Work(key, text, tokens, params)

    def prepare_score(self, context: Prompt, continuation: Prompt, key: Any = None) -> Work:
        """A pair for `run_stream`, as `score` takes it. Raises ValueError when it cannot be served."""
        tokens, border = self._pair(context, continuation)
        params = SamplingParams(temperature=0.0, prompt_logprobs=0, detokenize=False)
        self.check(tokens, params)
        return Work(key, None, tokens, params, scored_from=border - 1)

    def run_stream(
        self, work: Iterable[Work | None], between: Callable[[], None] = lambda: None
    ) -> Generator[tuple[Work, RequestOutput | Score]]:
        """Runs prepared prompts from an iterator of any length, keeping the engine full without a pause between them;
        yields each with its output (a Score for a pair) as it ends, in no order. The iterator is asked for more between
        two steps, and may give None for "nothing this time"; `between` is called there, too. Closing it ends what is
        still running."""
        with held_interrupts() as check_interrupt, closing(self.run_steps(work)) as steps:
            for ended in steps:
                yield from ended
                check_interrupt()
                between()

    def run_steps(self, work: Iterable[Work | None]) -> Generator[list[tuple[Work, RequestOutput | Score]]]:
        """As `run_stream`, step by step: yields after each what it has ended, often nothing. Does nothing about
        Ctrl-C."""
        if self.replicas is not None:
            return self.replicas.run(work)
        return run_steps(self.calls, work, self.tokenizer, self.reasoning)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError when a prompt can never be served."""
        check_prompt(prompt_token_ids, params, self.max_model_len, self.config.vocab_size, self._eos)
        if params.structured_outputs is not None:
            self.grammars.constraint(params.structured_outputs, prompt_token_ids)

    @property
    def num_rows(self) -> int:
        """Rows computed so far: prompt tokens, and one for each token that is generated. With replicas, those of what
        has ended."""
        return self.engine.num_rows if self.replicas is None else self.replicas.num_rows

    @property
    def default_max_tokens(self) -> int | None:
        """`max_new_tokens` of generation_config.json; None: it says nothing."""
        return self._defaults.get("max_tokens")

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's own defaults (generation_config.json), with fields replaced."""
        return SamplingParams(**{**self._defaults, **overrides})

    def _tokens(self, prompt: Prompt, add_special_tokens: bool) -> tuple[str | None, list[int]]:
        text, tokens = text_and_tokens(prompt)
        if tokens is None:
            assert text is not None
            tokens = self.tokenizer.encode(text, add_special_tokens)
        return text, tokens

    def _pair(self, context: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """Tokens of both, and where the continuation begins."""
        (text, ids), (next_text, next_ids) = text_and_tokens(context), text_and_tokens(continuation)
        if ids is not None and next_ids is not None:
            tokens, before = [*ids, *next_ids], len(ids)
        elif text is not None and next_text is not None and ids is next_ids:
            tokens, before = self.tokenizer.encode_pair(text, next_text)
        else:
            raise ValueError("pairs: a context and its continuation must both be text, or both token ids")
        if before == 0:
            tokens, before = [self.tokenizer.first_token_id, *tokens], 1
        if before >= len(tokens):
            raise ValueError(f"pairs: the continuation {continuation!r} has no token of its own after its context")
        return tokens, before

    def _checked(self, prompts: list[tuple[str | None, list[int]]], sampling_params: Params) -> list[Work]:
        """The prompts, each with its place and its sampling params. Raises ValueError for what cannot be served."""
        if sampling_params is None:
            sampling_params = self.default_sampling_params()
        params: list[Any] = [sampling_params]
        if isinstance(sampling_params, SamplingParams):
            params = params * len(prompts)
        elif isinstance(sampling_params, list | tuple):
            params = list(sampling_params)
        if wrong := [p for p in params if not isinstance(p, SamplingParams)]:
            raise ValueError(
                f"sampling_params: {wrong[0]!r} is not accepted; it must be a SamplingParams, or one per prompt"
            )
        if len(params) != len(prompts):
            raise ValueError(
                f"sampling_params: {len(params)} given for {len(prompts)} prompts; accepted: one, or one per prompt"
            )
        work = [Work(i, *prompt, p) for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))]
        for item in work:
            self.check(item.prompt_token_ids, item.params)
        return work

    def _run(
        self, prompts: list[tuple[str | None, list[int]]], sampling_params: Params, use_tqdm: bool
    ) -> list[RequestOutput]:
        work = self._checked(prompts, sampling_params)
        outputs: list[RequestOutput | None] = [None] * len(work)
        self.last_outputs = outputs
        for item, output in self._answered(work, "generating", use_tqdm):
            assert isinstance(output, RequestOutput)
            outputs[item.key] = output
        return [output for output in outputs if output is not None]

    def _answered(
        self, work: Sequence[Work], what: str, use_tqdm: bool
    ) -> Generator[tuple[Work, RequestOutput | Score]]:
        """`run_stream` with its progress shown."""
        start, produced = time.monotonic(), 0
        with (
            Progress(sum(w.completions for w in work), what, "requests", use_tqdm) as bar,
            closing(self.run_stream(work)) as results,
        ):
            for item, output in results:
                if isinstance(output, RequestOutput):
                    produced += sum(len(o.token_ids) for o in output.outputs)
                bar.advance(item.completions, note=f"{produced / (time.monotonic() - start):.0f} tokens/s")
                yield item, output


def auto_plan(
    config: ModelConfig, device: Any, devices: int, tokens_per_step: int, decode_slots: int | None, deterministic: bool
) -> SchedulePlan:
    """What plan="auto" takes on a mesh of `devices` like `device` (of JAX)."""
    if deterministic:  # which wants all rows treated alike
        return load_plan(DEFAULT)
    hardware = hardware_of(device)
    slots = decode_slots or tokens_per_step * 5 // 8
    plan, why = known_plan(config, hardware.name if hardware else None, devices, tokens_per_step, slots)
    logger.info(why)
    return plan


def generate(model: str | Path, prompts: Prompt | Sequence[Prompt], **options: Any) -> list[str]:
    """Completions of `prompts`, one string each, in order: `generate("tiny", ["12+30="], max_tokens=8)`.

    Options are those of SamplingParams (defaults: the model's own, greedy where it names none) and of LLM. The model
    is loaded for this call; make an LLM to keep it. Raises RuntimeError when one of them has failed, and TypeError for
    an option of neither.
    """
    known = SamplingParams.__dataclass_fields__
    check_names("generate", "option", options, {**OPTIONS, **known}, VLLM_NAMES)
    sampling = {k: options.pop(k) for k in list(options) if k in known and k != "seed"}
    if "seed" in options:
        sampling["seed"] = options["seed"]
    with closing(LLM(model, **{"progress": False, **options})) as llm:
        outputs = llm.generate(prompts, llm.default_sampling_params(**sampling), use_tqdm=False)
    for number, output in enumerate(outputs):
        if (error := output.outputs[0].error) is not None:
            raise RuntimeError(f"prompt {number}: {error}")
    return [output.outputs[0].text for output in outputs]
