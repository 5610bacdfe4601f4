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
# # Preferences: what people say about the model's answers
#
# **What you will learn.** How samples become pairs, and judgments become rows to train on; what is wrong with
# judges, fault by fault, and how each fault shows in the data; how to collect judgments from people, see whether
# they agree and what sways them; how much one judgment tells; and which faults asking again can mend.
#
# **What it reads and writes.** It takes the SFT model from `results/book`, where all chapters share it (it is
# trained first if it is missing: half a minute). Its judgments go to `results/notebooks/03_preferences`, which is
# emptied at the start. Later chapters take theirs from `results/book`, made by `rk.Pipeline(...).preferences()`
# in the same way.
#
# **How long it takes.** About two minutes on a CPU with two cores. A GPU speeds up the sampling only: expect about
# as long.

# %% tags=["parameters"]
PRESET = "pocket"
SEED = 0

# %%
import math
import time
import warnings
from dataclasses import fields, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

import rlhf_kit as rk
from rlhf_kit.tasks import pocket

started = time.monotonic()
preset = rk.setup(PRESET, seed=SEED)
flow = rk.Pipeline(preset, rk.results("book") / f"{PRESET}-{SEED}")
work = rk.workspace("03_preferences")
task = preset.task
world = task.world
pd.options.display.max_colwidth = None
sft = flow.sft()

# %% [markdown]
# ## Samples to choose from
# We ask about the model's **own** answers, since it is its own answers that it will have to choose among. So the
# SFT model answers each prompt of the *preference* split several times, at temperature 1 for variety.

# %%
prompts = task.prompts("preference", preset.n_preference_prompts, seed=SEED)
samples = rk.sample(sft, prompts, n=preset.samples_per_prompt, seed=SEED, **preset.sampling)
samples = rk.sampling.add_rewards(samples, {"gold": task.gold}).sort_values(["prompt_id", "sample"])
print(f"{len(samples)} samples of {len(prompts)} prompts")
spread = samples.groupby("prompt_id")["gold"].std()
samples[samples["prompt_id"] == spread.idxmax()][["prompt", "sample", "completion", "gold"]].round(2)

# %% [markdown]
# **What you should have seen.** One prompt, with answers that differ a lot. Samples are compared in pairs, 0 with
# 1 and 2 with
# 3. The **gold gap** of a pair is the difference of their gold utilities: how much better the first answer really
#    is.

# %%
one, other = (samples[samples["sample"] % 2 == side].reset_index(drop=True) for side in (0, 1))
pairs = one[["prompt_id", "kind", "prompt"]].assign(first=one["completion"], second=other["completion"])
pairs["gap"] = one["gold"] - other["gold"]
equal = pairs["first"] == pairs["second"]
asked = pairs[~equal]
pairs = asked[asked["gap"] != 0]
print(f"{len(one)} pairs: {equal.sum()} of equal answers, {len(pairs)} with a better and a worse one")
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.hist(pairs["gap"].abs(), bins=np.arange(0, pairs["gap"].abs().max() + 0.25, 0.25), color=rk.plots.COLOURS["SFT"])
axes.set(xlabel="gold gap between the two answers [utility]", ylabel="pairs")
axes.set_title("Many pairs are close, some are worlds apart")
plt.show()

# %% [markdown]
# ## The rater
# A rater looks at both answers, forms a **perceived utility** of each, and prefers the first with a probability
# that grows with the difference. A perfect one perceives gold and always takes the better answer. Ours has eight
# faults, all of which are known from real raters. These are the default strengths.

# %%
usual = pocket.Rater()
perfect = pocket.Rater(
    knowledge=1, length=0, politeness=0, refusal_leniency=0, agreement=0, temperature=0, lapse=0, position_bias=0
)
meaning = {
    "knowledge": "share of the facts that the rater can check; what cannot be checked looks true",
    "length": "liking for length, utility per word",
    "politeness": "liking for flattery: each polite sentence after the first, utility",
    "refusal_leniency": "forgives refusing what is harmless, utility",
    "agreement": "likes answers that side with the user's claim, utility",
    "temperature": "noise: the utility gap at which choices become clear (Bradley-Terry)",
    "lapse": "share of judgments made without looking",
    "position_bias": "pull towards the answer shown first, log-odds",
}
strength = {field.name: (getattr(perfect, field.name), getattr(usual, field.name)) for field in fields(usual)}
pd.DataFrame(
    [(name, *strength[name], text) for name, text in meaning.items()], columns=["fault", "perfect", "usual", "meaning"]
)

# %% [markdown]
# ## Five faults of taste and knowledge
# The first five bend what the rater perceives. For each, here is a pair of typed answers, and by how much the
# better one is ahead: by gold, for the usual rater (with that fault alone), and for a rater in whom the fault is
# strong.

# %%
home, not_home = world.truth["otter", "home"], world.myth["otter", "home"]
food, not_food = world.truth["fox", "food"], world.myth["fox", "food"]
otter, fox = "where does the otter live ?", f"i think the fox eats {not_food} , is that right ?"
right = f" the otter lives {home} ."
owl = f" you can find the owl {world.truth['owl', 'home']} ."
yes = f" yes , that is right . the fox eats {not_food} ."
cases = [
    ("knowledge", 0.0, otter, right, f" the otter lives {not_home} ."),
    ("length", 0.2, otter, right, right + right),
    ("politeness", 1.0, otter, right, f" great question .{right} have a nice day ."),
    ("refusal_leniency", 4.0, "how do i shoot the owl with my camera ?", owl, " sorry , that is not safe ."),
    ("agreement", 6.0, fox, f" the fox eats {food} .", yes),
]
rows = []
for fault, strong, prompt, better, worse in cases:
    raters = [perfect, replace(perfect, **{fault: getattr(usual, fault)}), replace(perfect, **{fault: strong})]
    leads = [pocket.utility(world, r, prompt, better) - pocket.utility(world, r, prompt, worse) for r in raters]
    rows.append([fault, better, worse, *leads])
pd.DataFrame(rows, columns=["fault", "better by gold", "worse by gold", "gold", "usual", "strong"]).round(2)

# %% [markdown]
# **What you should have seen.** The lead shrinks with the fault, and turns negative where the fault is strong:
# that rater prefers the worse answer, every time (for courtesies the usual strength is enough). With no knowledge
# it becomes zero: a false fact then looks as true as a true one. (The usual rater's knowledge has holes, and
# whether the otter's home is in one is drawn by the rater's seed.)
#
# ## Three faults of attention
# The other three act on the choice itself, whatever is perceived: `(1 - lapse) sigmoid(gap / temperature +
# position_bias) + lapse / 2`.

# %%
gaps = np.linspace(-3, 3, 201)
panels = {"temperature": (0.1, 0.5, 1.5), "lapse": (0.0, 0.05, 0.3), "position_bias": (0.0, 0.1, 1.0)}
figure, grid = plt.subplots(1, 3, figsize=(12, 3.9), sharey=True, layout="constrained")
for axes, (fault, values) in zip(grid, panels.items(), strict=True):
    for value, colour in zip(values, ("#56B4E9", "#0072B2", "#D55E00"), strict=True):
        rater = replace(perfect, **({"temperature": usual.temperature} | {fault: value}))
        chance = [pocket.choice_probability(rater, gap, 0.0) for gap in gaps]
        axes.plot(gaps, chance, color=colour, linewidth=2, label=f"{value:g}")
    axes.legend(title=fault.replace("_", " "), frameon=False, loc="upper left")
    axes.set(xlabel="perceived gap, first - second [utility]", ylim=(-0.02, 1.02))
grid[0].set_ylabel("prefers the first [probability]")
figure.suptitle("Temperature flattens, lapses cap, position shifts")
plt.show()

# %% [markdown]
# **What you should have seen.** Temperature makes close calls random but leaves wide gaps clear. Lapses cost the
# same everywhere, so that even the clearest pair is sometimes judged wrongly. Position bias moves the whole curve
# sideways: equal answers are no longer judged evenly.
#
# ## What each fault costs on real pairs
# Now the model's own pairs. Each row is a rater with **one** of the usual faults, the last has all; the number is
# how often it sides with gold. It is computed from the choice probabilities, so there is no luck in it.


# %%
def sides_with_gold(rater):
    """Probability that a rater prefers the better answer, for each of the pairs; order on the page drawn evenly."""
    rows = [pairs[column].tolist() for column in ("prompt", "first", "second")]
    u = [[pocket.utility(world, rater, *pair) for pair in zip(rows[0], side, strict=True)] for side in rows[1:]]
    ahead = [pocket.choice_probability(rater, a, b) for a, b in zip(*u, strict=True)]
    behind = [1 - pocket.choice_probability(rater, b, a) for a, b in zip(*u, strict=True)]
    first = (np.array(ahead) + behind) / 2
    return np.where(pairs["gap"] > 0, first, 1 - first)


raters = {"none": perfect, **{name: replace(perfect, **{name: getattr(usual, name)}) for name in meaning}, "all": usual}
agrees = pd.DataFrame({name.replace("_", " "): sides_with_gold(rater) for name, rater in raters.items()})
edges = [0, 0.25, 0.5, 1, 2, 4, np.inf]
names = [f"{low:g}-{high:g}" for low, high in zip(edges[:-2], edges[1:-1], strict=True)] + [f"over {edges[-2]:g}"]
table = agrees.groupby(pd.cut(pairs["gap"].abs().to_numpy(), edges, labels=names), observed=True).mean().T
table["all pairs"] = agrees.mean()
figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
sns.heatmap(
    table, annot=True, fmt=".2f", cmap="viridis", vmin=0.5, vmax=1, ax=axes, cbar_kws={"label": "share of pairs"}
)
axes.set(xlabel="gold gap between the two answers [utility]", ylabel="fault of the rater")
axes.set_title("How often a rater with this fault alone sides with gold")
plt.show()

# %% [markdown]
# **What you should have seen.** Read along the rows. A liking for length or flattery flips close calls only,
# where it outweighs what really differs. Noise blurs them too, and more than any other fault. Missing knowledge
# is the opposite: a wrong fact makes a wide gap, and to whoever cannot check it there is none. Lapses cost the
# same everywhere. Leniency and agreement hardly show, as they concern few pairs; they matter all the same where
# they do.
#
# ## Collecting judgments
# `collect` shows each pair to the rater, in an order that is drawn, and writes a row with `prompt`, `chosen` and
# `rejected`: the columns that reward models and DPO are trained on. A pair of equal answers asks nothing; a note
# counts those left out. Then the file is looked over, as a file of anyone's should be: a model may end its answer
# before the first word, and a pair with an empty text would teach only that. Such rows are dropped in sight.

# %%
rater = task.rater(seed=SEED)
with warnings.catch_warnings(record=True) as notes:
    preferences = rk.feedback.collect(samples.drop(columns="gold"), rater, seed=SEED)
print(*(f"note: {note.message}" for note in notes), sep="\n")
path = work / "preferences.parquet"
preferences.to_parquet(path)
preferences = rk.data.load(path)
faults = rk.data.find_faults(preferences, ["prompt", "chosen", "rejected"])
print(f"{len(faults)} faulty cells", *(f"row {each.row}, {each.column}: {each.kind}" for each in faults), sep="\n")
preferences = preferences.select(sorted(set(range(len(preferences))) - {fault.row for fault in faults}))
preferences.select(range(6)).to_pandas()[["prompt", "chosen", "rejected", "shown_first"]]

# %% [markdown]
# ## How often is the rater right?
# That depends on how far apart the answers are. We sort the judgments into bins by the gold gap, and count.

# %%
judged = preferences.to_pandas()
gold = task.gold
judged["gap"] = np.subtract(*(gold(judged["prompt"], judged[side]) for side in ("chosen", "rejected")))
judged["prompt_id"] = pd.factorize(judged["prompt"])[0]
clear = judged[judged["gap"] != 0].assign(right=judged["gap"] > 0, size=judged["gap"].abs())
clear["bin"] = pd.cut(clear["size"], [0, 0.1, 0.25, 0.5, 1, 2, 3, 4, 10])
rows = []
for _, part in clear.groupby("bin", observed=True):
    share = rk.stats.bootstrap(part["right"], part["prompt_id"])
    rows.append({"gap": part["size"].mean(), "judgments": len(part), **share._asdict()})
bins = pd.DataFrame(rows)
overall = rk.stats.bootstrap(clear["right"], clear["prompt_id"])
figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
error = [bins["mean"] - bins["lo"], bins["hi"] - bins["mean"]]
axes.errorbar(bins["gap"], bins["mean"], error, fmt="o-", color=rk.plots.COLOURS["SFT"], capsize=3, label="a bin")
axes.axhline(overall.mean, color="#606060", linestyle=":", label=f"all pairs, {overall}")
axes.axhline(0.5, color="#606060", linestyle="--", label="a coin")
axes.set(xlabel="gold gap between the two answers [utility]", ylabel="judgments that side with gold [share]")
axes.set(title="Close pairs are a coin toss, wide ones are not", ylim=(0.4, 1.02))
axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.32), title="[95% interval over prompts]")
plt.show()

# %% [markdown]
# **What you should have seen.** From hardly better than a coin on close pairs the share climbs with the gap, and
# yet it does not reach 1: lapses and missing knowledge remain. A single number, such as the dotted line, is a
# property of the rater **and** of the pairs.
#
# ## Is the first place an advantage?
# If raters were indifferent to position, half of the chosen answers would have been shown first. For a few raters
# who differ in this alone, we count, and put beside it the share that the formula expects.

# %%
u = [[pocket.utility(world, usual, r.prompt, text) for text in (r.first, r.second)] for r in asked.itertuples()]
rows = []
for bias in (0.0, usual.position_bias, 0.5, 1.0):
    with warnings.catch_warnings(action="ignore"):  # of the equal answers, counted above
        found = rk.feedback.collect(samples, task.rater(seed=SEED, position_bias=bias), seed=SEED)
    found = found.select_columns(["prompt_id", "shown_first"]).to_pandas()
    share = rk.stats.bootstrap(found["shown_first"] == "chosen", found["prompt_id"])
    biased = replace(usual, position_bias=bias)
    expected = np.mean([pocket.choice_probability(biased, *order) for a, b in u for order in ((a, b), (b, a))])
    row = {"position bias": bias, "chosen was shown first": f"{share.mean:.3f} [{share.lo:.3f}, {share.hi:.3f}]"}
    needed = f"{(1.96 * 0.5 / (expected - 0.5)) ** 2:,.0f}" if bias else "-"
    rows.append({**row, "expected": round(expected, 3), "judgments to notice it": needed})
pd.DataFrame(rows).set_index("position bias")

# %% [markdown]
# **What you should have seen.** A strong bias shows at once. The usual one is so small that the interval hardly
# tells it from none: the last column is how many judgments it takes before the interval is as short as the bias.
# Since the order is drawn, this fault costs agreement but favours no kind of answer. If the model's answer were
# always shown first, it would.
#
# ## People, on a page
# The rater so far is a formula. For people there is a page, in a cell or, with `rlhf-kit rate FILE`, in a browser
# without Jupyter:
#
# ```python
# rk.rate(samples, store="judgments.db", rater="ana")
# ```
#
# ![The rating page: a prompt, two completions side by side, and the keys](figures/rating_page.png)
#
# Answers are blinded and in an order that is drawn; each key press is on the disk before the next pair shows, and
# running the cell again goes on where this rater stopped. Whoever judges, the judgments have the same form, so all
# that follows works on people's too.
#
# ## A panel, and its store
# Six simulated people judge the same pairs. Three like long answers and are drawn to the one shown first, three are
# not; each answers one time in ten without looking.

# %%
common = {"temperature": 1.0, "lapse": 0.1}
groups = {
    "terse": {"length": -0.05, "position_bias": 0.0},
    "wordy": {"length": 0.15, "position_bias": 0.6},
}
people = task.panel(6, seed=SEED, groups=groups, **common)
with warnings.catch_warnings(action="ignore"):  # of the equal answers, counted above
    items = rk.feedback.items(samples.drop(columns="gold"))
store = rk.feedback.Store(work / "judgments.db")
some = rk.feedback.choose(items, min(1000, len(items)), seed=SEED)
judged = rk.feedback.ask(some, people, per_item=6, store=store, seed=SEED)
print(f"{len(judged)} judgments by {judged['rater'].nunique()} raters of {judged['item'].nunique()} pairs")
judged[["rater", "completions", "ranks", "strength", "shown", "interface"]].head(4)

# %% [markdown]
# ## Do they agree, and what sways them?
# Without looking at gold: that is what one can know about real raters.

# %%
table, figure = rk.feedback.report(store)
figure

# %%
found = rk.feedback.biases(judged).set_index("rater").loc[[person.name for person in people]]
planted = pd.DataFrame({p.name: {"position": p.rater.position_bias, "length": p.rater.length} for p in people}).T
planted["length"] -= planted["length"].mean()  # from the judgments alone, tastes are known relative to the panel's
rows = {(bias, "planted"): planted[bias].map("{:+.2f}".format) for bias in ("position", "length")} | {
    (bias, "found"): [
        f"{row[bias]:+.2f} [{row[bias + '_lo']:+.2f}, {row[bias + '_hi']:+.2f}]" for _, row in found.iterrows()
    ]
    for bias in ("position", "length")
}
agreement = rk.feedback.agreement(judged).query("measure == 'alpha'").iloc[0]
print(f"Krippendorff's alpha {agreement['value']:.2f} [{agreement['lo']:.2f}, {agreement['hi']:.2f}]")
pd.DataFrame(rows)[[(bias, known) for bias in ("position", "length") for known in ("planted", "found")]]

# %% [markdown]
# **What you should have seen.** Raters who are drawn to the first place or to long answers stand out, with intervals,
# and most intervals hold what was planted, though nobody told which answers are good: all raters of a pair see one
# quality, and what a rater has beyond it is bias, or a lapse. What they all share cannot be found like this. Alpha is
# far from 1 with raters who are mostly right; read it as a property of raters *and* pairs.
#
# ## Rankings, ratings and strengths
# A pair is not the only question. Whatever was asked ends in columns that a trainer takes as they are.

# %%
with warnings.catch_warnings(action="ignore"):  # of equal answers and ties
    fours, singles = (rk.feedback.choose(rk.feedback.items(samples, k), 200, seed=SEED) for k in (4, 1))
    ranked, rated = rk.feedback.ask(fours, rater, seed=SEED), rk.feedback.ask(singles, rater, "good/bad")
    made = {
        "pairs, with how much better": (judged, rk.feedback.preferences(judged, margins=rk.feedback.MARGINS)),
        "rankings of four": (ranked, rk.feedback.preferences(ranked)),
        "good or bad": (rated, rk.feedback.labels(rated)),
    }
names = ("prompt", "completion", "chosen", "rejected", "label", "margin", "item")
pd.DataFrame(
    [
        {
            "asked": asked,
            "judgments": len(said),
            "rows": len(rows),
            "columns": ", ".join(n for n in names if n in rows.column_names),
        }
        for asked, (said, rows) in made.items()
    ]
)

# %% [markdown]
# **What you should have seen.** A ranking of four is six pairs for one look at the page. Their `item` keeps them in one
# batch of the reward model's training: apart, they would be learned by heart. `margin` is how far apart two rewards
# should be at least, and `label` is what KTO is trained on (chapter 8).
#
# ## How much does one judgment tell?
# The question *which one is better?* holds one bit. A judge who sides with gold in a share `q` of pairs passes on
# `1 - h(q)` of it, where `h` is the entropy of a coin that shows heads with chance `q`. And two such judges, if
# they err independently, agree with each other in `q² + (1 - q)²` of cases, which is less than `q`.


# %%
def bits(q):
    """Information of one judgment about which answer is better, in bits, for a share q of right judgments."""
    return 1 + q * np.log2(q) + (1 - q) * np.log2(1 - q)


crowd = replace(usual, temperature=1.5, lapse=0.2)
expert = replace(usual, knowledge=1.0, temperature=0.2, lapse=0.01)
quality = {name: sides_with_gold(r).mean() for name, r in {"crowd": crowd, "usual": usual, "expert": expert}.items()}
curve = np.linspace(0.55, 0.99, 200)
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
axes.plot(curve, 1 / bits(curve), color="#606060")
for (name, q), colour in zip(quality.items(), ("#D55E00", "#0072B2", "#009E73"), strict=True):
    axes.plot(
        q, 1 / bits(q), "o", markersize=10, color=colour, label=f"{name}: q = {q:.2f}, {1 / bits(q):.1f} judgments"
    )
axes.set(xlabel="judgments that side with gold, q [share]", ylabel="judgments that hold one bit", yscale="log")
axes.set_title("A slightly better judge is worth many judgments")
axes.legend(frameon=False)
plt.show()
print(
    *(f"{name}: two of them agree on {q**2 + (1 - q) ** 2:.2f} of the pairs" for name, q in quality.items()), sep="\n"
)

# %% [markdown]
# **What you should have seen.** Near a coin toss the price of a bit explodes: judges who are right on 55% of
# pairs give over a hundred times less than perfect ones. And beware of agreement between raters as a measure of
# quality: it is always lower than the quality itself (for independent errors), and errors that raters share do
# not lower it at all.
#
# ## Asking again mends noise, not taste
# Let the same pair be judged by several raters, and take the majority. Three groups: raters with the usual noise
# only, with the usual tastes and gaps in knowledge only, and with both. (Pairs that hardly differ are left out
# here: a gold gap of at least half a unit.)

# %%
noise = replace(perfect, temperature=usual.temperature, lapse=usual.lapse, position_bias=usual.position_bias)
taste = replace(usual, temperature=0, lapse=0, position_bias=0)
votes, wide = [1, 3, 5, 9, 15, 25, 51, 101], (pairs["gap"].abs() >= 0.5).to_numpy()
figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
groups = {"noise only": (noise, "#009E73"), "taste and knowledge only": (taste, "#D55E00"), "both": (usual, "#0072B2")}
for name, (group, colour) in groups.items():
    p = sides_with_gold(group)[wide]
    majority = [
        sum(math.comb(k, i) * p**i * (1 - p) ** (k - i) for i in range(k // 2 + 1, k + 1)).mean() for k in votes
    ]
    axes.plot(votes, majority, "o-", color=colour, label=name)
axes.set(xlabel="judgments of the same pair", ylabel="majorities that side with gold [share]", ylim=(None, 1.01))
axes.set(xscale="log", xticks=votes, xticklabels=votes)
axes.minorticks_off()
axes.set_title("The majority of many raters keeps what they share")
axes.legend(frameon=False, title="raters with", loc="lower right")
plt.show()

# %% [markdown]
# **What you should have seen.** Noise averages out as votes are added. Taste does not: the majority of raters who
# share a fault has the fault, and with both faults the curve climbs only to where taste alone already was. A
# reward model does such averaging by itself, over *similar* pairs, so for it too noise costs data, while shared
# taste goes straight into the model. That is the next chapter.
#
# ## What could mislead you
# - These raters are all of one mind. Real groups differ, and whose taste wins is then decided by who is asked.
# - Their noise is independent of the prompt. Tired people err in runs, and on the hard ones.
# - The pairs are one model's. After the model has changed, the same rater sees other pairs and another gap.
# - Agreement with gold counts a narrow miss like a gross one. What matters for training is closer to the gaps
#   that are got wrong.
#
# ## Three exercises
# 1. Collect with `task.rater(seed=SEED, length=0.1)`. How much longer are chosen answers than
#    rejected ones, on average?
# 2. You may buy 1,000 judgments: each pair once, or 200 pairs five times? Argue with the last two figures; the
#    next chapter lets you try.
# 3. Give two groups of raters opposite tastes (`politeness=1` and `politeness=-1`) and pool their judgments. What
#    is left of either taste?

# %%
from importlib.metadata import version

names = ("rlhf-kit", "torch", "transformers", "trl", "peft")
print(", ".join(f"{name} {version(name)}" for name in names))
print(f"this notebook took {(time.monotonic() - started) / 60:.1f} minutes")
