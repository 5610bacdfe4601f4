"""A run is there whole or not at all, whatever happens to the process that makes it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from rlhf_kit import files, runs

ROOT = Path(__file__).parents[1]
CONFIG = {"stage": "sft", "seed": 3, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)}}

# Makes the run "sft" of six steps in a process of its own, and stays at the fourth step until it is killed.
SCRIPT = """
import sys, time
from pathlib import Path
from rlhf_kit import files, runs

def work(directory):
    for step in range(6):
        runs.append_metrics(directory, {"update": step, "loss": 1 / (step + 1)})
        if step == 3:
            (directory / "weights").write_text("half")
            (Path(sys.argv[1]) / "reached").touch()
            time.sleep(60)

assert "torch" not in sys.modules  # a finished run is found at once
runs.make(sys.argv[1], "sft", {"steps": 6}, {}, work)
"""


def make(directory):
    (directory / "model").mkdir()
    (directory / "model" / "weights.txt").write_text("1 2 3")
    runs.append_metrics(directory, {"update": 0, "loss": 0.5})


def never(directory):
    raise AssertionError("a finished run must not be made again")


def folders(experiment):
    return [path.name for path in (experiment / "runs").iterdir() if path.is_dir()]


def test_a_run_is_made_once_and_says_what_it_was_made_from(tmp_path):
    source = tmp_path / "data.jsonl"
    source.write_text("rows")
    first = runs.make(tmp_path, "sft", CONFIG, {"data": source}, make)
    again = runs.make(tmp_path, "sft", CONFIG, {"data": source}, never)
    assert (first.reused, again.reused) == (False, True)
    assert first.directory == again.directory == tmp_path / "runs" / "sft"
    assert (again.directory / "model" / "weights.txt").read_text() == "1 2 3"
    assert folders(tmp_path) == ["sft"]
    info = json.loads((again.directory / "run.json").read_text())
    assert first.info == again.info == info
    assert info["status"] == "finished" and info["error"] is None and info["seconds"] >= 0 and info["device"]
    assert info["config"] == {"stage": "sft", "seed": 3, "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}}
    assert info["seed"] == 3 and info["inputs"] == {"data": {"path": str(source), "sha256": runs.sha256_of(source)}}
    assert set(info["versions"]) == {"python", "torch", "transformers", "trl", "peft", "datasets", "rlhf_kit"}


def test_another_config_or_other_inputs_under_the_same_name_are_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("a")
    runs.make(tmp_path, "sft", CONFIG, {"model": model}, make)
    other = {"stage": "sft", "seed": 4, "optimizer": {"lr": 1e-3}, "steps": 9}
    differences = "seed is 3 there and 4 here; optimizer.betas is [0.9, 0.95] there and absent here; "
    with pytest.raises(runs.RunError, match=re.escape(f"({differences}steps is absent there and 9 here)")):
        runs.make(tmp_path, "sft", other, {"model": model}, never)
    (model / "weights").write_text("b")
    with pytest.raises(runs.RunError, match="input model is [0-9a-f]{12} there and [0-9a-f]{12} here"):
        runs.make(tmp_path, "sft", CONFIG, {"model": model}, never)
    assert (tmp_path / "runs" / "sft" / "model" / "weights.txt").exists()


def test_a_fresh_run_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    runs.make(tmp_path, "sft", CONFIG, {}, make)

    def fail(directory):
        (directory / "left over").touch()
        raise KeyboardInterrupt("enough")

    with pytest.raises(KeyboardInterrupt):
        runs.make(tmp_path, "sft", {"seed": 9}, {}, fail, fresh=True)
    info = json.loads((tmp_path / "runs" / ".sft.partial" / "run.json").read_text())
    assert (info["status"], info["error"]) == ("failed", "KeyboardInterrupt: enough")
    assert runs.make(tmp_path, "sft", CONFIG, {}, never).reused
    run = runs.make(tmp_path, "sft", {"seed": 9}, {}, make, fresh=True)
    assert (run.reused, run.info["config"], run.info["error"]) == (False, {"seed": 9}, None)
    assert folders(tmp_path) == ["sft"] and not (run.directory / "left over").exists()


def test_what_cannot_be_made_is_said_in_one_sentence_and_nothing_is_overwritten(tmp_path):
    mine = tmp_path / "runs" / "sft"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    faults = {
        "is no finished run": lambda: runs.make(tmp_path, "sft", {}, {}, never),
        "cannot write to the results folder": lambda: runs.make(tmp_path / "file", "sft", {}, {}, never),
        "cannot write .*summary.csv": lambda: runs.write_summary(tmp_path / "file" / "demo", pd.DataFrame()),
        "a run cannot be called '../sft'": lambda: runs.make(tmp_path, "../sft", {}, {}, never),
        "a run cannot be called '.sft.partial'": lambda: runs.make(tmp_path, ".sft.partial", {}, {}, never),
    }
    for words, call in faults.items():
        with pytest.raises(runs.RunError, match=rf"{words}[^\n]*$"):
            call()
    assert (mine / "thesis.txt").exists()


def test_a_killed_run_is_locked_while_it_lives_and_then_made_from_nothing(tmp_path):
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "reached").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    with pytest.raises(runs.RunError, match=f"sft is being made by process {process.pid} on .*: wait for it to end"):
        runs.make(tmp_path, "sft", {"steps": 6}, {}, never)
    process.send_signal(signal.SIGKILL)  # its lock dies with it
    process.communicate()
    assert folders(tmp_path) == [".sft.partial"]
    run = runs.make(tmp_path, "sft", {"steps": 6}, {}, make)
    assert not run.reused and not (run.directory / "weights").exists()
    assert pd.read_csv(run.directory / "metrics.csv")["loss"].tolist() == [0.5]


@pytest.mark.parametrize("renames", [0, 1, 2])
@pytest.mark.parametrize("there_was_one", [False, True])
def test_killed_while_taking_its_name(tmp_path, monkeypatch, renames, there_was_one):
    """The new run is whole but not yet named: the next call finds it, and never a mixture."""
    if there_was_one:
        runs.make(tmp_path, "sft", {}, {}, lambda directory: (directory / "version").write_text("old"))
    left = iter(range(renames, -1, -1))

    def rename(path, target):
        if target.name in ("sft", ".sft.old") and next(left) == 0:
            raise KeyboardInterrupt  # as good as a kill: nothing in the way of a rename catches it
        os.rename(path, target)

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename)
        patch.setattr(Path, "replace", rename)
        runs.make(tmp_path, "sft", {}, {}, lambda directory: (directory / "version").write_text("new"), fresh=True)
    contents = [path.read_text() for path in (tmp_path / "runs").glob("*/version")]
    assert contents.count("old") == (there_was_one and renames < 2)  # it goes last
    run = runs.make(tmp_path, "sft", {}, {}, never)
    assert run.reused and (run.directory / "version").read_text() == "new"
    assert folders(tmp_path) == ["sft"]


def test_a_folder_that_is_replaced_stays_until_the_new_one_is_whole(tmp_path):
    for text in ("old", "new"):
        with files.replacing(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text(text)
        assert (tmp_path / "model" / "weights").read_text() == text
    with pytest.raises(ValueError), files.replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        raise ValueError
    assert (tmp_path / "model" / "weights").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_a_config_becomes_strict_json(tmp_path):
    config = {"path": Path("a/b"), "n": np.int64(3), "x": np.float32(0.5), "t": (2, 1), "i": -math.inf, "b": True}
    known = runs.make(tmp_path, "sft", config, {}, make).info["config"]
    assert known == {"path": "a/b", "n": 3, "x": 0.5, "t": [2, 1], "i": "-inf", "b": True}
    with pytest.raises(runs.RunError, match=r"config.model.layers\[1\] is a object, which run.json cannot hold"):
        runs.make(tmp_path, "other", {"model": {"layers": [1, object()]}}, {}, never)


def test_secrets_are_never_written(tmp_path):
    secret = {"hub_token": "hf_abc", "judge": {"apiKey": "sk-abc", "password": {"text": "abc"}, "secrets": ["abc"]}}
    public = {"max_tokens": 40, "eos_token": "<eos>", "tokenizer": "bpe", "token": None}
    run = runs.make(tmp_path, "judge", secret | public, {}, make)
    assert "abc" not in (run.directory / "run.json").read_text()
    assert run.info["config"]["hub_token"] == run.info["config"]["judge"]["password"]["text"] == "***"
    assert {name: run.info["config"][name] for name in public} == public
    assert runs.make(tmp_path, "judge", secret | public | {"hub_token": "hf_new"}, {}, never).reused
    with pytest.raises(runs.RunError, match="max_tokens"):
        runs.make(tmp_path, "judge", secret | public | {"max_tokens": 41}, {}, never)


def test_sha256_sees_contents_and_names_but_not_times(tmp_path):
    for folder, name in (("a", "y"), ("b", "y"), ("c", "z")):
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / name).write_text("abc")
        modules = [f"{module}_proj" for module in ("ab" if folder == "a" else "ba")]
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"target_modules": modules}, indent=2))
        for clock in ("run.json", "metrics.csv", "deep/trainer_state.json", "deep/training_args.bin", "README.md"):
            (tmp_path / folder / clock).write_text(f"made at {folder} o'clock")
    os.utime(tmp_path / "a" / "deep" / "y", (0, 0))
    of = {folder: runs.sha256_of(tmp_path / folder) for folder in "abc"}
    assert of["a"] == of["b"] != of["c"]
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert runs.sha256_of(tmp_path / "a" / "deep" / "y") == known


def test_git_tells_the_commit_and_whether_the_code_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "kit" / "runs.py"))
    for file in ("kit/code.py", "results/summary.csv"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("1")
    assert runs.git() is None

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("-c", "commit.gpgsign=false", "commit", "-m", "first")
    assert runs.git() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "results" / "summary.csv").write_text("2")
    assert not runs.git()["dirty"]
    (tmp_path / "kit" / "code.py").write_text("2")
    assert runs.git()["dirty"]


def test_metrics_grow_by_rows_and_columns(tmp_path):
    runs.append_metrics(tmp_path, {"update": 0, "loss": np.float64(0.1), "note": "a, b"})
    runs.append_metrics(tmp_path, {"update": 1, "loss": math.nan})
    runs.append_metrics(tmp_path, {"update": 2, "loss": None, "reward": 0.1 + 0.2})
    frame = pd.read_csv(tmp_path / "metrics.csv")
    assert frame.columns.tolist() == ["update", "loss", "note", "reward"]
    assert frame["update"].tolist() == [0, 1, 2]
    assert frame["loss"].tolist() == pytest.approx([0.1, math.nan, math.nan], nan_ok=True)
    assert frame["note"][0] == "a, b" and frame["note"][1:].isna().all()
    assert frame["reward"][2] == 0.1 + 0.2  # to the last digit
    with pytest.raises(runs.RunError, match="metric 'loss' is a list"):
        runs.append_metrics(tmp_path, {"loss": [1]})


def test_summary_and_figures_have_their_places(tmp_path):
    table = pd.DataFrame({"model": ["SFT"], "gold": [1 / 3]})
    assert runs.write_summary(tmp_path, table) == tmp_path / "summary.csv"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "summary.csv"), table)
    figure = matplotlib.figure.Figure()
    first = runs.save_figure(tmp_path, "training", figure).read_bytes()
    assert first[:4] == b"\x89PNG" and (tmp_path / "figures" / "training.png").exists()
    assert runs.save_figure(tmp_path, "training", figure).read_bytes() == first
