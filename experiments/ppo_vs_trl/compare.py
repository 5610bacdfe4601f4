"""Is this kit's PPO faster than the last PPO that TRL shipped (1.12.0), and as good? Both side by side in one run.

    make peer                                   # once: the environment with TRL 1.12.0
    python experiments/ppo_vs_trl/compare.py    # five seeds of 25 updates each; stopped, it goes on where it was

Each seed makes an SFT model and a reward model of the pocket preset. Then both optimise the same reward from the same
weights on the same prompts at the same settings, each in a process of its own, turn by turn, so that noise of the
machine hits both; first in full, then for a few updates with LoRA, where only time and memory are compared. The
checkpoints of the full runs answer held-out prompts. Rewards are compared at equal KL, on each run's frontier: those of
its checkpoints that no other one of the run beats in proxy at less KL, the SFT model being one of KL 0. Of the two
frontiers of a seed the one that ends at less KL says where; there each prompt's mean reward is interpolated between the
two checkpoints that bracket this KL, in the root of KL, in which rewards are nearly straight (2210.10760). (In a first
try of one seed KL reached its level within five updates while rewards went on rising: a checkpoint that merely comes
first at a KL is an untrained one.) Beside it stands what both maximise, at the end: proxy - kl_coef KL. The intervals
are 95%: over seeds for the ratios, over seeds and prompts for the differences (of one seed over its prompts only).

Met if, written before the run:

1. in full, the interval of seconds per update, the kit's over TRL's, lies at or below 0.5 (medians over a seed's
   updates but the first);
2. with LoRA, the kit holds one copy of the base's weights and TRL three (at most 1.05, at least 2.95, adapters aside);
3. the interval of the kit's reward less TRL's at equal KL lies above -0.05, for the reward both optimise (`proxy`);
   `gold`, which neither saw, is held to the same bar.

What is not the same: TRL scores a completion that never ended on its last token where the kit puts an EOS, adds the
score after the EOS instead of on it, takes the rollout's log-probs from generation, pads every row to the longest, and
draws prompts and tokens in another order.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from watch import PPO_SETTINGS

from rlhf_kit import models, plots, presets, runs, sampling, stats, train
from rlhf_kit.notebook import set_threads
from rlhf_kit.pipeline import Pipeline
from rlhf_kit.ppo import PPOConfig
from rlhf_kit.presets import Preset, Settings
from rlhf_kit.progress import clock, quiet
from rlhf_kit.stats import Interval

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
OUT = Path("results/ppo-vs-trl")
KIT, TRL = "rlhf-kit", "TRL 1.12"
SCRIPTS = {KIT: "ours.py", TRL: "peer.py"}
PYTHONS = {KIT: Path(sys.executable), TRL: ROOT / ".venv-trl-1.12" / "bin" / "python"}
LORA = {"r": 16, "lora_alpha": 32}
REWARDS = ("proxy", "gold")
OBJECTIVE = "proxy - kl_coef KL"
SAMPLES = 4  # of each held-out prompt and checkpoint
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--updates", type=int, default=25, help="updates of the full runs")
    parser.add_argument("--lora-updates", type=int, default=5, help="updates of the LoRA runs: time and memory only")
    parser.add_argument("--micro-batch-size", type=int, default=32, help="the kit's; changes its time, not its result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="train and sample again, as after a change of the kit")
    options = parser.parse_args()
    if not PYTHONS[TRL].exists():
        parser.error(f"{PYTHONS[TRL].relative_to(ROOT)} is not there; make it first: make peer")
    quiet()
    set_threads(options.threads)
    costs, scores, metrics, spent = [], [], [], 0.0
    for i, seed in enumerate(options.seeds):
        left = f"; about {clock(spent / i * (len(options.seeds) - i))} left" if i else ""
        print(f"seed {seed}: {i + 1} of {len(options.seeds)}{left}", flush=True)
        pipeline = Pipeline(presets.preset("pocket", seed), options.out / f"seed-{seed}")
        made = train_both(pipeline, options)
        full = {name: run for (mode, name), run in made.items() if mode == "full"}
        found = held_out_scores(pipeline, options.out, full, options.fresh)
        base_bytes = sum(each.nbytes for each in models.load_causal(pipeline.sft()).parameters())
        for (mode, name), run in made.items():
            known = {"model": name, "mode": mode, "seed": seed}
            costs.append(known | cost(run, base_bytes))
            metrics.append(pd.read_csv(run.directory / "metrics.csv").assign(run=run.directory.name, **known))
        scores.append(pd.read_parquet(found.directory / "samples.parquet").assign(seed=seed))
        spent += sum(run.info["seconds"] for run in (*pipeline.runs.values(), *made.values(), found))
    scored = pd.concat(scores, ignore_index=True)
    rewards = reward_table(scored, presets.preset("pocket").ppo["kl_coef"])
    table = pd.concat([cost_table(pd.DataFrame(costs)), rewards], ignore_index=True)
    runs.write_summary(options.out, table)
    points = curves(scored)
    points.to_csv(options.out / "curves.csv", index=False)
    plots.style()
    plots.COLOURS.update({KIT: plots.COLOURS["PPO"], TRL: plots.OTHERS[2]})
    runs.save_figure(options.out, "reward_against_kl", plots.reward_against_kl(points, ("proxy", "gold")))
    lines = pd.concat(metrics, ignore_index=True).rename(columns={"seconds": "seconds_per_update"})
    runs.save_figure(options.out, "seconds", plots.training(lines[lines["mode"] == "full"], ["seconds_per_update"]))
    print(table.round(3).to_string(index=False, na_rep=""), "\n")
    for row in table[table["bar"] != ""].to_dict("records"):
        interval = Interval(row["value"], row["lo"], row["hi"])
        print(f"{row['quantity']}, {row['mode']}: {row['compared']} {interval}; {row['bar']}: {row['verdict']}")


# Running both ------------------------------------------------------------------------------------------------------


def train_both(pipeline: Pipeline, options: argparse.Namespace) -> dict[tuple[str, str], runs.Run]:
    """The runs of one seed by (mode, model), made now if need be, turn by turn."""
    seed, preset = pipeline.preset.seed, pipeline.preset
    sft, reward = pipeline.sft(), pipeline.reward_model()
    adapter, merged = lora_reward_model(pipeline)
    rewards = {"full": {KIT: reward, TRL: reward}, "lora": {KIT: adapter, TRL: merged}}
    updates = {"full": options.updates, "lora": options.lora_updates}
    prompts = list(pipeline.prompts("train")["prompt"])
    made = {}
    for mode in ("full", "lora"):
        settings = ppo_settings(preset, mode, updates[mode], options.threads, options.micro_batch_size)
        for name in (KIT, TRL) if seed % 2 == 0 else (TRL, KIT):
            made[mode, name] = train_policy(
                options.out, name, settings, sft, rewards[mode][name], prompts, options.fresh
            )
    return made


def ppo_settings(preset: Preset, mode: str, updates: int, threads: int, micro_batch_size: int) -> Settings:
    """The settings of a run as both scripts read them; the kit's own config says what is not in the preset."""
    args = PPOConfig(
        output_dir="unused", **{**preset.sampling, **preset.ppo, "max_steps": updates, "seed": preset.seed}
    )
    return {name: getattr(args, name) for name in PPO_SETTINGS} | {
        "mode": mode,
        "threads": threads,
        "micro_batch_size": micro_batch_size,
        "save_every": preset.ppo["save_steps"],
        "lora_r": LORA["r"],
        "lora_alpha": LORA["lora_alpha"],
    }


def train_policy(
    out: Path, name: str, settings: Settings, sft: str, reward: str, prompts: Sequence[str], fresh: bool = False
) -> runs.Run:
    """One run of the kit or of TRL in a process of its own: checkpoint-*/, metrics.csv and measures.json."""
    batch = settings["per_device_train_batch_size"]
    # TRL drops a last batch that is not full.
    given = json.dumps(list(prompts[: len(prompts) // batch * batch]))

    def make(directory: Path) -> None:
        print(f"  {name}, {settings['mode']}: {settings['max_steps']} updates", flush=True)
        (directory / "prompts.json").write_text(given)
        asked = settings | {"sft": sft, "reward": reward, "prompts": str(directory / "prompts.json")}
        (directory / "settings.json").write_text(json.dumps(asked, indent=2) + "\n")
        environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1"}
        # The kit's process gets this repository, whatever is installed; TRL's gets nothing but its own environment.
        environment["PYTHONPATH"] = str(ROOT) if name == KIT else ""
        command = [str(PYTHONS[name]), str(HERE / SCRIPTS[name]), str(directory / "settings.json")]
        with (directory / "stderr.txt").open("w") as stderr:
            ended = subprocess.run(command, env=environment, stderr=stderr).returncode
        if ended != 0:
            last = (directory / "stderr.txt").read_text().strip().splitlines()[-8:]
            raise RuntimeError(f"{name} failed ({' '.join(command)}):\n" + "\n".join(last))

    kind = f"{SCRIPTS[name].removesuffix('.py')}-{settings['mode']}"
    config = {"model": name, "prompts_sha256": hashlib.sha256(given.encode()).hexdigest(), **settings}
    run = runs.make(out, f"{kind}-seed-{settings['seed']}", config, {"sft": sft, "reward": reward}, make, fresh=fresh)
    if run.reused:
        print(f"  {name}, {settings['mode']}: done before, kept", flush=True)
    return run


def lora_reward_model(pipeline: Pipeline) -> tuple[str, str]:
    """A reward model as an adapter over the SFT model, and the same merged, for TRL takes full reward models only."""
    sft, pairs = pipeline.sft(), pipeline.preferences() / "train.parquet"
    settings = pipeline.preset.reward_model

    def make(directory: Path) -> None:
        print("  reward model with LoRA", flush=True)
        adapter, merged = directory / "adapter", directory / "merged"
        data = Dataset.from_parquet(str(pairs))
        train.reward_model(
            sft,
            data,
            adapter,
            lora=LORA,
            seed=pipeline.preset.seed,
            **settings,
        )
        merge_reward_model(adapter, merged)

    config = {"seed": pipeline.preset.seed, **LORA, **settings}
    run = runs.make(pipeline.out, "reward_model_lora", config, {"sft": sft, "preferences": pairs}, make)
    pipeline.runs["reward_model_lora"] = run  # its time counts with the pipeline's other stages
    return str(run.directory / "adapter"), str(run.directory / "merged")


def merge_reward_model(adapter: Path, out: Path) -> None:
    """A reward adapter as a full reward model of the same scores."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter, num_labels=1, dtype=torch.float32)
    model.merge_and_unload().save_pretrained(out)
    models.load_tokenizer(adapter).save_pretrained(out)
    notes = models.read_notes(adapter)
    models.write_notes(out, shift=notes["shift"], scale=notes["scale"])


def held_out_scores(pipeline: Pipeline, out: Path, full: dict[str, runs.Run], fresh: bool = False) -> runs.Run:
    """Held-out completions of the SFT model (step 0) and of every checkpoint of both full runs, scored."""
    sft, preset = pipeline.sft(), pipeline.preset
    inputs: dict[str, str | Path] = {"sft": sft, "reward": pipeline.reward_model()}
    inputs |= {SCRIPTS[name].removesuffix(".py"): run.directory for name, run in full.items()}

    def make(directory: Path) -> None:
        prompts, rewards = pipeline.prompts("test"), pipeline.rewards()
        found = [("SFT", 0, Path(sft))]
        found += [(name, step, path) for name, run in full.items() for step, path in checkpoints(run.directory)]
        parts = []
        for model, step, path in found:
            print(f"  {model} at update {step}: {SAMPLES} completions of {len(prompts)} prompts", flush=True)
            samples = sampling.sample(path, prompts, n=SAMPLES, reference=sft, seed=preset.seed, **preset.sampling)
            parts.append(sampling.add_rewards(samples, rewards).assign(model=model, step=step))
        pd.concat(parts, ignore_index=True).to_parquet(directory / "samples.parquet", index=False)

    config = {"seed": preset.seed, "n": SAMPLES, "n_prompts": preset.n_test_prompts, **preset.sampling}
    return runs.make(out, f"scores-seed-{preset.seed}", config, inputs, make, fresh=fresh)


def checkpoints(directory: Path) -> Iterator[tuple[int, Path]]:
    """(update, model directory) of a run's checkpoints, in order."""
    for path in sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])):
        yield int(path.name.split("-")[1]), path


# From runs to numbers ----------------------------------------------------------------------------------------------


def cost(run: runs.Run, base_bytes: int) -> dict[str, float]:
    """What a run took: seconds per update (median but for the first), memory in MiB, weights in copies of the base."""
    metrics = pd.read_csv(run.directory / "metrics.csv")
    measures = json.loads((run.directory / "measures.json").read_text())
    later = metrics[metrics["update"] > 1]
    return {
        "seconds per update": later["seconds"].median(),
        "CPU seconds per update": later["cpu_seconds"].median(),
        "peak memory [MiB]": measures["peak_bytes"] / MIB,
        "peak memory above the imports [MiB]": (measures["peak_bytes"] - measures["before_bytes"]) / MIB,
        "all weights [bases]": measures["weight_bytes"] / base_bytes,
        "copies of the base": measures["base_weight_bytes"] / base_bytes,
    }


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """A row per mode and quantity: both means over seeds, and the kit's over TRL's, paired by seed."""
    table = []
    for mode, rows in costs.groupby("mode", sort=False):
        for quantity in [name for name in costs.columns if name not in ("model", "mode", "seed")]:
            sides = rows.pivot(index="seed", columns="model", values=quantity)
            kit, trl = sides[KIT], sides[TRL]
            ratio = stats.bootstrap((kit / trl).to_numpy())
            bar = verdict = ""
            if (mode, quantity) == ("full", "seconds per update"):
                bar, verdict = "at most 0.5", judged(ratio, ratio.hi <= 0.5)
            if (mode, quantity) == ("lora", "copies of the base"):
                bar, verdict = "one against three", said(kit.max() <= 1.05 and trl.min() >= 2.95)
            table.append([quantity, mode, kit.mean(), trl.mean(), "ratio", *ratio, bar, verdict])
    return pd.DataFrame(table, columns=COLUMNS)


COLUMNS = ["quantity", "mode", "kit", "trl", "compared", "value", "lo", "hi", "bar", "verdict"]


def reward_table(scores: pd.DataFrame, kl_coef: float) -> pd.DataFrame:
    """Rewards at equal KL, then objective, rewards and KL after the last update: both means, the kit's less TRL's."""
    trained = scores[scores["model"] != "SFT"]
    last = trained[trained["step"] == trained.groupby("model")["step"].transform("max")]
    last = last.assign(**{OBJECTIVE: last["proxy"] - kl_coef * last["kl"]})
    table = []
    for suffix, rows, values in (
        (" at equal KL", at_equal_kl(scores), REWARDS),
        (" at the end", last, (OBJECTIVE, *REWARDS, "kl")),
    ):
        for value in values:
            difference = stats.paired_difference(rows, KIT, TRL, value)
            bar = "above -0.05" if suffix == " at equal KL" else ""
            verdict = judged(difference, difference.lo > -0.05) if bar else ""
            both = (stats.hierarchical_bootstrap(rows[rows["model"] == name], value).mean for name in (KIT, TRL))
            table.append([value + suffix, "full", *both, "difference", *difference, bar, verdict])
        if suffix == " at equal KL":
            kl = rows.groupby("seed")["kl"].first().mean()
            table.append(["the equal KL [nats/sequence]", "full", kl, kl, "", None, None, None, "", ""])
    return pd.DataFrame(table, columns=COLUMNS)


def at_equal_kl(scores: pd.DataFrame) -> pd.DataFrame:
    """Each prompt's mean rewards at its seed's common KL, where the nearer frontier ends: a row per model, prompt."""
    parts = []
    for seed, rows in scores.groupby("seed"):
        sides = {name: rows[rows["model"].isin([name, "SFT"])] for name in (KIT, TRL)}
        kl = min(frontier(side)["kl"].iloc[-1] for side in sides.values())
        parts += [at_kl(side, kl).assign(model=name, seed=seed, kl=kl) for name, side in sides.items()]
    return pd.concat(parts, ignore_index=True)


def frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean `kl` and `proxy` by `step` of the checkpoints that no other beats in proxy at less KL, in order of both."""
    curve = rows.groupby("step")[["kl", "proxy"]].mean().sort_values(["kl", "proxy"], ascending=[True, False])
    return curve[curve["proxy"] > curve["proxy"].cummax().shift(fill_value=-math.inf)]


def at_kl(rows: pd.DataFrame, kl: float) -> pd.DataFrame:
    """Each prompt's mean rewards where the frontier of one model's checkpoints reaches `kl` in nats.

    Between two checkpoints rewards are taken as straight in the root of KL. ValueError if the frontier ends before.
    """
    curve = frontier(rows)["kl"]
    means = rows.groupby(["step", "prompt_id"])[list(REWARDS)].mean()
    reached = [i for i, each in enumerate(curve) if each >= kl]
    if not reached:
        raise ValueError(f"the frontier ends at a KL of {curve.iloc[-1]:g} nats and does not reach {kl:g}")
    after = reached[0]
    if after == 0:
        return means.loc[curve.index[0]].reset_index()
    low, high = curve.iloc[after - 1] ** 0.5, curve.iloc[after] ** 0.5
    share = (kl**0.5 - low) / (high - low)
    return ((1 - share) * means.loc[curve.index[after - 1]] + share * means.loc[curve.index[after]]).reset_index()


def curves(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean KL and rewards of each model, seed and step; the SFT model is step 0 of both."""
    start = scores[scores["model"] == "SFT"]
    both = [pd.concat([start.assign(model=name), scores[scores["model"] == name]]) for name in (KIT, TRL)]
    keys = ["model", "seed", "step"]
    return pd.concat(both).groupby(keys, sort=False)[["kl", *REWARDS]].mean().reset_index()


def judged(interval: Interval, holds: bool) -> str:
    """The verdict on an interval, which one seed alone may not have."""
    return said(holds) if interval.lo == interval.lo else "no interval: more seeds"


def said(holds: bool) -> str:
    return "met" if holds else "not met"


if __name__ == "__main__":
    main()
