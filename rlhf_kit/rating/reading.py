"""Items to judge from a file: prompts with their completions, or samples, a row each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_kit import data
from rlhf_kit.feedback import FeedbackError, Item, Question, items
from rlhf_kit.feedback.judging import MOST, canonical, check_question


def read(path: str | Path, question: Question = "rank", k: int = 2) -> list[Item]:
    """Items of a .jsonl, .csv or .parquet file with `prompt, completions` (a list; in CSV as JSON), or of samples.

    Samples are rows of `prompt, completion`, those of one prompt ranked `k` at a time. Ratings ask about each
    completion on its own. Raises DataError or FeedbackError naming the row and its fault.
    """
    rows = data.load(path)
    if "completions" in rows.column_names:
        return [item for index, row in enumerate(rows) for item in _of_a_row(path, index, row, question)]
    if "completion" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise FeedbackError(
            f"{path}: has the columns {columns}; it needs prompt, and completions (a list) or completion"
        )
    data.check(rows, ("prompt", "completion"), str(path))
    samples = pd.DataFrame(list(rows))
    if "prompt_id" not in samples:
        samples["prompt_id"] = pd.factorize(samples["prompt"].map(canonical))[0]
    return of_samples(samples, question, k)


def of_samples(samples: pd.DataFrame, question: Question, k: int) -> list[Item]:
    """Items of a frame of samples: `k` of a prompt to rank, or each one to rate; FeedbackError for a k that no ranking
    can have."""
    if question == "rank" and not 2 <= k <= MOST:
        raise FeedbackError(f"k={k}: a ranking is of 2 to {MOST} completions")
    return items(samples, k if question == "rank" else 1)


def _of_a_row(path: str | Path, index: int, row: dict[str, Any], question: Question) -> list[Item]:
    prompt, texts = row.pop("prompt"), row.pop("completions")
    try:
        if isinstance(texts, str):
            texts = json.loads(texts)
        if not isinstance(texts, list) or not texts:
            raise FeedbackError("column 'completions' must be a list of one text or chat, or more")
        found = [Item(prompt, tuple(texts), row)] if question == "rank" else [Item(prompt, (t,), row) for t in texts]
        check_question(question, found)
    except json.JSONDecodeError:
        raise FeedbackError(f"{path}, row {index} (counting from 0): column 'completions' is no JSON list") from None
    except FeedbackError as error:
        raise FeedbackError(f"{path}, row {index} (counting from 0): {error}") from None
    return found
