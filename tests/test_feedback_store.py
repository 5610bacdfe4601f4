"""The store of judgments: it only grows, takes nothing that was not asked, and loses nothing that it acknowledged."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import warnings
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from rlhf_kit.feedback import Answer, FeedbackError, Item, Store

ROOT = Path(__file__).resolve().parent.parent
ITEM = Item("is it even ?", ("yes .", "no ."), {"topic": "numbers"})
FIRST = Answer(ranks=(1, 2))

# Judges items without end, and says each judgment's number once the store has acknowledged it.
JUDGING = """
import sys
from rlhf_kit.feedback import Answer, Item, Store
store, rater = Store(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
for i in range(int(sys.argv[3])):
    item = Item(f"{rater} {i} ?", ("yes", "no"))
    store.add([item])
    showing = store.show(item, rater, "rank", (1, 0))
    judgment = store.record(showing.showing, rater, Answer(ranks=(1, 2), note=str(i)), 0.1, "test")
    sys.stdout.write(f"{judgment} {i}\\n")
    sys.stdout.flush()
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "judgments.db")
    store.add([ITEM])
    return store


def judging(path: Path, rater: str, n: int) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", JUDGING, str(path), rater, str(n)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def judge(store: Store, rater: str = "ana", shown: tuple[int, ...] = (0, 1)) -> int:
    return store.record(store.show(ITEM, rater, "rank", shown).showing, rater, FIRST, 2.0, "test")


# What it keeps -------------------------------------------------------------------------------------------------------


def test_a_judgment_comes_back_as_it_was_given_in_the_items_own_order(store: Store) -> None:
    showing = store.show(ITEM, "ana", "rank", (1, 0))
    store.record(showing.showing, "ana", Answer(ranks=(1, 2), strength="much", note="Ünïcode"), 2.5, "page, 1.0")
    [row] = store.judgments().to_dict("records")
    assert row["ranks"] == [2, 1]  # the second completion was shown first, and is the better one
    assert (row["shown"], row["strength"], row["note"], row["seconds"]) == ([1, 0], "much", "Ünïcode", 2.5)
    assert (row["prompt"], row["completions"], row["columns"]) == (ITEM.prompt, list(ITEM.completions), ITEM.columns)
    assert row["interface"] == "page, 1.0" and row["rater"] == "ana" and not row["withdrawn"]


def test_an_item_is_added_once(store: Store) -> None:
    assert store.add([ITEM, Item("another ?", ("a", "b"))]) == 1
    assert store.add([ITEM]) == 0
    assert store.items()[0] == ITEM


def test_other_columns_of_an_item_that_is_there_are_left_out_with_a_note(store: Store) -> None:
    nan = Item("another ?", ("a", "b"), {"gold": float("nan"), "n": np.int64(3), "scores": np.array([1.5, 2.5])})
    with warnings.catch_warnings(action="error"):
        assert [store.add([nan]), store.add([nan])] == [1, 0]
    with pytest.warns(UserWarning, match="1 of 2 items are in .*judgments.db with other columns; those stay"):
        store.add([nan, Item(ITEM.prompt, ITEM.completions, {"topic": "parity"})])
    assert store.items()[0].columns == ITEM.columns
    assert store.items()[1].columns["scores"] == [1.5, 2.5]


def test_a_column_that_no_file_can_hold_is_refused(store: Store) -> None:
    with pytest.raises(FeedbackError, match="a column holds PosixPath.*; a store keeps texts, numbers and lists"):
        store.add([Item("another ?", ("a", "b"), {"where": Path("x")})])
    assert len(store.items()) == 1


@pytest.mark.parametrize("table", ["items", "showings", "judgments", "withdrawals"])
def test_what_is_written_can_be_neither_changed_nor_deleted(store: Store, table: str) -> None:
    store.withdraw(judge(store), "ana")
    column = {"items": "prompt", "showings": "rater", "judgments": "note", "withdrawals": "time"}[table]
    with closing(sqlite3.connect(store.path)) as connection:
        for statement in (f"UPDATE {table} SET {column} = 'x'", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"{table} is append-only"):
                connection.execute(statement)
    assert len(store.judgments(withdrawn=True)) == 1


def test_a_withdrawn_judgment_counts_no_more_and_stays_in_the_history(store: Store) -> None:
    store.withdraw(judge(store), "ana")
    assert store.judgments().empty
    assert list(store.judgments(withdrawn=True)["withdrawn"]) == [True]


def test_a_log_left_by_a_killed_process_is_read(store: Store, tmp_path: Path) -> None:
    """A copy made while a connection is open: the rows are in the -wal file only."""
    with closing(sqlite3.connect(store.path)) as reader:
        reader.execute("SELECT count(*) FROM items").fetchone()
        judge(store)
        log = store.path.with_name("judgments.db-wal")
        assert log.stat().st_size > 0
        copy = tmp_path / "copy.db"
        copy.write_bytes(store.path.read_bytes())
        copy.with_name("copy.db-wal").write_bytes(log.read_bytes())
    assert len(Store(copy).judgments()) == 1


# What it refuses -----------------------------------------------------------------------------------------------------


def test_a_store_of_another_version_is_left_alone(store: Store) -> None:
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    before = store.path.read_bytes()
    with pytest.raises(FeedbackError, match="has schema version 2, this rlhf-kit reads 1"):
        Store(store.path)
    assert store.path.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and long enough to be taken for a header of a database" * 20)
    with pytest.raises(FeedbackError, match="notes.txt: is not a store of judgments"):
        Store(text)
    assert text.read_text().startswith("these are notes")
    other = tmp_path / "other.db"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE mine (x)")
    with pytest.raises(FeedbackError, match="other.db: has schema version 0"):
        Store(other)
    with pytest.raises(FeedbackError, match="make it first"):
        Store(tmp_path / "absent" / "j.db")


@pytest.mark.parametrize("rater", ["", "  "])
def test_a_rater_without_a_name_is_shown_nothing(store: Store, rater: str) -> None:
    with pytest.raises(FeedbackError, match="needs a rater's name"):
        store.show(ITEM, rater, "rank", (0, 1))


def test_an_item_never_shown_to_a_rater_cannot_be_judged_by_that_rater(store: Store) -> None:
    showing = store.show(ITEM, "ana", "rank", (0, 1)).showing
    for rater, number in (("ben", showing), ("ana", showing + 1)):
        with pytest.raises(FeedbackError, match=f"rater '{rater}' was never shown"):
            store.record(number, rater, FIRST, 1.0, "test")
    with pytest.raises(FeedbackError, match="is not in .*; add it first"):
        store.show(Item("unknown ?", ("a", "b")), "ana", "rank", (0, 1))
    assert store.judgments().empty


def test_what_was_judged_is_judged_again_only_after_a_withdrawal(store: Store) -> None:
    showings = [store.show(ITEM, "ana", "rank", (0, 1)).showing for _ in range(2)]
    judgment = store.record(showings[0], "ana", FIRST, 1.0, "test")
    with pytest.raises(FeedbackError, match=f"showing {showings[0]} was judged before, as judgment {judgment}"):
        store.record(showings[0], "ana", FIRST, 1.0, "test")
    with pytest.raises(FeedbackError, match=f"judged this item before, as judgment {judgment}"):
        store.record(showings[1], "ana", FIRST, 1.0, "test")
    store.withdraw(judgment, "ana")
    store.record(showings[1], "ana", FIRST, 1.0, "test")
    judge(store, "ben")  # another rater is another matter
    assert list(store.judgments()["rater"]) == ["ana", "ben"]


def test_raters_take_back_their_own_only_and_once(store: Store) -> None:
    judgment = judge(store)
    with pytest.raises(FeedbackError, match="raters take back their own only"):
        store.withdraw(judgment, "ben")
    with pytest.raises(FeedbackError, match="raters take back their own only"):
        store.withdraw(judgment + 1, "ana")
    store.withdraw(judgment, "ana")
    with pytest.raises(FeedbackError, match="withdrawn before"):
        store.withdraw(judgment, "ana")


@pytest.mark.parametrize("answer", [Answer(ranks=(1, 2, 3)), Answer(ranks=(1, 3)), Answer(rating=1)])
def test_an_answer_to_another_question_is_refused(store: Store, answer: Answer) -> None:
    showing = store.show(ITEM, "ana", "rank", (0, 1)).showing
    with pytest.raises(FeedbackError):
        store.record(showing, "ana", answer, 1.0, "test")
    assert store.open_showing("ana", "rank") is not None


# Several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_write_to_one_store_at_once(tmp_path: Path) -> None:
    path = tmp_path / "judgments.db"  # not there yet: they also make it at once
    both = [judging(path, rater, 25) for rater in ("ana", "ben")]
    said = [process.communicate(timeout=180)[0].splitlines()[1:] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    frame = Store(path).judgments()
    assert sorted(frame["judgment"]) == list(range(1, 51))
    for rater, lines in zip(("ana", "ben"), said, strict=True):
        own = frame[frame["rater"] == rater]
        assert [f"{row.judgment} {row.note}" for row in own.itertuples()] == lines
        assert all(row.prompt == f"{rater} {row.note} ?" for row in own.itertuples())


@pytest.mark.slow
def test_a_kill_in_the_middle_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "judgments.db"
    process = judging(path, "ana", 1_000_000)
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(21)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.read().splitlines(keepends=True)
    process.wait(timeout=30)
    acknowledged = [int(line.split()[0]) for line in said[1:] if line.endswith("\n")]
    assert len(acknowledged) >= 20
    store = Store(path)
    kept = list(store.judgments()["judgment"])
    assert kept[: len(acknowledged)] == acknowledged
    assert len(kept) - len(acknowledged) <= 1  # one may be kept and not said yet
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.add([ITEM])
    judge(store)  # and it goes on
