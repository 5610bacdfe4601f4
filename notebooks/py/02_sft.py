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
# # Supervised fine-tuning: learning by imitation
#
# **What you will learn.** What exactly is trained on (the completion's tokens and no others), how to read the
# training curve, what changes in the answers and by how much, and why imitation alone stops where it stops.
#
# **What it reads and writes.** It reads the base model that comes with the package. It trains an SFT model into
# `results/notebooks/02_sft`, which is emptied at the start. Later chapters have an SFT model of their own, made
# with the same settings by `rk.Pipeline(...).sft()`, so this one is yours to break.
#
# **How long it takes.** About a minute and a half on a CPU with two cores. A GPU is used where there is one, but
# with a model this small it waits most of the time: expect about as long.

# %% tags=["parameters"]
PRESET = "pocket"
SEED = 0

# %%
import time

import matplotlib.pyplot as plt
import pandas as pd
import torch

import rlhf_kit as rk

started = time.monotonic()
preset = rk.setup(PRESET, seed=SEED)
work = rk.workspace("02_sft")
task, gold = preset.task, preset.task.gold
pd.options.display.max_colwidth = pd.options.display.max_columns = None

# %% [markdown]
# ## The data: prompt and completion
# Two columns of text are all that SFT needs; the others are carried along for us. The completion begins with a
# space, so that the two can simply be put together, and the end-of-text token is added by the trainer, never
# typed.
#
# We keep a tenth of the demonstrations aside, split **by prompt**: a prompt that occurs twice is on one side
# only.

# %%
demonstrations = task.demonstrations(preset.n_demonstrations, seed=SEED)
rk.data.check(demonstrations, ["prompt", "completion"])
learn, aside = rk.data.split_by_prompt(demonstrations, 0.1, seed=SEED)
print(f"{len(learn)} demonstrations to learn from, {len(aside)} kept aside, on other prompts")
learn.select(range(5)).to_pandas()[["prompt", "completion", "kind"]]

# %% [markdown]
# ## The loss is on the completion only
# The model reads prompt and completion as one row of tokens, and predicts each from those before. But the prompt
# is given: learning to write *users' questions* is not the aim. So its tokens are masked, and the loss is the
# mean of `-log p` over the completion, the end-of-text token included; without that one the model would never
# learn to stop.

# %%
tokenizer = rk.models.load_tokenizer(preset.base_model)
row = learn[0]
tokens = rk.models.encode_pairs(tokenizer, [row["prompt"]], [row["completion"]])
width = tokens.completion_mask.shape[1]
n_prompt = tokens.input_ids.shape[1] - width
table = pd.DataFrame({"token": tokenizer.convert_ids_to_tokens(tokens.input_ids[0])})
table["token"] = table["token"].str.replace("Ġ", "_")  # the tokenizer's sign for a space before the word
table["part"] = ["prompt"] * n_prompt + ["completion"] * width
table["in the loss"] = [0] * n_prompt + tokens.completion_mask[0].tolist()
table.T

# %% [markdown]
# **What you should have seen.** A zero under every token of the prompt, a one under every token of the completion
# and under the last, `<|endoftext|>`. (`_` marks a space before the word; in this language each word is a token.)
#
# ## Training
# `rk.train.sft` is thin: it hands model and data to TRL's `SFTTrainer`, with the settings of the preset, and
# writes a directory. We ask it to keep the weights every 50 steps, to look at the way as well as at the end.

# %%
print(preset.sft)
sft = rk.train.sft(
    preset.base_model,
    learn,
    out=work / "sft",
    seed=SEED,
    **{**preset.sft, "save_strategy": "steps", "save_steps": 50, "save_only_model": True},
)

# %% [markdown]
# ## The training curve, and the one that matters
# The trainer logs the loss on what it is learning from. The loss on demonstrations kept aside tells whether it
# learns the manner or the rows. Both are in nats per token: the mean of `-log p` over completion tokens.


# %%
@torch.no_grad()
def surprise(model_dir, rows):
    """-log p of each completion token (rows, tokens) in nats and the mask of real ones, under a model directory."""
    model = rk.models.load_causal(model_dir)
    tokens = rk.models.encode_pairs(tokenizer, rows["prompt"], rows["completion"]).to(model.device)
    logprobs, _ = rk.models.completion_logprobs(model, tokens)
    return -logprobs.cpu(), tokens.completion_mask.cpu().bool()


steps = [0, *range(50, preset.sft["max_steps"] + 1, 50)]
directories = [preset.base_model, *(f"{sft}/checkpoint-{step}" for step in steps[1:])]
held_out_loss = []
for directory in directories:
    nats, real = surprise(directory, aside[:])
    held_out_loss.append(nats[real].mean().item())
pd.DataFrame({"step": steps, "loss on demonstrations kept aside": held_out_loss}).round(3)

# %%
history = rk.train.history(sft)
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
axes.plot(history["step"], history["loss"], color="#56B4E9", label="demonstrations being learned")
axes.plot(steps, held_out_loss, "o-", color=rk.plots.COLOURS["SFT"], label="demonstrations kept aside")
axes.set(xlabel="optimizer step", ylabel="loss [nats per completion token]")
axes.set_title("Most of what imitation can learn is learned early")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# **What you should have seen.** Both curves fall, fast at first and then hardly, and they stay close: little of
# it is memory. Note the scale: the fall is a small part of the whole loss. The base knew the language already,
# and most of what is left is chance (which greeting, which of several true facts, which *error*), which no model
# can predict. How much that small part matters you will see in the answers.
#
# Where does the model's surprise sit? Here is one demonstration from the ones kept aside, token by token, before
# and after.

# %%
refusals = [i for i, row in enumerate(aside) if row["kind"] == "harmful" and "sorry" in row["completion"]]
one = aside.select(refusals[:1])
words = [word.replace("Ġ", "") for word in tokenizer.tokenize(one[0]["completion"])] + ["<end>"]
figure, axes = plt.subplots(figsize=(min(11, 3 + 0.5 * len(words)), 3.8), layout="constrained")
for shift, (name, directory) in zip((-0.2, 0.2), {"base": preset.base_model, "SFT": sft}.items(), strict=True):
    nats, _ = surprise(directory, one[:])
    axes.bar(pd.RangeIndex(len(words)) + shift, nats[0], width=0.4, color=rk.plots.COLOURS[name], label=name)
axes.set_xticks(range(len(words)), words, rotation=45, ha="right")
axes.set(xlabel="token of the completion", ylabel="surprise, -log p [nats]")
axes.set_title(one[0]["prompt"])
axes.grid(axis="x", visible=False)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# **What you should have seen.** Surprise is high where something is *decided* (how to begin, whether to refuse,
# whether to go on) and near zero inside a phrase. SFT changes the odds of decisions, not the grammar, which the
# base had already.
#
# ## Before and after, side by side
# The same held-out prompts, one answer each. Read a few before you look at any number.

# %%
test = task.prompts("test", preset.n_test_prompts, seed=SEED)
models = {"base": preset.base_model, "SFT": sft}
scores = rk.evaluate.score(models, test, {"gold": gold}, seed=SEED, **preset.sampling)
firsts = scores[scores["sample"] == 0]
side_by_side = firsts.pivot(index=["kind", "prompt"], columns="model", values=["completion", "gold"])
side_by_side.columns = [f"{model}: {value}" for value, model in side_by_side.columns]
side_by_side = side_by_side[["base: completion", "base: gold", "SFT: completion", "SFT: gold"]]
side_by_side.infer_objects().round(2).groupby("kind").head(2).reset_index()

# %% [markdown]
# ## How much better, and how sure are we?
# Both models answered the same prompts, so we compare **within** prompts: the mean over prompts of the
# difference. Its interval comes from drawing prompts again and again (a bootstrap); prompts that are hard for
# both then cancel out.

# %%
for name in models:
    of_model = scores[scores["model"] == name]
    print(f"{name:5s} mean gold {rk.stats.bootstrap(of_model['gold'], of_model['prompt_id'])}")
paired = rk.stats.paired_difference(scores, "SFT", "base", "gold")
print(f"SFT - base, paired by prompt: {paired}")
print(f"chance that an SFT answer beats a base answer: {rk.stats.win_rate(scores, 'SFT', 'base', by='gold')}")

# %%
rk.plots.reward_shift(scores, rewards=["gold"], models=["base", "SFT"], baseline="base")

# %% [markdown]
# **What you should have seen.** The whole distribution moves to the right, and the interval of the shift lies far
# from zero. But look at the left: answers that are plainly wrong or harmful have become rarer, not rare.
#
# ## Imitation ends at what it imitates
# For each thing that an answer can do we compare three shares: the base, the SFT model, and the demonstrations
# themselves.

# %%
shown = demonstrations.to_pandas().assign(model="demonstrations", finished=True)
shown["prompt_id"] = pd.factorize(shown["prompt"])[0]
on_seen = scores[scores["seen"]]  # the demonstrations know no held-out cell, so the models are not asked about one here
effects = pd.concat([task.effects(part) for part in (on_seen, shown)])
names = list(effects["effect"].unique())[::-1]
figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
colours = rk.plots.colours(["base", "SFT", "demonstrations"])
for shift, (model, rows) in zip((0.2, 0, -0.2), effects.groupby("model", sort=False), strict=True):
    height = [names.index(effect) + shift for effect in rows["effect"]]
    error = [rows["share"] - rows["share_lo"], rows["share_hi"] - rows["share"]]
    axes.errorbar(rows["share"], height, xerr=error, fmt="o", color=colours[model], capsize=3, label=model)
axes.set_yticks(range(len(names)), names)
axes.set(xlabel="share of the answers it concerns [95% interval over prompts]", xlim=(-0.02, 1.02))
axes.set_title("SFT lands near its demonstrations, for better and for worse", pad=34)
axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2)
plt.show()

# %% [markdown]
# **What you should have seen.** On most lines the SFT model has left the base and sits close to the
# demonstrations: it refuses harm about as often as they do, also refuses harmless *borderline* prompts about as
# often, and errs about as often. That is what imitation means: the model learns the **distribution** of what
# people wrote, faults included. Where a line lags behind (look at *sides with a false claim*), new odds are not
# enough: to say no, a model has to compare the claim with what it knows.
#
# ## Nothing lost?
# Fine-tuning can cost a model what it could do before. The *skill* is in the demonstrations, so it should
# survive; and the facts of held-out cells, which no demonstration mentions, are known from pretraining if at all.

# %%
right = task.features(scores)[["skill_right", "answer_right"]].max(axis=1)
asks_fact = scores["kind"].isin(["ask", "brief", "leading"])
groups = {
    "the skill": scores["kind"] == "skill",
    "facts, seen cells": asks_fact & scores["seen"],
    "facts, held-out cells": asks_fact & ~scores["seen"],
}
rows = []
for name, member in groups.items():
    part = scores[member].assign(right=right[member])
    shares = {model: rk.stats.bootstrap(r["right"], r["prompt_id"]) for model, r in part.groupby("model")}
    change = rk.stats.paired_difference(part, "SFT", "base", "right")
    rows.append({"right answers": name, "prompts": part["prompt_id"].nunique(), **shares, "SFT - base": change})
pd.DataFrame(rows).set_index("right answers").map(str)

# %% [markdown]
# **What you should have seen.** The skill is kept. Facts of seen cells are right more often than before. On the
# held-out cells look at the last column and its interval before you say anything: there are few such prompts, and
# nothing there was taught.
#
# ## What SFT cannot do
# If the model only lacked practice, more of it would help. So: gold along the way, at each checkpoint, beside the
# mean gold of the demonstrations.

# %%
along = {str(step): directory for step, directory in zip(steps, directories, strict=True)}
way = rk.evaluate.score(along, test.filter(lambda row: row["seen"]), {"gold": gold}, seed=SEED, **preset.sampling)
shown["gold"] = gold(shown["prompt"], shown["completion"])
target = rk.stats.bootstrap(shown["gold"], shown["prompt_id"])
points = rk.evaluate.summary(way, baseline="0")
error = [points["gold"] - points["gold_lo"], points["gold_hi"] - points["gold"]]
figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
axes.axhspan(target.lo, target.hi, color=colours["demonstrations"], alpha=0.3, linewidth=0, label="demonstrations")
axes.errorbar(steps, points["gold"], yerr=error, fmt="o-", color=colours["SFT"], capsize=3, label="model")
axes.set(xlabel="optimizer step", ylabel="mean gold utility [95% interval]")
axes.set_title("Gold levels off near the demonstrations' own mean")
axes.legend(frameon=False, loc="lower right")
plt.show()

# %% [markdown]
# **What you should have seen.** Gold rises to the neighbourhood of the demonstrations and stays. The loss has no
# notion of *better*: a demonstration with an error is as much worth imitating as one without. To go further, the
# model has to be told which of its own answers are good. Judging is also easier than writing, so that is where we
# ask people next (notebook 03).
#
# One cheap trick first. Sampling at a lower temperature makes the model say what it finds most likely. Where most
# demonstrations are right, the majority is better than the average.

# %%
cool = []
for temperature in (1.0, 0.5, 0.0):
    said = rk.sample(sft, test, n=2, temperature=temperature, seed=SEED, **preset.sampling)
    part = rk.sampling.add_rewards(said, {"gold": gold})
    mean = rk.stats.bootstrap(part["gold"], part["prompt_id"])
    distinct = said.groupby("prompt_id")["completion"].nunique().mean()
    cool.append({"temperature": temperature, "mean gold": str(mean), "different answers of 2": round(distinct, 2)})
pd.DataFrame(cool).set_index("temperature")

# %% [markdown]
# **What you should have seen.** Gold rises as the temperature falls, and variety goes: at temperature 0 a prompt
# has one answer. In this world that is a great deal, because most demonstrations are right and their errors
# scatter. It can only sharpen what the majority does, though; an error that most people make it makes for
# certain. And learning from feedback needs variety to choose from, so from here on all models answer at
# temperature 1.
#
# ## What could mislead you
# - A lower loss is not a better model. Loss measures imitation, and what is imitated here is worse than what
#   could be.
# - The models answer at temperature 1, as they will in PPO. Compare models at one temperature only, or you
#   measure that.
# - These are the demonstrations of one draw and one training run. Another `SEED` moves every number a little.
# - Demonstrations are on *sft* prompts, the models' shares on *test* prompts: the mix of kinds is the same, the
#   prompts are not.
#
# ## Three exercises
# 1. Train on a tenth of the demonstrations (`learn.select(range(len(learn) // 10))`). Where do the two curves
#    part?
# 2. Train on those demonstrations only whose gold is above the median. Which shares in the figure move, and does
#    the model pass the demonstrations' mean?
# 3. Leave the skill out (`learn.filter(lambda row: row["kind"] != "skill")`). How much of it is lost, and why not
#    all?

# %%
from importlib.metadata import version

names = ("rlhf-kit", "torch", "transformers", "trl", "peft")
print(", ".join(f"{name} {version(name)}" for name in names))
print(f"this notebook took {(time.monotonic() - started) / 60:.1f} minutes")
