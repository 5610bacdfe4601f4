"""Judgments as datasets in TRL's columns: rankings become pairs, strengths margins, ratings labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pandas as pd
from datasets import Dataset

from rlhf_kit.feedback.judging import FeedbackError

# Llama 2 (2307.09288, Table 27, "margin small"): how far apart rewards of a pair should be at least.
MARGINS = {"slightly": 1 / 3, "clearly": 2 / 3, "much": 1.0}


def preferences(judgments: pd.DataFrame, margins: Mapping[str, float] | None = None) -> Dataset:
    """`prompt, chosen, rejected` from rankings: every pair of completions that a judgment puts one above the other.

    InstructGPT's way (2203.02155, section 3.5): where K > 2 a column `item` says which pairs are one ranking's, and
    `train.reward_model` keeps them in one batch. `margins` (such as MARGINS) adds a column `margin` by strength, 0
    where none was given: Llama 2's loss. An item judged again gives its pairs again. Ties and skipped items give no
    pair; a warning counts them.
    """
    ranked = _answers(judgments, ["rank"])
    rows, silent = [], 0
    several = ranked["rater"].nunique() > 1
    grouped = any(len(ranks) > 2 for ranks in ranked["ranks"] if ranks is not None)
    for judgment in rows_of(ranked):
        pairs = _pairs(judgment)
        silent += not pairs
        for pair in pairs:
            known: dict[str, Any] = {"rater": judgment["rater"]} if several else {}
            known |= {"item": f"{judgment['item']}/{judgment['rater']}"} if grouped else {}
            known |= {"margin": margins.get(judgment["strength"], 0.0)} if margins is not None else {}
            rows.append({**judgment["columns"], "prompt": judgment["prompt"], **pair, **known})
    if not rows:
        raise FeedbackError(f"preferences: none of {len(ranked)} judgments puts a completion above another")
    if silent:
        warnings.warn(f"{silent} of {len(ranked)} judgments are ties or skipped, and give no pair", stacklevel=2)
    return Dataset.from_list(rows)


def labels(judgments: pd.DataFrame) -> Dataset:
    """`prompt, completion, label` from ratings, for KTO: good is True, bad False; of 1-7, 5 and more is good, 3 and
    less bad.

    Ratings of 4 and skipped items give no row; a warning counts them.
    """
    rated = _answers(judgments, ["good/bad", "1-7"])
    middle = {"good/bad": 0.5, "1-7": 4.0}
    several = rated["rater"].nunique() > 1
    rows = [
        {
            **judgment["columns"],
            "prompt": judgment["prompt"],
            "completion": judgment["completions"][0],
            "label": bool(judgment["rating"] > middle[judgment["question"]]),
            **({"rater": judgment["rater"]} if several else {}),
        }
        for judgment in rows_of(rated)
        if judgment["rating"] == judgment["rating"] and judgment["rating"] != middle[judgment["question"]]
    ]
    if not rows:
        raise FeedbackError(f"labels: none of {len(rated)} judgments calls a completion good or bad")
    if len(rows) < len(rated):
        left = len(rated) - len(rows)
        warnings.warn(f"{left} of {len(rated)} ratings are in the middle or skipped, and give no label", stacklevel=2)
    return Dataset.from_list(rows)


def _pairs(judgment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs of one ranking, the better completion as chosen, and which of both was shown first."""
    ranks, place = judgment["ranks"], {index: i for i, index in enumerate(judgment["shown"] or ())}
    pairs = []
    for one, other in combinations(range(len(ranks or ())), 2):
        if ranks[one] == ranks[other]:
            continue
        chosen, rejected = (one, other) if ranks[one] < ranks[other] else (other, one)
        pair = {"chosen": judgment["completions"][chosen], "rejected": judgment["completions"][rejected]}
        first = None if not place else "chosen" if place[chosen] < place[rejected] else "rejected"
        pairs.append({**pair, "shown_first": first})
    return pairs


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dicts."""
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


def _answers(judgments: pd.DataFrame, questions: list[str]) -> pd.DataFrame:
    found = judgments[judgments["question"].isin(questions) & ~judgments["withdrawn"]]
    if found.empty:
        asked = ", ".join(sorted(set(judgments["question"]))) or "none"
        raise FeedbackError(f"no judgment answers {' or '.join(map(repr, questions))}; questions asked: {asked}")
    return found
