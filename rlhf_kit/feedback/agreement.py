"""Do raters agree? What was judged, unit by unit, and how far beyond chance raters give a unit the same value.

A unit is a pair of completions of a ranked item, with the values +1 (the one that the item names first is better), 0 (a
tie) and -1; or a rated completion, with its rating. Which of two completions an item names first means nothing, so the
measures of chance-corrected agreement count each pair in both orders: else imported preferences, whose better one
comes first by custom, would look like agreement by chance.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa

from rlhf_kit import stats
from rlhf_kit.feedback.converting import rows_of
from rlhf_kit.feedback.judging import SCALES, FeedbackError
from rlhf_kit.rewards import Completion
from rlhf_kit.stats import NOT_MEASURED, Interval

Counts = NDArray[np.int64]
DOMAINS: dict[str, list[int]] = {"rank": [-1, 0, 1], **{question: list(scale) for question, scale in SCALES.items()}}
UNIT = ["question", "item", "unit"]


def units(judgments: pd.DataFrame, repeats: bool = False) -> pd.DataFrame:
    """A row per unit and rater who gave it a value: what the measures of agreement and bias read.

    Columns: `question`, `item`, `unit` (such as "0-1", indices of completions), `rater`, `value`, `first` (+1 where the
    page began with the pair's first completion, -1 with its second, 0: with neither, or not known), `words` (of the
    first less of the second), `judgment`. Skipped and withdrawn judgments give no row. Of repeated judgments the last
    counts; with `repeats` all are given, in the frame's order. Raises FeedbackError if no judgment is there at all.
    """
    if judgments.empty:
        raise FeedbackError("there are no judgments yet")
    rows: list[dict[str, Any]] = []
    for judgment in rows_of(judgments[~judgments["withdrawn"]]):
        known = {name: judgment[name] for name in ("question", "item", "rater", "judgment")}
        shown, lengths = judgment["shown"] or [None], [words(text) for text in judgment["completions"]]
        if judgment["question"] != "rank":
            if judgment["rating"] == judgment["rating"]:
                rows.append({**known, "unit": "0", "value": int(judgment["rating"]), "first": 0, "words": lengths[0]})
            continue
        ranks = judgment["ranks"] or ()
        for one, other in combinations(range(len(ranks)), 2):
            value = int(np.sign(ranks[other] - ranks[one]))
            first = (shown[0] == one) - (shown[0] == other)
            apart = lengths[one] - lengths[other]
            rows.append({**known, "unit": f"{one}-{other}", "value": value, "first": first, "words": apart})
    frame = pd.DataFrame(rows, columns=[*UNIT, "rater", "value", "first", "words", "judgment"])
    return frame if repeats else frame.drop_duplicates([*UNIT, "rater"], keep="last").reset_index(drop=True)


def units_of(judgments: pd.DataFrame, question: str | None = None) -> pd.DataFrame:
    """The units of one question; FeedbackError if it was not asked, or if several were and none is named."""
    found = units(judgments)
    asked = sorted(set(judgments["question"]))
    if question is None and len(asked) > 1:
        raise FeedbackError(f"these judgments answer {', '.join(asked)}; name one, such as question={asked[0]!r}")
    if question is not None and question not in asked:
        raise FeedbackError(f"no judgment answers {question!r}; questions asked: {', '.join(asked)}")
    return found[found["question"] == (question or asked[0])]


def words(completion: Completion) -> int:
    """Words of a text or a chat: what stands between spaces and has a letter or a digit."""
    texts = [completion] if isinstance(completion, str) else [message.get("content") or "" for message in completion]
    return sum(any(map(str.isalnum, word)) for text in texts for word in text.split())


def alpha(judgments: pd.DataFrame, question: str | None = None, seed: int = 0) -> Interval:
    """Krippendorff's alpha, 1 - observed / expected disagreement, with a 95% bootstrap interval over items.

    1 is perfect agreement, 0 what chance gives. Any number of raters may have judged a unit; units of one rater say
    nothing. Ordinal (Krippendorff 2011, "Computing Krippendorff's alpha-reliability"): a tie lies between preferring
    one and preferring the other, and 6 is nearer to 7 than 1 is; without ties this is the nominal alpha. NaN where no
    unit has two raters, or only one value was ever given. Name the `question` where the judgments answer several.
    """
    return _alpha(units_of(judgments, question), seed)


def reliability(judgments: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Every measure of agreement, a row each: `question, measure, raters, value, lo, hi, units, left_out, why`.

    Measures: "alpha"; "percent agreement", the share of two raters of a unit who give it the same value; "Fleiss's
    kappa" (1971), over units with the most common number of raters; "Cohen's kappa" (1960) of each two raters. Kappas
    are nominal: 6 against 7 is as wrong as 1 against 7. `left_out` counts units that a measure cannot use; `why` says
    in a sentence why a value is NaN. Intervals are 95%, by bootstrap over items.
    """
    found = units(judgments)
    rows: list[dict[str, Any]] = []
    for question, part in found.groupby("question", sort=False):
        counts, items = _counts(part, str(question))
        shared = counts.sum(1) > 1
        names = sorted(part["rater"].unique())
        n, alone = len(counts), int((~shared).sum())
        everyone: dict[str, Any] = {"question": question, "raters": f"all {len(names)}"}
        why = "" if shared.any() else "no unit was judged by two raters"

        def add(known: dict[str, Any], measure: str, value: Interval, used: int, left_out: int, why: str) -> None:
            undefined = "" if value.mean == value.mean else why or "only one value was ever given"
            numbers = {"value": value.mean, "lo": value.lo, "hi": value.hi}
            rows.append(known | {"measure": measure, **numbers, "units": used, "left_out": left_out, "why": undefined})

        add(everyone, "alpha", _alpha(part, seed), n - alone, alone, why)
        add(everyone, "percent agreement", _percent(counts[shared], items[shared], seed), n - alone, alone, why)
        usable = shared & (counts.sum(1) == _most_common(counts[shared].sum(1)))
        value = _resampled(_fleiss, _both_orders(counts[usable], str(question)), items[usable], seed)
        add(everyone, "Fleiss's kappa", value, int(usable.sum()), n - int(usable.sum()), why)
        table = part.pivot(index=["item", "unit"], columns="rater", values="value")
        for one, other in combinations(names, 2):
            both = table[[one, other]].dropna()
            value = _cohen(both, str(question), seed)
            why_pair = "" if len(both) else "these two judged no unit in common"
            add({**everyone, "raters": f"{one}, {other}"}, "Cohen's kappa", value, len(both), n - len(both), why_pair)
    columns = ["question", "measure", "raters", "value", "lo", "hi", "units", "left_out", "why"]
    return pd.DataFrame(rows, columns=columns)


def _counts(found: pd.DataFrame, question: str) -> tuple[Counts, NDArray[Any]]:
    """How many raters gave each unit each value of the domain [units, values], and the item of each unit."""
    table = found.groupby(["item", "unit", "value"]).size().unstack(fill_value=0)
    return table.reindex(columns=DOMAINS[question], fill_value=0).to_numpy(), table.index.get_level_values(0).to_numpy()


def _both_orders(counts: Counts, question: str) -> Counts:
    """[units, orders, values]: a pair in both orders of its completions, a rated completion in its only one."""
    return np.stack([counts, counts[:, ::-1]], 1) if question == "rank" else counts[:, None]


def _resampled(measure: Any, units: NDArray[Any], items: NDArray[Any], seed: int) -> Interval:
    """`measure` of the rows of `units` [units, orders, ...], which are taken apart into [units x orders, ...]."""
    if not len(units):
        return NOT_MEASURED
    shape = (-1, *units.shape[2:])
    return stats.bootstrap_of(lambda rows: measure(units[rows].reshape(shape)), items, seed=seed)


def _alpha(found: pd.DataFrame, seed: int) -> Interval:
    if found.empty:
        return NOT_MEASURED
    question = str(found["question"].iloc[0])
    counts, items = _counts(found, question)
    shared = counts.sum(1) > 1

    def measure(counts: Counts) -> float:
        if (counts.sum(0) > 0).sum() < 2:
            return float("nan")
        return float(
            krippendorff.alpha(value_counts=counts, value_domain=DOMAINS[question], level_of_measurement="ordinal")
        )

    return _resampled(measure, _both_orders(counts[shared], question), items[shared], seed)


def _percent(counts: Counts, items: NDArray[Any], seed: int) -> Interval:
    if not len(counts):
        return NOT_MEASURED
    raters = counts.sum(1)
    return stats.bootstrap((counts * (counts - 1)).sum(1) / (raters * (raters - 1)), items, seed=seed)


def _fleiss(counts: Counts) -> float:
    return float(fleiss_kappa(counts)) if (counts.sum(0) > 0).sum() > 1 else float("nan")


def _cohen(both: pd.DataFrame, question: str, seed: int) -> Interval:
    """Of two raters' values of the units that both judged."""
    domain = np.array(DOMAINS[question])
    one, other = (both.iloc[:, column].to_numpy()[:, None] == domain for column in (0, 1))
    tables = (one[:, :, None] & other[:, None, :]).astype(np.int64)  # (units, values, values), a single 1 each
    orders = np.stack([tables, tables[:, ::-1, ::-1]], 1) if question == "rank" else tables[:, None]

    def measure(tables: Counts) -> float:
        table = tables.sum(0)
        if (table.sum(0) + table.sum(1) > 0).sum() < 2:
            return float("nan")
        return float(cohens_kappa(table, return_results=False))

    return _resampled(measure, orders, both.index.get_level_values(0).to_numpy(), seed)


def _most_common(numbers: Counts) -> int:
    """The most common of numbers, the largest where several are; 0 of none."""
    found, times = np.unique(numbers, return_counts=True)
    return int(found[times == times.max()].max()) if len(found) else 0
