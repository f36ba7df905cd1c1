"""The model "nanoflow" of lm-evaluation-harness: `nanoflow lm-eval --model_args pretrained=tiny --tasks ...`.

All requests of a kind are given to the engine together, which orders and batches them itself; `--batch_size` changes
nothing. Importing this module registers the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from nanoflow_jax.api import LLM
from nanoflow_jax.chat import ChatSettings
from nanoflow_jax.config import ConfigError
from nanoflow_jax.evaluate.records import is_off
from nanoflow_jax.sampling_params import SamplingParams
from nanoflow_jax.system.reading import Malformed, parse_json

logger = logging.getLogger("nanoflow_jax")

SAVED_AT_ONCE = 1024  # requests whose answers go to lm-eval's cache (--use_cache) together
_NOT_OURS = ("do_sample", "until", "max_gen_toks")
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "stop_token_ids", "ignore_eos", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "skip_special_tokens",
)  # fmt: skip

Pair = tuple[list[int], list[int]]  # tokens of a context and of its continuation


class NanoflowLM(TemplateLM):
    """An `LLM` as lm-eval wants it.

    pretrained    what LLM calls the model; any other option of LLM may be given too
    max_gen_toks  tokens to generate at most, where a task does not say
    llm           an LLM that is there already, in place of all these

    batch_size, max_batch_size and device are lm-eval's own, always given by it, and change nothing: the engine batches
    by itself, and JAX_PLATFORMS says where. Raises ConfigError for anything else.
    """

    def __init__(
        self,
        pretrained: str = "tiny",
        *,
        max_gen_toks: int = 256,
        llm: LLM | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        super().__init__()
        if isinstance(given := options.get("chat_template_kwargs"), str):  # in a list of name=value
            try:
                options["chat_template_kwargs"] = parse_json(given)
            except Malformed as error:
                raise ConfigError(f"model_args: chat_template_kwargs: {given!r} is not JSON ({error})") from None
        try:
            self.llm = LLM(pretrained, **options) if llm is None else llm
        except TypeError as error:  # an option that LLM does not have
            raise ConfigError(f"model_args: {str(error).removeprefix('LLM: ')}") from None
        self._name, self.max_gen_toks = pretrained, max_gen_toks
        self.tokenizer = self.llm.tokenizer.hugging_face

    # -- what lm-eval asks about the model

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.llm.tokenizer.first_token_id

    @property
    def max_length(self) -> int:
        """Tokens that a scored one may stand after."""
        return self.llm.max_model_len - 2

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """add_special_tokens None: the tokenizer's own way, but never a second first token (chat templates write
        one)."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        return self.llm.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise ConfigError(f"apply_chat_template: {self._name!r} has no chat template; leave the option out")
        settings = ChatSettings(
            add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )
        return self.llm.tokenizer.chat(chat_history, settings)

    # -- requests

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = []
        for part in self._parts(requests):
            pairs = [self._fitted(context, continuation) for _, context, continuation in part]
            try:
                results += self.llm.score(cast(Any, pairs), use_tqdm=not disable_tqdm)
            finally:  # where one has failed, the others are kept
                for (key, _context, _continuation), score in zip(part, self.llm.last_scores, strict=False):
                    if score is not None:
                        self.cache_hook.add_partial("loglikelihood", key, score)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, each token after as many before it as fit."""
        results: list[float] = []
        for part in self._parts(requests):
            windows = [self._windows(request.args[0]) for request in part]
            pairs = [pair for some in windows for pair in some]
            scores = iter(self.llm.score(cast(Any, pairs), use_tqdm=not disable_tqdm))
            for request, some in zip(part, windows, strict=True):
                results.append(sum(next(scores)[0] for _ in some))
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers alone, without the thoughts before them; an empty text where a thought has not ended."""
        results: list[str] = []
        unfinished = 0
        for part in self._parts(requests):
            prompts, params = [], []
            for request in part:
                context, wanted = request.args
                some = self._params(wanted, len(results) + len(params))
                prompts.append(self._prompt(context, some))
                params.append(some)
            failed: str | None = None
            for request, output in zip(part, self.llm.generate(prompts, params, not disable_tqdm), strict=True):
                done = output.outputs[0]
                if done.finish_reason == "error":
                    failed = failed or f"request {output.request_id}: {done.error}"
                    continue
                unfinished += done.content is None
                results.append(done.content or "")
                if not request.args[1].get("do_sample"):
                    self.cache_hook.add_partial("generate_until", request.args, results[-1])
            if failed is not None:  # the others are kept
                raise RuntimeError(failed)
        if unfinished:
            logger.warning("%d of %d outputs have no answer: their thoughts had not ended", unfinished, len(results))
        return results

    # -- the parts of these

    def _parts(self, requests: Sequence[Any]) -> Iterator[Sequence[Any]]:
        """All at once, or, where answers are kept, so many that little is lost when the run is killed."""
        size = len(requests) if self.cache_hook.dbdict is None else SAVED_AT_ONCE
        for at in range(0, len(requests), max(size, 1)):
            yield requests[at : at + size]

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair without the beginning of a context that is too long."""
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens; accepted: at most {self.max_length} (of max_model_len)"
            )
        return context[-room:], continuation

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]

    def _params(self, wanted: dict[str, Any], number: int) -> SamplingParams:
        """lm-eval's generation settings as ours. Raises ValueError for one that there is not."""
        settings: dict[str, Any] = {**normalize_gen_kwargs(wanted, self.max_gen_toks)}
        known = {*_SAMPLING, *_NOT_OURS}
        if unknown := sorted(name for name in settings if name not in known and not is_off(name, settings[name])):
            accepted = ", ".join(sorted({*_SAMPLING, *_NOT_OURS}))
            raise ValueError(f"gen_kwargs: {unknown[0]!r} is not supported; accepted: {accepted}")
        until = [stop for stop in settings["until"] if stop and stop != self.tokenizer.eos_token]
        found = {name: settings[name] for name in _SAMPLING if name in settings}
        if not settings["do_sample"]:
            found["temperature"] = 0.0
        elif "seed" not in found:
            found["seed"] = number  # the same run gives the same samples
        return SamplingParams(max_tokens=settings["max_gen_toks"], stop=until or None, **found)

    def _prompt(self, context: str, params: SamplingParams) -> list[int]:
        """The context's tokens; of one that is too long, the last ones."""
        assert params.max_tokens is not None
        room = self.llm.max_model_len - params.max_tokens
        if room < 1:
            raise ValueError(
                f"max_gen_toks: {params.max_tokens} leave no room for a prompt; accepted: at most "
                f"{self.llm.max_model_len - 1} (of max_model_len)"
            )
        tokens = self.tok_encode(context)
        if len(tokens) > room:
            logger.warning("a context of %d tokens is cut to its last %d", len(tokens), room)
        return tokens[-room:] or [self.prefix_token_id]


register_model("nanoflow")(NanoflowLM)  # not as a decorator, whose type would hide the class
