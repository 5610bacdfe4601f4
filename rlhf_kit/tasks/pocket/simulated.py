"""Simulated raters of the pocket world: people with known faults, who answer questions as people do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_kit.feedback import SCALES, STRENGTHS, Answer, FeedbackError, Question
from rlhf_kit.feedback.judging import dense_ranks
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion
from rlhf_kit.tasks.pocket.facts import World
from rlhf_kit.tasks.pocket.raters import Rater, perceived_gap, perceived_score, perceived_scores, utility

# Where a felt gap of a pair, in units of utility, becomes clear, and where it becomes large.
STEPS = (0.75, 2.0)


class SimulatedRater:
    """A `pocket.Rater` who answers questions; the same seed gives the same answers to the same questions in order."""

    interface = "simulated-1"
    timed = False  # a formula has no pace

    def __init__(self, world: World, rater: Rater, seed: int = 0) -> None:
        self.world = world
        self.rater = rater
        self.name = rater.name
        self.generator = np.random.default_rng([seed, 7])

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        felt = [self.utility(prompt, completion) for completion in completions]
        if question != "rank":
            return Answer(rating=self._rate(felt[0], question))
        if len(felt) > 2:
            return Answer(ranks=dense_ranks(perceived_scores(self.rater, felt, self.generator)))
        gap = perceived_gap(self.rater, felt[0], felt[1], self.generator.random())
        if abs(gap) < self.rater.indifference:
            return Answer(ranks=(1, 1))
        strength = STRENGTHS[sum(abs(gap) >= step for step in STEPS)]
        return Answer(ranks=(1, 2) if gap > 0 else (2, 1), strength=strength)

    def utility(self, prompt: Prompt, completion: Completion) -> float:
        """How much the rater likes a completion, before noise; FeedbackError for a chat."""
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise FeedbackError(f"{self.name}: a simulated rater reads the pocket world's texts, not chats")
        return utility(self.world, self.rater, prompt, completion)

    def _rate(self, felt: float, question: Question) -> int:
        scale = SCALES[question]
        score = perceived_score(self.rater, felt, self.generator)
        if question == "good/bad":
            return int(score > 0)
        return int(np.clip(round(score) + scale[len(scale) // 2], scale[0], scale[-1]))


def panel(
    world: World, n: int, seed: int = 0, groups: Mapping[str, Mapping[str, Any]] | None = None, **faults: Any
) -> list[SimulatedRater]:
    """`n` raters who know different things and err on their own, dealt to `groups` of different values in turn.

    panel(world, 6, groups={"terse": {"length": -0.1}, "wordy": {"length": 0.1}}, lapse=0.1): three terse ones and
    three wordy ones, all with lapses.
    """
    groups = groups or {"rater": {}}
    if n < 1:
        raise FeedbackError(f"panel: n={n}; a panel has one rater or more")
    raters = []
    for k in range(n):
        group = list(groups)[k % len(groups)]
        own = {"seed": seed + k, "name": f"{group}-{k // len(groups) + 1}"}
        rater = Rater(**{**own, **faults, **groups[group]})
        raters.append(SimulatedRater(world, rater, seed + 1000 * (k + 1)))
    return raters
