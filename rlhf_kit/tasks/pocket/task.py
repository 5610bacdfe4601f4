"""The pocket world as a task: everything about it is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset

from rlhf_kit import stats
from rlhf_kit.rewards import Reward
from rlhf_kit.tasks.pocket import answers, facts, scoring
from rlhf_kit.tasks.pocket.raters import Rater
from rlhf_kit.tasks.pocket.simulated import SimulatedRater, panel
from rlhf_kit.tasks.task import Task

BASE_MODEL = str(Path(__file__).parent / "base")  # directory of the pretrained model of world(seed=0)


class Pocket(Task):
    """The built-in world: an animal help desk with a known gold utility, simulated raters and a small base model."""

    name = "pocket"
    base_model = BASE_MODEL

    def __init__(self, world: facts.World | None = None) -> None:
        self.world = world or facts.world()

    def prompts(self, split: str, n: int | None = None, seed: int = 0) -> Dataset:
        """`n` prompts (default: all) of a split, with `kind, animal, attribute, seen` beside each."""
        return Dataset.from_list(facts.prompts(self.world, split, n=n, seed=seed))

    def demonstrations(self, n: int | None = None, seed: int = 0) -> Dataset:
        """`n` demonstrations of mixed quality (default: one per prompt)."""
        return Dataset.from_list(answers.demonstrations(self.world, n=n, seed=seed))

    def rater(self, seed: int = 0, **faults: Any) -> SimulatedRater:
        """A simulated person; `faults` are fields of `pocket.Rater` (knowledge, length, lapse, ...)."""
        return SimulatedRater(self.world, Rater(**faults), seed)

    def panel(
        self, n: int, seed: int = 0, groups: Mapping[str, Mapping[str, Any]] | None = None, **faults: Any
    ) -> list[SimulatedRater]:
        """`n` simulated people, dealt in turn to `groups` of different values."""
        return panel(self.world, n, seed, groups, **faults)

    @property
    def gold(self) -> Reward:
        """The known utility; raises ValueError on a prompt that is not of this world."""

        def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [scoring.gold(self.world, *pair) for pair in zip(prompts, completions, strict=True)]

        return gold

    def effects(self, scores: pd.DataFrame) -> pd.DataFrame:
        """The share of completions that are garbled, refuse harm, refuse the harmless, answer right, ... by model."""
        pairs = zip(scores["prompt"], scores["completion"], strict=True)
        found = pd.DataFrame([scoring.features(self.world, *pair) for pair in pairs], index=scores.index)
        asks = scores["kind"].isin(["ask", "brief", "leading"])
        everything, harmful = scores["kind"].notna(), scores["kind"] == "harmful"
        effects: dict[str, tuple[pd.Series, pd.Series]] = {
            "garbled": (found["garbled"] > 0, everything),
            "unfinished": (~scores["finished"], everything),
            "harmful prompts refused": (found["refusal_right"] > 0, harmful),
            "harmful prompts obeyed": (found["harm"] > 0, harmful),
            "borderline prompts refused": (found["refusal_wrong"] > 0, scores["kind"] == "borderline"),
            "plain questions refused": (found["refusal_wrong"] > 0, asks),
            "questions answered right": (found["answer_right"] > 0, asks),
            "sides with a false claim": (found["agrees_false"] > 0, scores["kind"] == "leading"),
            "skill right": (found["skill_right"] > 0, scores["kind"] == "skill"),
        }
        rows = []
        for model in scores["model"].unique():
            for effect, (happened, among) in effects.items():
                chosen = among & (scores["model"] == model)
                if chosen.any():
                    share = stats.bootstrap(happened[chosen].astype(float), scores.loc[chosen, "prompt_id"])
                    rows.append({"model": model, "effect": effect, **stats.columns("share", share)})
        return pd.DataFrame(rows)
