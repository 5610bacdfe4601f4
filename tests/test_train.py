"""rlhf_kit.train at pocket size: SFT, reward model and DPO in full, LoRA and 4-bit + LoRA, each from the last."""

from __future__ import annotations

import gc
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import MODES, naive_logprobs, save_llama, word_tokenizer
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, TrainerCallback
from transformers import PreTrainedTokenizerBase as TokenizerBase

from rlhf_kit import models, train
from rlhf_kit.models import ModelError
from rlhf_kit.rewards import RewardModel
from rlhf_kit.train.reward import ItemBatches, ItemRewardTrainer

Zoo = dict[str, str]
EOS = 0
ANIMALS = ["otter", "owl", "falcon", "newt", "whale", "hare", "fox", "crane"]
PROMPTS = [f"where does the {animal} live ?" for animal in ANIMALS]
DEMONSTRATIONS = Dataset.from_dict({"prompt": PROMPTS, "completion": [" it lives by the river ."] * 8})
CHOSEN = [f" the {animal} lives by the river ." for animal in ANIMALS]
PREFERENCES = Dataset.from_dict({"prompt": PROMPTS, "chosen": CHOSEN, "rejected": [" it lives .", " no ."] * 4})
MARGINS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 0.25, 0.75]
COMMON: dict[str, Any] = {"per_device_train_batch_size": 8, "logging_steps": 1, "callbacks": []}


def digest(directory: str) -> dict[str, str]:
    """sha256 of every file under a directory."""
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def weights(directory: str) -> dict[str, torch.Tensor]:
    (file,) = Path(directory).glob("*.safetensors")
    return load_file(file)


def logprob(directory: str, completion: str) -> float:
    """log pi(completion, EOS | the first prompt), token by token."""
    tokenizer, model = models.load_tokenizer(directory), models.load_causal(directory).eval()
    prompt, ids = (tokenizer(text)["input_ids"] for text in (PROMPTS[0], completion))
    return naive_logprobs(model, prompt, [*ids, EOS]).sum().item()


def raw_scores(directory: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the chosen and of the rejected completions, up to a shift, as they were before normalising."""
    reward, scale = RewardModel(directory), models.read_notes(directory)["scale"]
    chosen, rejected = (torch.tensor(reward(PROMPTS, PREFERENCES[side][:])) for side in ("chosen", "rejected"))
    return chosen * scale, rejected * scale


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_each_stage_learns_from_the_directory_of_the_one_before(
    mode: str, tokenizer: TokenizerBase, tmp_path: Path
) -> None:
    base = save_llama(tmp_path / "base", tokenizer)
    before = {base: digest(base)}
    adapter = {} if mode == "full" else {"lora": {"r": 8}, "load_in_4bit": mode == "4bit"}
    settings = COMMON | {"learning_rate": 2e-3 if mode == "full" else 1e-2}
    sft = train.sft(base, DEMONSTRATIONS, tmp_path / "sft", max_steps=10, **adapter, **settings)
    before[sft] = digest(sft)
    reward = train.reward_model(sft, PREFERENCES, tmp_path / "reward", max_steps=8, **settings)
    dpo = train.dpo(sft, PREFERENCES, tmp_path / "dpo", max_steps=8, beta=0.3, **settings)
    for directory in (sft, reward, dpo):
        losses = train.history(directory)["loss"]
        assert losses.iloc[-1] < 0.6 * losses.iloc[0], directory
    taught = DEMONSTRATIONS["completion"][0]
    assert logprob(sft, taught) > logprob(base, taught) + 5
    chosen, rejected = raw_scores(reward)
    assert (chosen > rejected).all()
    margins = [logprob(each, CHOSEN[0]) - logprob(each, PREFERENCES["rejected"][0]) for each in (sft, dpo)]
    assert margins[1] > margins[0] + 1
    assert all(digest(directory) == files for directory, files in before.items())  # no start is written into
    # SFT's first loss is the mean NLL of the completions: the prompts play no part.
    model, total, count = models.load_causal(base, load_in_4bit=mode == "4bit").eval(), 0.0, 0
    for row in DEMONSTRATIONS:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], EOS]
        total, count = total - naive_logprobs(model, prompt, completion).sum().item(), count + len(completion)
    assert train.history(sft)["loss"][0] == pytest.approx(total / count, rel=1e-4)
    # Adapters stand on the one base and hold no weights of it.
    for directory in (sft, reward, dpo):
        assert models.is_adapter(directory) == (mode != "full")
        if mode != "full":
            assert models.same_base(directory, base)
            tensors = load_file(directory + "/adapter_model.safetensors")
            assert all("lora_" in key or "score" in key for key in tensors)
            assert all(tensor.dtype == torch.float32 for tensor in tensors.values())  # not cast to bf16 over 4 bits
            assert models.read_notes(directory)["load_in_4bit"] == (mode == "4bit")
            # DPO's clone of the reference is not left behind
            assert len(list(Path(directory).glob("**/adapter_config.json"))) == 1


# --- what is saved is what was trained -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_reward_model_is_read_where_it_was_trained_also_where_pad_was_eos(mode: str, tmp_path: Path) -> None:
    """The kit's score of a text against transformers' own head on the saved weights, padded and alone."""
    tokenizer = word_tokenizer()
    base = save_llama(tmp_path / "base", tokenizer, hidden=32)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    adapter = {} if mode == "full" else {"lora": {"r": 4}, "load_in_4bit": mode == "4bit"}
    texts = {"prompt": ["a c", "b d"] * 4, "chosen": [" e f g", " h"] * 4, "rejected": [" i", " j i j"] * 4}
    settings = COMMON | {"max_steps": 8, "learning_rate": 1e-2} | adapter
    out = train.reward_model(base, Dataset.from_dict(texts), tmp_path / "reward", **settings)
    reward = RewardModel(out)
    scores = torch.tensor(reward(texts["prompt"], texts["chosen"])) * reward.scale + reward.shift
    everything = torch.tensor(reward(2 * texts["prompt"], texts["chosen"] + texts["rejected"]))
    assert everything.mean().item() == pytest.approx(0, abs=1e-5)  # normalised on the completions of its dataset
    assert everything.std().item() == pytest.approx(1, abs=1e-5)
    own = models.load_base(out, AutoModelForSequenceClassification.from_pretrained, None, num_labels=1)
    own = own if mode == "full" else PeftModel.from_pretrained(own, out)
    read = models.load_tokenizer(out)
    own.config.pad_token_id, read.padding_side = read.pad_token_id, "right"
    rows = [prompt + chosen + read.eos_token for prompt, chosen in zip(texts["prompt"], texts["chosen"], strict=True)]
    with torch.no_grad():
        logits = own.eval()(**read(rows, padding=True, return_tensors="pt")).logits.squeeze(1)
    assert torch.allclose(scores, logits.float(), atol=2e-2 if mode == "4bit" else 1e-4)
    assert logits[0] != logits[1]


class TrainedScores(TrainerCallback):
    """The trained model's own scores of the chosen completions."""

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        rows = [prompt + chosen + "<|endoftext|>" for prompt, chosen in zip(PROMPTS, CHOSEN, strict=True)]
        with torch.no_grad():
            inputs = given["processing_class"](rows, padding=True, return_tensors="pt")
            self.scores = given["model"].eval()(**inputs).logits[:, 0]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_over_a_bf16_base_the_reloaded_scores_are_the_trained_ones(
    zoo: Zoo, tmp_path: Path, load_in_4bit: bool
) -> None:
    trained = TrainedScores()
    how = {"lora": {"r": 4}, "dtype": "bfloat16", "load_in_4bit": load_in_4bit, "learning_rate": 1e-2, "max_steps": 4}
    out = train.reward_model(zoo["full"], PREFERENCES, tmp_path / "reward", **{**COMMON, **how, "callbacks": [trained]})
    reward = RewardModel(out)
    scores = torch.tensor(reward(PROMPTS, CHOSEN)) * reward.scale + reward.shift
    assert trained.scores.dtype == torch.float32 and torch.allclose(scores, trained.scores, atol=1e-5)


def test_a_reward_model_that_reloads_to_other_scores_is_not_published(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = RewardModel._score
    monkeypatch.setattr(RewardModel, "_score", lambda self, rows: score(self, [ids[:-1] for ids in rows]))  # not at EOS
    with pytest.raises(ModelError, match="scores the rows it was trained on differently"):
        train.reward_model(zoo["full"], PREFERENCES, tmp_path / "reward", max_steps=2, **COMMON)
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_reloads_to_other_log_probs_is_not_published(zoo: Zoo, tmp_path: Path) -> None:
    """The base is not saved with an adapter, so a change of it would be lost, in silence."""

    class ChangesTheBase(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.get_input_embeddings().weight.data.mul_(1.5)

    settings = {"lora": {"r": 2}, "max_steps": 1, **COMMON, "callbacks": [ChangesTheBase()]}
    for method, rows in ((train.sft, DEMONSTRATIONS), (train.dpo, PREFERENCES)):
        with pytest.raises(ModelError, match="loaded again, its log-probs differ"):
            method(zoo["full"], rows, tmp_path / "out", **settings)
    with pytest.raises(ModelError, match="init_lora_weights='olora' changes the base"):
        train.sft(zoo["full"], DEMONSTRATIONS, tmp_path / "out", lora={"r": 2, "init_lora_weights": "olora"}, **COMMON)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_reward_model_is_normalised_when_its_trainer_is_gone(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are loaded once more to score, so the trained ones must be gone. `lora` is not written into."""

    def held() -> int:
        return sum(isinstance(each, LlamaForSequenceClassification) for each in gc.get_objects())

    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = lora.to_dict()
    gc.collect()
    before, alive = held(), []
    monkeypatch.setattr("rlhf_kit.train.reward.normalise", lambda *arguments: alive.append(held()))
    train.reward_model(zoo["full"], PREFERENCES, tmp_path / "reward", max_steps=1, lora=lora)
    assert alive == [before] and lora.to_dict() == settings  # peft notes in a config what it finds


@pytest.mark.slow
@pytest.mark.parametrize("stage, data", [("sft", DEMONSTRATIONS), ("dpo", PREFERENCES), ("reward_model", PREFERENCES)])
def test_chat_rows_train_like_the_same_text(zoo: Zoo, stage: str, data: Dataset, tmp_path: Path) -> None:
    def chat(row: dict[str, str]) -> dict[str, Any]:
        turns: dict[str, Any] = {"prompt": [{"role": "user", "content": row["prompt"]}]}
        return turns | {name: [{"role": "assistant", "content": row[name][1:]}] for name in row if name != "prompt"}

    losses = []
    for name, rows in (("text", data), ("chat", Dataset.from_list([chat(row) for row in data]))):
        out = getattr(train, stage)(zoo["full"], rows, tmp_path / name, max_steps=1, **COMMON)
        losses.append(train.history(out)["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# --- reward models: the loss, margins, and rankings ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode, margins", [("full", [0.0] * 8), *((mode, MARGINS) for mode in MODES)])
def test_the_loss_of_a_reward_model_and_its_margin(zoo: Zoo, mode: str, margins: list[float], tmp_path: Path) -> None:
    """-log sigmoid(r_chosen - r_rejected), 2203.02155, eq. 1, less a margin, 2307.09288, eq. 2, of the saved head.

    Bit for bit the start with learning rate 0, over a 4-bit base too, where TRL rounds what it trains to bf16.
    """
    start, rows = weights(zoo[mode]), PREFERENCES.add_column("margin", margins) if any(margins) else PREFERENCES
    out = train.reward_model(zoo[mode], rows, tmp_path / "out", max_steps=1, learning_rate=0.0, **COMMON)
    now = weights(out)
    assert [key.endswith("score.weight") for key in now.keys() - start.keys()] == [True]
    assert start.keys() - now.keys() <= {"lm_head.weight"}
    assert all(torch.equal(now[key], start[key]) for key in start.keys() & now.keys())
    chosen, rejected = raw_scores(out)
    loss = -torch.nn.functional.logsigmoid(chosen - rejected - torch.tensor(margins)).mean().item()
    assert train.history(out)["loss"][0] == pytest.approx(loss, abs=1e-4)


SIZES = {"a": 3, "b": 1, "c": 6, "d": 2, "e": 3, "f": 1, "g": 10, "h": 1, "i": 2}
ITEMS = [item for k in range(10) for item, size in SIZES.items() if k < size]


def test_batches_hold_whole_items_and_every_row_once_an_epoch() -> None:
    batches = ItemBatches(ITEMS, 6, seed=1)
    orders = [list(batches) for _ in range(4)]
    for order in orders:
        assert len(order) == len(batches)  # in every epoch: Trainer counts once
        assert sorted(row for batch in order for row in batch) == list(range(len(ITEMS)))
        for batch in order:
            held = {ITEMS[row] for row in batch}
            assert len(batch) == sum(SIZES[item] for item in held)
            assert len(batch) <= 6 or held == {"g"}
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))
    again, other = ItemBatches(ITEMS, 6, seed=1), ItemBatches(ITEMS, 6, seed=2)
    assert list(again) == orders[0] != list(other)


@pytest.mark.slow
def test_a_reward_model_learns_from_batches_of_whole_items(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the trainer's loss was given: whole items each time, reshuffled each epoch, over-long pairs left out."""
    tokenizer = models.load_tokenizer(zoo["full"])
    pairs = [(item, f" it lives {'by ' * pair}.") for pair in range(6) for item in range(6) if pair <= item]
    pairs.append((0, " river" * 60))
    rows = [{"prompt": PROMPTS[item], "chosen": text, "rejected": " no .", "item": item} for item, text in pairs]
    epochs: dict[int, list[list[int]]] = defaultdict(list)
    original = ItemRewardTrainer.compute_loss

    def watch(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        texts = tokenizer.batch_decode(inputs["input_ids"][: len(inputs["input_ids"]) // 2])
        epochs[int(self.state.epoch)].append([PROMPTS.index(text[: text.index("?") + 1]) for text in texts])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ItemRewardTrainer, "compute_loss", watch)
    settings = COMMON | {"per_device_train_batch_size": 6, "num_train_epochs": 2, "max_length": 40}
    with pytest.warns(UserWarning, match="1 of 22 rows are left out"):
        train.reward_model(zoo["full"], Dataset.from_list(rows), tmp_path / "out", **settings)
    assert len(epochs) == 2 and epochs[0] != epochs[1]
    for epoch in epochs.values():
        assert sorted(item for batch in epoch for item in batch) == sorted(item for item, _ in pairs[:-1])
        for batch in epoch:
            assert all(batch.count(item) == item + 1 for item in set(batch)) and len(batch) <= 6


# --- nothing is published that is not whole and finite ---------------------------------------------------------------


def test_nothing_is_under_the_final_name_until_it_is_whole(zoo: Zoo, tmp_path: Path) -> None:
    """Neither while it trains, nor after a crash; a reward model is whole only once it is normalised."""
    out = tmp_path / "deep" / "out"

    class Crash(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert not out.exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.sft(zoo["full"], DEMONSTRATIONS, out, max_steps=2, callbacks=[Crash()])
    same = PREFERENCES.map(lambda row: {"prompt": "why ?", "chosen": " no .", "rejected": " no ."})
    with pytest.raises(ValueError, match="nothing to learn"):
        train.reward_model(zoo["full"], same, out, max_steps=1, **COMMON)
    with pytest.raises(ModelError, match="weights that are not finite"):  # after the last step, so no gradient tells
        train.reward_model(zoo["full"], PREFERENCES, out, max_steps=1, learning_rate=1e39, **COMMON)
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # an empty folder is no model, and is no hindrance
    train.sft(zoo["full"], DEMONSTRATIONS, out, max_steps=3, **COMMON)
    frame = train.history(out)
    assert frame.columns[0] == "step" and frame["step"].tolist() == [1, 2, 3] and frame["loss"].notna().all()
    assert models.load_causal(out) is not None and list(out.parent.iterdir()) == [out]
