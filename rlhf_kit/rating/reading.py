"""Items to judge from a file: prompts with their completions, or samples, a row each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_kit import data
from rlhf_kit.feedback import FeedbackError, Item, Question, items
from rlhf_kit.feedback.judging import MOST


def read(path: str | Path, question: Question = "rank", k: int = 2) -> list[Item]:
    """Items of a .jsonl, .csv or .parquet file with `prompt, completions` (a list; in CSV as JSON), or of samples.

    Samples are rows of `prompt, completion`, those of one prompt ranked `k` at a time. Ratings ask about each
    completion on its own. Raises DataError or FeedbackError naming the row and its fault.
    """
    rows = data.load(path)
    columns = rows.column_names
    if "completions" in columns:
        return [item for index, row in enumerate(rows) for item in _of_a_row(path, index, row, question)]
    if "completion" not in columns:
        raise FeedbackError(
            f"{path}: has the columns {', '.join(columns)}; what is judged is in prompt and completions (a list), or "
            "in prompt and completion"
        )
    data.check(rows, ("prompt", "completion"), str(path))
    samples = pd.DataFrame(list(rows))
    if "prompt_id" not in columns:
        samples["prompt_id"] = pd.factorize(samples["prompt"].map(lambda prompt: json.dumps(prompt, sort_keys=True)))[0]
    return of_samples(samples, question, k)


def of_samples(samples: pd.DataFrame, question: Question, k: int) -> list[Item]:
    """Items of a frame of samples: `k` of a prompt to rank, or each one to rate; FeedbackError if k is no number of
    completions to rank."""
    if question == "rank" and not 2 <= k <= MOST:
        raise FeedbackError(f"k={k}: a ranking is of 2 to {MOST} completions")
    return items(samples, k if question == "rank" else 1)


def _of_a_row(path: str | Path, index: int, row: dict[str, Any], question: Question) -> list[Item]:
    where = f"{path}, row {index} (counting from 0)"
    texts, columns = row.pop("completions"), {name: value for name, value in row.items() if name != "prompt"}
    if isinstance(texts, str):
        try:
            texts = json.loads(texts)
        except json.JSONDecodeError:
            raise FeedbackError(f"{where}, column 'completions': is no JSON list of texts") from None
    if not isinstance(texts, list) or not texts:
        raise FeedbackError(f"{where}, column 'completions': must be a list of texts or chats, with one or more")
    try:
        if question != "rank":
            return [Item(row["prompt"], (text,), columns) for text in texts]
        if len(texts) < 2:
            raise FeedbackError("has one completion; a ranking needs two or more")
        return [Item(row["prompt"], tuple(texts), columns)]
    except FeedbackError as error:
        raise FeedbackError(f"{where}: {error}") from None
