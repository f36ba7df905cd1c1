"""The events of a streamed response."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanoflow_jax.engine.outputs import GrowingOutput, prompt_output
from nanoflow_jax.engine.request import CompletionOutput, Request, RequestOutput
from nanoflow_jax.evaluate.records import Body, Record
from nanoflow_jax.evaluate.response import Echo, Json, chunk_choice, echo_of, encode_json, usage
from nanoflow_jax.serve.engine_thread import Distant, Exchange

if TYPE_CHECKING:
    from nanoflow_jax.api import LLM


class Chunks:
    """The events of a stream."""

    def __init__(self, llm: LLM, asked: Body, exchange: Exchange, head: Json):
        self._llm, self._asked, self._exchange = llm, asked, exchange
        self._head = encode_json(head)[:-1]
        self._usage = b', "usage": null' if asked.include_usage else b""
        self._places: dict[Request | Distant, tuple[Record, int, GrowingOutput | None]] = {}
        self._begun: dict[Request | Distant, Echo | None] = {}

    def chunk(self, request: Request | Distant, got: list[int] | CompletionOutput | None) -> bytes:
        """got: what has come (`engine_thread.News`)."""
        if not self._places:
            self._place()
        record, index, growing = self._places[request]
        if first := request not in self._begun:
            output = self._prompt(request) if record.echo else None
            self._begun[request] = output and echo_of(record, output, self._llm.tokenizer)
        if isinstance(got, list):
            assert growing is not None
            got = growing.take(got)
        elif got is None:
            got = request.last if isinstance(request, Distant) else growing and growing.finish()
        assert got is not None
        choice = chunk_choice(record, got, index, first, self._begun[request])
        return self._event([choice], self._usage)

    def last(self) -> bytes:
        done = b"data: [DONE]\n\n"
        if not self._asked.include_usage:
            return done
        asked = sum(len(group[0].prompt_token_ids) for group in self._exchange.requests)
        made = sum(r.num_generated for group in self._exchange.requests for r in group)
        return self._event([], b', "usage": ' + encode_json(usage(asked, made))) + done

    def _prompt(self, request: Request | Distant) -> RequestOutput:
        if isinstance(request, Request):
            return prompt_output(request, self._llm.tokenizer)
        return RequestOutput("", None, request.prompt_token_ids, [], request.metrics, request.prompt_logprobs)

    def _place(self) -> None:
        for record, group in zip(self._asked.records, self._exchange.requests, strict=True):
            for request in group:
                growing = None
                if isinstance(request, Request):
                    growing = GrowingOutput(request, self._llm.tokenizer, self._llm.reasoning)
                self._places[request] = (record, len(self._places), growing)

    def _event(self, choices: list[Json], more: bytes) -> bytes:
        return b"".join((b"data: ", self._head, b', "choices": ', encode_json(choices), more, b"}\n\n"))
