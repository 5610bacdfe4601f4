"""The settings of PPO, each in one place with its default."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """Settings of PPO; `max_steps` counts updates and `per_device_train_batch_size` the prompts rolled out in each.

    kl_coef: weight of the KL penalty (beta in papers); adaptive_kl_target: nats per sequence to steer it to (None:
    it is fixed); kl_horizon: completions over which the steering acts; temperature: of sampling and of every log-prob;
    missing_eos_penalty: taken off the score of a completion that never ended; gamma, gae_lambda: of the advantages;
    clip_range, value_clip_range: of the two losses; vf_coef, entropy_coef, ptx_coef: weights beside the policy loss;
    ppo_epochs, num_minibatches: optimizer steps per update are their product; micro_batch_size: completions in one
    forward pass (memory only, never the result); early_stop_kl: nats per token of policy change
    that end an update early; max_memory_gib: a run that is estimated to need more is refused (None: the GPU's memory;
    no limit on a CPU).
    """

    per_device_train_batch_size: int = 64
    learning_rate: float = 1e-5
    adam_epsilon: float = 1e-5
    logging_steps: float = 1
    data_seed: int | None = None
    logging_nan_inf_filter: bool = False
    save_strategy: str = "no"
    report_to: str = "none"
    disable_tqdm: bool = True
    log_level: str = "error"
    remove_unused_columns: bool = False
    max_completion_length: int = 64
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
    load_in_4bit: bool | None = None
    max_memory_gib: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_seed is None:
            self.data_seed = self.seed  # else each process would shuffle by a seed of its own
        positive = (
            "per_device_train_batch_size",
            "max_completion_length",
            "ppo_epochs",
            "num_minibatches",
            "micro_batch_size",
        )
        optional = tuple(
            name
            for name in ("adaptive_kl_target", "early_stop_kl", "max_memory_gib")
            if getattr(self, name) is not None
        )
        for name in (*positive, *optional, "temperature", "kl_horizon", "clip_range", "value_clip_range"):
            if getattr(self, name) <= 0:
                raise ValueError(f"PPOConfig: {name} must be above 0, got {getattr(self, name)}")
        for name in ("kl_coef", "vf_coef", "entropy_coef", "ptx_coef", "missing_eos_penalty"):
            if getattr(self, name) < 0:
                raise ValueError(f"PPOConfig: {name} must not be negative, got {getattr(self, name)}")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"PPOConfig: {name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.fp16:
            raise ValueError("PPOConfig: fp16 overflows in the ratio of a policy; use bf16=True, or fp32")
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                "PPOConfig: gradient_accumulation_steps must stay 1; micro_batch_size is what saves memory here"
            )
        if self.num_minibatches > self.per_device_train_batch_size:
            raise ValueError(
                f"PPOConfig: num_minibatches={self.num_minibatches} exceeds per_device_train_batch_size="
                f"{self.per_device_train_batch_size}; a minibatch needs a completion"
            )
