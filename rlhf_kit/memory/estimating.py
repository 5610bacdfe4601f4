"""What a stage will need, from the model's config alone: its own steps run on the meta device and are counted."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlhf_kit.memory.ledger import DYNAMIC, STATIC, Ledger, fused_attention
from rlhf_kit.memory.shapes import Job
from rlhf_kit.memory.stages import STAGES, TRL_TILE, Phases
from rlhf_kit.models import ModelError, ModelPath, device, is_4bit, is_adapter, load_config, same_base

GIB = 2**30
Shape: TypeAlias = ModelPath | PreTrainedConfig


@dataclass(frozen=True)
class Estimate:
    """GiB of a stage: `static` is held throughout; `phases` says what each phase adds to it at its peak, by part."""

    stage: str
    trained_parameters: int
    static: dict[str, float]
    phases: dict[str, dict[str, float]]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """GiB by part at the peak; they add up to `peak`."""
        return {**self.static, **self.phases[self.peak_phase]}

    @property
    def peak(self) -> float:
        """GiB at the peak: what is static and what the largest phase adds."""
        return sum(self.parts.values())

    def table(self) -> str:
        """Parts in rows, phases in columns, GiB; the largest total is the peak."""
        names = list(self.phases)
        rows = [(part, [f"{gib:.2f}"] * len(names)) for part, gib in self.static.items() if gib > 0]
        for part in DYNAMIC:
            if any(self.phases[name][part] > 0 for name in names):
                rows.append((part, [f"{self.phases[name][part]:.2f}" for name in names]))
        static = sum(self.static.values())
        rows.append(("total", [f"{static + sum(self.phases[name].values()):.2f}" for name in names]))
        lines = [f"{'GiB':<16}" + "".join(f"{name:>12}" for name in names)]
        return "\n".join([*lines, *(f"{part:<16}" + "".join(f"{cell:>12}" for cell in cells) for part, cells in rows)])


def estimate(
    model: Shape,
    stage: str,
    *,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    prompt_length: int = 512,
    max_completion_length: int = 512,
    rollout: int = 8,
    micro_batch_size: int = 1,
    gradient_checkpointing: bool = True,
    optim: str = "adamw_torch_fused",
    reward_model: Shape | None = None,
    ensemble: int = 1,
    on_gpu: bool | None = None,
) -> Estimate:
    """GiB that `stage` ("sft", "reward_model", "dpo" or "ppo") will need on one device, before anything is loaded.

    model: a directory, a hub id or a transformers config; lora: train adapters (None: all weights, or the adapter that
    `model` is); load_in_4bit: None means as the directory remembers; prompt_length, max_completion_length: tokens;
    rollout: completions that PPO generates at once; micro_batch_size: rows (of preferences: pairs) in one forward pass;
    reward_model: the reward models stand on this model, not on the policy's base; ensemble: how many of them (0: the
    reward is a function).
    The precision is the kit's on that device. Not counted: the CUDA context, fragmentation, and the loading itself.
    Raises ValueError on settings that make no stage, ModelError where there is no such model.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: choose one of {', '.join(STAGES)}")
    counts = {
        "prompt_length": prompt_length,
        "max_completion_length": max_completion_length,
        "rollout": rollout,
        "micro_batch_size": micro_batch_size,
        "ensemble": ensemble,
    }
    for name, value in counts.items():
        least = 0 if name == "ensemble" else 1
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not isinstance(model, PreTrainedConfig):
        if is_adapter(model):
            if lora is not None:
                raise ModelError(f"{model}: is an adapter already, and is trained on as it is; leave `lora` out")
            lora = PeftConfig.from_pretrained(str(model))
        load_in_4bit = is_4bit(model, load_in_4bit)
    if load_in_4bit and lora is None:
        raise ModelError("4-bit weights cannot be trained; pass `lora=rlhf_kit.models.lora()` to train an adapter")
    job = Job(
        config=_config(model),
        lora=lora,
        load_in_4bit=bool(load_in_4bit),
        prompt=prompt_length,
        completion=max_completion_length,
        rollout=rollout,
        micro_batch=min(micro_batch_size, rollout) if stage == "ppo" else micro_batch_size,
        checkpointing=gradient_checkpointing,
        optim=optim,
        reward_config=None if reward_model is None or _same(model, reward_model) else _config(reward_model),
        ensemble=ensemble,
        on_gpu=device().type == "cuda" if on_gpu is None else on_gpu,
    )
    limit = getattr(job.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and job.length > limit:
        raise ValueError(
            f"prompt_length={job.prompt} and max_completion_length={job.completion} exceed the model's {limit} "
            "positions; shorten the prompts or the completions"
        )
    depth = job.config.get_text_config().num_hidden_layers
    # Every layer adds the same, so two small depths tell the large one; but where all weights learn, gradients take
    # over from activations somewhere on the way down, and every layer has to be run.
    if depth > 4 and lora is not None and _uniform(job):
        two, four = (_run(stage, _cut(job, layers)) for layers in (2, 4))
        trained, phases = _extrapolate(two, four, (depth - 4) / 2)
    else:
        trained, phases = _run(stage, job)
    first = next(iter(phases.values()))
    return Estimate(
        stage,
        trained,
        {part: first[part] / GIB for part in STATIC},
        {name: {part: parts[part] / GIB for part in DYNAMIC} for name, parts in phases.items()},
    )


def _run(stage: str, job: Job) -> tuple[int, Phases]:
    widths = (job.config.get_text_config().vocab_size, TRL_TILE[1])
    with torch.device("meta"), fused_attention(job.on_gpu):
        return STAGES[stage](job, Ledger(vocab_sizes=widths, longest=job.length))


def _cut(job: Job, layers: int) -> Job:
    """The same job for a model of its first `layers` decoder layers."""
    config = deepcopy(job.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return replace(job, config=config)


def _uniform(job: Job) -> bool:
    """Whether each decoder layer has as many parameters and the same attention as the next."""
    text = job.config.get_text_config()
    if len(set(getattr(text, "layer_types", None) or [])) > 1:
        return False
    sizes = []
    for layers in (2, 4, text.num_hidden_layers):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_cut(job, layers).config)
        sizes.append(sum(p.numel() for p in model.parameters()))
    two, four, whole = sizes
    return (whole - two) * 2 == (four - two) * (text.num_hidden_layers - 2)


def _extrapolate(two: tuple[int, Phases], four: tuple[int, Phases], times: float) -> tuple[int, Phases]:
    """What two and four layers give, `times` two layers further."""
    phases = {
        name: {part: round(value + times * (value - two[1][name][part])) for part, value in parts.items()}
        for name, parts in four[1].items()
    }
    return round(four[0] + times * (four[0] - two[0])), phases


def _config(model: Shape) -> PreTrainedConfig:
    return model if isinstance(model, PreTrainedConfig) else load_config(model)


def _same(model: Shape, other: Shape) -> bool:
    """Whether two models stand on one base, which is then held once."""
    if isinstance(model, PreTrainedConfig) or isinstance(other, PreTrainedConfig):
        return model is other
    return same_base(model, other)
