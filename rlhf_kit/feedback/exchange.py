"""Judgments out into files and back: everything of them, or datasets in TRL's columns."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from datasets import Dataset

from rlhf_kit import data
from rlhf_kit.feedback.converting import labels, preferences, rows_of
from rlhf_kit.feedback.judging import COLUMNS, Answer, FeedbackError, Item, check_question, now
from rlhf_kit.feedback.store import AS_JSON, Store

Row = dict[str, Any]


def export(judgments: pd.DataFrame | Store, path: str | Path, columns: Literal["all", "trl"] = "all") -> Path:
    """Write judgments as .jsonl or .csv, every column of COLUMNS, for `load`; of a store those taken back too.

    In a .csv, prompts, completions, ranks and other lists are JSON. `columns="trl"` writes `preferences` of rankings,
    or `labels` of ratings, as .jsonl, .csv or .parquet, for training elsewhere. Raises FeedbackError where the file is
    there already, or its suffix is another one.
    """
    target = Path(path)
    suffixes = (".jsonl", ".csv", ".parquet") if columns == "trl" else (".jsonl", ".csv")
    if target.suffix not in suffixes:
        raise FeedbackError(f"{target}: of no known kind; name a {', '.join(suffixes)} file")
    if target.exists():
        raise FeedbackError(f"{target}: is there already, and nothing is overwritten; name another file")
    frame = judgments.judgments(withdrawn=columns == "all") if isinstance(judgments, Store) else judgments
    as_json: tuple[str, ...] = AS_JSON
    if columns == "trl":
        dataset, as_json = _trl(frame), ()
        if target.suffix == ".parquet":
            dataset.to_parquet(str(target))
            return target
        rows = list(dataset)
        if target.suffix == ".csv" and any(isinstance(cell, list | dict) for row in rows for cell in row.values()):
            raise FeedbackError(f"{target}: a .csv holds texts, not chats; name a .jsonl or .parquet file")
    else:
        rows = [_exported(row) for row in rows_of(frame[list(COLUMNS)])]
    try:
        with target.open("x", encoding="utf-8", newline="") as file:
            if target.suffix == ".jsonl":
                file.writelines(_json(row) + "\n" for row in rows)
            else:
                writer = csv.DictWriter(file, list(rows[0]) if rows else list(COLUMNS))
                writer.writeheader()
                writer.writerows({**row, **{name: _json(row[name]) for name in as_json}} for row in rows)
    except (UnicodeEncodeError, TypeError) as error:
        target.unlink()
        raise FeedbackError(f"{target}: not written, for a judgment holds what a file cannot ({error})") from None
    return target


def load(path: str | Path, store: Store, rater: str | None = None) -> int:
    """Put the judgments of a file into a store, all or none; returns how many.

    Reads what `export` wrote, and preferences in TRL's columns `prompt, chosen, rejected` (`data.load`), taken as
    judgments by `rater`, or by whom a column `rater` names; other columns stay with the item. Judgments get new
    numbers. Raises an error that names row, column and fault; also where a judgment is in the store already, or its
    item is with other columns.
    """
    source = Path(path)
    labelled = data.read(source)
    if not labelled:
        raise FeedbackError(f"{source}: holds no judgment")
    if "ranks" in labelled[0][1]:
        if rater is not None:
            raise FeedbackError(f"{source}: says itself who judged; leave out rater={rater!r}")
        from_csv = ".csv" in source.suffixes
        rows = [_judgment(row, f"{source}, {label}", from_csv) for label, row in labelled]
    else:
        dataset = data.load(source, strict=True)
        if not {"chosen", "rejected"} <= set(dataset.column_names):
            raise FeedbackError(f"{source}: has neither the columns of `export` nor prompt, chosen and rejected")
        rows = [_preference(row, f"{source}, pair {k}", rater, source.name) for k, row in enumerate(dataset, 1)]
    return store.append_all(rows)


def _judgment(row: Mapping[str, Any], where: str, from_csv: bool) -> Row:
    """A row as it was exported, for `Store.append_all`, after every check."""
    for name in COLUMNS:
        if name not in row:
            raise FeedbackError(f"{where}, column {name!r}: is missing; nothing was imported")
    found = dict(row)
    for name in AS_JSON if from_csv else ():
        with _column(where, name):
            found[name] = json.loads(row[name])
    for name in ("rating", "seconds"):
        with _column(where, name):
            number = None if row[name] in ("", None) else float(row[name])
            if number is not None and (not math.isfinite(number) or (name == "rating" and number % 1)):
                raise ValueError(
                    f"{row[name]!r} is not a {'whole number' if name == 'rating' else 'number of seconds'}"
                )
            found[name] = int(number) if number is not None and name == "rating" else number
    for name in ("rater", "question", "note", "interface", "time"):
        with _column(where, name):
            if not isinstance(row[name], str) or (name in ("rater", "time") and not row[name].strip()):
                raise ValueError(f"{row[name]!r} is no text")
    with _column(where, "withdrawn"):
        found["withdrawn"] = {"True": True, "False": False, True: True, False: False}[row["withdrawn"]]
    with _column(where, "completions"):
        item = Item(found["prompt"], tuple(found["completions"]), found["columns"])
    with _column(where, "columns"):
        if not isinstance(found["columns"], dict):
            raise ValueError(f"{found['columns']!r} is no object")
    with _column(where, "item"):
        if row["item"] != item.id:
            raise ValueError(f"{row['item']!r} does not name this prompt and these completions ({item.id} does)")
    with _column(where, "question"):
        check_question(row["question"], [item])
    with _column(where, "shown"):
        shown = tuple(found["shown"] or ())
        if shown and sorted(shown) != list(range(len(item.completions))):
            raise ValueError(f"{found['shown']} does not name each of {len(item.completions)} completions once")
    with _column(where, "ranks" if row["question"] == "rank" else "rating"):
        if any(type(rank) is not int for rank in found["ranks"] or ()):
            raise ValueError(f"ranks {found['ranks']}: ranks are whole numbers")
        ranks = found["ranks"] and tuple(found["ranks"][i] for i in shown or range(len(found["ranks"])))
        answer = Answer(ranks, found["rating"], found["strength"] or None, found["note"])
        answer.check(row["question"], len(item.completions))
    return found | {"where": where, "shown": shown, "answer": answer}


def _preference(row: Mapping[str, Any], where: str, rater: str | None, name: str) -> Row:
    """A row of `prompt, chosen, rejected` as a judgment of an item that is the same whichever of both was chosen.

    Which was on the page's first place is known from a column `shown_first`. A column `item`, which says what pairs
    came of one ranking, is left out: each pair is an item of its own now.
    """
    known = dict(row)
    who = known.pop("rater", None) or rater
    if not who:
        raise FeedbackError(f"{where}, column 'rater': nobody is named; say who judged, such as rater='ana'")
    known.pop("item", None)
    first, chosen, rejected = known.pop("shown_first", None), known.pop("chosen"), known.pop("rejected")
    with _column(where, "chosen"):
        item = Item(known.pop("prompt"), tuple(sorted((chosen, rejected), key=_json)))
    best = item.completions.index(chosen)
    shown = () if first not in ("chosen", "rejected") else (best, 1 - best) if first == "chosen" else (1 - best, best)
    said = Answer(ranks=(1, 2) if (shown or (0, 1))[0] == best else (2, 1))  # in the order shown
    judged = {"rater": who, "question": "rank", "answer": said, "shown": shown, "seconds": None, "withdrawn": False}
    content = {"prompt": item.prompt, "completions": list(item.completions), "columns": known}
    return judged | content | {"interface": f"file {name}", "time": now(), "where": where}


@contextmanager
def _column(where: str, name: str) -> Iterator[None]:
    """Whatever is wrong inside is said to be in this row and column."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise FeedbackError(f"{where}, column {name!r}: {error}; nothing was imported") from None


def _trl(judgments: pd.DataFrame) -> Dataset:
    asked = set(judgments["question"])
    if "rank" in asked and len(asked) > 1:
        raise FeedbackError(f"these judgments answer {', '.join(sorted(asked))}; export one question at a time")
    return preferences(judgments) if "rank" in asked else labels(judgments)


def _exported(row: Row) -> Row:
    """A row of a frame in Python's own types, None for NaN."""
    numbers = {name: None if row[name] != row[name] else row[name] for name in ("rating", "seconds")}
    rating = None if numbers["rating"] is None else int(numbers["rating"])
    own = {"judgment": int(row["judgment"]), "rating": rating, "withdrawn": bool(row["withdrawn"])}
    return {**row, **numbers, **own, "completions": list(row["completions"]), "shown": list(row["shown"] or ())}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=lambda number: number.item())
