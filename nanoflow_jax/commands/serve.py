"""`nanoflow serve`: a model behind OpenAI's endpoints."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from nanoflow_jax.commands.batch import SAMPLING_OPTIONS
from nanoflow_jax.commands.options import add_model_options, make_llm, port, positive

KEY = "NANOFLOW_API_KEY"


def add(commands: Any) -> None:
    """Adds the command to the parser; nothing heavy is imported before it runs."""
    p = commands.add_parser(
        "serve",
        help="serve a model at OpenAI's endpoints, for harnesses and clients that speak to one",
        description="Serves /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics until it gets\n"
        "SIGTERM or Ctrl-C: then it finishes what runs, and refuses what is new.\n\n"
        "  nanoflow serve --model meta-llama/Llama-3.1-8B-Instruct --port 8000\n"
        "  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\\n"
        '      -d \'{"prompt": "12+30=", "max_tokens": 8}\'',
    )
    where = p.add_argument_group("server")
    where.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one of this machine")
    where.add_argument("--port", type=port, default=8000, help="port to listen at; 0 takes a free one, which is told")
    where.add_argument(
        "--api-key", metavar="KEY",
        help=f"what clients must send as `Authorization: Bearer KEY` (default: the environment's {KEY}, which others "
        "on this machine cannot see, else no key)",
    )  # fmt: skip
    where.add_argument("--served-model-name", metavar="NAME", help="what a request's 'model' must be; --model's value")
    where.add_argument("--max-body-mib", type=positive, default=16, metavar="MIB", help="size of a request at most")
    where.add_argument("--max-prompts", type=positive, default=1024, metavar="N", help="prompts of a request at most")
    where.add_argument(
        "--max-queue", type=positive, default=8192, metavar="N",
        help="completions that may wait for a slot; who comes then is told to come again (429)",
    )  # fmt: skip
    sampling = p.add_argument_group(
        "sampling of requests that leave it open (else generation_config.json, else greedy)"
    )
    for name, kind, text in SAMPLING_OPTIONS:
        sampling.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=text)
    sampling.add_argument("--seed", type=int, default=0, help="of requests that bring none, together with their number")
    add_model_options(p)
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from contextlib import closing

    from nanoflow_jax.config import ConfigError
    from nanoflow_jax.sampling_params import SamplingParams
    from nanoflow_jax.system.install import install_command

    try:
        from nanoflow_jax.evaluate.batch import Settings
        from nanoflow_jax.serve.app import Limits
        from nanoflow_jax.serve.run import bind, is_loopback, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; accepted: {install_command('serve')}") from None
    if args.distributed or args.coordinator:
        raise ConfigError("--distributed, --coordinator: a server is one process; accepted: to leave them out")
    if args.seed < 0:
        raise ConfigError(f"--seed: {args.seed} is not accepted; it must be at least 0")
    names = [name.replace("-", "_") for name, _, _ in SAMPLING_OPTIONS]
    sampling = {name: getattr(args, name) for name in names if hasattr(args, name)}
    SamplingParams(**sampling)  # a bad setting is told before the model is loaded
    key = args.api_key if args.api_key is not None else os.environ.get(KEY)
    if key is not None and (not key.strip() or not key.isprintable()):
        raise ConfigError(f"--api-key, {KEY}: it is empty or not printable; accepted: a text, or neither of them")
    at = bind(args.host, args.port)  # before the model is loaded
    if key is None and not is_loopback(args.host):
        print(f"nanoflow serve: {args.host} can be reached from elsewhere, and there is no --api-key", file=sys.stderr)
    settings = Settings(args.served_model_name or args.model, sampling, args.seed)
    limits = Limits(args.max_body_mib * 2**20, args.max_prompts, args.max_queue)
    with at, closing(make_llm(args)) as llm:
        return serve(llm, at, settings, limits, key, args.quiet)
