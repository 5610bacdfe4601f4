"""Judgments through files: what goes out comes back exactly, and a wrong file changes nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from rlhf_kit import data, feedback
from rlhf_kit.feedback import COLUMNS, Answer, FeedbackError, Item, Store

ODD = [
    *("plain", " leading and trailing ", "", "two\nlines", "windows\r\nlines", "old\rmac", "tab\tand\vmore"),
    *('"quoted"', 'half "', "comma, semicolon; pipe|", "'", "\\n not a newline", "NaN", "null", "None", "0", "[1, 2]"),
    *('[{"role": "user", "content": "text, no chat"}]', "\u4e2d\u6587 \u0627\u0644", "\U0001f600\u200d\u2764\ufe0f"),
    *("\u2028\u2029\x85", "\ufeffbom", "=1+1", "\x01\x1f control", "e\u0301 is not \u00e9", "long " * 40_000),
]
SAME = [name for name in COLUMNS if name != "judgment"]


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def odd_store(path: Path, seed: int) -> Store:
    """Every question, skips, ties, strengths, notes, withdrawals and unknown orders over odd texts."""
    rng, store = np.random.default_rng(seed), Store(path)

    def text() -> str:
        return str(rng.choice(ODD))

    for k in range(40):
        n = int(rng.integers(1, 5))
        as_chat = bool(rng.random() < 0.4)
        texts = [f"{text()}{i}" for i in range(n)]
        completions = tuple(chat(each) if as_chat else each for each in texts)
        item = Item(chat(text()) if as_chat else f"{text()}{k}", completions, {"kind": text(), "depth": [k, None, 0.1]})
        question = "rank" if n > 1 else str(rng.choice(["good/bad", "1-7"]))
        shown = tuple(int(i) for i in rng.permutation(n))
        ranks = tuple(int(i) for i in rng.integers(1, n + 1, size=n))
        answer = Answer(ranks=ranks) if n > 1 else Answer(rating=int(rng.integers(0, 2)) or 1)
        if n == 2:
            answer = Answer(ranks=(2, 1), strength=str(rng.choice(["slightly", "much"])), note=text())
        if rng.random() < 0.2:
            answer = Answer(note=text())
        store.add([item])
        rater = f"r{rng.integers(3)} {text()[:20]}"
        seconds = None if rng.random() < 0.3 else float(rng.random() * 10)
        number = store.append(item, rater, question, answer, shown, seconds, f"test {text()[:9]}")  # type: ignore[arg-type]
        if rng.random() < 0.2:
            store.withdraw(number, rater)
    return store


def rows(store: Store) -> list[dict]:
    return (
        store.judgments(withdrawn=True)[SAME].astype(object).where(lambda frame: frame.notna(), None).to_dict("records")
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_round_trip_keeps_every_column_of_every_judgment(tmp_path: Path, suffix: str, seed: int) -> None:
    store = odd_store(tmp_path / "one.sqlite", seed)
    path = feedback.export(store, tmp_path / f"out{suffix}")
    other = Store(tmp_path / "other.sqlite")
    assert feedback.load(path, other) == 40
    assert rows(other) == rows(store)
    again = feedback.export(other, tmp_path / f"again{suffix}")
    assert again.read_bytes() == path.read_bytes()


def test_a_frame_that_was_never_in_a_store_goes_through_a_file_too(tmp_path: Path) -> None:
    class First:
        name = "first"

        def __call__(self, prompt: object, completions: object, question: object) -> Answer:
            return Answer(ranks=(1, 2))

    frame = feedback.ask([Item("q", ("a", "b"), {"n": np.int64(3), "gap": None}), Item("r", ("a", "b"))], First())
    store = Store(tmp_path / "store.sqlite")
    feedback.load(feedback.export(frame, tmp_path / "out.jsonl"), store)
    kept = store.judgments()
    assert kept[SAME].drop(columns="seconds").equals(frame[SAME].drop(columns="seconds"))
    assert np.allclose(kept["seconds"], frame["seconds"])


def test_a_column_of_an_item_that_is_not_a_number_is_no_other_column(tmp_path: Path) -> None:
    store = Store(tmp_path / "one.sqlite")
    item = Item("q", ("a", "b"), {"gap": float("nan")})
    store.add([item])
    for rater in ("ana", "ben"):
        store.append(item, rater, "rank", Answer(ranks=(1, 2)), (0, 1), 1.0, "test")
    other = Store(tmp_path / "other.sqlite")
    assert feedback.load(feedback.export(store, tmp_path / "out.csv"), other) == 2
    assert np.isnan(other.items()[0].columns["gap"])


def one(tmp: Path) -> Store:
    store = Store(tmp / "one.sqlite")
    items = [Item("q one", ("a", "b", "c")), Item("q two", ("a",))]
    store.add(items)
    store.append(items[0], "ana", "rank", Answer(ranks=(1, 2, 2)), (2, 0, 1), 1.5, "test")
    store.append(items[1], "ana", "1-7", Answer(rating=5), (0,), 1.5, "test")
    return store


FAULTS = {
    "ranks ": ([1, 1.5, 2], ["row 1", "'ranks'", "whole"]),
    "ranks": ([1, 9, 1], ["row 1", "'ranks'", "from 1 to 3"]),
    "shown": ([0, 0, 1], ["row 1", "'shown'", "once"]),
    "completions": (["a", "a", "c"], ["row 1", "'completions'", "equal"]),
    "prompt": ("q edited", ["row 1", "'item'", "does not name"]),
    "question": ("which", ["row 1", "'question'", "rank, good/bad"]),
    "rater": (" ", ["row 1", "'rater'"]),
    "time": (None, ["row 1", "'time'"]),
    "seconds": ("soon", ["row 1", "'seconds'", "soon"]),
    "withdrawn": ("perhaps", ["row 1", "'withdrawn'", "perhaps"]),
    "strength": ("very", ["row 1", "'ranks'", "slightly"]),
    "columns": ([1], ["row 1", "'columns'"]),
}


@pytest.mark.parametrize("column", FAULTS)
@pytest.mark.parametrize("place", [0, 1])
def test_a_wrong_row_is_named_and_nothing_is_imported(tmp_path: Path, column: str, place: int) -> None:
    path = feedback.export(one(tmp_path), tmp_path / "out.jsonl")
    good = [json.loads(line) for line in path.read_text().splitlines()]
    value, words = FAULTS[column]
    bad = [{**good[0], column.strip(): value}, good[1]]
    bad = bad if place == 0 else [good[1], {**good[0], column.strip(): value}]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    other = Store(tmp_path / "other.sqlite")
    with pytest.raises(FeedbackError) as error:
        feedback.load(tmp_path / "bad.jsonl", other)
    message = str(error.value)
    assert all(word.replace("row 1", f"row {place + 1}") in message for word in words), message
    assert "nothing was imported" in message and "\n" not in message
    assert len(other.judgments()) == 0 and other.items() == []


def test_a_missing_column_and_a_broken_cell_of_a_csv_are_named(tmp_path: Path) -> None:
    path = feedback.export(one(tmp_path), tmp_path / "out.csv")
    with path.open(newline="") as file:
        header, *cells = list(csv.reader(file))
    other = Store(tmp_path / "other.sqlite")
    cells[1][header.index("completions")] = "['a']"
    with (tmp_path / "bad.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *cells])
    with pytest.raises(FeedbackError, match=r"row 3, column 'completions'"):
        feedback.load(tmp_path / "bad.csv", other)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False).drop(columns="note")
    frame.to_csv(tmp_path / "short.csv", index=False)
    with pytest.raises(FeedbackError, match=r"row 2, column 'note': is missing"):
        feedback.load(tmp_path / "short.csv", other)
    assert other.items() == []


def test_what_is_there_already_is_not_imported_twice(tmp_path: Path) -> None:
    store = one(tmp_path)
    path = feedback.export(store, tmp_path / "out.jsonl")
    before = rows(store)
    with pytest.raises(FeedbackError, match=r"row 1: this judgment is in .* already"):
        feedback.load(path, store)
    assert rows(store) == before


def test_an_item_known_with_other_columns_is_not_mixed_up(tmp_path: Path) -> None:
    path = feedback.export(one(tmp_path), tmp_path / "out.jsonl")
    other = Store(tmp_path / "other.sqlite")
    other.add([Item("q two", ("a",), {"kind": "ask"})])
    with pytest.raises(FeedbackError, match=r"row 2, column 'columns'"):
        feedback.load(path, other)
    assert len(other.judgments()) == 0 and len(other.items()) == 1


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_an_existing_file_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FeedbackError, match="is there already"):
        feedback.export(one(tmp_path), tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_a_suffix_that_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="of no known kind; name a .jsonl, .csv file"):
        feedback.export(one(tmp_path), tmp_path / "out.xlsx")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_trl_columns_come_back_as_the_same_pairs_by_the_same_rater(tmp_path: Path, suffix: str) -> None:
    store = Store(tmp_path / "one.sqlite")
    for k in range(4):
        item = Item(f"q {k}\n", (f"a {k}", f"b, {k}"), {"kind": "ask"})
        store.add([item])
        store.append(item, "ana", "rank", Answer(ranks=(1, 2)), (0, 1) if k % 2 else (1, 0), 1.0, "test")
    path = feedback.export(store, tmp_path / f"out{suffix}", columns="trl")
    pairs = feedback.preferences(store.judgments())
    assert data.load(path).to_list() == pairs.to_list()
    other = Store(tmp_path / "other.sqlite")
    assert feedback.load(path, other, rater="ana") == 4
    assert feedback.preferences(other.judgments()).to_list() == pairs.to_list()  # which was shown first, too


def test_ratings_in_trl_columns_are_labels(tmp_path: Path) -> None:
    store = Store(tmp_path / "one.sqlite")
    item = Item("q", ("a",))
    store.add([item])
    store.append(item, "ana", "good/bad", Answer(rating=1), (0,), 1.0, "test")
    path = feedback.export(store, tmp_path / "out.jsonl", columns="trl")
    assert data.load(path).to_list() == [{"prompt": "q", "completion": "a", "label": True}]
    mixed = Store(tmp_path / "two.sqlite")
    pair = Item("q", ("a", "b"))
    mixed.add([item, pair])
    mixed.append(item, "ana", "good/bad", Answer(rating=1), (0,), 1.0, "test")
    mixed.append(pair, "ana", "rank", Answer(ranks=(1, 2)), (0, 1), 1.0, "test")
    with pytest.raises(FeedbackError, match="one question at a time"):
        feedback.export(mixed, tmp_path / "mixed.jsonl", columns="trl")


def test_two_raters_of_the_same_pair_are_compared_whichever_each_chose(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "b", "rejected": "a", "rater": "ana", "shown_first": "chosen"}]
    rows += [{"prompt": "q", "chosen": "a", "rejected": "b", "rater": "ben", "shown_first": "chosen"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = Store(tmp_path / "one.sqlite")
    feedback.load(tmp_path / "pairs.jsonl", store)
    kept = store.judgments()
    assert kept["item"].nunique() == 1 and kept["completions"].tolist() == [["a", "b"]] * 2
    assert kept["ranks"].tolist() == [[2, 1], [1, 2]] and kept["shown"].tolist() == [[1, 0], [0, 1]]


def test_preferences_of_others_need_a_rater_and_pairs_that_differ(tmp_path: Path) -> None:
    Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 1).to_json(tmp_path / "pairs.jsonl")
    store = Store(tmp_path / "one.sqlite")
    with pytest.raises(FeedbackError, match=r"pair 1, column 'rater'.*rater='ana'"):
        feedback.load(tmp_path / "pairs.jsonl", store)
    assert feedback.load(tmp_path / "pairs.jsonl", store, rater="ana") == 1
    kept = store.judgments().iloc[0]
    assert (kept["ranks"], kept["shown"], kept["rater"], kept["completions"]) == ([1, 2], [], "ana", ["a", "b"])
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "a"}]
    (tmp_path / "equal.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FeedbackError, match=r"pair 2, column 'chosen'.*equal"):
        feedback.load(tmp_path / "equal.jsonl", store, rater="ana")
    assert len(store.judgments()) == 1 and len(store.items()) == 1
