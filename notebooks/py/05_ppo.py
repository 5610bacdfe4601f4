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
# # PPO: learning from one's own answers
#
# Best-of-n picks the answer that the reward model likes. PPO changes the model so that it *writes* such answers,
# while a penalty keeps it near where it came from.
#
# **What you will learn.** What the four models of PPO are for, what happens to a single token in one update, which
# invariants tell a working trainer from a broken one, how to read its curves, and what the KL coefficient does.
#
# **What it reads and writes.** It takes the SFT model and the reward model of the earlier chapters from
# `results/book`, where they are made first if they are missing. It trains policies into `results/notebooks/05_ppo`,
# which is emptied at the start.
#
# **How long it takes.** About five minutes on a CPU with two cores, and three more if the earlier models are
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
import torch
from IPython.display import Markdown, display

import rlhf_kit as rk

started = time.monotonic()
preset = rk.setup(PRESET, seed=SEED)
task = preset.task
flow = rk.Pipeline(preset, rk.results("book") / f"{PRESET}-{SEED}")
work = rk.workspace("05_ppo")
pd.set_option("display.max_colwidth", None)

# %% [markdown]
# ## Four models
#
# PPO maximises the reward minus `kl_coef` times the KL divergence from the SFT model. For that it needs a policy that
# writes, a reference that remembers where it started, a reward that judges whole answers, and a value model that
# guesses, word by word, what the judgment will be. Any function can be the reward: ours calls the reward model, and
# writes down gold on the side, which the trainer never sees.

# %%
prompts = flow.prompts("train")
proxy, gold = rk.RewardModel(flow.reward_model()), task.gold
watched = []


def reward(prompts, completions, **columns):
    """The learned reward; the mean gold of the same completions is noted down for us alone."""
    watched.append(float(np.mean(gold(prompts, completions))))
    return proxy(prompts, completions, **columns)


settings = {**preset.sampling, **preset.ppo}
args = rk.PPOConfig(output_dir=str(work / "checkpoints"), seed=SEED, **settings)
trainer = rk.PPOTrainer(flow.sft(), reward, args, prompts, value_model=flow.reward_model())

# %%
jobs = {
    "policy": ("the SFT model", "writes the answers"),
    "reference": ("the SFT model", "says how likely each word was before PPO"),
    "value": ("the reward model", "guesses the final score from the words so far"),
}
rows = []
for role, (start, job) in jobs.items():
    weights = list(trainer.roles.parts[role][0].parameters())
    size, learns = sum(w.numel() for w in weights), all(w.requires_grad for w in weights)
    rows.append({"role": role, "starts as": start, "job": job, "parameters": f"{size:,}", "learns": learns})
size = sum(w.numel() for w in proxy.backbone().parameters()) + proxy.head.numel()
judge = {
    "role": "reward",
    "starts as": "the reward model",
    "job": "scores the finished answer",
    "parameters": f"{size:,}",
}
pd.DataFrame([*rows, judge | {"learns": False}])

# %% [markdown]
# Two of them learn and two never change. Four copies of a model is why PPO is called heavy. It need not be: with LoRA
# the four can be small adapters over *one* base, switched on in turn.
#
# ## Four roles, one base
#
# Here the reward model is trained as an adapter over the SFT model (briefly, it is only to be looked at), and PPO gets
# `lora` too. Policy and value learn adapters of their own; the reference is the adapter the policy began as.

# %%
from dataclasses import replace

lora = {"r": 8}
pairs = rk.data.load(str(flow.preferences() / "train.parquet"))
brief = {**preset.reward_model, "max_steps": min(40, preset.reward_model["max_steps"])}
judge_adapter = rk.train.reward_model(flow.sft(), pairs, work / "reward_adapter", lora=lora, seed=SEED, **brief)
shared = rk.PPOTrainer(flow.sft(), judge_adapter, replace(args, lora=lora), prompts, callbacks=[])


def megabytes(*modules):
    """Weights in MB, each tensor counted once however many roles stand on it."""
    weights = [weight.untyped_storage() for module in modules for weight in module.parameters()]
    return sum({weight.data_ptr(): weight.nbytes() for weight in weights}.values()) / 1e6


base = megabytes(rk.models.load_causal(flow.sft()))
rows = {
    "four models": [len(trainer.roles.models) + 1, megabytes(trainer.roles, proxy.backbone())],
    "four adapters, one base": [len(shared.roles.models), megabytes(shared.roles, shared.reward.backbone())],
}
held = pd.DataFrame(rows, index=["models in memory", "weights [MB]"]).T
held.assign(**{"bases' worth": held["weights [MB]"] / base, "roles": ["", ", ".join(shared.roles.parts)]}).round(2)

# %% [markdown]
# At this size an adapter is a sizeable part of the base; at 8 billion parameters it is one part in two hundred, and
# the base can be held in 4 bits. What a run would need can be worked out from a model's configuration alone, before
# anything is loaded (`rlhf-kit memory` does the same in a terminal, and PPO refuses to start where it would not fit).
# This is arithmetic: it has not been measured on a GPU yet.

# %%
from transformers import LlamaConfig

llama_8b = LlamaConfig(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
    vocab_size=128256, max_position_embeddings=8192,
)  # fmt: skip
sizes = {"rollout": 8, "prompt_length": 512, "max_completion_length": 512, "micro_batch_size": 1, "on_gpu": True}
ways = {
    "full": {"lora": None, "load_in_4bit": False},
    "LoRA": {"lora": {"r": 16}, "load_in_4bit": False},
    "4-bit + LoRA": {"lora": {"r": 16}, "load_in_4bit": True},
}
needs = {name: rk.memory.estimate(llama_8b, "ppo", **way, **sizes) for name, way in ways.items()}
table = pd.DataFrame({name: need.parts | {"peak": need.peak} for name, need in needs.items()})
table[(table > 0.005).any(axis=1)].rename_axis("GiB").round(2)

# %% [markdown]
# ## One update, taken apart
#
# An update begins with a *rollout*: the policy answers a batch of prompts, drawn at temperature 1, and everything the
# loss needs is worked out once. We call the trainer's own steps, before any training.

# %%
torch.manual_seed(SEED)
rows = [prompts[i] for i in range(64)]
trainer.roles.eval()
tokens = trainer.rollout(rows)
trajectory, metrics = trainer.make_trajectory(rows, tokens, trainer.partition(tokens))
shapes = {name: tuple(part.shape) for name, part in trajectory._asdict().items() if name != "tokens"}
display(Markdown(f"**Shapes** (64 completions of up to {tokens.completion_mask.shape[1]} tokens): {shapes}"))
tokenizer = trainer.processing_class
answers = rk.models.decode_completions(tokenizer, tokens)
first = pd.DataFrame({"prompt": [row["prompt"] for row in rows], "completion": answers, "score": trajectory.scores})
first.head(4).round(2)


# %%
def token_table(trajectory, row):
    """One completion, token by token: what was likely, what it was charged, what it was paid, and how it turned out."""
    t, mask = trajectory, trajectory.tokens.completion_mask
    paid = rk.ppo.token_rewards(t.scores, t.logprobs, t.reference_logprobs, mask, trainer.kl_coef)
    advantages, returns = rk.ppo.gae(paid, t.values, mask, args.gamma, args.gae_lambda)
    columns = {
        "log-prob": t.logprobs,
        "reference": t.reference_logprobs,
        "log-ratio": t.logprobs - t.reference_logprobs,
        "reward": paid,
        "value": t.values,
        "advantage": advantages,
    }
    length = int(mask[row].sum())
    spelled = [tokenizer.decode([token]) for token in t.tokens.completion_ids[row, :length].tolist()]
    cells = {name: values[row, :length].numpy() for name, values in columns.items()}
    return pd.DataFrame(cells, index=pd.Index(spelled, name="token"))


chosen = next(i for i, row in enumerate(rows) if row["kind"] == "leading")
display(Markdown(f"**{rows[chosen]['prompt']}** gets a score of {trajectory.scores[chosen]:.3f}."))
token_table(trajectory, chosen).round(3) + 0.0  # no -0.0

# %% [markdown]
# **What you should have seen.** Policy and reference agree to the last digit, since nothing has been trained. The
# reward is zero everywhere but on the last token, which ends the text: there the score of the whole answer lands. The
# value is a guess of that score made *before* the token is seen. So far it is a wild guess, for the reward model that
# it starts from was only ever asked at the end of a text. The advantage asks of each token: did things turn out
# better than guessed?
#
# ## Which word was it?
#
# The advantage is a recursion from the last token back: surprise = reward + next value - value, and each token also
# inherits a share (gamma times lambda) of the surprise of those after it. By hand, it is five lines.

# %%
one = token_table(trajectory, chosen)
by_hand, inherited = [], 0.0
for t in reversed(range(len(one))):
    next_value = one["value"].iloc[t + 1] if t + 1 < len(one) else 0.0
    surprise = one["reward"].iloc[t] + args.gamma * next_value - one["value"].iloc[t]
    inherited = surprise + args.gamma * args.gae_lambda * inherited
    by_hand.insert(0, inherited)
largest = np.abs(np.array(by_hand) - one["advantage"]).max()
Markdown(f"Largest difference between the recursion by hand and the trainer's advantages: {largest:.1e}.")

# %% [markdown]
# ## What must hold
#
# Most broken PPO trainers still produce curves that go up. These facts are exact, and catch most faults: run them
# before believing any curve.


# %%
def invariants(trajectory):
    """Facts of a rollout that hold whatever the policy is; all are zero (or "none") in a trainer that is right."""
    t, mask = trajectory, trajectory.tokens.completion_mask
    log_ratio = (t.logprobs - t.reference_logprobs) * mask
    paid = rk.ppo.token_rewards(t.scores, t.logprobs, t.reference_logprobs, mask, trainer.kl_coef)
    bonus = paid + trainer.kl_coef * log_ratio  # what is paid beside the KL charge
    is_last = torch.arange(mask.shape[1]) == mask.sum(1, keepdim=True) - 1
    total = t.scores - trainer.kl_coef * log_ratio.sum(1)
    return {
        "sum of token rewards - (score - kl_coef KL), largest": (paid.sum(1) - total).abs().max().item(),
        "score on the last token - score, largest": (bonus[is_last] - t.scores).abs().max().item(),
        "anything of the score on another token, largest": bonus[~is_last].abs().max().item(),
        "reward, value or advantage after the end, largest": max(
            part[mask == 0].abs().max().item() for part in (paid, t.values, t.advantages)
        ),
    }


largest = (trajectory.logprobs - trajectory.reference_logprobs).abs().max().item()
found = {"log-ratio of the untouched policy, largest": largest} | invariants(trajectory)
pd.DataFrame({"found": [f"{value:.1e}" if value else "0 exactly" for value in found.values()]}, index=list(found))

# %% [markdown]
# The one about the untouched policy is the sharpest: its KL is not *about* zero, it is zero, because policy and
# reference are the same weights and see the same numbers in the same order. Whoever finds a small number there has
# dropout switched on, or pads differently in two places.
#
# ## Why clip?
#
# One rollout is used for several steps, so after the first the policy is not the one that wrote the answers. The
# ratio of its probability of a token, now against then, says by how much. PPO stops rewarding a step once the ratio
# has left a narrow band in the direction that the advantage asks for.

# %%
ratio = torch.linspace(0.5, 1.5, 201)
figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
axes.axvspan(1 - args.clip_range, 1 + args.clip_range, color="#E5E5E5", label="the band")
for advantage, colour, style in ((1.0, "#009E73", "-"), (-1.0, "#D55E00", "--")):
    objective = -rk.ppo.policy_loss(ratio, torch.full_like(ratio, advantage), args.clip_range)
    axes.plot(ratio, objective, style, color=colour, linewidth=2.2, label=f"advantage {advantage:+.0f}")
axes.set(xlabel="probability of the token, now / at the rollout [ratio]", ylabel="what PPO maximises [advantage]")
axes.set_title("Where the line is flat, there is no gradient")
axes.legend()
plt.show()

# %% [markdown]
# Making a good token more likely pays up to the band's edge, and making a bad one less likely too. Going back is
# never free: a bad token that became *more* likely is punished without limit. That is why it is called pessimistic.
#
# ## Training
#
# Now all updates, from the start. Watch `reward` climb and `kl` with it.

# %%
watched.clear()
trainer.train()
trainer.save_model(str(work / "model"))
metrics = pd.DataFrame([row for row in trainer.state.log_history if "loss" in row]).rename(columns={"step": "update"})
metrics["gold"] = watched

# %%
display(
    Markdown(
        f"KL of the rollouts in update 1: **{metrics['kl'].iloc[0]:g}**. Largest |ratio - 1| on the first minibatch of "
        f"any of the {len(metrics)} updates: **{metrics['first_ratio_deviation'].max():g}**. Optimizer steps in each: "
        f"{metrics['minibatches'].iloc[0]:.0f} ({args.ppo_epochs} epochs of {args.num_minibatches} minibatches)."
    )
)
rk.plots.training(metrics, ["reward", "gold", "kl", "entropy", "completion_length", "clip_fraction"])

# %%
begin, end = metrics.head(5).mean(numeric_only=True), metrics.tail(5).mean(numeric_only=True)
columns = ["reward", "gold", "kl", "entropy", "completion_length", "unfinished", "explained_variance", "clip_fraction"]
told = pd.DataFrame({"first five updates": begin[columns], "last five updates": end[columns]})
told["change"] = told["last five updates"] - told["first five updates"]
told.rename(index=rk.plots.label).round(3)

# %% [markdown]
# **What you should have seen.** The reward rises quickly and then more slowly, at the price of some KL. The first
# updates are rough: the value model still guesses wildly, the advantages are mostly noise, the KL shoots up, and gold
# may dip before it recovers. Explained variance says how much of what came out the value model had foreseen. Entropy
# falls, because the policy becomes surer of what to say. Gold is the curve that nobody has outside a world like this
# one. Compare its shape with the reward's: where the reward climbs and gold does not, the policy is learning the
# reward model's faults.
#
# ## The same token table, after training
#
# The same prompt again, under the trained policy, with the same invariants.

# %%
torch.manual_seed(SEED)
trainer.roles.eval()
tokens = trainer.rollout(rows)
after, _ = trainer.make_trajectory(rows, tokens, trainer.partition(tokens))
kl = (after.logprobs - after.reference_logprobs).sum(1)
display(
    Markdown(
        f"**{rows[chosen]['prompt']}** gets a score of {after.scores[chosen]:.3f}; the log-ratio of the whole answer "
        f"is {kl[chosen]:+.2f} nats, so it was charged {trainer.kl_coef * kl[chosen]:.3f}."
    )
)
display(token_table(after, chosen).round(3) + 0.0)
found = invariants(after)
pd.DataFrame({"found": [f"{value:.1e}" if value else "0 exactly" for value in found.values()]}, index=list(found))

# %% [markdown]
# **What you should have seen.** The log-ratio is large on a few tokens and next to nothing on the rest. Once the
# first words of a sentence are chosen, grammar decides the others, and there PPO has nothing to change: alignment
# happens at a few forks. The sums still hold, up to rounding in the last digits.
#
# ## Before and after
#
# The training curves were made on training prompts, with the reward that was optimised. The judgment belongs on
# held-out prompts and on gold.

# %%
test, rewards = flow.prompts("test"), {"proxy": proxy, "gold": gold}
models = {"SFT": flow.sft(), "PPO": work / "model"}
scores = rk.evaluate.score(models, test, rewards, reference=flow.sft(), seed=SEED, **preset.sampling)
firsts = scores[(scores["sample"] == 0) & scores["prompt_id"].isin(scores.drop_duplicates("kind")["prompt_id"])]
wide = firsts.pivot(index=["kind", "prompt"], columns="model", values=["completion", "gold"]).round(2)
wide.swaplevel(axis=1)[[(model, value) for model in models for value in ("completion", "gold")]]

# %%
shift = {value: rk.stats.paired_difference(scores, "PPO", "SFT", value) for value in ("proxy", "gold", "n_tokens")}
wins = rk.stats.win_rate(scores, "PPO", "SFT", by="gold")
verdict = "clear of zero" if shift["gold"].lo > 0 or shift["gold"].hi < 0 else "not clear of zero: one cannot tell"
spent = rk.stats.bootstrap(*(scores.loc[scores["model"] == "PPO", name] for name in ("kl", "prompt_id")))
told = (
    f"On {test.num_rows} held-out prompts PPO moves the proxy by **{shift['proxy']}** and gold by **{shift['gold']}** "
    f"({verdict}), at a KL of {spent} nats a completion. Its completions are {shift['n_tokens'].mean:+.1f} tokens "
    f"longer than SFT's, and by gold it wins against SFT with a rate of {wins}, ties counting half."
)
display(Markdown(told))
effects = task.effects(scores)
shown = effects.pivot(index="effect", columns="model", values="share")[list(models)]
shown["change"] = shown["PPO"] - shown["SFT"]
shown.map("{:.1%}".format)

# %% [markdown]
# **What you should have seen.** A mean can rise for bad reasons, such as refusing everything that sounds dangerous,
# so look at the shares. The row *skill right* is special: copying and reversing words is practised in SFT and never
# rewarded in PPO. What a run loses there is the *alignment tax*; a short run may lose nothing.
# `PPOConfig(ptx_coef=...)` with a `ptx_dataset` of demonstrations mixes a little SFT into every step (PPO-ptx of
# InstructGPT) and is the usual way to pay it back.
#
# ## What the KL coefficient does
#
# `kl_coef` is the exchange rate: how much reward one nat of drift must bring. Three short runs from the same start:
# no charge, the usual one, and five times that.

# %%
usual, parts = preset.ppo["kl_coef"], [scores[scores["model"] == "SFT"]]
half = preset.ppo["per_device_train_batch_size"] // 2
for kl_coef in (0.0, usual, 5 * usual):
    name = f"kl_coef {kl_coef:g}"
    short = {
        **settings,
        "kl_coef": kl_coef,
        "max_steps": min(10, preset.ppo["max_steps"]),
        "per_device_train_batch_size": half,
        "save_strategy": "no",
    }
    run = rk.PPOConfig(output_dir=str(work / f"short_{kl_coef:g}"), seed=SEED, **short)
    brief = rk.PPOTrainer(flow.sft(), proxy, run, prompts, callbacks=[])
    brief.train()
    brief.save_model(run.output_dir)
    parts.append(
        rk.evaluate.score({name: run.output_dir}, test, rewards, reference=flow.sft(), seed=SEED, **preset.sampling)
    )
sweep = rk.evaluate.summary(pd.concat(parts, ignore_index=True))
sweep["beta"] = [np.nan, 0.0, usual, 5 * usual]
sweep[["model", "kl", "proxy", "gold", "n_tokens", "win_rate_gold"]].round(2)

# %%
sweep.loc[sweep["model"] != "SFT", "model"] = "PPO"
rk.plots.reward_against_kl(sweep)

# %% [markdown]
# **What you should have seen.** (`beta` on the figure is `kl_coef`.) A larger charge keeps the policy closer for the
# same number of updates. Where the charge is small the proxy goes furthest, and it is worth asking whether gold went
# along: the gap between the two panels is what the charge is there to limit. Ten updates are few; longer runs pull
# the three further apart.
#
# ## When something goes wrong
#
# Every update is checked, and what looks wrong is said with the samples that show it: KL running away, entropy
# collapsing, length drifting, completions that repeat themselves or never end. To see it, we pay for words alone,
# charge nothing for drift, and take steps three times as large.


# %%
def wordy(prompts, completions, **columns):
    """A reward for length, and for nothing else."""
    return [len(completion.split()) / 5 for completion in completions]


careless = {**settings, "kl_coef": 0.0, "missing_eos_penalty": 0.0, "learning_rate": 1e-3}
careless |= {"max_steps": min(12, preset.ppo["max_steps"]), "per_device_train_batch_size": half, "save_strategy": "no"}
run = rk.PPOConfig(output_dir=str(work / "careless"), seed=SEED, **careless)
rambling = rk.PPOTrainer(flow.sft(), wordy, run, prompts, callbacks=[])
result = rambling.train()

# %% [markdown]
# **What you should have seen.** An alarm that says what changed, by how much and what to try, with the completions that
# show it most. The trainer's log keeps them, and `trainer.samples` has the last rollouts as a frame.
#
# ## What could mislead you
#
# - **The training reward.** It is measured on the very thing that is being optimised. Only held-out prompts with
#   another judge tell.
# - **KL estimates.** The log-ratio of one sample can be negative; only its mean over the policy's own samples is a
#   KL.
# - **An equal number of updates is not an equal distance.** Compare runs at equal KL, or draw the whole curve.
# - **A mean that rises by refusing, shortening or garbling.** Read samples and shares, each time.
# - **One seed.** Some PPO runs fail for no reason that a config shows; a claim needs several seeds, all shown.
#
# ## Three exercises
#
# 1. Set `kl_coef=0` and `max_steps` to a hundred or more. Read the samples: which habit of the reward model was
#    found, and does gold fall?
# 2. Give `reward` a rule of your own, say, minus the number of words, and watch `completion_length`. What else
#    changes?
# 3. Add `ptx_coef=0.5` and `ptx_dataset=flow.demonstrations()`. What becomes of *skill right*, and what does it cost
#    in reward?

# %%
libraries = ("rlhf-kit", "torch", "transformers", "trl", "datasets", "numpy", "pandas")
minutes = (time.monotonic() - started) / 60
print(", ".join(f"{name} {version(name)}" for name in libraries))
print(f"this notebook took about {max(0.5, round(2 * minutes) / 2):g} minutes")
