"""Does a stage fit a GPU, and if not, which knob makes it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from rlhf_kit import models
from rlhf_kit.memory.estimating import Estimate, Shape, estimate

# On a GPU the CUDA context, the workspaces of cuBLAS and the gaps between blocks take memory that no tensor has: an
# allowance, not a measurement.
RESERVE_GIB = 0.75
RESERVE_SHARE = 0.05


@dataclass(frozen=True)
class Turn:
    """One knob turned: what to write, and what the stage needs then."""

    knob: str
    estimate: Estimate
    fits: bool


@dataclass(frozen=True)
class Advice:
    """Whether an estimate fits `gib` GiB, and each knob's estimate when it alone is turned (the last: all of them)."""

    gib: float
    estimate: Estimate
    fits: bool
    turns: list[Turn]

    @property
    def knob(self) -> str | None:
        """The first knob that makes it fit; None where nothing has to be turned, or nothing helps."""
        return None if self.fits else next((turn.knob for turn in self.turns if turn.fits), None)

    def sentence(self) -> str:
        """The verdict in words and, where it does not fit, a line for each knob."""
        peak = f"{self.estimate.peak:.1f} GiB at the peak ({self.estimate.peak_phase})"
        left = f"the {room(self.gib):.1f} GiB that {self.gib:g} GiB leave for tensors"
        if self.fits:
            return f"It fits: {peak}, within {left}."
        lines = [f"It does not fit: {peak}, above {left}."]
        lines += (
            [f"Turn first: {self.knob}"] if self.knob else ["No knob suffices; take a smaller model or a larger GPU."]
        )
        for turn in self.turns:
            lines.append(f"  {turn.estimate.peak:6.1f} GiB {'fits' if turn.fits else '    '}  {turn.knob}")
        return "\n".join(lines)


def room(gib: float) -> float:
    """GiB that tensors can have of a GPU with `gib`."""
    return gib * (1 - RESERVE_SHARE) - RESERVE_GIB


def advise(model: Shape, stage: str, gib: float, **settings: Any) -> Advice:
    """Hold `estimate(model, stage, **settings)` against a device of `gib` GiB; knobs that cost nothing come first."""
    if gib <= 0:
        raise ValueError(f"a GPU of {gib} GiB: give its memory, for example 12")
    needed = estimate(model, stage, **settings)
    if needed.peak <= room(gib):
        return Advice(gib, needed, True, [])
    turns, all_turned = [], dict(settings)
    known = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(model, PreTrainedConfig) and models.is_adapter(model):
        remembered = bool(models.read_notes(model).get("load_in_4bit", False))
        known = {"lora": models.lora_config({}), "load_in_4bit": remembered, **known}
    for knob, change in _knobs(stage, known):
        turned = estimate(model, stage, **{**settings, **change})
        all_turned |= change
        turns.append(Turn(knob, turned, turned.peak <= room(gib)))
    if len(turns) > 1:
        turned = estimate(model, stage, **all_turned)
        turns.append(Turn("all of these", turned, turned.peak <= room(gib)))
    return Advice(gib, needed, False, turns)


def _knobs(stage: str, settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(how it is written, what it changes) of every knob not turned yet: first those that change no result."""
    if not settings.get("gradient_checkpointing", True):
        yield "gradient_checkpointing=True", {"gradient_checkpointing": True}
    micro = settings.get("micro_batch_size", 1)
    if micro > 1:
        name = "micro_batch_size" if stage == "ppo" else "per_device_train_batch_size"
        yield f"{name}=1", {"micro_batch_size": 1}
    if "8bit" not in settings.get("optim", ""):
        yield 'optim="paged_adamw_8bit"', {"optim": "paged_adamw_8bit"}
    if stage == "ppo" and settings.get("reward_model") is not None and settings.get("lora") is not None:
        yield "a reward model that is an adapter over the policy's base", {"reward_model": None}
    if settings.get("lora") is None:
        yield "lora=rlhf_kit.models.lora()", {"lora": models.lora_config({})}
        yield "lora=rlhf_kit.models.lora(), load_in_4bit=True", {"lora": models.lora_config({}), "load_in_4bit": True}
    elif not settings.get("load_in_4bit"):
        yield "load_in_4bit=True", {"load_in_4bit": True}
    rollout = settings.get("rollout", 8)
    if stage == "ppo" and rollout > 1:
        yield f"per_device_train_batch_size={rollout // 2}", {"rollout": rollout // 2}
    completion = settings.get("max_completion_length", 512)
    if completion > 1:
        name = "max_completion_length" if stage == "ppo" else "max_length"
        half = completion // 2
        value = half if stage == "ppo" else settings.get("prompt_length", 512) + half
        yield f"{name}={value}", {"max_completion_length": half}
    if settings.get("ensemble", 1) > 1:
        yield "one reward model instead of an ensemble", {"ensemble": 1}
