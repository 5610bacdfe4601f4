"""Human feedback: raters who judge two completions of one prompt, and the preferences that come of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit import pocket

# Whether the completion shown first is preferred: (prompt, first, second) -> bool.
Rater = Callable[[str, str, str], bool]


def simulated(world: pocket.World, seed: int = 0, **faults: Any) -> Rater:
    """A simulated rater of the pocket world; `faults` are fields of `pocket.Rater` (knowledge, length, lapse, ...)."""
    rater = pocket.Rater(**faults)
    generator = np.random.default_rng([seed, 7])

    def prefers_first(prompt: str, first: str, second: str) -> bool:
        return pocket.prefers_first(world, rater, prompt, first, second, generator)

    return prefers_first


def collect(samples: pd.DataFrame, rater: Rater, seed: int = 0) -> Dataset:
    """Preferences (`prompt, chosen, rejected`) from samples: each prompt's samples are paired 0-1, 2-3, ... and judged.

    Which one is shown first is drawn; `shown_first` keeps it ("chosen" or "rejected"), and the prompts' columns are
    carried along. A pair of equal completions asks nothing and is not shown; a warning counts them.
    """
    generator = np.random.default_rng([seed, 8])
    carried = [c for c in samples.columns if c not in ("sample", "completion", "finished", "n_tokens", "kl")]
    judged, equal = [], 0
    for _, group in samples.groupby("prompt_id", sort=False):
        rows = group.to_dict("records")
        for one, other in zip(rows[::2], rows[1::2], strict=False):
            if one["completion"] == other["completion"]:
                equal += 1
                continue
            first, second = (one, other) if generator.random() < 0.5 else (other, one)
            prefers_first = rater(first["prompt"], first["completion"], second["completion"])
            chosen, rejected = (first, second) if prefers_first else (second, first)
            pair = {"chosen": chosen["completion"], "rejected": rejected["completion"]}
            shown = {"shown_first": "chosen" if prefers_first else "rejected"}
            judged.append({name: first[name] for name in carried} | pair | shown)
    if not judged:
        raise ValueError("collect: no prompt has two different samples to compare; draw them with n=2 or more")
    if equal:
        warnings.warn(
            f"{equal} of {equal + len(judged)} pairs held two equal completions and were not judged", stacklevel=2
        )
    return Dataset.from_list(judged)
