"""The models of a PPO run: what is loaded, what shares the policy's base, and whether it fits in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_kit import memory, models
from rlhf_kit.models import ModelPath, Roles
from rlhf_kit.ppo.config import PPOConfig
from rlhf_kit.rewards import Ensemble, Reward, RewardModel


def load_models(
    model: ModelPath,
    reward: Reward | ModelPath | Sequence[Reward | ModelPath],
    args: PPOConfig,
    ref_model: ModelPath | None,
    value_model: ModelPath | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
) -> tuple[Roles, Reward]:
    """The roles of a run and its reward; reward adapters over the policy's base join the roles.

    Raises ValueError, before any weights are loaded, where the run is estimated to need too much memory.
    """
    given: Any = reward.members if isinstance(reward, Ensemble) else reward
    given = given if isinstance(given, list | tuple) else [given]
    members = [each if callable(each) else RewardModel(each) for each in given]
    learned = {f"reward_{i}": each for i, each in enumerate(members) if isinstance(each, RewardModel)}
    adapters, in_4bit = args.lora is not None or models.is_adapter(model), args.load_in_4bit
    if value_model is None and isinstance(members[0], RewardModel):
        path, vocabulary = members[0].path, members[0].tokenizer.get_vocab()
        over_base = models.is_adapter(path) and models.same_base(path, model)
        if vocabulary == tokenizer.get_vocab() and (over_base if adapters else not models.is_adapter(path)):
            value_model = path
    joining, separate = {}, []
    for role, each in learned.items():
        if adapters and models.shares_base(each.path, each.load_in_4bit, model, in_4bit):
            joining[role] = each.path
        else:
            separate.append(each.path)
    check_memory(model, args, tokenizer, prompts, separate[0] if separate else None, len(learned))
    roles = models.load_roles(model, ref_model, value_model, args.lora, in_4bit, joining)
    members = [each.on(roles, f"reward_{i}") if f"reward_{i}" in joining else each for i, each in enumerate(members)]
    if len(members) == 1:
        return roles, members[0]
    return roles, Ensemble(members, reward.combine if isinstance(reward, Ensemble) else "mean")


def check_memory(
    model: ModelPath,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    reward_model: ModelPath | None,
    reward_models: int,
) -> None:
    """Raise ValueError, which names the setting to change, where the run is estimated to need too much memory.

    reward_model: one with weights of its own; reward_models: how many there are in all.
    """
    if args.max_memory_gib is None and models.device().type == "cpu":
        return
    longest = sorted(prompts["prompt"][:], key=lambda prompt: -len(str(prompt)))[:64]
    fits, _, sentence = memory.advise(
        model,
        "ppo",
        args.max_memory_gib or memory.device_memory(),
        lora=models.lora_config(args.lora),
        load_in_4bit=args.load_in_4bit,
        prompt_length=max(map(len, models.encode(tokenizer, longest))),
        max_completion_length=args.max_completion_length,
        rollout=args.per_device_train_batch_size,
        micro_batch_size=args.micro_batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
        optim=str(getattr(args.optim, "value", args.optim)),
        reward_model=reward_model,
        ensemble=reward_models,
    )
    if not fits:
        raise ValueError(f"PPO on {model}: {sentence}\n(PPOConfig's max_memory_gib sets another limit)")
