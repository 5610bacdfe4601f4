"""rlhf_kit.data: what goes in comes out in TRL's columns, and what is wrong is named by file, row and column."""

import gzip
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from rlhf_kit import data
from rlhf_kit.data import DataError

PROMPT = "where is it ?"
PAIR = {"prompt": PROMPT, "chosen": " here .", "rejected": " there ."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CHAT = {"prompt": [user("a ?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}


def write(path: Path, content: str | bytes) -> Path:
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def says(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_format_gives_the_same_dataset(tmp_path: Path, name: str) -> None:
    # Texts that a reader may take for missing cells, numbers or dates; commas, quotes and line breaks in cells.
    texts = ["NA", "null", "nan", "007", "2020-01-01", 'a, b ?\nshe said "c"', "true"]
    rows = [{"prompt": text, "completion": f" {text}", "label": text != "NA", "note": ""} for text in texts]
    frame = pd.DataFrame(rows)
    if name.endswith("parquet"):
        frame.to_parquet(tmp_path / name)
    else:
        kinds = {"jsonl": lines(rows), "json": json.dumps(rows, indent=2), "csv": frame.to_csv(index=False)}
        write(tmp_path / name, kinds[name.split(".")[1]])
    dataset = data.load(tmp_path / name)
    assert dataset.to_list() == rows
    assert [dataset.features[column].dtype for column in rows[0]] == ["string", "string", "bool", "string"]
    data.check(dataset, ("prompt", "completion", "label"))


def test_numbers_keep_their_kind_and_a_column_that_begins_late_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a ?"}, {"prompt": "b ?", "id": 2**53 + 1, "margin": 0.5}, {"prompt": "c ?", "margin": 1}]
    dataset = data.load(write(tmp_path / "a.jsonl", lines(rows)))
    assert dataset["id"][:] == [None, 2**53 + 1, None] and dataset["margin"][:] == [None, 0.5, 1.0]
    assert [dataset.features[column].dtype for column in ("id", "margin")] == ["int64", "float64"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_chats_come_back_without_the_keys_of_other_messages(tmp_path: Path, suffix: str) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    rows = [{"prompt": [user("a ?")], "completion": [call]}]
    rows += [{"prompt": [{**user("b ?"), "name": "kim"}], "completion": [assistant("c")]}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        write(path, lines(rows))
    else:
        arrow = Dataset.from_list(rows)
        assert "name" in arrow[0]["prompt"][0]  # an Arrow struct has all keys in all messages
        arrow.to_parquet(path)
    dataset = data.load(path)
    assert dataset.to_list() == rows
    data.check(dataset, ("prompt", "completion"))
    dataset.to_parquet(tmp_path / "again.parquet")
    assert data.load(tmp_path / "again.parquet").to_list() == rows


def test_separators_byte_order_marks_windows_line_ends_and_blank_lines(tmp_path: Path) -> None:
    prompt = "one\u2028two\u2029three\x85four\x1cfive ?"
    rows = [json.dumps({"prompt": text}, ensure_ascii=False) for text in (prompt, "b")]
    jsonl = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n\r\n".join(rows))
    table = write(tmp_path / "a.csv", f"\ufeff\r\nprompt\r\n{prompt}\r\n\r\nb\r\n")
    assert data.load(jsonl)["prompt"][:] == data.load(table)["prompt"][:] == [prompt, "b"]


def test_a_file_is_read_from_the_disk_each_time(tmp_path: Path) -> None:
    for name, dump in (("a.jsonl", lambda p: lines([{"prompt": p}])), ("a.csv", lambda p: f"prompt\n{p}\n")):
        path = write(tmp_path / name, dump("old"))
        before = path.stat()
        assert data.load(path)["prompt"][:] == ["old"]
        write(path, dump("new"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert data.load(path)["prompt"][:] == ["new"]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("gone.csv.gz", None, ["no such file"]),
        ("empty.jsonl", b"\n\n", ["empty"]),
        ("notes.txt", b"prompt\n", ["no known kind", ".jsonl", ".csv"]),
        ("no.parquet", b"prompt,chosen\n", ["cannot be read", "arquet"]),
        ("cut.jsonl.gz", gzip.compress(lines([PAIR]).encode(), mtime=0)[:-9], ["cannot be read", "ended"]),
        ("latin.jsonl", '{"prompt": "a"}\n{"prompt": "caf\u00e9"}'.encode("latin-1"), ["row 2", "UTF-8"]),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', ["row 3", "JSON"]),
        ("broken.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', ["JSON", "line 2"]),
        ("list.jsonl", b'{"prompt": "a"}\n["b"]\n', ["row 2", "object"]),
        ("null.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', ["row 2", "'prompt'", "missing"]),
        ("mixed.jsonl", b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "x"}\n', ["row 2", "'id'", "str", "number"]),
        ("both.jsonl", lines([{"prompt": "a"}, {"prompt": [user("b")]}]).encode(), ["row 2", "wrong type", "list"]),
        ("big.jsonl", b'{"prompt": "a", "id": 123456789012345678901234567890}\n', ["cannot be stored"]),
        ("many.csv", b"prompt,completion\na,b\nc,d,e\n", ["row 3", "3 cells", "2 columns"]),
        ("few.csv", b'prompt,completion\n"a\nb",c\nd\n', ["row 4", "1 cells"]),
        ("quote.csv", b'prompt,completion\n\na,b\n"c,d\ne,f\n', ["row 4", "CSV"]),
        ("twice.csv", b"prompt,prompt\na,b\n", ["row 1", "same name"]),
        ("wrong.csv", b"question,answer\na,b\n", ["no column 'prompt'", "'answer'", "did you mean 'question'"]),
        ("pairs.jsonl", lines([{"chosen": "y", "rejected": "n"}] * 3).encode(), ["3 of 3 pairs", "first: row 1"]),
    ],
)
def test_what_is_wrong_is_named_by_row(tmp_path: Path, name: str, content: bytes | None, parts: list[str]) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        data.load(path)
    says(error, str(path), *parts)


def test_a_folder_a_split_of_a_file_and_a_hub_id_offline_end_in_one_sentence(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", lines([PAIR]))
    for source, split, parts in (
        (tmp_path, "train", ["no such file"]),
        (file, "test", ["split_by_prompt"]),
        ("nobody/nothing", "train", ["'nobody/nothing'", "HF_HUB_OFFLINE", "local file"]),
    ):
        with pytest.raises(DataError) as error:
            data.load(source, split)
        says(error, *parts)


HEAD = "\n\nHuman: is the tea warm?\n\nAssistant: It is hot.\n\nHuman: may I?\n\nAssistant:"
START = [user("a ?"), assistant("b"), user("c ?")]
PAIRS: list[tuple[Any, Any, str | None]] = [
    (HEAD + " Please do.", HEAD + " No.", None),
    (HEAD + " Please.", HEAD.replace("tea", "milk") + " No.", "prompts differ"),
    (HEAD + " Please.", HEAD + " ", "empty text"),
    (HEAD.replace(" may I?", "") + " a", HEAD.replace(" may I?", "") + " b", "empty text"),
    (HEAD + " Same.", HEAD + " Same.", "chosen equals rejected"),
    ("Please do.", "No.", "not a transcript"),
    (HEAD + " Please.\n\nHuman: thanks", HEAD + " No.", "not a transcript"),
    (HEAD + " Please.", None, "wrong type"),
    (HEAD + "\n\n Have some.\n", HEAD + " No.", None),
]
CHATS: list[tuple[Any, Any, str | None]] = [
    (START + [assistant("good")], START + [assistant("bad")], None),
    (START + [assistant("x"), user("d ?"), assistant("y")], START + [assistant("bad")], "another's turn"),
    (START + [assistant("same")], START + [assistant("same")], "chosen equals rejected"),
    ([user("other ?"), assistant("x")], START + [assistant("y")], "prompts differ"),
    (START, START + [assistant("x")], "prompts differ"),
    (START + [user("e ?")], START + [user("f ?")], "prompts differ"),
    (START + [assistant(" ")], START + [assistant("x")], "empty text"),
    ([], START, "empty text"),
    ([{"content": "no role"}], START, "wrong type"),
]


@pytest.mark.parametrize(("pairs", "prompt"), [(PAIRS, HEAD), (CHATS, START)], ids=["transcripts", "chats"])
def test_pairs_are_split_where_they_part_and_the_rest_is_counted(tmp_path: Path, pairs: list[Any], prompt: Any) -> None:
    rows = [{"chosen": chosen, "rejected": rejected, "rater": 7} for chosen, rejected, _ in pairs]
    path = write(tmp_path / "hh.jsonl.gz", lines(rows))
    kinds = [kind for *_, kind in pairs if kind]
    with pytest.warns(UserWarning, match=f"{len(kinds)} of {len(pairs)} pairs") as caught:
        dataset = data.load(path)
    for kind in set(kinds):
        first = [row for row, (*_, found) in enumerate(pairs, 1) if found == kind][0]
        assert f"{kinds.count(kind)} x {kind} (first: row {first})" in str(caught[0].message)
    assert caught[0].filename == __file__
    # Nothing is lost in the cut: prompt and answer are the conversation again.
    whole = [(row["prompt"] + row["chosen"], row["prompt"] + row["rejected"], None) for row in dataset]
    assert whole == [pair for pair in pairs if pair[2] is None]
    assert all(row["prompt"] == prompt and row["rater"] == 7 for row in dataset)
    data.check(dataset)


@pytest.mark.parametrize(
    ("sound", "change", "column", "kind"),
    [
        (PAIR, {"chosen": ""}, "chosen", "empty text"),
        (PAIR, {"chosen": PAIR["rejected"]}, "chosen", "chosen equals rejected"),
        (PAIR, {"chosen": PROMPT + " here ."}, "chosen", "prompt repeated"),
        (PAIR, {"prompt": PROMPT + " "}, "prompt", "prompt ends in a space"),
        (CHAT, {"prompt": []}, "prompt", "empty text"),
        (CHAT, {"prompt": [{"role": None, "content": "a"}]}, "prompt", "wrong type"),
        (CHAT, {"chosen": [user("a ?"), assistant("yes")]}, "chosen", "prompt repeated"),
        ({**PAIR, "prompt": "hi", "label": True}, {"label": None}, "label", "label not boolean"),
        ({**PAIR, "chosen": "history", "prompt": "hi", "margin": 1.0}, {"margin": math.nan}, "margin", "not a number"),
        (CHAT, {"chosen": [assistant("yes"), user("b ?")]}, "chosen", "another's turn"),
    ],
)
def test_check_names_row_and_column(sound: dict[str, Any], change: dict[str, Any], column: str, kind: str) -> None:
    dataset = Dataset.from_list([sound, sound, {**sound, **change}, {**sound, **change}])
    with pytest.raises(DataError) as error:
        data.check(dataset, list(sound), source="pairs.jsonl")
    says(error, "pairs.jsonl, row 2 (counting", f"column {column!r}", data.KINDS[kind], f"2 x {kind} (first: 2)")
    assert data.find_faults(dataset, list(sound)) == [data.Fault(row, column, kind) for row in (2, 3)]
    data.check(dataset.select([0, 1]), list(sound))


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**CHAT, "prompt": "a ?"}, "text and chat"),
        ({**PAIR, "prompt": CHAT["prompt"]}, "wrong type"),
        ({**PAIR, "chosen": 3, "rejected": 4}, "wrong type"),
        ({**CHAT, **dict.fromkeys(("chosen", "rejected"), [{"role": "gpt", "content": "a"}])}, "unknown role"),
    ],
)
def test_text_is_no_chat_and_a_number_is_neither(row: dict[str, Any], kind: str) -> None:
    faults = [data.Fault(0, "chosen", kind), data.Fault(0, "rejected", kind)]
    assert data.find_faults(Dataset.from_list([row])) == faults


def test_a_missing_column_and_an_empty_dataset_are_refused() -> None:
    with pytest.raises(DataError) as error:
        data.check(Dataset.from_list([{"prompt": "a ?", "choosen": " b", "rejected": " c"}]), source="mine")
    says(error, "mine: no column 'chosen'", "'prompt', 'choosen', 'rejected'", "did you mean 'choosen'")
    with pytest.raises(DataError, match="mine: empty"):
        data.require(Dataset.from_dict({"prompt": []}), ["prompt"], "mine")


@pytest.mark.parametrize("chat", [False, True])
def test_split_is_disjoint_whole_and_independent_of_order(chat: bool) -> None:
    rng = random.Random(1)
    names = [f"question {rng.randrange(80)} ?" for _ in range(300)]
    rows = [{"prompt": [user(name)] if chat else name, "row": i} for i, name in enumerate(names)]
    for seed in (0, 1):
        train, test = data.split_by_prompt(Dataset.from_list(rows), 0.2, seed)
        assert not {str(prompt) for prompt in train["prompt"]} & {str(prompt) for prompt in test["prompt"]}
        assert sorted([*train["row"], *test["row"]]) == list(range(len(rows)))
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert set(data.split_by_prompt(Dataset.from_list(shuffled), 0.2, seed)[1]["row"]) == set(test["row"])
        # The side of a prompt does not depend on the other rows either, nor on the keys that they bring to a struct.
        half = [*rows[:150], {"prompt": [{**user("x ?"), "name": "kim"}] if chat else "x ?", "row": 0}]
        halved = data.split_by_prompt(Dataset.from_list(half).select(range(150)), 0.2, seed)[1]
        assert set(halved["row"]) == {row for row in test["row"] if row < 150}


def test_split_shares_follow_the_fraction_and_no_side_may_be_empty() -> None:
    dataset = Dataset.from_dict({"prompt": [f"{i} ?" for i in range(1000)]})
    tests = [data.split_by_prompt(dataset, 0.3, seed)[1] for seed in (0, 1)]
    assert abs(len(tests[0]) / len(dataset) - 0.3) < 4 * (0.3 * 0.7 / len(dataset)) ** 0.5
    assert set(tests[0]["prompt"]) != set(tests[1]["prompt"])
    for rows, fraction in ((["same ?"] * 20, 0.5), ([f"{i} ?" for i in range(20)], 1.0)):
        with pytest.raises(DataError, match="leave one side without"):
            data.split_by_prompt(Dataset.from_dict({"prompt": rows}), fraction)
