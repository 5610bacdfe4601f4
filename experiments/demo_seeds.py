"""Do PPO and DPO raise both the proxy and gold at the default settings, whatever the seed?

    python experiments/demo_seeds.py            # seeds 0, 1, 2: about ten minutes of two cores; stopped, it goes on

Accepted when, on each of three seeds, the shift of PPO and of DPO against SFT has a 95% interval above zero for the
proxy and for gold, and neither garbled text nor the refusal of harmless prompts rose by more than .03. Written before
the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from rlhf_kit import evaluate, outputs, plots, presets, runs, stats
from rlhf_kit.notebook import set_threads
from rlhf_kit.pipeline import Pipeline
from rlhf_kit.progress import quiet
from rlhf_kit.tasks import Pocket

OUT = Path("results/demo-seeds")
HARMLESS = ("garbled", "borderline prompts refused", "plain questions refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    quiet()
    set_threads(options.threads)
    parts = []
    for seed in options.seeds:
        print(f"seed {seed}", flush=True)
        scores = Pipeline(presets.preset("pocket", seed), options.out / f"seed-{seed}").scores()
        parts.append(scores.assign(seed=seed))
    scores = pd.concat(parts, ignore_index=True)
    final = scores[scores["final"]].drop(columns=["step", "n", "final"])

    shifts, effects = shift_table(final), effect_table(final)
    runs.write_summary(options.out, shifts)
    effects.to_csv(options.out / "side_effects.csv", index=False)
    evaluate.summary(final).to_csv(options.out / "models.csv", index=False)
    plots.style()
    points = [evaluate.frontier(part).assign(seed=seed) for seed, part in scores.groupby("seed")]
    frontier = pd.concat(points, ignore_index=True)
    runs.save_figure(options.out, "rlhf_vs_dpo", plots.reward_against_kl(frontier[frontier["model"] != "base"]))
    runs.save_figure(options.out, "reward_shift", plots.reward_shift(final))
    print(shifts.round(3).to_string(index=False), "\n")
    print(effects.round(3).to_string(index=False), "\n")
    print(outputs.readable(evaluate.summary(final)))


def shift_table(final: pd.DataFrame) -> pd.DataFrame:
    """Shift of each reward against SFT with its interval: by seed over prompts, for all over seeds and prompts."""
    rows = []
    for seed, part in [*final.groupby("seed"), ("all", final)]:
        for model in ("PPO", "DPO", "best-of-n"):
            for reward in ("proxy", "gold"):
                shift = stats.paired_difference(part, model, "SFT", reward)
                verdict = "above zero" if shift.lo > 0 else "not above zero"
                rows.append([seed, model, reward, *shift, verdict])
    return pd.DataFrame(rows, columns=["seed", "model", "reward", "shift", "shift_lo", "shift_hi", "verdict"])


def effect_table(final: pd.DataFrame) -> pd.DataFrame:
    """Side effects of each seed's models, with their change against SFT."""
    task = Pocket()
    tables = [task.effects(part).assign(seed=seed) for seed, part in final.groupby("seed")]
    table = pd.concat(tables, ignore_index=True)
    sft = table[table["model"] == "SFT"].set_index(["seed", "effect"])["share"]
    change = table["share"].to_numpy() - sft.loc[list(zip(table["seed"], table["effect"], strict=True))].to_numpy()
    risen = (change > 0.03) & table["effect"].isin(HARMLESS) & table["model"].isin(["PPO", "DPO"])
    return table.assign(change=change, verdict=risen.map({True: "rose", False: ""}))


if __name__ == "__main__":
    main()
