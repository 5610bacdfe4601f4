"""Collecting judgments: which items to ask about, whom to ask, and how many times."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit.feedback.converting import preferences
from rlhf_kit.feedback.judging import FeedbackError, Item, Question, Rater, as_row, check_question, judgments_frame
from rlhf_kit.feedback.store import Store
from rlhf_kit.progress import Countdown
from rlhf_kit.rewards import Ensemble

# These columns of samples describe one completion; the others describe the prompt, unless they differ within it.
OF_A_COMPLETION = ("sample", "completion", "finished", "n_tokens", "kl")


def items(samples: pd.DataFrame, k: int = 2) -> list[Item]:
    """Each prompt's samples, `k` at a time (0-1, 2-3, ... where k is 2), as items to rank; k = 1: each one, to rate.

    A group keeps its different completions only; a group of equal ones and samples too few for another group are left
    out. Items carry the columns that are the same for all samples of a prompt (where k is 1, all columns). Warnings
    count what is left out. Raises FeedbackError if nothing is left.
    """
    carried = [name for name in samples.columns if name not in (*OF_A_COMPLETION, "prompt")]
    differ = [name for name in carried if samples[name].map(str).groupby(samples["prompt_id"]).nunique().max() > 1]
    differ = differ if k > 1 else []  # such as scores
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
            columns = {name: together[0][name] for name in carried if name not in differ}
            found.append(Item(together[0]["prompt"], tuple(different.values()), columns))
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


def choose(items: Sequence[Item], n: int, ensemble: Ensemble | None = None, seed: int = 0) -> list[Item]:
    """`n` of the items: drawn at random, or those on which the members of an `ensemble` of rewards disagree most."""
    if not 1 <= n <= len(items):
        raise FeedbackError(f"choose: n={n}, but there are {len(items)} items; choose between 1 and all of them")
    if ensemble is None:
        return [items[i] for i in sorted(np.random.default_rng([seed, 9]).permutation(len(items))[:n])]
    return [items[i] for i in np.argsort(-disagreement(items, ensemble), kind="stable")[:n]]


def disagreement(items: Sequence[Item], ensemble: Ensemble) -> np.ndarray:
    """How much the members of an ensemble disagree on each item, (n,), in the reward's units.

    It is the standard deviation over members of a completion's reward less the member's mean over the item, because
    only differences matter (2009.01325, appendix; active choice as in 1706.03741, section 2.2.4).
    """
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

    The order in which completions are shown is drawn. A `store` keeps each judgment before the next is asked for, and
    a rater is not asked again about what the store has from this rater. `label` shows progress. Raises FeedbackError if
    raters lack names of their own or are fewer than `per_item`, or if the items do not fit the question.
    """
    raters = list(raters) if isinstance(raters, Sequence) else [raters]
    check_question(question, items)
    names = [getattr(rater, "name", "") for rater in raters]
    if not all(map(str.strip, names)) or len(set(names)) < len(names):
        raise FeedbackError(f"ask: the raters are named {names}; give each a `name` of its own to keep judgments by")
    if not 1 <= per_item <= len(names):
        raise FeedbackError(f"ask: per_item={per_item}, but there are {len(names)} raters; it is from 1 to that number")
    # Raters take turns, so that each judges as many items as the others.
    planned = list(zip((item for item in items for _ in range(per_item)), cycle(raters)))[:budget]
    known = set()
    if store is not None:
        store.add(items)
        known = {(row.item, row.rater) for row in store.judgments().query("question == @question").itertuples()}
    countdown = Countdown(label or "judgments", len(planned))
    generator = np.random.default_rng([seed, 8])
    rows: list[dict[str, Any]] = []
    for done, (item, rater) in enumerate(planned, 1):
        shown = draw_order(len(item.completions), generator)  # also where it is known: a resumed run draws the same
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
    found, asked = store.judgments(), {item.id for item in items}
    return found[found["item"].isin(asked) & found["rater"].isin(names) & (found["question"] == question)]


def collect(samples: pd.DataFrame, rater: Rater | Sequence[Rater], seed: int = 0, k: int = 2, **asking: Any) -> Dataset:
    """Preferences (`prompt, chosen, rejected`) from samples: each prompt's samples are paired 0-1, 2-3, ... and judged.

    Raters rank `k` samples at a time. `asking` goes to `ask`: per_item, budget, store, label.
    """
    return preferences(ask(items(samples, k), rater, seed=seed, **asking))


def draw_order(n: int, generator: np.random.Generator) -> tuple[int, ...]:
    """The order in which n completions are shown: `order[place]` is the completion at that place."""
    if n == 2:
        return (0, 1) if generator.random() < 0.5 else (1, 0)
    return tuple(int(i) for i in generator.permutation(n))
