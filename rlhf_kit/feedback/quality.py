"""The raters of a frame of judgments, a row each: how much they judged, how well, how fast, and what sways them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from rlhf_kit import stats
from rlhf_kit.feedback.agreement import UNIT, units, words
from rlhf_kit.feedback.bias import biases, gaps, gold_scores, swapped
from rlhf_kit.rewards import Reward
from rlhf_kit.stats import NOT_MEASURED, Interval, columns

TOO_FAST = 1 / 3  # of a rater's own median time per word

# What each column of `raters` means, in the words of the report.
MEANINGS = {
    "judgments": "judgments given, without those taken back; skipped ones count",
    "skips": "items skipped",
    "ties": "pairs called equal",
    "agree": "share of units in which the rater says what most of the others say; units in which their votes are tied "
    "are left out and counted as even votes",
    "agree_gold": "share of decided pairs in which the rater prefers the completion of higher gold utility",
    "side_bias": "share of decided pairs in which the completion at the page's first place was preferred, less 1/2",
    "lapse": "share of the rater's choices made as by a coin, from the same model as position and length; what only "
    "this rater does not know of a pair counts too",
    "position": "log-odds that standing first on the page adds, from a model of choices that holds quality and length "
    "equal and knows of lapses, with weak priors",
    "length": "log-odds that each more word adds, from the same model; without gold it is relative to the mean of "
    "the panel, whose shared taste cannot be told from quality",
    "position_swapped": "log-odds of the first place from pairs judged in both orders, log(n first-first / n "
    "second-second) / 2: exact whatever the quality",
    "seconds": "median time of a judgment, in seconds",
    "too_fast": "share of timed judgments that took less than a third of the rater's own median time per word",
    "repeats": "units that the rater judged again",
    "repeats_changed": "share of these in which the later value is another one",
}


def raters(judgments: pd.DataFrame, gold: Reward | None = None, seed: int = 0) -> pd.DataFrame:
    """A row per rater, columns as MEANINGS says; shares and biases have `_lo` and `_hi`, 95% intervals.

    Intervals of shares are bootstrapped over items, those of log-odds are of `biases` and `swapped`. What cannot be
    measured is NaN, and `why` says why of the biases. Of repeated judgments the last counts. `gold` is a reward.
    """
    found = units(judgments)
    present = judgments[~judgments["withdrawn"]]
    repeated = _repeats(units(judgments, repeats=True))
    others = _majority_of_others(found)
    scores = gold_scores(present, gold) if gold is not None and len(present) else {}
    rows = []
    for rater, given in present.groupby("rater"):
        own, votes = found[found["rater"] == rater], others[others["rater"] == rater]
        pairs = own[(own["question"] == "rank")]
        decided = pairs[pairs["value"] != 0]
        sided = decided[decided["first"] != 0]
        clear = votes[votes["majority"].notna()]
        again = repeated[repeated["rater"] == rater]
        skipped = given["ranks"].isna() & given["rating"].isna()
        row: dict[str, Any] = {"rater": rater, "judgments": len(given), "skips": int(skipped.sum())}
        row |= {"ties": int((pairs["value"] == 0).sum()), "units": len(own)}
        row |= _share("agree", clear["value"] == clear["majority"], clear["item"], seed)
        row |= {"even_votes": int(votes["majority"].isna().sum())}
        if gold is not None:
            gap = gaps(decided, scores)
            row |= _share("agree_gold", (gap * decided["value"])[gap != 0] > 0, decided["item"][gap != 0], seed)
        row |= _share("side_bias", sided["value"] == sided["first"], sided["item"], seed, less=0.5)
        row |= _speed(given) | {"repeats": len(again)}
        row |= _share("repeats_changed", again["changed"], again["item"], seed)
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.merge(biases(judgments, gold), on="rater").merge(swapped(judgments), on="rater")


def _majority_of_others(found: pd.DataFrame) -> pd.DataFrame:
    """The units with `majority`, what most of the other raters say; NaN: they are even. Units of one rater are out."""
    each = found.groupby([*UNIT, "value"]).size().rename("votes").reset_index()
    votes = found.merge(each, on=UNIT, suffixes=("", "_said"))
    votes["votes"] -= votes["value"] == votes["value_said"]  # the rater's own
    votes = votes[votes["votes"] > 0]
    top = votes[votes["votes"] == votes.groupby([*UNIT, "rater"])["votes"].transform("max")]
    sole = top.groupby([*UNIT, "rater"])["value_said"].transform("size") == 1
    return top.assign(majority=top["value_said"].where(sole)).drop_duplicates([*UNIT, "rater"])


def _repeats(found: pd.DataFrame) -> pd.DataFrame:
    """Units judged again by the same rater, with `changed`: the value is not that of the time before."""
    before = found.groupby([*UNIT, "rater"])["value"].shift()
    return found[before.notna()].assign(changed=found["value"] != before)


def _speed(given: pd.DataFrame) -> dict[str, float]:
    """Median seconds, and the share of judgments far faster per word than this rater's own."""
    timed = given[given["seconds"].notna()]
    if timed.empty:
        return {"seconds": np.nan, "too_fast": np.nan}
    length = timed["completions"].map(lambda texts: max(1, sum(map(words, texts))))
    per_word = timed["seconds"] / length
    return {
        "seconds": float(timed["seconds"].median()),
        "too_fast": float((per_word < TOO_FAST * per_word.median()).mean()),
    }


def _share(name: str, hits: pd.Series, items: pd.Series, seed: int, less: float = 0.0) -> dict[str, float]:
    share = stats.bootstrap(hits.astype(float), items, seed=seed) if len(hits) else NOT_MEASURED
    return columns(name, Interval(*(bound - less for bound in share)))
