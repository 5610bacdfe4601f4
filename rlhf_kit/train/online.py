"""Methods that learn from the model's own samples and their rewards: RLOO, GRPO and best-of-n fine-tuning."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig

from rlhf_kit import sampling
from rlhf_kit.models import Model, ModelError, ModelPath, check_positions, encode_prompts, stop_ids, switch_off_dropout
from rlhf_kit.rewards import Reward, RewardModel, checked
from rlhf_kit.train.offline import fit_demonstrations
from rlhf_kit.train.stage import exact_start, fit, partial, policy_start, prepare, publish, watched

SAMPLES = "samples.parquet"
# PPOConfig's values under TRL's names, so that only the methods differ; a batch is 16 prompts, 4 completions of each.
LIKE_PPO: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "num_generations": 4,
    "max_completion_length": 64,
    "temperature": 1.0,
    "beta": 0.1,
    "epsilon": 0.2,
    "learning_rate": 1e-5,
    "adam_epsilon": 1e-5,
    "logging_steps": 1,
    "disable_dropout": True,
}


def rloo(
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    out: ModelPath,
    missing_eos_penalty: float = 1.0,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """REINFORCE whose baseline is the mean reward of the prompt's other completions (RLOO, 2402.14740).

    Maximises PPO's objective E[r - missing_eos_penalty * unfinished - beta * log(pi / pi_ref)], pi_ref being `model`,
    by the clipped ratio of whole completions. `per_device_train_batch_size` counts completions, `max_steps` optimizer
    steps; the logged `reward` has the penalty taken off, `rewards/score/mean` has not, `kl` is a mean over tokens.
    Raises ValueError where the prompts are too few or too long, or `model` counts positions from its padding.
    """
    args = (model, reward, prompts, out, missing_eos_penalty, lora, load_in_4bit, seed, callbacks, settings)
    return _on_policy("RLOO", RLOOTrainer, RLOOConfig, *args)


def grpo(
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    out: ModelPath,
    missing_eos_penalty: float = 1.0,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Group-relative policy optimisation (2402.03300, eq. 3): advantages are rewards whitened within each prompt.

    As `rloo`, except that beta weighs a KL in the loss of each token (k3 estimator), against rewards in units of their
    spread within a prompt: the same number means more or less than in PPO. The loss is a mean over the batch's tokens
    (TRL's `loss_type="dapo"`; `"grpo"` is the paper's mean of each completion's mean).
    """
    args = (model, reward, prompts, out, missing_eos_penalty, lora, load_in_4bit, seed, callbacks, settings)
    return _on_policy("GRPO", GRPOTrainer, GRPOConfig, *args)


def rejection_sampling(
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    out: ModelPath,
    n: int = 8,
    temperature: float = 1.0,
    max_completion_length: int = 64,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Fine-tune on the best of `n` own completions of each prompt (2307.09288, section 3.2.3; RAFT, 2304.06767).

    Chosen among those that ended, for SFT teaches an end; they lie beside the weights in samples.parquet with their
    `reward`. A prompt whose completions all ran on is left out with a warning; ValueError where that is every prompt.
    """
    _need_prompts(prompts)
    prepare(model, out, SFTConfig, lora, seed, settings)  # what is refused is refused before the sampling
    chosen = _best(model, reward, prompts, n, temperature, max_completion_length, seed, load_in_4bit)
    is_text = isinstance(chosen["prompt"][0], str)
    demonstrations = [
        {"prompt": prompt, "completion": text if is_text else [{"role": "assistant", "content": text}]}
        for prompt, text in zip(chosen["prompt"], chosen["completion"], strict=True)
    ]
    rows = Dataset.from_list(demonstrations)
    fit_demonstrations("rejection sampling", model, rows, out, lora, load_in_4bit, seed, callbacks, settings)
    chosen.to_parquet(partial(out) / SAMPLES)
    return publish(out)


def _best(
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    n: int,
    temperature: float,
    max_completion_length: int,
    seed: int,
    load_in_4bit: bool | None,
) -> pd.DataFrame:
    """The finished completion with the highest reward of each prompt, as `sampling.sample` describes it."""
    samples = sampling.sample(
        model,
        prompts,
        n=n,
        temperature=temperature,
        max_completion_length=max_completion_length,
        seed=seed,
        load_in_4bit=load_in_4bit,
    )
    ended = samples[samples["finished"]].reset_index(drop=True)
    if missing := len(prompts) - ended["prompt_id"].nunique():
        problem = f"of {missing} of {len(prompts)} prompts no completion ended in {max_completion_length} tokens"
        if ended.empty:
            raise ValueError(f"rejection_sampling: {problem}; raise max_completion_length")
        warnings.warn(f"rejection_sampling: {problem}; these prompts are left out", stacklevel=3)
    score = reward if callable(reward) else RewardModel(reward)
    scored = sampling.add_rewards(ended, {"reward": score})
    checked(scored["reward"].tolist(), len(scored))
    return sampling.best_of_n(scored, "reward")


def _on_policy(
    label: str,
    trainer_class: type[Any],
    config: type[Any],
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    out: ModelPath,
    missing_eos_penalty: float,
    lora: LoraConfig | None,
    load_in_4bit: bool | None,
    seed: int,
    callbacks: list[TrainerCallback] | None,
    settings: dict[str, Any],
) -> str:
    """Train by TRL's RLOO or GRPO trainer."""
    _need_prompts(prompts)
    weights = {"reward_weights": [1.0, -missing_eos_penalty]}
    tokenizer, args = prepare(model, out, config, lora, seed, {**LIKE_PPO, **weights, **settings})
    tokenizer.padding_side = "left"
    if len(prompts) < (needed := args.generation_batch_size // args.num_generations):
        raise ValueError(
            f"{label}: {len(prompts)} prompts are fewer than the {needed} of one batch (per_device_train_batch_size / "
            "num_generations); lower the first, raise the second or give more prompts"
        )
    start = policy_start(model, lora, load_in_4bit)
    exact = exact_start(start)
    learned = reward if callable(reward) else RewardModel(reward)
    columns = [name for name in prompts.column_names if name != "prompt"]

    # TRL calls rewards with more than a reward function here knows of, and reads NaN as "not applicable".
    def score(prompts: list[Any], completions: list[Any], **given: Any) -> list[float]:
        known = {name: given[name] for name in columns if name in given}  # TRL itself drops a column `completion`
        return checked(learned(prompts, completions, **known), len(prompts)).tolist()

    def unfinished(completion_ids: list[list[int]], **given: Any) -> list[float]:
        return [float(ids[-1] not in stops) for ids in completion_ids]

    trainer = trainer_class(
        model=start,
        reward_funcs=[score, unfinished],
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
        peft_config=deepcopy(lora),
        callbacks=watched(label, callbacks),
    )
    stops = stop_ids(trainer.model, tokenizer)
    trainer.model.generation_config.eos_token_id = stops  # what is saved must know where to stop
    if args.disable_dropout:
        switch_off_dropout(trainer.model)  # TRL's own leaves out attention
    longest = max(map(len, encode_prompts(tokenizer, prompts["prompt"][:])))
    check_positions(trainer.model, longest, args.max_completion_length)
    _refuse_absolute_positions(model, trainer.model, tokenizer)
    fit(trainer, out, exact)
    return publish(out)


def _need_prompts(prompts: Dataset) -> None:
    if "prompt" not in prompts.column_names:
        raise ValueError(f"prompts: no column 'prompt'; it has {', '.join(prompts.column_names)}")


@torch.no_grad()
def _refuse_absolute_positions(path: ModelPath, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """TRL pads prompts on the left without saying where they start: only models of relative positions read them right.

    Told apart by what a prompt's padding does to the next token's logits.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(4, device=model.device)[None]
    padded = torch.cat([torch.full_like(ids, tokenizer.pad_token_id), ids], dim=1)
    mask = torch.cat([torch.zeros_like(ids), torch.ones_like(ids)], dim=1)
    alone, shifted = model(input_ids=ids).logits[0, -1], model(input_ids=padded, attention_mask=mask).logits[0, -1]
    model.train(was_training)
    if (alone - shifted).abs().max() > 0.1 * alone.std():
        raise ModelError(
            f"{path}: counts positions from the start of the padding (as GPT-2 does), and TRL's RLOO and GRPO would "
            "train on misread prompts; use a model with rotary positions, or PPOTrainer"
        )
