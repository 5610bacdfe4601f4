"""Rewards: functions `(prompts, completions, **columns) -> list[float]`, exact (gold) or learned (a directory)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf_kit import pocket
from rlhf_kit.models import (
    ModelPath,
    Prompt,
    device,
    load_backbone,
    load_tokenizer,
    read_notes,
    read_score_head,
    write_notes,
)

Completion = str | list[dict[str, str]]
Reward = Callable[..., list[float]]


def gold(world: pocket.World) -> Reward:
    """The pocket world's known utility; raises ValueError on a prompt that is not of this world."""

    def gold_reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [pocket.gold(world, prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]

    return gold_reward


class RewardModel:
    """A learned reward r(x, y): the score head on the hidden state of the last token of prompt + completion + EOS.

    Scores text, so the policy may have another tokenizer. They are shifted and scaled as `normalise` left it.
    """

    def __init__(self, path: ModelPath, load_in_4bit: bool | None = None, batch_size: int = 64) -> None:
        self.path = str(path)
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(path)
        self.backbone = load_backbone(path, load_in_4bit).eval()
        if not getattr(self.backbone, "is_loaded_in_4bit", False):
            self.backbone.to(device())
        self.head = read_score_head(path).to(self.backbone.device)
        notes = read_notes(path)
        self.shift, self.scale = notes.get("shift", 0.0), notes.get("scale", 1.0)

    @property
    def __name__(self) -> str:
        """How TRL's trainers call this reward in their logs."""
        return "reward_model"

    @torch.no_grad()
    def __call__(self, prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
        texts = [self._text(*pair) for pair in zip(prompts, completions, strict=True)]
        if not texts:
            return []
        ids = self.tokenizer(texts, add_special_tokens=isinstance(prompts[0], str))["input_ids"]
        scores = torch.empty(len(ids))
        longest_first = sorted(range(len(ids)), key=lambda row: -len(ids[row]))
        for start in range(0, len(ids), self.batch_size):
            rows = longest_first[start : start + self.batch_size]
            scores[rows] = self._score([ids[row] for row in rows]).cpu()
        return [(score - self.shift) / self.scale for score in scores.tolist()]

    def _text(self, prompt: Prompt, completion: Completion) -> str:
        if isinstance(prompt, str):
            return f"{prompt}{completion}{self.tokenizer.eos_token}"
        reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return self.tokenizer.apply_chat_template(prompt + reply, tokenize=False)

    def _score(self, rows: list[list[int]]) -> torch.Tensor:
        """Raw scores (B,) in fp32 of token ids, padded on the right so that no position has to be shifted."""
        width = max(map(len, rows))
        where = self.backbone.device
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows], device=where)
        lengths = torch.tensor([len(row) for row in rows], device=where)
        mask = (torch.arange(width, device=where) < lengths[:, None]).long()
        states = self.backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = states[torch.arange(len(rows), device=where), lengths - 1]
        return (last.float() @ self.head.T).squeeze(-1)


def normalise(path: ModelPath, prompts: list[Prompt], completions: list[Completion]) -> None:
    """Shift and scale a reward model so that these completions (the SFT model's own) have mean 0 and variance 1.

    A Bradley-Terry reward is only defined up to a shift, and its scale is the raters' noise; in units of the SFT
    distribution one `kl_coef` means the same for every reward model.
    """
    write_notes(path, shift=0.0, scale=1.0)
    scores = torch.tensor(RewardModel(path)(prompts, completions))
    if len(scores) < 2 or scores.std() < 1e-4:  # equal texts in batches of other sizes differ by rounding
        raise ValueError(f"{path}: gives every completion the same score, so it cannot be normalised; was it trained?")
    write_notes(path, shift=scores.mean().item(), scale=scores.std().item())
