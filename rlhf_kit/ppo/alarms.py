"""Warnings while PPO runs: each alarm is a rule over the log and shows the worst samples."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import pandas as pd
from transformers import TrainerState

from rlhf_kit.progress import LossCallback


def check(rows: Sequence[dict[str, float]]) -> Iterator[tuple[str, str, str]]:
    """Name, message and the column that sorts the worst samples of each alarm, from the log rows of all updates."""
    first, now = rows[0], rows[-1]
    if now["kl"] > 10:
        seen = f"KL is {now['kl']:.1f} nats per sequence (limit 10)"
        yield "kl", f"{seen}: raise kl_coef, set adaptive_kl_target, or lower learning_rate", "kl"
    if now["entropy"] < 0.3 * first["entropy"]:
        seen = f"entropy fell from {first['entropy']:.2f} to {now['entropy']:.2f} nats per token"
        yield "entropy", f"{seen}: the policy hardly varies; raise kl_coef or entropy_coef", "reward"
    factor = now["completion_length"] / first["completion_length"]
    if not 1 / 2 <= factor <= 2:
        seen = f"length went from {first['completion_length']:.0f} to {now['completion_length']:.0f} tokens"
        column = "n_tokens" if factor > 1 else "-n_tokens"
        yield "length", f"{seen}: look whether the reward pays for length", column
    if now["repetition"] > first["repetition"] + 0.25:
        seen = f"{now['repetition']:.0%} of completions repeat themselves, {first['repetition']:.0%} did at first"
        yield "repetition", f"{seen}: raise kl_coef, or make the reward charge for repetition", "repetition"
    if now.get("disagreement", 0.0) > 2 * first.get("disagreement", 0.0):
        seen = f"the reward models' disagreement rose from {first['disagreement']:.2f} to {now['disagreement']:.2f}"
        yield "disagreement", f"{seen}: the policy leaves their training data; raise kl_coef", "disagreement"
    before = [row["value_loss"] for row in rows[-11:-1]]
    if len(before) >= 5 and now["value_loss"] > 10 * median(before):
        seen = f"value loss is {now['value_loss']:.3g}, over the last updates it was {median(before):.3g}"
        yield "value_loss", f"{seen}: lower learning_rate or vf_coef", "reward"
    if now["unfinished"] > 0.3:
        seen = f"{now['unfinished']:.0%} of completions never ended (limit 30%)"
        yield "unfinished", f"{seen}: raise max_completion_length or missing_eos_penalty", "n_tokens"


def repetition(text: str) -> float:
    """Share of the runs of three words of a text that occur more than once; 0 where there are fewer words."""
    words = text.split()
    counts = Counter(zip(words, words[1:], words[2:], strict=False))
    return sum(count for count in counts.values() if count > 1) / max(1, counts.total())


class Alarms(LossCallback):
    """Checks every update of a run; prints, and logs, an alarm with its three worst samples at most every ten."""

    def __init__(self, samples: Callable[[], pd.DataFrame]) -> None:
        self.samples = samples

    def on_loss(self, state: TrainerState, logs: dict[str, float]) -> None:
        for name, message, worst_by in check([row for row in state.log_history if "loss" in row]):
            said = [row["step"] for row in state.log_history if row.get("alarm") == name]
            if said and state.global_step - said[-1] < 10:
                continue
            state.log_history.append({"alarm": name, "message": message, "step": state.global_step})
            print(f"  PPO alarm at update {state.global_step}: {message}", flush=True)
            by = worst_by.lstrip("-")
            worst = self.samples().sort_values(by, ascending=worst_by.startswith("-"), kind="stable").head(3)
            for value, prompt, completion in worst[[by, "prompt", "completion"]].itertuples(index=False):
                print(f"    {by} {value:.2f}  {prompt!r} -> {completion!r}", flush=True)
