"""What a task is, and a person's own preferences as one."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit import data
from rlhf_kit.feedback import Rater
from rlhf_kit.rewards import Reward


class Task:
    """The base of every task: a subclass overrides what it has.

    It has prompts and demonstrations, and either a `rater` who judges samples or `preferences` that people gave before.
    """

    name: str = "task"  # which task it is, for people
    base_model: str | None = None  # directory or hub id where training starts; None: one is named or pretrained
    source: str | None = None  # the file or hub id that it reads

    def prompts(self, split: str, n: int | None = None, seed: int = 0) -> Dataset:
        """`n` prompts (default: all) of a split: "preference" and "train" to learn on, "test" to evaluate on."""
        raise NotImplementedError(f"task {self.name!r} has no prompts")

    def demonstrations(self, n: int | None = None, seed: int = 0) -> Dataset:
        """`n` demonstrations (default: all) for SFT: `prompt, completion`."""
        raise NotImplementedError(f"task {self.name!r} has no demonstrations")

    def rater(self, seed: int = 0) -> Rater | None:
        """Who judges samples; None where the task has `preferences` of its own."""
        return None

    def preferences(self, split: str = "train") -> Dataset:
        """Preferences that were given before, of the split "train" or "test": `prompt, chosen, rejected`."""
        raise NotImplementedError(f"task {self.name!r} has no preferences of its own: its rater judges samples")

    @property
    def gold(self) -> Reward | None:
        """The true utility as a reward, where it is known."""
        return None

    def effects(self, scores: pd.DataFrame) -> pd.DataFrame | None:
        """What a mean hides, where it is known: a row per (model, effect) with its `share[_lo, _hi]` of completions."""
        return None


class Pairs(Task):
    """Preferences from a file or hub id, split by prompt into "train" and "test"; the truth is not known.

    They are read and checked when they are first asked for; raises DataError that names row and column.
    """

    name = "pairs"
    source: str

    def __init__(self, source: str, seed: int = 0) -> None:
        self.source = source
        self.seed = seed

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        """The pairs of each split; those of "preference" are those of "train"."""
        pairs = data.load(self.source)
        data.check(pairs, source=self.source)
        train, test = data.split_by_prompt(pairs, seed=self.seed)
        return {"preference": train, "train": train, "test": test}

    def preferences(self, split: str = "train") -> Dataset:
        return self.splits[split]

    def prompts(self, split: str, n: int | None = None, seed: int = 0) -> Dataset:
        """The different prompts of a split in an order drawn by `seed`."""
        distinct = list({str(prompt): prompt for prompt in self.splits[split]["prompt"][:]}.values())
        order = np.random.default_rng([seed, 1]).permutation(len(distinct))[:n]
        return Dataset.from_dict({"prompt": [distinct[i] for i in order]})

    def demonstrations(self, n: int | None = None, seed: int = 0) -> Dataset:
        """The chosen completions of the split "train"."""
        chosen = self.splits["train"].select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
        return chosen if n is None else chosen.shuffle(seed=seed).select(range(min(n, len(chosen))))
