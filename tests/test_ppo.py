"""rlhf_kit.ppo.PPOTrainer: what a trustworthy PPO proves, in full fine-tuning, LoRA and 4-bit + LoRA."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import in_a_new_process, layout, naive_logits, naive_logprobs, save_reward, word_tokenizer
from transformers import TrainerCallback

from rlhf_kit import models
from rlhf_kit.ppo import PPOConfig, PPOTrainer, Trajectory
from rlhf_kit.rewards import RewardModel

Zoo = dict[str, str]
EOS = 0
CLOSE = 2e-5  # see test_models.py
PROMPTS = [
    "where does the otter live ?",
    "why ?",
    "what food does the owl like ?",
    "in short , where does the falcon live ?",
    "owl<|endoftext|>where does it live ?",  # an EOS inside a prompt
    "the otter ?",
    "when does the owl wake ?",
    "does the falcon like to eat leaves ?",
]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward of text or chat completions that no two of them are likely to share."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(text.count(vowel) for vowel in "aeiou") / (1 + len(text)) * 4 - 1 for text in texts]


def make(
    zoo: Zoo, mode: str, out: Path, reward: Any = vowels, prompts: list[Any] = PROMPTS, **settings: Any
) -> PPOTrainer:
    """A trainer with values that are not zero; settings of PPOConfig and of PPOTrainer by their names."""
    names = ("eval_dataset", "ref_model", "value_model", "processing_class", "callbacks", "ptx_dataset")
    trainer = {"value_model": zoo.get(f"{mode}-reward"), "callbacks": []} | {
        n: settings.pop(n) for n in names if n in settings
    }
    kind = settings.pop("kind", PPOTrainer)
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_minibatches": 2,
        "ppo_epochs": 2,
        "micro_batch_size": 3,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
    }
    args = PPOConfig(output_dir=str(out), **defaults | settings)
    dataset = Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))})
    return kind(zoo[mode], reward, args, dataset, **trainer)


def rows_of(prompts: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "number": number} for number, prompt in enumerate(prompts)]


def rolled_out(trainer: PPOTrainer, seed: int = 0) -> tuple[Trajectory, list[list[torch.Tensor]], dict[str, float]]:
    """One scored batch of all the prompts, and the minibatches it was scored in."""
    torch.manual_seed(seed)
    trainer.roles.eval()
    rows = rows_of(trainer.train_dataset["prompt"][:])
    tokens = trainer.rollout(rows)
    minibatches = trainer.partition(tokens)
    trajectory, metrics = trainer.make_trajectory(rows, tokens, minibatches)
    return trajectory, minibatches, metrics


def pairs_of(tokens: models.Tokens) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) ids of each row, read off the masks."""
    width = tokens.completion_mask.shape[1]
    return [
        (ids[:-width][attention[:-width].bool()].tolist(), ids[-width:][mask.bool()].tolist())
        for ids, attention, mask in zip(*tokens, strict=True)
    ]


def gradients(trainer: PPOTrainer, trajectory: Trajectory, minibatch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    trainer.roles.zero_grad(set_to_none=True)
    trainer.accumulate_gradient(trajectory, minibatch)
    return {name: p.grad.clone() for name, p in trainer.roles.trainable_parameters() if p.grad is not None}


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.roles.trainable_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[name], b[name]) for name in a)


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float) -> None:
    """Within `relative` of each tensor's largest entry; fp32 leaves 1e-6 of the largest of all where terms cancel."""
    assert a.keys() == b.keys() and a
    floor = 1e-6 * max(tensor.abs().max().item() for tensor in a.values())
    for name in a:
        assert (a[name] - b[name]).abs().max() <= relative * a[name].abs().max() + floor, name


def updates(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss" in row]


class Steps(TrainerCallback):
    """Counts the optimizer steps that change something, with the gradient norm each was given."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.norms: list[float] = []
        optimizer.optimizer.register_step_pre_hook(self.record)

    def record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
        if squares:
            self.norms.append(float(torch.stack(squares).sum().sqrt()))


class Recording(PPOTrainer):
    """Keeps the statistics of every minibatch."""

    def accumulate_gradient(self, trajectory: Trajectory, minibatch: list[torch.Tensor]) -> torch.Tensor:
        statistics = super().accumulate_gradient(trajectory, minibatch)
        self.statistics = [*getattr(self, "statistics", []), statistics]
        return statistics


# --- log-probs and ratios --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_ratio_is_one_on_every_token_of_the_first_minibatch(
    zoo: Zoo, mode: str, checkpointing: bool, tmp_path: Path
) -> None:
    trainer = make(zoo, mode, tmp_path, gradient_checkpointing=checkpointing, temperature=0.8)
    trainer.train()
    assert [row["first_ratio_deviation"] < 1e-6 for row in updates(trainer)] == [True, True]
    assert all(row["approx_kl"] > 1e-8 for row in updates(trainer))  # and it moves after that


def test_rollout_logprobs_and_values_equal_the_naive_loop(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, ref_model=zoo[f"{mode}-other"], temperature=0.8)
    trajectory, _, _ = rolled_out(trainer)
    policy, reference = (models.load_causal(zoo[name]).eval() for name in (mode, f"{mode}-other"))
    for row, (prompt, completion) in enumerate(pairs_of(trajectory.tokens)):
        assert prompt == trainer.processing_class(PROMPTS[row])["input_ids"]
        n = len(completion)
        for ours, model in ((trajectory.logprobs, policy), (trajectory.reference_logprobs, reference)):
            assert torch.allclose(ours[row, :n], naive_logprobs(model, prompt, completion, 0.8), atol=CLOSE)
            assert (ours[row, n:] == 0).all()
        assert (trajectory.values[row, n:] == 0).all()


def test_with_learning_rate_zero_the_ratio_stays_one_in_all_epochs(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, learning_rate=0.0, ppo_epochs=3, kind=Recording)
    before = weights(trainer)
    trainer.train()
    assert len(trainer.statistics) == 2 * 3 * 2  # type: ignore[attr-defined]
    for _, _, _, approx_kl, clip_fraction, deviation in trainer.statistics:  # type: ignore[attr-defined]
        assert deviation < CLOSE and abs(approx_kl) < 1e-9 and clip_fraction == 0
    assert same(before, weights(trainer))


@pytest.mark.parametrize(
    ("mode", "fresh_adapter"), [("full", False), ("lora", False), ("4bit", False), ("lora", True), ("4bit", True)]
)
def test_policy_equal_to_reference_gives_a_kl_of_exactly_zero(
    zoo: Zoo, mode: str, fresh_adapter: bool, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {}
    if fresh_adapter:
        extra = {"lora": {"r": 4}, "load_in_4bit": mode == "4bit", "value_model": None}
    trainer = make(zoo, "full" if fresh_adapter else mode, tmp_path, **extra)
    trajectory, _, metrics = rolled_out(trainer)
    assert torch.equal(trajectory.logprobs, trajectory.reference_logprobs) and trajectory.logprobs.abs().max() > 1
    assert metrics["kl"] == 0.0
    trainer.train()
    first, second = updates(trainer)
    assert first["kl"] == 0.0 and second["kl"] != 0.0


@pytest.mark.slow
def test_checkpointing_gives_the_same_run(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    runs = []
    for checkpointing in (False, True):
        trainer = make(zoo, mode, tmp_path, gradient_checkpointing=checkpointing, entropy_coef=0.01)
        trainer.train()
        runs.append(weights(trainer))
        recomputing = [m for m in trainer.roles.modules() if getattr(m, "gradient_checkpointing", False)]
        assert bool(recomputing) == checkpointing
    close(*runs, relative=1e-5)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_tokens_after_eos_get_no_gradient(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    """Whatever stands behind an EOS: gradients and statistics are equal to the last bit."""
    trainer = make(zoo, mode, tmp_path, entropy_coef=0.1)
    trajectory, minibatches, _ = rolled_out(trainer)
    garbage = trajectory.tokens.input_ids.clone()
    behind = trajectory.tokens.completion_mask == 0
    assert behind.any()
    garbage[:, -behind.shape[1] :][behind] = 444
    other = trajectory._replace(tokens=trajectory.tokens._replace(input_ids=garbage))
    for minibatch in minibatches:
        assert same(gradients(trainer, trajectory, minibatch), gradients(trainer, other, minibatch))


def test_an_empty_completion_is_valid(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, gamma=1.0, gae_lambda=1.0, kl_coef=0.2, ref_model=zoo[f"{mode}-other"])
    tokens = layout([([300, 301], [EOS]), ([302], [303, 304, EOS]), ([305], [EOS])], 1, [EOS])
    trajectory, metrics = trainer.make_trajectory(rows_of(PROMPTS[:3]), tokens, [[torch.arange(3)]])
    assert trajectory.tokens.completion_mask.sum(1).tolist() == [1, 3, 1] and metrics["unfinished"] == 0
    expected = trajectory.scores[0] - 0.2 * (trajectory.logprobs[0, 0] - trajectory.reference_logprobs[0, 0])
    assert trajectory.returns[0].tolist() == pytest.approx([expected.item(), 0, 0], abs=1e-6)
    gradient = gradients(trainer, trajectory, [torch.tensor([0, 2])])
    assert gradient and all(g.isfinite().all() for g in gradient.values())


def test_an_eos_inside_the_prompt_stays_attended(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trajectory, _, _ = rolled_out(make(zoo, mode, tmp_path))
    prompt, _ = pairs_of(trajectory.tokens)[4]
    assert EOS in prompt and prompt[0] != EOS
    # Its log-probs are those of the whole prompt: test_rollout_logprobs_and_values_equal_the_naive_loop.


def test_rewards_sum_to_score_minus_kl_and_the_penalty_falls_exactly_on_unfinished_rows(
    zoo: Zoo, mode: str, tmp_path: Path
) -> None:
    """With gamma = lambda = 1 the first return is the sum of the rewards."""
    options = {"gamma": 1.0, "gae_lambda": 1.0, "kl_coef": 0.3, "missing_eos_penalty": 2.5}
    trainer = make(zoo, mode, tmp_path, prompts=PROMPTS * 3, ref_model=zoo[f"{mode}-other"], **options)
    trajectory, _, metrics = rolled_out(trainer)
    texts, ends = [], []
    for _, completion in pairs_of(trajectory.tokens):
        assert EOS not in completion[:-1]
        ends.append(completion[-1] == EOS)
        texts.append(trainer.processing_class.decode([token for token in completion if token > 1]))
    assert True in ends and False in ends
    expected = torch.tensor(vowels([], texts)) - 2.5 * ~torch.tensor(ends)
    assert torch.allclose(trajectory.scores, expected, atol=1e-6)
    kl = (trajectory.logprobs - trajectory.reference_logprobs).sum(1)
    assert torch.allclose(trajectory.returns[:, 0], expected - 0.3 * kl, atol=1e-5)
    assert metrics["unfinished"] == pytest.approx(1 - sum(ends) / len(ends))


def test_pad_equal_to_eos_and_several_stop_tokens(zoo: Zoo, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(zoo["words"])
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make(zoo, "words", tmp_path, prompts=["a c", "b d e", "a"] * 8, processing_class=tokenizer)
    trainer.stop_ids = [EOS, 10]
    trainer.policy.generation_config.eos_token_id = [EOS, 10]
    trajectory, minibatches, metrics = rolled_out(trainer)
    completions = [completion for _, completion in pairs_of(trajectory.tokens)]
    assert {completion[-1] for completion in completions} >= {EOS, 10}
    assert all(not {EOS, 10} & set(completion[:-1]) for completion in completions)
    unfinished = [completion[-1] not in (EOS, 10) for completion in completions]
    assert all(len(completion) == 6 for completion, open_ in zip(completions, unfinished, strict=True) if open_)
    assert metrics["unfinished"] == pytest.approx(sum(unfinished) / len(unfinished))
    # The EOS itself is trained although it is the pad token: its log-prob moves with the gradient.
    ended = next(row for row, completion in enumerate(completions) if completion[-1] == EOS)
    last = len(completions[ended]) - 1
    only = torch.zeros_like(trajectory.advantages)
    only[ended, last] = 1.0
    gradient = gradients(trainer, trajectory._replace(advantages=only), [torch.tensor([ended])])
    assert gradient["policy.lm_head.weight"][EOS].abs().max() > 0


# --- the loss --------------------------------------------------------------------------------------------------------


def test_losses_and_approximate_kl_on_hand_numbers(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    """Every ratio 2 or 1/2, every value one below its return: k3 = r - 1 - log r, clip fraction 1, losses by hand."""
    trainer = make(zoo, mode, tmp_path)
    trajectory, minibatches, _ = rolled_out(trainer)
    mask = trajectory.tokens.completion_mask
    one = trajectory._replace(advantages=mask.float(), returns=(trajectory.values + 1) * mask)
    for ratio, advantage, expected in ((2.0, 1.0, -1.2), (2.0, -1.0, 2.0), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)):
        old = (trajectory.logprobs - math.log(ratio)) * mask
        t = one._replace(logprobs=old, advantages=advantage * one.advantages)
        loss, policy, value, approx_kl, clipped, deviation = trainer.accumulate_gradient(t, minibatches[0]).tolist()
        assert policy == pytest.approx(expected, abs=1e-4) and value == pytest.approx(0.5, abs=1e-4)
        assert loss == pytest.approx(expected + 0.1 * 0.5, abs=1e-4)
        assert approx_kl == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-4) and clipped == pytest.approx(
            1, abs=1e-6
        )
        assert deviation == pytest.approx(abs(ratio - 1), abs=1e-4)


def test_approximate_kl_is_never_negative(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path)
    trajectory, minibatches, _ = rolled_out(trainer)
    mask = trajectory.tokens.completion_mask
    for scale in (1e-4, 1e-2, 1.0):
        moved = trajectory._replace(logprobs=(trajectory.logprobs + scale * torch.randn(mask.shape)) * mask)
        assert trainer.accumulate_gradient(moved, minibatches[0])[3] > 0


def test_loss_and_gradient_do_not_depend_on_the_micro_batch_size(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, entropy_coef=0.05)
    trajectory, _, _ = rolled_out(trainer)
    lengths = trajectory.tokens.completion_mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    rows = torch.tensor([5, 0, 7, 2, 3])
    assert len(set(lengths[rows].tolist())) > 1
    results = [
        (gradients(trainer, trajectory, cut), trainer.accumulate_gradient(trajectory, cut))
        for cut in ([rows], list(rows.split(1)), list(rows.split(2)), [rows[:4], rows[4:]])
    ]
    for gradient, statistics in results[1:]:
        close(results[0][0], gradient, relative=2e-5)
        assert torch.allclose(statistics[:5], results[0][1][:5], atol=1e-6)


def test_extra_padding_changes_no_statistic_and_no_gradient(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, ref_model=zoo[f"{mode}-other"], entropy_coef=0.05)
    narrow, _, metrics = rolled_out(trainer)
    wide_tokens = layout(pairs_of(narrow.tokens), pad=1, stops=[EOS], left=4, right=5)
    everything = [torch.arange(8)]
    wide, wide_metrics = trainer.make_trajectory(rows_of(PROMPTS), wide_tokens, [everything])
    assert wide_metrics == pytest.approx(metrics, abs=1e-5)
    close(gradients(trainer, narrow, everything), gradients(trainer, wide, everything), relative=1e-4)
    a, b = (trainer.accumulate_gradient(t, everything)[:5] for t in (narrow, wide))
    assert torch.allclose(a, b, atol=1e-5)


def test_all_reported_means_are_masked(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    """Against loops over the real tokens of each row."""
    trainer = make(zoo, mode, tmp_path, ref_model=zoo[f"{mode}-other"], kl_coef=0.2, missing_eos_penalty=0.5)
    trajectory, _, metrics = rolled_out(trainer)
    policy, reference = (models.load_causal(zoo[name]).eval() for name in (mode, f"{mode}-other"))
    kls, entropies, lengths, open_, rewards = [], [], [], [], []
    for prompt, completion in pairs_of(trajectory.tokens):
        difference = naive_logprobs(policy, prompt, completion) - naive_logprobs(reference, prompt, completion)
        kls.append(difference.sum().item())
        p = naive_logits(policy, prompt, completion).softmax(-1)
        entropies += (-(p * p.log()).sum(-1)).tolist()
        lengths.append(len(completion))
        open_.append(float(completion[-1] != EOS))
        rewards += vowels([], [trainer.processing_class.decode([token for token in completion if token > 1])])
    expected = {
        "reward": sum(rewards) / 8,
        "kl": sum(kls) / 8,
        "objective": sum(r - 0.5 * o - 0.2 * k for r, o, k in zip(rewards, open_, kls, strict=True)) / 8,
        "entropy": sum(entropies) / len(entropies),
        "completion_length": sum(lengths) / 8,
        "unfinished": sum(open_) / 8,
        "kl_coef": 0.2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    real = [
        (v, r)
        for row, n in enumerate(lengths)
        for v, r in zip(trajectory.values[row, :n], trajectory.returns[row, :n], strict=True)
    ]
    values, returns = (torch.stack(column) for column in zip(*real, strict=True))
    assert metrics["explained_variance"] == pytest.approx(
        (1 - (returns - values).var() / returns.var()).item(), abs=1e-4
    )


def test_the_entropy_bonus_is_the_gradient_of_the_mean_token_entropy(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, entropy_coef=0.7, vf_coef=0.0)
    trajectory, minibatches, _ = rolled_out(trainer)
    flat = trajectory._replace(advantages=torch.zeros_like(trajectory.advantages))
    minibatch = minibatches[0]
    ours = gradients(trainer, flat, minibatch)
    alone = models.load_causal(zoo["full"], trainable=True).eval()
    total, count = torch.zeros(()), 0
    for row in torch.cat(minibatch).tolist():
        prompt, completion = pairs_of(trajectory.tokens)[row]
        logits = alone(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        p = logits.softmax(-1)
        total, count = total - (p * p.log()).sum(), count + len(completion)
    (-0.7 * total / count).backward()
    expected = {f"policy.{name}": p.grad for name, p in alone.named_parameters() if p.grad is not None}
    close(expected, {name: g for name, g in ours.items() if name in expected}, relative=1e-4)


# --- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "minibatches", "micro"), [(1, 1, 8), (2, 3, 1), (3, 2, 64)])
def test_optimizer_steps_are_updates_times_epochs_times_minibatches(
    zoo: Zoo, tmp_path: Path, epochs: int, minibatches: int, micro: int
) -> None:
    steps = Steps()
    sizes = {"ppo_epochs": epochs, "num_minibatches": minibatches, "micro_batch_size": micro, "max_steps": 3}
    trainer = make(zoo, "full", tmp_path, callbacks=[steps], **sizes)
    trainer.train()
    assert len(steps.norms) == 3 * epochs * minibatches
    assert [row["minibatches"] for row in updates(trainer)] == [epochs * minibatches] * 3
    assert trainer.state.global_step == 3


@pytest.mark.slow
def test_the_gradient_norm_is_clipped_in_every_step(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    free, clipped = Steps(), Steps()
    make(zoo, mode, tmp_path, callbacks=[free], max_grad_norm=1e9).train()
    make(zoo, mode, tmp_path, callbacks=[clipped], max_grad_norm=0.05).train()
    assert len(free.norms) == len(clipped.norms) == 8
    assert min(free.norms) > 0.1
    assert clipped.norms == pytest.approx([0.05] * 8, rel=1e-3)


@pytest.mark.parametrize("checkpointing", ["off", "reentrant", "not reentrant"])
def test_every_trainable_parameter_moves_and_every_frozen_one_is_bit_identical(
    zoo: Zoo, mode: str, checkpointing: str, tmp_path: Path
) -> None:
    way = {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"}}
    trainer = make(zoo, mode, tmp_path, gradient_checkpointing=checkpointing != "off", max_steps=1, **way)
    trajectory, minibatches, _ = rolled_out(trainer)
    gradient = gradients(trainer, trajectory, [torch.cat(minibatches[0])])
    assert gradient.keys() == weights(trainer).keys()
    assert not [name for name, g in gradient.items() if g.abs().max() == 0]
    trainer.roles.zero_grad(set_to_none=True)

    trainable = weights(trainer)
    learning = {id(p) for _, p in trainer.roles.trainable_parameters()}
    frozen = [(p, p.detach().clone()) for p in trainer.roles.parameters() if id(p) not in learning]
    frozen += [(b, b.detach().clone()) for b in trainer.roles.buffers()]
    assert frozen
    trainer.train()
    assert not [name for name, p in trainer.roles.trainable_parameters() if torch.equal(p, trainable[name])]
    assert all(torch.equal(now, before) for now, before in frozen)

    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(learning) and {id(p) for p in held} == learning


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_8bit_adam_is_an_option(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, optim="paged_adamw_8bit", max_steps=2)
    before = weights(trainer)
    trainer.train()
    states = {id(p): state for p, state in trainer.optimizer.state.items()}
    moments = {name: states[id(p)]["state1"].dtype for name, p in trainer.roles.trainable_parameters()}
    assert moments["policy.model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert all(torch.isfinite(p).all() for p in trainer.roles.parameters())
    assert not any(torch.equal(before[name], p) for name, p in trainer.roles.trainable_parameters())


def test_the_reference_has_not_moved_with_the_policy(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, learning_rate=1e-2)
    trainer.train()
    trainer.roles.eval()
    rows = [([300, 301, 302], [303, 304])]
    ours, _ = models.completion_logprobs(trainer.roles.use("reference"), layout(rows, 1, [EOS]))
    expected = naive_logprobs(models.load_causal(zoo[mode]).eval(), *rows[0])
    assert torch.allclose(ours[0], expected, atol=CLOSE)
    moved, _ = models.completion_logprobs(trainer.roles.use("policy"), layout(rows, 1, [EOS]))
    assert (moved[0] - expected).abs().max() > 0.01


@pytest.mark.slow
def test_target_kl_ends_an_update_without_the_step_that_was_too_far(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    """A stop at minibatch m is the same run as m - 1 epochs of one minibatch each."""
    common = {"max_steps": 1, "num_minibatches": 1, "learning_rate": 0.02, "weight_decay": 0.1}
    steps = Steps()
    stopped = make(zoo, mode, tmp_path, ppo_epochs=8, early_stop_kl=0.01, callbacks=[steps], **common)
    stopped.train()
    seen = int(updates(stopped)[0]["minibatches"])
    assert 2 <= seen < 8 and len(steps.norms) == seen - 1
    short = make(zoo, mode, tmp_path, ppo_epochs=seen - 1, **common)
    short.train()
    assert same(weights(stopped), weights(short))


def test_adaptive_kl_coefficient_in_a_run(zoo: Zoo, tmp_path: Path) -> None:
    settings = {"adaptive_kl_target": 0.05, "kl_horizon": 40, "kl_coef": 0.2, "max_steps": 5, "learning_rate": 5e-3}
    trainer = make(zoo, "full", tmp_path, **settings)
    trainer.train()
    coefficient = 0.2
    kls = [row["kl"] for row in updates(trainer)]
    for row in updates(trainer):
        assert row["kl_coef"] == pytest.approx(coefficient, rel=1e-6)
        coefficient *= 1 + max(-0.2, min(0.2, row["kl"] / 0.05 - 1)) * 8 / 40
    assert trainer.kl_coef == pytest.approx(coefficient, rel=1e-6)
    assert min(kls) < 0.05 < max(kls)  # it was steered both down and up


# --- PPO-ptx ---------------------------------------------------------------------------------------------------------

DEMONSTRATIONS = Dataset.from_dict(
    {
        "prompt": ["where does the otter live ?", "why ?", "what food does the owl like ?"],
        "completion": [" the otter lives by the river .", " mice .", " it likes to eat mice ."],
    }
)


def test_the_ptx_gradient_is_the_hand_computed_nll_gradient(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, ptx_coef=0.3, ptx_dataset=DEMONSTRATIONS, micro_batch_size=2, temperature=0.5)
    torch.manual_seed(5)
    drawn = torch.randint(3, (5,)).tolist()
    assert len(set(drawn)) > 1
    trainer.roles.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    nll = trainer.accumulate_ptx_gradient(5)
    ours = {name: p.grad for name, p in trainer.roles.trainable_parameters() if p.grad is not None}

    alone = models.load_causal(zoo[mode], trainable=True).eval()
    total, count = torch.zeros(()), 0
    for row in drawn:
        prompt, completion = (
            trainer.processing_class(DEMONSTRATIONS[row][name])["input_ids"] for name in ("prompt", "completion")
        )
        completion = [*completion, EOS]
        logits = alone(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum")
        count += len(completion)
    (0.3 * total / count).backward()
    assert nll == pytest.approx((total / count).item(), abs=1e-5)
    expected = {
        f"policy.{n}".replace(".default.", ".policy."): p.grad
        for n, p in alone.named_parameters()
        if p.grad is not None
    }
    close(expected, ours, relative=1e-4)


@pytest.mark.slow
def test_ptx_raises_the_likelihood_of_demonstrations_in_a_run(zoo: Zoo, tmp_path: Path) -> None:
    def nll(trainer: PPOTrainer) -> float:
        tokens = models.encode_pairs(
            trainer.processing_class, DEMONSTRATIONS["prompt"][:], DEMONSTRATIONS["completion"][:]
        )
        with torch.no_grad():
            return -models.completion_logprobs(trainer.roles.use("policy"), tokens)[0].sum().item()

    without = make(zoo, "full", tmp_path, max_steps=4)
    start = nll(without)
    without.train()
    given = make(zoo, "full", tmp_path, max_steps=4, ptx_coef=1.0, ptx_dataset=DEMONSTRATIONS)
    given.train()
    assert nll(given) < min(start, nll(without)) - 5


# --- the system ------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "max_steps": 4,
    "adaptive_kl_target": 0.02,
    "kl_horizon": 40,
    "entropy_coef": 0.01,
    "ptx_coef": 0.1,
    "ptx_dataset": DEMONSTRATIONS,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "per_device_train_batch_size": 4,
}


def comparable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])  # in the middle and at the end of an epoch of the prompts
def test_resume_at_update_k_is_bit_exact_with_the_uninterrupted_run(
    zoo: Zoo, mode: str, k: int, tmp_path: Path
) -> None:
    settings = EVERYTHING | {"max_steps": 3}
    whole = make(zoo, mode, tmp_path / "run", **settings, save_strategy="steps", save_steps=k)
    whole.train()
    resumed = make(zoo, mode, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{k}"))
    assert same(weights(whole), weights(resumed))
    assert comparable(updates(resumed)) == comparable(updates(whole)) and len(updates(whole)) == 3
    assert resumed.kl_coef == whole.kl_coef != PPOConfig.kl_coef
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(runs))  # whatever happened before
        trainer = make(zoo, mode, tmp_path, **EVERYTHING | {"max_steps": 1, "warmup_steps": 0}, seed=seed)
        torch.rand(1 + len(runs))  # and in between
        trainer.train()
        runs.append((weights(trainer), comparable(updates(trainer))))
    assert same(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]
    assert not same(runs[0][0], runs[2][0])


def test_a_fresh_adapter_is_drawn_from_the_seed(zoo: Zoo, tmp_path: Path) -> None:
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(drawn))
        drawn.append(weights(make(zoo, "full", tmp_path, lora={"r": 4}, value_model=None, seed=seed)))
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2])


@pytest.mark.slow
def test_evaluate_changes_nothing(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    dataset = Dataset.from_list(rows_of(PROMPTS[:5]))
    trainer = make(zoo, mode, tmp_path, eval_dataset=dataset, per_device_eval_batch_size=2)
    trainer.roles.train()
    state, before = torch.get_rng_state(), weights(trainer)
    first = trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state()) and same(before, weights(trainer)) and trainer.roles.training
    torch.manual_seed(99)
    assert trainer.evaluate() == first  # the same random numbers each time

    quiet = make(zoo, mode, tmp_path, eval_dataset=dataset)
    quiet.train()
    evaluated = make(zoo, mode, tmp_path, eval_dataset=dataset, eval_strategy="steps", eval_steps=1)
    evaluated.train()
    assert len([row for row in evaluated.state.log_history if "eval_reward" in row]) == 2
    assert same(weights(quiet), weights(evaluated))
    assert comparable(updates(quiet)) == comparable(updates(evaluated))


def test_evaluation_means_are_over_rows_and_tokens_not_over_batches(zoo: Zoo, tmp_path: Path) -> None:
    """Against loops over all completions, drawn in batches of unequal size."""

    class Listening(PPOTrainer):
        def rollout(self, rows: list[Any]) -> models.Tokens:
            tokens = super().rollout(rows)
            self.heard = [*getattr(self, "heard", []), *pairs_of(tokens)]
            return tokens

    dataset = Dataset.from_list(rows_of(PROMPTS[:7]))
    options = {"per_device_eval_batch_size": 3, "ref_model": zoo["full-other"], "kind": Listening}
    trainer = make(zoo, "full", tmp_path, eval_dataset=dataset, **options)
    metrics = trainer.evaluate()
    policy, reference = (models.load_causal(zoo[name]).eval() for name in ("full", "full-other"))
    kls, entropies = [], []
    for prompt, completion in trainer.heard:  # type: ignore[attr-defined]
        log_ratio = naive_logprobs(policy, prompt, completion) - naive_logprobs(reference, prompt, completion)
        kls.append(log_ratio.sum().item())
        p = naive_logits(policy, prompt, completion).softmax(-1)
        entropies += (-(p * p.log()).sum(-1)).tolist()
    assert len(kls) == 7 and len(entropies) < 7 * 6
    assert metrics["eval_kl"] == pytest.approx(sum(kls) / 7, abs=1e-4)
    assert metrics["eval_entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    assert metrics["eval_completion_length"] == pytest.approx(len(entropies) / 7)


def test_evaluate_without_prompts_says_so(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no eval_dataset"):
        make(zoo, "full", tmp_path).evaluate()


@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    evaluations = iter([1.0, 3.0, 2.0])

    def rising_then_falling(prompts: list[str], completions: list[str], number: list[int], **_: Any) -> list[float]:
        if number == [-1]:  # the evaluation row
            return [next(evaluations)]
        return vowels(prompts, completions)

    dataset = Dataset.from_list([{"prompt": PROMPTS[0], "number": -1}])
    each_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    trainer = make(
        zoo, mode, tmp_path, reward=rising_then_falling, eval_dataset=dataset, max_steps=3, **each_step, **best
    )
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2") and trainer.state.best_metric == 3.0
    now = weights(trainer)
    trainer.roles.load(tmp_path / "checkpoint-2")
    assert same(now, weights(trainer))
    trainer.roles.load(tmp_path / "checkpoint-3")
    assert not same(now, weights(trainer))


RELOAD = """
import json, sys, torch
torch.set_num_threads(1)
from rlhf_kit import models
from rlhf_kit.progress import quiet
quiet()
answers = {}
for name, path in json.loads(sys.argv[1]).items():
    ids = torch.tensor([[300, 301, 302, 303, 304, 0]])
    tokens = models.Tokens(ids, torch.ones_like(ids), torch.ones(1, 4, dtype=torch.long))
    roles = models.load_roles(path, value=path + "/value").eval()
    with torch.no_grad():
        logits = models.load_causal(path).eval()(input_ids=ids, use_cache=False).logits
        answers[name] = {
            "logits": logits[0, -1].tolist(),
            "logprobs": models.completion_logprobs(roles.use("policy"), tokens)[0].tolist(),
            "values": roles.values(tokens).tolist(),
            "stops": models.stop_ids(models.load_causal(path), models.load_tokenizer(path)),
        }
print("ANSWERS" + json.dumps(answers))
"""


@pytest.mark.slow
def test_saved_and_loaded_in_a_new_process_gives_equal_logits_and_values(zoo: Zoo, tmp_path: Path) -> None:
    ids = torch.tensor([[300, 301, 302, 303, 304, 0]])
    tokens = models.Tokens(ids, torch.ones_like(ids), torch.ones(1, 4, dtype=torch.long))
    expected, paths = {}, {}
    for mode in ("full", "lora", "4bit"):
        trainer = make(zoo, mode, tmp_path / mode, learning_rate=1e-2)
        trainer.train()
        trainer.save_model()
        trainer.roles.eval()
        with torch.no_grad():
            values = trainer.roles.values(tokens)
            policy = trainer.roles.use("policy")
            expected[mode] = {
                "logits": policy(input_ids=ids, use_cache=False).logits[0, -1].tolist(),
                "logprobs": models.completion_logprobs(policy, tokens)[0].tolist(),
                "values": values.tolist(),
                "stops": [EOS],
            }
        paths[mode] = str(tmp_path / mode)
        saved = json.loads((tmp_path / mode / "generation_config.json").read_text())
        assert saved["eos_token_id"] in (EOS, [EOS])
    assert in_a_new_process(RELOAD, paths) == expected


def test_the_saved_generation_config_has_eos_although_the_model_had_none(zoo: Zoo, tmp_path: Path) -> None:
    base = models.load_causal(zoo["words"])
    base.generation_config.eos_token_id = None
    base.config.eos_token_id = None
    base.save_pretrained(tmp_path / "mute")
    word_tokenizer().save_pretrained(tmp_path / "mute")
    mute = json.loads((tmp_path / "mute" / "generation_config.json").read_text())
    assert mute.get("eos_token_id") is None
    trainer = make(zoo | {"mute": str(tmp_path / "mute")}, "mute", tmp_path / "out", prompts=["a c", "b"] * 4)
    trajectory, _, _ = rolled_out(trainer)
    assert any(completion[-1] == EOS for _, completion in pairs_of(trajectory.tokens))
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] in (EOS, [EOS])


def test_a_reward_model_with_another_tokenizer_scores_the_text_the_same(zoo: Zoo, tmp_path: Path) -> None:
    """The reward speaks words, the policy pocket: PPO's rewards are those of the completions' texts."""
    reward = RewardModel(save_reward(tmp_path / "reward", zoo["words"], word_tokenizer()))
    heard: list[tuple[list[str], list[str]]] = []

    def listening(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        heard.append((prompts, completions))
        return reward(prompts, completions)

    direct = make(zoo, "full", tmp_path, reward=reward, value_model=None, missing_eos_penalty=0.0)
    trajectory, _, _ = rolled_out(direct)
    rolled_out(make(zoo, "full", tmp_path, reward=listening, value_model=None))
    tokenizer = direct.processing_class
    texts = [tokenizer.decode([token for token in y if token > 1]) for _, y in pairs_of(trajectory.tokens)]
    assert heard == [(PROMPTS, texts)]
    assert trajectory.scores.tolist() == pytest.approx(
        [reward([x], [y])[0] for x, y in zip(PROMPTS, texts, strict=True)], abs=1e-4
    )
    assert (trajectory.values == 0).all()  # its value model cannot be started from another vocabulary


def test_values_start_from_a_reward_model_that_fits(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    reward = zoo[f"{mode}-reward"]
    given = make(zoo, mode, tmp_path, reward=reward, value_model=None)  # as a directory
    explicit = make(zoo, mode, tmp_path, value_model=reward)
    a, b = rolled_out(given)[0], rolled_out(explicit)[0]
    assert torch.equal(a.tokens.input_ids, b.tokens.input_ids)
    assert torch.equal(a.values, b.values) and a.values.abs().max() > 0.1


def test_rewards_get_the_other_columns_and_chat_prompts_give_the_same_run(zoo: Zoo, tmp_path: Path) -> None:
    heard: list[tuple[Any, Any, Any]] = []

    def listening(prompts: list[Any], completions: list[Any], number: list[int], **columns: Any) -> list[float]:
        heard.append((prompts, completions, number))
        return vowels(prompts, completions)

    text, chat = (make(zoo, "full", tmp_path / "a", reward=listening, prompts=p, max_steps=1) for p in (PROMPTS, CHATS))
    text.train()
    chat.train()
    (text_prompts, texts, numbers), (chat_prompts, replies, chat_numbers) = heard
    assert [PROMPTS[number] for number in numbers] == text_prompts and numbers == chat_numbers
    assert chat_prompts == [[{"role": "user", "content": prompt}] for prompt in text_prompts]
    assert replies == [[{"role": "assistant", "content": completion}] for completion in texts]
    assert same(weights(text), weights(chat))


def test_a_reward_that_is_not_one_finite_number_each_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    for bad, says in (
        (lambda prompts, completions, **_: [0.0], r"gave \[1\] values for 8 completions"),
        (lambda prompts, completions, **_: [float("nan"), *[0.0] * 7], "1 of them not finite"),
    ):
        with pytest.raises(ValueError, match=says):
            make(zoo, "full", tmp_path, reward=bad).train()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(zoo: Zoo, tmp_path: Path) -> None:
    class Break(TrainerCallback):
        """Ruins the value head after the second update."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.value_head.weight.data.fill_(math.inf)

    trainer = make(zoo, "full", tmp_path, max_steps=4, save_strategy="steps", save_steps=1, callbacks=[Break()])
    with pytest.raises(FloatingPointError, match="update 3 has a loss of (nan|inf).*checkpoint-2"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eval_dataset": Dataset.from_dict({"question": ["a"]})}, "eval_dataset: no column 'prompt'; it has question"),
        ({"ptx_coef": 0.1, "ptx_dataset": Dataset.from_dict({"prompt": ["a"]})}, "ptx_dataset: no column 'completion'"),
        ({"ptx_coef": 0.1}, "go together"),
        ({"ptx_dataset": DEMONSTRATIONS}, "go together"),
    ],
)
def test_datasets_that_do_not_fit_are_refused(zoo: Zoo, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(zoo, "full", tmp_path, **settings)


def test_4bit_without_an_adapter_is_refused(zoo: Zoo, tmp_path: Path) -> None:
    with pytest.raises(models.ModelError, match="4-bit weights cannot be trained"):
        make(zoo, "full", tmp_path, load_in_4bit=True)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
