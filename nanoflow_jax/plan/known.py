"""The best plan known for a model, a GPU and a load: what `LLM(plan="auto")` takes, and --plan auto of the commands.
Plans name what they were made for; no solver runs here."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Sequence
from dataclasses import replace

from nanoflow_jax.config import ConfigError, ModelConfig, configs_root
from nanoflow_jax.hardware import Hardware
from nanoflow_jax.plan.file import load_plan
from nanoflow_jax.plan.plan import SchedulePlan, Target

AUTO, DEFAULT, UNCUT = "auto", "two_gather_one_reduce", "sequential"


def known_plan(
    config: ModelConfig, gpu: str | None, devices: int, tokens_per_step: int, decode_slots: int,
    among: Sequence[SchedulePlan] | None = None,
) -> tuple[SchedulePlan, str]:  # fmt: skip
    """The plan, and a line that says why it was taken.

    gpu: a name of `configs/hardware`, None: a CPU, or a GPU that no file names. Of several plans made for the same
    model and GPU, the one whose share of decode rows, then whose number of rows, is nearest. Where none was made for
    the precision of the weights, one for another is taken, less gathers in it: its GEMMs have other lengths. Nor
    for the model: one that was searched for another on this GPU hides more than one that was not searched at all
    (docs/search.md). One GPU has nothing to hide: there, nothing is cut.
    among: what `plans_with_target` gives, for a caller that asks often.
    """
    plan, why = _known(config, gpu, devices, tokens_per_step, decode_slots, among)
    return plan if plan.gathers in (None, config.quantization) else replace(plan, gathers=None), why


def _known(
    config: ModelConfig, gpu: str | None, devices: int, tokens_per_step: int, decode_slots: int,
    among: Sequence[SchedulePlan] | None,
) -> tuple[SchedulePlan, str]:  # fmt: skip
    if gpu is None:
        return load_plan(DEFAULT), f"plan {DEFAULT}: no plan is known for this device"
    wanted = Target.of(config, gpu, devices)
    found = [(plan, plan.target) for plan in (plans_with_target() if among is None else among) if plan.target]
    alike = [plan for plan, target in found if replace(target, quantization=config.quantization) == wanted]
    exact = [plan for plan, target in found if target == wanted]
    option = f" --quantization {config.quantization}" if config.quantization else ""
    unknown = f"none is known for this model on {devices} x {gpu}; nanoflow search{option} finds one"
    others = [(plan, target) for plan, target in found if target.gpu == gpu and target.devices > 1]
    if not alike and (devices == 1 or not others):
        plan = load_plan(UNCUT if devices == 1 else DEFAULT)
        return plan, f"plan {plan.name}: {unknown}"

    def distance(plan: SchedulePlan) -> tuple[float, float]:
        rows, decode = plan.tokens_per_step or tokens_per_step, plan.decode_tokens or 0
        return abs(decode / rows - decode_slots / tokens_per_step), abs(rows - tokens_per_step)

    if not alike:

        def strangeness(made: tuple[SchedulePlan, Target]) -> tuple[bool, bool, bool]:
            _, target = made
            routed = (target.num_experts is None) != (config.experts is None)
            return routed, target.devices != devices, target.quantization != config.quantization

        nearest = min(map(strangeness, others))
        best = min((made[0] for made in others if strangeness(made) == nearest), key=lambda p: (*distance(p), p.name))
        return best, f"plan {best.name}: searched for another model or mesh on this GPU; {unknown}"
    best = min(exact or alike, key=lambda plan: (*distance(plan), plan.name))
    why = f"plan {best.name}: searched for this model on {devices} x {gpu} ({best.description})"
    if not exact:
        weights = config.quantization or config.dtype
        why += f"; none is known for weights in {weights}: nanoflow search{option} finds one"
    return best, why


def named_plan(
    name: str, config: ModelConfig, gpu: str | None, devices: int, tokens_per_step: int, decode_slots: int | None = None
) -> SchedulePlan:
    """A plan by name or path; "auto" is the one that is known, and a line on standard error says which.

    decode_slots: None is 5/8 of the rows, as in `LLM`. Raises ConfigError, as `load_plan` does.
    """
    if name != AUTO:
        return load_plan(name)
    slots = tokens_per_step * 5 // 8 if decode_slots is None else decode_slots
    plan, why = known_plan(config, gpu, devices, tokens_per_step, slots)
    print(why, file=sys.stderr)
    return plan


def check_sms(plan: SchedulePlan, hardware: Hardware | None) -> None:
    """Raises ConfigError for a lane on more SMs than the GPU has. None: a CPU, or a GPU that no file names."""
    for op, lane in plan.lanes.items():
        if hardware is not None and lane.sms is not None and lane.sms > hardware.sm_count:
            raise ConfigError(
                f"plan {plan.name}: lanes.{op}.sms: {lane.sms} is not accepted; {hardware.name} has "
                f"{hardware.sm_count} SMs, accepted: 1 to {hardware.sm_count}"
            )


def plans_with_target() -> list[SchedulePlan]:
    """Those of `configs/plans`, by name. A file that cannot be read is another's fault, and passed over here: naming it
    as the plan says what is wrong."""
    found = []
    for path in sorted((configs_root() / "plans").glob("*.toml")):
        try:
            if "for" in tomllib.loads(path.read_text(encoding="utf-8")):
                found.append(load_plan(path.stem))
        except (ConfigError, tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue
    return found
