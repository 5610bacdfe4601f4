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
# # DPO: training on the preferences themselves
#
# PPO needs a reward model, a value model and fresh samples in every step. DPO (Rafailov et al. 2023) skips them all:
# it turns the preference data straight into a loss on the policy.
#
# **What you will learn.** Where that loss comes from, how to compute it by hand, how to read its curves (one of them
# looks alarming and need not be), what the reward model hidden in a DPO policy knows, and what it means that nothing
# is ever sampled.
#
# **What it reads and writes.** It takes the SFT model, the preferences and, as a judge, the reward model of the
# earlier chapters from `results/book`, where they are made first if they are missing. It trains policies into
# `results/notebooks/06_dpo`, which is emptied at the start.
#
# **How long it takes.** About two and a half minutes on a CPU with two cores, and three more if the earlier models
# are missing. A GPU is used where there is one, though a model this small will gain little from it; that has not been
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
import torch
from IPython.display import Markdown, display

import rlhf_kit as rk

started = time.monotonic()
preset = rk.setup(PRESET, seed=SEED)
task = preset.task
flow = rk.Pipeline(preset, rk.results("book") / f"{PRESET}-{SEED}")
work = rk.workspace("06_dpo")
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## The idea, in three lines
#
# 1. The best policy for a reward r under a KL charge beta is known in closed form: pi(y) is proportional to pi_ref(y)
#    exp(r(y) / beta).
# 2. Turned round: r(y) = beta log(pi(y) / pi_ref(y)) + something that depends on the prompt alone.
# 3. A preference only depends on the *difference* of two rewards to one prompt, and there that something cancels.
#
# So a policy already is a reward model. Put line 2 into the Bradley-Terry loss of chapter 4, and train the policy on
# it.

# %%
folder = flow.preferences()
pairs, held_out = (rk.data.load(folder / f"{part}.parquet") for part in ("train", "test"))
display(
    Markdown(f"**{len(pairs):,} judgments to learn from, {len(held_out):,} held out**, the same as the reward model's.")
)
pairs.to_pandas().drop_duplicates("kind")[["kind", "prompt", "chosen", "rejected"]]

# %% [markdown]
# ## The loss, by hand
#
# All it takes is the log-probability of a whole completion under a model: the sum over its tokens.

# %%
tokenizer = rk.models.load_tokenizer(flow.sft())


@torch.no_grad()
def logprob(model, dataset, side):
    """log pi(completion | prompt) in nats of one side of each pair, under a model directory."""
    loaded = rk.models.load_causal(model)
    tokens = rk.models.encode_pairs(tokenizer, dataset["prompt"][:], dataset[side][:]).to(loaded.device)
    chunks = torch.arange(len(dataset)).split(128)
    sums = [rk.models.completion_logprobs(loaded, tokens.rows(rows))[0].sum(1) for rows in chunks]
    return torch.cat(sums).cpu().numpy()


def by_hand(policy, dataset, beta):
    """The first pair of a dataset: its log-ratios, rewards and loss under a policy, with SFT as the reference."""
    rows = []
    for side in ("chosen", "rejected"):
        ours, theirs = logprob(policy, dataset, side)[0], logprob(flow.sft(), dataset, side)[0]
        rows.append({"completion": dataset[side][0], "log pi": ours, "log pi_ref": theirs, "log-ratio": ours - theirs})
    table = pd.DataFrame(rows, index=["chosen", "rejected"])
    table["reward"] = beta * table["log-ratio"]
    return table, np.log1p(np.exp(table.loc["rejected", "reward"] - table.loc["chosen", "reward"]))


# %%
beta = preset.dpo["beta"]
pair = held_out.filter(lambda row: row["kind"] == "leading").select([0])
before, loss = by_hand(flow.sft(), pair, beta)
display(Markdown(f"**{pair['prompt'][0]}**"))
display(before.round(3))
Markdown(f"Before training, policy and reference are one: the loss is {loss:.4f}, which is log 2 = {np.log(2):.4f}.")

# %% [markdown]
# Every pair starts there, whatever it says. If the first logged loss of a DPO run is not log 2, the policy and its
# reference are not the same model, and the run is worth nothing. It is a common accident with adapters: switched off,
# they leave the raw base as the reference, not the SFT model.
#
# ## Training

# %%
model = rk.train.dpo(flow.sft(), pairs, out=work / "model", seed=SEED, **preset.dpo)

# %%
history = rk.train.history(model)
columns = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected"]
rk.plots.training(history, columns, x="step")

# %% [markdown]
# **What you should have seen.** The loss leaves log 2 and falls, slowly; margins and accuracies rise. "Reward" here
# is the implicit one, beta times a log-ratio, in nats. The two panels of log-probabilities jump about, because every
# batch holds other completions. To see what happens to them, the completions must stay the same.
#
# ## What becomes of a chosen answer?
#
# The held-out pairs, at each saved checkpoint: how much likelier than under SFT have chosen and rejected become?

# %%
saved = sorted((int(path.name.split("-")[1]), path) for path in (work / "model").glob("checkpoint-*"))
reference = {side: logprob(flow.sft(), held_out, side) for side in ("chosen", "rejected")}
ratios = {0: {side: 0 * reference[side] for side in reference}}
for step, path in saved:
    ratios[step] = {side: logprob(path, held_out, side) - reference[side] for side in reference}
prompt_ids = held_out["prompt_id"][:]
figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
axes.axhline(0, color="#606060", linestyle="--", linewidth=1.5, label="as under SFT")
for side, colour in (("chosen", "#009E73"), ("rejected", "#D55E00")):
    means = [rk.stats.bootstrap(ratios[step][side], prompt_ids) for step in ratios]
    error = np.array([[m.mean - m.lo, m.hi - m.mean] for m in means]).T
    axes.errorbar(list(ratios), [m.mean for m in means], yerr=error, marker="o", capsize=4, color=colour, label=side)
axes.set(xlabel="optimizer step", ylabel="log pi - log pi_ref [nats/completion]")
axes.set_title("Held-out pairs: the gap opens, at what level?")
axes.legend()
plt.show()

# %%
last = ratios[max(ratios)]
means = {side: rk.stats.bootstrap(last[side], prompt_ids) for side in last}
fell = "fell" if means["chosen"].hi < 0 else "rose" if means["chosen"].lo > 0 else "hardly moved"
Markdown(
    f"In the end the log-probability of *chosen* completions {fell} ({means['chosen']} nats), that of *rejected* ones "
    f"moved by {means['rejected']}. The loss sees only the difference, "
    f"{means['chosen'].mean - means['rejected'].mean:.2f} nats."
)

# %% [markdown]
# **What you should have seen.** The loss asks for a gap and does not care at what level. Both sides of a pair are
# ordinary SFT samples, so it is common for *both* to become less likely, the rejected one more so. The probability
# that is lost must have gone to completions that are in no pair; we shall see where.
#
# The pair from above, once more:

# %%
after, loss = by_hand(model, pair, beta)
display(after.round(3))
Markdown(
    f"The loss of this pair went from {np.log(2):.3f} to {loss:.3f}; the margin of its implicit rewards from 0 to "
    f"{after.loc['chosen', 'reward'] - after.loc['rejected', 'reward']:+.3f}."
)

# %% [markdown]
# ## Before and after

# %%
test = flow.prompts("test")
proxy, gold = rk.RewardModel(flow.reward_model()), task.gold
models, rewards = {"SFT": flow.sft(), "DPO": model}, {"proxy": proxy, "gold": gold}
scores = rk.evaluate.score(models, test, rewards, reference=flow.sft(), seed=SEED, **preset.sampling)
firsts = scores[(scores["sample"] == 0) & scores["prompt_id"].isin(scores.drop_duplicates("kind")["prompt_id"])]
wide = firsts.pivot(index=["kind", "prompt"], columns="model", values=["completion", "gold"]).round(2)
wide.swaplevel(axis=1)[[(model, value) for model in models for value in ("completion", "gold")]]

# %%
shift = {value: rk.stats.paired_difference(scores, "DPO", "SFT", value) for value in ("proxy", "gold", "n_tokens")}
wins = rk.stats.win_rate(scores, "DPO", "SFT", by="gold")
spent = rk.stats.bootstrap(*(scores.loc[scores["model"] == "DPO", name] for name in ("kl", "prompt_id")))
verdict = "clear of zero" if shift["gold"].lo > 0 or shift["gold"].hi < 0 else "not clear of zero: one cannot tell"
display(
    Markdown(
        f"On {test.num_rows} held-out prompts DPO moves gold by **{shift['gold']}** ({verdict}) and the proxy, which "
        f"it has never met, by **{shift['proxy']}**, at a KL of {spent} nats a completion. Its completions are "
        f"{shift['n_tokens'].mean:+.1f} tokens longer than SFT's; its win rate by gold is {wins}."
    )
)
effects = task.effects(scores)
effects.pivot(index="effect", columns="model", values="share")[list(models)].map("{:.1%}".format)

# %% [markdown]
# **What you should have seen.** Compare with the same table in chapter 5. The two methods do not mend the same
# things, and the skill that nobody rewards may suffer here as well: nothing in the loss protects it but the nearness
# to SFT.
#
# ## The reward model inside the policy
#
# Line 2 of the idea says that the policy is a reward model: beta times the log-ratio. Let it judge the held-out
# pairs, beside the learned reward model of chapter 4, which saw the very same data.

# %%
implicit = {side: beta * last[side] for side in last}
learned = {side: np.array(proxy(held_out["prompt"][:], held_out[side][:])) for side in last}
true = {side: np.array(gold(held_out["prompt"][:], held_out[side][:])) for side in last}
differ = true["chosen"] != true["rejected"]
sign = np.sign(true["chosen"] - true["rejected"])[differ]
groups = np.asarray(prompt_ids)
rows = []
for name, score in (("implicit reward of DPO", implicit), ("learned reward model", learned)):
    margin = score["chosen"] - score["rejected"]
    rater = rk.stats.pair_accuracy(margin, groups)
    by_gold = rk.stats.pair_accuracy(sign * margin[differ], groups[differ])
    rows.append({"judge": name, "agrees with the rater": str(rater), "orders as gold does": str(by_gold)})
pd.DataFrame(rows)

# %%
x, y = (score["chosen"] - score["rejected"] for score in (learned, implicit))
figure, axes = plt.subplots(figsize=(6, 4.6), layout="constrained")
for keep, colour, name in ((sign > 0, "#0072B2", "gold agrees with the rater"), (sign < 0, "#D55E00", "gold does not")):
    axes.scatter(x[differ][keep], y[differ][keep], s=10, alpha=0.4, color=colour, label=name, linewidths=0)
axes.axhline(0, color="#606060", linewidth=1)
axes.axvline(0, color="#606060", linewidth=1)
axes.set(xlabel="margin of the learned reward [standard deviations]", ylabel="margin of the implicit reward [nats]")
axes.set_title(f"Two judges of the same pairs: correlation {np.corrcoef(x, y)[0, 1]:.2f}")
axes.legend(loc="lower right", markerscale=2)
plt.show()

# %% [markdown]
# **What you should have seen.** The two agree on the whole and differ in many cases. Both learned from the same
# judgments, but they generalise differently: one has a head that can weigh a whole text, the other must express its
# opinion through next-word probabilities.
#
# ## Nothing is sampled: what follows
#
# PPO draws from the policy and corrects what it then sees. DPO moves the policy by looking at completions that *SFT*
# wrote, and never looks at what comes out. Where did the probability go that both sides of the pairs lost?

# %%
own = rk.stats.bootstrap(*(scores.loc[scores["model"] == "DPO", name] for name in ("kl", "prompt_id")))
seen = set(pairs["chosen"][:]) | set(pairs["rejected"][:])
new = scores.assign(new=~scores["completion"].isin(seen)).groupby("model")["new"].mean()
places = {"chosen (written by SFT)": means["chosen"], "rejected (written by SFT)": means["rejected"]}
places["its own (written by DPO)"] = own
display(
    pd.DataFrame({"completions": list(places), "log pi - log pi_ref [nats]": [str(mean) for mean in places.values()]})
)
Markdown(
    f"Share of completions that stand in no training pair, word for word: {new['SFT']:.1%} for SFT, "
    f"{new['DPO']:.1%} for DPO."
)

# %% [markdown]
# **What you should have seen.** On its own completions the log-ratio is positive on average; it must be, for that
# average is the KL. Compare it with the two lines above: what the policy now says has gained more than the very
# answers it was told to prefer. It has extrapolated, and no rater and no reward model has looked at where it went.
# With good data this lands well. When it does not, nothing in the training curves says so.
#
# ## What beta does
#
# In DPO beta is the same coefficient as PPO's `kl_coef`, but it acts differently: nothing charges for the KL of what
# the policy writes; beta only sets how large a log-ratio a given margin needs. Three short runs.

# %%
parts = [scores[scores["model"] == "SFT"]]
betas = [0.1, 1.0, 10.0]
for each in betas:
    steps = min(60, preset.dpo["max_steps"])
    short = {**preset.dpo, "beta": each, "max_steps": steps, "save_strategy": "no"}
    run = rk.train.dpo(flow.sft(), pairs, out=work / f"beta_{each:g}", seed=SEED, callbacks=[], **short)
    found = rk.evaluate.score(
        {f"beta {each:g}": run}, test, rewards, reference=flow.sft(), seed=SEED, **preset.sampling
    )
    parts.append(found)
sweep = rk.evaluate.summary(pd.concat(parts, ignore_index=True)).assign(beta=[np.nan, *betas])
display(sweep[["model", "kl", "proxy", "gold", "n_tokens", "win_rate_gold"]].round(2))
sweep.loc[sweep["model"] != "SFT", "model"] = "DPO"
rk.plots.reward_against_kl(sweep)

# %% [markdown]
# **What you should have seen.** The largest beta ties the policy down. Between small ones there may be next to no
# difference: while beta times the log-ratios is far below 1, the loss is still a straight line, and Adam divides the
# size of its slope away. Beta binds only once margins come near 1. Until then it is steps and learning rate that
# decide how far a run goes, so the beta of a DPO model alone says little about its KL. Whether far is good is read
# off the gold panel, and not off the loss: losses at different betas cannot be compared.
#
# ## What could mislead you
#
# - **`rewards/accuracies` on training batches.** It rises while the policy memorises pairs. The held-out table above
#   is the fair one.
# - **The loss as a measure of quality.** Margins can grow for ever by making rejected answers impossible; no text
#   improves by that.
# - **Falling log-probabilities of chosen answers.** Common, and neither a bug nor a proof of harm. Look at samples.
# - **Comparing with PPO at one beta each.** The same number does not mean the same distance; compare along the KL
#   (next chapter).
# - **Whose samples the pairs are.** These pairs came from this very SFT model. With pairs from another model DPO
#   starts further off.
#
# ## Three exercises
#
# 1. Train on the first 200 pairs only, for as many steps. What do accuracies on training batches say, and the
#    held-out table?
# 2. Give DPO twice the steps. Do the log-probabilities of chosen answers go on falling, and does gold follow?
# 3. Swap chosen and rejected in all pairs. What must the loss be at the start, and what does the model say at the
#    end?

# %%
libraries = ("rlhf-kit", "torch", "transformers", "trl", "datasets", "numpy", "pandas")
minutes = (time.monotonic() - started) / 60
print(", ".join(f"{name} {version(name)}" for name in libraries))
print(f"this notebook took about {max(0.5, round(2 * minutes) / 2):g} minutes")
