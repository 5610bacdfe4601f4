"""rlhf_kit.ppo.PPOTrainer: what a trustworthy PPO proves, in full fine-tuning, LoRA and 4-bit + LoRA."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import layout, naive_logits, naive_logprobs, save_reward, word_tokenizer
from transformers import TrainerCallback

from rlhf_kit import models
from rlhf_kit.ppo import PPOConfig, PPOTrainer, Trajectory
from rlhf_kit.rewards import RewardModel

gc.freeze()  # each training ends with a garbage collection, which need not search all that was imported
Zoo = dict[str, str]
Tensors = dict[str, torch.Tensor]
Pairs = list[tuple[list[int], list[int]]]  # token ids of prompts and completions
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
ALL = [torch.arange(len(PROMPTS))]  # as one micro-batch
ANSWERS = [" the otter lives by the river .", " mice .", " it likes to eat mice ."]
DEMONSTRATIONS = Dataset.from_dict({"prompt": PROMPTS[:3], "completion": ANSWERS})
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
    others = {"value_model": zoo.get(f"{mode}-reward"), "callbacks": []}
    others |= {name: settings.pop(name) for name in names if name in settings}
    sizes = {"per_device_train_batch_size": 8, "num_minibatches": 2, "ppo_epochs": 2, "micro_batch_size": 3}
    defaults = {"max_steps": 2, "max_completion_length": 6, "learning_rate": 1e-3, **sizes}
    args = PPOConfig(output_dir=str(out), **defaults | settings)
    return PPOTrainer(zoo[mode], reward, args, Dataset.from_list(rows_of(prompts)), **others)


def rows_of(prompts: list[Any]) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "number": number} for number, prompt in enumerate(prompts)]


def rolled_out(trainer: PPOTrainer) -> tuple[Trajectory, list[list[torch.Tensor]], dict[str, float]]:
    """One scored batch of all its prompts, the minibatches that it was scored in, and its metrics."""
    torch.manual_seed(0)
    trainer.roles.eval()
    rows = rows_of(trainer.train_dataset["prompt"][:])
    tokens = trainer.rollout(rows)
    minibatches = trainer.partition(tokens)
    trajectory, metrics = trainer.make_trajectory(rows, tokens, minibatches)
    return trajectory, minibatches, metrics


@pytest.fixture(scope="module", params=["full", "lora", "4bit"])
def scored(zoo: Zoo, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(trainer, *rolled_out(trainer), mode), for tests that change no weights.

    The reference is another model, and every coefficient is in use.
    """
    settings: dict[str, Any] = {"kl_coef": 0.2, "missing_eos_penalty": 0.5, "entropy_coef": 0.05, "gae_lambda": 1.0}
    settings |= {"temperature": 0.8, "ref_model": zoo[f"{request.param}-other"]}
    trainer = make(zoo, request.param, tmp_path_factory.mktemp(request.param), **settings)
    return trainer, *rolled_out(trainer), request.param


def pairs_of(tokens: models.Tokens) -> Pairs:
    """(prompt, completion) ids of each row, read off the masks."""
    width = tokens.completion_mask.shape[1]
    return [
        (ids[:-width][attention[:-width].bool()].tolist(), ids[-width:][mask.bool()].tolist())
        for ids, attention, mask in zip(*tokens, strict=True)
    ]


def naive(policy: str, reference: str, pairs: Pairs, temperature: float) -> list[tuple[torch.Tensor, ...]]:
    """Log-probs under policy and reference, and entropies, of each token of each row."""
    ours, theirs = (models.load_causal(path).eval() for path in (policy, reference))
    rows = []
    for pair in pairs:
        p = (naive_logits(ours, *pair) / temperature).softmax(-1)
        both = (naive_logprobs(model, *pair, temperature) for model in (ours, theirs))
        rows.append((*both, -(p * p.log()).sum(-1)))
    return rows


def gradients(trainer: PPOTrainer, call: Callable[[], Any]) -> Tensors:
    """The gradient that a call leaves in policy and value, and nothing else does."""
    trainer.roles.zero_grad(set_to_none=True)
    call()
    return {name: p.grad.clone() for name, p in trainer.roles.trainable_parameters() if p.grad is not None}


def loss_gradients(trainer: PPOTrainer, trajectory: Trajectory, minibatch: list[torch.Tensor]) -> Tensors:
    return gradients(trainer, lambda: trainer.accumulate_gradient(trajectory, minibatch))


def naive_gradients(path: str, pairs: Pairs, loss: Callable[..., torch.Tensor]) -> tuple[float, Tensors]:
    """The mean over tokens of loss(logits, ids), and its gradient in a policy that is loaded alone, row by row."""
    alone = models.load_causal(path, trainable=True).eval()
    total = torch.zeros(())
    for prompt, completion in pairs:
        logits = alone(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        total = total + loss(logits, torch.tensor(completion))
    mean = total / sum(len(completion) for _, completion in pairs)
    mean.backward()
    found = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    return mean.item(), {f"policy.{name}".replace(".default.", ".policy."): g for name, g in found.items()}


def weights(trainer: PPOTrainer) -> Tensors:
    return {name: p.detach().clone() for name, p in trainer.roles.trainable_parameters()}


def same(a: Tensors, b: Tensors) -> bool:
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[name], b[name]) for name in a)


def close(a: Tensors, b: Tensors, relative: float) -> None:
    """Within `relative` of each tensor's largest entry; fp32 leaves 1e-6 of the largest of all where terms cancel."""
    assert a.keys() <= b.keys() and a
    floor = 1e-6 * max(tensor.abs().max().item() for tensor in a.values())
    for name in a:
        assert (a[name] - b[name]).abs().max() <= relative * a[name].abs().max() + floor, name


def updates(trainer: PPOTrainer) -> list[dict[str, float]]:
    """What is logged of each update, but for the seconds."""
    rows = [row for row in trainer.state.log_history if "loss" in row]
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


class Steps(TrainerCallback):
    """Notes the gradient norm of each optimizer step that changes something."""

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.norms: list[float] = []
        optimizer.optimizer.register_step_pre_hook(self.record)

    def record(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        given = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if given:
            self.norms.append(torch.nn.utils.get_total_norm(given).item())


# --- log-probs, rewards and masks -----------------------------------------------------------------------------------


def test_every_number_of_a_rollout_equals_loops_over_the_real_tokens(zoo: Zoo, scored: Any) -> None:
    """With gamma = lambda = 1 the first return is the sum of the rewards: score - kl_coef * KL."""
    trainer, trajectory, _, metrics, mode = scored
    pairs, real = pairs_of(trajectory.tokens), trajectory.tokens.completion_mask.bool()
    tokenizer = trainer.processing_class
    assert [prompt for prompt, _ in pairs] == [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert EOS in pairs[4][0][1:]  # an EOS inside a prompt is attended as any other token
    rows = naive(zoo[mode], zoo[f"{mode}-other"], pairs, 0.8)
    for row, (ours, theirs, _) in enumerate(rows):
        assert torch.allclose(trajectory.logprobs[row, : len(ours)], ours, atol=CLOSE)
        assert torch.allclose(trajectory.reference_logprobs[row, : len(ours)], theirs, atol=CLOSE)
    assert all((part[~real] == 0).all() for part in trajectory[1:] if part.dim() == 2)

    completions = [completion for _, completion in pairs]
    unfinished = [completion[-1] != EOS for completion in completions]
    assert True in unfinished and False in unfinished and all(EOS not in y[:-1] for y in completions)
    rewards = vowels([], [tokenizer.decode([token for token in y if token > 1]) for y in completions])
    scores = [r - 0.5 * cut for r, cut in zip(rewards, unfinished, strict=True)]  # the penalty, on these rows only
    assert trajectory.scores.tolist() == pytest.approx(scores, abs=1e-6)
    kls = [(ours - theirs).sum().item() for ours, theirs, _ in rows]
    objectives = [score - 0.2 * kl for score, kl in zip(scores, kls, strict=True)]
    assert trajectory.returns[:, 0].tolist() == pytest.approx(objectives, abs=1e-4)
    values, returns = trajectory.values[real], trajectory.returns[real]
    expected = {
        "reward": sum(rewards) / 8,
        "kl": sum(kls) / 8,
        "objective": sum(objectives) / 8,
        "entropy": torch.cat([entropies for _, _, entropies in rows]).mean().item(),
        "completion_length": sum(map(len, completions)) / 8,
        "unfinished": sum(unfinished) / 8,
        "kl_coef": 0.2,
        "explained_variance": 1 - ((returns - values).var() / returns.var()).item(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)
    frame = trainer.samples  # the last rollouts can be read as a frame
    assert list(frame["prompt"]) == PROMPTS and list(frame["finished"]) == [not cut for cut in unfinished]
    assert frame["kl"].tolist() == pytest.approx(kls, abs=1e-4) and frame["n_tokens"].tolist() == real.sum(1).tolist()


def test_tokens_after_eos_get_no_gradient(scored: Any) -> None:
    """Whatever stands behind an EOS: gradients are equal to the last bit."""
    trainer, trajectory, minibatches, *_ = scored
    garbage, behind = trajectory.tokens.input_ids.clone(), trajectory.tokens.completion_mask == 0
    assert behind.any()
    garbage[:, -behind.shape[1] :][behind] = 444
    other = trajectory._replace(tokens=trajectory.tokens._replace(input_ids=garbage))
    for minibatch in minibatches:
        assert same(loss_gradients(trainer, trajectory, minibatch), loss_gradients(trainer, other, minibatch))


def test_an_empty_completion_is_valid(scored: Any) -> None:
    trainer = scored[0]
    tokens = layout([([300, 301], [EOS]), ([302], [303, 304, EOS]), ([305], [EOS])], 1, [EOS])
    trajectory, metrics = trainer.make_trajectory(rows_of(PROMPTS[:3]), tokens, [[torch.arange(3)]])
    assert trajectory.tokens.completion_mask.sum(1).tolist() == [1, 3, 1] and metrics["unfinished"] == 0
    expected = trajectory.scores[0] - 0.2 * (trajectory.logprobs[0, 0] - trajectory.reference_logprobs[0, 0])
    assert trajectory.returns[0].tolist() == pytest.approx([expected.item(), 0, 0], abs=1e-6)
    found = loss_gradients(trainer, trajectory, [torch.tensor([0, 2])])
    assert found and all(gradient.isfinite().all() for gradient in found.values())


def test_pad_equal_to_eos_and_several_stop_tokens(zoo: Zoo, tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(zoo["words"])
    tokenizer.pad_token = tokenizer.eos_token
    trainer = make(zoo, "words", tmp_path, prompts=["a c", "b d e", "a"] * 8, processing_class=tokenizer)
    trainer.stop_ids = trainer.policy.generation_config.eos_token_id = [EOS, 10]
    trajectory, _, metrics = rolled_out(trainer)
    completions = [completion for _, completion in pairs_of(trajectory.tokens)]
    assert {completion[-1] for completion in completions} >= {EOS, 10}
    assert all(not {EOS, 10} & set(completion[:-1]) for completion in completions)
    cut = [completion[-1] not in (EOS, 10) for completion in completions]
    assert all(len(completion) == 6 for completion, unfinished in zip(completions, cut, strict=True) if unfinished)
    assert metrics["unfinished"] == pytest.approx(sum(cut) / len(cut))
    # The EOS is trained although it is the pad token: its log-prob moves with the gradient.
    ended = next(row for row, completion in enumerate(completions) if completion[-1] == EOS)
    only = torch.zeros_like(trajectory.advantages)
    only[ended, len(completions[ended]) - 1] = 1.0
    found = loss_gradients(trainer, trajectory._replace(advantages=only), [torch.tensor([ended])])
    assert found["policy.lm_head.weight"][EOS].abs().max() > 0


# --- the loss --------------------------------------------------------------------------------------------------------


def test_losses_and_approximate_kl_on_hand_numbers(scored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ratio 2 or 1/2, every value one below its return: k3 = r - 1 - log r, clip fraction 1, losses by hand."""
    trainer, trajectory, minibatches, *_ = scored
    monkeypatch.setattr(trainer.args, "entropy_coef", 0.0)
    mask = trajectory.tokens.completion_mask
    one = trajectory._replace(advantages=mask.float(), returns=(trajectory.values + 1) * mask)
    for ratio, advantage, surrogate in ((2.0, 1.0, -1.2), (2.0, -1.0, 2.0), (0.5, 1.0, -0.5), (0.5, -1.0, 0.8)):
        old = (trajectory.logprobs - math.log(ratio)) * mask
        t = one._replace(logprobs=old, advantages=advantage * one.advantages)
        totals = trainer.accumulate_gradient(t, minibatches[0]).tolist()
        expected = [surrogate + 0.1 * 0.5, surrogate, 0.5, ratio - 1 - math.log(ratio), 1.0, abs(ratio - 1)]
        assert totals == pytest.approx(expected, abs=1e-4)
    moved = trajectory._replace(logprobs=(trajectory.logprobs + 1e-4 * torch.randn(mask.shape)) * mask)
    assert trainer.accumulate_gradient(moved, minibatches[0])[3] > 0  # k3 is never negative


def test_loss_and_gradient_depend_neither_on_the_micro_batches_nor_on_padding(scored: Any) -> None:
    trainer, narrow, _, metrics, _ = scored
    wide_tokens = layout(pairs_of(narrow.tokens), pad=1, stops=[EOS], left=4, right=5)
    wide, wide_metrics = trainer.make_trajectory(rows_of(PROMPTS), wide_tokens, [ALL])
    assert wide_metrics == pytest.approx(metrics, abs=1e-5)
    rows = torch.tensor([5, 0, 7, 2, 3])
    assert len(set(narrow.tokens.completion_mask.sum(1)[rows].tolist())) > 1
    found, totals = loss_gradients(trainer, narrow, [rows]), trainer.accumulate_gradient(narrow, [rows])[:5]
    for trajectory, size, relative in ((narrow, 1, 2e-5), (narrow, 2, 2e-5), (wide, 5, 1e-4)):
        cut = list(rows.split(size))
        close(found, loss_gradients(trainer, trajectory, cut), relative)
        assert torch.allclose(trainer.accumulate_gradient(trajectory, cut)[:5], totals, atol=relative / 20)


def test_the_entropy_bonus_is_the_gradient_of_the_mean_token_entropy(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, entropy_coef=0.7, vf_coef=0.0)
    trajectory, _, _ = rolled_out(trainer)
    flat = trajectory._replace(advantages=torch.zeros_like(trajectory.advantages))

    def negative_entropy(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return 0.7 * (logits.softmax(-1) * logits.log_softmax(-1)).sum()

    _, expected = naive_gradients(zoo["full"], pairs_of(trajectory.tokens), negative_entropy)
    close(expected, loss_gradients(trainer, flat, ALL), relative=1e-4)


def test_the_ptx_gradient_is_the_gradient_of_the_demonstrations_nll(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path, ptx_coef=0.3, ptx_dataset=DEMONSTRATIONS, micro_batch_size=2, temperature=0.5)
    torch.manual_seed(5)
    drawn = torch.randint(3, (5,)).tolist()
    assert len(set(drawn)) > 1
    encoded = [[trainer.processing_class(t)["input_ids"] for t in DEMONSTRATIONS[row].values()] for row in drawn]

    def nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return 0.3 * torch.nn.functional.cross_entropy(logits, ids, reduction="sum")

    mean, expected = naive_gradients(zoo[mode], [(x, [*y, EOS]) for x, y in encoded], nll)
    torch.manual_seed(5)
    close(expected, gradients(trainer, lambda: trainer.accumulate_ptx_gradient(5)), relative=1e-4)

    # The gradient and the loss of a minibatch of as many rows are its own and these.
    trajectory, _, _ = rolled_out(trainer)
    losses, found = [], []
    for trainer.args.ptx_coef in (0.3, 0.0):
        torch.manual_seed(5)
        found.append(loss_gradients(trainer, trajectory, [torch.arange(3), torch.arange(3, 5)]))
        torch.manual_seed(5)
        losses.append(trainer.accumulate_gradient(trajectory, [torch.arange(3), torch.arange(3, 5)])[0].item())
    assert losses[0] - losses[1] == pytest.approx(mean, abs=1e-5)
    close(expected, {name: found[0][name] - found[1][name] for name in expected}, relative=1e-3)


# --- the optimizer ---------------------------------------------------------------------------------------------------


@FULL_AND_LORA
def test_every_optimizer_step_is_counted_and_clipped(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    for norm, made in ((1e9, 1), (0.05, 2)):
        steps = Steps()
        sizes = {"max_steps": made, "ppo_epochs": 2, "num_minibatches": 3}
        trainer = make(zoo, mode, tmp_path, callbacks=[steps], max_grad_norm=norm, **sizes)
        trainer.train()
        assert len(steps.norms) == made * 2 * 3 and [row["minibatches"] for row in updates(trainer)] == [6] * made
        assert min(steps.norms) > 0.1 if norm > 1 else steps.norms == pytest.approx([0.05] * 12, rel=1e-3)


@pytest.mark.parametrize(
    ("mode", "checkpointing"),
    [
        ("full", "off"), ("full", "not reentrant"), ("lora", "off"), ("lora", "reentrant"), ("lora", "not reentrant"),
        ("4bit", "off"), ("4bit", "reentrant"),
    ],
)  # fmt: skip
def test_the_first_ratio_is_one_and_the_frozen_stay(zoo: Zoo, mode: str, checkpointing: str, tmp_path: Path) -> None:
    way: dict[str, Any] = {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"}}
    way |= {"gradient_checkpointing": checkpointing != "off", "temperature": 0.8, "num_minibatches": 1}
    trainer = make(zoo, mode, tmp_path, max_steps=1, **way)
    trainable = weights(trainer)
    learning = {id(p) for p in trainer.roles.learning}
    frozen = [(p, p.detach().clone()) for p in trainer.roles.parameters() if id(p) not in learning]
    frozen += [(b, b.detach().clone()) for b in trainer.roles.buffers()]
    assert frozen
    trainer.train()
    recomputing = [m for m in trainer.roles.modules() if getattr(m, "gradient_checkpointing", False)]
    assert bool(recomputing) == (checkpointing != "off")
    [update] = updates(trainer)
    assert update["kl"] == 0.0  # the reference is the policy's start
    assert update["first_ratio_deviation"] < 1e-6 and update["approx_kl"] > 1e-8  # and it moves after that
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


# --- the system ------------------------------------------------------------------------------------------------------

EVERYTHING: dict[str, Any] = {
    "adaptive_kl_target": 0.02, "kl_horizon": 40, "entropy_coef": 0.01, "ptx_coef": 0.1, "ptx_dataset": DEMONSTRATIONS,
    "lr_scheduler_type": "cosine", "warmup_steps": 2, "per_device_train_batch_size": 4,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "k"), [("full", 1), ("lora", 1), ("4bit", 2)])
def test_resume_is_bit_exact_with_the_uninterrupted_run(zoo: Zoo, mode: str, k: int, tmp_path: Path) -> None:
    """In the middle (k = 1) and at the end (k = 2) of an epoch of the prompts."""
    settings = EVERYTHING | {"max_steps": k + 1}
    whole = make(zoo, mode, tmp_path / "run", **settings, save_strategy="steps", save_steps=k)
    whole.train()
    resumed = make(zoo, mode, tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{k}"))
    assert same(weights(whole), weights(resumed))
    assert updates(resumed) == updates(whole) and len(updates(whole)) == k + 1
    assert resumed.kl_coef == whole.kl_coef != PPOConfig.kl_coef
    states = [t.optimizer.state_dict()["state"] for t in (whole, resumed)]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])


@FULL_AND_LORA
def test_only_a_whole_checkpoint_of_the_same_run_is_resumed_from(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "ppo_epochs": 1, "max_steps": 2}
    out = tmp_path / "out"
    make(zoo, mode, out, **settings).train()
    last, resumed = out / "checkpoint-2", make(zoo, mode, out, **settings, logging_steps=2, micro_batch_size=8)
    names = {path.relative_to(last) for path in last.rglob("*.*")}
    weights = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    assert {Path("optimizer.pt"), Path("rng_state.pth"), Path(weights), Path("value") / weights} < names
    for name in names:
        content = (last / name).read_bytes()
        for broken in (None, content[: len(content) // 2]):
            (last / name).unlink() if broken is None else (last / name).write_bytes(broken)
            says = f"checkpoint-2 cannot be resumed from: .*({name}|has lost its end|line 1)"
            with pytest.raises(ValueError, match=says):
                resumed.train(resume_from_checkpoint=str(last))
        with pytest.warns(UserWarning, match="checkpoint-2 is passed over"):
            assert resumed.checkpoint(True) == str(out / "checkpoint-1")
        (last / name).write_bytes(content)
    assert resumed.checkpoint(True) == str(last)
    for others, says in (
        ({"learning_rate": 2e-3}, r"learning_rate is 0.001 there and 0.002 here"),
        ({"max_steps": 3}, "max_steps is 2 there and 3 here"),
        ({"prompts": PROMPTS[::-1]}, "train_dataset is .* there"),
        ({"reward": RewardModel(zoo[f"{mode}-reward"])}, r"reward is \['vowels'\] there"),
        ({"ref_model": zoo[f"{mode}-other"]}, "ref_model is"),
    ):
        with pytest.raises(ValueError, match=f"checkpoint-2 cannot be resumed from: it belongs .*{says}"):
            make(zoo, mode, out, **settings | others).train(resume_from_checkpoint=True)
    light = make(zoo, mode, tmp_path / "light", **settings, save_only_model=True)
    light.train()
    with pytest.raises(ValueError, match="checkpoint-2 cannot be resumed from: .*save_only_model"):
        light.train(resume_from_checkpoint=str(tmp_path / "light" / "checkpoint-2"))


def test_a_run_killed_while_old_checkpoints_go_is_resumed(zoo: Zoo, tmp_path: Path, monkeypatch: Any) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_kit.ppo.trainer.rotate_checkpoints", killed)
    trainer = make(zoo, "full", tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1, ppo_epochs=1)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.checkpoint(True).endswith("checkpoint-1")
    monkeypatch.undo()
    trainer.train(resume_from_checkpoint=True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


@FULL_AND_LORA
def test_what_is_saved_is_what_was_trained(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    trainer = make(zoo, mode, tmp_path)
    before, save = weights(trainer), trainer.roles.save
    trainer.save_model()  # as it is, all is well

    def spoilt(out: Path) -> None:
        save(out)
        [file] = (out / folder).glob("*model.safetensors")
        tensors = load_file(file)
        tensors[max(tensors)].mul_(1.001)
        save_file(tensors, file, {"format": "pt"})

    for folder in (".", "value", None):  # None: another tokenizer is written
        trainer.roles.save = save if folder is None else spoilt
        if folder is None:
            trainer.processing_class.save_pretrained = word_tokenizer().save_pretrained
        with pytest.raises(models.ModelError, match="read again are not those that were trained"):
            trainer.save_model()
        assert same(before, weights(trainer))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(zoo: Zoo, tmp_path: Path) -> None:
    """A new adapter is drawn from the seed too, and starts as the identity."""
    runs = []
    for seed, lora in ((3, {"r": 4}), (3, models.lora_config({"r": 4})), (4, {"r": 4})):
        torch.manual_seed(len(runs))  # whatever happened before
        settings = EVERYTHING | {"max_steps": 1, "warmup_steps": 0, "lora": lora, "value_model": None}
        trainer = make(zoo, "full", tmp_path, **settings, seed=seed)
        start = weights(trainer)
        torch.rand(1 + len(runs))  # and in between
        trainer.train()
        assert updates(trainer)[0]["kl"] == 0.0
        runs.append((start, weights(trainer), updates(trainer)))
    assert same(runs[0][0], runs[1][0]) and same(runs[0][1], runs[1][1]) and runs[0][2] == runs[1][2]
    assert not same(runs[0][0], runs[2][0]) and not same(runs[0][1], runs[2][1])


@FULL_AND_LORA
def test_evaluation_changes_nothing_and_its_means_are_over_rows_and_tokens(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    """Against loops over all completions, drawn in batches of unequal size."""
    few: dict[str, Any] = {"eval_dataset": Dataset.from_list(rows_of(PROMPTS[:5])), "per_device_eval_batch_size": 3}
    few |= {"ppo_epochs": 1, "num_minibatches": 1, "ref_model": zoo[f"{mode}-other"]}
    quiet = make(zoo, mode, tmp_path, **few)
    sampled, rollout = [], quiet.rollout
    quiet.rollout = lambda rows: sampled.append(rollout(rows)) or sampled[-1]
    quiet.roles.train()
    state, before = torch.get_rng_state(), weights(quiet)
    first = quiet.evaluate()
    assert torch.equal(state, torch.get_rng_state()) and same(before, weights(quiet)) and quiet.roles.training
    pairs = [pair for tokens in sampled for pair in pairs_of(tokens)]
    rows = naive(zoo[mode], zoo[f"{mode}-other"], pairs, 1.0)
    entropies = torch.cat([entropies for _, _, entropies in rows])
    kl = sum((ours - theirs).sum().item() for ours, theirs, _ in rows) / 5
    expected = {"eval_kl": kl, "eval_entropy": entropies.mean().item(), "eval_completion_length": len(entropies) / 5}
    assert {name: first[name] for name in expected} == pytest.approx(expected, abs=1e-4)

    torch.manual_seed(99)
    assert quiet.evaluate() == first  # the same random numbers each time
    quiet.train()
    evaluated = make(zoo, mode, tmp_path, eval_strategy="steps", eval_steps=1, **few)
    evaluated.train()
    assert len([row for row in evaluated.state.log_history if "eval_reward" in row]) == 2
    assert same(weights(quiet), weights(evaluated)) and updates(quiet) == updates(evaluated)
    assert quiet.samples.equals(evaluated.samples)  # those of the last update, not of the evaluation after it


def test_the_best_checkpoint_is_loaded_at_the_end(zoo: Zoo, tmp_path: Path) -> None:
    evaluations = iter([1.0, 3.0, 2.0])

    def rising_then_falling(prompts: list[str], completions: list[str], number: list[int], **_: Any) -> list[float]:
        return [next(evaluations)] if number == [-1] else vowels(prompts, completions)  # -1: the evaluation row

    settings: dict[str, Any] = {"eval_dataset": Dataset.from_list([{"prompt": PROMPTS[0], "number": -1}])}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "ppo_epochs": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_reward", "max_steps": 3}
    trainer = make(zoo, "full", tmp_path, reward=rising_then_falling, greater_is_better=True, **settings)
    trainer.train()
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2") and trainer.state.best_metric == 3.0
    now = weights(trainer)
    for step, best in ((2, True), (3, False)):
        trainer.roles.load(tmp_path / f"checkpoint-{step}")
        assert same(now, weights(trainer)) == best


def test_the_saved_generation_config_has_eos_although_the_model_had_none(zoo: Zoo, tmp_path: Path) -> None:
    base = models.load_causal(zoo["words"])
    base.generation_config.eos_token_id = base.config.eos_token_id = None
    base.save_pretrained(tmp_path / "mute")
    word_tokenizer().save_pretrained(tmp_path / "mute")
    assert not json.loads((tmp_path / "mute" / "generation_config.json").read_text()).get("eos_token_id")
    trainer = make({"mute": str(tmp_path / "mute")}, "mute", tmp_path / "out", prompts=["a c", "b"] * 4)
    assert any(completion[-1] == EOS for _, completion in pairs_of(rolled_out(trainer)[0].tokens))
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] in (EOS, [EOS])


def test_a_reward_model_with_another_tokenizer_scores_the_text_the_same(zoo: Zoo, tmp_path: Path) -> None:
    """The reward model has the words' tokenizer, the policy pocket's: the rewards are those of the texts."""
    reward = RewardModel(save_reward(tmp_path / "reward", zoo["words"], word_tokenizer()))
    trainer = make(zoo, "full", tmp_path, reward=reward, value_model=None, missing_eos_penalty=0.0)
    trajectory, _, _ = rolled_out(trainer)
    tokenizer = trainer.processing_class
    texts = [tokenizer.decode([token for token in y if token > 1]) for _, y in pairs_of(trajectory.tokens)]
    alone = [reward([x], [y])[0] for x, y in zip(PROMPTS, texts, strict=True)]
    assert trajectory.scores.tolist() == pytest.approx(alone, abs=1e-4)
    assert (trajectory.values == 0).all()  # a value model cannot start from another vocabulary


def test_values_start_from_a_reward_model_that_fits(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    reward = zoo[f"{mode}-reward"]
    given, _, _ = rolled_out(make(zoo, mode, tmp_path, reward=reward, value_model=None))  # as a directory
    explicit, _, _ = rolled_out(make(zoo, mode, tmp_path, value_model=reward))
    assert torch.equal(given.tokens.input_ids, explicit.tokens.input_ids)
    assert torch.equal(given.values, explicit.values) and given.values.abs().max() > 0.1


def test_rewards_get_the_other_columns_and_chat_prompts_give_the_same_run(zoo: Zoo, tmp_path: Path) -> None:
    heard: list[tuple[Any, Any, Any]] = []

    def listening(prompts: list[Any], completions: list[Any], number: list[int], **columns: Any) -> list[float]:
        heard.append((prompts, completions, number))
        return vowels(prompts, completions)

    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    text, chat = (make(zoo, "full", tmp_path, reward=listening, prompts=p, max_steps=1) for p in (PROMPTS, chats))
    text.train()
    chat.train()
    (text_prompts, texts, numbers), (chat_prompts, replies, chat_numbers) = heard
    assert [PROMPTS[number] for number in numbers] == text_prompts and numbers == chat_numbers
    assert chat_prompts == [[{"role": "user", "content": prompt}] for prompt in text_prompts]
    assert replies == [[{"role": "assistant", "content": completion}] for completion in texts]
    assert same(weights(text), weights(chat))


@pytest.mark.slow
def test_a_policy_paid_for_one_word_sets_the_alarms_off(zoo: Zoo, tmp_path: Path, capsys: Any) -> None:
    settings: dict[str, Any] = {"kl_coef": 0.0, "missing_eos_penalty": 0.0, "max_steps": 8, "learning_rate": 1e-2}
    settings |= {"max_completion_length": 12, "ppo_epochs": 4, "micro_batch_size": 16, "num_minibatches": 1}
    settings |= {"per_device_train_batch_size": 16, "value_model": None}

    def pays_for_one_word(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        return [float(text.split().count("c")) for text in completions]

    trainer = make(zoo, "words", tmp_path, pays_for_one_word, ["a", "b"] * 8, **settings)
    trainer.train()
    assert len(trainer.samples) == 16
    raised = {row["alarm"] for row in trainer.state.log_history if "alarm" in row}
    assert {"kl", "entropy", "repetition", "unfinished"} <= raised
    printed = capsys.readouterr().out.splitlines()
    [repeating] = [i for i, line in enumerate(printed) if "repeat themselves" in line]
    assert printed[repeating].startswith("  PPO alarm at update") and "c c c c c" in printed[repeating + 1]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_gradient_that_is_not_finite_is_not_applied(zoo: Zoo, tmp_path: Path, what: str) -> None:
    class Break(TrainerCallback):
        """Spoils the value head, or only its gradient, after the first update."""

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if what == "loss":
                model.value_head.weight.data.fill_(math.inf)
            else:
                model.value_head.weight.register_hook(lambda gradient: gradient / 0)

    settings = {"save_strategy": "steps", "save_steps": 1, "ppo_epochs": 1, "num_minibatches": 1}
    trainer = make(zoo, "full", tmp_path, callbacks=[Break()], **settings)
    with pytest.raises(FloatingPointError, match="update 2 has a loss of .*not applied.*checkpoint-1$"):
        trainer.train()
    assert what == "loss" or all(p.isfinite().all() for p in trainer.roles.parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eval_dataset": Dataset.from_dict({"query": ["a"]})}, "eval_dataset: no column 'prompt'; it has 'query'"),
        ({"ptx_coef": 0.1, "ptx_dataset": Dataset.from_dict({"prompt": ["a"]})}, "ptx_dataset: no column 'completion'"),
        ({"ptx_coef": 0.1}, "go together"),
        ({"prompts": ["why ?", " \n"]}, "train_dataset, row 1 .*: the prompt is empty"),
        ({"prompts": ["why ?", "why ?" * 30]}, "row 1 .* the prompt is of 120 tokens, and 58"),
        ({"eval_dataset": {"a": Dataset.from_dict({"prompt": ["a"]})}}, "eval_dataset: is a dict; give one"),
        ({"load_in_4bit": True}, "4-bit weights cannot be trained"),
    ],
)
def test_what_does_not_fit_is_refused(zoo: Zoo, tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make(zoo, "full", tmp_path, **settings)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):  # before it looks for the model
        make(zoo | {"full": "absent"}, "full", tmp_path / "file")


def test_rewards_that_are_not_finite_and_evaluation_without_prompts_are_refused(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, lambda prompts, completions, **_: [math.nan, *[0.0] * 7])
    with pytest.raises(ValueError, match="1 of them not finite"):
        trainer.train()
    with pytest.raises(ValueError, match="no eval_dataset"):
        trainer.evaluate()
