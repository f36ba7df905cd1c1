"""`nanoflow models`: what is supported, and what a model needs, on a machine without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nanoflow_jax.system.table import table

if TYPE_CHECKING:
    from nanoflow_jax.config import ModelConfig
    from nanoflow_jax.search.fit import Share

GIB = 2**30


def add(commands: Any) -> None:
    p = commands.add_parser(
        "models",
        help="list the families of models, or say what a model needs and where it fits",
        description="Without a model: the families and what each is. With one: weights and KV per GPU by precision\n"
        "and mesh size, the GPUs that hold it and how many tokens of KV they have left. No weights are read.\n\n"
        "  nanoflow models\n"
        "  nanoflow models llama-3.1-70b\n"
        "  nanoflow models path/to/config.json --json",
    )
    p.add_argument(
        "model", nargs="?", metavar="MODEL",
        help="'tiny', a name in configs/models, a config.json, or a folder with one",
    )  # fmt: skip
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    if args.model is None:
        print(json.dumps(_families(), indent=1) if args.json else _families_text())
        return 0
    from nanoflow_jax.hardware import known_hardware
    from nanoflow_jax.models.registry import model_config
    from nanoflow_jax.parallel.mesh import valid_sizes
    from nanoflow_jax.search.fit import shares
    from nanoflow_jax.step.attention import PAGE_SIZE, why_not_mosaic

    name, config = model_config(args.model)
    found, sizes = shares(config, known_hardware()), valid_sizes(config)
    attention = why_not_mosaic(config, (9, 0), PAGE_SIZE)  # of a Hopper GPU
    if args.json:
        data = {
            "model": name, "family": config.family, "parameters": config.num_params,
            "active_parameters": config.active_params, "dtype": config.dtype, "max_length": config.max_length,
            "mesh_sizes": sizes, "why_not_mosaic": attention, "shares": [asdict(share) for share in found],
        }  # fmt: skip
        print(json.dumps(data, indent=1))
    else:
        print(_text(name, config, found, sizes, attention))
    return 0


def _families() -> list[dict[str, Any]]:
    """A family's file says in its first sentence what it is."""
    from nanoflow_jax.models.registry import FAMILIES

    return [
        {
            "family": family.name,
            "architectures": list(family.architectures),
            "about": " ".join((sys.modules[family.read_config.__module__].__doc__ or "").split()).rstrip("."),
        }
        for family in FAMILIES.values()
    ]


def _families_text() -> str:
    from nanoflow_jax.config import configs_root

    rows = [("family", "architecture", "what it is")]
    rows += [(f["family"], ", ".join(f["architectures"]), f["about"]) for f in _families()]
    names = sorted(path.stem for path in (configs_root() / "models").glob("*.json"))
    return "\n".join(
        [
            table(rows, left=3),
            "",
            "All run in bfloat16 and float32 (float16 as bfloat16), with fp8 weights (quantization='fp8'; not with "
            "experts) and fp8 KV pages (kv_cache_dtype='fp8').",
            f"Known by name: tiny, {', '.join(names)}; nanoflow models NAME says what one needs.",
        ]
    )


def _text(name: str, config: ModelConfig, found: Sequence[Share], sizes: Sequence[int], attention: str | None) -> str:
    """attention: why the Mosaic kernels would not be used; None: they are."""
    from nanoflow_jax.plan.known import DEFAULT

    gpus = list(found[0].fits)
    rows: list[Sequence[str]] = [("GPUs", "weights", "GiB", "KV KiB/token", *gpus)]
    for share in found:
        kv = " / ".join(f"{value / 2**10:.3g}" for value in share.kv_bytes.values())
        tokens = []
        for gpu in gpus:
            fit = share.fits.get(gpu)
            ok = fit is not None and fit.refused is None
            tokens.append(" / ".join(map(_short, fit.kv_tokens.values())) if fit is not None and ok else "-")
        weights = share.quantization or config.dtype
        rows.append((str(share.devices), weights, f"{share.weight_bytes / GIB:.4g}", kv, *tokens))
    plans: dict[str, list[str]] = {}
    for share in found:
        for gpu, fit in share.fits.items():
            if fit.refused is None and fit.plan != DEFAULT:
                plans.setdefault(fit.plan, []).append(f"{share.devices} x {gpu} {share.quantization or config.dtype}")
    no_fp8 = sorted({gpu for s in found for gpu, fit in s.fits.items() if (fit.refused or "").startswith("quantiz")})
    active = f" ({_parameters(config.active_params)} of them for a token)" if config.experts is not None else ""
    return "\n".join(
        [
            f"{name}: family {config.family}, {_parameters(config.num_params)} parameters{active}, "
            f"{config.dtype}; a sequence has at most {config.max_length:,} tokens",
            f"mesh sizes that work: {', '.join(map(str, sizes))}",
            f"attention on Hopper: {'Mosaic GPU kernels' if attention is None else f'plain XLA: {attention}'}",
            "",
            "Of one GPU: GiB of weights, KiB of KV per token; then the tokens of KV that all of them hold beside the "
            "weights, with pages in the model's dtype / in fp8; a request ends there, too. -: does not fit"
            + (f"; no fp8 tensor cores: {', '.join(no_fp8)}." if no_fp8 else "."),
            table(rows, left=2),
            "",
            f"plan auto: {DEFAULT}{', but' * bool(plans)}",
            *(f"  {plan}: {', '.join(where)}" for plan, where in sorted(plans.items())),
        ]
    )


def _parameters(count: int) -> str:
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens >= 1e6 else f"{tokens / 1e3:.1f}k" if tokens >= 1e4 else str(tokens)
