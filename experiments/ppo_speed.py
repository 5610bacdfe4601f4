"""Where does the time of a PPO update go, and how do time and memory grow with rollouts and with length?

    python experiments/ppo_speed.py                 # the pocket base's shape; about ten minutes of a core
    python experiments/ppo_speed.py --quick         # a minute: two sizes and one update of each

Three tables in one run, on whatever device is there, with random weights so that completions run to their full length:
  shares   seconds of an update in generate, forward, backward and optimizer step; the rest is this kit's own code
  growth   seconds and peak GiB of an update against rollouts (x1 to x16) and completion length (x1 to x8)
  one pass reference and value over one 4-bit base in a single pass with mixed adapters, against two passes
Written before the run: the rest is at most 15% of an update; both growths are linear, which is to say that the exponent
of a power law through the points is at most 1.1; one pass would be worth its code from 10% less time on.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from ppo_memory import measure
from transformers import AutoConfig, LlamaForCausalLM

from rlhf_kit import PPOConfig, PPOTrainer, models, plots, runs
from rlhf_kit.notebook import set_threads
from rlhf_kit.ppo.alarms import Alarms
from rlhf_kit.progress import clock, quiet
from rlhf_kit.tasks import Pocket

OUT = Path("results/ppo-speed")
ROLLOUTS, LENGTHS = (16, 32, 64, 128, 256), (8, 16, 32, 64)
MODES = ("full", "LoRA", "4-bit + LoRA")
OURS = "this kit's own code"


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes and one update of each")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    quiet()
    set_threads(options.threads)
    updates = 1 if options.quick else 5
    rollouts, lengths, middle = ((2, 4), (8, 16), 4) if options.quick else (ROLLOUTS, LENGTHS, 32)
    where = {"device": runs.device(), "threads": torch.get_num_threads(), **runs.versions()}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        base = random_base(Path(folder) / "base")
        cases = [{"table": "shares", "mode": mode, "rollouts": rollouts[-1] // 2, "length": 16} for mode in MODES]
        cases += [{"table": "growth", "mode": "full", "rollouts": n, "length": 16} for n in rollouts]
        cases += [{"table": "growth", "mode": "full", "rollouts": middle, "length": n} for n in lengths]
        started = time.monotonic()
        for i, case in enumerate(cases):
            rows.append(case | timed(base, Path(folder), case, updates) | where)
            left = (time.monotonic() - started) / (i + 1) * (len(cases) - i - 1)
            name = f"{case['table']}: {case['mode']}, {case['rollouts']} rollouts of {case['length']} tokens"
            print(
                f"{name}: {rows[-1]['seconds']:.2f} s, {rows[-1]['peak_gib']:.3f} GiB; left {clock(left)}", flush=True
            )
        rows += [row | where for row in one_pass(base, 2 if options.quick else 20)]
    table = pd.DataFrame(rows)
    runs.write_summary(options.out, table)
    plots.style()
    growth = table[table["table"] == "growth"]
    runs.save_figure(options.out, "growth", growth_figure(growth))
    runs.save_figure(options.out, "shares", shares_figure(table[table["table"] == "shares"]))
    for line in verdicts(table):
        print(line)
    return table


def random_base(out: Path) -> str:
    """The pocket base's shape and tokenizer with random weights and room for long completions."""
    config = AutoConfig.from_pretrained(Pocket.base_model)
    config.max_position_embeddings = 256
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(out)
    models.load_tokenizer(Pocket.base_model).save_pretrained(out)
    return str(out)


def constant(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing, so that only PPO is timed; the seconds of a reward model are those of a forward."""
    return [float(len(completion) % 7) for completion in completions]


def timed(base: str, folder: Path, case: dict[str, Any], updates: int) -> dict[str, Any]:
    """Median seconds of an update, in parts, and in a run of its own, since tracing costs time, the peak GiB of one."""
    trainer = make(base, folder, case, updates + 2)  # the first update warms up, the last holds what ends a run
    watch = Stopwatch(trainer)
    trainer.train()
    watch.stop()
    parts = [dict(each) for each in watch.updates[1:-1]]
    middle = {name: median(each[name] for each in parts) for name in parts[0]}
    traced = make(base, folder, case, 1)
    with measure() as measured:
        traced.train()
    return {
        "seconds": median(sum(each.values()) for each in parts),
        **middle,
        "peak_gib": measured.gib,
        "tokens": trainer.samples["n_tokens"].mean(),
    }


def make(base: str, folder: Path, case: dict[str, Any], updates: int) -> PPOTrainer:
    """A trainer of the case's mode, rollouts and completion length."""
    args = PPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=case["rollouts"],
        max_completion_length=case["length"],
        num_minibatches=2,
        micro_batch_size=16,
        max_steps=updates,
        lora=None if case["mode"] == "full" else {},
        load_in_4bit=case["mode"].startswith("4-bit"),
    )
    prompts = Pocket().prompts("train", case["rollouts"]).select_columns("prompt")
    trainer = PPOTrainer(base, constant, args, prompts, callbacks=[])
    trainer.remove_callback(Alarms)  # that random weights never stop is no news here
    return trainer


class Stopwatch:
    """Seconds of each update of a trainer, from its start to the next one's, by what they were spent in.

    Of nested calls the outermost counts. What is in no call is this kit's own code (and Trainer's).
    """

    def __init__(self, trainer: PPOTrainer) -> None:
        self.updates: list[dict[str, float]] = []
        self.update_started = self.call_started = 0.0
        self.depth = 0
        self.handles: list[Any] = []
        self.generate = models.generate
        models.generate = self.timed("generate", self.generate)
        trainer.accelerator.backward = self.timed("backward", trainer.accelerator.backward)
        create, step = trainer.create_optimizer, trainer.training_step

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            optimizer = create(*args, **kwargs)
            optimizer.register_step_pre_hook(self.begin)
            optimizer.register_step_post_hook(lambda *_: self.end("optimizer step"))
            return optimizer

        def training_step(*args: Any, **kwargs: Any) -> Any:
            started = now()
            if self.updates:
                self.updates[-1][OURS] += started - self.update_started
            self.update_started = started
            self.updates.append(defaultdict(float))
            return step(*args, **kwargs)

        trainer.create_optimizer, trainer.training_step = create_optimizer, training_step  # type: ignore[method-assign]
        heads = [trainer.roles.value_head, trainer.policy.get_output_embeddings()]
        for module in {*(models.decoder(module) for module, _ in trainer.roles.parts.values()), *heads}:
            self.handles.append(module.register_forward_pre_hook(self.begin))
            self.handles.append(module.register_forward_hook(lambda *_: self.end("forward")))

    def stop(self) -> None:
        """Take the watch off the modules again."""
        models.generate = self.generate
        for handle in self.handles:
            handle.remove()

    def begin(self, *_: Any) -> None:
        """A call that counts begins."""
        if self.depth == 0:
            self.call_started = now()
        self.depth += 1

    def end(self, name: str) -> None:
        """It ends: its seconds are its own, and not this kit's."""
        self.depth -= 1
        if self.depth == 0 and self.updates:
            self.updates[-1][name] += now() - self.call_started
            self.updates[-1][OURS] -= now() - self.call_started

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, counted."""

        def timed_call(*args: Any, **kwargs: Any) -> Any:
            self.begin()
            try:
                return call(*args, **kwargs)
            finally:
                self.end(name)

        return timed_call


def now() -> float:
    """Seconds, with whatever a GPU was given done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def one_pass(base: str, times: int) -> list[dict[str, Any]]:
    """Seconds of scoring one micro-batch under reference and value: two passes, and one with a row per role in it."""
    roles = models.load_roles(base, lora={}, load_in_4bit=True).eval()
    model, rows = roles.use("policy"), 16
    question, answer = "what does the otter eat ?", " the otter eats fish and it lives by the river ."
    tokens = models.encode_pairs(models.load_tokenizer(base), [question] * rows, [answer] * rows).to(model.device)
    inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
    twice = {name: torch.cat([part, part]) for name, part in inputs.items()}
    names = ["reference"] * rows + ["value"] * rows
    settings: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1, "output_hidden_states": True}

    def separate() -> torch.Tensor:
        both = [roles.use(role)(**inputs, **settings).hidden_states[-1] for role in ("reference", "value")]
        return torch.cat(both)

    def together() -> torch.Tensor:
        return model(**twice, **settings, adapter_names=names).hidden_states[-1]

    found = []
    with torch.no_grad():
        apart = (separate() - together()).abs().max().item()
        seconds: dict[str, list[float]] = {"two passes": [], "one pass": []}
        for _ in range(times):
            for name, call in (("two passes", separate), ("one pass", together)):
                started = now()
                call()
                seconds[name].append(now() - started)
    for name, each in seconds.items():
        found.append({"table": "one pass", "mode": name, "rollouts": rows, "seconds": median(each), "apart": apart})
    return found


def exponent(x: pd.Series, y: pd.Series) -> float:
    """Of the power law through the points: 1 is linear growth, more is faster."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def growths(growth: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The points of each growth by its x column; the other column has its most frequent value there."""
    found = {}
    for x, other in (("rollouts", "length"), ("length", "rollouts")):
        held = growth[growth[other] == growth[other].mode()[0]]
        found[x] = held.drop_duplicates(x).sort_values(x)
    return found


def growth_figure(growth: pd.DataFrame) -> Figure:
    """Seconds and GiB of an update against rollouts and against completion length."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for column, (x, points) in enumerate(growths(growth).items()):
        for axes, (y, name) in zip(
            panels[:, column], (("seconds", "seconds per update"), ("peak_gib", "peak [GiB]")), strict=True
        ):
            axes.plot(points[x], points[y], "o-", color=plots.COLOURS["PPO"], linewidth=2, markersize=8)
            axes.set(xlabel="rollouts" if x == "rollouts" else "completion length [tokens]", ylabel=name)
            axes.set(xlim=(0, None), ylim=(0, None))
            axes.set_title(f"exponent {exponent(points[x], points[y]):.2f}")
    figure.suptitle("Cost of a PPO update: linear has exponent 1, less is better")
    plt.close(figure)
    return figure


def shares_figure(shares: pd.DataFrame) -> Figure:
    """Where the seconds of an update go, by mode."""
    figure, axes = plt.subplots(figsize=(9, 3.6), layout="constrained")
    left = np.zeros(len(shares))
    parts = ("generate", "forward", "backward", "optimizer step", OURS)
    for part, colour in zip(parts, (*plots.OTHERS[:2], plots.COLOURS["DPO"], "#BBBBBB", "#D55E00"), strict=True):
        width = 100 * (shares[part] / shares["seconds"]).to_numpy()
        axes.barh(shares["mode"], width, left=left, color=colour, label=part)
        left += width
    axes.set(xlabel="share of an update [%]", xlim=(0, 100))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    plt.close(figure)
    return figure


def verdicts(table: pd.DataFrame) -> list[str]:
    """One line for each thing that was asked."""
    lines = []
    for row in table[table["table"] == "shares"].itertuples():
        share = table.loc[row.Index, OURS] / row.seconds
        lines.append(f"{row.mode}: {share:.1%} of {row.seconds:.2f} s is {OURS}; at most 15% asked: "
                     f"{'met' if share <= 0.15 else 'not met'}")  # fmt: skip
    for x, points in growths(table[table["table"] == "growth"]).items():
        for y in ("seconds", "peak_gib"):
            found = exponent(points[x], points[y])
            met = "met" if found <= 1.1 else "not met"
            lines.append(f"{y} against {x}: exponent {found:.2f}; at most 1.1 asked: {met}")
    passes = table[table["table"] == "one pass"].set_index("mode")
    ratio = passes["seconds"]["one pass"] / passes["seconds"]["two passes"]
    lines.append(f"one pass takes {ratio:.2f} of two passes ({'worth' if ratio <= 0.9 else 'not worth'} its code); "
                 f"largest difference {passes['apart'].max():.1e}")  # fmt: skip
    return lines


if __name__ == "__main__":
    main()
