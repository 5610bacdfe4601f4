"""The settings of PPO, each in one place with its default."""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from transformers import TrainingArguments

from rlhf_kit.models import MAX_COMPLETION_LENGTH


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of PPO; `max_steps` counts updates, `per_device_train_batch_size` counts the prompts of an update.

    temperature: of sampling and of every log-prob; missing_eos_penalty: taken off the score of a completion that did
    not end; kl_coef: weight of the KL penalty (beta in papers), kept fixed unless adaptive_kl_target (nats per
    sequence) is given, which then changes it at a speed set by kl_horizon (completions); gamma, gae_lambda: of the
    advantages; clip_range, value_clip_range: of the two losses; vf_coef, entropy_coef, ptx_coef: weights beside the
    policy loss; ppo_epochs, num_minibatches: their product is the number of optimizer steps in an update;
    micro_batch_size: completions in one forward pass (affects memory only, not the result); early_stop_kl: nats per
    token of policy change that end an update early; lora: train an adapter with these settings (a dict of LoraConfig's
    fields, or a LoraConfig); load_in_4bit, dtype, attn_implementation: as of `models.load_causal`;
    max_memory_gib: a run that is estimated to need more is refused (None: the GPU's memory; no limit on a CPU).
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
    lora: dict[str, Any] | None = None
    load_in_4bit: bool | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    max_memory_gib: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed  # otherwise each process would shuffle with a seed of its own
        sizes = ("per_device_train_batch_size", "max_completion_length", "ppo_epochs", "num_minibatches")
        positive = (*sizes, "micro_batch_size", "temperature", "kl_horizon", "clip_range", "value_clip_range")
        for name in (*positive, "adaptive_kl_target", "early_stop_kl", "max_memory_gib"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"PPOConfig: {name} must be above 0, got {value}")
        for name in ("kl_coef", "vf_coef", "entropy_coef", "ptx_coef", "missing_eos_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"PPOConfig: {name} must not be negative, got {getattr(self, name)}")
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
        settings = super().to_dict()
        if isinstance(self.lora, LoraConfig):
            settings["lora"] = {k: sorted(v) if isinstance(v, set) else v for k, v in self.lora.to_dict().items()}
        return settings
