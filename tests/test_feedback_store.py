"""The store of judgments: append-only, durable, open to several processes, and closed to other programs' files."""

from __future__ import annotations

import multiprocessing
import signal
import sqlite3
import warnings
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_kit.feedback import Answer, FeedbackError, Item, Store
from rlhf_kit.feedback.judging import as_row
from rlhf_kit.feedback.store import SCHEMA_VERSION

ITEM = Item("is it even ?", ("yes .", "no ."), {"topic": "numbers"})
FIRST = Answer(ranks=(1, 2))


def judging(path: Path, rater: str, n: int, said: Any) -> None:
    """Judge n items in a process of its own; say each judgment's number once the store has acknowledged it."""
    store = Store(path)
    for i in range(n):
        item = Item(f"{rater} {i} ?", ("yes", "no"))
        store.add([item])
        row = as_row(item, rater, "rank", Answer(ranks=(1, 2), note=str(i)), (1, 0), 0.1, "test")
        said.send((store.append(row, before=0), str(i)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "judgments.db")
    store.add([ITEM])
    return store


def judge(store: Store, rater: str = "ana", before: int | None = 0) -> int:
    return store.append(as_row(ITEM, rater, "rank", FIRST, (0, 1), 2.0, "test"), before)


def test_a_judgment_comes_back_as_it_was_given_in_the_items_own_order(store: Store) -> None:
    answer = Answer(ranks=(1, 2), strength="much", note="Ünïcode")
    judgment = store.append(as_row(ITEM, "ana", "rank", answer, (1, 0), 2.5, "page, 1.0"))
    [row] = store.judgments().to_dict("records")
    assert row["ranks"] == [2, 1]  # the second completion was shown first, and is the better one
    known = {"shown": [1, 0], "strength": "much", "note": "Ünïcode", "seconds": 2.5, "interface": "page, 1.0"}
    known |= {"prompt": ITEM.prompt, "completions": list(ITEM.completions), "columns": ITEM.columns, "rater": "ana"}
    assert row | known == row and not row["withdrawn"]
    assert store.judged("ana", "rank") == [(judgment, ITEM.id, (1, 0), 2.5, False)]
    assert store.judged("ana", "1-7") == store.judged("ben", "rank") == []


def test_an_item_is_added_once_and_keeps_its_columns(store: Store) -> None:
    nan = Item("another ?", ("a", "b"), {"gold": float("nan"), "n": np.int64(3), "scores": np.array([1.5, 2.5])})
    with warnings.catch_warnings(action="error"):
        assert [store.add([nan, ITEM]), store.add([nan])] == [1, 0]
    with pytest.warns(UserWarning, match="1 of 2 items are in .*judgments.db with other columns; those stay"):
        store.add([nan, Item(ITEM.prompt, ITEM.completions, {"topic": "parity"})])
    assert store.items() == [ITEM, nan] and store.items()[0].columns == ITEM.columns
    assert store.items()[1].columns["scores"] == [1.5, 2.5]
    for value in (Path("x"), {(1, 2): "x"}):
        with pytest.raises(FeedbackError, match="cannot hold all of {'where': .*") as error:
            store.add([Item("third ?", ("a", "b")), Item("fourth ?", ("a", "b"), {"where": value})])
        assert "\n" not in str(error.value)
    assert len(store.items()) == 2


@pytest.mark.parametrize(("table", "column"), [("items", "prompt"), ("judgments", "note"), ("withdrawals", "time")])
def test_what_is_written_can_be_neither_changed_nor_deleted(store: Store, table: str, column: str) -> None:
    store.withdraw(judge(store), "ana")
    with closing(sqlite3.connect(store.path)) as connection:
        for statement in (f"UPDATE {table} SET {column} = 'x'", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"):
                connection.execute(statement)
    assert store.judgments().empty and store.judged("ana", "rank") == []
    assert list(store.judgments(withdrawn=True)["withdrawn"]) == [True]


def test_files_of_another_version_or_program_are_left_alone(store: Store, tmp_path: Path) -> None:
    for path, statement in ((store.path, "PRAGMA user_version = 1"), (tmp_path / "other.db", "CREATE TABLE mine (x)")):
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
    wal = sqlite3.connect(tmp_path / "live.db")  # another program has it open, and not all is in the file yet
    for statement in ("PRAGMA journal_mode = WAL", f"PRAGMA user_version = {SCHEMA_VERSION}", "CREATE TABLE mine (x)"):
        wal.execute(statement)
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and long enough to be taken for a header of a database" * 20)
    says = {store.path: "its schema is 1", tmp_path / "other.db": "its schema is 0", text: "is no store"}
    for path, said in (says | {tmp_path / "live.db": "is no store", tmp_path: "Is a directory"}).items():
        before = {each: each.read_bytes() for each in tmp_path.iterdir()}
        with pytest.raises(FeedbackError, match=f"{path.name}: .*{said}.*; name another file"):
            Store(path)
        assert {each: each.read_bytes() for each in tmp_path.iterdir()} == before
    wal.close()
    with pytest.raises(FeedbackError, match="unable to open"):
        Store(tmp_path / "absent" / "j.db")


def test_a_store_that_is_only_read_stays_as_it_is_and_has_what_others_write_meanwhile(store: Store) -> None:
    judge(store)
    before, reader = [*store.path.parent.iterdir()], Store(store.path, read_only=True)
    assert len(reader.judgments()) == 1 and [*store.path.parent.iterdir()] == before
    with store._transaction("BEGIN"):  # the writer's connection is open, so that what it writes is not in the file yet
        judge(store, "ben")
        assert list(reader.judgments()["rater"]) == ["ana", "ben"]
    with pytest.raises(FeedbackError, match="readonly"):
        reader.add([Item("new ?", ("a", "b"))])


@pytest.mark.parametrize(("damage", "says"), [(b"\xff" * 9000, "malformed|not a database"), (b'"' * 50, "delimiter")])
def test_a_damaged_or_busy_store_is_said_in_a_sentence(
    store: Store, damage: bytes, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(200):
        store.add([Item(f"{number} ?", ("yes " * 50, "no"))])
    monkeypatch.setattr("rlhf_kit.feedback.store.WAIT", 0.1)
    with store._transaction(), pytest.raises(FeedbackError, match="judgments.db: .*is locked.*; see that"):
        judge(store)
    content = store.path.read_bytes()
    at = content.index(b"yes yes", len(content) // 2)
    store.path.write_bytes(content[:at] + damage + content[at + len(damage) :])
    with pytest.raises(FeedbackError, match=f"judgments.db: the store does not answer .*({says}).*; see that"):
        store.items()


def test_what_was_judged_is_judged_again_only_after_a_withdrawal(store: Store) -> None:
    judgment = judge(store)
    with pytest.raises(FeedbackError, match=f"judged this item before, as judgment {judgment}"):
        judge(store)
    assert judge(store, before=1) == judgment + 1  # a caller that knows of the first asks a second time
    for number, rater in ((judgment, "ben"), (judgment + 9, "ana")):
        with pytest.raises(FeedbackError, match=f"judgment {number}: is not one of rater '{rater}'"):
            store.withdraw(number, rater)
    for number in (judgment, judgment + 1):
        store.withdraw(number, "ana")
    with pytest.raises(FeedbackError, match="withdrawn before"):
        store.withdraw(judgment, "ana")
    judge(store)
    judge(store, "ben")  # another rater is another matter
    assert list(store.judgments()["rater"]) == ["ana", "ben"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rater": "  "}, "needs a rater's name"),
        ({"rater": "ana\udcff"}, "half a character"),
        ({"answer": Answer(note="\ud83d")}, "half a character"),
        ({"shown": (0, 0)}, "name each of 2 completions once"),
        ({"item": Item("unknown ?", ("a", "b"))}, "FOREIGN KEY"),
        ({"answer": Answer(ranks=(1, 2, 3))}, "2 numbers from 1 to 2"),
        ({"answer": Answer(ranks=(1, 3))}, "2 numbers from 1 to 2"),
        ({"answer": Answer(rating=1)}, "ranks None"),
    ],
)
def test_what_does_not_fit_is_refused(store: Store, change: dict[str, object], says: str) -> None:
    given = {"item": ITEM, "rater": "ana", "question": "rank", "answer": FIRST, "shown": (0, 1), "seconds": None}
    with pytest.raises((FeedbackError, sqlite3.IntegrityError), match=says):
        store.append(as_row(**given | change, interface="test"))  # type: ignore[arg-type]
    assert store.judgments().empty


def test_two_processes_write_at_once_and_a_kill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path, start = tmp_path / "judgments.db", multiprocessing.get_context("fork")  # the store is not there: both make it
    processes, pipes = {}, {}
    for rater, n in (("ana", 100), ("ben", 1_000_000)):
        pipes[rater], end = start.Pipe(duplex=False)
        processes[rater] = start.Process(target=judging, args=(path, rater, n, end), daemon=True)
        processes[rater].start()
        end.close()
    said = {rater: [pipe.recv() for _ in range(20)] for rater, pipe in pipes.items()}
    processes["ana"].join(60)
    processes["ben"].kill()
    for rater, pipe in pipes.items():
        with suppress(EOFError):
            while True:
                said[rater].append(pipe.recv())
    processes["ben"].join(60)
    assert (processes["ana"].exitcode, processes["ben"].exitcode, len(said["ana"])) == (0, -signal.SIGKILL, 100)
    store = Store(path)
    frame = store.judgments()
    assert list(frame["judgment"]) == list(range(1, len(frame) + 1))
    for rater, acknowledged in said.items():
        own = frame[frame["rater"] == rater]
        kept = list(zip(own["judgment"], own["note"], strict=True))
        assert kept[: len(acknowledged)] == acknowledged
        assert len(kept) - len(acknowledged) <= (rater == "ben")  # the last one may be kept and not said yet
        assert (own["prompt"] == f"{rater} " + own["note"] + " ?").all()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.add([ITEM])
    judge(store)  # and it goes on
