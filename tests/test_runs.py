"""A run is there whole or not at all, whatever happens to the process that makes it."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest

from rlhf_kit import runs
from rlhf_kit.runs import layout, provenance

CONFIG = {"stage": "sft", "seed": 3, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)}}

# A stage of six steps for a process of its own; it resumes from step.txt, and stays at `stop_at` until it is killed.
SCRIPT = """
import sys, time
from pathlib import Path
from rlhf_kit import runs

experiment, resume, stop_at, wait = sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3]), float(sys.argv[4])

def work(directory):
    state = directory / "step.txt"
    begin = int(state.read_text()) if state.exists() else 0
    runs.keep_metrics(directory, begin - 1, "update")
    for step in range(begin, 6):
        runs.append_metrics(directory, {"update": step, "loss": 1 / (step + 1)})
        if step == stop_at:
            (directory / ".weights.123.part").write_text("half")
            with (directory / "metrics.csv").open("a") as stream:
                stream.write("3,0.2")  # a row torn in the middle
            (Path(experiment) / "reached").touch()
            time.sleep(60)
        with runs.replacing(state) as temporary:
            temporary.write_text(str(step + 1))
    with (directory / "begun.txt").open("a") as stream:
        stream.write(f"{begin}\\n")

try:
    run = runs.make(experiment, "sft", {"steps": 6}, {}, work, resume=resume, wait=wait)
except runs.RunError as error:
    sys.exit(f"refused: {error}")
print("reused" if run.reused else "made")
"""


def start(experiment, resume=False, stop_at=-1, wait=0.0):
    arguments = [str(experiment), "resume" if resume else "again", str(stop_at), str(wait)]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path, process):
    for _ in range(600):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def make(directory):
    (directory / "model").mkdir()
    (directory / "model" / "weights.txt").write_text("1 2 3")
    runs.append_metrics(directory, {"update": 0, "loss": 0.5})


def never(directory):
    raise AssertionError("a finished run must not be made again")


# made once


def test_a_run_is_made_once_and_then_found(tmp_path):
    first = runs.make(tmp_path, "sft", CONFIG, {}, make)
    again = runs.make(tmp_path, "sft", CONFIG, {}, never)
    assert (first.reused, again.reused) == (False, True)
    assert first.directory == again.directory == tmp_path / "runs" / "sft"
    assert (again.directory / "model" / "weights.txt").read_text() == "1 2 3"
    assert again.info == first.info
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["sft"]


def test_run_json_says_what_the_run_was_made_from(tmp_path):
    source = tmp_path / "data.jsonl"
    source.write_text("rows")
    run = runs.make(tmp_path / "demo", "sft", CONFIG, {"data": source}, make)
    info = json.loads((run.directory / "run.json").read_text())
    assert info["status"] == "finished" and info["error"] is None
    assert info["config"] == {"stage": "sft", "seed": 3, "optimizer": {"lr": 1e-3, "betas": [0.9, 0.95]}}
    assert info["seed"] == 3 and run.config["seed"] == 3 and run.name == "sft"
    assert info["inputs"] == {"data": {"path": str(source), "sha256": runs.sha256_of(source)}}
    assert info["started"] <= info["finished"] and info["seconds"] >= 0
    assert set(info["versions"]) == {"python", "torch", "transformers", "trl", "peft", "datasets", "rlhf_kit"}
    assert info["device"]
    assert info["git"] is None or set(info["git"]) == {"commit", "dirty"}


@pytest.mark.parametrize("resume", [False, True])
def test_another_config_under_the_same_name_is_refused_and_nothing_is_touched(tmp_path, resume):
    runs.make(tmp_path, "sft", CONFIG, {}, make)
    other = {"stage": "sft", "seed": 4, "optimizer": {"lr": 1e-3}, "steps": 9}
    with pytest.raises(runs.RunError) as error:
        runs.make(tmp_path, "sft", other, {}, never, resume=resume)
    text = str(error.value)
    assert "seed is 3 there and 4 here" in text and "optimizer.betas is [0.9, 0.95] there and absent here" in text
    assert "steps is absent there and 9 here" in text and "lr" not in text and "\n" not in text
    assert runs.load_run(tmp_path / "runs" / "sft").config["seed"] == 3


def test_other_contents_of_an_input_are_refused(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("a")
    runs.make(tmp_path, "ppo", {}, {"model": model}, make)
    runs.make(tmp_path, "ppo", {}, {"model": model}, never)
    (model / "weights").write_text("b")
    with pytest.raises(runs.RunError, match="input model is [0-9a-f]{12} there and [0-9a-f]{12} here"):
        runs.make(tmp_path, "ppo", {}, {"model": model}, never)
    with pytest.raises(runs.RunError, match="input 'model' cannot be read: .*nowhere: No such file"):
        runs.make(tmp_path, "ppo", {}, {"model": tmp_path / "nowhere"}, never)


def test_a_fresh_run_replaces_the_old_one_only_when_it_is_whole(tmp_path):
    runs.make(tmp_path, "sft", CONFIG, {}, make)

    def fail(directory):
        (directory / "model").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.make(tmp_path, "sft", {"seed": 9}, {}, fail, fresh=True)
    assert runs.make(tmp_path, "sft", CONFIG, {}, never).reused
    assert not runs.make(tmp_path, "sft", {"seed": 9}, {}, make, fresh=True).reused
    assert runs.load_run(tmp_path / "runs" / "sft").config == {"seed": 9}
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["sft"]


def test_a_failed_run_is_noted_passed_on_and_made_again_from_nothing(tmp_path):
    def fail(directory):
        (directory / "left over").touch()
        raise ZeroDivisionError("no rows")

    with pytest.raises(ZeroDivisionError):
        runs.make(tmp_path, "sft", {"rows": 0}, {}, fail)
    info = json.loads((tmp_path / "runs" / ".sft.partial" / "run.json").read_text())
    assert (info["status"], info["error"]) == ("failed", "ZeroDivisionError: no rows")
    with pytest.raises(runs.RunError, match="rows is 0 there and 5 here"):  # its checkpoints are of another config
        runs.make(tmp_path, "sft", {"rows": 5}, {}, never, resume=True)
    run = runs.make(tmp_path, "sft", {"rows": 5}, {}, make)
    assert not (run.directory / "left over").exists()
    assert runs.load_run(run.directory).info["error"] is None


def test_a_directory_that_is_no_run_is_not_overwritten(tmp_path):
    mine = tmp_path / "runs" / "sft"
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(runs.RunError, match="is no run"):
        runs.make(tmp_path, "sft", {}, {}, never)
    assert (mine / "thesis.txt").exists()


def test_a_name_cannot_leave_the_folder(tmp_path):
    for name in ("../sft", "a/b", "", ".sft.partial"):
        with pytest.raises(runs.RunError, match="a run cannot be called"):
            runs.make(tmp_path, name, {}, {}, never)


def test_an_unwritable_results_folder_is_one_clear_sentence(tmp_path):
    (tmp_path / "results").write_text("a file")
    for call in (
        lambda: runs.make(tmp_path / "results", "sft", {}, {}, never),
        lambda: runs.write_summary(tmp_path / "results" / "demo", pd.DataFrame()),
    ):
        with pytest.raises(runs.RunError, match=r"^cannot write to the results folder .*results.*[^\n]$"):
            call()


def test_a_folder_without_write_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(layout.os, "access", lambda *_: False)  # tests may run as root, who may write anywhere
    with pytest.raises(runs.RunError, match="permission denied"):
        runs.make(tmp_path, "sft", {}, {}, never)


# killed at any moment


def result_of(experiment):
    folder = experiment / "runs" / "sft"
    return {path.name: path.read_text() for path in folder.iterdir() if path.name not in ("run.json", "begun.txt")}


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_kill_and_run_again_gives_the_result_of_an_uninterrupted_run(tmp_path, resume):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    assert start(calm).communicate()[0].strip() == "made"

    process = start(killed, resume, stop_at=3)
    wait_for(killed / "reached", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "runs" / "sft").exists()
    with pytest.warns(UserWarning, match="1 unfinished .* skipped: sft"), pytest.raises(runs.RunError):
        runs.load_metrics(killed)

    out, err = start(killed, resume).communicate()
    assert out.strip() == "made", err
    assert result_of(killed) == result_of(calm)
    assert (killed / "runs" / "sft" / "begun.txt").read_text() == ("3\n" if resume else "0\n")
    assert start(killed, resume).communicate()[0].strip() == "reused"


@pytest.mark.parametrize("moment", ["before the first rename", "between the renames", "before the clean-up"])
@pytest.mark.parametrize("there_was_one", [False, True])
def test_killed_while_taking_its_name(tmp_path, monkeypatch, moment, there_was_one):
    """The new run is whole but not yet named: the next call finds it, and never a mixture."""
    if there_was_one:
        runs.make(tmp_path, "sft", {}, {}, lambda directory: (directory / "version").write_text("old"))

    class Killed(BaseException):
        pass

    partial, final, aside = (tmp_path / "runs" / name for name in (".sft.partial", "sft", ".sft.old"))
    renames = {"before the first rename": 0, "between the renames": 1, "before the clean-up": 2}[moment]

    def publish_until(source, target):
        for step, (there, here) in enumerate([(target, aside), (source, target)]):
            if step < renames and there.exists():
                there.rename(here)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(layout, "_publish", publish_until)
        runs.make(tmp_path, "sft", {}, {}, lambda directory: (directory / "version").write_text("new"), fresh=True)
    run = runs.make(tmp_path, "sft", {}, {}, never)
    assert (run.directory / "version").read_text() == "new"
    assert not partial.exists() and final.exists()
    assert [run.name for run in runs.load_runs(tmp_path)] == ["sft"]


def test_killed_while_clearing_an_unfinished_run_it_is_not_resumed(tmp_path, monkeypatch):
    def fail(directory):
        (directory / "checkpoint").touch()
        raise ValueError

    with pytest.raises(ValueError):
        runs.make(tmp_path, "sft", {}, {}, fail)
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(layout.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(InterruptedError))
        runs.make(tmp_path, "sft", {}, {}, make)
    run = runs.make(tmp_path, "sft", {}, {}, make, resume=True)
    assert not (run.directory / "checkpoint").exists()


@pytest.mark.slow
def test_a_second_process_is_refused_or_waits(tmp_path):
    first = start(tmp_path, stop_at=3)
    wait_for(tmp_path / "reached", first)
    out, err = start(tmp_path).communicate()
    assert out == "" and f"sft is being made by process {first.pid} on " in err and "wait for it" in err
    patient = start(tmp_path, wait=30)
    time.sleep(0.5)
    assert patient.poll() is None
    first.send_signal(signal.SIGKILL)  # its lock dies with it
    first.communicate()
    assert patient.communicate()[0].strip() == "made"


def test_of_two_at_once_one_makes_and_one_finds(tmp_path):
    processes = [start(tmp_path, wait=30) for _ in range(2)]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["made", "reused"]


def test_the_lock_left_by_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / ".sft.lock").write_text("process 999999999 on a machine long gone\n")
    assert not runs.make(tmp_path, "sft", {}, {}, make).reused


# config


def test_names_are_a_function_of_the_config():
    name = runs.name_of(CONFIG)
    assert name.startswith("sft-") and len(name) == len("sft-") + 8
    assert name == runs.name_of({"seed": 3, "optimizer": {"betas": [0.9, 0.95], "lr": 0.001}, "stage": "sft"})
    assert name != runs.name_of(CONFIG | {"seed": 4})
    assert runs.name_of({"stage": "best of n / 4"}).startswith("best-of-n-4-")
    assert runs.name_of({}).startswith("run-")


def test_config_becomes_strict_json():
    @dataclasses.dataclass
    class Options:
        path: Path
        ratio: float

    config = {"o": Options(Path("a/b"), math.nan), "n": np.int64(3), "x": np.float32(0.5), "s": {2, 1}, "i": -math.inf}
    known = provenance.plain(config | {"b": True, "none": None})
    assert known == {
        "o": {"path": "a/b", "ratio": "nan"},
        "n": 3,
        "x": 0.5,
        "s": [1, 2],
        "i": "-inf",
        "b": True,
        "none": None,
    }
    json.dumps(known, allow_nan=False)
    with pytest.raises(runs.RunError, match=r"config.model.layers\[1\] is a object, which run.json cannot hold"):
        provenance.plain({"model": {"layers": [1, object()]}})


def test_secrets_are_never_written(tmp_path):
    config = {
        "hub_token": "hf_abc",
        "judge": {"apiKey": "sk-abc", "password": {"text": "abc"}, "client_secrets": ["abc"]},
        "max_tokens": 40,
        "eos_token": "<eos>",
        "tokenizer": "bpe",
        "token": None,
    }
    run = runs.make(tmp_path, "judge", config, {}, make)
    assert "abc" not in (run.directory / "run.json").read_text()
    assert run.config["hub_token"] == run.config["judge"]["password"]["text"] == "***"
    assert (run.config["max_tokens"], run.config["eos_token"], run.config["tokenizer"]) == (40, "<eos>", "bpe")
    assert runs.make(tmp_path, "judge", config | {"hub_token": "hf_new"}, {}, never).reused  # the same run, a new key
    with pytest.raises(runs.RunError, match="max_tokens"):
        runs.make(tmp_path, "judge", config | {"max_tokens": 41}, {}, never)


def test_sha256_sees_contents_and_names_but_not_times(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "x").write_text("1")
        (tmp_path / name / "y").write_text("2")
    os.utime(tmp_path / "a" / "y", (0, 0))
    assert runs.sha256_of(tmp_path / "a") == runs.sha256_of(tmp_path / "b")
    (tmp_path / "b" / "y").rename(tmp_path / "b" / "z")
    assert runs.sha256_of(tmp_path / "a") != runs.sha256_of(tmp_path / "b")
    (tmp_path / "abc").write_text("abc")
    assert runs.sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_git_tells_the_commit_and_whether_the_code_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "kit" / "provenance.py"))
    (tmp_path / "kit").mkdir()
    (tmp_path / "results").mkdir()
    assert provenance.git() is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert provenance.git() is None  # no commit yet
    for file in ("kit/code.py", "results/summary.csv"):
        (tmp_path / file).write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    assert provenance.git() == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "results" / "summary.csv").write_text("2")
    assert not provenance.git()["dirty"]
    (tmp_path / "kit" / "code.py").write_text("2")
    assert provenance.git()["dirty"]


def test_the_device_is_known_without_importing_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert provenance.device().startswith("cpu (")
    code = "import sys, rlhf_kit.runs; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


# files


def test_metrics_grow_by_rows_and_columns(tmp_path):
    runs.append_metrics(tmp_path, {"update": 0, "loss": np.float64(0.1), "note": "a, b"})
    runs.append_metrics(tmp_path, {"update": 1, "loss": math.nan})
    runs.append_metrics(tmp_path, {"update": 2, "reward": 1.5, "loss": None})
    frame = pd.read_csv(tmp_path / "metrics.csv")
    assert frame.columns.tolist() == ["update", "loss", "note", "reward"]
    assert frame["update"].tolist() == [0, 1, 2]
    assert frame["loss"][0] == 0.1 and frame["loss"][1:].isna().all()
    assert frame["reward"][2] == 1.5 and frame["reward"][:2].isna().all()
    assert frame["note"][0] == "a, b"
    with pytest.raises(runs.RunError, match="metric 'loss' is a list"):
        runs.append_metrics(tmp_path, {"loss": [1]})


def test_a_torn_row_is_dropped_and_later_rows_can_be(tmp_path):
    for update in range(4):
        runs.append_metrics(tmp_path, {"update": update, "loss": update / 4})
    with (tmp_path / "metrics.csv").open("a") as stream:
        stream.write("4,0.")
    runs.append_metrics(tmp_path, {"update": 4, "loss": 1.0})
    assert pd.read_csv(tmp_path / "metrics.csv")["loss"].tolist() == [0, 0.25, 0.5, 0.75, 1.0]
    runs.keep_metrics(tmp_path, 1)
    assert pd.read_csv(tmp_path / "metrics.csv")["update"].tolist() == [0, 1]
    runs.keep_metrics(tmp_path, -1)
    runs.append_metrics(tmp_path, {"update": 0, "loss": 9.0})
    assert pd.read_csv(tmp_path / "metrics.csv")["loss"].tolist() == [9.0]


def test_loaders_join_finished_runs_and_count_the_others(tmp_path):
    def work(seed):
        def function(directory):
            runs.append_metrics(directory, {"update": 0, "loss": float(seed)})
            frame = pd.DataFrame({"prompt_id": [0, 1], "completion": [" a .", " b ."], "gold": [0.0, seed]})
            runs.write_samples(directory, frame)

        return function

    for seed in (0, 1):
        runs.make(tmp_path, f"ppo-{seed}", {"stage": "ppo", "seed": seed, "beta": 0.1, "lora": {}}, {}, work(seed))
    with pytest.raises(AssertionError):
        runs.make(tmp_path, "ppo-2", {}, {}, never)
    with pytest.warns(UserWarning, match="1 unfinished in .* skipped: ppo-2"):
        metrics = runs.load_metrics(tmp_path)
    assert metrics.columns.tolist() == ["run", "stage", "seed", "beta", "update", "loss"]
    assert metrics["run"].tolist() == ["ppo-0", "ppo-1"] and metrics["loss"].tolist() == [0.0, 1.0]
    with pytest.warns(UserWarning):
        samples = runs.load_samples(tmp_path, columns=("seed",))
    assert samples.columns.tolist() == ["run", "seed", "prompt_id", "completion", "gold"]
    assert samples["seed"].tolist() == [0, 0, 1, 1] and samples["completion"][0] == " a ."
    with pytest.raises(runs.RunError, match="no runs in"):
        runs.load_runs(tmp_path / "nowhere")
    with pytest.raises(runs.RunError, match="holds no finished run"):
        runs.load_run(tmp_path / "runs" / ".ppo-2.partial")


def test_replacing_leaves_the_old_file_when_the_write_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ValueError), runs.replacing(path) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_summary_and_figures_have_their_places(tmp_path):
    table = pd.DataFrame({"model": ["SFT"], "gold": [1 / 3]})
    assert runs.write_summary(tmp_path, table) == tmp_path / "summary.csv"
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "summary.csv"), table)
    figure = matplotlib.figure.Figure()
    first = runs.save_figure(tmp_path, "training", figure).read_bytes()
    assert first[:4] == b"\x89PNG" and (tmp_path / "figures" / "training.png").exists()
    assert runs.save_figure(tmp_path, "training", figure).read_bytes() == first
