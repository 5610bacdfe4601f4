"""rlhf_kit.train's KTO, RLOO, GRPO and rejection sampling, and reward models with margins and rankings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from tiny import naive_logprobs, save_llama, word_tokenizer
from transformers import TrainerCallback

from rlhf_kit import models, sampling, train
from rlhf_kit.ppo import PPOConfig
from rlhf_kit.rewards import RewardModel
from rlhf_kit.train.online import LIKE_PPO
from rlhf_kit.train.reward import ItemBatches, ItemRewardTrainer

Zoo = dict[str, str]
EOS = 0
ANIMALS = ["otter", "owl", "falcon", "newt", "whale", "hare", "fox", "crane"]
QUESTIONS = [f"where does the {animal} live ?" for animal in ANIMALS]
JUDGED = Dataset.from_list(
    [
        {"prompt": prompt, "completion": " by the river ." if wanted else " no .", "label": wanted}
        for prompt in QUESTIONS
        for wanted in (True, False)
    ]
)
PAIRS = Dataset.from_list(
    [{"prompt": prompt, "chosen": f" {prompt[:9]} it lives .", "rejected": " no ."} for prompt in QUESTIONS]
)
# Of two lengths, so that batches are padded.
WORDS = Dataset.from_dict({"prompt": [f"{first} {second}" for first in ("a", "b c d") for second in "cdefghij"]})
QUIET: dict[str, Any] = {"callbacks": [], "logging_steps": 1}
KTO: dict[str, Any] = QUIET | {"per_device_train_batch_size": 8}
ONLINE: dict[str, Any] = QUIET | {"per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 6}


def share_of_c(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """The share of a completion's words that are c."""
    return [text.split().count("c") / max(1, len(text.split())) for text in completions]


def mean_reward(model: str) -> float:
    samples = sampling.sample(model, WORDS, n=64, max_completion_length=6, seed=7)
    return sampling.add_rewards(samples, {"reward": share_of_c})["reward"].mean()


def weights(directory: str) -> dict[str, torch.Tensor]:
    (file,) = Path(directory).glob("*.safetensors")
    return load_file(file)


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


def run(method: str, model: str, out: Path, **settings: Any) -> str:
    """A stage on easy data: KTO from judged completions, the others by the share of c."""
    if method == "kto":
        return train.kto(model, JUDGED, out, **KTO | settings)
    common = QUIET | {"max_completion_length": 6} if method == "rejection_sampling" else ONLINE
    return getattr(train, method)(model, share_of_c, WORDS, out, **common | settings)


# --- what each method promises ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kto", "rloo", "grpo"])
def test_the_start_and_the_reference_are_the_given_model(zoo: Zoo, mode: str, method: str, tmp_path: Path) -> None:
    """Bit for bit, over a 4-bit base too; not the raw base: the first step's KL is 0. What is saved is the end."""
    watch, start = Watch(), weights(zoo[mode])
    prompts = {} if method == "kto" else {"temperature": 0.8}
    out = run(method, zoo[mode], tmp_path / "out", max_steps=2, learning_rate=1e-2, callbacks=[watch], **prompts)
    first = train.history(out).iloc[0]
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    if method == "kto":
        # r = beta * log(pi / pi_ref) = 0 and z0 = 0, so every row's loss is 1 - sigmoid(0) (2402.01306, section 4.1)
        assert first["loss"] == pytest.approx(0.5, abs=1e-6)
        assert first["rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert same(watch.start, start) and same(watch.end, weights(out)) and not same(watch.end, start)
    assert mode == "full" or same(watch.clone, start)
    assert models.read_notes(out).get("load_in_4bit") == (mode == "4bit")
    assert models.is_adapter(out) == (mode != "full")


@pytest.mark.slow
def test_ktos_log_probs_of_the_policy_are_those_of_the_starting_model(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    out = train.kto(zoo[mode], JUDGED, tmp_path / "kto", max_steps=1, **KTO | {"per_device_train_batch_size": 16})
    tokenizer, model = models.load_tokenizer(zoo[mode]), models.load_causal(zoo[mode]).eval()
    expected: dict[bool, list[float]] = {True: [], False: []}
    for row in JUDGED:
        prompt, completion = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        expected[row["label"]].append(naive_logprobs(model, prompt, [*completion, EOS]).sum().item())
    first = train.history(out).iloc[0]
    assert first["logps/chosen"] == pytest.approx(sum(expected[True]) / 8, rel=1e-4)
    assert first["logps/rejected"] == pytest.approx(sum(expected[False]) / 8, rel=1e-4)


@pytest.mark.slow
def test_kto_raises_what_is_wanted_above_what_is_not(zoo: Zoo, tmp_path: Path) -> None:
    out = train.kto(zoo["full"], JUDGED, tmp_path / "kto", max_steps=15, learning_rate=1e-3, **KTO)
    tokenizer = models.load_tokenizer(out)

    def margin(directory: str) -> float:
        model = models.load_causal(directory).eval()
        prompt = tokenizer(QUESTIONS[0])["input_ids"]
        wanted, unwanted = (tokenizer(text)["input_ids"] for text in (" by the river .", " no ."))
        good, bad = (naive_logprobs(model, prompt, [*ids, EOS]).sum().item() for ids in (wanted, unwanted))
        return good - bad

    assert margin(out) > margin(zoo["full"]) + 2
    assert train.history(out)["loss"].iloc[-1] < 0.45


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "grpo", "rejection_sampling"])
def test_the_policys_reward_rises(speaker: str, method: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 25, "learning_rate": 3e-3, "per_device_train_batch_size": 64}
    settings |= {"n": 64} if method == "rejection_sampling" else {"beta": 0.01}
    out = run(method, speaker, tmp_path / "out", **settings)
    assert mean_reward(out) > mean_reward(speaker) + 0.1  # ten standard errors of 1024 samples


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kto", "rloo", "grpo", "rejection_sampling"])
def test_the_same_seed_gives_the_same_weights(zoo: Zoo, speaker: str, method: str, tmp_path: Path) -> None:
    runs = []
    for number, seed in enumerate((1, 1, 2)):
        torch.manual_seed(number)
        start = zoo["full"] if method == "kto" else speaker
        runs.append(weights(run(method, start, tmp_path / str(number), seed=seed, max_steps=1, learning_rate=1e-3)))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "load_in_4bit"), [("kto", False), ("kto", True), ("rloo", True), ("grpo", False)])
def test_a_fresh_adapter_starts_where_the_full_weights_are(
    zoo: Zoo, method: str, load_in_4bit: bool, tmp_path: Path
) -> None:
    settings = {"lora": {"r": 4, "lora_dropout": 0.5}, "load_in_4bit": load_in_4bit, "learning_rate": 1e-2}
    out = run(method, zoo["full"], tmp_path / "out", max_steps=1, **settings)
    assert train.history(out)["kl"][0] == pytest.approx(0, abs=1e-6)  # LoRA's dropout is off, too
    assert models.base_of(out) == zoo["full"] and models.read_notes(out)["load_in_4bit"] == load_in_4bit


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_one_plain_gradient_step_is_that_of_the_objective_by_hand(speaker: str, method: str, tmp_path: Path) -> None:
    """RLOO: -mean of A log pi(y), A against the prompt's other completions; GRPO: A whitened, a mean over tokens."""
    seen: list[tuple[str, str]] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return share_of_c(prompts, completions)

    settings: dict[str, Any] = ONLINE | {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 1e9, "max_steps": 1}
    train_it = getattr(train, method)
    out = train_it(speaker, reward, WORDS, tmp_path / "out", missing_eos_penalty=2.0, seed=1, **settings)
    tokenizer, model = models.load_tokenizer(speaker), models.load_causal(speaker, trainable=True)
    logprobs, rewards = [], []
    for (prompt, text), share in zip(seen, share_of_c([], [text for _, text in seen]), strict=True):
        first, ids = (tokenizer(part)["input_ids"] for part in (prompt, text))
        unfinished = len(ids) == 6
        ids = ids if unfinished else [*ids, EOS]
        logits = model(input_ids=torch.tensor([first + ids])).logits[0, len(first) - 1 : -1]
        logprobs.append(logits.log_softmax(-1)[range(len(ids)), ids])
        rewards.append(share - 2.0 * unfinished)
    groups = torch.tensor(rewards).view(4, 4)
    mean = groups.mean(1, keepdim=True)
    if method == "rloo":
        advantages = groups - (groups.sum(1, keepdim=True) - groups) / 3
        loss = -torch.stack([a * row.sum() for a, row in zip(advantages.flatten(), logprobs, strict=True)]).mean()
    else:
        advantages = (groups - mean) / (groups.std(1, keepdim=True) + 1e-4)
        loss = -torch.cat([a * row for a, row in zip(advantages.flatten(), logprobs, strict=True)]).mean()
    loss.backward()
    assert loss.abs() > 0.01
    for name, now in weights(out).items():
        start = model.get_parameter(name)
        assert torch.allclose(now, start.detach() - start.grad, atol=1e-4), name
    assert train.history(out)["reward"][0] == pytest.approx(groups.mean().item(), rel=1e-5)


# --- sampling inside TRL ---------------------------------------------------------------------------------------------


def test_defaults_are_those_of_ppo(tmp_path: Path) -> None:
    ours = PPOConfig(output_dir=str(tmp_path), use_cpu=True)
    names = {"beta": "kl_coef", "epsilon": "clip_range"}
    shared = set(LIKE_PPO) - {"num_generations", "disable_dropout"}
    assert {name: LIKE_PPO[name] for name in shared} == {name: getattr(ours, names.get(name, name)) for name in shared}


@pytest.mark.slow
def test_the_rewards_inputs_are_what_was_asked_for(zoo: Zoo, tmp_path: Path) -> None:
    """Text or chat, a reward sees what PPO's does: completions without special tokens, and the dataset's columns."""
    seen: list[tuple[list[Any], list[Any], dict[str, Any]]] = []

    def watch(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.append((prompts, completions, columns))
        return [float(len(str(text))) for text in completions]

    text = Dataset.from_dict({"prompt": QUESTIONS, "kind": list("abcdefgh"), "completion": [" no ."] * 8})
    chat = text.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    for name, prompts in (("text", text), ("chat", chat)):
        train.rloo(zoo["full"], watch, prompts, tmp_path / name, max_steps=1, seed=3, **ONLINE)
    (prompts_text, texts, given), (prompts_chat, chats, _) = seen
    assert set(given) == {"kind"} and [QUESTIONS["abcdefgh".index(kind)] for kind in given["kind"]] == prompts_text
    assert all(prompts_text[i] == prompts_text[i - i % 4] for i in range(16)) and len(set(prompts_text)) == 4
    # The template of the tiny tokenizer renders a question as it is, so that the same ids are drawn.
    assert [prompt[0]["content"] for prompt in prompts_chat] == prompts_text
    assert [[turn["role"] for turn in completion] for completion in chats] == [["assistant"]] * 16
    assert [completion[0]["content"] for completion in chats] == texts
    assert not any("<|" in text for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_a_reward_models_directory_is_a_reward_and_completions_end_at_eos(
    zoo: Zoo, method: str, tmp_path: Path
) -> None:
    prompts, longer = Dataset.from_dict({"prompt": QUESTIONS}), ONLINE | {"max_completion_length": 24}
    out = getattr(train, method)(zoo["full"], zoo["full-reward"], prompts, tmp_path / "out", max_steps=1, **longer)
    assert json.loads((Path(out) / "generation_config.json").read_text())["eos_token_id"] in (EOS, [EOS])
    row = train.history(out).iloc[0]
    assert math.isfinite(row["reward"]) and row["completions/mean_terminated_length"] < 24
    assert row["completions/clipped_ratio"] < 1 and row["completions/min_length"] < 24


@pytest.mark.slow
def test_checkpointing_changes_no_sample(zoo: Zoo, tmp_path: Path) -> None:
    """In train mode with checkpointing on, generate() drops its cache and only the first token is right."""
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3}
    plain = run("rloo", zoo["words"], tmp_path / "plain", **settings)
    saving = run("rloo", zoo["words"], tmp_path / "saving", gradient_checkpointing=True, **settings)
    columns = ["reward", "completions/mean_length"]
    assert train.history(plain)[columns].equals(train.history(saving)[columns])


@pytest.mark.slow
def test_rejection_sampling_trains_on_the_best_finished_sample_and_shows_it(speaker: str, tmp_path: Path) -> None:
    settings = {"n": 6, "max_completion_length": 12, "max_steps": 1, "seed": 4, "per_device_train_batch_size": 16}
    out = run("rejection_sampling", speaker, tmp_path / "out", **settings)
    chosen = pd.read_parquet(Path(out) / "samples.parquet")
    pool = sampling.sample(speaker, WORDS, n=6, max_completion_length=12, seed=4)
    pool = sampling.add_rewards(pool[pool["finished"]], {"reward": share_of_c})
    assert chosen["reward"].tolist() == pool.groupby("prompt_id")["reward"].max().tolist()
    assert chosen["prompt"].tolist() == [WORDS["prompt"][i] for i in chosen["prompt_id"]]
    assert chosen["finished"].all() and len(train.history(out)) == 1
    # its first loss, before any step, is the start's mean NLL of exactly these texts
    tokenizer, model = models.load_tokenizer(speaker), models.load_causal(speaker).eval()
    ids = [(tokenizer(row.prompt)["input_ids"], tokenizer(row.completion)["input_ids"]) for row in chosen.itertuples()]
    total = sum(naive_logprobs(model, prompt, [*completion, EOS]).sum().item() for prompt, completion in ids)
    count = sum(len(completion) + 1 for _, completion in ids)
    assert train.history(out)["loss"][0] == pytest.approx(-total / count, rel=1e-4)


@pytest.mark.slow
def test_rejection_sampling_works_on_adapters_and_chats(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    chat = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in QUESTIONS])
    reward = RewardModel(zoo["full-reward"])
    out = train.rejection_sampling(
        zoo[mode], reward, chat, tmp_path / "out", n=4, max_completion_length=24, max_steps=1, **QUIET
    )
    assert models.is_adapter(out) == (mode != "full")
    row = pd.read_parquet(Path(out) / "samples.parquet").iloc[0]
    assert reward([chat["prompt"][row["prompt_id"]]], [row["completion"]]) == pytest.approx([row["reward"]], abs=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "holds"),
    [
        (JUDGED.filter(lambda row: row["label"]), "it holds True$"),
        (JUDGED.remove_columns("label"), "it holds nothing$"),
        (JUDGED.map(lambda row: {"label": "yes" if row["label"] else "no"}), "'no', 'yes'$"),
    ],
)
def test_kto_refuses_labels_of_one_kind(zoo: Zoo, rows: Dataset, holds: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`label` must hold both True .* {holds}"):
        train.kto(zoo["full"], rows, tmp_path / "out", **KTO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["kto", "rloo", "grpo", "rejection_sampling"])
def test_what_every_stage_refuses_these_do_too(zoo: Zoo, method: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("weights")
    with pytest.raises(FileExistsError, match="is there already"):
        run(method, zoo["full"], tmp_path / "full")
    with pytest.raises(models.ModelError, match="is an adapter already"):
        run(method, zoo["lora"], tmp_path / "out", lora={})
    with pytest.raises(models.ModelError, match="no such model directory"):
        run(method, str(tmp_path / "absent"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize("method", ["rloo", "grpo"])
def test_what_cannot_be_sampled_is_refused_in_one_sentence(zoo: Zoo, method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 prompts are fewer than the 4 of one batch"):
        getattr(train, method)(zoo["words"], share_of_c, WORDS.select([0, 1]), tmp_path / "out", **ONLINE)
    with pytest.raises(ValueError, match="no column 'prompt'; it has text"):
        getattr(train, method)(
            zoo["words"], share_of_c, WORDS.rename_column("prompt", "text"), tmp_path / "out", **ONLINE
        )
    with pytest.raises(ValueError, match="exceed the model's 64 positions"):
        run(method, zoo["words"], tmp_path / "out", max_completion_length=63)
    with pytest.raises(models.ModelError, match="counts positions from the start of the padding"):
        run(method, zoo["gpt2"], tmp_path / "out")
    with pytest.raises(ValueError, match="gave \\[16\\] values for 16 completions, 16 of them not finite"):
        getattr(train, method)(
            zoo["words"], lambda prompts, completions: [math.nan] * len(prompts), WORDS, tmp_path / "out", **ONLINE
        )
    assert not (tmp_path / "out").exists()


def test_a_misspelt_setting_is_refused_before_anything_is_sampled(tmp_path: Path, speaker: str) -> None:
    def never(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        raise AssertionError("sampled")

    with pytest.raises(TypeError, match="learning_rat"):
        train.rejection_sampling(speaker, never, WORDS, tmp_path / "out", learning_rat=1.0, **QUIET)


def test_rejection_sampling_says_how_many_prompts_it_leaves_out(speaker: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"n": 4, "max_completion_length": 1, "max_steps": 1}
    with pytest.warns(
        UserWarning, match=r"of \d+ of 16 prompts no completion ended in 1 tokens; these prompts are left"
    ):
        out = run("rejection_sampling", speaker, tmp_path / "out", **settings)
    assert 0 < len(pd.read_parquet(Path(out) / "samples.parquet")) < 16


# --- reward models: margins, and rankings ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_margin_is_taken_off_the_difference_in_the_loss(zoo: Zoo, tmp_path: Path) -> None:
    """-log sigmoid(r_chosen - r_rejected - m), Llama 2 (2307.09288), eq. 2."""
    margins = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 0.25, 0.75]
    settings = QUIET | {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 0.0}
    losses = []
    for name, rows in (("plain", PAIRS), ("margin", PAIRS.add_column("margin", margins))):
        out = train.reward_model(zoo["full"], rows, tmp_path / name, **settings)
        losses.append(train.history(out)["loss"][0])
    scale, reward = models.read_notes(out)["scale"], RewardModel(out)
    chosen, rejected = (torch.tensor(reward(PAIRS["prompt"][:], PAIRS[side][:])) for side in ("chosen", "rejected"))
    expected = torch.log1p(torch.exp(-((chosen - rejected) * scale - torch.tensor(margins)))).mean().item()
    assert losses[1] == pytest.approx(expected, abs=1e-4)
    assert abs(losses[1] - losses[0]) > 0.1


SIZES = {"a": 3, "b": 1, "c": 6, "d": 2, "e": 3, "f": 1, "g": 10, "h": 1, "i": 2}
ITEMS = [item for k in range(10) for item, size in SIZES.items() if k < size]


def test_batches_hold_whole_items_and_every_row_once_an_epoch() -> None:
    batches = ItemBatches(ITEMS, 6, seed=1)
    orders = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        order = list(batches)
        assert len(order) == len(batches)  # in every epoch: Trainer counts once
        assert sorted(row for batch in order for row in batch) == list(range(len(ITEMS)))
        for batch in order:
            held = {ITEMS[row] for row in batch}
            assert len(batch) == sum(SIZES[item] for item in held)
            assert len(batch) <= 6 or held == {"g"}
        orders.append(order)
    assert len({json.dumps(order) for order in orders}) == 4
    again, other = ItemBatches(ITEMS, 6, seed=1), ItemBatches(ITEMS, 6, seed=2)
    again.set_epoch(3)
    assert list(again) == orders[3]
    assert list(other) != orders[0]


@pytest.mark.slow
def test_a_reward_model_learns_from_batches_of_whole_items(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer's loss was given: whole items each time, reshuffled each epoch, over-long pairs left out."""
    rows = [
        {"prompt": QUESTIONS[item], "chosen": f" it lives {'by ' * pair}.", "rejected": f" no {item} .", "item": item}
        for pair in range(6)
        for item in range(6)
        if pair <= item
    ]
    long = {"prompt": QUESTIONS[0], "chosen": " river" * 60, "rejected": " no .", "item": 0}
    tokenizer = models.load_tokenizer(zoo["full"])
    ids = [tokenizer(row["prompt"] + row["rejected"] + "<|endoftext|>")["input_ids"] for row in rows]
    owner = {tuple(each): row["item"] for each, row in zip(ids, rows, strict=True)}  # names an item in a batch
    epochs: list[list[list[int]]] = []
    original = ItemRewardTrainer.compute_loss

    def watch(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        half = len(inputs["input_ids"]) // 2
        pairs = zip(inputs["input_ids"][half:], inputs["attention_mask"][half:], strict=True)
        items = [owner[tuple(row[mask.bool()].tolist())] for row, mask in pairs]
        if self.state.epoch == int(self.state.epoch) and (not epochs or epochs[-1]):
            epochs.append([])
        epochs[-1].append(items)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ItemRewardTrainer, "compute_loss", watch)
    settings: dict[str, Any] = QUIET | {"per_device_train_batch_size": 6, "num_train_epochs": 2, "max_length": 40}
    train.reward_model(zoo["full"], Dataset.from_list([long, *rows]), tmp_path / "out", learning_rate=1e-3, **settings)
    assert len(epochs) == 2 and epochs[0] != epochs[1]
    for epoch in epochs:
        assert sorted(item for batch in epoch for item in batch) == sorted(row["item"] for row in rows)
        for batch in epoch:
            assert all(batch.count(item) == item + 1 for item in set(batch)) and len(batch) <= 6
