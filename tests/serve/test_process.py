"""A real server: OpenAI's client and lm-evaluation-harness speak to it, and a signal ends it in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from nanoflow_jax import LLM
from tests.evaluate.flags import FLAGS

pytest.importorskip("uvicorn", reason="the serve extra is not installed")
openai = pytest.importorskip("openai", reason="OpenAI's client is not installed (the dev extra)")

KEY = "only-here"
LIMIT = 120.0  # seconds after which a server counts as stuck
HELLO: Any = [{"role": "user", "content": "What is 25+17?"}]


class Running:
    """`nanoflow serve` in a process of its own, at a free port."""

    def __init__(self, *arguments: str):
        command = [sys.executable, "-m", "nanoflow_jax", "serve", "--port", "0", *arguments, *FLAGS]
        command.remove("--quiet")
        environment = {**os.environ, "NANOFLOW_API_KEY": KEY}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        watch = threading.Timer(LIMIT, self.process.kill)
        watch.start()
        self.url, self.told, stderr = "", list[str](), self.process.stderr
        assert stderr is not None
        for line in stderr:
            self.told.append(line.strip())
            if line.startswith("serving tiny on "):
                self.url = line.split()[-1]
                break
        watch.cancel()
        assert self.url, self.told

    def client(self, **options: Any) -> Any:
        return openai.OpenAI(base_url=self.url, api_key=KEY, timeout=LIMIT, max_retries=0, **options)

    def end(self, number: int) -> tuple[int, str]:
        """Exit status, and the rest of standard error."""
        self.process.send_signal(number)
        _, rest = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, rest


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    server = Running()
    yield server
    server.process.kill()
    server.process.communicate()


def test_openais_client(server: Running) -> None:
    with server.client() as client:
        assert [m.id for m in client.models.list()] == ["tiny"]
        done = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, max_completion_tokens=12)
        assert done.choices[0].message.content == "25+17=42" and done.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(
            model="tiny", messages=HELLO, temperature=0, stream=True, stream_options={"include_usage": True},
            logprobs=True, top_logprobs=1,
        )  # fmt: skip
        seen = list(chunks)
        assert "".join(c.choices[0].delta.content or "" for c in seen if c.choices) == "25+17=42"
        assert seen[-1].usage.model_dump(exclude_none=True) == done.usage.model_dump(exclude_none=True)
        tokens = [t.token for c in seen if c.choices for t in c.choices[0].logprobs.content]
        assert "".join(tokens).startswith("25+17=42")
        made = client.completions.create(model="tiny", prompt=["12+30=", "reverse abc="], max_tokens=8, logprobs=1, n=1)
        assert [c.text for c in made.choices] == ["42", "cba"]
        assert made.choices[0].logprobs.tokens[:2] == ["4", "2"]
        parts = client.completions.create(model="tiny", prompt="reverse abcdef=", stop="cb", stream=True)
        assert "".join(p.choices[0].text for p in parts) == "fed"


def test_openais_client_gets_its_errors(server: Running) -> None:
    with server.client() as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            client.completions.create(model="tiny", prompt="12", temperature=-1)
        assert wrong.value.param == "temperature" and "a number from 0" in wrong.value.message
        with pytest.raises(openai.NotFoundError) as unknown:
            client.completions.create(model="gpt-4", prompt="12")
        assert unknown.value.code == "model_not_found"
    with (
        openai.OpenAI(base_url=server.url, api_key="other", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")  # of datasets and aiohttp
def test_lm_evaluation_harness_finds_the_scores_of_nanoflow_lm_eval(
    server: Running, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`local-completions` (choices and texts) and `local-chat-completions` give what the model "nanoflow" gives."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the lm-eval extra)")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from nanoflow_jax.evaluate.lm_eval import NanoflowLM

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    rows = [{"q": f"{a}+{a + 7}=", "answer": str(2 * a + 7), "wrong": [str(2 * a + 8), "1"]} for a in range(10, 46, 6)]
    rows[-1].update(answer="1", wrong=[rows[-1]["answer"], "2"])  # the model gets it wrong
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'sums.jsonl'}}}, "
    shared += f"cache_dir: {tmp_path / 'datasets'}}}\ntest_split: test\ntarget_delimiter: ''\n"
    texts = "output_type: generate_until\ndoc_to_target: '{{answer}}'\ngeneration_kwargs: "
    texts += "{until: ['\\n'], max_gen_toks: 12, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
    for name, more in (
        ("sums", "doc_to_text: '{{q}}'\n" + texts),
        ("talks", "doc_to_text: 'What is {{q[:-1]}}?'\n" + texts.replace("{{answer}}", "{{q}}{{answer}}")),
        (
            "choices",
            "doc_to_text: '{{q}}'\noutput_type: multiple_choice\ndoc_to_target: 0\n"
            "doc_to_choice: '{{[answer] + wrong}}'\nmetric_list: [{metric: acc}]\n",
        ),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{shared}{more}")

    def scores(model: Any, *tasks: str, **options: Any) -> tuple[Any, Any]:
        found = cast(Any, simple_evaluate)(
            model=model, tasks=list(tasks), bootstrap_iters=0, log_samples=True, **options,
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        )  # fmt: skip
        samples = {name: [s["filtered_resps"] for s in found["samples"][name]] for name in tasks}
        return {name: {k: v for k, v in found["results"][name].items() if "," in k} for name in tasks}, samples

    at = f"model=tiny,base_url={server.url}"
    tokenizer = f"tokenizer={llm.folder},tokenizer_backend=huggingface"
    wanted, ours = scores(NanoflowLM(llm=llm), "sums", "choices")
    assert wanted["sums"]["exact_match,none"] == wanted["choices"]["acc,none"] == 5 / 6
    found, theirs = scores(
        "local-completions", "sums", "choices",
        model_args=f"{at}/completions,{tokenizer},num_concurrent=4,max_length=127,add_bos_token=True",
        batch_size=2,
    )  # fmt: skip
    assert found == wanted
    assert theirs["sums"] == ours["sums"]
    for mine, other in zip(ours["choices"], theirs["choices"], strict=True):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
        assert [lp for lp, _ in mine] == pytest.approx([lp for lp, _ in other], abs=2e-3)
    wanted, ours = scores(NanoflowLM(llm=llm), "talks", apply_chat_template=True)
    assert wanted["talks"]["exact_match,none"] == 5 / 6
    found, theirs = scores(
        "local-chat-completions", "talks", model_args=f"{at}/chat/completions,num_concurrent=2",
        apply_chat_template=True,
    )  # fmt: skip
    assert (found, theirs) == (wanted, ours)


@pytest.mark.filterwarnings("ignore")  # of schemathesis and of hypothesis under it
def test_what_the_schema_says_is_so(server: Running) -> None:
    """A few seconds of schemathesis's examples, most of them wrong in one way: no failure, no status and no answer
    that is not described, nothing accepted that is not."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed (the dev extra)")
    from hypothesis import Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        negative_data_rejection,
        response_schema_conformance,
        status_code_conformance,
    )

    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{server.url.removesuffix('/v1')}/openapi.json", headers=headers)
    checks = [
        not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
        negative_data_rejection,
    ]  # fmt: skip
    seen = 0
    for mode in (schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE):
        for found in schema.get_all_operations():
            operation = found.ok()
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue

            @settings(max_examples=12 if operation.method == "post" else 2, phases=[Phase.generate], derandomize=True)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: Any) -> None:
                nonlocal seen
                seen += 1
                case.call_and_validate(headers=headers, checks=checks)

            check()
    assert seen > 40


def test_a_signal_finishes_what_runs(server: Running) -> None:
    """The last test of this server."""
    with server.client() as client, server.client() as late:
        late.models.list()  # a connection that is there already
        chunks = client.completions.create(
            model="tiny", prompt="12", max_tokens=120, stream=True, extra_body={"ignore_eos": True}, n=24,
            temperature=1.0,
        )  # fmt: skip
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.stderr is not None
        told = next(line for line in server.process.stderr if "shutting down" in line)
        with pytest.raises(openai.APIStatusError) as refused:
            late.completions.create(model="tiny", prompt="12+30=")
        assert refused.value.status_code == 503 and refused.value.response.headers["retry-after"]
        ends = [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason]
        assert ends == ["length"] * 24
    assert server.process.wait(LIMIT) == 0
    assert told == "shutting down: what runs is finished\n"
    assert server.process.stderr.read() == ""


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--port", "abc"], "argument --port: 'abc' is not accepted; it must be from 0 (a free one) to 65535"),
        (["--port", "99999"], "--port: 99999 is not accepted; it must be from 0 (a free one) to 65535"),
        (["--host", "no.such.host.invalid"], "--host, --port: no.such.host.invalid:8000 cannot be had"),
        (["--api-key", ""], "--api-key, NANOFLOW_API_KEY: it is empty"),
        (["--seed", "-1"], "--seed: -1 is not accepted"),
        (["--temperature", "-1"], "temperature: -1.0 is not accepted"),
        (["--distributed"], "--distributed, --coordinator: a server is one process"),
    ],
)
def test_bad_options_are_one_line_before_the_model_is_loaded(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanoflow_jax import api
    from nanoflow_jax.cli import main

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(api, "LLM", load)
    monkeypatch.setattr("nanoflow_jax.distributed.join", lambda *_, **__: None)
    monkeypatch.setattr("nanoflow_jax.distributed.run", lambda run, _: run())
    try:
        assert main(["serve", *arguments]) == 1
    except ValueError as error:  # where `distributed.run` reports
        assert str(error).startswith(told)
        return
    except SystemExit as error:  # wrong usage
        assert error.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"nanoflow serve: {told}")
