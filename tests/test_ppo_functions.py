"""The formulas of rlhf_kit.ppo on hand numbers and against naive loops."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig

from rlhf_kit.ppo import PPOConfig
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

LENGTHS = [4, 1, 6, 3]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Random rollouts (float64) of unequal lengths, zero where there is no token."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.tensor(LENGTHS)[:, None]).double()
    names = ("rewards", "values", "logprobs", "reference")
    tensors = {name: torch.randn(4, 6, generator=generator, dtype=torch.float64) * mask for name in names}
    return tensors | {"mask": mask, "scores": torch.randn(4, generator=generator, dtype=torch.float64)}


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, written as the double sum of the paper."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 0.5)])
def test_gae_equals_the_naive_double_loop(batch: dict[str, torch.Tensor], gamma: float, lam: float) -> None:
    advantages, returns = gae(batch["rewards"], batch["values"], batch["mask"], gamma, lam)
    for row, n in enumerate(LENGTHS):
        rewards, values = batch["rewards"][row, :n].tolist(), batch["values"][row, :n].tolist()
        expected = naive_gae(rewards, values, gamma, lam)
        assert advantages[row, :n].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[row, :n].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, values, strict=True)], abs=1e-12
        )
        assert (advantages[row, n:] == 0).all() and (returns[row, n:] == 0).all()


def test_gae_by_hand() -> None:
    """Rewards 0, 1; values 0.5, 0.25; gamma = lambda = 0.5: delta = -0.375, 0.75; A = -0.375 + 0.25 * 0.75, 0.75."""
    tensors = (torch.tensor([row]) for row in ([0.0, 1.0], [0.5, 0.25], [1.0, 1.0]))
    advantages, returns = gae(*tensors, gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [[-0.1875, 0.75]] and returns.tolist() == [[0.3125, 1.0]]


def test_with_lambda_and_gamma_one_advantage_plus_value_is_the_reward_to_go(batch: dict[str, torch.Tensor]) -> None:
    advantages, returns = gae(batch["rewards"], batch["values"], batch["mask"], 1.0, 1.0)
    to_go = batch["rewards"].flip(1).cumsum(1).flip(1) * batch["mask"]
    assert torch.allclose(advantages + batch["values"], to_go, atol=1e-12) and torch.allclose(
        returns, to_go, atol=1e-12
    )


def test_extra_padding_changes_nothing(batch: dict[str, torch.Tensor]) -> None:
    padded = {name: torch.nn.functional.pad(t, (0, 3)) if t.dim() == 2 else t for name, t in batch.items()}

    def everything(b: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        rewards = token_rewards(b["scores"], b["logprobs"], b["reference"], b["mask"].long(), 0.3)
        advantages, returns = gae(rewards, b["values"], b["mask"], 0.99, 0.9)
        return [rewards, advantages, returns, whiten(advantages, b["mask"])]

    for short, long in zip(everything(batch), everything(padded), strict=True):
        assert torch.allclose(long[:, :6], short, atol=1e-14) and (long[:, 6:] == 0).all()


def test_values_behind_the_end_play_no_part(batch: dict[str, torch.Tensor]) -> None:
    garbage = batch["values"] + 1e6 * (1 - batch["mask"])
    for ours, clean in zip(
        gae(batch["rewards"], garbage, batch["mask"], 0.99, 0.9),
        gae(batch["rewards"], batch["values"], batch["mask"], 0.99, 0.9),
        strict=True,
    ):
        assert torch.equal(ours, clean)


def test_whitening_is_masked(batch: dict[str, torch.Tensor]) -> None:
    garbage = batch["values"] + 1e6 * (1 - batch["mask"])
    white = whiten(garbage, batch["mask"])
    real = white[batch["mask"].bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-9)
    assert real.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert (white[~batch["mask"].bool()] == 0).all()
    assert torch.allclose(white, whiten(batch["values"], batch["mask"]), atol=1e-9)


def test_whitening_keeps_equal_advantages_at_zero_and_finite() -> None:
    assert (whiten(torch.full((2, 2), 3.0), torch.ones(2, 2)) == 0).all()


def test_the_score_lands_on_the_last_real_token_once(batch: dict[str, torch.Tensor]) -> None:
    zeros = torch.zeros_like(batch["logprobs"])
    rewards = token_rewards(batch["scores"], zeros, zeros, batch["mask"].long(), 0.3)
    expected = zeros.clone()
    for row, n in enumerate(LENGTHS):
        expected[row, n - 1] = batch["scores"][row]
    assert torch.equal(rewards, expected)


def test_kl_is_charged_once_so_that_rewards_sum_to_score_minus_kl(batch: dict[str, torch.Tensor]) -> None:
    rewards = token_rewards(batch["scores"], batch["logprobs"], batch["reference"], batch["mask"].long(), 0.3)
    kl = (batch["logprobs"] - batch["reference"]).sum(1)
    assert torch.allclose(rewards.sum(1), batch["scores"] - 0.3 * kl, atol=1e-12)
    assert (rewards[batch["mask"] == 0] == 0).all()


def test_rewards_by_hand_and_the_sign_of_k1() -> None:
    """A token the policy likes more than the reference (0.8 against 0.5) costs kl_coef * log(1.6)."""
    logprobs, reference = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.5, 0.5]]).log()
    rewards = token_rewards(torch.tensor([2.0]), logprobs, reference, torch.ones(1, 2).long(), 0.1)
    assert rewards[0].tolist() == pytest.approx([-0.1 * math.log(1.6), 2.0 - 0.1 * math.log(0.4)], abs=1e-6)
    assert (0.8 * math.log(1.6) + 0.2 * math.log(0.4)) == pytest.approx(
        0.19274, abs=1e-5
    )  # KL(policy || reference) > 0


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),  # inside the range: plain
        (1.5, 2.0, -2.4, 0.0),  # good already and more likely: nothing more to gain
        (0.5, 2.0, -1.0, -2.0),  # good but less likely: pulled back
        (1.5, -2.0, 3.0, 2.0),  # bad but more likely: pulled back
        (0.5, -2.0, 1.6, 0.0),  # bad and less likely already: nothing more to gain
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, expected: float, slope: float) -> None:
    r = torch.tensor(ratio, requires_grad=True)
    loss = policy_loss(r, torch.tensor(advantage), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert r.grad is not None and r.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected"),
    [
        (1.1, 1.0, 2.0, 0.5 * 0.9**2),  # within 0.2 of the old value: plain
        (1.9, 1.0, 2.0, 0.5 * 0.8**2),  # moved too far towards the target: counted as 1.2
        (0.0, 1.0, 2.0, 0.5 * 2.0**2),  # moved away: the larger error counts
    ],
)
def test_the_clipped_value_loss_by_hand(value: float, old: float, target: float, expected: float) -> None:
    loss = value_loss(torch.tensor(value), torch.tensor(old), torch.tensor(target), 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 77.0], [4.0, 7.0, 5.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask).item() == pytest.approx(0, abs=1e-6)
    real = torch.tensor([1.0, 2.0, 4.0, 7.0, 5.0])
    half = explained_variance(returns / 2, returns, mask).item()
    assert half == pytest.approx(1 - ((real / 2).var() / real.var()).item(), abs=1e-6)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.1),  # on target
        (12.0, 0.1 * (1 + 0.2 * 64 / 1000)),  # far above: the error is clipped to +0.2
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_the_adaptive_kl_coefficient_by_hand(kl: float, expected: float) -> None:
    assert adapt_kl_coef(0.1, kl, target=6.0, completions=64, horizon=1000) == pytest.approx(expected, rel=1e-12)


def test_partition_covers_each_row_once_in_minibatches_of_like_length() -> None:
    lengths = torch.tensor([3, 9, 1, 7, 7, 2, 8, 5, 4, 6])
    torch.manual_seed(0)
    first, second = partition(lengths, 3, 2), partition(lengths, 3, 2)
    for minibatches in (first, second):
        assert [sum(map(len, minibatch)) for minibatch in minibatches] == [4, 3, 3]
        assert all(len(micro) <= 2 for minibatch in minibatches for micro in minibatch)
        assert sorted(row for m in minibatches for micro in m for row in micro.tolist()) == list(range(10))
        for minibatch in minibatches:
            ordered = [length for micro in minibatch for length in lengths[micro].tolist()]
            assert ordered == sorted(ordered, reverse=True)
    assert str(first) != str(second)  # another shuffle each epoch


def test_the_micro_batch_size_never_changes_which_rows_share_a_minibatch() -> None:
    lengths = torch.tensor([3, 9, 1, 7, 7, 2, 8, 5, 4, 6])
    groups = []
    for size in (1, 4, 100):
        torch.manual_seed(1)
        groups.append([sorted(row for micro in m for row in micro.tolist()) for m in partition(lengths, 3, size)])
    assert groups[0] == groups[1] == groups[2]


def test_a_batch_smaller_than_num_minibatches_still_has_a_row_in_each() -> None:
    assert [len(minibatch) for minibatch in partition(torch.tensor([3, 4]), 5, 8)] == [1, 1]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be above 0, got 0"),
        ({"max_completion_length": -1}, "max_completion_length must be above 0"),
        ({"ppo_epochs": 0}, "ppo_epochs must be above 0"),
        ({"micro_batch_size": 0}, "micro_batch_size must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"clip_range": 0.0}, "clip_range must be above 0"),
        ({"kl_horizon": 0}, "kl_horizon must be above 0"),
        ({"adaptive_kl_target": 0.0}, "adaptive_kl_target must be above 0"),
        ({"early_stop_kl": -1.0}, "early_stop_kl must be above 0"),
        ({"kl_coef": -0.1}, "kl_coef must not be negative"),
        ({"gamma": -0.1}, "gamma must lie between 0 and 1"),
        ({"gamma": 1.1}, "gamma must lie between 0 and 1"),
        ({"gae_lambda": 1.1}, "gae_lambda must lie between 0 and 1"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must not be negative"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must stay 1; set micro_batch_size"),
        ({"num_minibatches": 9, "per_device_train_batch_size": 8}, "num_minibatches=9 exceeds"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(settings: dict[str, Any], says: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=says):
        PPOConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize("lora", [{"r": 4}, LoraConfig(r=4, target_modules=["q_proj", "k_proj"])])
def test_a_config_with_lora_is_written_as_json(lora: Any, tmp_path: Any) -> None:
    args = PPOConfig(output_dir=str(tmp_path), lora=lora)
    written = json.loads(args.to_json_string())["lora"]
    assert written["r"] == 4 and args.lora is lora  # the setting itself stays as it was given
    assert isinstance(lora, dict) or written["target_modules"] == ["k_proj", "q_proj"]
