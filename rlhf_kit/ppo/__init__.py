"""PPO, the one algorithm this kit owns: `trainer` reads from top to bottom, `maths` holds its equations."""

from rlhf_kit.ppo.config import PPOConfig
from rlhf_kit.ppo.maths import (
    adapt_kl_coef,
    explained_variance,
    gae,
    partition,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from rlhf_kit.ppo.trainer import PPOTrainer, Trajectory

__all__ = [
    "PPOConfig",
    "PPOTrainer",
    "Trajectory",
    "adapt_kl_coef",
    "explained_variance",
    "gae",
    "partition",
    "policy_loss",
    "token_rewards",
    "value_loss",
    "whiten",
]
