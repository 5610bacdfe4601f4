"""Votes and agreement: what each rater says of each pair, and how far beyond chance raters say the same.

A vote on two completions of a ranked item is +1 (the first in the item's order is better), 0 (a tie) or -1; a vote on a
rated completion is its rating.
"""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rlhf_kit import stats
from rlhf_kit.feedback.judging import SCALES, FeedbackError
from rlhf_kit.rewards import Completion
from rlhf_kit.stats import NOT_MEASURED

DOMAINS: dict[str, list[int]] = {"rank": [-1, 0, 1], **{question: list(scale) for question, scale in SCALES.items()}}
PAIR = ["question", "item", "pair"]  # what a vote is about


def votes(judgments: pd.DataFrame, repeats: bool = False) -> pd.DataFrame:
    """A row per rater and pair, or rated completion: `question, item, rater, pair, value, first, words`.

    `pair` names the completions by index, such as "0-1", or "0" for a rating. `first` is +1 where the page began with
    the pair's first completion, -1 with its second, else 0; `words` is the length of the first less that of the second.
    The last of a rater's repeated votes counts, unless `repeats` asks for all. FeedbackError if no judgment counts.
    """
    present = judgments[~judgments["withdrawn"]]
    if present.empty:
        raise FeedbackError("there are no judgments yet; collect some with feedback.ask or rk.rate")
    rows: list[dict[str, Any]] = []
    for judgment in present.to_dict("records"):
        known = {name: judgment[name] for name in ("question", "item", "rater")}
        lengths = [words(completion) for completion in judgment["completions"]]
        if not np.isnan(judgment["rating"]):
            rows.append({**known, "pair": "0", "value": int(judgment["rating"]), "first": 0, "words": lengths[0]})
        ranks, top = judgment["ranks"] or (), judgment["shown"][0]
        for one, other in combinations(range(len(ranks)), 2):
            value, first = int(np.sign(ranks[other] - ranks[one])), (top == one) - (top == other)
            apart = lengths[one] - lengths[other]
            rows.append({**known, "pair": f"{one}-{other}", "value": value, "first": first, "words": apart})
    frame = pd.DataFrame(rows, columns=[*PAIR, "rater", "value", "first", "words"])
    return frame if repeats else frame.drop_duplicates([*PAIR, "rater"], keep="last").reset_index(drop=True)


def words(completion: Completion) -> int:
    """Words of a text or a chat: the parts between spaces that have a letter or a digit."""
    texts = [completion] if isinstance(completion, str) else [message.get("content") or "" for message in completion]
    return sum(any(map(str.isalnum, word)) for text in texts for word in text.split())


def agreement(judgments: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row per question and measure: `question, measure, raters, value, lo, hi, used, left_out, why`.

    "alpha" is Krippendorff's ordinal alpha (2011), 1 - observed / expected disagreement: 1 is perfect agreement, 0 is
    what chance gives, and a tie is half-way between two opposite preferences. "percent agreement" is the chance that
    two raters of a pair say the same. `used` counts the pairs, or rated completions, with two raters or more,
    `left_out` the others; `why` says why a value is NaN. Intervals are 95%, by bootstrap over items.
    """
    rows: list[dict[str, Any]] = []
    for question, part in votes(judgments).groupby("question", sort=False):
        domain = DOMAINS[str(question)]
        table = part.groupby(["item", "pair", "value"]).size().unstack(fill_value=0)
        counts = table.reindex(columns=domain, fill_value=0).to_numpy()  # votes for each value, (pairs, values)
        shared = counts.sum(1) > 1
        counts, items = counts[shared], table.index.get_level_values("item")[shared]
        known = {"question": question, "raters": part["rater"].nunique()}
        known |= {"used": len(counts), "left_out": len(table) - len(counts)}
        alpha = percent = NOT_MEASURED
        if len(counts):
            raters = counts.sum(1)
            same = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
            alpha = stats.bootstrap_of(partial(_alpha, counts, domain), items, seed=seed)
            percent = stats.bootstrap(same, items, seed=seed)
        undefined = "only one value was ever given" if len(counts) else "no two raters judged the same"
        for measure, found in {"alpha": alpha, "percent agreement": percent}.items():
            numbers = {"value": found.mean, "lo": found.lo, "hi": found.hi}
            rows.append({**known, "measure": measure, **numbers, "why": undefined if np.isnan(found.mean) else ""})
    columns = ["question", "measure", "raters", "value", "lo", "hi", "used", "left_out", "why"]
    return pd.DataFrame(rows, columns=columns)


def _alpha(counts: NDArray[np.int64], domain: list[int], rows: NDArray[np.int64]) -> float:
    drawn = counts[rows]
    if domain == DOMAINS["rank"]:
        # Each pair in both orders, because the order of an item's completions means nothing. Preferences that list the
        # better one first would otherwise look like agreement by chance.
        drawn = np.concatenate([drawn, drawn[:, ::-1]])
    if (drawn.sum(0) > 0).sum() < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=drawn, value_domain=domain, level_of_measurement="ordinal"))
