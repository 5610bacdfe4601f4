"""The command line as a person meets it: mistakes end in one sentence, and a killed demo goes on where it was."""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import pytest
import torch

from rlhf_kit import cli, presets
from rlhf_kit.pipeline import Pipeline
from rlhf_kit.runs import Run
from rlhf_kit.tasks import Pocket

TINY = "sft.max_steps=4 reward_model.max_steps=4 dpo.max_steps=4 dpo.save_steps=2 ppo.max_steps=2 ppo.save_steps=1 "
TINY += "ppo.per_device_train_batch_size=16 n_demonstrations=64 n_preference_prompts=24 n_test_prompts=12 best_of=2 "
TINY += "samples_per_prompt=2"
PROCESS = {"text": True, "env": os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}}


def demo(out: Path, settings: str, *arguments: str | Path) -> list[str]:
    """The command of a demo with these settings."""
    words = [word for setting in settings.split() for word in ("--set", setting)]
    return [sys.executable, "-m", "rlhf_kit.cli", "demo", "--out", out, "--threads", "1", *words, *arguments]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, timeout=600, **PROCESS)


PAIRS = [{"prompt": f"is {i} even ?", "chosen": " yes .", "rejected": " no idea ."} for i in range(40)]


# Each mistake with words that its message must hold.
WRONG_USES = {
    "--data absent.jsonl": ["absent.jsonl", "no such file"],
    "--data wrong.jsonl": ["wrong.jsonl", "chosen", "better"],
    "--data empty.jsonl": ["empty.jsonl", "empty"],
    "--data half.jsonl.gz": ["half.jsonl.gz"],
    "--data someone/some-data": ["someone/some-data"],  # a hub id, offline
    "--base-model nothing": ["nothing", "config.json"],
    "--base-model no-config": ["no-config", "hidden_size"],
    "--base-model no-words": ["no-words"],
    "--base-model someone/some-model": ["someone/some-model"],
    "--out file/results": ["cannot write", "results"],
    "--set ppo.per_device_train_batch_size=-1": ["batch_size", "above 0"],
    "--preset galaxy": ["galaxy", "pocket"],
    "--set sft.max_stepz=3": ["max_stepz", "max_steps"],
}


def test_wrong_uses_end_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    Path("nothing").mkdir()
    Path("empty.jsonl").touch()
    pd.DataFrame(PAIRS).to_json("half.jsonl.gz", orient="records", lines=True)
    os.truncate("half.jsonl.gz", Path("half.jsonl.gz").stat().st_size // 2)
    Path("wrong.jsonl").write_text('{"prompt": "a ?", "better": " b", "rejected": " c"}')
    broken = '{"model_type": "llama", "hidden_size": "x"}'
    for name, file, content in (("no-config", "config.json", broken), ("no-words", "tokenizer.json", "[]")):
        shutil.copytree(Pocket.base_model, name)
        Path(name, file).write_text(content)
    for wrong, words in WRONG_USES.items():
        before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
        assert cli.main(["demo", "--out", "out", *wrong.split()]) == 2, wrong
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("rlhf-kit: ") and "Traceback" not in message, wrong
        assert all(word in message for word in words), (wrong, message)
        assert all(path.read_bytes() == content for path, content in before.items()), wrong


@pytest.mark.parametrize(
    "arguments",
    ["memory m --gpu nan", "memory m --lora 0", "demo --threads 0", "demo --seed -1"]
    + [f"rate f --rater a {option}" for option in ("--port 99999", "--k 1", "--seed -1", "--repeats -1")],
)
def test_a_number_that_cannot_be_is_refused_by_its_option(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments.split())
    assert f"argument {arguments.split()[-2]}: {arguments.split()[-1]}: give a number" in capsys.readouterr().err


def test_a_fault_of_the_kit_says_that_it_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_report", lambda options: {}["a fault"])
    assert cli.main(["report", "x"]) == 1
    said = capsys.readouterr().err
    assert "KeyError: 'a fault'" in said and said.endswith("please report it with the lines above\n")
    # A gradient that is not finite and a card that is full are no faults of the kit.
    for error in (FloatingPointError, torch.OutOfMemoryError):
        monkeypatch.setattr(cli, "_report", lambda options, error=error: (_ for _ in ()).throw(error("of update 3")))
        assert cli.main(["report", "x"]) == 2 and capsys.readouterr().err == "rlhf-kit: of update 3\n"


def test_the_time_left_in_all_is_the_time_spent_scaled_by_the_measured_shares(tmp_path: Path) -> None:
    shares = {"sft": 0.2, "preferences": 0.1, "reward_model": 0.3, "ppo": 0.4}
    pipeline = Pipeline(replace(presets.preset("pocket"), shares=shares), tmp_path)
    assert pipeline._left("sft") == ""  # nothing is known of this machine yet
    pipeline.runs["sft"] = Run(tmp_path / "sft", {"seconds": 999.0}, reused=True)
    pipeline.runs["preferences"] = Run(tmp_path / "preferences", {"seconds": 10.0}, reused=False)
    assert pipeline._left("reward_model") == "; about 1:10 left in all"
    assert pipeline._left("a stage of its own") == ""


@pytest.mark.slow
def test_killed_in_each_stage_then_resumed_gives_the_same_summary(tmp_path: Path) -> None:
    whole = run(demo(tmp_path / "whole", TINY))
    assert whole.returncode == 0, whole.stderr
    command, killed = demo(tmp_path / "killed", TINY), []
    for stage in ("sft", "preferences", "reward_model", "ppo", "dpo", "scores"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, **PROCESS)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"{stage}: at work"):
                time.sleep(0.2)  # let it get into the work
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
        killed.append(process.returncode)
        assert not (tmp_path / "killed" / "runs" / stage / "run.json").exists()
    assert killed == [-signal.SIGKILL] * 6
    resumed = run(command)
    assert resumed.returncode == 0, resumed.stderr
    assert "sft: done before, kept" in resumed.stdout
    same = [(tmp_path / name / "summary.csv").read_bytes() for name in ("whole", "killed")]
    assert same[0] == same[1]

    # Another config under the same names is refused, and what is there stays.
    refused = run([*command, "--set", "sft.learning_rate=0.1"])
    assert refused.returncode == 2 and "learning_rate" in refused.stderr and "Traceback" not in refused.stderr
    assert (tmp_path / "killed" / "summary.csv").read_bytes() == same[0]

    # What a demo leaves.
    table = pd.read_csv(tmp_path / "whole" / "summary.csv")
    assert list(table["model"]) == ["base", "SFT", "best-of-n", "PPO", "DPO"]
    for quantity in ("gold", "proxy", "kl", "n_tokens", "win_rate_gold", "win_rate_proxy"):
        assert {quantity, f"{quantity}_lo", f"{quantity}_hi"} <= set(table.columns)
        assert table[quantity].notna().all()
    sft = table.set_index("model").loc["SFT"]
    assert sft["kl"] == 0 and sft["win_rate_gold"] == 0.5
    for figure in ("reward_shift", "rlhf_vs_dpo", "training"):
        assert (tmp_path / "whole" / "figures" / f"{figure}.png").stat().st_size > 10_000
    assert (tmp_path / "whole" / "samples.md").read_text().count("| DPO |") == 10


@pytest.mark.slow
def test_own_data_without_a_base_model(tmp_path: Path) -> None:
    names = ["".join(pair) for pair in product("abcdefghijklmnop", repeat=2)]
    rows = [{"prompt": f"is {name} good ?", "chosen": f" yes , {name} is .", "rejected": " no ."} for name in names]
    small = "pretrain.max_steps=5 base_shape.vocab_size=300 base_shape.num_hidden_layers=1 sft.max_steps=2 best_of=2 "
    small += "reward_model.max_steps=2 dpo.max_steps=2 dpo.save_steps=2 ppo.max_steps=1 ppo.save_steps=1 "
    small += "ppo.per_device_train_batch_size=4 n_test_prompts=8 sampling.max_completion_length=8"
    pd.DataFrame(rows).to_json(tmp_path / "own.jsonl", orient="records", lines=True)
    result = run(demo(tmp_path / "out", small, "--data", tmp_path / "own.jsonl"))
    assert result.returncode == 0, result.stderr
    assert "its English is poor" in result.stdout
    table = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert table["gold"].isna().all() and table["win_rate_gold"].isna().all()  # empty, not invented
    assert table["proxy"].notna().all()
    assert not (tmp_path / "out" / "samples.md").exists()  # no text of a person's data is copied
    accuracy = pd.read_csv(tmp_path / "out" / "reward_model_accuracy.csv")
    assert list(accuracy["pairs"]) == ["trained on", "held out"]
