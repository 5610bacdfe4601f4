"""Datasets in TRL's columns, from local files or the hub; checks that name the row; splits by prompt.

A dataset is a `datasets.Dataset` with the columns `prompt`, or `prompt, completion[, label]`, or `prompt, chosen,
rejected`. A cell is text or a chat, a list of `{"role": ..., "content": ...}` messages. Extra columns are kept.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, config, load_dataset
from pyarrow import ArrowException, parquet
from transformers import PreTrainedTokenizerBase as Tokenizer

from rlhf_kit import models

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
    "wrong type": "a cell is text, or a list of {role, content} messages, not {from, value}; all cells are alike",
    "text and chat": "the prompt is a text, the answers are chats that hold it: remove_columns('prompt')",
    "unknown role": "roles are system, user, assistant and tool: give your own these names",
    "chosen equals rejected": "such a pair does not say what is preferred: drop it",
    "prompt repeated": "prompt and completion are joined for training: take the prompt out of the completion",
    "prompt ends in a space": "it would be split into tokens too early: move the space to the start of the completion",
    "label not boolean": "true stands for a good completion, false for a bad one",
    "not a number": "a margin is a finite number: fill or drop such rows",
    "another's turn": "a completion holds assistant messages only: split the chat before the last answer",
    "shared token": "the completion cannot be cut out: move spaces from the prompt's end to the completion's start",
    "not rendered": "change the row, or give the tokenizer another chat template",
    "not a transcript": r"pairs without a prompt column must read '\n\nHuman: ...\n\nAssistant: ...' or be chats",
    "prompts differ": "chosen and rejected must share everything up to the last answer",
}
ROLES = ("text", "system", "developer", "user", "assistant", "tool")
MENDABLE = ("empty text", "chosen equals rejected", "prompt repeated", "prompt ends in a space")  # but trained on


class DataError(ValueError):
    """Something is wrong with the data, or with where it is; the message says what, where, and what to do."""


class Fault(NamedTuple):
    """A fault of one cell: `row` counts from 0, `kind` is one of `KINDS`, `detail` is what the tokenizer says."""

    row: int
    column: str
    kind: str
    detail: str = ""


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
    if "prompt" not in columns and {"chosen", "rejected"} <= columns and not columns & {*OTHER_NAMES["prompt"]}:
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
        if whole := {"messages", "conversations", "text"} & {*others}:
            guess = f"; {min(whole)!r} holds prompts with their answers: split each row before its last answer"
        elif column == "prompt" and {"chosen", "rejected"} <= {*dataset.column_names} and not near:
            guess = "; `data.load` splits such pairs into a prompt and its answers"
        names = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in dataset.column_names)
        raise DataError(f"{source}: no column {column!r}; it has {names}{guess}")


def find_faults(
    dataset: Dataset, columns: Sequence[str] = PREFERENCE, source: str = "dataset", tokenizer: Tokenizer | None = None
) -> list[Fault]:
    """Return all faults of the cells in `columns`, by row; raise DataError for a missing column or an empty dataset.

    With a `tokenizer` also the rows that it cannot render, and those whose prompt and completion share a token.
    """
    require(dataset, columns, source)
    answers = [column for column in columns if column in TEXT_COLUMNS[1:]] or [""]
    faults = []
    for index, row in enumerate(dataset.select_columns(list(columns))):
        found = [Fault(index, column, kind) for column in columns if (kind := _cell_fault(column, row))]
        if tokenizer is not None and all(fault.kind in MENDABLE for fault in found):
            for column in answers:
                try:
                    models.split(tokenizer, row["prompt"], row.get(column))
                except models.RenderError as error:
                    kind = "shared token" if isinstance(error, models.SharedToken) else "not rendered"
                    found.append(Fault(index, column or "prompt", kind, str(error)))
        faults += found
    return faults


def check(
    dataset: Dataset, columns: Sequence[str] = PREFERENCE, source: str = "dataset", tokenizer: Tokenizer | None = None
) -> None:
    """Raise DataError if `find_faults` finds any, naming source, row and column of the first and counting all kinds."""
    _refuse(find_faults(dataset, columns, source, tokenizer), source)


def _refuse(faults: Sequence[Fault], source: str) -> None:
    if faults:
        row, column, kind, detail = faults[0]
        raise DataError(
            f"{source}, row {row} (counting from 0), column {column!r}: {detail or kind}; {KINDS[kind]}. "
            f"All faults (listed by find_faults): {_counts([(fault.row, fault.kind) for fault in faults])}"
        )


def ready(
    dataset: Dataset,
    tokenizer: Tokenizer,
    columns: Sequence[str],
    max_length: int | None = None,
    source: str = "dataset",
) -> Dataset:
    """The rows as they are trained on, sampled from and scored, to the token.

    Contents that are given as parts of text are joined, and a BOS that the tokenizer adds anyway is taken off. Rows of
    more than `max_length` tokens, and rows of which one token spans prompt and completion, are left out, and counted in
    a warning. Raises DataError that names the first row that cannot be used, and where no row is left.
    """
    faults = find_faults(dataset, columns, source, tokenizer)
    _refuse([fault for fault in faults if fault.kind not in (*MENDABLE, "shared token")], source)
    for name in {"tools", "chat_template_kwargs"} & {*dataset.column_names}:
        if any(dataset[name]):
            raise DataError(
                f"{source}, column {name!r}: trainers would render it into the prompt, but sampling and rewards would "
                f"not; render it into the prompt yourself, then remove_columns({name!r})"
            )
    shared = {fault.row for fault in faults if fault.kind == "shared token"}
    dataset = _without(dataset, shared, "have a token that spans prompt and completion", source)
    cells = {column: dataset[column][:] for column in columns if column in TEXT_COLUMNS}
    plain = {column: [models.plain(cell) for cell in given] for column, given in cells.items()}
    plain["prompt"] = [models.without_bos(tokenizer, prompt) for prompt in plain["prompt"]]
    if plain != cells:
        values = {column: plain.get(column) or dataset[column][:] for column in dataset.column_names}
        dataset = Dataset.from_dict(values, on_mixed_types="use_json")
    answers: list[Any] = [plain[column] for column in plain if column != "prompt"] or [None]
    lengths = zip(*(map(len, models.encode(tokenizer, plain["prompt"], answer)) for answer in answers), strict=True)
    long = {row for row, each in enumerate(lengths) if max_length is not None and max(each) > max_length}
    return _without(dataset, long, f"are longer than max_length={max_length} tokens", source)


def _without(dataset: Dataset, rows: set[int], why: str, source: str) -> Dataset:
    """The other rows; a warning counts those left out."""
    if not rows:
        return dataset
    left_out = f"{source}: {len(rows)} of {len(dataset)} rows are left out, because they {why}"
    if len(rows) == len(dataset):
        raise DataError(f"{left_out}; none is left")
    warnings.warn(left_out, stacklevel=3)
    return dataset.select([row for row in range(len(dataset)) if row not in rows])


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
                with suppress(KeyError, ValueError):  # no column, or no number: `find_faults` names the row
                    row["margin"] = float(row["margin"])
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
        for label, name, cell in zip(labelled, types, cells, strict=True):
            where = f"{source}, {label}, column {column!r}"
            try:
                json.dumps(cell, ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError as error:
                raise DataError(f"{where}: half a character ({error.object[error.start]!r}); mend the text") from None
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
    return "another's turn" if _other_turns(good) or _other_turns(bad) else (chosen[:shared], good, bad)


def _other_turns(completion: Any) -> bool:
    return isinstance(completion, list) and any(message["role"] in ("user", "system") for message in completion)


def _cell_fault(column: str, row: Row) -> str | None:
    value, prompt = row[column], row.get("prompt")
    if column == "label":
        return None if isinstance(value, bool) else "label not boolean"
    if column == "margin":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return None if number and math.isfinite(value) else "not a number"
    if column not in TEXT_COLUMNS:
        return "missing" if value is None else None
    if (kind := _text_fault(value)) or column == "prompt":
        ends_in_space = isinstance(value, str) and value.endswith((" ", "\t"))
        return kind or ("prompt ends in a space" if ends_in_space else None)
    if column == "chosen" and value == row.get("rejected"):
        return "chosen equals rejected"
    if prompt and type(prompt) is not type(value):
        return "text and chat" if isinstance(prompt, str) else "wrong type"
    # "hi" is not repeated in "history": what follows must not continue its last word.
    goes_on = isinstance(value, str) and value[len(prompt or "") :][:1].isalnum()
    if prompt and value[: len(prompt)] == prompt and not goes_on:
        return "prompt repeated"
    return "another's turn" if _other_turns(value) else None


def _text_fault(value: Any) -> str | None:
    messages = [{"role": "text", "content": value}] if value is None or isinstance(value, str) else value
    if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
        return "wrong type"
    if any(message["role"] not in ROLES for message in messages):
        return "unknown role"
    # Content is empty where a message calls a tool, or where nothing is asked of the system; it may be a list of parts.
    spoken = [message for message in messages if message["role"] != "system"]
    contents = [message.get("content") or message.get("tool_calls") for message in spoken]
    return None if contents and all(c.strip() if isinstance(c, str) else c for c in contents) else "empty text"


def _numbered(rows: Iterable[Row]) -> dict[str, Row]:
    return {f"row {index} (counting from 0)": row for index, row in enumerate(rows)}


def _counts(faults: Sequence[tuple[object, str]]) -> str:
    first = {kind: label for label, kind in reversed(faults)}
    kinds = Counter(kind for _, kind in faults).most_common()
    return ", ".join(f"{n} x {kind} (first: {first[kind]})" for kind, n in kinds)
