"""The settings of PPO, each in one place with its default."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from peft import LoraConfig
from transformers import TrainingArguments

from rlhf_kit.models import MAX_COMPLETION_LENGTH

# How the names of such settings end, here and in TRL's configs.
ABOVE_ZERO = (
    *("batch_size", "length", "epochs", "minibatches", "temperature", "horizon", "clip_range", "kl_target", "stop_kl"),
    *("memory_gib", "prompts", "per_prompt", "demonstrations", "best_of", "max_steps", "save_steps", "eval_steps"),
    *("logging_steps", "accumulation_steps", "beta"),
)
NOT_NEGATIVE = ("coef", "penalty", "learning_rate", "weight_decay", "grad_norm", "seed", "warmup_steps", "beta")


def kinds_of(hint: Any) -> set[Any]:
    """The types that a declaration allows."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return {get_origin(kind) or kind for kind in kinds}


def check_settings(settings: Mapping[str, Any], hints: Mapping[str, Any], where: str, config: Any = None) -> None:
    """ValueError names a setting of another type than declared, not finite or out of range; defaults pass."""
    for name, value in settings.items():
        kinds, default = kinds_of(hints.get(name)), getattr(config, name, ...)
        if type(value) is type(default) and value == default:
            continue
        names = " or ".join(sorted("none" if kind is type(None) else str(kind.__name__) for kind in kinds if kind))
        number = isinstance(value, Real) and not isinstance(value, bool)
        may_be_zero = name == "beta" and "num_generations" in hints  # GRPO and RLOO may do without a reference
        fits = type(value) in kinds or (number and float in kinds)
        for must, wrong in (
            (f"be {names}", kinds <= {bool, int, float, dict, LoraConfig, type(None)} and not fits),
            ("be finite", number and not math.isfinite(value)),
            ("be above 0", number and name.endswith(ABOVE_ZERO) and value <= 0 and not may_be_zero),
            ("not be negative", number and name.endswith(NOT_NEGATIVE) and value < 0),
        ):
            if wrong:
                raise ValueError(f"{where}: {name} must {must}, got {value!r}")


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of PPO; `max_steps` counts updates, `per_device_train_batch_size` counts the prompts of an update.

    temperature: of sampling and of every log-prob; missing_eos_penalty: taken off the score of a completion that did
    not end; kl_coef: weight of the KL penalty (beta in papers), which adaptive_kl_target (nats per sequence) changes at
    a speed set by kl_horizon (completions); gamma, gae_lambda: of the advantages; clip_range, value_clip_range: of the
    two losses; vf_coef, entropy_coef, ptx_coef: weights beside the policy loss; ppo_epochs times num_minibatches:
    optimizer steps in an update; micro_batch_size: completions in one forward pass (no matter but of memory);
    early_stop_kl: nats per token of policy change that end an update early; lora: train an adapter with these settings
    of LoraConfig; load_in_4bit, dtype, attn_implementation: as of `models.load_causal`; max_memory_gib: a run that is
    estimated to need more is refused (None: the GPU's memory; no limit on a CPU).
    """

    per_device_train_batch_size: int = 64
    learning_rate: float = 1e-5
    adam_epsilon: float = 1e-5
    logging_steps: float = 1
    data_seed: int | None = None
    logging_nan_inf_filter: bool = False
    save_strategy: str = "no"
    disable_tqdm: bool = True
    log_level: str = "error"
    remove_unused_columns: bool = False
    dataloader_pin_memory: bool = False
    max_completion_length: int = MAX_COMPLETION_LENGTH
    temperature: float = 1.0
    missing_eos_penalty: float = 1.0
    kl_coef: float = 0.1
    adaptive_kl_target: float | None = None
    kl_horizon: int = 10_000
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    ppo_epochs: int = 4
    num_minibatches: int = 1
    micro_batch_size: int = 64
    early_stop_kl: float | None = None
    lora: dict[str, Any] | LoraConfig | None = None
    load_in_4bit: bool | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    max_memory_gib: float | None = None

    def __post_init__(self) -> None:
        check_settings(vars(self), get_type_hints(type(self)), "PPOConfig", type(self))
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed  # otherwise each process would shuffle with a seed of its own
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"PPOConfig: {name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.fp16:
            raise ValueError("PPOConfig: fp16 overflows in the probability ratio; use bf16=True, or fp32")
        if self.gradient_accumulation_steps != 1:
            raise ValueError("PPOConfig: gradient_accumulation_steps must stay 1; set micro_batch_size to save memory")
        if self.num_minibatches > self.per_device_train_batch_size:
            raise ValueError("PPOConfig: num_minibatches exceeds per_device_train_batch_size: each needs a completion")

    def to_dict(self) -> dict[str, Any]:
        """TrainingArguments.to_dict, with a LoraConfig as a dict that JSON can hold."""
        lora = self.lora.to_dict() if isinstance(self.lora, LoraConfig) else self.lora
        lora = lora and {name: sorted(value) if isinstance(value, set) else value for name, value in lora.items()}
        return super().to_dict() | {"lora": lora}
