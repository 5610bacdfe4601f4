"""rlhf_kit.data: what goes in comes out in TRL's columns, and what is wrong is named by file, row and column."""

import csv
import gzip
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_kit import data
from rlhf_kit.data import DataError

PAIRS = [
    {"prompt": "where does the owl live ?", "chosen": " in the barn .", "rejected": " no .", "topic": "owl"},
    {"prompt": "what does the owl eat ?", "chosen": " it eats mice .", "rejected": " stones .", "topic": "owl"},
    {"prompt": "when does the owl sleep ?", "chosen": " by day .", "rejected": " at night .", "topic": "owl"},
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def says(error: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    message = str(error.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


# --- formats that load -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    frame = pd.DataFrame(PAIRS)
    if ".jsonl" in name:
        write_jsonl(path, PAIRS)
    elif ".json" in name:
        text = json.dumps(PAIRS, indent=2).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    elif ".csv" in name:
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    dataset = data.load(path)
    assert dataset.to_list() == PAIRS
    assert dataset.column_names == ["prompt", "chosen", "rejected", "topic"]
    data.check(dataset)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a ?"}, {"prompt": "b ?"}],
        [{"prompt": "a ?", "completion": " b"}, {"prompt": "c ?", "completion": " d"}],
        [{"prompt": "a ?", "completion": " b", "label": True}, {"prompt": "c ?", "completion": " d", "label": False}],
        [{"prompt": [user("a ?")], "chosen": [assistant("b")], "rejected": [assistant("c")]}],
        [{"prompt": [user("a ?")], "completion": [assistant("b")]}],
    ],
)
def test_trl_columns_pass_through_unchanged_and_pass_the_check(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    dataset = data.load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert dataset.to_list() == rows
    data.check(dataset, columns=list(rows[0]))


def test_unicode_line_separators_inside_a_string_do_not_end_the_row(tmp_path: Path) -> None:
    prompt = "one\u2028two\u2029three\x85four\x1cfive ?"
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": prompt}, {"prompt": "next ?"}])
    assert data.load(path)["prompt"][:] == [prompt, "next ?"]


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "a ?"}\r\n\r\n{"prompt": "b ?"}')
    table = write(tmp_path / "a.csv", b"\xef\xbb\xbfprompt\r\na ?\r\n\r\nb ?\r\n")
    assert data.load(jsonl)["prompt"][:] == data.load(table)["prompt"][:] == ["a ?", "b ?"]


def test_a_column_that_begins_late_is_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a ?"}, {"prompt": "b ?", "source": "book"}])
    assert data.load(path)["source"][:] == [None, "book"]


def test_csv_keeps_commas_quotes_and_line_breaks_and_reads_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    rows = [("a, b ?", ' she said "c"\nand left', "True"), ("d ?", " e", "0")]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion", "label"), *rows])
    dataset = data.load(path)
    assert dataset.to_list() == [
        {"prompt": "a, b ?", "completion": ' she said "c"\nand left', "label": True},
        {"prompt": "d ?", "completion": " e", "label": False},
    ]
    data.check(dataset, columns=("prompt", "completion", "label"))


# --- files that do not load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.csv.gz", "./gone", "/gone/too", "gone/is/it"])
def test_no_such_file(name: str) -> None:
    with pytest.raises(DataError) as error:
        data.load(name)
    says(error, "no such file", name.removeprefix("./"))


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("empty.jsonl", b"", ["empty"]),
        ("empty.csv", b"", ["empty"]),
        ("empty.json", b"[]", ["empty"]),
        ("header-only.csv", b"prompt,chosen,rejected\n", ["empty"]),
        ("blank.jsonl", b"\n\n", ["empty"]),
        ("no-gzip.jsonl.gz", b'{"prompt": "a"}\n', ["cannot be read", "gzip"]),
        ("no.parquet", b"prompt,chosen\n", ["cannot be read", "arquet"]),
        ("notes.txt", b"prompt\n", [".jsonl", ".csv"]),
        ("latin.jsonl", '{"prompt": "a"}\n{"prompt": "caf\u00e9"}\n'.encode("latin-1"), ["row 2", "byte 16", "UTF-8"]),
        ("latin.csv", "prompt\na\nb\ncaf\u00e9\n".encode("latin-1"), ["row 4", "byte 4", "UTF-8"]),
        ("utf16.csv", "prompt\na\n".encode("utf-16"), ["row 1", "UTF-8"]),
        ("broken.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"\n', ["row 3", "JSON"]),
        ("cut.jsonl", b'{"prompt": "a"}\n{"prompt": "b', ["row 2", "JSON"]),
        ("broken.json", b'[{"prompt": "a"},\n{"prompt" "b"}]', ["JSON", "line 2"]),
        ("list.jsonl", b'{"prompt": "a"}\n["b"]\n', ["row 2", "object"]),
        ("list.json", b'[{"prompt": "a"}, "b"]', ["row 1 (counting from 0)", "object"]),
        ("number.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', ["row 2", "'prompt'", "wrong type", "number"]),
        ("null.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', ["row 2", "'prompt'", "missing"]),
        ("lacks.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', ["row 2", "'completion'", "missing"]),
        ("mixed.jsonl", b'{"prompt": "a", "id": 1}\n{"prompt": "b", "id": "x"}\n', ["row 2", "'id'", "str", "number"]),
        ("surrogate.jsonl", b'{"prompt": "\\ud800"}\n', ["surrogate"]),
        ("cells.csv", b"prompt,completion\na,b\nc,d,e\n", ["row 3", "3 cells", "2 columns"]),
        ("span.csv", b'prompt,completion\n"a\nb",c\nd\n', ["row 4", "1 cells"]),
        ("quote.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', ["row 3", "CSV"]),
        ("twice.csv", b"prompt,prompt\na,b\n", ["row 1", "same name"]),
        ("headless.csv", b"is this a question ?,yes\nand this ?,no\n", ["no column 'prompt'", "first line"]),
        ("wrong.csv", b"question,answer\na,b\n", ["no column 'prompt'", "'question'", "'answer'", "did you mean"]),
        ("typo.jsonl", b'{"promt": "a", "id": 1}\n', ["no column 'prompt'", "did you mean 'promt'"]),
    ],
)
def test_broken_files_are_named_with_the_row(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        data.load(path)
    says(error, str(path), *parts)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_half_a_gzip(tmp_path: Path, keep: float) -> None:
    rng = random.Random(0)
    whole = gzip.compress("".join(json.dumps({"prompt": str(rng.random())}) + "\n" for _ in range(5000)).encode())
    path = write(tmp_path / "half.jsonl.gz", whole[: int(keep * len(whole))])
    with pytest.raises(DataError) as error:
        data.load(path)
    says(error, str(path), "gzip", "cut off")


def test_a_damaged_gzip(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(json.dumps({"prompt": "a" * 1000}).encode()))
    whole[12:16] = b"\xff\xff\xff\xff"
    with pytest.raises(DataError, match="damaged"):
        data.load(write(tmp_path / "a.jsonl.gz", bytes(whole)))


def test_a_folder_and_a_split_of_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder"):
        data.load(tmp_path)
    path = write_jsonl(tmp_path / "a.jsonl", PAIRS)
    with pytest.raises(DataError, match="split_by_prompt"):
        data.load(path, split="test")


@pytest.mark.slow
def test_hub_id_offline_ends_in_one_sentence() -> None:
    code = "from rlhf_kit import data\ntry: data.load('nobody/nothing')\nexcept data.DataError as e: print(e)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout.count("\n") == 1
    assert "'nobody/nothing'" in done.stdout and "HF_HUB_OFFLINE" in done.stdout and "local file" in done.stdout


def test_hub_errors_become_one_sentence_and_hub_rows_are_normalised(monkeypatch: pytest.MonkeyPatch) -> None:
    def hub(name: str, split: str, **options: str) -> Dataset:
        if split != "train":
            raise ValueError(f'Unknown split "{split}".\nShould be one of ["train"].')
        assert options == {"data_dir": "small"}
        return Dataset.from_list(
            [{"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"}]
        )

    monkeypatch.setattr(data.datasets, "load_dataset", hub)
    monkeypatch.setattr(data.datasets.config, "HF_HUB_OFFLINE", False)
    dataset = data.load("some/pairs", data_dir="small")
    assert dataset.to_list() == [{"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " yes", "rejected": " no"}]
    with pytest.raises(DataError) as error:
        data.load("some/pairs", split="validation")
    says(error, "some/pairs", "validation", "Unknown split")


# --- pairs without a prompt ------------------------------------------------------------------------------------------

HEAD = "\n\nHuman: is the tea warm?\n\nAssistant: It is hot.\n\nHuman: may I?\n\nAssistant:"
HH: list[tuple[dict[str, Any], str | None]] = [
    ({"chosen": HEAD + " Please do.", "rejected": HEAD + " No."}, None),
    ({"chosen": HEAD + " Please.", "rejected": HEAD.replace("tea", "milk") + " No."}, "prompts differ"),
    ({"chosen": HEAD + " Please.", "rejected": HEAD + " "}, "empty text"),
    ({"chosen": HEAD.replace(" may I?", "") + " a", "rejected": HEAD.replace(" may I?", "") + " b"}, "empty text"),
    ({"chosen": HEAD + " Same.", "rejected": HEAD + " Same."}, "chosen equals rejected"),
    ({"chosen": "Please do.", "rejected": "No."}, "not a transcript"),
    ({"chosen": HEAD + " Please.\n\nHuman: thanks", "rejected": HEAD + " No."}, "not a transcript"),
    ({"chosen": HEAD + " Please.", "rejected": None}, "wrong type"),
    ({"chosen": HEAD + "\n\n Have some.\n", "rejected": HEAD + " No.", "rater": 7}, None),
]


def test_transcripts_are_split_at_the_last_assistant_turn_and_faults_are_named() -> None:
    rows, faults = data.extract_prompts([row for row, _ in HH])
    assert rows == [
        {"prompt": HEAD, "chosen": " Please do.", "rejected": " No."},
        {"prompt": HEAD, "chosen": "\n\n Have some.\n", "rejected": " No.", "rater": 7},
    ]
    assert [(fault.row, fault.kind) for fault in faults] == [(i, kind) for i, (_, kind) in enumerate(HH) if kind]
    # Nothing is lost in the cut: prompt and answer are the transcript again.
    kept = [row for row, kind in HH if kind is None]
    assert [row["prompt"] + row["chosen"] for row in rows] == [row["chosen"] for row in kept]


def test_pairs_set_aside_are_counted_with_their_first_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "hh.jsonl.gz", [row for row, _ in HH])
    with pytest.warns(UserWarning, match="7 of 9 pairs") as caught:
        dataset = data.load(path)
    message = str(caught[0].message)
    assert "2 x empty text (first: row 3)" in message and "1 x prompts differ (first: row 2)" in message
    assert caught[0].filename == __file__
    assert len(dataset) == 2 and dataset["rater"][:] == [None, 7]
    data.check(dataset)
    with pytest.raises(DataError, match="7 of 9 pairs"):
        data.load(path, strict=True)


def test_sound_pairs_load_without_a_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.load(write_jsonl(tmp_path / "hh.jsonl", [HH[0][0]]), strict=True)) == 1


def test_no_usable_pair_is_an_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"chosen": "yes", "rejected": "no"}] * 3)
    with pytest.raises(DataError) as error:
        data.load(path)
    says(error, str(path), "3 of 3 pairs", "not a transcript", "first: row 1")


def test_whole_chats_are_split_after_the_messages_they_share() -> None:
    start = [user("a ?"), assistant("b"), user("c ?")]
    pairs = [
        (start + [assistant("good")], start + [assistant("bad")], None),
        (start + [assistant("x"), user("d ?"), assistant("y")], start + [assistant("bad")], None),
        (start + [assistant("same")], start + [assistant("same")], "chosen equals rejected"),
        ([user("other ?"), assistant("x")], start + [assistant("y")], "prompts differ"),
        (start, start + [assistant("x")], "prompts differ"),
        (start + [user("e ?")], start + [user("f ?")], "prompts differ"),
        (start + [assistant(" ")], start + [assistant("x")], "empty text"),
        ([], start, "empty text"),
        ([{"content": "no role"}], start, "wrong type"),
    ]
    rows, faults = data.extract_prompts([{"chosen": chosen, "rejected": rejected} for chosen, rejected, _ in pairs])
    assert rows[0] == {"prompt": start, "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    assert rows[1]["prompt"] == start and len(rows[1]["chosen"]) == 3
    assert [(fault.row, fault.kind) for fault in faults] == [(i, kind) for i, (*_, kind) in enumerate(pairs) if kind]


# --- check -----------------------------------------------------------------------------------------------------------

PROMPT = "where is it ?"


@pytest.mark.parametrize(
    ("row", "column", "kind"),
    [
        ({"chosen": ""}, "chosen", "empty text"),
        ({"prompt": None}, "prompt", "empty text"),
        ({"rejected": " \n"}, "rejected", "empty text"),
        ({"chosen": " here .", "rejected": " here ."}, "chosen", "chosen equals rejected"),
        ({"chosen": PROMPT + " here ."}, "chosen", "prompt repeated"),
        ({"rejected": PROMPT}, "rejected", "prompt repeated"),
        ({"prompt": PROMPT + " "}, "prompt", "prompt ends in a space"),
    ],
)
def test_check_names_source_row_and_column_of_a_text_fault(row: dict[str, Any], column: str, kind: str) -> None:
    sound = {"prompt": PROMPT, "chosen": " here .", "rejected": " there ."}
    dataset = Dataset.from_list([sound, sound, {**sound, **row}])
    with pytest.raises(DataError) as error:
        data.check(dataset, source="pairs.jsonl")
    says(error, "pairs.jsonl, row 2 (counting from 0)", f"column {column!r}", kind, data.KINDS[kind])
    assert data.find_faults(dataset) == [data.Fault(2, column, kind)]
    data.check(dataset.select([0, 1]))


@pytest.mark.parametrize(
    ("row", "column", "kind"),
    [
        ({"prompt": []}, "prompt", "empty text"),
        ({"prompt": [user(" ")]}, "prompt", "empty text"),
        ({"prompt": [{"role": None, "content": "a"}]}, "prompt", "wrong type"),
        ({"chosen": [assistant("no")]}, "chosen", "chosen equals rejected"),
        ({"chosen": [user("a ?"), assistant("yes")]}, "chosen", "prompt repeated"),
    ],
)
def test_check_names_the_fault_of_a_chat(row: dict[str, Any], column: str, kind: str) -> None:
    sound = {"prompt": [user("a ?")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    assert data.find_faults(Dataset.from_list([sound, {**sound, **row}])) == [data.Fault(1, column, kind)]


def test_check_counts_all_faults_by_kind() -> None:
    rows = [{"prompt": f"{i} ?", "completion": " yes" if i % 2 else ""} for i in range(10)]
    rows[7]["prompt"] = "7 ? "
    with pytest.raises(DataError) as error:
        data.check(Dataset.from_list(rows), columns=("prompt", "completion"))
    says(error, "row 0", "5 x empty text (first: 0)", "1 x prompt ends in a space (first: 7)")


def test_check_tells_text_from_chat_from_anything_else() -> None:
    mixed = Dataset.from_list([{"prompt": "a ?", "chosen": [assistant("b")], "rejected": [assistant("c")]}])
    assert [(fault.column, fault.kind) for fault in data.find_faults(mixed)] == [
        ("chosen", "wrong type"),
        ("rejected", "wrong type"),
    ]
    numbers = Dataset.from_list([{"prompt": 3, "completion": " b"}])
    assert data.find_faults(numbers, ("prompt", "completion"))[0] == data.Fault(0, "prompt", "wrong type")


def test_a_word_that_begins_like_the_prompt_is_not_the_prompt_repeated() -> None:
    data.check(Dataset.from_list([{"prompt": "hi", "completion": "history"}]), columns=("prompt", "completion"))


def test_a_tool_call_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}
    dataset = Dataset.from_list([{"prompt": [user("what time is it ?")], "completion": [call]}])
    data.check(dataset, columns=("prompt", "completion"))


def test_labels_are_booleans_and_other_columns_have_values() -> None:
    columns = ("prompt", "completion", "label", "margin")
    rows = [{"prompt": "a ?", "completion": " b", "label": 1, "margin": None}]
    assert [(f.column, f.kind) for f in data.find_faults(Dataset.from_list(rows), columns)] == [
        ("label", "label not boolean"),
        ("margin", "missing"),
    ]


def test_missing_column_names_the_columns_and_a_guess() -> None:
    dataset = Dataset.from_list([{"prompt": "a ?", "choosen": " b", "rejected": " c"}])
    with pytest.raises(DataError) as error:
        data.check(dataset, source="mine")
    says(error, "mine: no column 'chosen'", "'prompt', 'choosen', 'rejected'", "did you mean 'choosen'")


def test_empty_dataset() -> None:
    with pytest.raises(DataError, match="mine: empty"):
        data.check(Dataset.from_dict({"prompt": []}), columns=["prompt"], source="mine")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "<user>", "<assistant>", "word"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>")
    made.chat_template = (
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% if m.role == 'assistant' %}<eos> {% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made


def test_too_long_counts_prompt_completion_and_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "w w w", "chosen": " w" * n, "rejected": " x"} for n in (5, 6, 7)]
    dataset = Dataset.from_list(rows)
    data.check(dataset, tokenizer=tokenizer, max_length=3 + 7 + 1)
    faults = data.find_faults(dataset, tokenizer=tokenizer, max_length=9)
    assert [(fault.row, fault.column, fault.kind) for fault in faults] == [
        (1, "chosen", "too long"),
        (2, "chosen", "too long"),
    ]
    with pytest.raises(DataError) as error:
        data.check(dataset, tokenizer=tokenizer, max_length=9)
    says(error, "row 1", "10 tokens", "max_length is 9", "2 x too long")
    # A prompt alone gets no EOS.
    assert not data.find_faults(dataset, columns=["prompt"], tokenizer=tokenizer, max_length=3)
    assert len(data.find_faults(dataset, columns=["prompt"], tokenizer=tokenizer, max_length=2)) == 3


def test_too_long_renders_chats_with_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = Dataset.from_list([{"prompt": [user("w w w")], "completion": [assistant("w w")]}])
    columns = ("prompt", "completion")
    length = len(["<user>", "w", "w", "w", "<assistant>", "w", "w", "<eos>"])
    data.check(dataset, columns, tokenizer=tokenizer, max_length=length)
    (fault,) = data.find_faults(dataset, columns, tokenizer=tokenizer, max_length=length - 1)
    assert f"{length} tokens" in fault.detail
    assert not data.find_faults(dataset, ["prompt"], tokenizer=tokenizer, max_length=5)
    assert data.find_faults(dataset, ["prompt"], tokenizer=tokenizer, max_length=4)


def test_max_length_needs_a_tokenizer() -> None:
    with pytest.raises(DataError, match="tokenizer="):
        data.check(Dataset.from_list(PAIRS), max_length=10)


# --- split_by_prompt -------------------------------------------------------------------------------------------------


def rows_with_repeated_prompts(chat: bool) -> list[dict[str, Any]]:
    rng = random.Random(1)
    names = [f"question {rng.randrange(150)} ?" for _ in range(600)]
    return [{"prompt": [user(name)] if chat else name, "row": i} for i, name in enumerate(names)]


def keys(dataset: Dataset) -> set[str]:
    return {json.dumps(prompt) for prompt in dataset["prompt"]}


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_is_disjoint_whole_and_independent_of_order(chat: bool, seed: int) -> None:
    rows = rows_with_repeated_prompts(chat)
    train, test = data.split_by_prompt(Dataset.from_list(rows), 0.2, seed)
    assert not keys(train) & keys(test)
    assert sorted([*train["row"], *test["row"]]) == list(range(len(rows)))
    shuffled = random.Random(seed).sample(rows, len(rows))
    assert set(data.split_by_prompt(Dataset.from_list(shuffled), 0.2, seed)[1]["row"]) == set(test["row"])
    # The side of a prompt does not depend on the other rows either.
    half = Dataset.from_list(rows[:300])
    assert set(data.split_by_prompt(half, 0.2, seed)[1]["row"]) == {row for row in test["row"] if row < 300}


def test_split_shares_follow_the_fraction_and_seeds_differ() -> None:
    dataset = Dataset.from_dict({"prompt": [f"{i} ?" for i in range(4000)]})
    for fraction in (0.05, 0.3):
        share = len(data.split_by_prompt(dataset, fraction)[1]) / len(dataset)
        assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / len(dataset)) ** 0.5
    assert keys(data.split_by_prompt(dataset, 0.1, seed=0)[1]) != keys(data.split_by_prompt(dataset, 0.1, seed=1)[1])


def test_a_chat_stays_on_its_side_when_another_row_brings_a_new_key() -> None:
    plain = [{"prompt": [user(f"{i} ?")]} for i in range(50)]
    named = {"prompt": [{**user("x ?"), "name": "kim"}]}
    _, test = data.split_by_prompt(Dataset.from_list(plain), 0.3)
    both = Dataset.from_list([*plain, named])
    assert "name" in both[0]["prompt"][0]  # as Arrow stores it
    _, again = data.split_by_prompt(both, 0.3)
    assert {p[0]["content"] for p in test["prompt"]} == {p[0]["content"] for p in again["prompt"]} - {"x ?"}


def test_a_side_may_not_be_empty_and_arguments_are_checked() -> None:
    with pytest.raises(DataError, match="test_fraction=0.5 and seed=0 leave one side without"):
        data.split_by_prompt(Dataset.from_dict({"prompt": ["same ?"] * 20}), 0.5)
    with pytest.raises(DataError, match="between 0 and 1"):
        data.split_by_prompt(Dataset.from_list(PAIRS), 1.0)
    with pytest.raises(DataError, match="did you mean 'question'"):
        data.split_by_prompt(Dataset.from_dict({"question": ["a"]}))


# --- the pocket world ------------------------------------------------------------------------------------------------
