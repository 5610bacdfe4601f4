"""A person's own preferences as a task."""

from functools import cached_property

import numpy as np
from datasets import Dataset

from rlhf_kit import data
from rlhf_kit.tasks.task import Task


class Pairs(Task):
    """Preferences from a file or hub id, split by prompt into "train" and "test"; the truth is not known.

    They are read and checked when they are first asked for; raises DataError that names row and column.
    """

    name = "pairs"
    source: str

    def __init__(self, source: str, seed: int = 0) -> None:
        self.source, self.seed = source, seed

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
