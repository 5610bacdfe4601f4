"""Collecting judgments, and the datasets in TRL's columns that they make: pairs from rankings, labels from ratings."""

import time
import warnings
from collections.abc import Mapping, Sequence
from itertools import combinations, cycle
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit.feedback.judging import FeedbackError, Item, Question, Rater, as_row, check_question, judgments_frame
from rlhf_kit.feedback.store import Store
from rlhf_kit.progress import Countdown

# These columns of samples describe one completion; the others describe the prompt, unless they differ within it.
OF_A_COMPLETION = ("sample", "completion", "finished", "n_tokens", "kl")
# Columns that mean something in the datasets made here; an item's own of these names get "_dataset" behind them.
OURS = ("prompt", "completion", "chosen", "rejected", "label", "margin", "shown_first", "item", "rater")
# Llama 2 (2307.09288, Table 27, "margin small"): how far apart the rewards of a pair should be at least.
MARGINS = {"slightly": 1 / 3, "clearly": 2 / 3, "much": 1.0}
MIDDLE = {"good/bad": 0.5, "1-7": 4.0}  # a rating above is good, below is bad


def items(samples: pd.DataFrame, k: int = 2) -> list[Item]:
    """Each prompt's samples, `k` at a time (0-1, 2-3, ... where k is 2), as items to rank; k = 1: each one, to rate.

    A group keeps its different completions only. Items carry the columns that are the same for all samples of a prompt
    (where k is 1, all columns). Warnings count what is left out. Raises FeedbackError if nothing is left.
    """
    if missing := {"prompt_id", "prompt", "completion"} - {*samples.columns}:
        raise FeedbackError(f"items: samples have no column {min(missing)!r}; they have {', '.join(map(str, samples))}")
    if samples["prompt"].map(str).groupby(samples["prompt_id"]).nunique().max() > 1:
        raise FeedbackError("items: a prompt_id stands for different prompts; number prompts there, or rename yours")
    carried = [name for name in samples.columns if name not in (*OF_A_COMPLETION, "prompt")]
    values = samples[carried].map(str).groupby(samples["prompt_id"]).nunique().max()
    differ = [name for name in carried if k > 1 and values[name] > 1]  # such as scores
    found, equal, over = [], 0, 0
    for _, group in samples.groupby("prompt_id", sort=False):
        rows = group.to_dict("records")
        over += len(rows) % k
        for start in range(0, len(rows) - k + 1, k):
            different = {str(row["completion"]): row["completion"] for row in rows[start : start + k]}
            if len(different) < min(k, 2):
                equal += 1
                continue
            columns = {name: rows[start][name] for name in carried if name not in differ}
            found.append(Item(rows[start]["prompt"], tuple(different.values()), columns))
    if not found:
        raise FeedbackError(f"items: no prompt has {k} different samples; draw them with n={max(k, 2)} or more")
    groups = "pairs held two" if k == 2 else f"groups of {k} held only"
    notes = {
        f"{equal} of {equal + len(found)} {groups} equal completions and were not judged": equal,
        f"{over} of {len(samples)} samples were too few for another group of {k}": over,
        f"{', '.join(differ)}: differs between completions of one prompt, and is not carried along": len(differ),
    }
    for note, count in notes.items():
        if count:
            warnings.warn(note, stacklevel=3)
    return found


def choose(items: Sequence[Item], n: int, seed: int = 0) -> list[Item]:
    """`n` of the items, drawn at random, in their order; FeedbackError if there are fewer."""
    if n > len(items):
        raise FeedbackError(f"choose: n={n}, but there are {len(items)} items")
    return [items[i] for i in sorted(np.random.default_rng([seed, 9]).permutation(len(items))[:n])]


def ask(
    items: Sequence[Item],
    raters: Rater | Sequence[Rater],
    question: Question = "rank",
    per_item: int = 1,
    store: Store | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Judgments of items, a row each: every item goes to `per_item` of the raters, who take turns.

    The order in which completions are shown is drawn. A `store` keeps each judgment before the next is asked for, and
    a rater is not asked again about what the store has from this rater. Raises FeedbackError if raters lack names of
    their own or are fewer than `per_item`, or if the items do not fit the question.
    """
    raters = list(raters) if isinstance(raters, Sequence) else [raters]
    check_question(question, items)
    names = [getattr(rater, "name", "") for rater in raters]
    if not all(names) or not 1 <= per_item <= len(set(names)) == len(names):
        raise FeedbackError(f"ask: per_item={per_item} of {names}; give each a `name` of its own, and enough raters")
    known = set()
    if store is not None:
        store.add(items)
        known = {(each.item, name) for name in names for each in store.judged(name, question)}
    generator, waiting = np.random.default_rng([seed, 8]), []
    for item, rater in zip((item for item in items for _ in range(per_item)), cycle(raters)):
        shown = draw_order(len(item.completions), generator)  # also where it is known: a resumed run draws the same
        if (item.id, rater.name) not in known:
            waiting.append((item, rater, shown))
    countdown = Countdown(f"judged by {', '.join(names)}", len(waiting))
    rows = []
    for done, (item, rater, shown) in enumerate(waiting, 1):
        started = time.monotonic()
        answer = rater(item.prompt, [item.completions[place] for place in shown], question)
        seconds = time.monotonic() - started if getattr(rater, "timed", True) else None
        interface = getattr(rater, "interface", type(rater).__name__)
        rows.append(as_row(item, rater.name, question, answer, shown, seconds, interface) | {"judgment": done})
        if store is not None:
            store.append(rows[-1])
        if getattr(rater, "slow", False):
            countdown.at(done)
    if store is None:
        return judgments_frame(rows)
    found, asked = store.judgments(), {item.id for item in items}
    return found[found["item"].isin(asked) & found["rater"].isin(names) & (found["question"] == question)]


def draw_order(n: int, generator: np.random.Generator) -> tuple[int, ...]:
    """The order in which n completions are shown: `order[place]` is the completion at that place."""
    if n == 2:
        return (0, 1) if generator.random() < 0.5 else (1, 0)
    return tuple(int(i) for i in generator.permutation(n))


def collect(samples: pd.DataFrame, rater: Rater | Sequence[Rater], seed: int = 0, k: int = 2, **asking: Any) -> Dataset:
    """Preferences (`prompt, chosen, rejected`) from samples, k to an item; `asking` (per_item, store) goes to `ask`."""
    return preferences(ask(items(samples, k), rater, seed=seed, **asking))


def preferences(judgments: pd.DataFrame, margins: Mapping[str, float] | None = None) -> Dataset:
    """`prompt, chosen, rejected` from rankings: every pair where a judgment puts one completion above the other.

    This is InstructGPT's way (2203.02155, section 3.5): where K > 2 a column `item` names the ranking of each pair, and
    `train.reward_model` keeps these pairs in one batch. `margins` (such as MARGINS) adds a column `margin` by strength,
    0 where none was given: Llama 2's loss. A warning counts ties and skipped items; FeedbackError if no pair is left.
    """
    ranked, rows, silent = _answers(judgments, ["rank"]), [], 0
    grouped = any(len(judgment["ranks"] or ()) > 2 for judgment in ranked)
    for judgment in ranked:
        pairs, known = _pairs(judgment), judgment["known"]
        silent += not pairs
        if grouped:
            known["item"] = f"{judgment['item']}/{judgment['rater']}"
        if margins is not None:
            known["margin"] = margins.get(judgment["strength"], 0.0)
        rows += [known | pair for pair in pairs]
    if not rows:
        raise FeedbackError(f"preferences: none of {len(ranked)} judgments puts a completion above another")
    if silent:
        warnings.warn(f"{silent} of {len(ranked)} judgments are ties or skipped, and give no pair", stacklevel=2)
    return _dataset(rows)


def labels(judgments: pd.DataFrame) -> Dataset:
    """`prompt, completion, label` from ratings, for KTO: good is True, bad False; on 1-7, 5 to 7 is good, 1 to 3 bad.

    Ratings of 4 and skipped items give no row; a warning counts them. Raises FeedbackError if there is no row at all.
    """
    rated, rows = _answers(judgments, list(MIDDLE)), []
    for judgment in rated:
        rating, middle = judgment["rating"], MIDDLE[judgment["question"]]
        if rating < middle or rating > middle:  # a skipped one is NaN, and neither
            rows.append(judgment["known"] | {"completion": judgment["completions"][0], "label": rating > middle})
    if not rows:
        raise FeedbackError(f"labels: none of {len(rated)} judgments calls a completion good or bad")
    if left := len(rated) - len(rows):
        warnings.warn(f"{left} of {len(rated)} ratings are in the middle or skipped, and give no label", stacklevel=2)
    return _dataset(rows)


def _pairs(judgment: Mapping[Any, Any]) -> list[dict[str, Any]]:
    ranks, texts, shown, pairs = judgment["ranks"] or (), judgment["completions"], list(judgment["shown"]), []
    for pair in combinations(range(len(ranks)), 2):
        better, worse = sorted(pair, key=lambda index: ranks[index])
        if ranks[better] < ranks[worse]:
            first = "chosen" if shown.index(better) < shown.index(worse) else "rejected"
            pairs.append({"chosen": texts[better], "rejected": texts[worse], "shown_first": first})
    return pairs


def _answers(judgments: pd.DataFrame, questions: list[str]) -> list[dict[Any, Any]]:
    """The rows that answer one of the questions; `known` is what each gives to a dataset, with the rater of several."""
    found = judgments[judgments["question"].isin(questions) & ~judgments["withdrawn"]]
    if found.empty:
        asked = ", ".join(sorted(set(judgments["question"]))) or "none"
        raise FeedbackError(f"no judgment answers {' or '.join(map(repr, questions))}; questions asked: {asked}")
    rows, ours = found.to_dict("records"), ["prompt"] if found["rater"].nunique() == 1 else ["prompt", "rater"]
    for row in rows:
        own = {f"{name}_dataset" if name in OURS else name: value for name, value in row["columns"].items()}
        row["known"] = own | {name: row[name] for name in ours}
    return rows


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows with the columns of them all: items may differ in what they carry, and cells in their types."""
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, on_mixed_types="use_json")
