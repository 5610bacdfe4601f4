"""The raters of a frame of judgments, a row each: how much they judge, how well, how fast, and what sways them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rlhf_kit import stats
from rlhf_kit.feedback.agreement import PAIR, votes, words
from rlhf_kit.feedback.bias import biases, gold_gaps, position_from_swaps
from rlhf_kit.rewards import Reward
from rlhf_kit.stats import NOT_MEASURED, Interval, columns

TOO_FAST = 1 / 3  # of a rater's own median time per word

# What the columns of `raters` mean, in the two tables of the report.
MEANINGS = {
    "How much, how well, how fast": {
        "judgments": "judgments given, with skipped ones, without those taken back",
        "skips": "items skipped",
        "ties": "pairs called equal",
        "agree": "share of pairs in which the rater says what most of the others say",
        "even_votes": "pairs left out of it, because the others are evenly divided",
        "agree_gold": "share of decided pairs in which the rater prefers the completion of higher gold utility",
        "lapse": "share of choices made at random, from the same model as position and length; what only this rater "
        "does not know of a pair counts too",
        "seconds": "median time of a judgment, in seconds",
        "too_fast": "share of timed judgments that took less than a third of the rater's own median time per word",
        "repeats": "pairs that the rater judged again",
        "repeats_changed": "share of these in which the later vote differs",
    },
    "What sways them": {
        "side_bias": "share of decided pairs in which the rater prefers the first place on the page, less 1/2",
        "position": "log-odds that the first place on the page adds, from a model of choices that holds quality and "
        "length equal and allows for lapses, with weak priors",
        "position_swapped": "log-odds of the first place from pairs judged in both orders, log(n first-first / n "
        "second-second) / 2: exact whatever the quality",
        "length": "log-odds that each further word adds, from the same model; without gold it is relative to the mean "
        "of the panel, because a taste that all share cannot be told from quality",
        "choices": "pairs that the model uses; ties are left out",
        "swaps": "pairs judged in both orders",
        "why": "why the model gives no number",
    },
}


def raters(judgments: pd.DataFrame, gold: Reward | None = None, seed: int = 0) -> pd.DataFrame:
    """A row per rater with the columns of MEANINGS; shares and biases have `_lo` and `_hi`, 95% intervals.

    Intervals of shares are bootstrapped over items; those of log-odds come from `biases` and `position_from_swaps`.
    What cannot be measured is NaN, and `why` says why a bias is. The last of repeated votes counts. `gold` is a reward.
    """
    found, present = votes(judgments), judgments[~judgments["withdrawn"]]
    if gold is not None:
        found["gap"] = gold_gaps(found[found["question"] == "rank"], present, gold)
    others, repeated = _majority_of_others(found), _repeats(votes(judgments, repeats=True))
    rows = []
    for rater, given in present.groupby("rater"):
        own, said, again = (frame[frame["rater"] == rater] for frame in (found, others, repeated))
        pairs, clear = own[own["question"] == "rank"], said[said["majority"].notna()]
        decided = pairs[pairs["value"] != 0]
        sided = decided[decided["first"] != 0]
        skips = int((given["ranks"].isna() & given["rating"].isna()).sum())
        row: dict[str, Any] = {"rater": rater, "judgments": len(given), "skips": skips}
        row |= {"ties": len(pairs) - len(decided), "votes": len(own)}
        row |= _share("agree", clear["value"] == clear["majority"], clear["item"], seed)
        row |= {"even_votes": len(said) - len(clear)}
        if gold is not None:
            known = decided[decided["gap"] != 0]
            row |= _share("agree_gold", known["gap"] * known["value"] > 0, known["item"], seed)
        row |= _share("side_bias", sided["value"] == sided["first"], sided["item"], seed, less=0.5)
        row |= _speed(given) | {"repeats": len(again)}
        row |= _share("repeats_changed", again["changed"], again["item"], seed)
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.merge(biases(judgments, gold), on="rater").merge(position_from_swaps(judgments), on="rater")


def _majority_of_others(found: pd.DataFrame) -> pd.DataFrame:
    """Votes with `majority`, what most of the other raters say (NaN: evenly divided), where there are others."""
    said = pd.get_dummies(found["value"], dtype=int)  # (votes, values)
    others = said.groupby([found[name] for name in PAIR]).transform("sum") - said
    others = others[others.sum(axis=1) > 0]
    if others.empty:
        return found.iloc[:0].assign(majority=np.nan)
    sole = others.eq(others.max(axis=1), axis=0).sum(axis=1) == 1
    return found.loc[others.index].assign(majority=others.idxmax(axis=1).where(sole))


def _repeats(found: pd.DataFrame) -> pd.DataFrame:
    """Votes of a rater on a pair judged before, with `changed`: the vote differs from the one before."""
    before = found.groupby([*PAIR, "rater"])["value"].shift()
    return found[before.notna()].assign(changed=found["value"] != before)


def _speed(given: pd.DataFrame) -> dict[str, float]:
    """Median seconds of a rater's judgments, and the share that took far less time per word than the median one."""
    lengths = given["completions"].map(lambda texts: max(1, sum(map(words, texts))))
    per_word = (given["seconds"] / lengths).dropna()
    too_fast = float((per_word < TOO_FAST * per_word.median()).mean())  # NaN where nothing was timed
    return {"seconds": float(given["seconds"].median()), "too_fast": too_fast}


def _share(name: str, hits: pd.Series, items: pd.Series, seed: int, less: float = 0.0) -> dict[str, float]:
    share = stats.bootstrap(hits.astype(float), items, seed=seed) if len(hits) else NOT_MEASURED
    return columns(name, Interval(*(bound - less for bound in share)))
