"""What a throughput run is asked, what it found, and how that is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from nanoflow_jax.bench.timeline import TimedStep, Window
from nanoflow_jax.config import ModelConfig
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.options import LLMOptions
from nanoflow_jax.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(LLMOptions):
    """What to run: an LLM, its plan by name, with weights made up for `config`, and a workload. `model_layers`: of the
    whole model, when `config` has fewer."""

    config: ModelConfig
    workload: Workload
    model_layers: int
    requests: int | None = None  # None: about LIFETIMES times as many as run at once
    seconds: float | None = None  # the run ends then at the latest
    rank_of: int | None = None
    one_shape: bool = False
    accept_unsteady: bool = False  # measure the later half of a run that had no steady state
    temperature: float = 0.0
    hardware: Hardware | None = None
    inspect: bool = False


@dataclass(frozen=True, kw_only=True)
class ThroughputReport:
    """Figures of the steady window. Times in seconds; `lost` holds shares of the window's time (bench.timeline).

    gpus             that the model is split over: the mesh, or what a rank slice is a slice of
    tokens_per_second_per_gpu         prompt and output tokens that were computed
    served_tokens_per_second_per_gpu  the same, and prompt tokens that were found in kept pages
    share_of_optimum of FLOP/s ÷ (2 × parameters), by computed tokens; None where the GPU is not known
    prefix_hits      prompt and cached tokens of the requests admitted in the window, and their share
    network          of a rank slice: what is modelled, not measured
    steady           the window is the run's steady state; else its later half
    """

    model: str
    layers: int
    model_layers: int
    dtype: str
    plan: str
    workload: str
    device: str
    hardware: str | None
    gpus: int
    rank_of: int | None
    tokens_per_second_per_gpu: float
    served_tokens_per_second_per_gpu: float
    prefix_hits: dict[str, float]
    optimum_tokens_per_second_per_gpu: float | None
    share_of_optimum: float | None
    lost: dict[str, float]
    window: dict[str, float]
    weights_seconds: float
    compile_seconds: float
    warmup_seconds: float
    options: dict[str, Any]
    network: dict[str, Any] | None = None
    steady: bool = True
    steps: tuple[TimedStep, ...] = field(default=(), repr=False)
    span: Window | None = field(default=None, repr=False)

    @property
    def unit(self) -> str:
        """What a rate is of."""
        return "device" if self.device == "cpu" else "GPU"

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the steps."""
        plain = replace(self, steps=(), span=None)
        return {k: v for k, v in asdict(plain).items() if k not in ("steps", "span")}


def text(report: ThroughputReport) -> str:
    """For a terminal."""
    w, o, lost = report.window, report.options, report.lost
    layers = "" if report.layers == report.model_layers else f", {report.layers} of its {report.model_layers} layers"
    where = f"{report.gpus} x {report.device}"
    if report.rank_of:
        where = f"one rank of {report.rank_of} on one {report.device}, collectives replaced by local copies"
    optimum = "no optimum: the GPU is not known (--gpu)"
    if report.share_of_optimum is not None:
        optimum = (
            f"{report.share_of_optimum:.1%} of the optimum {report.optimum_tokens_per_second_per_gpu:,.0f} "
            f"({report.hardware}: FLOP/s / (2 x parameters))"
        )
    lines = [
        f"{report.model}{layers}, {report.dtype}, plan {report.plan}, {report.workload}: {where}",
        f"{report.tokens_per_second_per_gpu:,.1f} tokens/s/{report.unit} (prompt + output, computed"
        f"{', without network' if report.rank_of else ''}), {optimum}",
        *_hits(report),
        "time: "
        + ", ".join(f"{name.replace('_', ' ')} {lost[name]:.1%}" for name in lost if name != "useful")
        + f" lost; useful rows {lost['useful']:.1%}",
        f"{'window' if report.steady else 'no steady state, so the later half'}: {w['seconds']:.1f} s, "
        f"{w['share_of_run']:.0%} of the run, {w['steps']} steps, {w['tokens']} tokens, "
        f"{w['requests_ended']} of {o['requests']} requests ended in it, {w['running_median']} running, "
        f"{w['rows_used_mean']:.0f} of {o['tokens_per_step']} rows used",
        f"a step: median {w['step_ms_median']:.2f} ms, {w['layer_ms']:.3f} ms a layer with its share of the rest; the "
        f"device had nothing to do for {w['gap_ms_median']:.3f} ms before it, and dispatching it took "
        f"{w['dispatch_ms_median']:.3f} ms",
        f"before it: weights {report.weights_seconds:.1f} s, compile {report.compile_seconds:.1f} s, "
        f"warm-up {report.warmup_seconds:.1f} s, ramp {w['ramp_seconds']:.1f} s",
    ]
    if report.rank_of and report.network is None:
        lines.append("no network part: the GPU is not known (--gpu)")
    if network := report.network:
        lines.append(
            f"network ({network['source']}): {network['seconds_per_step'] * 1e3:.2f} ms per step, "
            f"{network['collectives_per_step']} collectives"
        )
        for name in ("exposed", "hidden", "inspected"):
            if (rate := network.get(f"tokens_per_second_per_gpu_{name}")) is not None:
                share = network.get(f"share_of_optimum_{name}")
                of = "" if share is None else f", {share:.1%} of the optimum"
                lines.append(f"  modelled, {name}: {rate:,.1f} tokens/s/GPU{of}")
        if "inspected" in network:
            lines.append(f"  {network['inspected']}")
    return "\n".join(lines)


def _hits(report: ThroughputReport) -> list[str]:
    if not report.options["enable_prefix_caching"]:
        return ["prefix caching is off"]
    hits = report.prefix_hits
    return [
        f"{report.served_tokens_per_second_per_gpu:,.1f} tokens/s/{report.unit} served: those computed, and prompt "
        f"tokens found in kept pages ({hits['cached_tokens']:.0f} of {hits['prompt_tokens']:.0f}, {hits['share']:.1%})"
    ]
