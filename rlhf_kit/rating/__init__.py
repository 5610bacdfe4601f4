"""The page on which people judge: in a notebook cell (`rate`), or served to a browser (`rlhf-kit rate`)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_kit import data
from rlhf_kit.feedback import FeedbackError, Item, Question, Store, items
from rlhf_kit.feedback.judging import MOST, canonical, check_question

from .server import Page  # noqa: F401 (rating.Page)
from .session import Session


def rate(
    samples: pd.DataFrame | Sequence[Item],
    store: str | Path | Store = "judgments.db",
    *,
    rater: str,
    question: Question = "rank",
    k: int = 2,
    seed: int = 0,
    repeats: int = 0,
) -> Any:
    """The rating page as a widget: `rater` judges samples, or items, and each judgment is in the `store` at once.

    Samples are ranked `k` at a time per prompt, or rated one by one. Run the cell again at any time: the new page goes
    on where this rater stopped. `repeats` items come a second time at the end in the reverse order; they show how
    steady the rater is. Raises FeedbackError without anywidget (the `notebooks` extra).
    """
    try:
        from .widget import RatingWidget
    except ModuleNotFoundError as error:
        said = "is not installed; pip install 'rlhf-kit[notebooks]', or use the command rlhf-kit rate"
        raise FeedbackError(f"rate: {error.name} {said}") from None
    asked = _of_samples(samples, question, k) if isinstance(samples, pd.DataFrame) else samples
    store = store if isinstance(store, Store) else Store(store)
    return RatingWidget(Session(store, asked, rater, question, seed, "notebook", repeats))


def read(path: str | Path, question: Question = "rank", k: int = 2) -> list[Item]:
    """Items of a .jsonl, .csv or .parquet file with `prompt, completions` (a list; in CSV as JSON), or of samples.

    Samples are rows of `prompt, completion`, those of one prompt ranked `k` at a time. Ratings ask about each
    completion on its own. Raises DataError or FeedbackError naming the row and its fault.
    """
    rows = data.load(path)
    if "completions" not in rows.column_names:
        data.check(rows, ("prompt", "completion"), str(path))
        samples = pd.DataFrame(list(rows)).rename(columns={"prompt_id": "prompt_id_dataset"})  # theirs may be anything
        samples["prompt_id"] = pd.factorize(samples["prompt"].map(canonical))[0]
        return _of_samples(samples, question, k)
    found: list[Item] = []
    for index, row in enumerate(rows):
        prompt, texts, column = row.pop("prompt"), row.pop("completions"), "prompt"
        try:
            Item(prompt, ("",))  # a fault of the prompt alone
            column = "completions"
            texts = json.loads(texts) if isinstance(texts, str) else texts
            if not isinstance(texts, list) or not texts:
                raise FeedbackError("give a list of texts or chats")
            new = [Item(prompt, tuple(each), row) for each in ([texts] if question == "rank" else [[t] for t in texts])]
            check_question(question, new)
        except ValueError as error:
            raise FeedbackError(f"{path}, row {index} (counting from 0), column {column!r}: {error}") from None
        found += new
    return found


def _of_samples(samples: pd.DataFrame, question: Question, k: int) -> list[Item]:
    if question == "rank" and not 2 <= k <= MOST:
        raise FeedbackError(f"k={k}: a ranking is of 2 to {MOST} completions")
    return items(samples, k if question == "rank" else 1)
