"""Datasets in TRL's columns, from local files or the hub; checks that name the row; splits by prompt.

A dataset is a `datasets.Dataset` with the columns `prompt`, or `prompt, completion[, label]`, or `prompt, chosen,
rejected`. A cell is text or a chat, a list of `{"role": ..., "content": ...}` messages. Extra columns are kept.
"""

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, config, load_dataset
from pyarrow import ArrowException, parquet

Row = dict[str, Any]

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
PREFERENCE = ("prompt", "chosen", "rejected")
TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected")
OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query"),
    "completion": ("response", "answer", "output", "target"),
}
LABELS = {"true": True, "1": True, "false": False, "0": False}  # in the cells of a CSV file
KINDS = {
    "missing": "every row needs this column: fill or drop such rows",
    "empty text": "fill or drop such rows",
    "wrong type": "a cell is text or a list of {role, content} messages, the same in all rows and columns",
    "chosen equals rejected": "such a pair does not say what is preferred: drop it",
    "prompt repeated": "prompt and completion are joined for training: take the prompt out of the completion",
    "prompt ends in a space": "it would be split into tokens too early: move the space to the start of the completion",
    "label not boolean": "true stands for a good completion, false for a bad one",
    "not a transcript": r"pairs without a prompt column must read '\n\nHuman: ...\n\nAssistant: ...' or be chats",
    "prompts differ": "chosen and rejected must share everything up to the last answer",
}


class DataError(ValueError):
    """Something is wrong with the data, or with where it is; the message says what, where, and what to do."""


class Fault(NamedTuple):
    """A fault of one cell: `row` counts from 0, `kind` is one of `KINDS`."""

    row: int
    column: str
    kind: str


def load(source: str | Path, split: str = "train", **hub_options: Any) -> Dataset:
    """Return a file (one of `FORMATS`) or a hub dataset in TRL's columns; raise DataError naming the file and the row.

    Pairs without a prompt get one: transcripts as in HH-RLHF (Bai et al. 2022) are split after the last
    "\\n\\nAssistant:", chats after the messages that both share; a warning counts the pairs that cannot be split. Rows
    of a text file are named by their line. CSV cells are text, but a `label` of true or false is a boolean.
    """
    source = str(source)
    # A hub id has at most one slash and none of our suffixes, so everything else was meant as a path, there or not.
    is_path = source.endswith(FORMATS) or source[:1] in {".", "~", "/"} or source.count("/") > 1
    if not is_path and not Path(source).exists():
        labelled = _numbered(_from_hub(source, split, hub_options))
    elif split == "train" and not hub_options:
        labelled = _from_file(Path(source).expanduser())
    else:
        raise DataError(f"{source}: a local file is loaded whole, without split= or hub options; see split_by_prompt")
    columns = {column for row in labelled.values() for column in row}
    if "prompt" not in columns and {"chosen", "rejected"} <= columns:
        labelled = _with_prompts(source, labelled)
    dataset = _to_dataset(source, labelled)
    require(dataset, ["prompt"], source)
    return dataset


def require(dataset: Dataset, columns: Sequence[str], source: str = "dataset") -> None:
    """Raise DataError if a column is missing, guessing which was meant, or if there are no rows."""
    if not len(dataset):
        raise DataError(f"{source}: empty, no rows")
    for column in columns:
        if column in dataset.column_names:
            continue
        others = [name for name in dataset.column_names if name not in TEXT_COLUMNS]
        near = [name for name in others if name.lower() in OTHER_NAMES.get(column, ())]
        near += get_close_matches(column, others, 1)
        guess = f"; did you mean {near[0]!r}? Then rename_column({near[0]!r}, {column!r})" if near else ""
        names = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in dataset.column_names)
        raise DataError(f"{source}: no column {column!r}; it has {names}{guess}")


def find_faults(dataset: Dataset, columns: Sequence[str] = PREFERENCE, source: str = "dataset") -> list[Fault]:
    """Return all faults of the cells in `columns`, by row; raise DataError for a missing column or an empty dataset."""
    require(dataset, columns, source)
    rows = enumerate(dataset.select_columns(list(columns)))
    return [Fault(i, column, kind) for i, row in rows for column in columns if (kind := _cell_fault(column, row))]


def check(dataset: Dataset, columns: Sequence[str] = PREFERENCE, source: str = "dataset") -> None:
    """Raise DataError if `find_faults` finds any, naming source, row and column of the first and counting all kinds."""
    if faults := find_faults(dataset, columns, source):
        row, column, kind = faults[0]
        raise DataError(
            f"{source}, row {row} (counting from 0), column {column!r}: {kind}; {KINDS[kind]}. "
            f"All faults (listed by find_faults): {_counts([(fault.row, fault.kind) for fault in faults])}"
        )


def split_by_prompt(dataset: Dataset, test_fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Return (train, test) with no prompt on both sides; raise DataError if one side would be empty.

    The side of a prompt follows from its text and `seed` alone; `test_fraction` is only the expected share of prompts.
    """
    require(dataset, ["prompt"])
    keys = (json.dumps([seed, _plain(prompt)], sort_keys=True).encode() for prompt in dataset["prompt"])
    shares = [int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 for key in keys]
    train = [index for index, share in enumerate(shares) if share >= test_fraction]
    test = [index for index, share in enumerate(shares) if share < test_fraction]
    if not train or not test:
        raise DataError(f"{test_fraction=} and {seed=} leave one side without a prompt: change them or add prompts")
    return dataset.select(train), dataset.select(test)


def _from_hub(source: str, split: str, options: Mapping[str, Any]) -> Dataset:
    try:
        return load_dataset(source, split=split, **options)
    except Exception as error:  # the hub's clients raise a dozen families of errors; each should read as one sentence
        reason = "HF_HUB_OFFLINE is set" if config.HF_HUB_OFFLINE else " ".join(str(error).split())
        raise DataError(
            f"{source!r} is no file here, and its split {split!r} cannot be had from the hub: {reason}; "
            "name a local file, or a dataset of the hub while there is a network"
        ) from None


def _from_file(path: Path) -> dict[str, Row]:
    # Read from the disk, because `datasets` serves a file that was rewritten with the same time from its cache.
    if not path.is_file() or not path.name.endswith(FORMATS):
        problem = "of no known kind" if path.is_file() else "no such file"
        raise DataError(f"{path}: {problem}; name a {' '.join(FORMATS)} file")
    try:
        if path.suffix == ".parquet":
            return _numbered(Dataset(parquet.read_table(path)))
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, row {line}: not UTF-8; save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error, ArrowException) as error:
        raise DataError(f"{path}: cannot be read as what its name says: {' '.join(str(error).split())[:200]}") from None
    labelled = _from_csv(path, text) if ".csv" in path.suffixes else _from_json(path, text)
    for label, row in labelled.items():
        if not isinstance(row, dict):
            raise DataError(f'{path}, {label}: a row must be an object such as {{"prompt": ...}}')
    return labelled


# Python's own json and csv, because they lose nothing and name the line. pandas reads half an emoji as "", makes floats
# of whole numbers with gaps and pads short CSV rows; `datasets` makes dates of texts that look like dates.
def _from_json(path: Path, text: str) -> dict[str, Row]:
    where = str(path)
    labelled = {}
    try:
        if text.lstrip().startswith("["):  # one array of rows; otherwise a row per line, whatever the suffix says
            return _numbered(json.loads(text))
        for number, line in enumerate(text.split("\n"), 1):  # str.splitlines would also break inside JSON strings
            where = f"{path}, row {number}"
            if line.strip():
                labelled[f"row {number}"] = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    return labelled


def _from_csv(path: Path, text: str) -> dict[str, Row]:
    csv.field_size_limit(sys.maxsize)  # a long chat is one cell
    # strict, because otherwise a quote that is never closed swallows the rest of the file without a word.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    labelled: dict[str, Row] = {}
    header: list[str] = []
    start = 1  # the line a row starts on: a quoted cell may span several
    try:
        for cells in reader:
            label, start = f"row {start}", reader.line_num + 1
            if cells and not header:
                header = cells
                if "" in header or len(set(header)) < len(header):
                    raise DataError(f"{path}, {label}: two columns have the same name, or one has none")
            elif cells and len(cells) != len(header):
                raise DataError(f"{path}, {label}: {len(cells)} cells in {len(header)} columns; is a comma unquoted?")
            elif cells:
                row: Row = dict(zip(header, cells, strict=True))
                if "label" in row:
                    row["label"] = LABELS.get(row["label"].strip().lower(), row["label"])
                labelled[label] = row
    except csv.Error as error:
        raise DataError(f"{path}, row {start}: not valid CSV ({error})") from None
    return labelled


def _to_dataset(source: str, labelled: Mapping[str, Row]) -> Dataset:
    # Not Dataset.from_list, which takes the columns of the first row only.
    columns = dict.fromkeys(column for row in labelled.values() for column in row)
    values = {column: [_plain(row.get(column)) for row in labelled.values()] for column in columns}
    for column, cells in values.items():
        types = ["number" if type(cell) in {int, float} else type(cell).__name__ for cell in cells]
        known = next((name for name in types if name != "NoneType"), "")
        for label, name in zip(labelled, types, strict=True):
            where = f"{source}, {label}, column {column!r}"
            if column in TEXT_COLUMNS and name not in {"str", "list"}:
                kind = "missing" if name == "NoneType" else "wrong type"
                raise DataError(f"{where}: {kind} ({name}); {KINDS[kind]}")
            if name not in {known, "NoneType"}:
                raise DataError(f"{where}: wrong type ({name}); the rows before have {known}")
    try:
        # use_json, because an Arrow struct gives each message the keys of all others, with None in them.
        return Dataset.from_dict(values, on_mixed_types="use_json")
    except (ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{source}: cannot be stored as a table: {error}") from None


def _plain(cell: Any) -> Any:
    # A chat without the empty keys that Arrow adds to every message when one message of the column has them.
    if not isinstance(cell, list) or not all(isinstance(message, dict) for message in cell):
        return cell
    return [{key: value for key, value in m.items() if value is not None or key in {"role", "content"}} for m in cell]


def _with_prompts(source: str, labelled: Mapping[str, Row]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    faults: list[tuple[str, str]] = []
    for label, row in labelled.items():
        chosen, rejected = row.get("chosen"), row.get("rejected")
        split = _split_transcripts if isinstance(chosen, str) else _split_chats
        parts = split(chosen, rejected) if type(chosen) is type(rejected) else "wrong type"
        if isinstance(parts, str):
            faults.append((label, parts))
        else:
            found[label] = dict.fromkeys(PREFERENCE) | row | dict(zip(PREFERENCE, parts, strict=True))
    message = f"{source}: {len(faults)} of {len(labelled)} pairs cannot be used: {_counts(faults)}"
    if not found:
        raise DataError(f"{message}; {KINDS[faults[0][1]]}")
    if faults:
        warnings.warn(f"{message}; they are set aside", stacklevel=3)
    return found


def _split_transcripts(chosen: Any, rejected: Any) -> tuple[Any, Any, Any] | str:
    prompt, marker, good = chosen.rpartition("\n\nAssistant:")
    other, other_marker, bad = rejected.rpartition("\n\nAssistant:")
    turns = re.split(r"\n\n(?:Human|Assistant):", prompt)[1:]
    if not (turns and marker and other_marker) or "\n\nHuman:" in good + bad:
        return "not a transcript"
    if prompt != other:
        return "prompts differ"
    if not all(turn.strip() for turn in (*turns, good, bad)):
        return "empty text"
    return "chosen equals rejected" if good == bad else (prompt + marker, good, bad)


def _split_chats(chosen: Any, rejected: Any) -> tuple[Any, Any, Any] | str:
    if kind := _text_fault(chosen) or _text_fault(rejected):
        return kind
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    good, bad = chosen[shared:], rejected[shared:]
    if not good and not bad:
        return "chosen equals rejected"
    if not (shared and good and bad and good[0]["role"] == bad[0]["role"] == "assistant"):
        return "prompts differ"
    return chosen[:shared], good, bad


def _cell_fault(column: str, row: Row) -> str | None:
    value, prompt = row[column], row.get("prompt")
    if column == "label":
        return None if isinstance(value, bool) else "label not boolean"
    if column not in TEXT_COLUMNS:
        return "missing" if value is None else None
    if (kind := _text_fault(value)) or column == "prompt":
        ends_in_space = isinstance(value, str) and value.endswith((" ", "\t"))
        return kind or ("prompt ends in a space" if ends_in_space else None)
    if column == "chosen" and value == row.get("rejected"):
        return "chosen equals rejected"
    if prompt and type(prompt) is not type(value):
        return "wrong type"
    # "hi" is not repeated in "history": what follows must not continue its last word.
    goes_on = isinstance(value, str) and value[len(prompt or "") :][:1].isalnum()
    return "prompt repeated" if prompt and value[: len(prompt)] == prompt and not goes_on else None


def _text_fault(value: Any) -> str | None:
    messages = [{"role": "text", "content": value}] if value is None or isinstance(value, str) else value
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
        return "wrong type"
    # A message whose content is empty is whole if it calls a tool; content may also be a list of parts (text, images).
    contents = [message.get("content") or message.get("tool_calls") for message in messages]
    return None if contents and all(c.strip() if isinstance(c, str) else c for c in contents) else "empty text"


def _numbered(rows: Iterable[Row]) -> dict[str, Row]:
    return {f"row {index} (counting from 0)": row for index, row in enumerate(rows)}


def _counts(faults: Sequence[tuple[object, str]]) -> str:
    first = {kind: label for label, kind in reversed(faults)}
    kinds = Counter(kind for _, kind in faults).most_common()
    return ", ".join(f"{n} x {kind} (first: {first[kind]})" for kind, n in kinds)
