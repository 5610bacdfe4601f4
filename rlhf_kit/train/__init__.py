"""Every way to train but PPO: thin over TRL's trainers, and every contact with TRL is in this folder.

Each function takes a model directory or hub id and a dataset in TRL's columns, writes a model directory and returns its
path. Settings not named here go to the trainer's config by its own names (`max_steps`, `learning_rate`, ...).
"""

from __future__ import annotations

import os

# TRL reports every trainer to the hub unless told otherwise; a research kit should not.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from trl import DPOConfig, RewardConfig, SFTConfig  # noqa: E402

from rlhf_kit.train.common import history  # noqa: E402
from rlhf_kit.train.offline import dpo, kto, sft  # noqa: E402
from rlhf_kit.train.online import grpo, rejection_sampling, rloo  # noqa: E402
from rlhf_kit.train.pretrain import pretrain, train_tokenizer  # noqa: E402
from rlhf_kit.train.reward import reward_model  # noqa: E402

__all__ = ["DPOConfig", "RewardConfig", "SFTConfig", "history", "pretrain", "train_tokenizer"]
__all__ += ["dpo", "grpo", "kto", "rejection_sampling", "reward_model", "rloo", "sft"]
