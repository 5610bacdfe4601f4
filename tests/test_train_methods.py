"""What every method of rlhf_kit.train promises; those that learn from their own samples; pretraining from scratch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from test_train import COMMON, EOS, PREFERENCES, PROMPTS, Zoo, logprob, weights
from tiny import naive_logprobs, save_llama, word_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from rlhf_kit import models, sampling, train
from rlhf_kit.models.rendering import EOS as END
from rlhf_kit.models.rendering import PAD, wrap
from rlhf_kit.rewards import RewardModel

ANSWERS = {"completion": [" by the river .", " no ."] * 8, "label": [True, False] * 8}
JUDGED = Dataset.from_dict({"prompt": [prompt for prompt in PROMPTS for _ in range(2)], **ANSWERS})
# Of two lengths, so that batches are padded.
WORDS = Dataset.from_dict({"prompt": [f"{first} {second}" for first in ("a", "b c d") for second in "cdefghij"]})
QUIET: dict[str, Any] = {"callbacks": [], "logging_steps": 1}
OFFLINE = {"sft": JUDGED.remove_columns("label"), "dpo": PREFERENCES, "kto": JUDGED, "reward_model": PREFERENCES}
FIRST_LOSS = {"dpo": math.log(2), "kto": 0.5}
METHODS = [*OFFLINE, "rloo", "grpo", "rejection_sampling"]
ONLINE: dict[str, Any] = QUIET | {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 6}


def share_of_c(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of a completion's words that are c."""
    return [text.split().count("c") / max(1, len(text.split())) for text in completions]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of a few words that often comes to an end."""
    return save_llama(tmp_path_factory.mktemp("speaker"), word_tokenizer(), hidden=32, eos_logit=1.0)


class Watch(TrainerCallback):
    """Keeps the parameters of a trainer's model by the names in a directory, before and after; the clone's apart."""

    def parameters(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        found = {name: p for name, p in found.items() if ".lora_" in name} or found
        clone = {name.replace(".ref.", "."): p for name, p in found.items() if ".ref." in name}
        return {name.replace(".default.", "."): p for name, p in found.items() if ".ref." not in name}, clone

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.start, _ = self.parameters(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.end, self.clone = self.parameters(model)


def run(method: str, model: str, out: Path, reward: Any = share_of_c, **settings: Any) -> str:
    """Any method on easy data: texts, or prompts of which the share of c is rewarded."""
    if method in OFFLINE:
        return getattr(train, method)(model, OFFLINE[method], out, **COMMON | settings)
    common = QUIET | {"max_completion_length": 6} if method == "rejection_sampling" else ONLINE
    return getattr(train, method)(model, reward, WORDS, out, **common | settings)


# --- what each method promises ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "rloo", "grpo"])
def test_the_start_and_the_reference_are_the_given_model(zoo: Zoo, mode: str, method: str, tmp_path: Path) -> None:
    """Bit for bit, over a 4-bit base too; not the raw base: the first step's KL is 0. What is saved is the end."""
    watch, start = Watch(), weights(zoo[mode])
    changes = {"temperature": 0.8} if method in ("rloo", "grpo") else {}
    out = run(method, zoo[mode], tmp_path / "out", max_steps=2, learning_rate=1e-2, callbacks=[watch], **changes)
    first = train.history(out).iloc[0]
    # r = beta * log(pi / pi_ref) = 0; KTO's z0 = 0, so every row's loss is 1 - sigmoid(0) (2402.01306, section 4.1)
    assert method not in FIRST_LOSS or first["loss"] == pytest.approx(FIRST_LOSS[method], abs=1e-6)
    assert method in ("sft", "dpo") or first["kl"] == pytest.approx(0, abs=1e-6)
    assert same(watch.start, start) and same(watch.end, weights(out)) and not same(watch.end, start)
    assert mode == "full" or method == "sft" or same(watch.clone, start)
    assert models.read_notes(out).get("load_in_4bit") == (mode == "4bit")
    assert models.is_adapter(out) == (mode != "full")


@pytest.mark.slow
def test_kto_raises_what_is_wanted_above_what_is_not(zoo: Zoo, tmp_path: Path) -> None:
    out = run("kto", zoo["full"], tmp_path / "kto", max_steps=8, learning_rate=2e-3)
    before, after = (logprob(each, " by the river .") - logprob(each, " no .") for each in (zoo["full"], out))
    assert after > before + 2
    assert train.history(out)["loss"].iloc[-1] < 0.45


@pytest.mark.filterwarnings("ignore:.*left out")  # of random samples some join the prompt's last token
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_weights(zoo: Zoo, speaker: str, method: str, tmp_path: Path) -> None:
    """Of a new adapter, whatever was drawn before."""
    settings = {"lora": {"r": 4}, "max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 8}
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        start = zoo["full"] if method in OFFLINE else speaker
        runs.append(weights(run(method, start, tmp_path / str(number), seed=seed, **settings)))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("method", ["dpo", "kto", "rloo", "grpo"])
def test_a_fresh_adapter_starts_where_the_full_weights_are(
    zoo: Zoo, method: str, load_in_4bit: bool, tmp_path: Path
) -> None:
    settings = {"lora": {"r": 4, "lora_dropout": 0.5}, "load_in_4bit": load_in_4bit, "learning_rate": 1e-2}
    out = run(method, zoo["full"], tmp_path / "out", max_steps=1, **settings)
    first = train.history(out).iloc[0]  # LoRA's dropout is off, too
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) if method == "dpo" else abs(first["kl"]) < 1e-6
    assert models.loading.base_of(out) == zoo["full"] and models.read_notes(out)["load_in_4bit"] == load_in_4bit


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_one_plain_gradient_step_is_that_of_the_objective_by_hand(method: str, tmp_path: Path) -> None:
    """RLOO: -mean of A log pi(y), A against the prompt's other completions; GRPO: A whitened, a mean over tokens."""
    pieces = [END, PAD, *(f"Ġ{letter}" for letter in "cdefghij")]  # what is sampled can be read back
    vocabulary = {piece: row for row, piece in enumerate(pieces)}
    tokenizer = wrap(Tokenizer(BPE(vocab=vocabulary, merges=[], ignore_merges=True)))
    speaker = save_llama(tmp_path / "speaker", tokenizer, hidden=32, eos_logit=1.0)
    prompts = Dataset.from_dict({"prompt": [" c", " d e", " f g h", " i"]})
    seen: list[tuple[str, str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return share_of_c(prompts, completions)

    settings: dict[str, Any] = ONLINE | {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}
    no_pad = {"suppress_tokens": [1]}  # a PAD in the middle could not be read back from the text
    settings |= {"missing_eos_penalty": 2.0, "seed": 1, "generation_kwargs": no_pad}
    out = getattr(train, method)(speaker, reward, prompts, tmp_path / "out", **settings)
    model = models.load_causal(speaker, trainable=True)
    logprobs, rewards = [], []
    for prompt, text in seen:
        first, ids = tokenizer(prompt)["input_ids"], tokenizer(text)["input_ids"]
        rewards.append(share_of_c([prompt], [text])[0] - 2.0 * (len(ids) == 6))
        ids = [*ids, EOS][:6]
        logits = model(input_ids=torch.tensor([first + ids])).logits[0, len(first) - 1 : -1]
        logprobs.append(logits.log_softmax(-1)[range(len(ids)), ids])
    groups = torch.tensor(rewards).view(4, 4)
    if method == "rloo":
        advantages = groups - (groups.sum(1, keepdim=True) - groups) / 3
        terms = torch.stack([a * row.sum() for a, row in zip(advantages.flatten(), logprobs, strict=True)])
    else:
        advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
        terms = torch.cat([a * row for a, row in zip(advantages.flatten(), logprobs, strict=True)])
    (-terms.mean()).backward()
    for name, now in weights(out).items():
        start = model.get_parameter(name)
        assert torch.allclose(now, start.detach() - start.grad, atol=1e-5), name
    assert model.lm_head.weight.grad.norm() > 0.1
    assert train.history(out)["reward"][0] == pytest.approx(groups.mean().item(), rel=1e-5)


# --- sampling inside TRL ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_rewards_inputs_are_what_was_asked_for(zoo: Zoo, tmp_path: Path) -> None:
    """Text or chat, a reward sees what PPO's does: completions without special tokens, and the dataset's columns."""
    seen: list[tuple[list[Any], list[Any], dict[str, Any]]] = []

    def watch(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.append((prompts, completions, columns))
        return [float(len(str(text))) for text in completions]

    text = Dataset.from_dict({"prompt": PROMPTS, "kind": list("abcdefgh"), "completion": [" no ."] * 8})
    chat = text.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    for name, prompts in (("text", text), ("chat", chat)):
        train.rloo(zoo["full"], watch, prompts, tmp_path / name, max_steps=1, seed=3, **ONLINE)
    (prompts_text, texts, given), (prompts_chat, chats, _) = seen
    assert set(given) == {"kind"} and [PROMPTS["abcdefgh".index(kind)] for kind in given["kind"]] == prompts_text
    assert all(prompts_text[i] == prompts_text[i - i % 4] for i in range(16)) and len(set(prompts_text)) == 4
    # The template of the tiny tokenizer renders a question as it is, so that the same ids are drawn.
    assert [prompt[0]["content"] for prompt in prompts_chat] == prompts_text
    assert [[turn["role"] for turn in completion] for completion in chats] == [["assistant"]] * 16
    assert [completion[0]["content"] for completion in chats] == texts
    assert not any("<|" in text for text in texts)


@pytest.mark.slow
def test_a_reward_models_directory_is_a_reward_and_completions_end_at_eos(zoo: Zoo, tmp_path: Path) -> None:
    prompts, longer = Dataset.from_dict({"prompt": PROMPTS}), ONLINE | {"max_completion_length": 24}
    out = train.grpo(zoo["full"], zoo["full-reward"], prompts, tmp_path / "out", max_steps=1, **longer)
    assert json.loads((Path(out) / "generation_config.json").read_text())["eos_token_id"] in (EOS, [EOS])
    row = train.history(out).iloc[0]
    assert math.isfinite(row["reward"]) and row["completions/mean_terminated_length"] < 24
    assert row["completions/clipped_ratio"] < 1 and row["completions/min_length"] < 24


@pytest.mark.slow
def test_checkpointing_changes_no_sample(zoo: Zoo, tmp_path: Path) -> None:
    """In train mode with checkpointing on, generate() drops its cache and only the first token is right."""
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3}
    plain = run("rloo", zoo["words"], tmp_path / "plain", **settings)
    saving = run("rloo", zoo["words"], tmp_path / "saving", activation_checkpointing=True, **settings)
    columns = ["reward", "completions/mean_length"]
    assert train.history(plain)[columns].equals(train.history(saving)[columns])


@pytest.mark.slow
def test_rejection_sampling_trains_on_the_best_finished_sample_and_shows_it(speaker: str, tmp_path: Path) -> None:
    settings = {"n": 6, "max_completion_length": 12, "max_steps": 1, "seed": 4, "per_device_train_batch_size": 16}
    with pytest.warns(UserWarning, match="of 5 of 16 prompts no completion ended in 12 tokens"):
        out = run("rejection_sampling", speaker, tmp_path / "out", **settings)
    chosen = pd.read_parquet(Path(out) / "samples.parquet")
    pool = sampling.sample(speaker, WORDS, n=6, max_completion_length=12, seed=4)
    pool = sampling.add_rewards(pool[pool["finished"]], {"reward": share_of_c})
    assert chosen["reward"].tolist() == pool.groupby("prompt_id")["reward"].max().tolist()
    assert chosen["prompt"].tolist() == [WORDS["prompt"][i] for i in chosen["prompt_id"]]
    assert chosen["finished"].all() and len(chosen) == 11
    # its first loss, before any step, is the start's mean NLL of exactly these texts
    tokenizer, model = models.load_tokenizer(speaker), models.load_causal(speaker).eval()
    ids = [(tokenizer(row.prompt)["input_ids"], tokenizer(row.completion)["input_ids"]) for row in chosen.itertuples()]
    total = sum(naive_logprobs(model, prompt, [*completion, EOS]).sum().item() for prompt, completion in ids)
    count = sum(len(completion) + 1 for _, completion in ids)
    assert train.history(out)["loss"][0] == pytest.approx(-total / count, rel=1e-4)


@pytest.mark.slow
def test_rejection_sampling_works_on_adapters_and_chats(zoo: Zoo, tmp_path: Path) -> None:
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS])
    reward = RewardModel(zoo["full-reward"])
    out = train.rejection_sampling(
        zoo["4bit"], reward, chat, tmp_path / "out", n=4, max_completion_length=24, max_steps=1, **QUIET
    )
    assert models.is_adapter(out)
    row = pd.read_parquet(Path(out) / "samples.parquet").iloc[0]
    assert reward([chat["prompt"][row["prompt_id"]]], [row["completion"]]) == pytest.approx([row["reward"]], abs=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [lambda row: {"label": True}, lambda row: {"label": "yes" if row["label"] else "no"}])
def test_kto_refuses_labels_of_one_kind(zoo: Zoo, wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`label` must hold both True .* and False|'label': label not boolean"):
        train.kto(zoo["full"], JUDGED.map(wrong), tmp_path / "out", **COMMON)


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_trained_is_refused_in_one_sentence(zoo: Zoo, method: str, tmp_path: Path) -> None:
    def never(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise AssertionError("sampled")

    taken, out = tmp_path / "taken", tmp_path / "out"
    taken.mkdir()
    (taken / "precious").write_text("weights")
    for path in (taken, taken / "precious"):
        with pytest.raises(FileExistsError, match=f"{path.name}: is there already.*name another `out`"):
            run(method, zoo["full"], path, reward=never)
    with pytest.raises(models.ModelError, match="is an adapter already"):
        run(method, zoo["lora"], out, reward=never, lora={})
    with pytest.raises(models.ModelError, match="no such model directory"):
        run(method, str(tmp_path / "absent"), out, reward=never)
    for name, value in (("max_steps", 0), ("learning_rate", math.nan), ("weight_decay", -0.1), ("max_grad_norm", "1")):
        with pytest.raises(ValueError, match=f"{name} must "):
            run(method, str(tmp_path / "absent"), out, reward=never, **{name: value})
    with pytest.raises(TypeError, match="learning_rat"):
        run(method, zoo["full"], out, reward=never, learning_rat=1.0)
    with pytest.raises(models.ModelError, match='4-bit weights cannot be trained; pass `lora={"r": 16}`'):
        run(method, zoo["full"], out, reward=never, load_in_4bit=True)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["taken", "taken/precious"]


def test_what_cannot_be_sampled_is_refused_in_one_sentence(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="2 prompts are fewer than the 4 of one batch"):
        train.rloo(zoo["words"], share_of_c, WORDS.select([0, 1]), out, **ONLINE)
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        run("rloo", zoo["words"], out, max_completion_length=63)
    with pytest.raises(ValueError, match="pretrain: there is nothing to learn from"):
        train.pretrain([], models.load_tokenizer(zoo["words"]), LlamaConfig(), out)
    with pytest.raises(models.ModelError, match="counts positions from the start of the padding"):
        run("rloo", zoo["gpt2"], out)
    with pytest.raises(ValueError, match="gave \\[16\\] values for 16 completions, 16 of them not finite"):
        train.rloo(zoo["words"], lambda prompts, completions: [math.nan] * len(prompts), WORDS, out, **ONLINE)
    assert list(tmp_path.iterdir()) == []


# --- pretraining -----------------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTBOOK = ["the cat sat on the mat .", "the dog sat on the log , and slept ."] * 8


@pytest.fixture(scope="module")
def trained_tokenizer() -> PreTrainedTokenizerFast:
    return train.train_tokenizer(TEXTBOOK, vocab_size=280)


def test_a_trained_tokenizer_and_the_rows_of_long_texts(
    trained_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    assert len(trained_tokenizer) <= 280 and trained_tokenizer.pad_token_id != trained_tokenizer.eos_token_id
    for text in [*TEXTBOOK[:2], "Ünseen 🦉 text\n\n  here"]:
        assert trained_tokenizer.decode(trained_tokenizer(text).input_ids) == text
    ids = [*trained_tokenizer(TEXTBOOK[0] * 5).input_ids, trained_tokenizer.eos_token_id]
    assert len(ids) < len(TEXTBOOK[0] * 5)

    class Rows(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
            rows.extend(train_dataloader.dataset["input_ids"])

    rows: list[list[int]] = []
    config = LlamaConfig(max_position_embeddings=16, **SIZES)
    few: dict[str, Any] = {"max_steps": 1, "callbacks": [Rows()]}
    train.pretrain([TEXTBOOK[0] * 5], trained_tokenizer, config, tmp_path / "out", **few)
    assert all(len(row) <= 16 for row in rows) and len(rows) > 2
    assert [token for row in rows for token in row] == ids[: sum(map(len, rows))] and len(ids) - sum(map(len, rows)) < 2


def test_pretraining_learns_the_same_from_the_same_seed_and_leaves_a_whole_directory(
    trained_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    few = QUIET | {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    outs = []
    for number, seed in enumerate((0, 0, 1)):
        config = LlamaConfig(max_position_embeddings=64, **SIZES)
        outs.append(train.pretrain(TEXTBOOK, trained_tokenizer, config, tmp_path / str(number), seed=seed, **few))
    losses = train.history(outs[0])["loss"]
    assert len(losses) == 30 and losses.iloc[-1] < 0.5 * losses.iloc[0]
    one, again, other = map(weights, outs)
    assert same(one, again) and not same(one, other)
    model, tokenizer = models.load_causal(outs[0]), models.load_tokenizer(outs[0])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer) and tokenizer.chat_template == trained_tokenizer.chat_template
