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
# # AI feedback: a model as the judge
#
# People are slow, dear and few. So one asks a language model which answer is better, by rules that are written down,
# and trains on what it says: RLAIF. This notebook asks what that changes, in a world where the truth is known.
#
# **What you will learn.** What a constitution is and how a language model judges by it; how a judge's liking for a
# place is seen and removed; how far it agrees with people and with gold; whether a policy trained on its judgments is
# as good as one trained on people's; and what good/bad clicks alone can do (KTO).
#
# **What it reads and writes.** It takes the SFT model, the preferences and the DPO policy of the earlier chapters from
# `results/book`, where they are made first if they are missing. It writes to `results/notebooks/08_ai_feedback`,
# which is emptied at the start.
#
# **How long it takes.** About seven minutes on a CPU with two cores, and three more if the earlier models are missing.
# A GPU is used where there is one, though models this small will gain little from it; that has not been timed.

# %% tags=["parameters"]
PRESET = "pocket"
SEED = 0

# %%
import time
import warnings
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
work = rk.workspace("08_ai_feedback")
pd.set_option("display.max_colwidth", None)
sft, gold = flow.sft(), task.gold

# %% [markdown]
# ## The rules, written down
#
# A constitution is a list of principles. Each holds a question by which two answers are compared, and two requests for
# later: to criticise an answer, and to revise it. This one ships with the kit; `rk.feedback.constitution("mine.yaml")`
# reads yours.

# %%
rules = rk.feedback.constitution()
pd.DataFrame([{"principle": each.name, "compare": each.compare, "revise": each.revise} for each in rules])

# %% [markdown]
# A model of this notebook's size cannot read such sentences. With one that can, a judge is one line, and everything
# below works with it unchanged:
#
# ```python
# judge = rk.feedback.LanguageModelRater("Qwen/Qwen2.5-7B-Instruct", rules, load_in_4bit=True)
# judge = rk.feedback.EndpointRater("http://127.0.0.1:8000/v1", "your-model", constitution=rules)
# ```
#
# Here a stand-in has to do, and it is honest about what it is: a copy of the SFT model, fine-tuned on a person's
# judgments to say *yes* or *no* to "is this good ?". It prefers the answer to which it says yes more readily.
#
# ## The same pairs for everyone
#
# The SFT model answers the preference prompts. Half of the pairs teach the judge; the other half is what both, person
# and judge, will label.

# %%
prompts = task.prompts("preference", preset.n_preference_prompts, seed=SEED)
samples = rk.sample(sft, prompts, n=preset.samples_per_prompt, seed=SEED, **preset.sampling)
with warnings.catch_warnings(action="ignore"):  # of equal completions, counted in chapter 3
    items, singles = rk.feedback.items(samples), rk.feedback.items(samples, k=1)
to_teach, to_label = items[::2], items[1::2]
person = task.rater(seed=SEED)
lessons = rk.feedback.ask(to_teach, person, seed=SEED)
judge = rk.feedback.LanguageModelRater(
    rk.feedback.train_judge(
        sft, lessons, work / "judge", pocket.JUDGE_TEMPLATE, seed=SEED, **preset.sft | {"learning_rate": 1e-3}
    ),
    name="judge",
)
print(f"{len(lessons)} judgments to learn from, {len(to_label)} pairs to label")
print(judge.template.rating(to_label[0].prompt, to_label[0].completions[0]))

# %% [markdown]
# ## Does it favour a place?
#
# A judge that sees both answers at once may like the one that comes first. That is why every question is asked in both
# orders and the two are averaged. To see it, we ask the SFT model itself, which never learned to judge.

# %%
rows = pd.DataFrame([{"prompt": i.prompt, "a": i.completions[0], "b": i.completions[1]} for i in to_label])
rows["gap"] = np.subtract(gold(rows["prompt"], rows["a"]), gold(rows["prompt"], rows["b"]))
template = rk.feedback.Template(
    compare="{prompt} this is {first} that is {second} which is best ?",
    rate="{prompt} {completion} is this good ?",
    choices=("this", "that"),
    chat=False,
)
untrained = rk.feedback.LanguageModelRater(sft, template=template, name="untrained")
few = rows[rows["gap"] != 0].head(500)
p, flipped = (np.array(untrained.preferences(few["prompt"], few[x], few[y])) for x, y in (("a", "b"), ("b", "a")))
place = rk.stats.bootstrap(pd.Series(untrained.firsts[: len(few)]), few["prompt"])
right = rk.stats.bootstrap((p > 0.5) == (few["gap"] > 0), few["prompt"])
apart = np.abs(p + flipped - 1).max()
Markdown(
    f"In one order, it prefers the answer shown first with a probability of **{place}**, whichever that is. Over both "
    f"orders nothing of that is left: P(a over b) + P(b over a) differs from 1 by at most {apart:g}. What *is* left "
    f"sides with gold in **{right}** of pairs: averaging removes a bias, it does not add knowledge."
)

# %% [markdown]
# ## Judge and person
#
# Both label the held-out half. Gold says who is right, and where.

# %%
labelled = {
    "person": rk.feedback.ask(to_label, task.rater(seed=SEED + 1), seed=SEED),
    "judge": rk.feedback.ask(to_label, judge, seed=SEED),
}
for name, judged in labelled.items():
    rows[name] = [ranks[0] < ranks[1] for ranks in judged["ranks"]]
clear = rows[rows["gap"] != 0]
found = {
    f"{name} sides with gold": rk.stats.bootstrap((clear[name] == (clear["gap"] > 0)), clear["prompt"])
    for name in labelled
}
found["judge sides with person"] = rk.stats.bootstrap(rows["judge"] == rows["person"], rows["prompt"])
pd.DataFrame({"share [95% interval]": {name: str(value) for name, value in found.items()}})

# %%
edges = [0, 0.25, 0.5, 1, 2, 4, 10]
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for name, colour, marker in (("person", "#0072B2", "o"), ("judge", "#D55E00", "s")):
    bins = []
    for _, part in clear.groupby(pd.cut(clear["gap"].abs(), edges), observed=True):
        share = rk.stats.bootstrap(part[name] == (part["gap"] > 0), part["prompt"])
        bins.append({"gap": part["gap"].abs().mean(), **share._asdict()})
    bins = pd.DataFrame(bins)
    error = [bins["mean"] - bins["lo"], bins["hi"] - bins["mean"]]
    axes.errorbar(bins["gap"], bins["mean"], error, color=colour, marker=marker, capsize=3, label=name)
axes.axhline(0.5, color="#606060", linestyle="--", label="a coin")
axes.set(xlabel="gold gap between the two answers [utility]", ylabel="sides with gold [share]")
axes.set_title("Where the judge is worse than the person it learned from")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# **What you should have seen.** The judge agrees with gold less often than the person it learned from: a model of this
# size learns what good manners look like, and hardly any facts. It has no noise of its own: asked again it says the
# same, so its errors are systematic, and asking it twice mends nothing.
#
# ## RLHF and RLAIF
#
# The same pairs, labelled by each; from each a reward model, and from that a policy, with the same settings. The person
# labels once more with a judge's error rate: labels flipped until they are as often wrong. That tells what a policy
# loses because labels are *worse* from what it loses because they are *a model's*.

# %%
rng = np.random.default_rng(SEED)
right = {name: np.mean(clear[name] == (clear["gap"] > 0)) for name in labelled}
flip = max(0.0, (right["person"] - right["judge"]) / (2 * right["person"] - 1))  # leaves `judge` of them right
careless = labelled["person"].copy()
careless["ranks"] = [r[::-1] if rng.random() < flip else r for r in careless["ranks"]]
preferences = {
    "RLHF": rk.feedback.preferences(labelled["person"]),
    "RLAIF": rk.feedback.preferences(labelled["judge"]),
    "RLHF, as many errors": rk.feedback.preferences(careless),
}
policies = {}
for name, pairs in preferences.items():
    folder = work / name.replace(", ", "-").replace(" ", "-")
    reward = rk.train.reward_model(sft, pairs, folder / "reward", seed=SEED, callbacks=[], **preset.reward_model)
    settings = {**preset.sampling, **preset.ppo, "max_steps": min(15, preset.ppo["max_steps"]), "save_strategy": "no"}
    args = rk.PPOConfig(output_dir=str(folder / "ppo"), seed=SEED, **settings)
    trainer = rk.PPOTrainer(sft, reward, args, flow.prompts("train"), callbacks=[])
    trainer.train()
    trainer.save_model(str(folder / "model"))
    policies[name] = folder / "model"
print(f"{len(pairs)} labels each; the careless person's labels were flipped with probability {flip:.3f}")

# %% [markdown]
# ## Good and bad are enough for KTO
#
# Which of two is better is one kind of click. *Good* or *bad* about a single answer is another, and a cheaper one. KTO
# learns from it without pairs. As many clicks as DPO had pairs, from the same person. Where one kind is more frequent,
# it is given less weight: the weighted numbers of good and bad should be between 1:1 and 4:3 (2402.01306).

# %%
few = rk.feedback.choose(singles, len(items), seed=SEED)
clicks = rk.feedback.labels(rk.feedback.ask(few, person, "good/bad", seed=SEED))
good = np.mean(clicks["label"][:])
print(f"{len(clicks)} clicks, {good:.0%} of them good")
like_dpo = {name: value for name, value in preset.dpo.items() if not name.startswith("save")}
policies["KTO"] = rk.train.kto(
    sft, clicks, work / "kto", seed=SEED, desirable_weight=1.15 * (1 - good) / good, **like_dpo
)
policies["DPO"] = flow.dpo()

# %% [markdown]
# ## What came of it

# %%
test = flow.prompts("test")
rewards = {"proxy": rk.RewardModel(flow.reward_model()), "gold": gold}
scores = rk.evaluate.score({"SFT": sft, **policies}, test, rewards, reference=sft, seed=SEED, **preset.sampling)
summary = rk.evaluate.summary(scores).set_index("model")
gains = {name: str(rk.stats.paired_difference(scores, name, "SFT", "gold")) for name in policies}
shown = summary[["gold", "kl", "n_tokens", "win_rate_gold"]].round(2).assign(**{"gold against SFT": pd.Series(gains)})
display(shown)
rk.plots.by_kind(scores, "gold")

# %%
asked = {
    "RLAIF - RLHF": ("RLAIF", "RLHF"),
    "RLAIF - RLHF, as many errors": ("RLAIF", "RLHF, as many errors"),
    "KTO - DPO": ("KTO", "DPO"),
}
compared = {name: rk.stats.paired_difference(scores, *pair, "gold") for name, pair in asked.items()}
verdict = {True: "cannot tell", False: "differ"}
pd.DataFrame(
    [{"gold": name, "difference": str(d), "verdict": verdict[d.lo <= 0 <= d.hi]} for name, d in compared.items()]
).set_index("gold")

# %%
effects = task.effects(scores)
effects.pivot(index="effect", columns="model", values="share")[["SFT", *policies]].map("{:.1%}".format)

# %% [markdown]
# **What you should have seen.** Read the verdicts before the means: *cannot tell* is what one seed and a few hundred
# prompts often allow. Then compare RLAIF with the person whose labels were made as wrong as the judge's: equally many
# errors need not cost equally much, since the person's are scattered and the judge's are always the same. Look for
# lines on which one policy has left SFT and the other has not. And look at `kl` before you praise one: at the same
# settings, they went unequally far from SFT.
#
# ## Critique and revise
#
# A constitution has a second use, before any preference: a model criticises its own answer by a principle, revises it,
# and is fine-tuned on the revisions. No model of this size can do that either, so `RuleReader` stands in: it edits
# sentences by the world's rules as far as it knows them, and overlooks a fault now and then. It shows what revision
# does to text, not that a language model could do it.

# %%
careless = rk.sample(preset.base_model, test, n=1, seed=SEED, **preset.sampling)
reader = pocket.RuleReader(task.world, pocket.Rater(knowledge=0.7, lapse=0.2), seed=SEED)
revised = rk.feedback.critique_and_revise(reader, careless[["prompt_id", "kind", "prompt", "completion"]], rounds=4)
texts = pd.concat([revised[revised["round"] == 1].assign(round=0, revision=lambda f: f["answer"]), revised])
texts["completion"] = " " + texts["revision"]
texts["gold"] = gold(texts["prompt"], texts["completion"])
texts["harm"] = task.features(texts)["harm"]
figure, panels = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
asked = {"gold": (texts, "mean gold utility"), "harm": (texts[texts["kind"] == "harmful"], "harmful answers [share]")}
for axes, (value, (part, label)) in zip(panels, asked.items(), strict=True):
    means = [rk.stats.bootstrap(rows[value], rows["prompt_id"]) for _, rows in part.groupby("round")]
    ends = np.array([[m.mean - m.lo, m.hi - m.mean] for m in means]).T
    axes.errorbar(range(5), [m.mean for m in means], ends, marker="o", color="#0072B2", capsize=3)
    axes.set(xlabel="revisions", ylabel=label, xticks=range(5))
figure.suptitle("Each revision mends what its principle is about [95% interval]")
plt.show()
revised.loc[revised["revision"] != revised["answer"], ["prompt", "principle", "answer", "revision"]].head(4)

# %% [markdown]
# **What you should have seen.** Harm falls with each round, since each draws another principle, and never to nothing,
# since the reader overlooks. `rk.feedback.as_demonstrations(revised)` is what SFT would take.
#
# ## What could mislead you
#
# - **The judge is a stand-in.** A large judge knows far more than the policy it judges; this one knows less.
# - **Agreement with people is not agreement with gold.** A judge that copies a person's faults agrees very well.
# - **A judge has tastes.** Length, tone, its own style: look for them with `rk.feedback.biases`, as with any rater.
# - **Labels are cheap, so there are many.** More labels average noise out, and make a systematic error only surer.
# - **One seed.** A difference between two policies needs several.
#
# ## Three exercises
#
# 1. Write a constitution with a single principle of your own, and ask a chat model that you have to judge by it.
# 2. Use the judge as the reward itself: `rk.PPOTrainer(sft, judge.as_reward(), ...)`. What does PPO find first?
# 3. Train a policy with `rk.train.rejection_sampling` on the judge's reward, and put it on the table above.

# %%
names = ("rlhf-kit", "torch", "transformers", "trl", "peft")
print(", ".join(f"{name} {version(name)}" for name in names))
print(f"this notebook took {(time.monotonic() - started) / 60:.1f} minutes")
