"""Progress of long work with the time left: a line in a terminal, a live table in a notebook."""

import math
import sys
import time
import warnings
from typing import Any

import datasets
import pandas as pd
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging

# What a person wants to see of a run, in this order, where it is logged at all.
SHOWN = ["reward", "kl", "entropy", "completion_length", "loss"]
SHOWN += ["accuracy", "rewards/accuracies", "mean_token_accuracy"]
TABLE_ROWS = 12


def quiet() -> None:
    """Keep the libraries' bars and notes off the page; errors still show, and this kit says itself what it is doing."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|peft|accelerate|bitsandbytes|datasets)(\.|$)")


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds: 75 -> '1:15'."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Countdown:
    """Prints ten times on the way how much of `total` is done, and how long the rest will take."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.started, self.tenths = label, total, time.monotonic(), 0

    def at(self, done: int) -> None:
        """Called each time one or several more are done."""
        if 10 * done // self.total > self.tenths:
            self.tenths = 10 * done // self.total
            left = (time.monotonic() - self.started) / done * (self.total - done)
            print(f"  {self.label}  {done}/{self.total}  left {clock(left)}", flush=True)


class LossCallback(TrainerCallback):
    """Calls `on_loss(state, logs)` for each log that has a loss, in one process: not for evaluations and summaries."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs and state.is_world_process_zero:
            self.on_loss(state, logs)


class ProgressCallback(LossCallback):
    """Shows what a trainer is doing each `every` steps (default: ten times a run), and how long it will take yet."""

    def __init__(self, label: str, every: int | None = None) -> None:
        self.label, self.every = label, every

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()
        self.rows: list[dict[str, str]] = []
        self.first_step = self.next_shown = state.global_step

    def on_loss(self, state: TrainerState, logs: dict[str, float]) -> None:
        done = state.global_step
        if done < self.next_shown and done != state.max_steps:
            return
        self.next_shown = done + (self.every or max(1, state.max_steps // 10))
        left = (time.monotonic() - self.started) / max(1, done - self.first_step) * (state.max_steps - done)
        row = {"step": f"{done}/{state.max_steps}", "left": clock(left)}
        row |= {name: f"{logs[name]:.3f}" for name in SHOWN if name in logs}
        ipython = sys.modules.get("IPython")
        if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
            print(f"  {self.label}  " + "  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            return
        self.rows.append(row)
        step = math.ceil(len(self.rows) / TABLE_ROWS)
        table = pd.DataFrame(self.rows[::-step][::-1]).to_html(index=False, na_rep="")
        html = ipython.display.HTML(f"<b>{self.label}</b>{table}")
        # One display that is updated keeps its last state in the saved notebook; a progress bar would freeze at 0%.
        ipython.display.display(html, display_id=f"{self.label} {self.started}", update=len(self.rows) > 1)
