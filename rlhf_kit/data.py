"""Datasets in TRL's columns, from local files or the hub; checks naming the row; splits by prompt.

Every dataset here is a `datasets.Dataset` with the columns `prompt`, or `prompt, completion[, label]`, or
`prompt, chosen, rejected`. A cell is text, or a chat: a list of `{"role": ..., "content": ...}` messages. Extra columns
are carried along. What is wrong is a `DataError` that says where and what to do; rows set aside are counted aloud.
"""

import csv
import gzip
import hashlib
import json
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Labelled = tuple[str, Row]  # ("row 3", {...}): a row, and how a person finds it in the source

FORMATS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
PREFERENCE = ("prompt", "chosen", "rejected")
TEXT_COLUMNS = ("prompt", "completion", "chosen", "rejected")
OTHER_NAMES = {
    "prompt": ("question", "instruction", "input", "query"),
    "completion": ("response", "answer", "output", "target"),
}
KINDS = {
    "missing": "every row needs this column: fill or drop such rows",
    "empty text": "fill or drop such rows",
    "wrong type": "a cell is text or a list of {role, content} messages, the same in all rows and columns",
    "chosen equals rejected": "such a pair does not say what is preferred: drop it",
    "prompt repeated": "prompt and completion are joined for training: take the prompt out of the completion",
    "prompt ends in a space": "it would be split into tokens too early: move the space to the start of the completion",
    "label not boolean": "true stands for a good completion, false for a bad one",
    "too long": "shorten or drop such rows, or raise max_length: training would cut or drop them",
    "not a transcript": r"pairs without a prompt column must read '\n\nHuman: ...\n\nAssistant: ...' or be chats",
    "prompts differ": "chosen and rejected must share everything up to the last answer",
}


class DataError(ValueError):
    """Something is wrong with the data, or with where it is; the message says what, where, and what to do."""


@dataclass(frozen=True)
class Fault:
    """A fault of one cell: `row` counts from 0, `kind` is one of `KINDS`, `detail` adds numbers to it."""

    row: int
    column: str
    kind: str
    detail: str = ""


def load(source: str | Path, split: str = "train", *, strict: bool = False, **hub_options: Any) -> Dataset:
    """Return a local file (one of `FORMATS`) or hub dataset in TRL's columns; raise DataError if that cannot be done.

    Pairs without a prompt (HH transcripts, whole chats) get one by `extract_prompts`; those it sets aside are counted
    in a warning, or raised if `strict`. Rows of text files are named by their line, row 1 of a CSV file being its
    header; CSV cells are text, but for a `label` of true or false. `hub_options` go to `datasets.load_dataset`.
    """
    source = str(source)
    if not _is_local(source):
        labelled = [(_from_zero(index), row) for index, row in enumerate(_from_hub(source, split, hub_options))]
    elif split == "train" and not hub_options:
        labelled = read(Path(source).expanduser())
    else:
        raise DataError(f"{source}: a local file is loaded whole, without split= or hub options; see split_by_prompt")
    if not labelled:
        raise DataError(f"{source}: empty, no rows")
    labels, rows = [label for label, _ in labelled], [row for _, row in labelled]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if "prompt" not in columns and not {"chosen", "rejected"} <= set(columns):
        note = " (the first line of a CSV file names the columns)" if ".csv" in Path(source).suffixes else ""
        raise DataError(_missing(source, "prompt", columns) + note)
    if "prompt" not in columns:
        rows, faults = extract_prompts(rows)
        message = f"{source}: {len(faults)} of {len(labels)} pairs cannot be used: {_counts(faults, labels)}"
        if not rows or (faults and strict):
            raise DataError(f"{message}; {KINDS[faults[0].kind]}")
        if faults:
            warnings.warn(f"{message}; they are set aside", stacklevel=2)
        unused = {fault.row for fault in faults}
        labels = [label for index, label in enumerate(labels) if index not in unused]
    return _to_dataset(source, labels, rows)


def extract_prompts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Row], list[Fault]]:
    """Return (`prompt, chosen, rejected` rows, faults of the rows left out) for pairs of whole conversations.

    Transcripts as in Anthropic's HH-RLHF ("\\n\\nHuman: ...\\n\\nAssistant: ...", Bai et al. 2022) are split after the
    last "\\n\\nAssistant:" and must agree up to there; chats are split after the messages they share. A pair is left
    out if it has no shared prompt, an empty turn, or two equal answers; `Fault.row` is its index in `rows`.
    """
    good: list[Row] = []
    faults: list[Fault] = []
    for index, row in enumerate(rows):
        chosen, rejected = row.get("chosen"), row.get("rejected")
        split = _split_transcripts if isinstance(chosen, str) else _split_chats
        parts = split(chosen, rejected) if type(chosen) is type(rejected) else "wrong type"
        if isinstance(parts, str):
            faults.append(Fault(index, "chosen", parts))
        else:
            extra = {column: value for column, value in row.items() if column not in PREFERENCE}
            good.append(dict(zip(PREFERENCE, parts, strict=True)) | extra)
    return good, faults


def find_faults(
    dataset: Dataset,
    columns: Sequence[str] = PREFERENCE,
    source: str = "dataset",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> list[Fault]:
    """Return all faults of the cells in `columns`, by row; raise DataError for a missing column or an empty dataset.

    With `tokenizer` and `max_length`, a prompt and its completion (with EOS) may together have `max_length` tokens.
    """
    for column in columns:
        if column not in dataset.column_names:
            raise DataError(_missing(source, column, dataset.column_names))
    if not len(dataset):
        raise DataError(f"{source}: empty, no rows")
    if max_length is not None and tokenizer is None:
        raise DataError("max_length counts tokens, so tokenizer= is needed too")
    faults = []
    for index, row in enumerate(dataset.select_columns(list(columns))):
        found = [Fault(index, column, kind) for column in columns if (kind := _cell_fault(column, row))]
        if not found and tokenizer is not None and max_length is not None:
            completions = [column for column in columns if column in TEXT_COLUMNS[1:]]
            for column in completions or ["prompt"]:
                length = _count_tokens(row.get("prompt"), row[column] if completions else None, tokenizer)
                if length > max_length:
                    found.append(Fault(index, column, "too long", f": {length} tokens, max_length is {max_length}"))
        faults += found
    return faults


def check(
    dataset: Dataset,
    columns: Sequence[str] = PREFERENCE,
    source: str = "dataset",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> None:
    """Raise DataError if `find_faults` finds any, naming source, row and column of the first and counting all kinds."""
    faults = find_faults(dataset, columns, source, tokenizer, max_length)
    if faults:
        first = faults[0]
        raise DataError(
            f"{source}, {_from_zero(first.row)}, column {first.column!r}: {first.kind}{first.detail}; "
            f"{KINDS[first.kind]}. All faults (listed by find_faults): {_counts(faults, range(len(dataset)))}"
        )


def split_by_prompt(dataset: Dataset, test_fraction: float = 0.1, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Return (train, test) with no prompt on both sides; raise DataError if one side would be empty.

    The side of a prompt follows from its text and `seed` alone, not from the order of the rows or from the other rows;
    `test_fraction` is therefore the expected share of the prompts, not an exact one.
    """
    if not 0 < test_fraction < 1:
        raise DataError(f"test_fraction must lie between 0 and 1, not {test_fraction}")
    if "prompt" not in dataset.column_names:
        raise DataError(_missing("dataset", "prompt", dataset.column_names))
    shares = [_uniform(prompt, seed) for prompt in dataset["prompt"]]
    train = [index for index, share in enumerate(shares) if share >= test_fraction]
    test = [index for index, share in enumerate(shares) if share < test_fraction]
    if not train or not test:
        raise DataError(f"{test_fraction=} and {seed=} leave one side without a prompt: change them or add prompts")
    return dataset.select(train), dataset.select(test)


def _is_local(source: str) -> bool:
    # A hub id has at most one slash and none of our suffixes, so everything else was meant as a path, there or not.
    return source.endswith(FORMATS) or source[:1] in {".", "~", "/"} or source.count("/") > 1 or Path(source).exists()


def _from_hub(source: str, split: str, options: Mapping[str, Any]) -> Dataset:
    try:
        return datasets.load_dataset(source, split=split, **options)
    except Exception as error:  # the hub's clients raise a dozen families of errors; each should read as one sentence
        reason = "HF_HUB_OFFLINE is set" if datasets.config.HF_HUB_OFFLINE else " ".join(str(error).split())
        raise DataError(
            f"{source!r} is no file here, and its split {split!r} cannot be had from the hub: {reason}; "
            "name a local file, or a dataset of the hub while there is a network"
        ) from None


def read(path: Path) -> list[Labelled]:
    """The rows of a file as they are, each with the words by which a person finds it; DataError if one is no row."""
    if not path.exists():
        raise DataError(f"no such file: {path}")
    if path.is_dir() or not path.name.endswith(FORMATS):
        raise DataError(
            f"{path}: {'a folder' if path.is_dir() else 'of no known kind'}; name a {' '.join(FORMATS)} file"
        )
    read = _csv if ".csv" in path.suffixes else _parquet if path.suffix == ".parquet" else _json
    try:
        labelled = list(read(path))
    except (EOFError, zlib.error):
        raise DataError(f"{path}: the gzip file is cut off or damaged; get it again") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as what its name says: {' '.join(str(error).split())[:200]}") from None
    for label, row in labelled:
        if not isinstance(row, dict):
            raise DataError(f'{path}, {label}: a row must be an object such as {{"prompt": ...}}')
    return labelled


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    # Bytes are split, not text: str.splitlines breaks at separators inside JSON strings, and a decoding file object
    # does not say which line is not UTF-8.
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield f"row {number}", raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                where = f"{path}, row {number}, byte {error.start + 1} of the line"
                raise DataError(f"{where}: not UTF-8; save the file as UTF-8") from None


def _json(path: Path) -> Iterator[Labelled]:
    lines = list(_lines(path))
    text = "".join(line for _, line in lines)
    if text.lstrip().startswith("["):  # one array of rows; otherwise a row per line, whatever the suffix says
        yield from ((_from_zero(index), row) for index, row in enumerate(_parse(text, str(path))))
    else:
        yield from ((label, _parse(line, f"{path}, {label}")) for label, line in lines if line.strip())


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None


def _csv(path: Path) -> Iterator[Labelled]:
    # strict, because otherwise a quote that is never closed swallows the rest of the file without a word.
    csv.field_size_limit(sys.maxsize)  # a long chat is one cell
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
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
                    booleans = {"true": True, "1": True, "false": False, "0": False}
                    row["label"] = booleans.get(row["label"].strip().lower(), row["label"])
                yield label, row
    except csv.Error as error:
        raise DataError(f"{path}, row {start}: not valid CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Labelled]:
    return ((_from_zero(index), row) for index, row in enumerate(pyarrow.parquet.read_table(path).to_pylist()))


def _to_dataset(source: str, labels: Sequence[str], rows: Sequence[Row]) -> Dataset:
    # Not Dataset.from_list, which takes the columns of the first row only.
    values = {column: [row.get(column) for row in rows] for column in dict.fromkeys(c for row in rows for c in row)}
    for column, cells in values.items():
        known = next((_type(cell) for cell in cells if cell is not None), "")
        for label, cell in zip(labels, cells, strict=True):
            kind = "missing" if cell is None else f"wrong type ({_type(cell)})"
            if column in TEXT_COLUMNS and _type(cell) not in {"str", "list"}:
                raise DataError(f"{source}, {label}, column {column!r}: {kind}; {KINDS[kind.partition(' (')[0]]}")
            if cell is not None and _type(cell) != known:
                raise DataError(f"{source}, {label}, column {column!r}: {kind}; the rows before have {known}")
    try:
        return Dataset.from_dict(values)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise DataError(f"{source}: cannot be stored as a table: {error}") from None


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


def _count_tokens(prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(prompt or completion, str):
        ids = tokenizer((prompt or "") + (completion or ""), verbose=False)["input_ids"]
        return len(ids) + (completion is not None and ids[-1:] != [tokenizer.eos_token_id])  # trainers append EOS
    if not tokenizer.chat_template:
        raise DataError("the rows are chats but the tokenizer has no chat template: set tokenizer.chat_template")
    chat = [*(prompt or []), *(completion or [])]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=not completion)
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _uniform(prompt: Any, seed: int) -> float:
    # Chats without their empty keys, which Arrow adds to every message when one message of the column has them.
    if isinstance(prompt, list):
        prompt = [{key: value for key, value in message.items() if value is not None} for message in prompt]
    digest = hashlib.sha256(json.dumps([seed, prompt], sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _from_zero(index: int) -> str:
    return f"row {index} (counting from 0)"


def _type(value: Any) -> str:
    return "number" if type(value) in {int, float} else type(value).__name__


def _counts(faults: Sequence[Fault], labels: Sequence[object]) -> str:
    first = {fault.kind: labels[fault.row] for fault in reversed(faults)}
    kinds = Counter(fault.kind for fault in faults).most_common()
    return ", ".join(f"{n} x {kind} (first: {first[kind]})" for kind, n in kinds)


def _missing(source: str, column: str, columns: Sequence[str]) -> str:
    others = [name for name in columns if name not in TEXT_COLUMNS]
    near = [name for name in others if name.lower() in OTHER_NAMES.get(column, ())]
    near += get_close_matches(column, others, 1)
    guess = f"; did you mean {near[0]!r}? Then rename_column({near[0]!r}, {column!r})" if near else ""
    names = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in columns)
    return f"{source}: no column {column!r}; it has {names}{guess}"
