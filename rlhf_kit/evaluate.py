"""Evaluation on held-out prompts: scores of every model, reward-model accuracy and calibration, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit import sampling, stats
from rlhf_kit.models import ModelPath
from rlhf_kit.rewards import Reward
from rlhf_kit.stats import Interval, compare, summary

__all__ = ["accuracy", "best_of_n", "reward_calibration", "compare", "frontier", "score", "summary"]


def score(
    models: Mapping[str, ModelPath],
    prompts: Dataset,
    rewards: Mapping[str, Reward],
    reference: ModelPath | None = None,
    n: int = 2,
    max_completion_length: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Scores frame: `n` completions of each prompt by each model, a column per reward, `kl` to `reference` in nats."""
    parts = []
    for name, model in models.items():
        samples = sampling.sample(model, prompts, n, temperature, max_completion_length, reference, seed)
        parts.append(sampling.add_rewards(samples, dict(rewards)).assign(model=name))
    scores = pd.concat(parts, ignore_index=True)
    return scores[["model", *(column for column in scores.columns if column != "model")]]


def best_of_n(scored: pd.DataFrame, by: str = "proxy", n: int | None = None, name: str = "best-of-n") -> pd.DataFrame:
    """Score rows of best-of-n over the reference's own samples; `kl` is log n - (n-1)/n, an upper bound in nats."""
    best = sampling.best_of_n(scored, by, n)
    of = n or int(scored["sample"].max()) + 1
    return best.assign(model=name, kl=stats.best_of_n_kl(of))


def frontier(scores: pd.DataFrame, rewards: tuple[str, ...] = ("proxy", "gold")) -> pd.DataFrame:
    """Points of a reward-KL figure: means with intervals over prompts for each (model, step, n) of the scores.

    Best-of-n (rows with `n`) gets no measured `kl`; figures draw it at its upper bound and say so.
    """
    rows = []
    for key, group in scores.groupby(["model", "step", "n"], sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(("model", "step", "n"), key, strict=True))
        for value in ("kl", *rewards):
            if value in group and group[value].notna().any() and not (value == "kl" and pd.notna(row["n"])):
                interval = stats.bootstrap(group[value], group["prompt_id"])
                row |= {value: interval.mean, f"{value}_lo": interval.lo, f"{value}_hi": interval.hi}
        rows.append(row)
    return pd.DataFrame(rows)


def margins(reward: Reward, preferences: Dataset) -> np.ndarray:
    """r(x, chosen) - r(x, rejected) of each preference."""
    chosen, rejected = (reward(preferences["prompt"][:], preferences[side][:]) for side in ("chosen", "rejected"))
    return np.asarray(chosen) - np.asarray(rejected)


def accuracy(reward: Reward, preferences: Dataset) -> Interval:
    """Share of preferences on whose chosen side the reward is higher, ties 1/2; prompts are resampled whole."""
    gaps = margins(reward, preferences)
    return stats.pair_accuracy(gaps, np.zeros_like(gaps), _prompt_ids(preferences))


def reward_calibration(reward: Reward, preferences: Dataset, scale: float = 1.0, bins: int = 10) -> pd.DataFrame:
    """How often the completion shown first is preferred, against sigmoid(scale * margin) of the reward.

    `scale` undoes the normalisation of a reward model (`RewardModel.scale`), so that margins are log-odds again.
    """
    sign = np.where(np.asarray(preferences["shown_first"][:]) == "chosen", 1.0, -1.0)
    probabilities = 1 / (1 + np.exp(-sign * scale * margins(reward, preferences)))
    return stats.calibration_curve(probabilities, sign > 0, bins)


def _prompt_ids(dataset: Dataset) -> np.ndarray:
    return pd.factorize(pd.Series([str(prompt) for prompt in dataset["prompt"][:]]))[0]
