"""Which models a PPO run holds: every role that can stand on the policy's base does, and the base is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from rlhf_kit.models import ModelPath, Roles, is_4bit, is_adapter, load_roles, same_base
from rlhf_kit.rewards import Ensemble, Reward, RewardModel


def cast(
    model: ModelPath,
    reward: Reward | ModelPath | Sequence[Reward | ModelPath],
    ref_model: ModelPath | None,
    value_model: ModelPath | None,
    lora: LoraConfig | None,
    load_in_4bit: bool | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Roles, Reward]:
    """The roles of a run and its reward; reward models that are adapters over the policy's base join it there.

    A reward model on another base, or loaded in another precision, keeps weights of its own. Without `value_model` the
    values start from the first reward model if it stands on the same weights and tokens, else from the policy.
    """
    combine = reward.combine if isinstance(reward, Ensemble) else "mean"
    given: Any = (
        reward.members if isinstance(reward, Ensemble) else reward if isinstance(reward, list | tuple) else [reward]
    )
    members: list[Any] = [each if callable(each) else RewardModel(each) for each in given]
    adapters = lora is not None or is_adapter(model)
    if value_model is None and isinstance(members[0], RewardModel) and _fits(members[0], model, tokenizer, adapters):
        value_model = members[0].path
    on_base = [i for i, member in enumerate(members) if adapters and _on_base(member, model, load_in_4bit)]
    roles = load_roles(model, ref_model, value_model, lora, load_in_4bit, [members[i].path for i in on_base])
    for number, i in enumerate(on_base):
        members[i] = members[i].on(roles, f"reward_{number}")
    return roles, members[0] if len(members) == 1 else Ensemble(members, combine)


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
