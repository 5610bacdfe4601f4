"""Collecting judgments: which items to ask about, whom to ask, and how many times."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit.feedback.converting import preferences
from rlhf_kit.feedback.judging import FeedbackError, Item, Question, Rater, as_row, check_question, judgments_frame
from rlhf_kit.feedback.store import Store
from rlhf_kit.progress import Countdown
from rlhf_kit.rewards import Ensemble

# Columns of samples that say something of one completion, not of the prompt.
OF_A_COMPLETION = ("sample", "completion", "finished", "n_tokens", "kl")


def items(samples: pd.DataFrame, k: int = 2) -> list[Item]:
    """Each prompt's samples, `k` at a time (0-1, 2-3, ... where k is 2), as items to rank; k = 1: each one, to rate.

    Equal completions ask nothing: of a group only the different ones are kept, and a group of one is left out; so are
    samples that are too few for another group. Warnings count these. The prompts' columns are carried along, and where
    k is above 1 columns that differ between completions of a prompt, such as scores, are left out with a warning.
    """
    carried = [name for name in samples.columns if name not in (*OF_A_COMPLETION, "prompt")]
    differ = [name for name in carried if k > 1 and _differs(samples, name)]
    carried = [name for name in carried if name not in differ]
    found, equal, over = [], 0, 0
    for _, group in samples.groupby("prompt_id", sort=False):
        rows = group.to_dict("records")
        over += len(rows) % k
        for start in range(0, len(rows) - k + 1, k):
            together = rows[start : start + k]
            different = {str(row["completion"]): row["completion"] for row in together}
            if len(different) < min(k, 2):
                equal += 1
                continue
            columns = {name: together[0][name] for name in carried}
            found.append(Item(together[0]["prompt"], tuple(different.values()), columns))
    if not found:
        raise FeedbackError(
            f"collect: no prompt has {k} different samples to compare; draw them with n={max(k, 2)} or more"
        )
    if equal:
        warnings.warn(
            f"{equal} of {equal + len(found)} {'pairs held two' if k == 2 else f'groups of {k} held only'} equal "
            "completions and were not judged",
            stacklevel=3,
        )
    if over:
        warnings.warn(f"{over} of {len(samples)} samples were too few for another group of {k}", stacklevel=3)
    if differ:
        warnings.warn(
            f"{', '.join(differ)}: differs between completions of one prompt, and is not carried along", stacklevel=3
        )
    return found


def _differs(samples: pd.DataFrame, name: str) -> bool:
    """Whether a column has several values for one prompt: it then belongs to completions."""
    return bool((samples[name].map(str).groupby(samples["prompt_id"]).nunique() > 1).any())


def choose(items: Sequence[Item], n: int, ensemble: Ensemble | None = None, seed: int = 0) -> list[Item]:
    """`n` of the items: drawn at random, or those on which the members of an `ensemble` of rewards disagree most.

    Disagreement is the spread over members of what they give a completion, each less its mean over the item's
    completions, for only differences matter (2009.01325, appendix; active choice as in 1706.03741, section 2.2.4).
    """
    if not 1 <= n <= len(items):
        raise FeedbackError(f"choose: n={n}, but there are {len(items)} items")
    if ensemble is None:
        order = np.random.default_rng([seed, 9]).permutation(len(items))
        return [items[i] for i in sorted(order[:n])]
    spread = disagreement(items, ensemble)
    return [items[i] for i in np.argsort(-spread, kind="stable")[:n]]


def disagreement(items: Sequence[Item], ensemble: Ensemble) -> np.ndarray:
    """(n,): for each item, by how much the members' opinions of its completions differ, in units of reward."""
    prompts = [item.prompt for item in items for _ in item.completions]
    completions = [completion for item in items for completion in item.completions]
    each = ensemble.each(prompts, completions).numpy()  # (members, completions of all items)
    ends = np.cumsum([len(item.completions) for item in items])
    parts = np.split(each, ends[:-1], axis=1)
    return np.array([(part - part.mean(1, keepdims=True)).std(0, ddof=1).mean() for part in parts])


def ask(
    items: Sequence[Item],
    raters: Rater | Sequence[Rater],
    question: Question = "rank",
    per_item: int = 1,
    budget: int | None = None,
    store: Store | None = None,
    seed: int = 0,
    label: str | None = None,
) -> pd.DataFrame:
    """Judgments of items, a row each: every item goes to `per_item` raters, in turn, until `budget` is spent.

    The order in which completions are shown is drawn. With a `store` each judgment is kept there before the next is
    asked for, and what a rater has judged there already is not asked again. `label` shows progress.
    """
    raters = list(raters) if isinstance(raters, Sequence) else [raters]
    check_question(question, items)
    _check_raters(raters, per_item)
    generator = np.random.default_rng([seed, 8])
    planned = _assignments(len(items), len(raters), per_item, budget)
    countdown = Countdown(label or "judgments", len(planned))
    known = set()
    if store is not None:
        store.add(items)
        known = {(row.item, row.rater) for row in store.judgments().query("question == @question").itertuples()}
    rows: list[dict[str, Any]] = []
    for done, (i, r) in enumerate(planned, 1):
        item, rater = items[i], raters[r]
        shown = draw_order(len(item.completions), generator)
        if (item.id, rater.name) in known:
            continue
        started = time.monotonic()
        answer = rater(item.prompt, [item.completions[place] for place in shown], question)
        seconds = time.monotonic() - started if getattr(rater, "timed", True) else None
        interface = getattr(rater, "interface", type(rater).__name__)
        if store is not None:
            store.append(item, rater.name, question, answer, shown, seconds, interface)
        else:
            rows.append(as_row(done, item, rater.name, question, answer, shown, seconds, interface))
        if label is not None:
            countdown.at(done)
    if label is not None:
        for rater in raters:
            if hasattr(rater, "costs"):
                print(f"  {rater.name}: {rater.costs()}", flush=True)
    if store is None:
        return judgments_frame(rows)
    found = store.judgments()
    asked, names = {item.id for item in items}, {rater.name for rater in raters}
    return found[found["item"].isin(asked) & found["rater"].isin(names) & (found["question"] == question)]


def collect(samples: pd.DataFrame, rater: Rater | Sequence[Rater], seed: int = 0, k: int = 2, **asking: Any) -> Dataset:
    """Preferences (`prompt, chosen, rejected`) from samples: each prompt's samples are paired 0-1, 2-3, ... and judged.

    With `k` above 2 they are ranked k at a time. `asking` goes to `ask`: per_item, budget, store, label.
    """
    return preferences(ask(items(samples, k), rater, seed=seed, **asking))


def draw_order(n: int, generator: np.random.Generator) -> tuple[int, ...]:
    """The order in which n completions are shown: `order[place]` is the completion at that place."""
    if n == 2:
        return (0, 1) if generator.random() < 0.5 else (1, 0)
    return tuple(int(i) for i in generator.permutation(n))


def _assignments(n_items: int, n_raters: int, per_item: int, budget: int | None) -> list[tuple[int, int]]:
    """(item, rater) to ask for in order: raters take turns, so that each judges as many as the others."""
    turns = [(i, (i * per_item + k) % n_raters) for i in range(n_items) for k in range(per_item)]
    return turns[:budget]


def _check_raters(raters: Sequence[Rater], per_item: int) -> None:
    names = [getattr(rater, "name", "") for rater in raters]
    if not all(name.strip() for name in names):
        raise FeedbackError("ask: a rater has no name; give each one a `name`, for judgments are kept by it")
    if len(set(names)) < len(names):
        raise FeedbackError(f"ask: two raters have the same name ({', '.join(sorted(names))}); give each its own")
    if not 1 <= per_item <= len(names):
        raise FeedbackError(f"ask: per_item={per_item}, but there are {len(names)} raters")
