"""Judgments as datasets in TRL's columns: rankings become pairs, strengths become margins, ratings become labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import pandas as pd
from datasets import Dataset

from rlhf_kit.feedback.judging import FeedbackError

# Llama 2 (2307.09288, Table 27, "margin small"): how far apart the rewards of a pair should be at least.
MARGINS = {"slightly": 1 / 3, "clearly": 2 / 3, "much": 1.0}
MIDDLE = {"good/bad": 0.5, "1-7": 4.0}  # a rating above is good, below is bad


def preferences(judgments: pd.DataFrame, margins: Mapping[str, float] | None = None) -> Dataset:
    """`prompt, chosen, rejected` from rankings: every pair where a judgment puts one completion above the other.

    This is InstructGPT's way (2203.02155, section 3.5): where K > 2 a column `item` names the ranking of each pair, and
    `train.reward_model` keeps these pairs in one batch. `margins` (such as MARGINS) adds a column `margin` by strength,
    0 where none was given: Llama 2's loss. Repeated judgments give their pairs again. Ties and skipped items give no
    pair; a warning counts them. Raises FeedbackError if there is no pair at all.
    """
    ranked = _answers(judgments, ["rank"])
    several = ranked["rater"].nunique() > 1
    grouped = any(len(ranks) > 2 for ranks in ranked["ranks"] if ranks is not None)
    rows, silent = [], 0
    for judgment in rows_of(ranked):
        pairs = _pairs(judgment)
        silent += not pairs
        known: dict[str, Any] = {"rater": judgment["rater"]} if several else {}
        if grouped:
            known["item"] = f"{judgment['item']}/{judgment['rater']}"
        if margins is not None:
            known["margin"] = margins.get(judgment["strength"], 0.0)
        rows += [{**judgment["columns"], "prompt": judgment["prompt"], **pair, **known} for pair in pairs]
    if not rows:
        raise FeedbackError(f"preferences: none of {len(ranked)} judgments puts a completion above another")
    if silent:
        warnings.warn(f"{silent} of {len(ranked)} judgments are ties or skipped, and give no pair", stacklevel=2)
    return Dataset.from_list(rows)


def labels(judgments: pd.DataFrame) -> Dataset:
    """`prompt, completion, label` from ratings, for KTO: good is True, bad False; on 1-7, 5 to 7 is good, 1 to 3 bad.

    Ratings of 4 and skipped items give no row; a warning counts them. Raises FeedbackError if there is no row at all.
    """
    rated = _answers(judgments, list(MIDDLE))
    several, middle = rated["rater"].nunique() > 1, rated["question"].map(MIDDLE)
    clear = rated[rated["rating"].notna() & (rated["rating"] != middle)]
    rows = [
        {
            **judgment["columns"],
            "prompt": judgment["prompt"],
            "completion": judgment["completions"][0],
            "label": judgment["rating"] > MIDDLE[judgment["question"]],
            **({"rater": judgment["rater"]} if several else {}),
        }
        for judgment in rows_of(clear)
    ]
    if not rows:
        raise FeedbackError(f"labels: none of {len(rated)} judgments calls a completion good or bad")
    if len(rows) < len(rated):
        left = len(rated) - len(rows)
        warnings.warn(f"{left} of {len(rated)} ratings are in the middle or skipped, and give no label", stacklevel=2)
    return Dataset.from_list(rows)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dicts, with Python's own numbers."""
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


def _pairs(judgment: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs of one ranking, and which completion of each was shown first (None: not known)."""
    ranks, texts, shown = judgment["ranks"] or (), judgment["completions"], list(judgment["shown"] or ())
    pairs = []
    for pair in combinations(range(len(ranks)), 2):
        better, worse = sorted(pair, key=lambda index: ranks[index])
        if ranks[better] < ranks[worse]:
            first = None
            if shown:
                first = "chosen" if shown.index(better) < shown.index(worse) else "rejected"
            pairs.append({"chosen": texts[better], "rejected": texts[worse], "shown_first": first})
    return pairs


def _answers(judgments: pd.DataFrame, questions: list[str]) -> pd.DataFrame:
    found = judgments[judgments["question"].isin(questions) & ~judgments["withdrawn"]]
    if found.empty:
        asked = ", ".join(sorted(set(judgments["question"]))) or "none"
        raise FeedbackError(f"no judgment answers {' or '.join(map(repr, questions))}; questions asked: {asked}")
    return found
