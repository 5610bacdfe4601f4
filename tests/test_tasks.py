"""Tasks: whatever has prompts, demonstrations and a rater or preferences goes through the whole pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from rlhf_kit import outputs, presets
from rlhf_kit.feedback import Answer
from rlhf_kit.pipeline import Pipeline
from rlhf_kit.tasks import Pairs, Pocket, Task

ANIMALS = ["otter", "owl", "falcon", "newt", "whale", "hare", "fox", "crane", "heron", "trout", "badger", "hedgehog"]
TINY = ["sft.max_steps=2", "reward_model.max_steps=2", "dpo.max_steps=2", "dpo.save_steps=1", "ppo.max_steps=1"]
TINY += ["ppo.save_steps=1", "ppo.per_device_train_batch_size=4", "sampling.max_completion_length=8", "best_of=2"]
TINY += ["samples_per_prompt=2"]


class Short(Task):
    """A dozen questions; an answer is the better the shorter it is."""

    name = "short"

    def prompts(self, split: str, n: int | None = None, seed: int = 0) -> Dataset:
        ends = {"preference": "", "train": " now", "test": " today"}
        return Dataset.from_dict({"prompt": [f"where does the {animal} live{ends[split]} ?" for animal in ANIMALS][:n]})

    def demonstrations(self, n: int | None = None, seed: int = 0) -> Dataset:
        prompts = self.prompts("preference", n)["prompt"][:]
        return Dataset.from_dict({"prompt": prompts, "completion": [" it lives by the river ."] * len(prompts)})

    def rater(self, seed: int = 0) -> Short:
        return self

    def __call__(self, prompt: str, completions: Sequence[str], question: str) -> Answer:
        return Answer(ranks=(1, 2) if len(completions[0]) <= len(completions[1]) else (2, 1))

    @property
    def gold(self) -> Any:
        return lambda prompts, completions, **columns: [-float(len(text)) for text in completions]


def tiny(task: Task, **fields: Any) -> presets.Preset:
    preset = presets.preset("quick")
    for setting in TINY:
        preset = preset.override(setting)
    return replace(preset, task=task, n_demonstrations=None, n_preference_prompts=None, n_test_prompts=8, **fields)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*equal completions")
def test_a_task_of_twenty_lines_goes_through_the_whole_pipeline(tmp_path: Path) -> None:
    pipeline = Pipeline(tiny(Short()), tmp_path)
    written = outputs.write(pipeline)
    summary = pd.read_csv(tmp_path / "summary.csv")
    assert list(summary["model"]) == list(outputs.MODELS) and summary["gold"].notna().all()
    scores = pipeline.scores()
    assert (scores["gold"] == -scores["completion"].str.len()).all()
    judged = Dataset.from_parquet(str(pipeline.preferences() / "train.parquet"))
    assert all(len(row["chosen"]) <= len(row["rejected"]) for row in judged)
    shutil.rmtree(tmp_path / "runs" / "sft")  # made again, it is the same, whatever the time
    again = Pipeline(tiny(Short()), tmp_path)
    assert again.scores().equals(scores)
    assert [name for name, run in again.runs.items() if not run.reused] == ["sft"]
    assert not (tmp_path / "side_effects.csv").exists() and "best-of-n" in written
    assert (tmp_path / "samples.md").read_text().count("| PPO |") == 8


@pytest.fixture
def file(tmp_path: Path) -> str:
    rows = [{"prompt": f"is {i % 30} even ?", "chosen": f" yes {i} .", "rejected": " no ."} for i in range(60)]
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    return str(tmp_path / "pairs.jsonl")


def test_pairs_split_a_persons_file_by_prompt(file: str) -> None:
    task = Pairs(file, seed=1)
    prompts = {split: set(task.prompts(split)["prompt"][:]) for split in ("preference", "train", "test")}
    assert prompts["test"] and prompts["preference"] == prompts["train"]
    assert len(prompts["test"] | prompts["train"]) == 30
    for split in ("train", "test"):  # each prompt has two pairs, both on one side
        assert sorted(task.preferences(split)["prompt"][:]) == sorted([*prompts[split]] * 2)
    assert task.demonstrations()["completion"][:] == task.preferences("train")["chosen"][:]
    assert len(task.demonstrations(5)) == 5
    assert task.prompts("train", 4, seed=3)["prompt"][:] == task.prompts("train", seed=3)["prompt"][:4]
    assert task.rater() is None and task.gold is None and task.effects(pd.DataFrame()) is None


def test_what_is_too_long_is_left_out_aloud(file: str, tmp_path: Path) -> None:
    pipeline = Pipeline(tiny(Pairs(file), base_model=Pocket.base_model), tmp_path)
    rows = Dataset.from_dict({"prompt": ["where does the otter live ?", "where" + " where" * 150]})
    with pytest.warns(UserWarning, match="prompts: 1 of 2 rows are left out, because they are longer than"):
        assert pipeline._ready(rows, ("prompt",), "prompts", 128)["prompt"][:] == [rows["prompt"][0]]
    with pytest.raises(ValueError, match="1 of 1 rows are left out, because they are longer than"):
        pipeline._ready(rows.select([1]), ("prompt",), "prompts", 128)


@pytest.mark.parametrize(
    "setting, match",
    [
        ("ppo.num_minibatches=999", "num_minibatches exceeds per_device_train_batch_size"),
        ("sampling.max_completion_length=127", "train prompts: .* longer than max_length=1 tokens; none is left"),
    ],
)
def test_what_ppo_would_refuse_is_refused_before_the_first_stage(
    file: str, tmp_path: Path, setting: str, match: str
) -> None:
    preset = tiny(Pairs(file), base_model=Pocket.base_model).override(setting)
    with pytest.raises(ValueError, match=match):
        Pipeline(preset, tmp_path / "out").scores()
    assert not (tmp_path / "out").exists()


SETTINGS = {
    "sft.packing=TRUE": True,
    "ppo.adaptive_kl_target=none": None,
    "ppo.adaptive_kl_target=6": 6.0,
    "reward_model.lr_scheduler_type=cosine": "cosine",
    'sft.lora={"r": 8}': {"r": 8},
    "sft.dtype=bfloat16": "bfloat16",
    "ppo.attn_implementation=none": None,
    "sampling.max_completion_length=7": 7,
    "seed=5": 5,
}
WRONG = {
    "ppo.learning_rate=abc": "float",
    'sft.lora={"r"': "dict or none",
    "ppo.kl_coef": "STAGE.SETTING=VALUE",
    "task=pocket": "STAGE.SETTING=VALUE",
    "ppo=3": "ppo.SETTING=VALUE",
    "sft.max_stepz=3": "did you mean max_steps",
    "ppo.max_steps=-1": "above 0",
    "dpo.beta=0": "above 0",
    "ppo.kl_coef=NaN": "finite",
}


@pytest.mark.parametrize(("assignment", "expected"), SETTINGS.items())
def test_a_setting_has_the_type_that_its_config_declares(assignment: str, expected: Any) -> None:
    found: Any = presets.preset("pocket").override(assignment)
    for name in assignment.partition("=")[0].split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(("assignment", "words"), WRONG.items())
def test_a_wrong_setting_is_refused_before_anything_runs(assignment: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        presets.preset("pocket").override(assignment)


def test_presets_take_data_where_they_need_it() -> None:
    mine = presets.preset(data="pairs.jsonl", base_model="someone/some-model")
    assert (mine.name, mine.task.source, mine.base_model) == ("data", "pairs.jsonl", "someone/some-model")
    assert isinstance(presets.preset().task, Pocket) and presets.preset().name == "pocket"
    for arguments in ({"name": "data"}, {"name": "pocket", "data": "pairs.jsonl"}, {"name": "galaxy"}):
        with pytest.raises(ValueError, match="preset"):
            presets.preset(**arguments)
