"""What raters that are language models share: both orders of a pair, principles, ranks and rewards from preferences."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.special import expit

from rlhf_kit.feedback.constitution import Principle
from rlhf_kit.feedback.judging import STRENGTHS, Answer, FeedbackError, Question, dense_ranks
from rlhf_kit.feedback.templates import Template
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion, Reward

STEPS = (0.7, 0.9)  # P(preferred) from which a preference is clear, and from which it is strong
GRID = 2.0**40  # probabilities are whole multiples of 1 / GRID, so that 1 - p is exact


class ModelRater(ABC):
    """A language model that rates: it sees each pair in both orders, so that a liking for a place cancels.

    A number is NaN, and a judgment is skipped, where the model gives none of the answer words.
    """

    def __init__(self, name: str, template: Template, principles: list[Principle]) -> None:
        self.name, self.template, self.principles = name, template, principles
        self.firsts: list[float] = []  # of each comparison: P(the one shown first), over both orders and all principles

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @abstractmethod
    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        """log P(first word) - log P(second word) of the model's answer to each text."""

    @property
    def position_bias(self) -> float:
        """By how much the completion shown first was preferred above 1/2, over all that was asked; NaN before that."""
        return sum(self.firsts) / len(self.firsts) - 0.5 if self.firsts else math.nan

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        if question == "1-7":
            raise FeedbackError(f"{self.name}: a language model ranks or rates good/bad; the scale '1-7' is for people")
        if question == "rank":
            return self._rank(prompt, completions)
        [odds] = self.good_odds([prompt], completions)
        return Answer() if math.isnan(odds) else Answer(rating=int(odds > 0), note=f"P(yes) {expit(odds):.4f}")

    def preference(self, prompt: Prompt, a: Completion, b: Completion) -> float:
        """P(a is preferred to b): exactly 1 - preference(prompt, b, a)."""
        return self.preferences([prompt], [a], [b])[0]

    def preferences(self, prompts: Sequence[Prompt], a: Sequence[Completion], b: Sequence[Completion]) -> list[float]:
        """P(a is preferred to b) of each row, all rows asked at once; over principles it is the mean by weight."""
        # A row's rounding depends on its batch, so a pair is always asked in the same order, whichever of them is `a`.
        pairs = [sorted(pair, key=str) for pair in zip(a, b, strict=True)]
        one, other = ([pair[side] for pair in pairs] for side in (0, 1))
        if self.template.compare:
            p = self._compare(prompts, one, other)
        else:
            odds = np.reshape(self.good_odds([*prompts, *prompts], [*one, *other]), (2, -1))
            p = expit(odds[0] - odds[1])
        p = np.round(p * GRID) / GRID
        p = np.where([pair[0] == pair[1] for pair in pairs], 0.5, p)
        return np.where([first == pair[0] for first, pair in zip(a, pairs, strict=True)], p, 1 - p).tolist()

    def good_odds(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """log P(yes) - log P(no) to whether each completion is good."""
        texts = [self.template.rating(prompt, each) for prompt, each in zip(prompts, completions, strict=True)]
        return self._log_odds(texts, self.template.verdicts)

    def as_reward(self) -> Reward:
        """The judge as a reward: the log-odds that a completion is good (RLAIF, 2309.00267, section 2.2)."""

        def judge(prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
            return self.good_odds(prompts, completions)

        return judge

    def _compare(self, prompts: Sequence[Prompt], a: list[Completion], b: list[Completion]) -> np.ndarray:
        texts = [
            self.template.comparison(prompt, *shown, principle.compare)
            for prompt, first, second in zip(prompts, a, b, strict=True)
            for principle in self.principles
            for shown in ((first, second), (second, first))
        ]
        first_wins = expit(self._log_odds(texts, self.template.choices)).reshape(len(prompts), len(self.principles), 2)
        self.firsts += [p for p in first_wins.mean((1, 2)).tolist() if not math.isnan(p)]
        weights = np.array([principle.weight for principle in self.principles])
        return (first_wins[..., 0] + 1 - first_wins[..., 1]) / 2 @ (weights / weights.sum())

    def _rank(self, prompt: Prompt, completions: Sequence[Completion]) -> Answer:
        """Ranks by the mean probability of being preferred to each of the others; of a pair also its strength.

        The note holds that probability of each completion, the soft label of RLAIF (2309.00267, section 2.1).
        """
        n, mean = len(completions), [0.0] * len(completions)
        places = list(combinations(range(n), 2))
        a, b = ([completions[pair[side]] for pair in places] for side in (0, 1))
        for (i, j), p in zip(places, self.preferences([prompt] * len(places), a, b), strict=True):
            mean[i] += p / (n - 1)
            mean[j] += (1 - p) / (n - 1)
        if any(map(math.isnan, mean)):
            return Answer()
        ranks = dense_ranks([round(p, 9) for p in mean])  # sums in another order differ by rounding
        untied_pair = n == 2 and ranks != (1, 1)
        strength = STRENGTHS[sum(max(mean) >= step for step in STEPS)] if untied_pair else None
        return Answer(ranks=ranks, strength=strength, note="preferred " + " ".join(f"{p:.4f}" for p in mean))
