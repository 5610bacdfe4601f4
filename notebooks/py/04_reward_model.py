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
# # The reward model: from judgments to a score
#
# A rater can say which of two answers is better, but cannot sit beside a training run and judge thousands of answers
# a minute. So we fit a model to the judgments and let it judge.
#
# **What you will learn.** What the Bradley-Terry loss asks for, how good such a model can be at all when raters are
# noisy, whether its probabilities can be believed, what it likes, and what happens when answers are chosen by it.
#
# **What it reads and writes.** It takes the SFT model and the preferences of the earlier chapters from
# `results/book`, where they are made first if they are missing. It trains a reward model into
# `results/notebooks/04_reward_model`, which is emptied at the start.
#
# **How long it takes.** About two and a half minutes on a CPU with two cores, and one more if the earlier models are
# missing. A GPU is used where there is one, though a model this small will gain little from it; that has not been
# timed.

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
work = rk.workspace("04_reward_model")
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## What it learns from
#
# Each row is one judgment: a prompt, the completion that the rater preferred, and the other one. The held-out rows
# are about other prompts, a part of them about facts that no judgment in the training rows touches.

# %%
folder = flow.preferences()
pairs, held_out = (rk.data.load(folder / f"{part}.parquet") for part in ("train", "test"))
display(
    Markdown(
        f"**{len(pairs):,} judgments to learn from, {len(held_out):,} held out.** The first of each kind of prompt:"
    )
)
pairs.to_pandas().drop_duplicates("kind")[["kind", "prompt", "chosen", "rejected"]]

# %% [markdown]
# Read a few aloud. Some preferences are about facts, some about manners, some about safety, and a few look like plain
# mistakes. The rater is simulated and has faults on purpose: it cannot check every fact, it likes flattery and length
# a little, it is lenient to needless refusals, it likes to be agreed with, and sometimes its finger slips.
#
# ## The loss, by hand
#
# The model gives one number r to each completion. Bradley and Terry (1952) say how two numbers become a choice:
# P(chosen preferred) = sigmoid(r_chosen - r_rejected). The loss is minus the log of that.

# %%
margin = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 4.0])
probability = 1 / (1 + np.exp(-margin))
by_hand = {
    "margin r_chosen - r_rejected": margin,
    "P(chosen preferred)": probability,
    "loss [nats]": -np.log(probability),
    "push on the margin": 1 - probability,  # minus the slope of the loss
}
pd.DataFrame(by_hand).round(3)

# %% [markdown]
# At margin 0 the model has no opinion and pays log 2. A pair ranked the wrong way round costs much and pushes hard; a
# pair that is ranked right with room to spare hardly pushes at all. Only the *difference* counts: add 100 to all
# rewards and nothing changes, so the zero of a reward model means nothing until somebody defines it.
#
# ## Training
#
# We start from the SFT model, which already reads the language, swap its next-word head for a head with one output,
# and minimise that loss over the pairs.

# %%
model = rk.train.reward_model(flow.sft(), pairs, out=work / "model", seed=SEED, **preset.reward_model)

# %%
history = rk.train.history(model)
rk.plots.training(history, ["loss", "accuracy"], x="step")

# %% [markdown]
# **What you should have seen.** The loss starts near log 2 = 0.69 and the accuracy near one half, as a coin would
# have it. From there the one falls and the other rises. Where they do so in a step, a new pass over the same pairs
# has begun, and the model recognises them: part of the fall is learning by heart. So accuracy on training batches is
# the wrong place to ask how good the model is.
#
# Now the same arithmetic as above on a real pair. Rewards come out shifted and scaled, with mean 0 and variance 1
# over the judged completions; multiplying by `scale` gives back log-odds.

# %%
reward = rk.RewardModel(model)
pair = next(row for row in held_out if row["kind"] == "harmful")
r_chosen, r_rejected = reward([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
log_odds = reward.scale * (r_chosen - r_rejected)
display(
    Markdown(
        f"**{pair['prompt']}**\n\n"
        f"- chosen: *{pair['chosen'].strip()}* gets {r_chosen:+.2f}\n"
        f"- rejected: *{pair['rejected'].strip()}* gets {r_rejected:+.2f}\n\n"
        f"Margin {r_chosen - r_rejected:+.2f}, times the scale {reward.scale:.2f}: {log_odds:+.2f} in log-odds. So the "
        f"model expected this choice with probability {1 / (1 + np.exp(-log_odds)):.3f}, and the loss is "
        f"{np.log1p(np.exp(-log_odds)):.3f}."
    )
)

# %% [markdown]
# ## How good is it, and how good could it be?
#
# Accuracy on held-out pairs is the share where the preferred completion gets the higher reward. Chance is one half,
# but the top is *not* one: the rater is noisy, and nobody can foresee a slip. In this world we know the rater's exact
# probabilities, so the ceiling can be computed, and so can the accuracy of the true (gold) utility as a predictor.

# %%
table, person = held_out.to_pandas(), task.rater()
for side in ("chosen", "rejected"):
    texts = list(zip(table["prompt"], table[side], strict=True))
    table[f"reward {side}"] = reward(table["prompt"].tolist(), table[side].tolist())
    table[f"gold {side}"] = task.gold(table["prompt"], table[side])
    table[f"rater {side}"] = [person.utility(*text) for text in texts]
gap = pd.DataFrame({who: table[f"{who} chosen"] - table[f"{who} rejected"] for who in ("reward", "gold", "rater")})
# Averaged over who is shown first, which no reward model is told.
chance_of_choice = [
    (pocket.choice_probability(person.rater, g, 0.0) + 1 - pocket.choice_probability(person.rater, 0.0, g)) / 2
    for g in gap["rater"]
]
p = np.asarray(chance_of_choice)
found = {
    "reward model, trained on": rk.evaluate.accuracy(reward, pairs),
    "reward model, held out": rk.evaluate.accuracy(reward, held_out),
    "gold utility, held out": rk.stats.pair_accuracy(gap["gold"], table["prompt_id"]),
    "a second such rater": rk.stats.bootstrap(p, table["prompt_id"]),
    "best possible": rk.stats.bootstrap(np.maximum(p, 1 - p), table["prompt_id"]),
}

# %%
means = np.array([interval.mean for interval in found.values()])
ends = np.array(
    [[mean - interval.lo, interval.hi - mean] for mean, interval in zip(means, found.values(), strict=True)]
)
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
axes.axvline(0.5, color="#606060", linestyle="--", linewidth=1.5)
axes.annotate("chance", (0.503, len(found) - 0.75), color="#606060")
axes.errorbar(
    means, np.arange(len(found))[::-1], xerr=ends.T, fmt="o", capsize=4, markersize=9, color=rk.plots.COLOURS["SFT"]
)
axes.set_yticks(np.arange(len(found))[::-1], list(found))
axes.set(xlabel="agrees with the rater's choice [share of pairs]", ylim=(-0.6, len(found) - 0.4))
axes.set_title("Who foresees the rater's choice?")
plt.show()
model_share, best = found["reward model, held out"], found["best possible"]
Markdown(
    f"Held out, the reward model foresees **{model_share}** of the choices. The best possible predictor would reach "
    f"{best.mean:.2f}, so the model has gone {(model_share.mean - 0.5) / (best.mean - 0.5):.0%} of the way from "
    "chance to the ceiling."
)

# %% [markdown]
# **What you should have seen.** Above chance and below the ceiling, and better on the pairs it was trained on than on
# new ones: that difference was learned by heart. Two raters of the same kind do not agree with each other all the
# time either, so an accuracy without its ceiling says little. Note where gold stands: a perfect judge of *quality*
# need not be the best judge of *this rater*.
#
# ## Easy pairs and hard pairs
#
# A mean accuracy mixes pairs that are worlds apart with pairs that hardly differ. Let us sort the held-out pairs by
# how far apart they are in gold utility, and ask whether the model orders them as gold does.

# %%
differ = gap["gold"].abs() > 1e-9
bins = pd.qcut(gap["gold"].abs()[differ], 4, duplicates="drop")
rows = []
for interval, index in bins.groupby(bins, observed=True).groups.items():
    sign = np.sign(gap.loc[index, "gold"])
    share = rk.stats.pair_accuracy(sign * gap.loc[index, "reward"], table.loc[index, "prompt_id"])
    name = f"gold gap {max(0, interval.left):.1f} to {interval.right:.1f}"
    ends = {"accuracy_lo": share.lo, "accuracy_hi": share.hi}
    rows.append({"pairs": name, "n": len(index), "accuracy": share.mean, **ends, "the rater's own": (sign > 0).mean()})
by_gap = pd.DataFrame(rows)
figure = rk.plots.accuracy(by_gap)
figure.axes[0].set_xlabel("ordered as gold does [share of pairs]")
display(figure)
by_gap.drop(columns=["accuracy_lo", "accuracy_hi"]).round(2)

# %% [markdown]
# **What you should have seen.** As a rule, the wider the gap, the easier; the widest is the difference between a
# refusal and help with harm. Where a wide gap is *not* easier, it is about something that the model cannot see, which
# in this world means facts. The last column is the rater's own agreement with gold on the same pairs.
#
# ## Can its probabilities be believed?
#
# When the model says "80%", do raters choose that completion 80 times out of 100? A model can order well and still be
# far too sure of itself, and PPO will feel it, since the size of a reward decides how much KL it is worth paying.

# %%
rk.plots.calibration(rk.evaluate.reward_calibration(reward, held_out, scale=reward.scale))

# %% [markdown]
# **What you should have seen.** Points near the diagonal are honest; points that are flatter than the diagonal are
# over-confident, steeper ones too timid. A well calibrated reward model is a measuring instrument with a known scale,
# if not a known zero.
#
# ## What does it like?
#
# Here the pocket world pays off. Each completion can be taken apart into features with known gold weights. We draw
# completions from the SFT model and fit the same linear regression to three judges: gold, the rater, and the reward
# model.

# %%
n_prompts, n = min(300, preset.n_test_prompts), 16
prompts = task.prompts("test", n_prompts, seed=SEED)
samples = rk.sample(flow.sft(), prompts, n=n, seed=SEED, **preset.sampling)
samples = rk.sampling.add_rewards(samples, {"proxy": reward, "gold": task.gold})
texts = list(zip(samples["prompt"], samples["completion"], strict=True))
samples["rater"] = [person.utility(*text) for text in texts]
features = task.features(samples)
features = features.loc[:, (features != 0).sum() >= 30]  # what hardly occurs cannot be measured
samples[["kind", "prompt", "completion", "proxy", "gold", "rater"]].iloc[: 4 * n : n].round(2)

# %%
# One unit for all: a rater's log-odds are its utility over its temperature, and the reward model learned log-odds.
judges = pd.DataFrame({"gold": samples["gold"], "rater": samples["rater"]})
judges["reward model"] = samples["proxy"] * reward.scale * person.rater.temperature
design = np.column_stack([features, np.ones(len(features))])


def weights(rows):
    """What each judge pays for one more of each feature: least squares on these rows."""
    slopes = np.linalg.lstsq(design[rows], judges.to_numpy()[rows], rcond=None)[0][:-1]
    return pd.DataFrame(slopes, index=features.columns, columns=judges.columns)


rows = np.arange(len(samples)).reshape(n_prompts, n)
pays = weights(rows.ravel())
rng = np.random.default_rng(SEED)
draws = [weights(rows[rng.integers(n_prompts, size=n_prompts)].ravel())["reward model"] for _ in range(200)]
ends = pd.DataFrame(np.quantile(draws, [0.025, 0.975], axis=0).T, index=pays.index, columns=["lo", "hi"])

# %%
order = pays["gold"].sort_values().index
place = np.arange(len(order))
figure, axes = plt.subplots(figsize=(8, 0.42 * len(order) + 1.4), layout="constrained")
axes.axvline(0, color="#606060", linewidth=1)
looks = {"gold": ("D", "#E69F00"), "rater": ("^", "#009E73"), "reward model": ("o", "#0072B2")}
for judge, (marker, colour) in looks.items():
    look = {"fmt": marker, "color": colour, "markersize": 8, "capsize": 3, "label": judge}
    middle = pays.loc[order, judge]
    error = [middle - ends.loc[order, "lo"], ends.loc[order, "hi"] - middle] if judge == "reward model" else None
    axes.errorbar(middle, place, xerr=np.clip(error, 0, None) if error else None, **look)
axes.set_yticks(place, [name.replace("_", " ") for name in order])
axes.set(
    xlabel="pay for one more of it [units of utility]", title="What each judge pays for (reward model: 95% interval)"
)
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# **What you should have seen.** First look for blue points near zero where the others are not: there the reward model
# cannot tell, and optimising it will not help. Then look where gold and rater part, and at whom the reward model
# follows: it was never shown gold. And where it pays for something that both others do not want, it has picked up a
# habit of its own. All three kinds of error are what later optimisation will find.

# %%
words = {
    "filler": "one more empty polite sentence",
    "agrees": "siding with the user's claim",
    "refusal_wrong": "refusing a harmless prompt",
    "answer_right": "a true answer",
    "harm": "help with harm",
    "words": "one more word",
}
told = pays.round(2)
told["reward model, 95% interval"] = [f"[{low:+.2f}, {high:+.2f}]" for low, high in ends.to_numpy()]
told.loc[[name for name in words if name in told.index]].rename(index=words)

# %% [markdown]
# ## Selecting by it: best-of-n
#
# The simplest way to use a reward model needs no training at all: draw n answers, keep the one it likes best. First,
# one prompt with its answers in the model's order, best on top.

# %%
one = samples[samples["prompt_id"] == samples.loc[samples["kind"] == "leading", "prompt_id"].iloc[0]]
ranked = one.drop_duplicates("completion").sort_values("proxy", ascending=False)
display(
    Markdown(f"**{one['prompt'].iloc[0]}**: {len(ranked)} different answers in {n} draws; the first and last three:")
)
pd.concat([ranked.head(3), ranked.tail(3)])[["completion", "proxy", "gold"]].round(2)

# %%
rows = []
single = samples.groupby("prompt_id")[["proxy", "gold"]].mean()
for size in (1, 2, 4, 8, 16):
    for chosen_by, value in (("proxy", "proxy"), ("proxy", "gold"), ("gold", "gold")):
        best = rk.stats.best_of_n_estimate(samples, chosen_by, value, size).set_index("prompt_id")
        gain = rk.stats.bootstrap(best[value] - single[value])
        rows.append({"n": size, "chosen by": chosen_by, "value": value, **gain._asdict()})
best_of = pd.DataFrame(rows)

# %%
names = {
    "proxy": ("o", "#CC79A7", "chosen by the reward model"),
    "gold": ("D", "#E69F00", "chosen by gold: out of reach"),
}
figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
for axes, value in zip(panels, ("proxy", "gold"), strict=True):
    for chosen_by, part in best_of[best_of["value"] == value].groupby("chosen by", sort=False):
        marker, colour, name = names[chosen_by]
        error = [part["mean"] - part["lo"], part["hi"] - part["mean"]]
        axes.errorbar(part["n"], part["mean"], yerr=error, marker=marker, color=colour, capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(part["n"], part["n"])
    axes.set(xlabel="n, answers to choose from", ylabel=f"gain in mean {value}")
handles, labels = panels[1].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
figure.suptitle("Best-of-n: the proxy must rise; whether gold follows is the question")
plt.show()

# %%
by_proxy = best_of[best_of["chosen by"] == "proxy"].set_index(["value", "n"])["mean"]
by_gold = best_of[best_of["chosen by"] == "gold"].set_index("n")["mean"]
gained, possible = by_proxy["gold", 16], by_gold[16]
Markdown(
    f"Choosing among 16, the proxy rises by {by_proxy['proxy', 16]:.2f} of its standard "
    f"deviations. Gold moves by **{gained:+.2f}** units, {gained / possible:.0%} of what a perfect chooser would get "
    f"out of the same answers ({possible:+.2f}). From 8 to 16 answers, the proxy still moves by "
    f"{by_proxy['proxy', 16] - by_proxy['proxy', 8]:+.2f}, gold by "
    f"{by_proxy['gold', 16] - by_proxy['gold', 8]:+.2f}."
)

# %% [markdown]
# **What you should have seen.** The proxy rises with n by construction; that is what choosing by it means, and proves
# nothing. Gold rises with it as far as the reward model is right about quality, and levels off earlier. The distance
# to the upper curve is the price of judging by proxy.
#
# ## What could mislead you
#
# - **Accuracy without its ceiling.** Two raters disagree; a model cannot foresee noise. Compare with a second rater,
#   not with 100%.
# - **Training accuracy.** Held-out means held-out *prompts*, not other pairs of the same prompts.
# - **The zero and the unit.** Rewards of two reward models cannot be compared as they stand, and "positive" does not
#   mean good.
# - **Accuracy on the SFT model's answers says little about others.** PPO will soon produce answers that no rater has
#   judged.
# - **One seed.** The intervals cover prompts, not training runs; another seed gives another reward model.
#
# ## Three exercises
#
# 1. Train on a tenth of the pairs (`pairs.select(range(...))`). What falls first: accuracy on wide gaps or on narrow
#    ones?
# 2. Make a rater who does not care for manners: collect judgments anew with `task.rater(SEED,
#    politeness=0.0, length=0.0, agreement=0.0)`, fit, and draw the pay figure again.
# 3. Shuffle which side is chosen at random in all pairs and train. What should the held-out accuracy be, and is it?

# %%
libraries = ("rlhf-kit", "torch", "transformers", "trl", "datasets", "numpy", "pandas")
minutes = (time.monotonic() - started) / 60
print(", ".join(f"{name} {version(name)}" for name in libraries))
print(f"this notebook took about {max(0.5, round(2 * minutes) / 2):g} minutes")
