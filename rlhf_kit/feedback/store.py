"""The store of judgments: one SQLite file that only ever grows, for any number of raters and processes at once."""

from __future__ import annotations

import json
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from rlhf_kit.feedback.judging import (
    COLUMNS,
    Answer,
    FeedbackError,
    Item,
    Question,
    check_question,
    judgments_frame,
    now,
    ranks_of_item,
)

SCHEMA_VERSION = 1
WAIT = 30.0  # seconds that a write waits for another process's write

# A showing is made before its completions are seen, so that a judgment always says what was on the page. Nothing is
# ever changed or deleted: what a rater takes back is a withdrawal beside the judgment.
SCHEMA = """
CREATE TABLE items (
    item TEXT PRIMARY KEY, prompt TEXT NOT NULL, completions TEXT NOT NULL, columns TEXT NOT NULL);
CREATE TABLE showings (
    showing INTEGER PRIMARY KEY, item TEXT NOT NULL REFERENCES items, rater TEXT NOT NULL CHECK (rater <> ''),
    question TEXT NOT NULL, shown TEXT NOT NULL, time TEXT NOT NULL);
CREATE TABLE judgments (
    judgment INTEGER PRIMARY KEY, showing INTEGER NOT NULL UNIQUE REFERENCES showings, ranks TEXT, rating INTEGER,
    strength TEXT, note TEXT NOT NULL, seconds REAL, interface TEXT NOT NULL, time TEXT NOT NULL);
CREATE TABLE withdrawals (
    judgment INTEGER PRIMARY KEY REFERENCES judgments, time TEXT NOT NULL);
CREATE INDEX showings_of_rater ON showings (rater, item);
"""
APPEND_ONLY = """
CREATE TRIGGER {table}_{verb} BEFORE {verb} ON {table} BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;
"""
# A judgment that was there before an import, by its content's name and the millisecond.
SAME = (
    "SELECT 1 FROM judgments j JOIN showings USING (showing) "
    "WHERE item = ? AND rater = ? AND question = ? AND j.time = ? AND judgment <= ?"
)
AS_JSON = ("ranks", "shown", "prompt", "completions", "columns")
TABLES = ("items", "showings", "judgments", "withdrawals")


class Showing(NamedTuple):
    """An item as one rater sees it: `shown[place]` is the index of the completion at that place of the page."""

    showing: int
    item: Item
    rater: str
    question: Question
    shown: tuple[int, ...]


class Store:
    """Judgments in a file of that path, made if it is not there; a method that returns has its rows on the disk.

    WAL mode with full synchronisation: what was acknowledged survives kill -9, and readers never wait. Raises
    FeedbackError where the file is no store, or one of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise FeedbackError(f"{self.path}: its folder {self.path.parent} is not there; make it first")
        try:
            with closing(sqlite3.connect(self.path, timeout=WAIT)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                self._prepare(connection)
        except sqlite3.DatabaseError as error:
            raise FeedbackError(f"{self.path}: is not a store of judgments ({error}); name another file") from None

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.isolation_level = None
        connection.execute("BEGIN IMMEDIATE")  # of two processes that make the same store, one waits
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version == 0 and tables == 0:
            triggers = (APPEND_ONLY.format(table=table, verb=verb) for table in TABLES for verb in ("UPDATE", "DELETE"))
            for statement in [*SCHEMA.strip().split(";\n"), *triggers]:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise FeedbackError(
                f"{self.path}: has schema version {version}, this rlhf-kit reads {SCHEMA_VERSION}; export it with the "
                "version that wrote it, then load the export into a new store"
            )
        connection.execute("COMMIT")

    @contextmanager
    def _connection(self, write: bool = True) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: committed at the end, undone on an error; only writers wait for others."""
        with closing(sqlite3.connect(self.path, timeout=WAIT)) as connection:
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")
            connection.isolation_level = None
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            try:
                yield connection
            except BaseException:
                connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")

    # Items and showings --------------------------------------------------------------------------------------------

    def add(self, items: Sequence[Item]) -> int:
        """Put items into the store; returns how many are new. Of one that is there the columns stay, with a note."""
        with self._connection() as connection:
            before = connection.execute("SELECT count(*) FROM items").fetchone()[0]
            other = sum(not _put(connection, item) for item in items)
            added = connection.execute("SELECT count(*) FROM items").fetchone()[0] - before
        if other:
            warnings.warn(
                f"{other} of {len(items)} items are in {self.path} with other columns; those stay as they are",
                stacklevel=2,
            )
        return int(added)

    def items(self) -> list[Item]:
        """All items, in the order in which they were added."""
        with self._connection(write=False) as connection:
            rows = connection.execute("SELECT prompt, completions, columns FROM items ORDER BY rowid").fetchall()
        return [_item(*row) for row in rows]

    def show(self, item: Item, rater: str, question: Question, shown: Sequence[int]) -> Showing:
        """Note that `rater` is about to see an item of this store, its completions in the order `shown`."""
        check_question(question, [item])
        if not rater.strip():
            raise FeedbackError("a judgment needs a rater's name; give one, such as rater='ana'")
        if sorted(shown) != list(range(len(item.completions))):
            raise FeedbackError(f"shown {tuple(shown)}: names each of {len(item.completions)} completions once")
        with self._connection() as connection:
            if not connection.execute("SELECT 1 FROM items WHERE item = ?", (item.id,)).fetchone():
                raise FeedbackError(f"item {item.id}: is not in {self.path}; add it first")
            return Showing(_show(connection, item.id, rater, question, shown), item, rater, question, tuple(shown))

    def open_showing(self, rater: str, question: Question) -> Showing | None:
        """What this rater was shown last and has not answered yet: after a reload the same page comes again."""
        with self._connection(write=False) as connection:
            row = connection.execute(
                "SELECT showing, shown, prompt, completions, columns, judgment FROM showings JOIN items USING (item) "
                "LEFT JOIN judgments USING (showing) WHERE rater = ? AND question = ? ORDER BY showing DESC LIMIT 1",
                (rater, question),
            ).fetchone()
        if row is None or row[-1] is not None:
            return None
        return Showing(row[0], _item(*row[2:5]), rater, question, tuple(json.loads(row[1])))

    # Judgments -----------------------------------------------------------------------------------------------------

    def record(
        self, showing: int, rater: str, answer: Answer, seconds: float | None, interface: str, before: int = 0
    ) -> int:
        """Keep a rater's answer to what was shown; returns the judgment's number, with the row on the disk.

        before: judgments of this item that the page knows of, where it asks again. FeedbackError if there are more.
        """
        with self._connection() as connection:
            row = connection.execute(
                "SELECT rater, question, shown, judgment, item FROM showings LEFT JOIN judgments USING (showing) "
                "WHERE showing = ?",
                (showing,),
            ).fetchone()
            if row is None or row[0] != rater:
                raise FeedbackError(f"rater {rater!r} was never shown item of showing {showing}; show it first")
            if row[3] is not None:
                raise FeedbackError(f"showing {showing} was judged before, as judgment {row[3]}; withdraw that first")
            made = connection.execute(
                "SELECT judgment FROM judgments JOIN showings USING (showing) WHERE item = ? AND rater = ? AND "
                "question = ? AND judgment NOT IN (SELECT judgment FROM withdrawals) ORDER BY judgment",
                (row[4], rater, row[1]),
            ).fetchall()
            if len(made) > before:  # shown twice, in two tabs
                raise FeedbackError(
                    f"rater {rater!r} judged this item before, as judgment {made[-1][0]}; withdraw that first"
                )
            shown = json.loads(row[2])
            answer.check(row[1], len(shown))
            return _record(connection, showing, answer, shown, seconds, interface, now())

    def append(
        self,
        item: Item,
        rater: str,
        question: Question,
        answer: Answer,
        shown: Sequence[int],
        seconds: float | None,
        interface: str,
    ) -> int:
        """Showing and judgment in one step, for raters who are asked by a program; returns the judgment's number."""
        answer.check(question, len(item.completions))
        with self._connection() as connection:
            showing = _show(connection, item.id, rater, question, shown)
            return _record(connection, showing, answer, shown, seconds, interface, now())

    def withdraw(self, judgment: int, rater: str) -> None:
        """Take a judgment back: it stays in the history, marked, and counts no more; FeedbackError if it is not the
        rater's own, or was withdrawn before."""
        with self._connection() as connection:
            row = connection.execute(
                "SELECT rater FROM judgments JOIN showings USING (showing) WHERE judgment = ?", (judgment,)
            ).fetchone()
            if row is None or row[0] != rater:
                raise FeedbackError(f"judgment {judgment} is none of rater {rater!r}; raters take back their own only")
            if connection.execute("SELECT 1 FROM withdrawals WHERE judgment = ?", (judgment,)).fetchone():
                raise FeedbackError(f"judgment {judgment} was withdrawn before")
            connection.execute("INSERT INTO withdrawals VALUES (?, ?)", (judgment, now()))

    def judgments(self, withdrawn: bool = False) -> pd.DataFrame:
        """A row per judgment, COLUMNS, in the order in which they were made; with `withdrawn` those taken back too."""
        with self._connection(write=False) as connection:
            rows = connection.execute(
                "SELECT j.judgment, item, rater, question, ranks, rating, strength, note, shown, seconds, interface, "
                "j.time, w.judgment IS NOT NULL, prompt, completions, columns FROM judgments j "
                "JOIN showings USING (showing) JOIN items USING (item) LEFT JOIN withdrawals w USING (judgment) "
                "ORDER BY j.judgment"
            ).fetchall()
        found = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        for row in found:
            row |= {name: json.loads(row[name] or "null") for name in AS_JSON}
        frame = judgments_frame(found)
        return frame if withdrawn else frame[~frame["withdrawn"]].reset_index(drop=True)

    def append_all(self, rows: Sequence[dict[str, Any]]) -> int:
        """Judgments with their items, as read from a file, all in one transaction or none; returns how many.

        FeedbackError naming the row (its `where`: file and line) if the judgment is in the store already, or its
        item with other columns.
        """
        with self._connection() as connection:
            last = connection.execute("SELECT coalesce(max(judgment), 0) FROM judgments").fetchone()[0]
            for number, row in enumerate(rows, 1):
                where = row.get("where", f"row {number}")
                item = Item(row["prompt"], tuple(row["completions"]), row["columns"])
                if not _put(connection, item):
                    raise FeedbackError(
                        f"{where}, column 'columns': item {item.id} is there with other columns; nothing was imported"
                    )
                who = (item.id, row["rater"], row["question"])
                if connection.execute(SAME, (*who, row["time"], last)).fetchone():
                    raise FeedbackError(f"{where}: this judgment is in {self.path} already; nothing was imported")
                showing = _show(connection, *who, row["shown"], row["time"])
                judgment = _record(
                    connection, showing, row["answer"], row["shown"], row["seconds"], row["interface"], row["time"]
                )
                if row["withdrawn"]:
                    connection.execute("INSERT INTO withdrawals VALUES (?, ?)", (judgment, now()))
        return len(rows)


def _put(connection: sqlite3.Connection, item: Item) -> bool:
    """Insert an item that is not there yet; returns whether its columns are those of the store."""
    row = (item.id, _json(item.prompt), _json(list(item.completions)), _json(item.columns))
    connection.execute("INSERT OR IGNORE INTO items VALUES (?, ?, ?, ?)", row)
    [columns] = connection.execute("SELECT columns FROM items WHERE item = ?", (item.id,)).fetchone()
    return len({json.dumps(json.loads(text), sort_keys=True) for text in (columns, row[-1])}) == 1  # as text: NaN too


def _show(
    connection: sqlite3.Connection, item: str, rater: str, question: str, shown: Sequence[int], time: str | None = None
) -> int:
    row = (item, rater, question, _json(list(shown)), time or now())
    cursor = connection.execute("INSERT INTO showings (item, rater, question, shown, time) VALUES (?, ?, ?, ?, ?)", row)
    return int(cursor.lastrowid or 0)


def _record(
    connection: sqlite3.Connection,
    showing: int,
    answer: Answer,
    shown: Sequence[int],
    seconds: float | None,
    interface: str,
    time: str,
) -> int:
    ranks = ranks_of_item(answer.ranks, shown)
    row = (showing, ranks and _json(ranks), answer.rating, answer.strength, answer.note, seconds, interface, time)
    cursor = connection.execute(
        "INSERT INTO judgments (showing, ranks, rating, strength, note, seconds, interface, time) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        row,
    )
    return int(cursor.lastrowid or 0)


def _item(prompt: str, completions: str, columns: str) -> Item:
    return Item(json.loads(prompt), tuple(json.loads(completions)), json.loads(columns))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's; raises FeedbackError where a column holds what JSON cannot."""
    if not hasattr(value, "tolist"):
        raise FeedbackError(f"a column holds {value!r}; a store keeps texts, numbers and lists, so turn it into one")
    return value.tolist()
