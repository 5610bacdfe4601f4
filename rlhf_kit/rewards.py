"""Rewards: functions `(prompts, completions, **columns) -> list[float]`, learned (a directory) or any other."""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import Any

import torch

from rlhf_kit import models
from rlhf_kit.models import ModelPath, Prompt, Roles

BATCH_ROWS, BATCH_TOKENS = 64, 4096  # at most, in one forward pass of a reward model: long texts must not fill a GPU
Completion = str | list[dict[str, str]]
Reward = Callable[..., list[float]]
ARGUMENTS = ("self", "prompt", "prompts", "completion", "completions")  # columns of these names are not passed on


def checked(rewards: Any, count: int) -> torch.Tensor:
    """The rewards of `count` completions in fp64 (count,); ValueError unless there is one finite number for each."""
    try:
        found = torch.tensor(list(rewards), dtype=torch.float64)
    except (TypeError, ValueError):
        kind = type(rewards).__name__
        raise ValueError(f"the reward function gave a {kind}, not a list of {count} finite numbers") from None
    if found.shape != (count,) or not torch.isfinite(found).all():
        bad = int((~torch.isfinite(found)).sum())
        got = f"{list(found.shape)} values for {count} completions, {bad} of them not finite"
        raise ValueError(f"the reward function gave {got}; return one finite number for each")
    return found


class RewardModel:
    """A learned reward r(x, y): the score head on the hidden state of the last token of prompt + completion + EOS.

    It scores text, so the policy may have another tokenizer. Scores are shifted and scaled as `normalise` stored it.
    The transformer is loaded at the first use (loading: as of `models.load_causal`); after `on` it is one in use.
    """

    def __init__(self, path: ModelPath, **loading: Any) -> None:
        self.path = str(path)
        self.__name__ = "reward_model"  # in the logs of TRL's trainers
        self.stored = models.stored_as(path, **loading)
        self.tokenizer = models.load_tokenizer(path)
        self.head = models.read_score_head(path)
        notes = models.read_notes(path)
        self.shift, self.scale = notes.get("shift", 0.0), notes.get("scale", 1.0)
        self.backbone: Any = cache(lambda: models.load_backbone(path, **loading))

    def on(self, roles: Roles, role: str) -> "RewardModel":
        """The same reward through its adapter in `roles`, without a second copy of the base."""
        shared = copy(self)
        shared.backbone = lambda: roles.backbone(role)
        return shared

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        if not prompts:
            return []
        ids = models.encode(self.tokenizer, prompts, completions)
        scores = torch.empty(len(ids))
        waiting = sorted(range(len(ids)), key=lambda row: -len(ids[row]))  # longest first
        while waiting:
            fit = min(BATCH_ROWS, max(1, BATCH_TOKENS // len(ids[waiting[0]])))
            rows, waiting = waiting[:fit], waiting[fit:]
            scores[rows] = self._score([ids[row] for row in rows]).cpu()
        return [(score - self.shift) / self.scale for score in scores.tolist()]

    def _score(self, rows: list[list[int]]) -> torch.Tensor:
        """Raw scores (B,) in fp32 of rows of token ids, padded on the right so that positions count from 0."""
        backbone = self.backbone()
        where = backbone.device
        ids, mask = (tensor.to(where) for tensor in models.padded(rows, "right", self.tokenizer.pad_token_id))
        states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(rows), device=where), mask.sum(1) - 1]
        with torch.autocast(where.type, enabled=False):  # heads stay in fp32
            return (last.float() @ self.head.to(where).T).squeeze(-1)


class Ensemble:
    """Several rewards as one: the mean, or the smallest (`min`), of each completion's rewards.

    Coste et al. 2023 (2310.02743): where members disagree, the policy has left their data; `min` does not reward that.
    ValueError for fewer than two members, or another way to combine.
    """

    def __init__(self, members: Sequence[Reward], combine: str = "mean") -> None:
        if len(members) < 2 or combine not in ("mean", "min"):
            raise ValueError(f"an ensemble is the mean or the min of two or more; got {combine!r} of {len(members)}")
        self.members, self.combine = list(members), combine

    def __call__(self, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        return self.combined(self.each(prompts, completions, **columns)).tolist()

    def each(self, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> torch.Tensor:
        """The rewards of each of K members for each completion: (K, B); ValueError as `checked` raises it."""
        each = [checked(member(prompts, completions, **columns), len(prompts)) for member in self.members]
        return torch.stack(each).float()

    def combined(self, each: torch.Tensor) -> torch.Tensor:
        """The mean or the smallest of the members' rewards: (K, B) -> (B,)."""
        return each.mean(0) if self.combine == "mean" else each.amin(0)


def normalise(path: ModelPath, prompts: list[Prompt], completions: list[Completion]) -> None:
    """Shift and scale a reward model so that these completions (samples of the SFT model) have mean 0 and variance 1.

    A Bradley-Terry reward has no zero, and its scale is that of the raters' noise. After this `kl_coef` means the same
    for every reward model. ValueError where all completions have the same score.
    """
    models.write_notes(path, shift=0.0, scale=1.0)
    scores = torch.tensor(RewardModel(path)(prompts, completions))
    if len(scores) < 2 or scores.std() < 1e-4:  # equal texts in other batches differ by rounding
        raise ValueError(f"{path}: gives every completion the same score, so it cannot be normalised; train it longer")
    models.write_notes(path, shift=scores.mean().item(), scale=scores.std().item())
