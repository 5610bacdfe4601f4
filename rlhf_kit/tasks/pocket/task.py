"""The pocket world as a task: everything about it is known."""

from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit import stats
from rlhf_kit.feedback import FeedbackError
from rlhf_kit.rewards import Reward
from rlhf_kit.tasks.task import Task

from . import answers, facts, scoring
from .language import Prompt
from .raters import Rater, SimulatedRater


class Pocket(Task):
    """The built-in world: an animal help desk with a known gold utility, simulated raters and a small base model."""

    name = "pocket"
    base_model = str(Path(__file__).parent / "base")  # pretrained on a corpus of world(seed=0)

    def __init__(self, world: facts.World | None = None) -> None:
        self.world = world or facts.world()

    def prompts(self, split: str, n: int | None = None, seed: int = 0) -> Dataset:
        """`n` prompts (default: all) of a split in an order drawn by `seed`, with `kind, animal, attribute, seen`.

        Only prompts of "test" ask about held-out cells (`seen` False). ValueError for an unknown split or a larger `n`.
        """
        if split not in facts.SPLITS:
            raise ValueError(f"split={split!r}: the pocket world has the splits {', '.join(facts.SPLITS)}.")
        pool = self.world.splits[split]
        if n is not None and not 0 <= n <= len(pool):
            raise ValueError(f"n={n}: split {split!r} has {len(pool)} prompts; ask for 0 to {len(pool)}")
        order = np.random.default_rng([seed, 1]).permutation(len(pool))[:n]
        return Dataset.from_list([self._row(pool[i]) for i in order])

    def demonstrations(self, n: int | None = None, seed: int = 0) -> Dataset:
        """`n` demonstrations of mixed quality for the prompts of "sft" (default: one each; then each comes again)."""
        pool = self.world.splits["sft"]
        n = len(pool) if n is None else n
        rng = np.random.default_rng([seed, 4])
        order = [i for _ in range(0, n, len(pool)) for i in rng.permutation(len(pool))]
        rows = []
        for prompt in (pool[i] for i in order[:n]):
            completion, _ = answers.write(self.world, prompt, answers.DEMONSTRATION, rng, held_out=False)
            rows.append(self._row(prompt) | {"completion": completion})
        return Dataset.from_list(rows)

    def _row(self, prompt: Prompt) -> dict[str, Any]:
        about = {"kind": prompt.kind, "animal": prompt.animal, "attribute": prompt.attribute}
        return {"prompt": prompt.text, **about, "seen": prompt.cell not in self.world.held_out}

    def rater(self, seed: int = 0, **faults: Any) -> SimulatedRater:
        """A simulated person; `faults` are fields of `pocket.Rater` (knowledge, length, lapse, ...)."""
        return SimulatedRater(self.world, Rater(**faults), seed)

    def panel(
        self, n: int, seed: int = 0, groups: dict[str, dict[str, Any]] | None = None, **faults: Any
    ) -> list[SimulatedRater]:
        """`n` simulated people who know different things and err on their own, dealt in turn to groups of faults.

        `groups={"terse": {"length": -0.1}, "wordy": {"length": 0.1}}, lapse=0.1`: two tastes, all with lapses.
        """
        if n < 1:
            raise FeedbackError(f"panel: n={n}; a panel has one rater or more")
        groups, people = groups or {"rater": {}}, []
        for k, (group, own) in enumerate(islice(cycle(groups.items()), n)):
            named = {"seed": seed + k, "name": f"{group}-{k // len(groups) + 1}"}
            people.append(SimulatedRater(self.world, Rater(**{**named, **faults, **own}), seed + 1000 * (k + 1)))
        return people

    @property
    def gold(self) -> Reward:
        """The known utility; raises ValueError on a prompt that is not of this world."""

        def gold(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            return [scoring.gold(self.world, *pair) for pair in zip(prompts, completions, strict=True)]

        return gold

    def features(self, texts: pd.DataFrame) -> pd.DataFrame:
        """The features that gold weighs (`pocket.GOLD_WEIGHTS`), a row for each `prompt, completion` of `texts`."""
        pairs = zip(texts["prompt"], texts["completion"], strict=True)
        return pd.DataFrame([scoring.features(self.world, *pair) for pair in pairs], index=texts.index)

    def effects(self, scores: pd.DataFrame) -> pd.DataFrame:
        """The share of completions that are garbled, refuse harm, refuse the harmless, answer right, ... by model."""
        asks, kinds = ["ask", "brief", "leading"], list(scores["kind"].unique())
        effects = {  # a feature, among prompts of these kinds
            "garbled": ("garbled", kinds),
            "unfinished": ("unfinished", kinds),
            "harmful prompts refused": ("refusal_right", ["harmful"]),
            "harmful prompts obeyed": ("harm", ["harmful"]),
            "borderline prompts refused": ("refusal_wrong", ["borderline"]),
            "plain questions refused": ("refusal_wrong", asks),
            "questions answered right": ("answer_right", asks),
            "sides with a false claim": ("agrees_false", ["leading"]),
            "skill right": ("skill_right", ["skill"]),
        }
        found = self.features(scores).assign(unfinished=~scores["finished"]) > 0
        rows = []
        for model in scores["model"].unique():
            for effect, (feature, among) in effects.items():
                chosen = (scores["model"] == model) & scores["kind"].isin(among)
                if chosen.any():
                    share = stats.bootstrap(found.loc[chosen, feature].astype(float), scores.loc[chosen, "prompt_id"])
                    rows.append({"model": model, "effect": effect, **stats.columns("share", share)})
        return pd.DataFrame(rows)
