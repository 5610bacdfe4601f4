"""rlhf_kit.ppo.alarms: each rule on hand numbers, and real runs that go wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_ppo import Zoo, make

from rlhf_kit.ppo.alarms import Alarms, Limits, check, repetition, worst

HEALTHY = {
    "kl": 0.5, "entropy": 1.0, "completion_length": 10.0, "repetition": 0.1, "disagreement": 0.2, "value_loss": 0.1,
    "unfinished": 0.05,
}  # fmt: skip


def test_a_healthy_run_raises_nothing() -> None:
    assert check([HEALTHY] * 20) == []
    assert check([{k: v for k, v in HEALTHY.items() if k != "disagreement"}]) == []


@pytest.mark.parametrize(
    ("name", "metric", "beyond", "inside", "words"),
    [
        ("kl", "kl", 10.1, 9.9, "10.1 nats per sequence"),
        ("entropy", "entropy", 0.29, 0.31, "from 1.00 to 0.29"),
        ("length", "completion_length", 20.1, 19.9, "from 10 to 20"),
        ("length", "completion_length", 4.9, 5.1, "from 10 to 5"),
        ("repetition", "repetition", 0.36, 0.34, "36% of completions"),
        ("disagreement", "disagreement", 0.41, 0.39, "from 0.20 to 0.41"),
        ("value_loss", "value_loss", 1.01, 0.99, "was 0.1"),
        ("unfinished", "unfinished", 0.31, 0.29, "31% of completions"),
    ],
)
def test_each_rule_goes_off_just_beyond_its_limit(
    name: str, metric: str, beyond: float, inside: float, words: str
) -> None:
    [alarm] = check([HEALTHY] * 6 + [HEALTHY | {metric: beyond}])
    assert alarm.name == name and words in alarm.message and ": " in alarm.message  # what is seen, then what to try
    assert check([HEALTHY] * 6 + [HEALTHY | {metric: inside}]) == []


def test_value_loss_needs_a_few_updates_to_compare_with() -> None:
    assert check([HEALTHY] * 4 + [HEALTHY | {"value_loss": 99.0}]) == []


@pytest.mark.parametrize(
    ("text", "share"),
    [("", 0), ("a b", 0), ("a b c d", 0), ("a b c a b c", 0.5), ("a a a a a", 1), ("x a b c a b c y", 2 / 6)],
)
def test_repetition_is_the_share_of_three_word_runs_seen_before(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


def test_the_worst_samples_come_first() -> None:
    frame = pd.DataFrame({"kl": [1.0, 3.0, 2.0]})
    assert worst(frame, "kl", 2)["kl"].tolist() == [3.0, 2.0]
    assert worst(frame, "-kl", 1)["kl"].tolist() == [1.0]


def pays_for_one_word(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(text.split().count("c")) for text in completions]


@pytest.mark.slow
def test_a_policy_paid_for_one_word_sets_the_alarms_off_with_its_samples(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alarms = Alarms(n_samples=2)
    settings: dict[str, Any] = {"kl_coef": 0.0, "missing_eos_penalty": 0.0, "max_steps": 16, "learning_rate": 3e-3}
    settings |= {"max_completion_length": 12, "ppo_epochs": 4, "per_device_train_batch_size": 32}
    trainer = make(
        zoo, "words", tmp_path, pays_for_one_word, ["a", "b"] * 16, value_model=None, callbacks=[alarms], **settings
    )
    trainer.train()
    raised = {row["alarm"] for row in alarms.raised}
    assert {"kl", "entropy", "repetition", "unfinished"} <= raised
    assert [row for row in trainer.state.log_history if "alarm" in row] == alarms.raised
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if line.startswith("  PPO alarm at update")]
    assert len(said) == len(alarms.raised)
    after = printed.splitlines()[printed.splitlines().index(next(line for line in said if "repeat" in line)) + 1]
    assert after.count("c c c c c") and " -> " in after
    # Said again only every ten updates.
    steps = [row["step"] for row in alarms.raised if row["alarm"] == "kl"]
    assert all(later - earlier >= 10 for earlier, later in zip(steps, steps[1:], strict=False))


def test_alarms_are_on_by_default_and_can_be_taken_off(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, max_steps=1)
    [alarms] = [c for c in trainer.callback_handler.callbacks if isinstance(c, Alarms)]
    assert alarms.limits == Limits()
    trainer.train()
    assert alarms.samples().equals(trainer.samples) and len(trainer.samples) == 8
    trainer.remove_callback(Alarms)
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, Alarms)]
    own = Alarms(Limits(kl=-1.0))
    trainer = make(zoo, "full", tmp_path / "own", callbacks=[own], max_steps=1)
    trainer.train()
    assert own.raised[0]["alarm"] == "kl" and own.raised[0]["step"] == 1
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, Alarms)] == [own]
