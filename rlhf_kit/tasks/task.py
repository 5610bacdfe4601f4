"""What a task is: where prompts, demonstrations and preferences come from, and what is known of the truth."""

import pandas as pd
from datasets import Dataset

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
