"""What the server costs: the same requests through `LLM.generate` and through `nanoflow serve`'s endpoints, in turns.

    python -m tools.serve_throughput --requests 2048 --output-tokens 90 --slots 512 --device-ms 50

The device is a stand-in whose steps take a while and no processor, so that the host's work is what is measured; the
client is a process of its own, which sends all requests at once. Needs the extra serve, and aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import sys
import time
from typing import Any

from nanoflow_jax.commands.options import positive

PROMPT = 32  # tokens


def prompts(count: int) -> list[list[int]]:
    import numpy as np

    rng = np.random.default_rng(0)
    return [rng.integers(3, 100, PROMPT).tolist() for _ in range(count)]


def make_llm(slots: int, output: int, device_ms: float) -> Any:
    """`tiny` with a stand-in for its device."""
    from nanoflow_jax import LLM
    from nanoflow_jax.bench.host import StandInRunner
    from nanoflow_jax.bench.structured import PacedRunner

    length = PROMPT + output + 1
    llm = LLM(
        "tiny", tokens_per_step=2 * slots, decode_slots=slots, max_model_len=length, page_size=64,
        kv_cache_tokens=slots * -(-length // 64) * 64, tensor_parallel_size=1, progress=False,
    )  # fmt: skip
    real, shapes = llm.engine.runner, llm.engine.scheduler.shapes
    stand_in: Any = PacedRunner(StandInRunner(llm.config, list(shapes), real.sizes, real.num_pages), device_ms / 1e3)
    llm.engine.runner = stand_in
    return llm


def direct(llm: Any, count: int, output: int) -> float:
    """Seconds."""
    from nanoflow_jax import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(prompts(count), params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(o.outputs[0].token_ids) == output for o in outputs)
    return seconds


async def served(llm: Any, count: int, output: int, stream: bool) -> float:
    """Seconds, by the client's clock."""
    from nanoflow_jax.evaluate.batch import Settings
    from nanoflow_jax.serve.app import Limits, Server
    from nanoflow_jax.serve.run import bind, listening

    server, at = Server(llm, Settings("tiny"), Limits()), bind("127.0.0.1", 0)
    async with listening(server, at):
        command = ("-m", "tools.serve_throughput", "--client", str(at.getsockname()[1]), "--requests", str(count))
        more = ("--output-tokens", str(output), *(["--stream"] if stream else []))
        client = await asyncio.create_subprocess_exec(sys.executable, *command, *more, stdout=asyncio.subprocess.PIPE)
        told, _ = await client.communicate()
    server.close()
    return json.loads(told)


def processor_seconds() -> tuple[float, float]:
    """Of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return used[0].ru_utime + used[0].ru_stime, used[1].ru_utime + used[1].ru_stime


async def ask(port: int, count: int, output: int, stream: bool) -> float:
    """The client: seconds for all requests at once, after one to warm up."""
    import aiohttp

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(prompt: list[int]) -> None:
            body = {"prompt": prompt, "max_tokens": output, "temperature": 0, "ignore_eos": True, "stream": stream}
            async with session.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as reply:
                assert reply.status == 200, await reply.text()
                async for _ in reply.content.iter_any():
                    pass

        asked = prompts(count)
        await one(asked[0])
        start = time.perf_counter()
        await asyncio.gather(*map(one, asked))
        return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.serve_throughput", description="LLM.generate and the server on the same requests."
    )
    parser.add_argument("--requests", type=positive, default=2048)
    parser.add_argument("--output-tokens", type=positive, default=90, help="of each")
    parser.add_argument("--slots", type=positive, default=512)
    parser.add_argument("--device-ms", type=float, default=50, help="that a step takes")
    parser.add_argument("--repeat", type=positive, default=1, help="pairs of runs")
    parser.add_argument("--stream", action="store_true", help="streamed answers; whole ones when not given")
    parser.add_argument("--client", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.client is not None:
        print(json.dumps(asyncio.run(ask(args.client, args.requests, args.output_tokens, args.stream))))
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from nanoflow_jax.serve.run import run_loop

    llm = make_llm(args.slots, args.output_tokens, args.device_ms)
    for _ in range(args.repeat):
        before, _ = processor_seconds()
        alone = direct(llm, args.requests, args.output_tokens)
        between, client = processor_seconds()
        behind = run_loop(served(llm, args.requests, args.output_tokens, args.stream))
        after, ended = processor_seconds()
        each = [1e3 * s / args.requests for s in (between - before, after - between, ended - client)]
        print(
            f"generate {alone:.2f} s, served {behind:.2f} s, ratio {alone / behind:.3f}; processor ms per request: ",
            end="",
        )
        print("generate {:.2f}, served {:.2f}, its client {:.2f}".format(*each), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
