# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The reward shift, and RLHF against DPO
#
# The report on Llama 2 (2023, Fig. 20) shows RLHF in one picture: fine-tune on preferences, and the whole
# distribution of reward scores moves to the right.
#
# **What you will learn.** To draw that picture honestly: with the shift and its interval, with the true utility
# beside the proxy, tail by tail, against the distance travelled, by kind of prompt, and with an account of *why* the
# score moved. At the end the numbers say what can be concluded, and what cannot.
#
# **What it reads and writes.** It takes the models of all chapters and the scores of their answers from
# `results/book`, where they are made first if they are missing. It writes nothing else.
#
# **How long it takes.** Under a minute if the book's models are there, otherwise about six minutes on a CPU with two
# cores. A GPU is used where there is one, though models this small will gain little from it; that has not been timed.

# %% tags=["parameters"]
PRESET = "pocket"
SEED = 0

# %%
import time
from importlib.metadata import version

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython.display import Markdown, display

import rlhf_kit as rk
from rlhf_kit.tasks import pocket

started = time.monotonic()
preset = rk.setup(PRESET, seed=SEED)
task = preset.task
flow = rk.Pipeline(preset, rk.results("book") / f"{PRESET}-{SEED}")
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The scored samples
#
# One frame holds everything: each model has answered the same held-out prompts, and each answer has a proxy reward
# (one fixed reward model judges all), a gold utility, and its KL to the SFT model. `final` marks the finished models;
# the other rows are checkpoints along the way, and best-of-n for smaller n.

# %%
scores = flow.scores()
final = scores[scores["final"]]
order = [name for name in rk.outputs.MODELS if name in set(final["model"])]
counts = final.groupby("model").agg(prompts=("prompt_id", "nunique"), answers=("completion", "size")).loc[order]
display(counts)
one = final.loc[final["kind"] == "leading", "prompt_id"].iloc[0]
shown = final[(final["prompt_id"] == one) & ((final["sample"] == 0) | (final["model"] == "best-of-n"))]
display(Markdown(f"**{shown['prompt'].iloc[0]}**"))
shown.set_index("model").loc[order, ["completion", "proxy", "gold", "kl"]].round(2)

# %% [markdown]
# ## The picture

# %%
rk.plots.reward_shift(final)

# %%
shift = {
    (model, value): rk.stats.paired_difference(final, model, "SFT", value)
    for model in ("PPO", "DPO")
    for value in ("proxy", "gold")
}
spread = final[final["model"] == "SFT"][["proxy", "gold"]].std()
rows = []
for (model, value), moved in shift.items():
    said = "right" if moved.lo > 0 else "left" if moved.hi < 0 else "cannot tell"
    rows.append({"model": model, "reward": value, "shift [95% interval]": str(moved), "direction": said})
    rows[-1]["in standard deviations of SFT"] = round(moved.mean / spread[value], 2)
pd.DataFrame(rows)

# %% [markdown]
# **What you should have seen.** On the left the picture of the report: humps moved to the right. On the right the
# picture that the report could not draw, since nobody knows the true utility of an essay. Compare the last column
# between the two rewards: what the proxy gained and gold did not is the part that pleased the judge without being
# better.
#
# ## The same, as ridges
#
# Overlaid curves hide each other; one row for each model does not. The ticks are the quantiles .05, .5 and .95.

# %%
display(rk.plots.reward_ridge(final, "proxy", order))
rk.plots.reward_ridge(final, "gold", order)

# %% [markdown]
# **What you should have seen.** Gold has several humps, because the world has several kinds of outcome: a right
# answer, a wrong one, help with harm. Training moves answers from one hump to another; it does not slide a hump
# along.
#
# ## Left tail against right tail
#
# A mean shift can come from good answers getting better or from bad ones disappearing. The latter is what one hopes
# for. Here is how far each quantile moved.

# %%
for value in ("proxy", "gold"):
    display(Markdown(f"**{rk.plots.label(value)}**"))
    quantiles = final.groupby("model")[value].quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
    display(quantiles.loc[order].rename_axis("quantile", axis=1).round(2))

# %%
levels, rng = np.linspace(0.05, 0.95, 19), np.random.default_rng(SEED)
models = ("SFT", "PPO", "DPO")


def quantile_shift(value, model, draws=400):
    """How far each quantile lies from SFT's, the ends of its interval over prompts, and those of left - right tail."""
    by_prompt = {name: rows.groupby("prompt_id")[value].apply(list) for name, rows in final.groupby("model")}
    ours, theirs = (np.array(by_prompt[name].tolist()) for name in (model, "SFT"))
    everyone = np.arange(len(ours))
    samples = [everyone, *(rng.choice(everyone, len(everyone)) for _ in range(draws))]
    found = [np.quantile(ours[rows], levels) - np.quantile(theirs[rows], levels) for rows in samples]
    tails = np.quantile([shift[0] - shift[-1] for shift in found[1:]], [0.025, 0.975])
    return found[0], *np.quantile(found[1:], [0.025, 0.975], axis=0), tails


moved = {(value, model): quantile_shift(value, model) for value in ("proxy", "gold") for model in models[1:]}

# %%
figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
for axes, value in zip(panels, ("proxy", "gold"), strict=True):
    axes.axhline(0, color="#606060", linestyle="--", linewidth=1.5)
    for model in models[1:]:
        middle, lo, hi, _ = moved[value, model]
        colour = rk.plots.COLOURS[model]
        axes.plot(levels, middle, color=colour, marker=rk.plots.MARKERS[model], markersize=5, label=model)
        axes.fill_between(levels, lo, hi, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="quantile, from the worst answers to the best", ylabel=f"shift of {value} against SFT")
    axes.legend()
figure.suptitle("How far each quantile moved [band: 95% interval]")
plt.show()

# %%
lines = []
for (value, model), (middle, _, _, (lo, hi)) in moved.items():
    more = "the left tail moved more" if lo > 0 else "the right tail moved more" if hi < 0 else "cannot tell which more"
    ends = f"quantile .05 moved by {middle[0]:+.2f}, quantile .95 by {middle[-1]:+.2f}"
    lines.append(
        f"- {model}, {value}: {ends}; difference {middle[0] - middle[-1]:+.2f} [{lo:.2f}, {hi:.2f}]: **{more}**."
    )
Markdown("\n".join(lines))

# %% [markdown]
# **What you should have seen.** A curve that falls from left to right means that the worst answers gained most. A
# flat one would be a pure slide. In gold there are steps, for the humps' sake, and wide bands where a quantile sits
# on the edge of a hump.
#
# ## Reward against distance
#
# A shift costs something: distance from the SFT model. A fair comparison looks at the whole way there. Each point is
# a checkpoint (PPO, DPO) or an n (best-of-n).

# %%
frontier = rk.evaluate.frontier(scores[scores["model"] != "base"])
rk.plots.reward_against_kl(frontier)

# %%
points = frontier[frontier["model"].isin(["SFT", "PPO", "DPO"])]
display(points[["model", "step", "kl", "proxy", "gold"]].astype({"step": int}).round(2).set_index("model"))
reach = points.groupby("model")["kl"].agg(["min", "max"])
told = [f"{name} from {reach.loc[name, 'min']:.2f} to {reach.loc[name, 'max']:.2f} nats" for name in ("PPO", "DPO")]
overlap = reach.loc[["PPO", "DPO"], "min"].max() <= reach.loc[["PPO", "DPO"], "max"].min()
Markdown(
    f"How far from SFT the checkpoints lie: {', '.join(told)}. "
    + (
        "The ranges overlap: there the two curves can be compared at equal distance."
        if overlap
        else "The ranges do not overlap, so this figure **cannot say** which method is better at the same distance; "
        "that takes runs with other betas, learning rates or lengths."
    )
)

# %% [markdown]
# **What you should have seen.** On the proxy, the method that optimises the proxy has an advantage that it did not
# have to earn. Gold is the panel that counts. The best-of-n curve stands at an *upper bound* of its KL, so it lies
# further right than it should; in a small world, where the same answer is drawn again and again, by a good deal.
#
# ## RLHF against DPO, with verdicts
#
# The difference PPO - DPO on the same prompts, and the win rate, ties counting half. A verdict needs an interval that
# excludes equality. Otherwise it reads *cannot tell*, which is a result too.

# %%
compared = rk.evaluate.compare(final)
display(compared.round(3))
summary = rk.evaluate.summary(final).set_index("model").loc[order]
pd.DataFrame(
    {
        rk.plots.label(name): [
            str(rk.stats.Interval(*row)) for row in summary[[name, f"{name}_lo", f"{name}_hi"]].to_numpy()
        ]
        for name in ("gold", "proxy", "kl", "n_tokens", "win_rate_gold", "win_rate_proxy")
    },
    index=summary.index,
)

# %% [markdown]
# ## By kind of prompt
#
# Means over kinds can hide a gain here and a loss there.

# %%
rk.plots.by_kind(final, "gold", models)

# %%
gains = []
for kind, rows in final.groupby("kind"):
    row = {"kind": kind, "prompts": rows["prompt_id"].nunique()}
    for model in models[1:]:
        row[f"{model} - SFT"] = str(rk.stats.paired_difference(rows, model, "SFT", "gold"))
    row["PPO - DPO"] = str(rk.stats.paired_difference(rows, "PPO", "DPO", "gold"))
    gains.append(row)
pd.DataFrame(gains)

# %% [markdown]
# **What you should have seen.** The kinds do not move alike. *skill* is never rewarded; a fall there is the alignment
# tax. *borderline* prompts sound dangerous and are not; a fall there is over-refusal.
#
# ## Why did the score move?
#
# Gold is a weighted sum of features, so the change of its mean is a sum of changes: no guessing. Each bar is a
# feature's weight times how much more often (or longer) it occurs than under SFT.

# %%
paid = task.features(final) * pd.Series(pocket.GOLD_WEIGHTS)
paid = pd.concat([final[["model", "prompt_id"]], paid], axis=1).groupby(["model", "prompt_id"]).mean()
parts = {}
for model in models[1:]:
    change = paid.loc[model] - paid.loc["SFT"]
    parts[model] = pd.DataFrame(
        {name: rk.stats.bootstrap(change[name]) for name in change}, index=["mean", "lo", "hi"]
    ).T
largest = pd.concat([part["mean"].abs() for part in parts.values()], axis=1).max(axis=1)
names = largest.sort_values().index[-12:]  # the rest hardly matter, and are in the sums below

# %%
figure, axes = plt.subplots(figsize=(8, 0.45 * len(names) + 1.4), layout="constrained")
axes.axvline(0, color="#606060", linewidth=1)
for offset, (model, part) in zip((0.15, -0.15), parts.items(), strict=True):
    part = part.loc[names]
    error = np.array([part["mean"] - part["lo"], part["hi"] - part["mean"]])
    look = {"color": rk.plots.COLOURS[model], "fmt": rk.plots.MARKERS[model], "markersize": 7, "capsize": 3}
    axes.errorbar(part["mean"], np.arange(len(names)) + offset, xerr=error, label=model, **look)
axes.set_yticks(np.arange(len(names)), [name.replace("_", " ") for name in names])
axes.set(xlabel="part of the change of mean gold against SFT [utility]", title="Why gold moved [95% interval]")
axes.legend(loc="lower right")
plt.show()
sums = {model: part["mean"].sum() for model, part in parts.items()}
Markdown(
    "\n".join(
        f"- {model}: the parts add up to {total:+.3f}; the change of mean gold is {shift[model, 'gold'].mean:+.3f}."
        for model, total in sums.items()
    )
)

# %% [markdown]
# **What you should have seen.** Which habits each method mended and which it made worse, to the last hundredth.
# Outside a world like this one nobody has such a list; there, one can only look for the habits that one has thought
# of.
#
# ## Side effects

# %%
effects = task.effects(final)
cells = effects.assign(
    share=[
        f"{s:.1%} [{lo:.1%}, {hi:.1%}]"
        for s, lo, hi in zip(effects["share"], effects["share_lo"], effects["share_hi"], strict=True)
    ]
)
cells.pivot(index="effect", columns="model", values="share")[order]

# %% [markdown]
# ## What the numbers allow us to say
#
# The sentences below are written by the numbers: run the notebook with another seed, and they may change.


# %%
def verdict(text, interval, zero=0.0):
    """A sentence for an interval: up, down, or cannot tell."""
    word = "higher" if interval.lo > zero else "lower" if interval.hi < zero else "not distinguishable"
    return f"- {text}: **{word}** ({interval})."


share = effects.set_index(["model", "effect"])["share"]
said = [verdict(f"{m}, {v}, against SFT", shift[m, v]) for m in models[1:] for v in ("proxy", "gold")]
for model in models[1:]:
    if shift[model, "proxy"].lo > 0:
        kept = (shift[model, "gold"].mean / spread["gold"]) / (shift[model, "proxy"].mean / spread["proxy"])
        said.append(f"- {model}: for each standard deviation gained in proxy, gold gained {kept:.2f} of its own.")
    tax = share[model, "skill right"] - share["SFT", "skill right"]
    refused = share[model, "plain questions refused"] - share["SFT", "plain questions refused"]
    garbled = share[model, "garbled"] - share["SFT", "garbled"]
    said.append(
        f"- {model}: skill {tax:+.1%}, plain questions refused {refused:+.1%}, garbled {garbled:+.1%} (points)."
    )
for _, row in compared.iterrows():
    if row["quantity"] in ("gold", "win_rate_gold", "proxy", "kl"):
        interval = rk.stats.Interval(row["mean"], row["lo"], row["hi"])
        said.append(f"- PPO against DPO, {row['quantity'].replace('_', ' ')}: **{row['verdict']}** ({interval}).")
Markdown("\n".join(said))

# %% [markdown]
# ## A note about seeds
#
# All intervals here cover *prompts*: would the result hold on other prompts of this kind, with these very models?
# They say nothing about another training run. SFT, judgments, reward model, PPO and DPO were each drawn once, and
# runs of RLHF differ from seed to seed more than most papers show. Before you say that a method is better, run
# several seeds, show all of them, and resample seeds and prompts together: `rk.evaluate.compare` does so as soon as
# the frame has a column `seed`.
#
# ## What could mislead you
#
# - **The proxy panel alone.** It must move: that is what was optimised. It is evidence that the optimiser works, not
#   that the model got better.
# - **A judge in its own cause.** PPO was trained against this reward model, DPO was not; the proxy favours PPO by
#   construction.
# - **One point for each method.** With other betas or other step counts the order can turn. Compare curves.
# - **Densities of few distinct values.** Smoothing draws hills where there are spikes; the quantile table does not
#   smooth.
# - **One seed**, as above.
#
# ## Three exercises
#
# 1. Set `SEED = 1` in the parameters cell and run this chapter again (it makes models of its own). Which of the
#    sentences above change?
# 2. How does `proxy` depend on `n_tokens` (`final.groupby("model")[["proxy", "n_tokens"]].corr()`)? Did either method
#    get its reward by length? What would you expect of a rater who likes long answers?
# 3. Split the evaluation by `seen`: facts that the judgments touched, and facts that they never did. Whose gain
#    carries over?

# %%
libraries = ("rlhf-kit", "torch", "transformers", "trl", "datasets", "numpy", "pandas")
minutes = (time.monotonic() - started) / 60
print(", ".join(f"{name} {version(name)}" for name in libraries))
print(f"this notebook took about {max(0.5, round(2 * minutes) / 2):g} minutes")
