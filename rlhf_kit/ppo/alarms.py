"""Warnings while PPO runs: each alarm is a rule over the log and shows the worst samples."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from transformers import TrainerControl, TrainerState, TrainingArguments

from rlhf_kit.progress import LossCallback


@dataclass(frozen=True)
class Limits:
    """The limits beyond which an alarm is raised; "first" is the value at the first update.

    kl: nats per sequence; entropy: smallest share of the first; length: largest factor of the first, up or down;
    repetition: largest rise over the first in the share of completions that repeat themselves; disagreement: largest
    factor of the first; value_loss: largest factor of the median of the last ten; unfinished: largest share.
    """

    kl: float = 10.0
    entropy: float = 0.3
    length: float = 2.0
    repetition: float = 0.25
    disagreement: float = 2.0
    value_loss: float = 10.0
    unfinished: float = 0.3


class Alarm(NamedTuple):
    """A broken rule: its name, a message (what happened, what to try) and the column that sorts the worst samples."""

    name: str
    message: str
    worst_by: str


def check(rows: Sequence[dict[str, float]], limits: Limits = Limits()) -> list[Alarm]:  # noqa: B008 (it is frozen)
    """The alarms of the last update of a run, from the log rows of all its updates."""
    first, now = rows[0], rows[-1]
    found = []

    def alarm(name: str, message: str, worst_by: str) -> None:
        found.append(Alarm(name, message, worst_by))

    if now["kl"] > limits.kl:
        seen = f"KL is {now['kl']:.1f} nats per sequence (limit {limits.kl:g})"
        alarm("kl", f"{seen}: raise kl_coef, set adaptive_kl_target, or lower learning_rate", "kl")
    if now["entropy"] < limits.entropy * first["entropy"]:
        seen = f"entropy fell from {first['entropy']:.2f} to {now['entropy']:.2f} nats per token"
        alarm("entropy", f"{seen}: the policy hardly varies; raise kl_coef or entropy_coef", "reward")
    factor = now["completion_length"] / first["completion_length"]
    if not 1 / limits.length <= factor <= limits.length:
        seen = f"length went from {first['completion_length']:.0f} to {now['completion_length']:.0f} tokens"
        alarm("length", f"{seen}: look whether the reward pays for length", "n_tokens" if factor > 1 else "-n_tokens")
    if now["repetition"] > first["repetition"] + limits.repetition:
        seen = f"{now['repetition']:.0%} of completions repeat themselves, {first['repetition']:.0%} did at first"
        alarm("repetition", f"{seen}: raise kl_coef, or make the reward charge for repetition", "repetition")
    if now.get("disagreement", 0.0) > limits.disagreement * first.get("disagreement", 0.0):
        seen = f"the reward models' disagreement rose from {first['disagreement']:.2f} to {now['disagreement']:.2f}"
        alarm("disagreement", f"{seen}: the policy leaves what they were trained on; raise kl_coef", "disagreement")
    before = [row["value_loss"] for row in rows[-11:-1]]
    if len(before) >= 5 and now["value_loss"] > limits.value_loss * statistics.median(before):
        seen = f"value loss is {now['value_loss']:.3g}, over the last updates it was {statistics.median(before):.3g}"
        alarm("value_loss", f"{seen}: lower learning_rate or vf_coef", "reward")
    if now["unfinished"] > limits.unfinished:
        seen = f"{now['unfinished']:.0%} of completions never ended (limit {limits.unfinished:.0%})"
        alarm("unfinished", f"{seen}: raise max_completion_length or missing_eos_penalty", "n_tokens")
    return found


def repetition(text: str, n: int = 3) -> float:
    """Share of the word n-grams of a text that occur more than once; 0 where there are fewer than n words."""
    words = text.split()
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    return sum(count for count in counts.values() if count > 1) / max(1, counts.total())


class Alarms(LossCallback):
    """Checks every update of a PPO run and prints each alarm with the samples that show it; on by default.

    An alarm that stays on is printed again every `again` updates. All are kept in `raised` and in the trainer's log.
    """

    def __init__(self, limits: Limits | None = None, again: int = 10, n_samples: int = 3) -> None:
        self.limits = limits or Limits()
        self.again = again
        self.n_samples = n_samples
        self.samples: Callable[[], pd.DataFrame] = pd.DataFrame  # PPOTrainer sets this to its last rollouts
        self.raised: list[dict[str, Any]] = []
        self.last_said: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.raised, self.last_said = [row for row in state.log_history if "alarm" in row], {}

    def on_loss(self, state: TrainerState, logs: dict[str, float]) -> None:
        for alarm in check([row for row in state.log_history if "loss" in row], self.limits):
            if state.global_step - self.last_said.get(alarm.name, -self.again) < self.again:
                continue
            self.last_said[alarm.name] = state.global_step
            self.raised.append({"alarm": alarm.name, "message": alarm.message, "step": state.global_step})
            state.log_history.append(self.raised[-1])
            print(f"  PPO alarm at update {state.global_step}: {alarm.message}", flush=True)
            for _, sample in worst(self.samples(), alarm.worst_by, self.n_samples).iterrows():
                value = f"{alarm.worst_by.lstrip('-')} {sample[alarm.worst_by.lstrip('-')]:.2f}"
                print(f"    {value}  {sample['prompt']!r} -> {sample['completion']!r}", flush=True)


def worst(samples: pd.DataFrame, by: str, n: int) -> pd.DataFrame:
    """The `n` rollouts with the highest `by` (the lowest of "-column")."""
    return samples.sort_values(by.lstrip("-"), ascending=by.startswith("-"), kind="stable").head(n)
