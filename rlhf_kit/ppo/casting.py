"""Which models a PPO run holds: each role that can stand on the policy's base does, and that is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from rlhf_kit import memory
from rlhf_kit.models import ModelPath, Roles, device, encode_prompts, is_4bit, is_adapter, load_roles, same_base
from rlhf_kit.ppo.config import PPOConfig
from rlhf_kit.rewards import Ensemble, Reward, RewardModel


def cast(
    model: ModelPath,
    reward: Reward | ModelPath | Sequence[Reward | ModelPath],
    ref_model: ModelPath | None,
    value_model: ModelPath | None,
    lora: LoraConfig | None,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
) -> tuple[Roles, Reward]:
    """The roles of a run and its reward; reward models that are adapters over the policy's base join it there.

    A reward model on another base, or loaded in another precision, keeps weights of its own. Without `value_model` the
    values start from the first reward model if it stands on the same weights and tokens, else from the policy.
    Raises ValueError, before anything is loaded, where the estimate exceeds the GPU or `args.max_memory_gib`.
    """
    combine = reward.combine if isinstance(reward, Ensemble) else "mean"
    given: Any = reward.members if isinstance(reward, Ensemble) else reward
    given = given if isinstance(given, list | tuple) else [given]
    members: list[Any] = [each if callable(each) else RewardModel(each) for each in given]
    adapters = lora is not None or is_adapter(model)
    if value_model is None and isinstance(members[0], RewardModel) and _fits(members[0], model, tokenizer, adapters):
        value_model = members[0].path
    on_base = [i for i, member in enumerate(members) if adapters and _on_base(member, model, args.load_in_4bit)]
    learned = [member for member in members if isinstance(member, RewardModel)]
    apart = [member.path for i, member in enumerate(members) if member in learned and i not in on_base]
    _refuse_what_exceeds_memory(model, lora, args, tokenizer, prompts, len(learned), apart[0] if apart else None)
    roles = load_roles(model, ref_model, value_model, lora, args.load_in_4bit, [members[i].path for i in on_base])
    for number, i in enumerate(on_base):
        members[i] = members[i].on(roles, f"reward_{number}")
    return roles, members[0] if len(members) == 1 else Ensemble(members, combine)


def _refuse_what_exceeds_memory(
    model: ModelPath,
    lora: LoraConfig | None,
    args: PPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    reward_models: int,
    reward_base: ModelPath | None,
) -> None:
    """Hold the run's estimate against the memory there is; ValueError names the knob that makes it fit."""
    gib = args.max_memory_gib
    if gib is None:
        if device().type == "cpu":
            return
        gib = memory.device_memory()
    longest = sorted(prompts["prompt"][:], key=lambda prompt: -len(str(prompt)))[:64]
    advice = memory.advise(
        model,
        "ppo",
        gib,
        lora=lora,
        load_in_4bit=args.load_in_4bit,
        prompt_length=max(map(len, encode_prompts(tokenizer, longest))),
        max_completion_length=args.max_completion_length,
        rollout=args.per_device_train_batch_size,
        micro_batch_size=args.micro_batch_size,
        gradient_checkpointing=args.gradient_checkpointing,
        optim=str(getattr(args.optim, "value", args.optim)),
        reward_model=reward_base,
        ensemble=reward_models,
    )
    if not advice.fits:
        raise ValueError(f"PPO on {model}: {advice.sentence()}\n(PPOConfig's max_memory_gib sets another limit)")


def _fits(reward: RewardModel, model: ModelPath, tokenizer: PreTrainedTokenizerBase, adapters: bool) -> bool:
    """Whether values can start from the reward model: same tokens, and the same base where roles are adapters."""
    if reward.tokenizer.get_vocab() != tokenizer.get_vocab():
        return False
    if adapters:
        return is_adapter(reward.path) and same_base(reward.path, model)
    return not is_adapter(reward.path)


def _on_base(reward: Any, model: ModelPath, load_in_4bit: bool | None) -> bool:
    """Whether a reward is an adapter over the policy's base as that is loaded, in 4 bits or not."""
    if not isinstance(reward, RewardModel) or not is_adapter(reward.path) or not same_base(reward.path, model):
        return False
    return is_4bit(reward.path, reward.load_in_4bit) == is_4bit(model, load_in_4bit)
