"""Methods that learn from the model's own samples and their rewards: RLOO, GRPO and best-of-n fine-tuning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from rlhf_kit import models, sampling
from rlhf_kit.files import replacing
from rlhf_kit.models import Lora, Model, ModelPath
from rlhf_kit.rewards import Reward, RewardModel, checked
from rlhf_kit.train.common import Request, fit, make_trainer, prepare
from rlhf_kit.train.offline import fit_texts

# PPOConfig's values under TRL's names, so that only the methods differ; a batch is 16 prompts, 4 completions of each.
LIKE_PPO: dict[str, Any] = {
    "per_device_train_batch_size": 64,
    "num_generations": 4,
    "max_completion_length": models.MAX_COMPLETION_LENGTH,
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
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """REINFORCE whose baseline is the mean reward of the prompt's other completions (RLOO, 2402.14740).

    Maximises PPO's objective E[r - missing_eos_penalty * unfinished - beta * log(pi / pi_ref)] by the clipped ratio of
    whole completions; pi_ref is `model`. `per_device_train_batch_size` counts completions, `max_steps` counts optimizer
    steps. The logged `reward` has the penalty taken off, `rewards/score/mean` has not; `kl` is a mean over tokens.
    Raises ValueError if the prompts are too few or too long, ModelError if `model` counts positions from its padding.
    """
    request = Request("RLOO", model, out, lora, load_in_4bit, seed, callbacks, settings)
    return _on_policy(RLOOTrainer, RLOOConfig, request, reward, prompts, missing_eos_penalty)


def grpo(
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    out: ModelPath,
    missing_eos_penalty: float = 1.0,
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Group-relative policy optimisation (2402.03300, eq. 3): advantages are rewards whitened within each prompt.

    As `rloo`, but beta weighs a KL in the loss of each token (k3 estimator), and rewards are divided by their spread
    within a prompt: the same number means more or less than in PPO. The loss is a mean over the batch's tokens (TRL's
    `loss_type="dapo"`; `"grpo"` is the paper's mean of each completion's mean).
    """
    request = Request("GRPO", model, out, lora, load_in_4bit, seed, callbacks, settings)
    return _on_policy(GRPOTrainer, GRPOConfig, request, reward, prompts, missing_eos_penalty)


def rejection_sampling(
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    out: ModelPath,
    n: int = 8,
    temperature: float = 1.0,
    max_completion_length: int = LIKE_PPO["max_completion_length"],
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Fine-tune on the best of `n` own completions of each prompt (2307.09288, section 3.2.3; RAFT, 2304.06767).

    Only completions that ended are chosen, because SFT teaches an end. They are in samples.parquet beside the weights,
    with their `reward`. A prompt without a finished completion is left out with a warning; ValueError if all are.
    """
    _need_prompts(prompts)
    request = Request("rejection sampling", model, out, lora, load_in_4bit, seed, callbacks, settings)
    prepare(request, SFTConfig, Path(out))  # refuse wrong arguments before the sampling, which takes long
    length = max_completion_length
    samples = sampling.sample(model, prompts, n, temperature, length, seed=seed, load_in_4bit=load_in_4bit)
    ended = samples[samples["finished"]].reset_index(drop=True)
    if missing := len(prompts) - ended["prompt_id"].nunique():
        problem = f"of {missing} of {len(prompts)} prompts no completion ended in {length} tokens"
        if ended.empty:
            raise ValueError(f"rejection_sampling: {problem}; raise max_completion_length")
        warnings.warn(f"rejection_sampling: {problem}; these prompts are left out", stacklevel=2)
    scored = sampling.add_rewards(ended, {"reward": reward if callable(reward) else RewardModel(reward)})
    checked(scored["reward"].tolist(), len(scored))
    chosen = sampling.best_of_n(scored, "reward")
    is_text = isinstance(chosen["prompt"][0], str)
    demonstrations = [
        {"prompt": prompt, "completion": text if is_text else [{"role": "assistant", "content": text}]}
        for prompt, text in zip(chosen["prompt"], chosen["completion"], strict=True)
    ]
    return fit_texts(SFTTrainer, SFTConfig, request, Dataset.from_list(demonstrations), chosen)


def _on_policy(
    trainer_class: type[Any],
    config: type[Any],
    request: Request,
    reward: Reward | ModelPath,
    prompts: Dataset,
    missing_eos_penalty: float,
) -> str:
    """Train by TRL's RLOO or GRPO trainer."""
    _need_prompts(prompts)
    with replacing(request.out) as folder:
        weights = [1.0, -missing_eos_penalty]
        tokenizer, args = prepare(request, config, folder, **LIKE_PPO, reward_weights=weights)
        tokenizer.padding_side = "left"
        if len(prompts) < (needed := args.generation_batch_size // args.num_generations):
            raise ValueError(
                f"{request.label}: {len(prompts)} prompts are fewer than the {needed} of one batch "
                "(per_device_train_batch_size / num_generations); lower the first, raise the second, or give more"
            )
        learned = reward if callable(reward) else RewardModel(reward)
        columns = [name for name in prompts.column_names if name != "prompt"]

        # TRL calls rewards with more than a reward function here knows of, and reads NaN as "not applicable".
        def score(prompts: list[Any], completions: list[Any], **given: Any) -> list[float]:
            known = {name: given[name] for name in columns if name in given}  # TRL itself drops a column `completion`
            return checked(learned(prompts, completions, **known), len(prompts)).tolist()

        def unfinished(completion_ids: list[list[int]], **given: Any) -> list[float]:
            return [float(ids[-1] not in stops) for ids in completion_ids]

        more = {"reward_funcs": [score, unfinished], "peft_config": models.lora_config(request.lora)}
        trainer = make_trainer(trainer_class, request, args, tokenizer, prompts, **more)
        stops = models.stop_ids(trainer.model, tokenizer)
        trainer.model.generation_config.eos_token_id = stops  # what is saved must know where to stop
        if args.disable_dropout:
            models.switch_off_dropout(trainer.model)  # TRL's own leaves out attention
        longest = max(map(len, models.encode(tokenizer, prompts["prompt"][:])))
        models.check_positions(trainer.model, longest, args.max_completion_length)
        _refuse_absolute_positions(request.model, trainer.model, tokenizer)
        fit(trainer, folder)
    return str(request.out)


def _need_prompts(prompts: Dataset) -> None:
    if "prompt" not in prompts.column_names:
        raise ValueError(f"prompts: no column 'prompt'; it has {', '.join(prompts.column_names)}")


@torch.no_grad()
def _refuse_absolute_positions(path: ModelPath, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError if a prompt's padding changes the next token's logits: then positions are counted from the padding.

    TRL pads prompts on the left and gives no positions, so only a model of relative positions reads them right.
    """
    was_training = model.training
    model.eval()
    ids = torch.arange(4, device=model.device)[None]
    padded = pad(ids, (4, 0), value=tokenizer.pad_token_id)
    mask = pad(torch.ones_like(ids), (4, 0))
    alone, shifted = model(input_ids=ids).logits[0, -1], model(input_ids=padded, attention_mask=mask).logits[0, -1]
    model.train(was_training)
    if (alone - shifted).abs().max() > 0.1 * alone.std():
        raise models.ModelError(
            f"{path}: counts positions from the start of the padding (as GPT-2 does), so TRL's RLOO and GRPO would "
            "train on misread prompts; use a model with rotary positions, or PPOTrainer"
        )
