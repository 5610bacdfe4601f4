"""rlhf_kit.ppo.PPOTrainer: what a trustworthy PPO proves, in full fine-tuning, LoRA and 4-bit + LoRA."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from tiny import in_a_new_process, layout, naive_logits, naive_logprobs, save_reward, word_tokenizer
from transformers import TrainerCallback

from rlhf_kit import models
from rlhf_kit.ppo import PPOConfig, PPOTrainer, Trajectory
from rlhf_kit.rewards import RewardModel

gc.freeze()  # each training ends with a garbage collection, which need not search all that was imported
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
DEMONSTRATIONS = Dataset.from_dict(
    {
        "prompt": ["where does the otter live ?", "why ?", "what food does the owl like ?"],
        "completion": [" the otter lives by the river .", " mice .", " it likes to eat mice ."],
    }
)
FULL_AND_LORA = pytest.mark.parametrize("mode", ["full", "lora"])


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward of text or chat completions that no two of them are likely to share."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(text.count(vowel) for vowel in "aeiou") / (1 + len(text)) * 4 - 1 for text in texts]


def make(
    zoo: Zoo, mode: str, out: Path, reward: Any = vowels, prompts: list[Any] = PROMPTS, **settings: Any
) -> PPOTrainer:
    """A trainer with values that are not zero; settings of PPOConfig and of PPOTrainer by their names."""
    names = ("eval_dataset", "ref_model", "value_model", "processing_class", "callbacks", "ptx_dataset")
    given = {name: settings.pop(name) for name in names if name in settings}
    kind = settings.pop("kind", PPOTrainer)
    sizes = {"per_device_train_batch_size": 8, "num_minibatches": 2, "ppo_epochs": 2, "micro_batch_size": 3}
    defaults = {"max_steps": 2, "max_completion_length": 6, "learning_rate": 1e-3, **sizes}
    args = PPOConfig(output_dir=str(out), **defaults | settings)
    dataset = Dataset.from_dict({"prompt": prompts, "number": list(range(len(prompts)))})
    others = {"value_model": zoo.get(f"{mode}-reward"), "callbacks": []} | given
    return kind(zoo[mode], reward, args, dataset, **others)


def rows_of(prompts: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "number": number} for number, prompt in enumerate(prompts)]


class Scored(NamedTuple):
    """A trainer and one scored batch of all its prompts."""

    trainer: PPOTrainer
    trajectory: Trajectory
    minibatches: list[list[torch.Tensor]]
    metrics: dict[str, float]


def rolled_out(trainer: PPOTrainer, seed: int = 0) -> Scored:
    torch.manual_seed(seed)
    trainer.roles.eval()
    rows = rows_of(trainer.train_dataset["prompt"][:])
    tokens = trainer.rollout(rows)
    minibatches = trainer.partition(tokens)
    trajectory, metrics = trainer.make_trajectory(rows, tokens, minibatches)
    return Scored(trainer, trajectory, minibatches, metrics)


@pytest.fixture(scope="module")
def scored_by_mode(zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scored]:
    """For tests that change no weights: the reference is another model, and every coefficient is in use."""

    @cache
    def scored(mode: str) -> Scored:
        settings: dict[str, Any] = {"kl_coef": 0.2, "missing_eos_penalty": 0.5, "entropy_coef": 0.05}
        settings |= {"temperature": 0.8, "gamma": 1.0, "gae_lambda": 1.0}
        out = tmp_path_factory.mktemp(mode)
        return rolled_out(make(zoo, mode, out, ref_model=zoo[f"{mode}-other"], **settings))

    return scored


@pytest.fixture
def scored(scored_by_mode: Callable[[str], Scored], mode: str) -> Scored:
    return scored_by_mode(mode)


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


def gradients_alone(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients of a policy that was loaded alone, by the names that they have in the roles."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {f"policy.{name}".replace(".default.", ".policy."): gradient for name, gradient in found.items()}


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


def comparable(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


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
    """Keeps the totals of every minibatch and the tokens of every rollout."""

    def rollout(self, rows: list[Any]) -> models.Tokens:
        tokens = super().rollout(rows)
        self.sampled = [*getattr(self, "sampled", []), *pairs_of(tokens)]
        return tokens

    def accumulate_gradient(self, trajectory: Trajectory, minibatch: list[torch.Tensor]) -> torch.Tensor:
        totals = super().accumulate_gradient(trajectory, minibatch)
        self.totals = [*getattr(self, "totals", []), totals]
        return totals


# --- log-probs and ratios --------------------------------------------------------------------------------------------


def test_rollout_logprobs_equal_the_naive_loop(zoo: Zoo, mode: str, scored: Scored) -> None:
    trajectory = scored.trajectory
    policy, reference = (models.load_causal(zoo[name]).eval() for name in (mode, f"{mode}-other"))
    pairs = pairs_of(trajectory.tokens)
    assert EOS in pairs[4][0][1:]  # an EOS inside a prompt is attended as any other token
    for row, (prompt, completion) in enumerate(pairs):
        assert prompt == scored.trainer.processing_class(PROMPTS[row])["input_ids"]
        n = len(completion)
        for ours, model in ((trajectory.logprobs, policy), (trajectory.reference_logprobs, reference)):
            assert torch.allclose(ours[row, :n], naive_logprobs(model, prompt, completion, 0.8), atol=CLOSE)
            assert (ours[row, n:] == 0).all()
        assert (trajectory.values[row, n:] == 0).all()


@FULL_AND_LORA
def test_with_learning_rate_zero_the_ratio_stays_one_in_all_epochs(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer: Any = make(zoo, mode, tmp_path, learning_rate=0.0, max_steps=1, kind=Recording)
    before = weights(trainer)
    trainer.train()
    assert len(trainer.totals) == 2 * 2
    for _, _, _, approx_kl, clip_fraction, deviation in trainer.totals:
        assert deviation < CLOSE and abs(approx_kl) < 1e-9 and clip_fraction == 0
    assert same(before, weights(trainer))


@pytest.mark.parametrize(
    ("mode", "fresh_adapter"), [("full", False), ("lora", False), ("4bit", False), ("lora", True), ("4bit", True)]
)
def test_policy_equal_to_reference_gives_a_kl_of_exactly_zero(
    zoo: Zoo, mode: str, fresh_adapter: bool, tmp_path: Path
) -> None:
    new = {"lora": {"r": 4}, "load_in_4bit": mode == "4bit", "value_model": None} if fresh_adapter else {}
    trainer = make(zoo, "full" if fresh_adapter else mode, tmp_path, **new)
    _, trajectory, _, metrics = rolled_out(trainer)
    assert torch.equal(trajectory.logprobs, trajectory.reference_logprobs) and trajectory.logprobs.abs().max() > 1
    assert metrics["kl"] == 0.0


# --- masks -----------------------------------------------------------------------------------------------------------


def test_tokens_after_eos_get_no_gradient(scored: Scored) -> None:
    """Whatever stands behind an EOS: gradients are equal to the last bit."""
    tokens = scored.trajectory.tokens
    garbage, behind = tokens.input_ids.clone(), tokens.completion_mask == 0
    assert behind.any()
    garbage[:, -behind.shape[1] :][behind] = 444
    other = scored.trajectory._replace(tokens=tokens._replace(input_ids=garbage))
    for minibatch in scored.minibatches:
        expected = gradients(scored.trainer, scored.trajectory, minibatch)
        assert same(expected, gradients(scored.trainer, other, minibatch))


def test_an_empty_completion_is_valid(scored: Scored) -> None:
    tokens = layout([([300, 301], [EOS]), ([302], [303, 304, EOS]), ([305], [EOS])], 1, [EOS])
    trajectory, metrics = scored.trainer.make_trajectory(rows_of(PROMPTS[:3]), tokens, [[torch.arange(3)]])
    assert trajectory.tokens.completion_mask.sum(1).tolist() == [1, 3, 1] and metrics["unfinished"] == 0
    expected = trajectory.scores[0] - 0.2 * (trajectory.logprobs[0, 0] - trajectory.reference_logprobs[0, 0])
    assert trajectory.returns[0].tolist() == pytest.approx([expected.item(), 0, 0], abs=1e-6)
    gradient = gradients(scored.trainer, trajectory, [torch.tensor([0, 2])])
    assert gradient and all(g.isfinite().all() for g in gradient.values())


def test_rewards_sum_to_score_minus_kl_and_every_reported_mean_is_masked(zoo: Zoo, mode: str, scored: Scored) -> None:
    """Against loops over the real tokens of each row; with gamma = lambda = 1 the first return sums the rewards."""
    trajectory, metrics = scored.trajectory, scored.metrics
    policy, reference = (models.load_causal(zoo[name]).eval() for name in (mode, f"{mode}-other"))
    kls, entropies, lengths, unfinished, texts = [], [], [], [], []
    for prompt, completion in pairs_of(trajectory.tokens):
        assert EOS not in completion[:-1]
        ours, theirs = (naive_logprobs(model, prompt, completion, 0.8) for model in (policy, reference))
        kls.append((ours - theirs).sum().item())
        p = (naive_logits(policy, prompt, completion) / 0.8).softmax(-1)
        entropies += (-(p * p.log()).sum(-1)).tolist()
        lengths.append(len(completion))
        unfinished.append(completion[-1] != EOS)
        texts.append(scored.trainer.processing_class.decode([token for token in completion if token > 1]))
    assert True in unfinished and False in unfinished
    rewards = vowels([], texts)
    scores = [r - 0.5 * cut for r, cut in zip(rewards, unfinished, strict=True)]  # the penalty, on these rows only
    assert trajectory.scores.tolist() == pytest.approx(scores, abs=1e-6)
    objectives = [score - 0.2 * kl for score, kl in zip(scores, kls, strict=True)]
    assert trajectory.returns[:, 0].tolist() == pytest.approx(objectives, abs=1e-4)
    expected = {
        "reward": sum(rewards) / 8,
        "kl": sum(kls) / 8,
        "objective": sum(objectives) / 8,
        "entropy": sum(entropies) / len(entropies),
        "completion_length": sum(lengths) / 8,
        "unfinished": sum(unfinished) / 8,
        "kl_coef": 0.2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    real = trajectory.tokens.completion_mask.bool()
    values, returns = trajectory.values[real], trajectory.returns[real]
    explained = 1 - ((returns - values).var() / returns.var()).item()
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_pad_equal_to_eos_and_several_stop_tokens(zoo: Zoo, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(zoo["words"])
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make(zoo, "words", tmp_path, prompts=["a c", "b d e", "a"] * 8, processing_class=tokenizer)
    trainer.stop_ids = [EOS, 10]
    trainer.policy.generation_config.eos_token_id = [EOS, 10]
    _, trajectory, _, metrics = rolled_out(trainer)
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


def test_losses_and_approximate_kl_on_hand_numbers(
    scored_by_mode: Callable[[str], Scored], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every ratio 2 or 1/2, every value one below its return: k3 = r - 1 - log r, clip fraction 1, losses by hand."""
    trainer, trajectory, minibatches, _ = scored_by_mode("full")
    monkeypatch.setattr(trainer.args, "entropy_coef", 0.0)
    mask = trajectory.tokens.completion_mask
    one = trajectory._replace(advantages=mask.float(), returns=(trajectory.values + 1) * mask)
    for ratio, advantage, surrogate in ((2.0, 1.0, -1.2), (2.0, -1.0, 2.0), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)):
        old = (trajectory.logprobs - math.log(ratio)) * mask
        t = one._replace(logprobs=old, advantages=advantage * one.advantages)
        totals = trainer.accumulate_gradient(t, minibatches[0]).tolist()
        expected = [surrogate + 0.1 * 0.5, surrogate, 0.5, ratio - 1 - math.log(ratio), 1.0, abs(ratio - 1)]
        assert totals == pytest.approx(expected, abs=1e-4)
    for scale in (1e-4, 1e-2, 1.0):
        moved = trajectory._replace(logprobs=(trajectory.logprobs + scale * torch.randn(mask.shape)) * mask)
        assert trainer.accumulate_gradient(moved, minibatches[0])[3] > 0  # k3 is never negative


def test_loss_and_gradient_do_not_depend_on_the_micro_batch_size(scored: Scored) -> None:
    trainer, trajectory, _, _ = scored
    rows = torch.tensor([5, 0, 7, 2, 3])
    assert len(set(trajectory.tokens.completion_mask.sum(1)[rows].tolist())) > 1
    results = [
        (gradients(trainer, trajectory, cut), trainer.accumulate_gradient(trajectory, cut))
        for cut in ([rows], list(rows.split(1)), list(rows.split(2)))
    ]
    for gradient, totals in results[1:]:
        close(results[0][0], gradient, relative=2e-5)
        assert torch.allclose(totals[:5], results[0][1][:5], atol=1e-6)


def test_extra_padding_changes_no_total_and_no_gradient(scored: Scored) -> None:
    trainer, narrow, _, metrics = scored
    wide_tokens = layout(pairs_of(narrow.tokens), pad=1, stops=[EOS], left=4, right=5)
    everything = [torch.arange(8)]
    wide, wide_metrics = trainer.make_trajectory(rows_of(PROMPTS), wide_tokens, [everything])
    assert wide_metrics == pytest.approx(metrics, abs=1e-5)
    close(gradients(trainer, narrow, everything), gradients(trainer, wide, everything), relative=1e-4)
    a, b = (trainer.accumulate_gradient(t, everything)[:5] for t in (narrow, wide))
    assert torch.allclose(a, b, atol=1e-5)


def test_the_entropy_bonus_is_the_gradient_of_the_mean_token_entropy(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, entropy_coef=0.7, vf_coef=0.0)
    _, trajectory, minibatches, _ = rolled_out(trainer)
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
    expected = gradients_alone(alone)
    close(expected, {name: ours[name] for name in expected}, relative=1e-4)


# --- the optimizer ---------------------------------------------------------------------------------------------------


@FULL_AND_LORA
def test_each_of_updates_times_epochs_times_minibatches_steps_clips_the_gradient(
    zoo: Zoo, mode: str, tmp_path: Path
) -> None:
    free, clipped = Steps(), Steps()
    for steps, norm, updates_made in ((free, 1e9, 1), (clipped, 0.05, 2)):
        sizes = {"max_steps": updates_made, "ppo_epochs": 2, "num_minibatches": 3}
        trainer = make(zoo, mode, tmp_path, callbacks=[steps], max_grad_norm=norm, **sizes)
        trainer.train()
        assert [row["minibatches"] for row in updates(trainer)] == [2 * 3] * updates_made
    assert len(free.norms) == 1 * 2 * 3 and min(free.norms) > 0.1
    assert clipped.norms == pytest.approx([0.05] * (2 * 2 * 3), rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [
        ("full", "off"), ("full", "not reentrant"), ("lora", "off"), ("lora", "reentrant"), ("lora", "not reentrant"),
        ("4bit", "off"), ("4bit", "reentrant"),
    ],
)  # fmt: skip
def test_the_first_ratio_is_one_every_trainable_parameter_moves_and_every_frozen_one_is_bit_identical(
    zoo: Zoo, mode: str, checkpointing: str, tmp_path: Path
) -> None:
    way: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"}}
    way |= {"gradient_checkpointing": checkpointing != "off", "temperature": 0.8}
    trainer = make(zoo, mode, tmp_path, max_steps=1, **way)
    recomputing = [m for m in trainer.roles.modules() if getattr(m, "gradient_checkpointing", False)]
    assert bool(recomputing) == (checkpointing != "off")
    _, trajectory, minibatches, _ = rolled_out(trainer)
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
    [update] = updates(trainer)
    assert update["first_ratio_deviation"] < 1e-6 and update["approx_kl"] > 1e-8
    assert not [name for name, p in trainer.roles.trainable_parameters() if torch.equal(p, trainable[name])]
    assert all(torch.equal(now, before) for now, before in frozen)

    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(learning) and {id(p) for p in held} == learning

    trainer.roles.eval()  # the reference has not moved with the policy
    prompt, completion = [300, 301, 302], [303, 304]
    tokens = layout([(prompt, completion)], 1, [EOS])
    start = naive_logprobs(models.load_causal(zoo[mode]).eval(), prompt, completion, 0.8)
    with torch.no_grad():
        policy, reference = (trainer.logprobs(role, tokens)[0][0] for role in ("policy", "reference"))
    assert torch.allclose(reference, start, atol=CLOSE) and (policy - start).abs().max() > 100 * CLOSE


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_8bit_adam_is_an_option(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, optim="paged_adamw_8bit", max_steps=1)
    before = weights(trainer)
    trainer.train()
    states = {id(p): state for p, state in trainer.optimizer.state.items()}
    moments = {name: states[id(p)]["state1"].dtype for name, p in trainer.roles.trainable_parameters()}
    assert moments["policy.model.layers.0.mlp.up_proj.weight"] == torch.uint8
    assert all(torch.isfinite(p).all() for p in trainer.roles.parameters())
    assert not any(torch.equal(before[name], p) for name, p in trainer.roles.trainable_parameters())


def test_early_stop_kl_ends_an_update_without_the_step_that_was_too_far(zoo: Zoo, tmp_path: Path) -> None:
    """A stop at minibatch m is the same run as m - 1 epochs of one minibatch each."""
    common = {"max_steps": 1, "num_minibatches": 1, "learning_rate": 0.02, "weight_decay": 0.1}
    steps = Steps()
    stopped = make(zoo, "full", tmp_path, ppo_epochs=8, early_stop_kl=0.01, callbacks=[steps], **common)
    stopped.train()
    seen = int(updates(stopped)[0]["minibatches"])
    assert 2 <= seen < 8 and len(steps.norms) == seen - 1
    short = make(zoo, "full", tmp_path, ppo_epochs=seen - 1, **common)
    short.train()
    assert same(weights(stopped), weights(short))


def test_adaptive_kl_coefficient_in_a_run(zoo: Zoo, tmp_path: Path) -> None:
    settings = {"adaptive_kl_target": 0.05, "kl_horizon": 40, "kl_coef": 0.2, "max_steps": 5, "learning_rate": 5e-3}
    trainer = make(zoo, "full", tmp_path, ppo_epochs=1, **settings)
    trainer.train()
    coefficient = 0.2
    kls = [row["kl"] for row in updates(trainer)]
    for row in updates(trainer):
        assert row["kl_coef"] == pytest.approx(coefficient, rel=1e-6)
        coefficient *= 1 + max(-0.2, min(0.2, row["kl"] / 0.05 - 1)) * 8 / 40
    assert trainer.kl_coef == pytest.approx(coefficient, rel=1e-6)
    assert min(kls) < 0.05 < max(kls)  # it was steered both down and up


def test_the_ptx_gradient_is_the_hand_computed_nll_gradient(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, ptx_coef=0.3, ptx_dataset=DEMONSTRATIONS, micro_batch_size=2, temperature=0.5)
    torch.manual_seed(5)
    drawn = torch.randint(3, (5,)).tolist()
    assert len(set(drawn)) > 1
    trainer.roles.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    nll = trainer.accumulate_ptx_gradient(5)
    ours = {name: p.grad.clone() for name, p in trainer.roles.trainable_parameters() if p.grad is not None}

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
    close(gradients_alone(alone), ours, relative=1e-4)

    # The gradient and the loss of a minibatch of as many rows are its own and these.
    _, trajectory, _, _ = rolled_out(trainer)
    both, own = [], []
    for coefficient, found in ((0.3, both), (0.0, own)):
        trainer.args.ptx_coef = coefficient
        trainer.roles.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        found.append(trainer.accumulate_gradient(trajectory, [torch.arange(3), torch.arange(3, 5)])[0].item())
        found.append({name: p.grad.clone() for name, p in trainer.roles.trainable_parameters() if name in ours})
    assert both[0] - own[0] == pytest.approx(0.3 * nll, abs=1e-5)
    close({name: both[1][name] - own[1][name] for name in ours}, ours, relative=1e-3)


# --- the system ------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "adaptive_kl_target": 0.02,
    "kl_horizon": 40,
    "entropy_coef": 0.01,
    "ptx_coef": 0.1,
    "ptx_dataset": DEMONSTRATIONS,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "per_device_train_batch_size": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "k"), [("full", 1), ("lora", 1), ("4bit", 2)])
def test_resume_at_update_k_is_bit_exact_with_the_uninterrupted_run(
    zoo: Zoo, mode: str, k: int, tmp_path: Path
) -> None:
    """In the middle (k = 1) and at the end (k = 2) of an epoch of the prompts."""
    settings = EVERYTHING | {"max_steps": k + 1}
    whole = make(zoo, mode, tmp_path / "run", **settings, save_strategy="steps", save_steps=k)
    whole.train()
    resumed = make(zoo, mode, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{k}"))
    assert same(weights(whole), weights(resumed))
    assert comparable(updates(resumed)) == comparable(updates(whole)) and len(updates(whole)) == k + 1
    assert resumed.kl_coef == whole.kl_coef != PPOConfig.kl_coef
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(zoo: Zoo, tmp_path: Path) -> None:
    runs = []
    for seed, lora in ((3, {"r": 4}), (3, models.lora_config({"r": 4})), (4, {"r": 4})):
        torch.manual_seed(len(runs))  # whatever happened before
        settings = EVERYTHING | {"max_steps": 1, "warmup_steps": 0, "lora": lora, "value_model": None}
        trainer = make(zoo, "full", tmp_path, **settings, seed=seed)
        start = weights(trainer)
        torch.rand(1 + len(runs))  # and in between
        trainer.train()
        runs.append((start, weights(trainer), comparable(updates(trainer))))
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]
    assert not same(runs[0][0], runs[2][0]) and not same(runs[0][1], runs[2][1])


@FULL_AND_LORA
def test_evaluate_changes_nothing(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    dataset = Dataset.from_list(rows_of(PROMPTS[:5]))
    trainer = make(zoo, mode, tmp_path, eval_dataset=dataset, per_device_eval_batch_size=2)
    trainer.roles.train()
    state, before = torch.get_rng_state(), weights(trainer)
    first = trainer.evaluate()
    assert torch.equal(state, torch.get_rng_state()) and same(before, weights(trainer)) and trainer.roles.training
    torch.manual_seed(99)
    assert trainer.evaluate() == first  # the same random numbers each time

    few = {"ppo_epochs": 1, "num_minibatches": 1}
    quiet = make(zoo, mode, tmp_path, **few)
    quiet.train()
    evaluated = make(zoo, mode, tmp_path, eval_dataset=dataset, eval_strategy="steps", eval_steps=1, **few)
    evaluated.train()
    assert len([row for row in evaluated.state.log_history if "eval_reward" in row]) == 2
    assert same(weights(quiet), weights(evaluated))
    assert comparable(updates(quiet)) == comparable(updates(evaluated))


def test_evaluation_means_are_over_rows_and_tokens_not_over_batches(zoo: Zoo, tmp_path: Path) -> None:
    """Against loops over all completions, drawn in batches of unequal size."""
    dataset = Dataset.from_list(rows_of(PROMPTS[:7]))
    options = {"per_device_eval_batch_size": 3, "ref_model": zoo["full-other"], "kind": Recording}
    trainer: Any = make(zoo, "full", tmp_path, eval_dataset=dataset, **options)
    metrics = trainer.evaluate()
    policy, reference = (models.load_causal(zoo[name]).eval() for name in ("full", "full-other"))
    kls, entropies = [], []
    for prompt, completion in trainer.sampled:
        log_ratio = naive_logprobs(policy, prompt, completion) - naive_logprobs(reference, prompt, completion)
        kls.append(log_ratio.sum().item())
        p = naive_logits(policy, prompt, completion).softmax(-1)
        entropies += (-(p * p.log()).sum(-1)).tolist()
    assert len(kls) == 7 and len(entropies) < 7 * 6
    assert metrics["eval_kl"] == pytest.approx(sum(kls) / 7, abs=1e-4)
    assert metrics["eval_entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    assert metrics["eval_completion_length"] == pytest.approx(len(entropies) / 7)


def test_the_best_checkpoint_is_loaded_at_the_end(zoo: Zoo, tmp_path: Path) -> None:
    evaluations = iter([1.0, 3.0, 2.0])

    def rising_then_falling(prompts: list[str], completions: list[str], number: list[int], **_: Any) -> list[float]:
        if number == [-1]:  # the evaluation row
            return [next(evaluations)]
        return vowels(prompts, completions)

    dataset = Dataset.from_list([{"prompt": PROMPTS[0], "number": -1}])
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "ppo_epochs": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "greater_is_better": True}
    trainer = make(zoo, "full", tmp_path, reward=rising_then_falling, eval_dataset=dataset, max_steps=3, **settings)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2") and trainer.state.best_metric == 3.0
    now = weights(trainer)
    trainer.roles.load(tmp_path / "checkpoint-2")
    assert same(now, weights(trainer))
    trainer.roles.load(tmp_path / "checkpoint-3")
    assert not same(now, weights(trainer))


# The same lines are run in both processes.
ANSWERS = """
ids = torch.tensor([[300, 301, 302, 303, 304, 0]])
tokens = models.Tokens(ids, torch.ones_like(ids), torch.ones(1, 4, dtype=torch.long))
with torch.no_grad():
    answers = {
        "logits": roles.use("policy")(input_ids=ids, use_cache=False).logits[0, -1].tolist(),
        "logprobs": models.completion_logprobs(roles.use("policy"), tokens)[0].tolist(),
        "values": roles.values(tokens).tolist(),
        "stops": models.stop_ids(roles.use("policy"), tokenizer),
    }
"""
RELOAD = f"""
import json, sys, torch
torch.set_num_threads(1)
from rlhf_kit import models
from rlhf_kit.progress import quiet
quiet()
found = {{}}
for name, path in json.loads(sys.argv[1]).items():
    roles, tokenizer = models.load_roles(path, value=path + "/value").eval(), models.load_tokenizer(path)
    exec({ANSWERS!r})
    found[name] = answers
print("ANSWERS" + json.dumps(found))
"""


@pytest.mark.slow
def test_saved_and_loaded_in_a_new_process_gives_equal_logits_and_values(zoo: Zoo, tmp_path: Path) -> None:
    expected, paths = {}, {}
    for mode in ("full", "lora", "4bit"):
        trainer = make(zoo, mode, tmp_path / mode)
        for parameter in trainer.roles.learning:
            parameter.data += 0.01 * torch.randn(parameter.shape)
        trainer.save_model()
        names: dict[str, Any] = {"roles": trainer.roles.eval(), "tokenizer": trainer.processing_class}
        exec(ANSWERS, {"torch": torch, "models": models}, names)
        expected[mode], paths[mode] = names["answers"], str(tmp_path / mode)
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
    assert any(completion[-1] == EOS for _, completion in pairs_of(rolled_out(trainer).trajectory.tokens))
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] in (EOS, [EOS])


def test_a_reward_model_with_another_tokenizer_scores_the_text_the_same(zoo: Zoo, tmp_path: Path) -> None:
    """The reward model has the words' tokenizer, the policy pocket's: the rewards are those of the texts."""
    reward = RewardModel(save_reward(tmp_path / "reward", zoo["words"], word_tokenizer()))
    trainer = make(zoo, "full", tmp_path, reward=reward, value_model=None, missing_eos_penalty=0.0)
    trajectory = rolled_out(trainer).trajectory
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode([token for token in y if token > 1]) for _, y in pairs_of(trajectory.tokens)]
    alone = [reward([x], [y])[0] for x, y in zip(PROMPTS, texts, strict=True)]
    assert trajectory.scores.tolist() == pytest.approx(alone, abs=1e-4)
    assert (trajectory.values == 0).all()  # a value model cannot start from another vocabulary


def test_values_start_from_a_reward_model_that_fits(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    reward = zoo[f"{mode}-reward"]
    given = make(zoo, mode, tmp_path, reward=reward, value_model=None)  # as a directory
    explicit = make(zoo, mode, tmp_path, value_model=reward)
    a, b = rolled_out(given).trajectory, rolled_out(explicit).trajectory
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


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_is_not_applied_and_the_last_good_checkpoint_is_named(
    zoo: Zoo, tmp_path: Path, what: str
) -> None:
    class Break(TrainerCallback):
        """Spoils the value head, or only its gradient, after the second update."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2 and what == "loss":
                model.value_head.weight.data.fill_(math.inf)
            elif state.global_step == 2:
                model.value_head.weight.register_hook(lambda gradient: gradient / 0)

    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "ppo_epochs": 1, "num_minibatches": 1}
    trainer = make(zoo, "full", tmp_path, callbacks=[Break()], **settings)
    with pytest.raises(FloatingPointError, match="update 3 has a loss of .*not applied.*checkpoint-2$"):
        trainer.train()
    assert what == "loss" or all(p.isfinite().all() for p in trainer.roles.parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eval_dataset": Dataset.from_dict({"question": ["a"]})}, "eval_dataset: no column 'prompt'; it has question"),
        ({"ptx_coef": 0.1, "ptx_dataset": Dataset.from_dict({"prompt": ["a"]})}, "ptx_dataset: no column 'completion'"),
        ({"ptx_coef": 0.1}, "go together"),
        ({"ptx_dataset": DEMONSTRATIONS}, "go together"),
        ({"load_in_4bit": True}, "4-bit weights cannot be trained"),
    ],
)
def test_what_does_not_fit_is_refused(zoo: Zoo, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(zoo, "full", tmp_path, **settings)


def test_rewards_that_are_not_one_finite_number_each_and_evaluation_without_prompts_are_refused(
    zoo: Zoo, tmp_path: Path
) -> None:
    trainer = make(zoo, "full", tmp_path)
    for rewards, says in (([0.0], r"gave \[1\] values for 8"), ([math.nan, *[0.0] * 7], "1 of them not finite")):
        trainer.reward = lambda prompts, completions, given=rewards, **_: given
        with pytest.raises(ValueError, match=says):
            trainer.train()
    with pytest.raises(ValueError, match="no eval_dataset"):
        trainer.evaluate()


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    torch.manual_seed(0)
    yield
