"""The formulas and the alarms of rlhf_kit.ppo on hand numbers and against naive loops."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from transformers import TrainerState

from rlhf_kit.ppo import PPOConfig
from rlhf_kit.ppo.alarms import Alarms, check, repetition
from rlhf_kit.ppo.maths import gae, partition, policy_loss, token_rewards, value_loss, whiten

LENGTHS = [4, 1, 6, 3]
ALONE = torch.nn.Identity()  # the sum over the processes where there is one


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
    garbage = batch["values"] + 1e6 * (1 - batch["mask"])  # values behind the end play no part
    advantages, returns = gae(batch["rewards"], garbage, batch["mask"], gamma, lam)
    assert torch.allclose(returns, advantages + batch["values"], atol=1e-12)
    for row, n in enumerate(LENGTHS):
        rewards, values = batch["rewards"][row, :n].tolist(), batch["values"][row, :n].tolist()
        assert advantages[row, :n].tolist() == pytest.approx(naive_gae(rewards, values, gamma, lam), abs=1e-12)
        assert (advantages[row, n:] == 0).all() and (returns[row, n:] == 0).all()


def test_whitening_is_masked(batch: dict[str, torch.Tensor]) -> None:
    garbage = batch["values"] + 1e6 * (1 - batch["mask"])
    white = whiten(garbage, batch["mask"], ALONE)
    real = white[batch["mask"].bool()]
    assert real.mean().item() == pytest.approx(0, abs=1e-9)
    assert real.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert (white[~batch["mask"].bool()] == 0).all()
    assert torch.allclose(white, whiten(batch["values"], batch["mask"], ALONE), atol=1e-9)
    assert (whiten(torch.full((2, 2), 3.0), torch.ones(2, 2), ALONE) == 0).all()  # equal advantages: 0, not NaN


def test_the_score_lands_on_the_last_real_token_and_the_kl_is_charged_once(batch: dict[str, torch.Tensor]) -> None:
    rewards = token_rewards(batch["scores"], batch["logprobs"], batch["reference"], batch["mask"].long(), 0.3)
    bonus = rewards + 0.3 * (batch["logprobs"] - batch["reference"])  # what is paid beside the KL charge
    expected = torch.zeros_like(rewards)
    for row, n in enumerate(LENGTHS):
        expected[row, n - 1] = batch["scores"][row]
    assert torch.allclose(bonus, expected, atol=1e-12) and (rewards[batch["mask"] == 0] == 0).all()
    kl = (batch["logprobs"] - batch["reference"]).sum(1)
    assert torch.allclose(rewards.sum(1), batch["scores"] - 0.3 * kl, atol=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
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


def test_partition_covers_each_row_once_in_minibatches_of_like_length() -> None:
    lengths = torch.tensor([3, 9, 1, 7, 7, 2, 8, 5, 4, 6])
    groups = []
    for seed, size in ((0, 2), (0, 4), (0, 100), (1, 2)):
        torch.manual_seed(seed)
        minibatches = partition(lengths, 3, size)
        assert [sum(map(len, minibatch)) for minibatch in minibatches] == [4, 3, 3]
        assert all(len(micro) <= size for minibatch in minibatches for micro in minibatch)
        rows = [torch.cat(minibatch) for minibatch in minibatches]
        assert sorted(torch.cat(rows).tolist()) == list(range(10))
        assert all(lengths[each].tolist() == sorted(lengths[each].tolist(), reverse=True) for each in rows)
        groups.append([sorted(each.tolist()) for each in rows])
    assert groups[0] == groups[1] == groups[2] != groups[3]  # micro-batches never change who shares a minibatch
    assert [len(minibatch) for minibatch in partition(torch.tensor([3, 4]), 5, 8)] == [1, 1]  # fewer rows than that


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be above 0, got 0"),
        ({"adaptive_kl_target": 0.0}, "adaptive_kl_target must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite, got nan"),
        ({"vf_coef": math.inf}, "vf_coef must be finite"),
        ({"clip_range": "0.2"}, "clip_range must be float, got '0.2'"),
        ({"temperature": True}, "temperature must be float, got True"),
        ({"ppo_epochs": 1.5}, "ppo_epochs must be int"),
        ({"load_in_4bit": "no"}, "load_in_4bit must be bool or none"),
        ({"max_steps": 0}, "max_steps must be above 0"),
        ({"kl_coef": -0.1}, "kl_coef must not be negative"),
        ({"gae_lambda": 1.1}, "gae_lambda must lie between 0 and 1"),
        ({"fp16": True}, "fp16 overflows in the probability ratio"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must stay 1; set micro_batch_size"),
        ({"num_minibatches": 9, "per_device_train_batch_size": 8}, "num_minibatches exceeds"),
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


# --- alarms ----------------------------------------------------------------------------------------------------------

HEALTHY = {
    "kl": 0.5, "entropy": 1.0, "completion_length": 10.0, "repetition": 0.1, "disagreement": 0.2, "value_loss": 0.1,
    "unfinished": 0.05,
}  # fmt: skip


def test_a_healthy_run_raises_nothing() -> None:
    assert not list(check([HEALTHY] * 20))
    assert not list(check([{k: v for k, v in HEALTHY.items() if k != "disagreement"}]))
    early = [HEALTHY] * 4 + [HEALTHY | {"value_loss": 99.0}]
    assert not list(check(early)), "value loss needs a few updates to compare with"


@pytest.mark.parametrize(
    ("name", "metric", "beyond", "inside", "words"),
    [
        ("kl", "kl", 10.1, 9.9, "10.1 nats per sequence"),
        ("entropy", "entropy", 0.29, 0.31, "from 1.00 to 0.29"),
        ("length", "completion_length", 20.1, 19.9, "from 10 to 20"),
        ("length", "completion_length", 4.9, 5.1, "from 10 to 5"),
        ("repetition", "repetition", 0.36, 0.34, "36% of completions"),
        ("disagreement", "disagreement", 0.41, 0.39, "from 0.20 to 0.41"),
        ("value_loss", "value_loss", 1.01, 0.99, "was 0.1"),
        ("unfinished", "unfinished", 0.31, 0.29, "31% of completions"),
    ],
)
def test_each_alarm_goes_off_beyond_its_limit(name: str, metric: str, beyond: float, inside: float, words: str) -> None:
    [(found, message, _)] = check([HEALTHY] * 6 + [HEALTHY | {metric: beyond}])
    assert found == name and words in message and ": " in message  # what is seen, then what to try
    assert not list(check([HEALTHY] * 6 + [HEALTHY | {metric: inside}]))


@pytest.mark.parametrize(
    ("text", "share"), [("", 0), ("a b c d", 0), ("a b c a b c", 0.5), ("a a a a a", 1), ("x a b c a b c y", 2 / 6)]
)
def test_repetition_is_the_share_of_runs_of_three_words_that_occur_again(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(("length", "worst"), [(99.0, "a long one"), (1.0, "short")])
def test_an_alarm_shows_its_worst_samples_every_ten_updates(length: float, worst: str, capsys: Any) -> None:
    samples = {"prompt": ["?"] * 4, "completion": ["short", "a b", "a b c", "a long one"], "n_tokens": [1, 2, 3, 4]}
    alarms, state = Alarms(lambda: pd.DataFrame(samples)), TrainerState()
    for state.global_step in range(1, 24):
        changed = {"completion_length": length} if state.global_step > 1 else {}
        state.log_history.append(HEALTHY | changed | {"loss": 0.0})
        alarms.on_loss(state, {})
    assert [row["step"] for row in state.log_history if row.get("alarm") == "length"] == [2, 12, 22]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 * 4 and worst in said[1]  # each with three samples
