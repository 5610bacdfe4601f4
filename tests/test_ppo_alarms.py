"""rlhf_kit.ppo.alarms: each rule on hand numbers, and a real run that goes wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_ppo import Zoo, make
from transformers import TrainerState

from rlhf_kit.ppo.alarms import Alarms, check, repetition

HEALTHY = {
    "kl": 0.5, "entropy": 1.0, "completion_length": 10.0, "repetition": 0.1, "disagreement": 0.2, "value_loss": 0.1,
    "unfinished": 0.05,
}  # fmt: skip


def test_a_healthy_run_raises_nothing() -> None:
    assert not list(check([HEALTHY] * 20))
    assert not list(check([{k: v for k, v in HEALTHY.items() if k != "disagreement"}]))
    early = [HEALTHY] * 4 + [HEALTHY | {"value_loss": 99.0}]
    assert not list(check(early)), "value loss needs a few updates to compare with"


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
    [(found, message, _)] = check([HEALTHY] * 6 + [HEALTHY | {metric: beyond}])
    assert found == name and words in message and ": " in message  # what is seen, then what to try
    assert not list(check([HEALTHY] * 6 + [HEALTHY | {metric: inside}]))


@pytest.mark.parametrize(
    ("text", "share"), [("", 0), ("a b c d", 0), ("a b c a b c", 0.5), ("a a a a a", 1), ("x a b c a b c y", 2 / 6)]
)
def test_repetition_is_the_share_of_runs_of_three_words_that_occur_again(text: str, share: float) -> None:
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(("length", "worst"), [(99.0, "a long one"), (1.0, "short")])
def test_an_alarm_shows_its_worst_samples_and_is_said_again_after_ten_updates(
    length: float, worst: str, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {"prompt": ["?"] * 4, "completion": ["short", "a b", "a b c", "a long one"], "n_tokens": [1, 2, 3, 4]}
    alarms, state = Alarms(lambda: pd.DataFrame(samples)), TrainerState()
    for state.global_step in range(1, 24):
        changed = {"completion_length": length} if state.global_step > 1 else {}
        state.log_history.append(HEALTHY | changed | {"loss": 0.0})
        alarms.on_loss(state, {})
    assert [row["step"] for row in state.log_history if row.get("alarm") == "length"] == [2, 12, 22]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 * 4 and worst in said[1]  # each with three samples


def pays_for_one_word(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [float(text.split().count("c")) for text in completions]


@pytest.mark.slow
def test_a_policy_paid_for_one_word_sets_the_alarms_off(
    zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"kl_coef": 0.0, "missing_eos_penalty": 0.0, "max_steps": 8, "learning_rate": 1e-2}
    settings |= {"max_completion_length": 12, "ppo_epochs": 4, "micro_batch_size": 16, "num_minibatches": 1}
    settings |= {"per_device_train_batch_size": 16, "value_model": None}
    trainer = make(zoo, "words", tmp_path, pays_for_one_word, ["a", "b"] * 8, **settings)
    trainer.train()
    assert len(trainer.samples) == 16
    raised = {row["alarm"] for row in trainer.state.log_history if "alarm" in row}
    assert {"kl", "entropy", "repetition", "unfinished"} <= raised
    printed = capsys.readouterr().out.splitlines()
    [repeating] = [i for i, line in enumerate(printed) if "repeat themselves" in line]
    assert printed[repeating].startswith("  PPO alarm at update") and "c c c c c" in printed[repeating + 1]
    trainer.remove_callback(Alarms)
    assert not [c for c in trainer.callback_handler.callbacks if isinstance(c, Alarms)]
