"""Evaluation on held-out prompts: scores of every model, reward-model accuracy and calibration, with intervals."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit import sampling, stats
from rlhf_kit.models import ModelPath
from rlhf_kit.rewards import Reward, checked
from rlhf_kit.stats import Interval, compare, summary  # noqa: F401 (evaluate.compare and evaluate.summary)

OURS = ("model", "seed", "step", "n", "beta", "run", "kl", "gold", "proxy")  # columns that statistics and figures read


def score(
    models: Mapping[str, ModelPath],
    prompts: Dataset,
    rewards: Mapping[str, Reward],
    reference: ModelPath | None = None,
    n: int = 2,
    **settings: Any,
) -> pd.DataFrame:
    """Scores frame: `n` completions of each prompt by each model, a column per reward, `kl` to `reference` in nats.

    Rewards get the prompts' own columns; those with a name of OURS then have "_dataset" behind it in the frame.
    settings: of `sampling.sample`, such as temperature, max_completion_length and seed.
    """
    parts = []
    for name, model in models.items():
        samples = sampling.sample(model, prompts, n, reference=reference, **settings)
        own = {column for column in prompts.column_names if f"{column}_dataset" not in samples} & {*OURS, *rewards}
        theirs = samples[list(own)].add_suffix("_dataset")
        scored = sampling.add_rewards(samples, rewards).drop(columns=own - {*rewards})
        parts.append(scored.join(theirs).assign(model=name))
    scores = pd.concat(parts, ignore_index=True)
    return scores[["model", *(column for column in scores.columns if column != "model")]]


def frontier(scores: pd.DataFrame) -> pd.DataFrame:
    """Points of a reward-KL figure: means with intervals over prompts for each (model, step, n) of the scores.

    The `kl` of best-of-n (rows with `n`) is not measured: it is the upper bound that the scores carry.
    """
    rows = []
    for key, group in scores.groupby(["model", "step", "n"], sort=False, dropna=False):
        row: dict[str, Any] = dict(zip(("model", "step", "n"), key, strict=True))
        for value in ("kl", "proxy", "gold"):
            if stats.measured(value, group):
                row |= stats.columns(value, stats.bootstrap(group[value], group["prompt_id"]))
        rows.append(row)
    return pd.DataFrame(rows)


def accuracy(reward: Reward, preferences: Dataset) -> Interval:
    """Share of preferences on whose chosen side the reward is higher, ties 1/2; prompts are resampled whole."""
    prompts, _ = pd.factorize(pd.Series([str(prompt) for prompt in preferences["prompt"][:]]))
    return stats.pair_accuracy(_margins(reward, preferences), prompts)


def reward_calibration(reward: Reward, preferences: Dataset, scale: float = 1.0) -> pd.DataFrame:
    """How often the completion shown first is preferred, against sigmoid(scale * margin) of the reward.

    `scale` undoes the normalisation of a reward model (`RewardModel.scale`), so that margins are log-odds again.
    """
    sign = np.where(np.asarray(preferences["shown_first"][:]) == "chosen", 1.0, -1.0)
    probabilities = 1 / (1 + np.exp(-sign * scale * _margins(reward, preferences)))
    return stats.calibration_curve(probabilities, sign > 0)


def _margins(reward: Reward, preferences: Dataset) -> np.ndarray:
    given = (reward(preferences["prompt"][:], preferences[side][:]) for side in ("chosen", "rejected"))
    chosen, rejected = (checked(each, len(preferences)).numpy() for each in given)
    return chosen - rejected
