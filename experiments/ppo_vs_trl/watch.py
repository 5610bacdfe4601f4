"""What both sides share: the settings they are given, and one stopwatch and one scale for the two.

Knows torch and transformers only, for the peer's environment has no rlhf_kit.
"""

from __future__ import annotations

import csv
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

# What both optimise by: the kit's names, which peer.py translates.
PPO_SETTINGS = (
    "max_steps", "seed", "per_device_train_batch_size", "ppo_epochs", "num_minibatches", "max_completion_length",
    "temperature", "missing_eos_penalty", "kl_coef", "gamma", "gae_lambda", "clip_range", "value_clip_range", "vf_coef",
    "learning_rate", "adam_epsilon", "max_grad_norm",
)  # fmt: skip


def read_settings(path: str) -> tuple[dict[str, Any], Path]:
    """The settings of a run, and the folder they lie in, which is where the run writes."""
    settings = json.loads(Path(path).read_text())
    torch.set_num_threads(settings["threads"])
    return settings, Path(path).parent


class Watch(TrainerCallback):
    """Times each update, saves the policy every so many of them, and writes metrics.csv and measures.json at the end.

    An update's seconds run from the end of the one before to its own end: rollout, scores, optimisation and logging,
    without the saving. `seconds` are the wall's and `cpu_seconds` the process's own, which other work disturbs less.
    rewards: the names under which this trainer logs `objective` (reward, penalties and KL charged) and `kl`.
    """

    def __init__(
        self, settings: dict[str, Any], out: Path, save: Callable[[Path], None], names: dict[str, str]
    ) -> None:
        self.settings, self.out, self.save, self.names = settings, out, save, names
        self.rows: dict[int, dict[str, float]] = {}
        self.before = resident_bytes()
        self.began = self.started = self.cpu_started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()
        self._start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, cpu = time.perf_counter(), time.process_time()
        done, updates = state.global_step, self.settings["max_steps"]
        row = self.rows.setdefault(done, {"update": done})
        row |= {"seconds": now - self.started, "cpu_seconds": cpu - self.cpu_started}
        if done % self.settings["save_every"] == 0 or done == updates:
            self.save(self.out / f"checkpoint-{done}")
        if done == updates or done % max(1, updates // 5) == 0:
            left = (now - self.began) / done * (updates - done)
            print(f"    update {done}/{updates}  {row['seconds']:.1f} s  {left:.0f} s left in this run", flush=True)
        self._start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        row = self.rows.setdefault(state.global_step, {"update": state.global_step})
        row |= {ours: logs[theirs] for ours, theirs in self.names.items() if logs and theirs in logs}

    def write(self) -> None:
        """To be called after training: everything the trainer needs is still in memory then, and nothing else."""
        rows = [self.rows[update] for update in sorted(self.rows) if "seconds" in self.rows[update]]
        with (self.out / "metrics.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["update", "seconds", "cpu_seconds", *self.names], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        measures = {"before_bytes": self.before, "peak_bytes": peak_bytes(), **weights()}
        (self.out / "measures.json").write_text(json.dumps(measures, indent=2) + "\n")

    def _start(self) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()


def weights() -> dict[str, int]:
    """Bytes of the distinct parameter storages alive in this process: all, and those that belong to no adapter.

    Every module there is counts, whoever holds it, so that nothing is left out by not knowing where to look.
    """
    every: dict[int, int] = {}
    adapters: set[int] = set()
    for module in [each for each in gc.get_objects() if issubclass(type(each), nn.Module)]:
        for name, parameter in module.named_parameters():
            storage = parameter.untyped_storage()
            every[storage.data_ptr()] = storage.nbytes()
            if "lora_" in name:
                adapters.add(storage.data_ptr())
    base = sum(size for place, size in every.items() if place not in adapters)
    return {"weight_bytes": sum(every.values()), "base_weight_bytes": base}


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory of this process now, or its peak (VmHWM)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024


def peak_bytes() -> int:
    """The most memory this process ever had; of a GPU's, where there is one, what its allocator gave out at once."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not getrusage's ru_maxrss, in which a child process begins with its parent's peak.
    return resident_bytes("VmHWM")
