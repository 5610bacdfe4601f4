"""experiments/ppo_vs_trl: its numbers on numbers by hand, and both sides run at tiny size as the driver runs them.

TRL's side needs the environment of `make peer`; where there is none its run is skipped, and only that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from rlhf_kit import models
from rlhf_kit.rewards import RewardModel
from rlhf_kit.tasks import pocket

FOLDER = Path(__file__).resolve().parent.parent / "experiments" / "ppo_vs_trl"
sys.path.insert(0, str(FOLDER))  # the scripts find each other beside them, as they do when they are run

import compare  # noqa: E402
import watch  # noqa: E402

NEEDS_PEER = pytest.mark.skipif(not compare.PYTHONS[compare.TRL].exists(), reason="TRL 1.12 is not there: make peer")
PROMPTS = ["hello , may i ask you something ?", "what does the otter eat ?", "may i ?"]
COMPLETIONS = [" the otter eats fish .", " fish .", " you may ."]


@pytest.fixture
def reward_models(zoo: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """A full reward model and an adapter, normalised."""
    found = {kind: str(shutil.copytree(zoo[f"{kind}-reward"], tmp_path / kind)) for kind in ("full", "lora")}
    for path in found.values():
        models.write_notes(path, shift=0.5, scale=2.0)
    return found


def checkpoint(model: str, step: int, kl: float, rewards: list[float], seed: int = 0) -> pd.DataFrame:
    """Two samples of each prompt around its `rewards`; gold is ten times the proxy."""
    rows = [
        {"model": model, "seed": seed, "step": step, "prompt_id": i, "sample": k, "kl": kl + way, "proxy": reward + way}
        for i, reward in enumerate(rewards)
        for k, way in enumerate((-0.01, 0.01))
    ]
    return pd.DataFrame(rows).assign(gold=lambda frame: 10 * frame["proxy"])


def test_rewards_at_a_kl_lie_between_the_checkpoints_that_bracket_it() -> None:
    """sqrt(0.25) is a quarter of the way from sqrt(0.16) to sqrt(0.64): 0.5 of 0.4 to 0.8."""
    parts = [("SFT", 0, 0.0, [0.0, 0.0]), ("A", 5, 0.16, [1.0, 2.0]), ("A", 9, 0.64, [2.0, 6.0])]
    rows = pd.concat(checkpoint(*part) for part in parts)
    for kl, expected in ((0.25, [1.25, 3.0]), (0.04, [0.5, 1.0]), (0.64, [2.0, 6.0]), (0.0, [0.0, 0.0])):
        found = compare.at_kl(rows, kl).set_index("prompt_id")
        assert found["proxy"].tolist() == pytest.approx(expected)
        assert found["gold"].tolist() == pytest.approx([10 * each for each in expected])


def test_a_checkpoint_that_another_beats_at_less_kl_is_not_on_the_frontier() -> None:
    """Step 5 is as far as step 12 and earns less; steps 9 and 18 are farther than step 15 and earn less."""
    points = [(5, 0.5, 1.0), (9, 0.9, 2.5), (12, 0.5, 3.0), (15, 0.8, 4.0), (18, 1.0, 3.5)]
    parts = [checkpoint("A", step, kl, [reward]) for step, kl, reward in points]
    rows = pd.concat([checkpoint("SFT", 0, 0.0, [0.0]), *parts])
    assert compare.frontier(rows).index.tolist() == [0, 12, 15]
    assert compare.at_kl(rows, 0.5)["proxy"].tolist() == pytest.approx([3.0])
    with pytest.raises(ValueError, match="ends at a KL of 0.8 nats and does not reach 0.9"):
        compare.at_kl(rows, 0.9)


@pytest.mark.parametrize(("kit", "trl", "verdict"), [(1.0, 1.0, "met"), (1.0, 1.1, "not met")])
def test_the_verdict_on_rewards_is_that_of_equal_kl_and_not_of_the_end(kit: float, trl: float, verdict: str) -> None:
    """Two seeds; at KL 1 the kit's rewards are `kit` and TRL's, which went on to KL 4, `trl`, on every prompt."""
    points = [("SFT", 0, 0.0, 0.0), (compare.KIT, 5, 1.0, kit), (compare.TRL, 5, 1.0, trl)]
    points.append((compare.TRL, 9, 4.0, trl + 3))
    parts = [checkpoint(name, step, kl, [each] * 3, seed) for seed in (0, 1) for name, step, kl, each in points]
    table = compare.reward_table(pd.concat(parts, ignore_index=True), kl_coef=0.2).set_index("quantity")
    equal = table.loc["proxy at equal KL"]
    assert (equal["kit"], equal["trl"]) == (pytest.approx(kit), pytest.approx(trl))
    assert (equal["value"], equal["lo"], equal["hi"]) == (pytest.approx(kit - trl),) * 3
    assert equal["verdict"] == verdict
    assert table.loc["the equal KL [nats/sequence]", "kit"] == pytest.approx(1.0)
    assert table.loc["proxy at the end", "trl"] == pytest.approx(trl + 3)
    assert table.loc["proxy - kl_coef KL at the end", "trl"] == pytest.approx(trl + 3 - 0.2 * 4.0)


@pytest.mark.parametrize(
    ("kit", "copies", "seconds_verdict", "copies_verdict"),
    [
        ([1.0, 1.8], (1.0, 3.0), "met", "met"),
        ([1.0, 2.4], (2.0, 3.0), "not met", "not met"),
        ([2.4, 2.4], (1.0, 2.0), "not met", "not met"),
        ([1.0], (1.06, 3.0), "no interval: more seeds", "not met"),
    ],
)
def test_seconds_are_paired_by_seed_and_judged_by_the_upper_end_and_copies_are_one_against_three(
    kit: list[float], copies: tuple[float, float], seconds_verdict: str, copies_verdict: str
) -> None:
    """Of TRL's 2 and 4 seconds: (1/2 + 1.8/4) / 2 = 0.475, at most 0.5; (1/2 + 2.4/4) / 2 = 0.55."""
    trl = [2.0, 4.0][: len(kit)]
    rows = [
        {"model": name, "mode": mode, "seed": seed, "seconds per update": each, "copies of the base": held}
        for mode in ("full", "lora")
        for name, seconds, held in ((compare.KIT, kit, copies[0]), (compare.TRL, trl, copies[1]))
        for seed, each in enumerate(seconds)
    ]
    table = compare.cost_table(pd.DataFrame(rows)).set_index(["mode", "quantity"])
    row, ratios = table.loc[("full", "seconds per update")], [a / b for a, b in zip(kit, trl, strict=True)]
    assert row["value"] == pytest.approx(sum(ratios) / len(ratios))
    if len(kit) > 1:
        assert (row["lo"], row["hi"]) == (pytest.approx(min(ratios)), pytest.approx(max(ratios)))
    verdicts = table["verdict"].to_dict()
    assert verdicts.pop(("full", "seconds per update")) == seconds_verdict
    assert verdicts.pop(("lora", "copies of the base")) == copies_verdict
    assert set(verdicts.values()) == {""}


def test_weights_are_counted_by_storage_and_adapters_apart() -> None:
    before = watch.weights()
    base = torch.nn.Linear(10, 10, bias=False)
    base.tied = torch.nn.Linear(10, 10, bias=False)
    base.tied.weight = base.weight
    adapted = torch.nn.ModuleDict({"base": base, "lora_A": torch.nn.Linear(10, 2, bias=False)})
    after = watch.weights()
    assert after["base_weight_bytes"] - before["base_weight_bytes"] == 400
    assert after["weight_bytes"] - before["weight_bytes"] == 480
    assert len(adapted) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (compare.KIT, "lora"),
        pytest.param(compare.TRL, "full", marks=NEEDS_PEER),
        pytest.param(compare.TRL, "lora", marks=NEEDS_PEER),
    ],
)
def test_a_side_trains_saves_and_says_what_it_took(
    tmp_path: Path, zoo: dict[str, str], reward_models: dict[str, str], name: str, mode: str
) -> None:
    """As the driver runs it. In full there is one copy of the base per role; with LoRA TRL holds three, the kit two.

    (The reward model has weights of its own here.)
    """
    preset = compare.presets.preset("pocket", 3)
    settings = compare.ppo_settings(preset, mode, updates=3, threads=1, micro_batch_size=2)
    assert settings["seed"] == 3 and settings["learning_rate"] == preset.ppo["learning_rate"]
    settings |= {"per_device_train_batch_size": 8, "max_completion_length": 6, "save_every": 2}
    prompts = [row["prompt"] for row in pocket.prompts(pocket.world(), "train")][:20]
    run = compare.train_policy(tmp_path, name, settings, zoo["full"], reward_models["full"], prompts)
    assert [step for step, _ in compare.checkpoints(run.directory)] == [2, 3]
    assert len(json.loads((run.directory / "prompts.json").read_text())) == 16
    metrics = pd.read_csv(run.directory / "metrics.csv")
    assert metrics["update"].tolist() == [1, 2, 3]
    assert metrics.notna().all(axis=None) and (metrics["seconds"] > 0).all()
    assert metrics["kl"][0] == pytest.approx(0.0, abs=1e-5)
    start, end = models.load_causal(zoo["full"]), models.load_causal(run.directory / "checkpoint-3")
    ids = torch.arange(2, 12).unsqueeze(0)
    assert not torch.equal(start(input_ids=ids).logits, end(input_ids=ids).logits)
    whole = sum(each.nbytes for each in start.parameters())
    # An untied base here: value and reward models have no output head.
    headless = sum(each.nbytes for each in models.load_backbone(zoo["full"]).parameters()) / whole
    expected = 2 + 2 * headless if mode == "full" else 1 + (1 if name == compare.KIT else 2) * headless
    assert compare.cost(run, whole)["copies of the base"] == pytest.approx(expected, abs=0.01)


def test_the_merged_reward_model_scores_as_its_adapter_does(tmp_path: Path, reward_models: dict[str, str]) -> None:
    compare.merge_reward_model(Path(reward_models["lora"]), tmp_path / "merged")
    adapter, merged = (RewardModel(path)(PROMPTS, COMPLETIONS) for path in (reward_models["lora"], tmp_path / "merged"))
    assert merged == pytest.approx(adapter, abs=1e-4) and len({round(each, 3) for each in merged}) == 3


PEERS_REWARDS = """
import json, sys
folder, path, rows = json.loads(sys.argv[1])
sys.path.insert(0, folder)
import torch
import peer
from trl.experimental.utils import get_reward
model = peer.normalised_reward_model(path).eval()
rewards = [get_reward(model, torch.tensor([row]), 1, 2)[1].item() for row in rows]
print("ANSWERS" + json.dumps(rewards))
"""


@pytest.mark.slow
@NEEDS_PEER
def test_trl_optimises_the_reward_that_the_kit_does(reward_models: dict[str, str]) -> None:
    """Of completions that ended: shift and scale are in the head, and the score is that of the EOS."""
    path = reward_models["full"]
    tokenizer = models.load_tokenizer(path)
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    rows = [tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"] for prompt, completion in pairs]
    command = [str(compare.PYTHONS[compare.TRL]), "-c", PEERS_REWARDS, json.dumps([str(FOLDER), path, rows])]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert ran.returncode == 0, ran.stderr
    theirs = json.loads(ran.stdout.split("ANSWERS")[1])
    assert theirs == pytest.approx(RewardModel(path)(PROMPTS, COMPLETIONS), abs=1e-5)
