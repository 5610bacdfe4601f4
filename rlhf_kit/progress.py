"""Progress of long work with the time left: a line in a terminal, a live table in a notebook."""

from __future__ import annotations

import sys
import time
import warnings
from typing import Any

import datasets
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

# What a person wants to see of a run, in this order, where it is logged at all.
SHOWN = (
    "reward",
    "kl",
    "entropy",
    "completion_length",
    "loss",
    "accuracy",
    "rewards/accuracies",
    "mean_token_accuracy",
)
TABLE_ROWS = 12


def quiet() -> None:
    """Keep the libraries' bars and notes off the page; errors still show, and this kit says itself what it is doing."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    warnings.filterwarnings("ignore", module=r"(torch|transformers|trl|peft|accelerate|bitsandbytes|datasets)(\.|$)")


def in_notebook() -> bool:
    """Whether output goes to a Jupyter page."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds: 75 -> '1:15'."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class Countdown:
    """Says ten times on the way how much of `total` is done, and how long the rest will take."""

    def __init__(self, label: str, total: int) -> None:
        self.label = label
        self.total = total
        self.started = time.monotonic()
        self.tenths = 0

    def at(self, done: int, **values: float) -> None:
        """Called each time one or several more are done, with what there is to tell."""
        if 10 * done // self.total > self.tenths:
            self.tenths = 10 * done // self.total
            left = (time.monotonic() - self.started) / done * (self.total - done)
            told = "".join(f"  {name} {value:.3f}" for name, value in values.items())
            print(f"  {self.label}  {done}/{self.total}  left {clock(left)}{told}", flush=True)


class LossCallback(TrainerCallback):
    """Is told of each log that has a loss, in one process: not of evaluations and summaries."""

    def on_loss(self, state: TrainerState, logs: dict[str, float]) -> None:
        """What to do with the log of `state.global_step`."""
        raise NotImplementedError

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "loss" in logs and state.is_world_process_zero:
            self.on_loss(state, logs)


class ProgressCallback(LossCallback):
    """Says what a trainer is doing each `every` steps (default: ten times a run), and how long it will take yet."""

    def __init__(self, label: str, every: int | None = None) -> None:
        self.label = label
        self.every = every
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()
        self.first_step = self.next_shown = 0
        self.handle: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started, self.rows, self.handle = time.monotonic(), [], None
        self.first_step = self.next_shown = state.global_step

    def on_loss(self, state: TrainerState, logs: dict[str, float]) -> None:
        done = state.global_step
        if done < self.next_shown and done != state.max_steps:
            return
        self.next_shown = done + (self.every or max(1, state.max_steps // 10))
        spent = time.monotonic() - self.started
        left = spent / max(1, done - self.first_step) * (state.max_steps - done)
        row = {"step": f"{done}/{state.max_steps}", "left": clock(left)} | {k: logs[k] for k in SHOWN if k in logs}
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        cells = {name: f"{value:.3f}" if isinstance(value, float) else value for name, value in row.items()}
        if not in_notebook():
            print(f"  {self.label}  " + "  ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
            return
        from IPython.display import HTML, display

        self.rows.append(cells)
        step = -(-len(self.rows) // TABLE_ROWS)
        shown = self.rows[::-1][::step][::-1]
        head = "".join(f"<th>{name}</th>" for name in cells)
        body = "".join("<tr>" + "".join(f"<td>{value}</td>" for value in line.values()) + "</tr>" for line in shown)
        table = HTML(f"<b>{self.label}</b><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
        # One display that is updated keeps its last state in the saved notebook; a progress bar would freeze at 0%.
        if self.handle is None:
            self.handle = display(table, display_id=True)
        else:
            self.handle.update(table)
