"""PPO and DPO against the exact optimum of their objective, enumerated: pi*(y) = pi_ref(y) exp(r(y) / beta) / Z.

One- and two-token completions over twelve tokens, so that every completion can be written down.
"""

from __future__ import annotations

import math
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import WORDS, layout, naive_logprobs, word_tokenizer

from rlhf_kit import models, train
from rlhf_kit.ppo import PPOConfig, PPOTrainer, Trajectory, gae, policy_loss, token_rewards

Zoo = dict[str, str]
EOS, V = 0, 12
BETA = 0.5
# exp(r) of each word: small whole numbers, so that a Bradley-Terry rater's odds w_i : w_j are a finite data set.
ODDS = {word: odds for word, odds in zip(WORDS, [2, 3, 4, 1, 3, 4, 1, 2, 1, 3], strict=True)}
TOKENIZER = word_tokenizer()
PROMPTS = ["a c", "b", "a d e"]
# KL in nats between what was reached and the optimum. N samples pin a distribution over K outcomes down to about
# (K - 1) / 2N nats: with K = 133 completions and the N > 15,000 of PPO's last forty updates 0.005 (with K = 12 and its
# last twelve 0.004, over three prompts); the rest is slack.
BOUND = 0.02


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Sum over the words of log odds; the empty completion gives 0."""
    return [sum_of_log_odds(completion) for completion in completions]


@cache
def sum_of_log_odds(text: str) -> float:
    return sum(math.log(ODDS[WORDS[token - 2]]) for token in TOKENIZER(text)["input_ids"])


def completions_of(length: int) -> list[list[int]]:
    """Every completion of up to `length` tokens as it can be sampled: ended by EOS or cut."""
    if length == 1:
        return [[token] for token in range(V)]
    return [[EOS]] + [[token, *rest] for token in range(V) if token != EOS for rest in completions_of(length - 1)]


def log_distribution(model: torch.nn.Module, prompt: str, completions: list[list[int]]) -> torch.Tensor:
    """log pi(y | prompt) of every completion, from the model's own logits."""
    ids = TOKENIZER(prompt)["input_ids"]
    return torch.stack([naive_logprobs(model, ids, completion).double().sum() for completion in completions])


def text_of(completion: list[int]) -> str:
    return "".join(WORDS[token - 2] for token in completion if token > 1)


def assert_optimal(trained: torch.nn.Module, path: str, prompts: list[str], completions: list[list[int]]) -> None:
    """KL(pi || pi*) among these completions is below BOUND for each prompt, and KL(pi_ref || pi*) was far above."""
    reference = models.load_causal(path).eval()
    rewards = torch.tensor(reward([], [text_of(y) for y in completions]), dtype=torch.float64)
    for prompt in prompts:
        log_ref, log_pi = (log_distribution(each, prompt, completions).log_softmax(0) for each in (reference, trained))
        log_star = (log_ref + rewards / BETA).log_softmax(0)
        reached, start = ((log_p.exp() * (log_p - log_star)).sum().item() for log_p in (log_pi, log_ref))
        assert reached < BOUND and start > 10 * BOUND


@pytest.mark.slow
@pytest.mark.parametrize(("length", "updates", "fresh_adapter"), [(1, 25, False), (1, 25, True), (2, 80, False)])
def test_ppo_reaches_the_optimum(zoo: Zoo, length: int, updates: int, fresh_adapter: bool, tmp_path: Path) -> None:
    """Three prompts with one token, and one prompt with two."""
    prompts = PROMPTS if length == 1 else PROMPTS[:1]
    settings: dict[str, Any] = {"per_device_train_batch_size": 384, "micro_batch_size": 384, "ppo_epochs": 2}
    settings |= {"max_steps": updates, "max_completion_length": length, "learning_rate": 1e-2, "vf_coef": 1.0}
    settings |= {"kl_coef": BETA, "missing_eos_penalty": 0.0, "lora": {"r": 16} if fresh_adapter else None}
    args = PPOConfig(output_dir=str(tmp_path), **settings)
    dataset = Dataset.from_dict({"prompt": prompts * (384 // len(prompts))})
    trainer = PPOTrainer(zoo["words"], reward, args, dataset, callbacks=[])
    trainer.train()
    assert_optimal(trainer.roles.use("policy").eval(), zoo["words"], prompts, completions_of(length))


@pytest.mark.slow
def test_dpo_on_infinite_noise_free_preferences_reaches_the_enumerated_optimum(zoo: Zoo, tmp_path: Path) -> None:
    """Each pair of words in both orders, odds_i times and odds_j times: the expectation over a Bradley-Terry rater.

    DPO leaves the mass outside its completions free (one word and EOS), so the optimum is that among them.
    """
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt in PROMPTS
        for chosen, rejected in permutations(WORDS[2:], 2)  # "a" and "b" would not be words after a prompt
        for _ in range(ODDS[chosen])
    ]
    settings = {"max_steps": 30, "per_device_train_batch_size": len(rows), "learning_rate": 1e-2, "max_length": 16}
    out = train.dpo(zoo["words"], Dataset.from_list(rows), tmp_path / "dpo", beta=BETA, callbacks=[], **settings)
    trained, support = models.load_causal(out).eval(), [[token, EOS] for token in range(4, V)]
    assert_optimal(trained, zoo["words"], PROMPTS, support)


# --- the gradient ----------------------------------------------------------------------------------------------------


def objective(logprobs: torch.Tensor, reference: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """J = sum_y pi(y) (r(y) - beta log(pi(y) / pi_ref(y))) from log-probs (N,) of every completion."""
    return (logprobs.exp() * (rewards - BETA * (logprobs - reference))).sum()


@pytest.mark.parametrize("with_values", [False, True])
def test_the_surrogates_gradient_at_ratio_one_is_the_true_gradient(with_values: bool) -> None:
    """In float64, for a free table of logits over two tokens, with any baseline that knows only the prefix."""
    torch.manual_seed(0)
    completions = completions_of(2)
    first = torch.randn(V, dtype=torch.float64, requires_grad=True)
    second = torch.randn(V, V, dtype=torch.float64, requires_grad=True)
    other_first, other_second = torch.randn(V, dtype=torch.float64), torch.randn(V, V, dtype=torch.float64)
    ids = torch.tensor([[*y, 0][:2] for y in completions])
    mask = torch.tensor([[1, 0] if y == [EOS] else [1, 1] for y in completions])
    rewards = torch.randn(len(completions), dtype=torch.float64)

    def per_token(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        a = one.log_softmax(0)[ids[:, 0]]
        b = two.log_softmax(1)[ids[:, 0], ids[:, 1]]
        return torch.stack([a, b], 1) * mask

    reference = per_token(other_first, other_second)
    true = torch.autograd.grad(objective(per_token(first, second).sum(1), reference.sum(1), rewards), (first, second))

    logprobs = per_token(first, second)
    old = logprobs.detach()
    prefix_values = torch.randn(1 + V, dtype=torch.float64) * with_values
    values = torch.stack([prefix_values[:1].expand(len(ids)), prefix_values[1 + ids[:, 0]]], 1) * mask
    advantages, _ = gae(token_rewards(rewards, old, reference, mask, BETA), values, mask, 1.0, 1.0)
    losses = (policy_loss((logprobs - old).exp(), advantages, 0.2) * mask).sum(1)
    surrogate = torch.autograd.grad((old.sum(1).exp() * losses).sum(), (first, second))
    for ours, expected in zip(surrogate, true, strict=True):
        assert expected.abs().max() > 0.05
        assert torch.allclose(-ours, expected, atol=1e-12)


@pytest.mark.parametrize("fresh_adapter", [False, True])
def test_the_trainers_gradient_is_the_true_gradient(zoo: Zoo, fresh_adapter: bool, tmp_path: Path) -> None:
    """Every completion of two tokens as one minibatch, each advantage weighted by pi(y), through PPOTrainer's own loss.

    The model's log-probs are in float32: agreement to 1e-5 of the largest gradient.
    """
    prompt = TOKENIZER("a c")["input_ids"]
    completions = completions_of(2)
    lora, other = ({"r": 4}, None) if fresh_adapter else (None, zoo["words-other"])
    args = PPOConfig(output_dir=str(tmp_path), vf_coef=0.0, max_completion_length=2, lora=lora)
    prompts = Dataset.from_dict({"prompt": ["a c"]})
    trainer = PPOTrainer(zoo["words"], reward, args, prompts, ref_model=other, callbacks=[])
    for name, parameter in trainer.roles.trainable_parameters():
        if "lora_B" in name and name.startswith("policy"):
            torch.nn.init.normal_(parameter, std=0.3)
    roles = trainer.roles.eval()
    tokens = layout([(prompt, y) for y in completions], 1, [EOS])
    rewards = torch.tensor(reward([], [text_of(y) for y in completions]))
    mask = tokens.completion_mask

    with torch.no_grad():
        reference, _ = models.completion_logprobs(roles.use("reference"), tokens)
    policy = roles.use("policy")
    logits = policy(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False).logits
    table = logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, tokens.completion_ids[..., None])[..., 0] * mask
    objective(table.sum(1), reference.sum(1), rewards).backward()
    expected = {name: p.grad.clone() for name, p in roles.trainable_parameters() if p.grad is not None}
    roles.zero_grad(set_to_none=True)

    old = table.detach()
    assert old.sum(1).exp().sum().item() == pytest.approx(1, abs=1e-5)
    values = torch.zeros_like(old)
    advantages, returns = gae(token_rewards(rewards, old, reference, mask, BETA), values, mask, 1.0, 1.0)
    weighted = advantages * old.sum(1, keepdim=True).exp() * mask.sum()  # undo the mean over tokens
    trajectory = Trajectory(tokens, old, reference, values, rewards, weighted, returns)
    trainer.accumulate_gradient(trajectory, [torch.arange(len(completions))])
    ours = {name: p.grad for name, p in roles.trainable_parameters() if name in expected}
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert largest > 0.01 and expected
    for name, gradient in expected.items():
        assert torch.allclose(-ours[name], gradient, atol=1e-5 * largest.item()), name
