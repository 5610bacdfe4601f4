"""The store of judgments: append-only, durable, open to several processes, and closed to other programs' files."""

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

# Judges items without end, and prints each judgment's number once the store has acknowledged it.
JUDGING = """
import sys
from rlhf_kit.feedback import Answer, Item, Store
store, rater = Store(sys.argv[1]), sys.argv[2]
for i in range(int(sys.argv[3])):
    item = Item(f"{rater} {i} ?", ("yes", "no"))
    store.add([item])
    judgment = store.append(item, rater, "rank", Answer(ranks=(1, 2), note=str(i)), (1, 0), 0.1, "test", before=0)
    print(judgment, i, flush=True)
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


def judge(store: Store, rater: str = "ana", before: int | None = 0) -> int:
    return store.append(ITEM, rater, "rank", FIRST, (0, 1), 2.0, "test", before)


def test_a_judgment_comes_back_as_it_was_given_in_the_items_own_order(store: Store) -> None:
    answer = Answer(ranks=(1, 2), strength="much", note="Ünïcode")
    judgment = store.append(ITEM, "ana", "rank", answer, (1, 0), 2.5, "page, 1.0")
    [row] = store.judgments().to_dict("records")
    assert row["ranks"] == [2, 1]  # the second completion was shown first, and is the better one
    assert (row["shown"], row["strength"], row["note"], row["seconds"]) == ([1, 0], "much", "Ünïcode", 2.5)
    assert (row["prompt"], row["completions"], row["columns"]) == (ITEM.prompt, list(ITEM.completions), ITEM.columns)
    assert row["interface"] == "page, 1.0" and row["rater"] == "ana" and not row["withdrawn"]
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
    with pytest.raises(FeedbackError, match="a column holds PosixPath.*; a store keeps texts, numbers and lists"):
        store.add([Item("third ?", ("a", "b")), Item("fourth ?", ("a", "b"), {"where": Path("x")})])
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
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute("PRAGMA user_version = 1")
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE mine (x)")
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and long enough to be taken for a header of a database" * 20)
    says = {store.path: "its schema is 1", tmp_path / "other.db": "another program's database", text: "is not a store"}
    for path, said in says.items():
        before = path.read_bytes()
        with pytest.raises(FeedbackError, match=f"{path.name}: .*{said}.*; name another file"):
            Store(path)
        assert path.read_bytes() == before
    with pytest.raises(FeedbackError, match="make it first"):
        Store(tmp_path / "absent" / "j.db")


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
        ({"shown": (0, 0)}, "name each of 2 completions once"),
        ({"item": Item("unknown ?", ("a", "b"))}, "is not in .*; add it first"),
        ({"answer": Answer(ranks=(1, 2, 3))}, "2 numbers from 1 to 2"),
        ({"answer": Answer(ranks=(1, 3))}, "2 numbers from 1 to 2"),
        ({"answer": Answer(rating=1)}, "ranks None"),
    ],
)
def test_what_does_not_fit_is_refused(store: Store, change: dict[str, object], says: str) -> None:
    given = {"item": ITEM, "rater": "ana", "question": "rank", "answer": FIRST, "shown": (0, 1), "seconds": None}
    with pytest.raises(FeedbackError, match=says):
        store.append(**given | change, interface="test")  # type: ignore[arg-type]
    assert store.judgments().empty


@pytest.mark.slow
def test_two_processes_write_to_one_store_at_once_and_a_kill_loses_nothing_that_was_acknowledged(
    tmp_path: Path,
) -> None:
    path = tmp_path / "judgments.db"  # not there yet: both make it
    ana, ben = judging(path, "ana", 25), judging(path, "ben", 1_000_000)
    assert ana.stdout is not None and ben.stdout is not None
    said = {"ben": [ben.stdout.readline() for _ in range(20)], "ana": ana.communicate(timeout=180)[0].splitlines(True)}
    ben.send_signal(signal.SIGKILL)
    said["ben"] += ben.stdout.read().splitlines(keepends=True)
    assert (ben.wait(timeout=30), ana.returncode, len(said["ana"])) == (-signal.SIGKILL, 0, 25)
    store = Store(path)
    frame = store.judgments()
    assert list(frame["judgment"]) == list(range(1, len(frame) + 1))
    for rater, lines in said.items():
        own = frame[frame["rater"] == rater]
        kept = [f"{row.judgment} {row.note}\n" for row in own.itertuples()]
        acknowledged = [line for line in lines if line.endswith("\n")]
        assert kept[: len(acknowledged)] == acknowledged
        assert len(kept) - len(acknowledged) <= (rater == "ben")  # the last one may be kept and not printed yet
        assert all(row.prompt == f"{rater} {row.note} ?" for row in own.itertuples())
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    store.add([ITEM])
    judge(store)  # and it goes on
