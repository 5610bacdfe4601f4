"""The store of judgments: one append-only SQLite file, for any number of raters and processes at once."""

import json
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rlhf_kit.feedback.judging import FeedbackError, Item, Question, canonical, judgments_frame, now

SCHEMA_VERSION = 2
WAIT = 30.0  # seconds that a write waits for another process's write
# Nothing is ever changed or deleted: what a rater takes back is a withdrawal beside the judgment.
TABLES = {
    "items": "item TEXT PRIMARY KEY, prompt TEXT NOT NULL, completions TEXT NOT NULL, columns TEXT NOT NULL",
    "judgments": "judgment INTEGER PRIMARY KEY, item TEXT NOT NULL REFERENCES items, rater TEXT NOT NULL, "
    "question TEXT NOT NULL, ranks TEXT, rating INTEGER, strength TEXT, note TEXT NOT NULL, shown TEXT NOT NULL, "
    "seconds REAL, interface TEXT NOT NULL, time TEXT NOT NULL",
    "withdrawals": "judgment INTEGER PRIMARY KEY REFERENCES judgments, time TEXT NOT NULL",
}
AS_JSON = ("ranks", "shown", "prompt", "completions", "columns")
COUNTS = "judgment NOT IN (SELECT judgment FROM withdrawals)"


class Judged(NamedTuple):
    """A judgment of one rater that counts; `shown[place]` is the index of the completion at that place of the page."""

    judgment: int
    item: str
    shown: tuple[int, ...]
    seconds: float | None
    skipped: bool


class Store:
    """Judgments in a file of that path, made if it is not there; FeedbackError where it is no store of this version.

    WAL mode with full synchronisation: what a method has written survives kill -9, and readers never wait.
    read_only: it must be there, and nothing is written at its place.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path, self.read_only = Path(path), read_only
        if fault := self._fault():
            raise FeedbackError(f"{self.path}: is no store of judgments ({fault}); name another file")
        if not read_only:
            with self._transaction() as connection:  # of two processes that make the same store, one waits
                if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                    _create(connection)
            with self._transaction("PRAGMA journal_mode = WAL"):
                pass

    def _fault(self) -> str | None:
        """Why the file is no store. It is read as bytes, because SQLite may change any database that it opens."""
        try:
            with self.path.open("rb") as stream:
                page = stream.read(4096)  # the first page has all of the schema
        except FileNotFoundError:
            return "no such file" if self.read_only else None
        except OSError as error:
            return error.strerror
        version = int.from_bytes(page[60:64], "big")
        if not page and not self.read_only:
            return None  # it is yet to be made
        if not page.startswith(b"SQLite format 3\0"):
            return "file is not a database"
        if version != SCHEMA_VERSION:
            return f"its schema is {version}, and this rlhf-kit reads {SCHEMA_VERSION}"
        return None if b"CREATE TABLE withdrawals" in page else "it lacks the tables of one"

    @contextmanager
    def _transaction(self, begin: str = "BEGIN IMMEDIATE") -> Iterator[sqlite3.Connection]:
        """A connection for one transaction, undone on an error (then a FeedbackError). IMMEDIATE waits for writers."""
        address = self.path.resolve().as_uri()
        if self.read_only:  # without a -wal file nobody else has it open, and `immutable` makes no file beside it
            address += "?mode=ro" if Path(f"{self.path.resolve()}-wal").exists() else "?immutable=1"
        try:
            with closing(sqlite3.connect(address, timeout=WAIT, isolation_level=None, uri=True)) as connection:
                connection.row_factory = sqlite3.Row
                connection.execute("PRAGMA foreign_keys = ON")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(begin)
                with connection:
                    yield connection
        except FeedbackError:
            raise
        except (sqlite3.Error, ValueError, TypeError) as error:
            said = "see that it is whole, that no program holds it and that the disk has room, or name another file"
            raise FeedbackError(f"{self.path}: the store does not answer ({error}); {said}") from None

    def add(self, items: Sequence[Item]) -> int:
        """Put items into the store; returns how many are new. Items that are there keep their columns, with a warning.

        FeedbackError where JSON cannot hold a column.
        """
        added = differ = 0
        with self._transaction() as connection:
            for item in items:
                row = (item.id, _json(item.prompt), _json(item.completions), _json(item.columns))
                added += connection.execute("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?)", row).rowcount
                [there] = connection.execute("SELECT columns FROM items WHERE item = ?", row[:1]).fetchone()
                # Compared as texts, because NaN does not equal NaN.
                differ += canonical(json.loads(there)) != canonical(json.loads(row[-1]))
        if differ:
            note = f"{differ} of {len(items)} items are in {self.path} with other columns; those stay as they are"
            warnings.warn(note, stacklevel=2)
        return added

    def items(self) -> list[Item]:
        """All items, in the order in which they were added."""
        with self._transaction("BEGIN") as connection:
            rows = connection.execute("SELECT prompt, completions, columns FROM items ORDER BY rowid")
            found = [[json.loads(text) for text in row] for row in rows]
            return [Item(prompt, tuple(completions), columns) for prompt, completions, columns in found]

    def append(self, judgment: Mapping[str, Any], before: int | None = None) -> int:
        """Keep a judgment, a row by `as_row` of an item in the store; returns its number.

        before: how many judgments of this item by this rater count, as far as the caller knows. FeedbackError if there
        are more, since another tab or process has then asked the same.
        """
        ranks = None if judgment["ranks"] is None else _json(judgment["ranks"])
        row = {**judgment, "ranks": ranks, "shown": _json(judgment["shown"])}
        same = f"item = :item AND rater = :rater AND question = :question AND {COUNTS}"
        with self._transaction() as connection:
            select = f"SELECT count(*), max(judgment) FROM judgments WHERE {same}"
            made, last = connection.execute(select, row).fetchone()
            if before is not None and made > before:
                said = f"judged this item before, as judgment {last}; withdraw that first"
                raise FeedbackError(f"rater {judgment['rater']!r} {said}")
            cursor = connection.execute(
                "INSERT INTO judgments VALUES (NULL, :item, :rater, :question, :ranks, :rating, :strength, :note, "
                ":shown, :seconds, :interface, :time)",
                row,
            )
        return int(cursor.lastrowid or 0)

    def withdraw(self, judgment: int, rater: str) -> None:
        """Take a judgment back: it stays in the history, marked, and counts no more."""
        with self._transaction() as connection:
            select = f"SELECT judgment, ? FROM judgments WHERE judgment = ? AND rater = ? AND {COUNTS}"
            if not connection.execute(f"INSERT INTO withdrawals {select}", (now(), judgment, rater)).rowcount:
                raise FeedbackError(f"judgment {judgment}: is not one of rater {rater!r}, or was withdrawn before")

    def withdrawals(self) -> int:
        """How many judgments were taken back."""
        with self._transaction("BEGIN") as connection:  # a reader never waits
            return int(connection.execute("SELECT count(*) FROM withdrawals").fetchone()[0])

    def judged(self, rater: str, question: Question, after: int = 0) -> list[Judged]:
        """The rater's judgments of that question that count, of those after a number, in the order they were made."""
        columns = "judgment, item, shown, seconds, ranks IS NULL AND rating IS NULL"
        where = f"rater = ? AND question = ? AND judgment > ? AND {COUNTS} ORDER BY judgment"
        with self._transaction("BEGIN") as connection:
            rows = connection.execute(f"SELECT {columns} FROM judgments WHERE {where}", (rater, question, after))
            return [Judged(j, item, tuple(json.loads(shown)), sec, bool(no)) for j, item, shown, sec, no in rows]

    def judgments(self, withdrawn: bool = False) -> pd.DataFrame:
        """A row per judgment, COLUMNS, in the order in which they were made; with `withdrawn` those taken back too."""
        select = f"SELECT *, NOT {COUNTS} AS withdrawn FROM judgments JOIN items USING (item) ORDER BY judgment"
        with self._transaction("BEGIN") as connection:
            rows = [dict(row) for row in connection.execute(select) if withdrawn or not row["withdrawn"]]
            return judgments_frame([row | {name: json.loads(row[name] or "null") for name in AS_JSON} for row in rows])


def _create(connection: sqlite3.Connection) -> None:
    for table, columns in TABLES.items():
        connection.execute(f"CREATE TABLE {table} ({columns})")
        for verb in ("UPDATE", "DELETE"):
            refusal = f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
            connection.execute(f"CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} {refusal}")
    connection.execute("CREATE INDEX judgments_of_rater ON judgments (rater, item)")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _json(value: Any) -> str:
    """JSON, with numpy's numbers and arrays as Python's; FeedbackError for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, default=_as_python)
    except TypeError as error:
        raise FeedbackError(f"the store keeps JSON, which cannot hold all of {str(value)[:200]} ({error})") from None


def _as_python(value: Any) -> Any:
    if not hasattr(value, "tolist"):
        raise TypeError(f"give text or numbers in place of a {type(value).__name__}")
    return value.tolist()
