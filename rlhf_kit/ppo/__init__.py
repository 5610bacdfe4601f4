"""PPO, the one algorithm that this kit owns: `trainer` reads from top to bottom, `maths` holds its equations."""
# ruff: noqa: F401 (these imports are what this room offers)

from rlhf_kit.ppo.config import PPOConfig
from rlhf_kit.ppo.maths import gae, policy_loss, token_rewards
from rlhf_kit.ppo.trainer import PPOTrainer, Trajectory
