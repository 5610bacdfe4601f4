"""experiments/ppo_vs_trl and experiments/ppo_speed: what guards their numbers, on numbers by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from rlhf_kit import models
from rlhf_kit.rewards import RewardModel

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
sys.path[:0] = [str(EXPERIMENTS), str(EXPERIMENTS / "ppo_vs_trl")]  # as when a script of that folder is run

import compare  # noqa: E402
import ppo_speed  # noqa: E402
import watch  # noqa: E402

PROMPTS = ["hello , may i ask you something ?", "what does the otter eat ?", "may i ?"]
COMPLETIONS = [" the otter eats fish .", " fish .", " you may ."]

# --- beside TRL ------------------------------------------------------------------------------------------------------


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
def test_verdicts_on_seconds_and_on_copies(
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


def test_both_sides_are_given_the_settings_of_the_preset() -> None:
    preset = compare.presets.preset("pocket", 3)
    settings = compare.ppo_settings(preset, "full", updates=7, threads=1, micro_batch_size=16)
    given = {**preset.sampling, **preset.ppo, "seed": 3, "max_steps": 7, "micro_batch_size": 16}
    assert all(settings[name] == value for name, value in given.items() if name in settings)
    assert {"learning_rate", "kl_coef", "max_completion_length"} <= settings.keys() & given.keys()


def normalised(source: str, out: Path) -> str:
    """A copy of a reward model with a shift and a scale."""
    shutil.copytree(source, out)
    models.write_notes(out, shift=0.5, scale=2.0)
    return str(out)


def test_the_merged_reward_model_scores_as_its_adapter_does(tmp_path: Path, zoo: dict[str, str]) -> None:
    adapter, merged = normalised(zoo["lora-reward"], tmp_path / "adapter"), tmp_path / "merged"
    compare.merge_reward_model(Path(adapter), merged)
    expected, found = (RewardModel(path)(PROMPTS, COMPLETIONS) for path in (adapter, merged))
    assert found == pytest.approx(expected, abs=1e-4) and len({round(each, 3) for each in found}) == 3


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
@pytest.mark.skipif(not compare.PYTHONS[compare.TRL].exists(), reason="TRL 1.12 is not there: make peer")
def test_trl_optimises_the_reward_that_the_kit_does(tmp_path: Path, zoo: dict[str, str]) -> None:
    """Of completions that ended: shift and scale are in the head, and the score is that of the EOS."""
    path = normalised(zoo["full-reward"], tmp_path / "reward")
    tokenizer = models.load_tokenizer(path)
    pairs = zip(PROMPTS, COMPLETIONS, strict=True)
    rows = [tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"] for prompt, completion in pairs]
    argument = json.dumps([str(EXPERIMENTS / "ppo_vs_trl"), path, rows])
    command = [str(compare.PYTHONS[compare.TRL]), "-c", PEERS_REWARDS, argument]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    assert ran.returncode == 0, ran.stderr
    theirs = json.loads(ran.stdout.split("ANSWERS")[1])
    assert theirs == pytest.approx(RewardModel(path)(PROMPTS, COMPLETIONS), abs=1e-5)


# --- where the seconds go --------------------------------------------------------------------------------------------


def table(ours: float, growth: float, one_pass: float) -> pd.DataFrame:
    shares = [{"table": "shares", "mode": "full", "rollouts": 8, "length": 16, "seconds": 2.0, ppo_speed.OURS: ours}]
    points = [(n, 16, n**growth) for n in (16, 64)] + [(32, n, float(n)) for n in (8, 64)]
    rows = [{"table": "growth", "rollouts": n, "length": k, "seconds": s, "peak_gib": s} for n, k, s in points]
    passes = [
        {"table": "one pass", "mode": mode, "seconds": s, "apart": 0.0}
        for mode, s in (("one pass", one_pass), ("two passes", 1.0))
    ]
    return pd.DataFrame([*shares, *rows, *passes])


def test_verdicts_on_hand_numbers() -> None:
    good = ppo_speed.verdicts(table(ours=0.3, growth=1.0, one_pass=0.8))
    assert good[0].startswith("full: 15.0% of 2.00 s") and good[1].startswith("seconds against rollouts: exponent 1.00")
    assert all(line.endswith(": met") for line in good[:5]) and "(worth its code)" in good[5]
    bad = ppo_speed.verdicts(table(ours=0.31, growth=1.2, one_pass=1.0))
    assert [line.endswith("not met") for line in bad[:5]] == [True, True, True, False, False]
    assert "(not worth its code)" in bad[5]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "LoRA"])
def test_each_roles_forward_pass_is_counted_as_one(mode: str, tmp_path: Path) -> None:
    """A known delay in every decoder adds to "forward", and not to the kit's own code."""
    base, delay = ppo_speed.random_base(tmp_path / "base"), 0.05
    trainer = ppo_speed.make(base, tmp_path, {"mode": mode, "rollouts": 2, "length": 2}, 1)
    decoders = {models.decoder(module) for module, _ in trainer.roles.parts.values()}
    calls = []
    stopwatch = ppo_speed.Stopwatch(trainer)

    def slower(*_: object) -> None:
        calls.append(stopwatch.depth)
        time.sleep(delay)

    for decoder in decoders:
        decoder.register_forward_pre_hook(slower)
    trainer.train()
    stopwatch.stop()
    outside_generate = sum(depth == 1 for depth in calls)
    [update] = stopwatch.updates
    assert outside_generate >= 3 + 2 * 4 * 2  # three roles scored, two optimised in each of eight steps
    assert update["forward"] >= delay * outside_generate
    assert update[ppo_speed.OURS] < delay * outside_generate / 2


@pytest.mark.slow
def test_the_parts_sum_to_an_updates_seconds_and_one_pass_computes_what_two_do(tmp_path: Path) -> None:
    base = ppo_speed.random_base(tmp_path / "base")
    parts = ["generate", "forward", "backward", "optimizer step", ppo_speed.OURS]
    found = ppo_speed.timed(base, tmp_path, {"mode": "full", "rollouts": 2, "length": 4}, 1)
    assert all(found[part] > 0 for part in parts)
    assert sum(found[part] for part in parts) == pytest.approx(found["seconds"], rel=1e-6)
    assert found["peak_gib"] > 0.001
    passes = ppo_speed.one_pass(base, 1)
    assert [row["mode"] for row in passes] == ["two passes", "one pass"] and passes[0]["apart"] < 1e-5
