"""What a pipeline leaves for people: the summary table, the figures, samples side by side, and where the time went."""

import pandas as pd

from rlhf_kit import data, evaluate, plots, rewards, runs, stats
from rlhf_kit.pipeline import Pipeline

MODELS = ("base", "SFT", "best-of-n", "PPO", "DPO")


def write(pipeline: Pipeline) -> str:
    """Write summary.csv, figures/ and samples.md of a whole pipeline; returns its tables as text for a terminal."""
    scores, out, task = pipeline.scores(), pipeline.out, pipeline.preset.task
    final = scores[scores["final"]].drop(columns=["step", "n", "final"])
    summary = evaluate.summary(final).set_index("model").loc[list(MODELS)].reset_index()
    runs.write_summary(out, summary)
    judged = accuracy(pipeline)
    judged.to_csv(out / "reward_model_accuracy.csv", index=False)
    plots.style()
    metrics = pd.read_csv(pipeline.runs["ppo"].directory / "metrics.csv")
    logged = ["reward", "kl", "entropy", "completion_length", "value_loss", "clip_fraction"]
    runs.save_figure(out, "reward_shift", plots.reward_shift(final))
    frontier = evaluate.frontier(scores[scores["model"] != "base"])
    runs.save_figure(out, "rlhf_vs_dpo", plots.reward_against_kl(frontier))
    runs.save_figure(out, "training", plots.training(metrics, logged))
    runs.save_figure(out, "reward_model_accuracy", plots.accuracy(judged))
    tables = [readable(summary)]
    if (effects := task.effects(final)) is not None:
        effects.to_csv(out / "side_effects.csv", index=False)
        shares = effects.pivot(index="effect", columns="model", values="share")[list(MODELS)]
        tables.append(shares.map("{:.0%}".format).to_string())
    if task.source is None:  # a person's own data is not copied into a results folder that may be published
        (out / "samples.md").write_text(samples_table(final), encoding="utf-8")
    made = [(name, run.info["seconds"], run.reused) for name, run in pipeline.runs.items()]
    stages = pd.DataFrame(made, columns=["stage", "seconds", "kept"])
    stages = stages.assign(share=(stages["seconds"] / stages["seconds"].sum()).map("{:.0%}".format))
    return "\n\n".join([*tables, stages.to_string(index=False)])


def accuracy(pipeline: Pipeline) -> pd.DataFrame:
    """The reward model's accuracy on its training pairs and on held-out pairs: `pairs, n, accuracy[_lo, _hi]`."""
    reward, rows = rewards.RewardModel(pipeline.reward_model()), []
    for name, label in (("train", "trained on"), ("test", "held out")):
        pairs = data.load(pipeline.preferences() / f"{name}.parquet")
        found = stats.columns("accuracy", evaluate.accuracy(reward, pairs))
        rows.append({"pairs": label, "n": len(pairs), **found})
    return pd.DataFrame(rows)


def samples_table(scores: pd.DataFrame) -> str:
    """Ten prompts of all kinds as Markdown, each model's first completion side by side with its rewards."""
    firsts = scores[(scores["sample"] == 0) | (scores["model"] == "best-of-n")]
    firsts = firsts.assign(kind=firsts.get("kind", "prompt"))
    prompts = firsts.drop_duplicates("prompt_id")
    in_turn = prompts.assign(turn=prompts.groupby("kind").cumcount()).sort_values(["turn", "kind"]).head(10)
    rewards = [name for name in ("gold", "proxy") if name in firsts]
    lines = [f"# {len(in_turn)} prompts, every model's answer", ""]
    for _, asked in in_turn.iterrows():
        lines += [f"**{asked['prompt']}** ({asked['kind']})", ""]
        lines += [f"| model | completion | {' | '.join(rewards)} |", "|---" * (2 + len(rewards)) + "|"]
        rows = firsts[firsts["prompt_id"] == asked["prompt_id"]].set_index("model")
        for model, row in rows.loc[list(MODELS)].iterrows():
            said = str(row["completion"]).strip().replace("|", "/")
            lines.append(f"| {model} | {said} | {' | '.join(f'{row[name]:.2f}' for name in rewards)} |")
        lines.append("")
    return "\n".join(lines)


def readable(summary: pd.DataFrame) -> str:
    """The summary as text: mean [95% interval] of each quantity."""
    table = summary[["model"]].copy()
    for name in (column for column in summary if f"{column}_lo" in summary):
        table[name] = [str(stats.Interval(*cells)) for cells in summary[[name, f"{name}_lo", f"{name}_hi"]].to_numpy()]
    return table.to_string(index=False) + "\n(kl of best-of-n is the upper bound log n - (n-1)/n)"
