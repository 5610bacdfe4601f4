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
# # A tour: from demonstrations to an aligned model
#
# **What you will learn.** How the stages of RLHF hand over to each other: demonstrations, supervised fine-tuning
# (SFT), judgments, a reward model, PPO, and DPO as the shorter way. And how to tell whether it worked: the shift
# of the reward, what it cost in distance from the SFT model, and what a mean hides.
#
# **What it reads and writes.** It reads nothing but the small base model that comes with the package, and needs
# no network. Everything it makes goes to `results/notebooks/00_tour`, which is emptied at the start.
#
# **How long it takes.** About two and a half minutes on a CPU with two idle cores, twice that where other
# programs compete. A GPU is used where there is one, but a model of under a million parameters hardly needs it:
# expect minutes there too.

# %% tags=["parameters"]
PRESET = "pocket"
SEED = 0

# %%
import time

import pandas as pd
from IPython.display import display

import rlhf_kit as rk

started = time.monotonic()
preset = rk.setup(PRESET, seed=SEED)
work = rk.workspace("00_tour")
task, gold = preset.task, preset.task.gold
pd.options.display.max_colwidth = None

test = task.prompts("test", preset.n_test_prompts, seed=SEED)  # held out: no stage below learns on these
one_of_each = test.select(pd.Series(test["kind"][:]).drop_duplicates().index)
answers = rk.sample(preset.base_model, one_of_each, seed=SEED, **preset.sampling)
rk.sampling.add_rewards(answers, {"gold": gold})[["kind", "prompt", "completion", "gold"]]

# %% [markdown]
# This is the **pocket world**, an animal help desk: one prompt of each kind, the base model's answer, and its
# **gold utility**. Gold is what we really want, and here alone it is known exactly: it pays for right facts and
# for refusing harm, and charges for errors, empty phrases and needless refusals (notebook 01 takes it apart). Out
# in the world nobody has such a column; here it lets us check every claim.
#
# **What you should have seen:** fluent text of mixed quality. The base was trained on a poor corpus and repeats
# it.
#
# ## 1. Demonstrations, and a model that imitates them
# People write good answers, and the model is trained on them token by token. The result is a directory, like
# every model here, and the starting point of all that follows.

# %%
demonstrations = task.demonstrations(preset.n_demonstrations, seed=SEED)
display(demonstrations.select_columns(["kind", "prompt", "completion"]).select(range(4)).to_pandas())
sft = rk.train.sft(preset.base_model, demonstrations, out=work / "sft", seed=SEED, **preset.sft)

# %% [markdown]
# **What you should have seen:** the loss, in nats per token, falls, but not far. The base writes the language
# already, and most of what is left is chance: the same answer can be said in several ways, and some
# demonstrations are wrong. That small fall is a large change in what the model does, as the last figures show.
#
# ## 2. Judgments: which of two answers is better?
# Judging is easier than writing. The SFT model answers each prompt several times, and a simulated rater, who has
# faults of its own, compares the answers in pairs. (Two equal answers ask nothing, so repeated ones are left
# out.)

# %%
prompts = task.prompts("preference", preset.n_preference_prompts, seed=SEED)
samples = rk.sample(sft, prompts, n=preset.samples_per_prompt, seed=SEED, **preset.sampling)
samples = samples.drop_duplicates(["prompt_id", "completion"])
preferences = rk.feedback.collect(samples, rater=task.rater(seed=SEED), seed=SEED)
print(f"{len(samples)} different samples for {len(prompts)} prompts, {len(preferences)} judgments")
preferences.select_columns(["prompt", "chosen", "rejected"]).select(range(4)).to_pandas()

# %% [markdown]
# ## 3. A reward model that predicts the judgments
# It turns *which is better* into a number for any answer. To see whether it learned something general, we let
# another draw of the same rater judge answers to held-out prompts, and ask how often the reward model takes the
# same side; and how often gold itself does, for the rater errs, and the best possible reward model could do no
# better.

# %%
reward_dir = rk.train.reward_model(sft, preferences, out=work / "reward", seed=SEED, **preset.reward_model)
proxy = rk.RewardModel(reward_dir)

fresh = rk.sample(sft, test, n=2, seed=SEED + 1, **preset.sampling).drop_duplicates(["prompt_id", "completion"])
held_out_pairs = rk.feedback.collect(fresh, rater=task.rater(seed=SEED + 1))
print(f"{len(held_out_pairs)} judgments on held-out prompts; the same side was taken by")
print("  the reward model", rk.evaluate.accuracy(proxy, held_out_pairs))
print("  gold            ", rk.evaluate.accuracy(gold, held_out_pairs))

# %% [markdown]
# **What you should have seen:** in the table, a high accuracy on pairs that it has seen several times. Under it
# what counts: on held-out prompts it is better than a coin (0.5) and falls short of gold, which is itself far
# from 1. Some of what separates good from bad it has not learned, so optimising its score blindly would be a
# mistake: hence the leash below.
#
# ## 4. PPO: let the model try, score what it says, do more of what scores well
# The reward is the reward model's score less `kl_coef` times the distance (KL, in nats per answer) from the SFT
# model, which keeps the policy from leaving the language for whatever the reward model happens to overrate. A few
# updates suffice here; notebook 05 goes on for longer.

# %%
settings = {**preset.sampling, **preset.ppo, "max_steps": min(15, preset.ppo["max_steps"]), "save_strategy": "no"}
ppo = rk.PPOTrainer(
    model=sft,
    reward=proxy,
    args=rk.PPOConfig(output_dir=str(work / "ppo-run"), seed=SEED, **settings),
    train_dataset=task.prompts("train", seed=SEED),
)
ppo.train()
ppo.save_model(str(work / "ppo"))
log = pd.DataFrame(ppo.state.log_history).dropna(subset="reward")
rk.plots.training(log, ["reward", "kl", "entropy", "completion_length"], x="step")

# %% [markdown]
# **What you should have seen:** the reward of the rollouts rises, and the KL rises with it: that is its price.
#
# ## 5. DPO: the same judgments, without reward model and without rollouts
# DPO pushes chosen answers up and rejected ones down, relative to the SFT model. It is ordinary training on
# pairs.

# %%
dpo = rk.train.dpo(sft, preferences, out=work / "dpo", seed=SEED, **preset.dpo)

# %% [markdown]
# ## 6. Did it work?
# All four models answer the same held-out prompts. Each answer gets two scores: the **proxy** (the reward model,
# which PPO was trained to please) and **gold** (what we wanted). Only the second can tell.

# %%
models = {"base": preset.base_model, "SFT": sft, "PPO": work / "ppo", "DPO": dpo}
scores = rk.evaluate.score(models, test, {"proxy": proxy, "gold": gold}, reference=sft, seed=SEED, **preset.sampling)
display(rk.plots.reward_shift(scores))

summary = rk.evaluate.summary(scores).set_index("model")
quantities = ["gold", "proxy", "kl", "n_tokens", "win_rate_gold"]
rows = {q: summary[[q, f"{q}_lo", f"{q}_hi"]].itertuples(index=False) for q in quantities}
display(pd.DataFrame({q: [str(rk.stats.Interval(*row)) for row in rows[q]] for q in quantities}, summary.index))
display(rk.evaluate.compare(scores).round(2))

# %% [markdown]
# **What you should have seen:** PPO and DPO move the proxy to the right of SFT, and gold too. The proxy's unit is
# the spread of the SFT model's own scores, gold's is utility, so compare directions rather than sizes; and note
# that whoever gains more by proxy need not gain more by gold. The first table has each mean with its 95% interval
# (KL in nats per answer to the SFT model, length in tokens, wins over SFT by gold). The second compares PPO with
# DPO, and says *cannot tell* where the interval includes *no difference*. These are one seed and short runs.
#
# ## 7. What the mean hides
# The same scores by kind of prompt, then the answers themselves, side by side.

# %%
rk.plots.by_kind(scores)

# %%
effects = task.effects(scores)
display(effects.pivot(index="effect", columns="model", values="share")[list(models)].map("{:.0%}".format))
firsts = scores[scores["sample"] == 0].pivot(index=["kind", "prompt"], columns="model", values="completion")
firsts.groupby("kind").head(1)[["SFT", "PPO", "DPO"]]

# %% [markdown]
# **What you should have seen:** the gain is not spread evenly. Refusing harm improves most, because every rater
# sees it. Other kinds gain less, and some may lose: longer answers please the rater, and a *brief* prompt asked
# for short ones. The *skill* (copying or reversing a list of words) is never rewarded; where it suffers, that is
# called the **alignment tax**.
#
# ## What could mislead you
# - The proxy always rises, because it is what was optimised. Without gold, held-out people would have to judge.
# - One seed, a short PPO run and a small world: enough to see the mechanism, not to rank PPO and DPO.
# - A mean can rise while some kind of prompt gets worse. Look at the kinds before you believe the mean.
#
# ## Three exercises
# 1. Set `kl_coef` to 0 in the PPO cell (`settings["kl_coef"] = 0.0`). What happens to the proxy, to gold, to the
#    text?
# 2. Give the rater a fault, such as `task.rater(seed=SEED, length=0.2)`. Where does it come
#    out?
# 3. Halve the judgments (`preferences.select(range(len(preferences) // 2))`). Which of PPO and DPO suffers more,
#    and is the difference larger than its interval?

# %%
from importlib.metadata import version

names = ("rlhf-kit", "torch", "transformers", "trl", "peft")
print(", ".join(f"{name} {version(name)}" for name in names))
print(f"this notebook took {(time.monotonic() - started) / 60:.1f} minutes")
