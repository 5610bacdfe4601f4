"""PPO as functions of tensors: B completions of up to C tokens, a mask that is 1 on real tokens and 0 on padding."""

from collections.abc import Callable

import torch
from torch import Tensor

Summed = Callable[[Tensor], Tensor]  # sums a tensor over processes


def whiten(values: Tensor, mask: Tensor, summed: Summed) -> Tensor:
    """Values (B, C) with mean 0 and variance 1 over real tokens; padding is 0 and has no effect."""
    centred, variance = _centred(values, mask, summed)
    return centred * torch.rsqrt(variance + 1e-8)


def _centred(values: Tensor, mask: Tensor, summed: Summed) -> tuple[Tensor, Tensor]:
    """Values less their mean over real tokens, 0 on padding, and their variance."""
    count = summed(mask.sum())
    centred = (values - summed((values * mask).sum()) / count) * mask
    return centred, summed((centred**2).sum()) / count


def token_rewards(scores: Tensor, logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * log(pi / pi_ref) on each token, plus the score (B,) on the last real one: (B, C)."""
    rewards = -kl_coef * (logprobs - reference_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns (B, C): A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V_{t+1} - V_t, V_end = 0.

    Generalised advantage estimation, Schulman et al. 2015 (1506.02438), eq. 16; returns are A + V.
    """
    advantages = torch.zeros_like(rewards)
    following_advantage = following_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = (delta + gamma * gae_lambda * following_advantage) * mask[:, t]
        following_value = values[:, t] * mask[:, t]
        advantages[:, t] = following_advantage
    return advantages, (advantages + values) * mask


def policy_loss(ratio: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Clipped surrogate, negated, for each token (1707.06347, eq. 7): max(-A r, -A clip(r, 1 - c, 1 + c))."""
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error for each token, the larger of plain and clipped around the rollout's value."""
    clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, summed: Summed) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over real tokens: 1 perfect, 0 no better than a constant."""
    return 1 - _centred(returns - values, mask, summed)[1] / (_centred(returns, mask, summed)[1] + 1e-8)


def adapt_kl_coef(kl_coef: float, kl: float, target: float, completions: int, horizon: int) -> float:
    """The proportional controller of Ziegler et al. 2019 (1909.08593), section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


def partition(lengths: Tensor, num_minibatches: int, micro_batch_size: int) -> list[list[Tensor]]:
    """Row numbers in random minibatches, each sorted by length and cut into micro-batches with little padding."""
    minibatches = torch.randperm(len(lengths)).tensor_split(min(num_minibatches, len(lengths)))
    by_length = (rows[lengths[rows].argsort(descending=True, stable=True)] for rows in minibatches)
    return [list(rows.split(micro_batch_size)) for rows in by_length]
