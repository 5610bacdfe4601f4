"""rlhf_kit.train at pocket size: SFT, reward model, PPO and DPO in full, LoRA and 4-bit + LoRA, each from the last."""

from __future__ import annotations

import copy
import gc
import hashlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import in_a_new_process, naive_logprobs, save_llama, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
)

from rlhf_kit import models, train
from rlhf_kit.models import ModelError
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.rewards import RewardModel

Zoo = dict[str, str]
EOS = 0
ANIMALS = ["otter", "owl", "falcon", "newt", "whale", "hare", "fox", "crane"]
PROMPTS = [f"where does the {animal} live ?" for animal in ANIMALS]
DEMONSTRATIONS = Dataset.from_list([{"prompt": prompt, "completion": " it lives by the river ."} for prompt in PROMPTS])
PREFERENCES = Dataset.from_list(
    [
        {
            "prompt": prompt,
            "chosen": f" the {animal} lives by the river .",
            "rejected": " no ." if row % 2 else " it lives .",
        }
        for row, (prompt, animal) in enumerate(zip(PROMPTS, ANIMALS, strict=True))
    ]
)
COMMON: dict[str, Any] = {"per_device_train_batch_size": 8, "logging_steps": 1, "callbacks": []}


def digest(directory: str) -> dict[str, str]:
    """sha256 of every file under a directory."""
    files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Stages(NamedTuple):
    """Directories of one mode, and what the base's files were before."""

    mode: str
    base: str
    sft: str
    reward: str
    ppo: str
    dpo: str
    base_before: dict[str, str]
    sft_before: dict[str, str]


@pytest.fixture(scope="module", params=["full", "lora", "4bit"])
def stages(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase
) -> Stages:
    """The whole pipeline in one mode: every stage starts from the directory of the one before."""
    mode, root = request.param, tmp_path_factory.mktemp("stages")
    base = save_llama(root / "base", tokenizer)
    base_before = digest(base)
    adapter = {} if mode == "full" else {"lora": models.lora(8, 16), "load_in_4bit": mode == "4bit"}
    rate = 1e-3 if mode == "full" else 1e-2
    sft = train.sft(base, DEMONSTRATIONS, root / "sft", max_steps=20, learning_rate=rate, **adapter, **COMMON)
    sft_before = digest(sft)
    reward = train.reward_model(sft, PREFERENCES, root / "reward", max_steps=12, learning_rate=rate, **COMMON)
    args = PPOConfig(
        output_dir=str(root / "ppo"),
        max_steps=2,
        per_device_train_batch_size=8,
        max_completion_length=8,
        learning_rate=rate,
    )
    ppo = PPOTrainer(sft, reward, args, DEMONSTRATIONS.select_columns("prompt"), callbacks=[])
    ppo.train()
    ppo.save_model()
    dpo = train.dpo(sft, PREFERENCES, root / "dpo", max_steps=12, learning_rate=rate, beta=0.3, **COMMON)
    return Stages(mode, base, sft, reward, str(root / "ppo"), dpo, base_before, sft_before)


# --- what every stage does -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loss_falls_in_every_stage(stages: Stages) -> None:
    for directory in (stages.sft, stages.reward, stages.dpo):
        losses = train.history(directory)["loss"]
        assert losses.iloc[-1] < 0.6 * losses.iloc[0], directory


@pytest.mark.slow
def test_each_stage_learned_what_it_was_taught(stages: Stages) -> None:
    def logprob(directory: str, completion: str) -> float:
        tokenizer, model = models.load_tokenizer(directory), models.load_causal(directory).eval()
        prompt, ids = (tokenizer(text)["input_ids"] for text in (PROMPTS[0], completion))
        return naive_logprobs(model, prompt, [*ids, EOS]).sum().item()

    taught = DEMONSTRATIONS["completion"][0]
    assert logprob(stages.sft, taught) > logprob(stages.base, taught) + 5
    reward = RewardModel(stages.reward)
    chosen, rejected = (reward(PREFERENCES["prompt"][:], PREFERENCES[side][:]) for side in ("chosen", "rejected"))
    assert all(better > worse for better, worse in zip(chosen, rejected, strict=True))
    margin = {
        d: logprob(d, PREFERENCES["chosen"][0]) - logprob(d, PREFERENCES["rejected"][0])
        for d in (stages.sft, stages.dpo)
    }
    assert margin[stages.dpo] > margin[stages.sft] + 1


@pytest.mark.slow
def test_the_sft_loss_is_the_completions_mean_token_nll(stages: Stages, tokenizer: PreTrainedTokenizerBase) -> None:
    """The first logged loss, before any step (logged in all modes at the base): prompt tokens play no part."""
    if_4bit = stages.mode == "4bit"
    base = models.load_causal(stages.base, load_in_4bit=if_4bit).eval()
    total, count = 0.0, 0
    for row in DEMONSTRATIONS:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["completion"])["input_ids"], EOS]
        total, count = total - naive_logprobs(base, prompt, completion).sum().item(), count + len(completion)
    assert train.history(stages.sft)["loss"][0] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_the_base_and_the_sft_model_are_left_untouched(stages: Stages) -> None:
    assert digest(stages.base) == stages.base_before
    assert digest(stages.sft) == stages.sft_before


@pytest.mark.slow
def test_adapters_stand_on_the_one_base_and_hold_no_weights_of_it(stages: Stages) -> None:
    for directory in (stages.sft, stages.reward, stages.ppo, stages.ppo + "/value", stages.dpo):
        assert models.is_adapter(directory) == (stages.mode != "full")
        if stages.mode == "full":
            continue
        assert models.same_base(directory, stages.base)
        tensors = load_file(directory + "/adapter_model.safetensors")
        assert all("lora_" in key or "score" in key for key in tensors)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())  # not cast to bf16 over 4 bits
        assert models.read_notes(directory)["load_in_4bit"] == (stages.mode == "4bit")
        assert sorted(path.name for path in Path(directory).glob("**/adapter_config.json")) == [
            "adapter_config.json"
        ] * (2 if directory == stages.ppo else 1)  # DPO's clone of the reference is not left behind


@pytest.mark.slow
def test_dpo_starts_at_log_two_because_its_reference_is_the_sft_model(stages: Stages) -> None:
    first = train.history(stages.dpo).iloc[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/chosen"] == first["rewards/rejected"] == 0.0
    # Had the raw base been the reference, it would not be: SFT moved these log-probs.
    tokenizer = models.load_tokenizer(stages.sft)
    prompt, completion = (tokenizer(PREFERENCES[0][name])["input_ids"] for name in ("prompt", "chosen"))
    sft, base = (
        naive_logprobs(m.eval(), prompt, [*completion, EOS]).sum().item()
        for m in (models.load_causal(stages.sft), models.load_causal(stages.base, load_in_4bit=stages.mode == "4bit"))
    )
    assert abs(sft - base) > 1
    assert first["logps/chosen"] != 0


@pytest.mark.slow
def test_the_reward_model_is_normalised_on_its_own_completions(stages: Stages) -> None:
    scores = RewardModel(stages.reward)(
        2 * PREFERENCES["prompt"][:], PREFERENCES["chosen"][:] + PREFERENCES["rejected"][:]
    )
    assert torch.tensor(scores).mean().item() == pytest.approx(0, abs=1e-5)
    assert torch.tensor(scores).std().item() == pytest.approx(1, abs=1e-5)
    assert models.read_score_head(stages.reward).dtype == torch.float32


@pytest.mark.parametrize("mode", ["full", "lora", "4bit"])
def test_a_reward_model_is_read_where_it_was_trained_also_where_pad_was_eos(mode: str, tmp_path: Path) -> None:
    """The kit's score of a text against transformers' own head on the saved weights, padded and alone."""
    tokenizer = word_tokenizer()
    base = save_llama(tmp_path / "base", tokenizer, hidden=32)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(base)
    adapter = {} if mode == "full" else {"lora": models.lora(4, 8), "load_in_4bit": mode == "4bit"}
    texts = {"prompt": ["a c", "b d"] * 4, "chosen": [" e f g", " h"] * 4, "rejected": [" i", " j i j"] * 4}
    settings = COMMON | {"max_steps": 8, "learning_rate": 1e-2} | adapter
    out = train.reward_model(base, Dataset.from_dict(texts), tmp_path / "reward", **settings)
    reward = RewardModel(out)
    scores = torch.tensor(reward(texts["prompt"][:2], texts["chosen"][:2])) * reward.scale + reward.shift
    auto, read = AutoModelForSequenceClassification, models.load_tokenizer(out)
    own = models.load_base(out, auto.from_pretrained, None, num_labels=1)
    if mode != "full":
        own = PeftModel.from_pretrained(own, out)
    own.config.pad_token_id, read.padding_side = read.pad_token_id, "right"
    rows = [
        prompt + chosen + read.eos_token for prompt, chosen in zip(texts["prompt"][:2], texts["chosen"], strict=False)
    ]
    with torch.no_grad():
        logits = own.eval()(**read(rows, padding=True, return_tensors="pt")).logits.squeeze(1)
    assert torch.allclose(scores, logits.float(), atol=2e-2 if mode == "4bit" else 1e-4)
    assert logits[0] != logits[1]


def test_a_reward_model_that_reloads_to_other_scores_is_not_published(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardModel, "_text", lambda self, prompt, completion: f"{prompt}{completion}")  # without EOS
    with pytest.raises(ModelError, match="scores the rows it was trained on differently"):
        train.reward_model(zoo["full"], PREFERENCES, tmp_path / "reward", max_steps=2, **COMMON)
    assert not (tmp_path / "reward").exists()


@pytest.mark.slow
def test_values_of_ppo_started_from_the_reward_model(stages: Stages, tmp_path: Path) -> None:
    trainer = PPOTrainer(
        stages.sft,
        stages.reward,
        PPOConfig(output_dir=str(tmp_path)),
        DEMONSTRATIONS.select_columns("prompt"),
        callbacks=[],
    )
    expected = models.read_score_head(stages.reward) / models.read_notes(stages.reward)["scale"]
    assert torch.allclose(trainer.roles.value_head.weight, expected, atol=1e-6)


SCORES = """
import json, sys, torch
torch.set_num_threads(1)
from rlhf_kit import models
from rlhf_kit.progress import quiet
from rlhf_kit.rewards import RewardModel
quiet()
task = json.loads(sys.argv[1])
ids = torch.tensor([task["ids"]])
answers = {}
with torch.no_grad():
    for name in ("sft", "ppo", "dpo"):
        answers[name] = models.load_causal(task[name]).eval()(input_ids=ids, use_cache=False).logits[0, -1].tolist()
    tokens = models.Tokens(ids, torch.ones_like(ids), torch.ones(1, 4, dtype=torch.long))
    answers["values"] = models.load_roles(task["ppo"], value=task["ppo"] + "/value").eval().values(tokens).tolist()
answers["reward"] = RewardModel(task["reward"])(task["prompts"], task["completions"])
print("ANSWERS" + json.dumps(answers))
"""


@pytest.mark.slow
def test_a_new_process_gets_the_same_scores_from_every_stage(stages: Stages) -> None:
    ids, prompts, completions = [300, 301, 302, 303, 304, 0], PREFERENCES["prompt"][:], PREFERENCES["chosen"][:]
    batch = torch.tensor([ids])
    tokens = models.Tokens(batch, torch.ones_like(batch), torch.ones(1, 4, dtype=torch.long))
    expected: dict[str, Any] = {"reward": RewardModel(stages.reward)(prompts, completions)}
    with torch.no_grad():
        for name in ("sft", "ppo", "dpo"):
            model = models.load_causal(getattr(stages, name)).eval()
            expected[name] = model(input_ids=batch, use_cache=False).logits[0, -1].tolist()
        roles = models.load_roles(stages.ppo, value=stages.ppo + "/value").eval()
        expected["values"] = roles.values(tokens).tolist()
    assert len({tuple(expected[name]) for name in ("sft", "ppo", "dpo")}) == 3
    task = {name: getattr(stages, name) for name in ("sft", "ppo", "dpo", "reward")}
    answers = in_a_new_process(SCORES, task | {"ids": ids, "prompts": prompts, "completions": completions})
    assert answers == expected


# --- what is saved is what was trained -------------------------------------------------------------------------------


class Keep:
    """Keeps what a trainer's model answered at the end of training, before anything was written."""

    def __init__(self, ids: list[int]) -> None:
        from transformers import TrainerCallback

        keep = self

        class Callback(TrainerCallback):
            def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                with torch.no_grad():
                    keep.logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits.clone()

        self.callback = Callback()
        self.logits = torch.zeros(())


@pytest.mark.slow
def test_the_directory_holds_the_model_that_was_trained(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    """The trainer's in-memory model against the directory read again: SFT, DPO and the reward model's raw score."""
    ids = [300, 301, 302, 303, EOS]
    settings = COMMON | {"max_steps": 3, "learning_rate": 1e-3}
    for stage, data in ((train.sft, DEMONSTRATIONS), (train.dpo, PREFERENCES), (train.reward_model, PREFERENCES)):
        keep = Keep(ids)
        out = stage(zoo[mode], data, tmp_path / stage.__name__, **settings | {"callbacks": [keep.callback]})
        if stage is train.reward_model:
            reward = RewardModel(out)
            ours, theirs = reward._score([ids]), keep.logits.squeeze()
        else:
            with torch.no_grad():
                ours = models.load_causal(out).eval()(input_ids=torch.tensor([ids])).logits
            theirs = keep.logits
        assert torch.allclose(ours, theirs, atol=1e-4), stage.__name__
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".partial")) == []


@pytest.mark.slow
def test_every_stage_is_the_same_again_with_the_same_seed(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    settings = COMMON | {"max_steps": 1, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
    for stage, data in ((train.sft, DEMONSTRATIONS), (train.reward_model, PREFERENCES), (train.dpo, PREFERENCES)):
        runs = []
        for number, seed in enumerate((1, 1, 2) if mode == "full" else (1, 1)):
            torch.manual_seed(number)
            out = stage(zoo[mode], data, tmp_path / f"{stage.__name__}-{number}", seed=seed, **settings)
            (file,) = Path(out).glob("*.safetensors")
            runs.append(load_file(file))
        assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0]), stage.__name__
        assert mode != "full" or not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0]), stage.__name__


@pytest.mark.slow
def test_a_fresh_adapter_over_full_weights_starts_every_stage_where_they_are(zoo: Zoo, tmp_path: Path) -> None:
    """`lora=` on a full SFT model: DPO's reference is that model, and only adapters are written."""
    settings = COMMON | {"max_steps": 2, "learning_rate": 1e-3, "lora": models.lora(4, 8)}
    for load_in_4bit in (False, True):
        dpo = train.dpo(
            zoo["full"], PREFERENCES, tmp_path / f"dpo{load_in_4bit}", load_in_4bit=load_in_4bit, **settings
        )
        assert train.history(dpo)["loss"][0] == pytest.approx(math.log(2), abs=1e-6)
        reward = train.reward_model(
            zoo["full"], PREFERENCES, tmp_path / f"r{load_in_4bit}", load_in_4bit=load_in_4bit, **settings
        )
        for out in (dpo, reward):
            assert models.base_of(out) == zoo["full"] and models.read_notes(out)["load_in_4bit"] == load_in_4bit


@pytest.mark.slow
def test_with_learning_rate_zero_a_stage_gives_back_its_start_bit_for_bit(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    """Over a 4-bit base too, where TRL rounds what it trains to bf16."""
    (file,) = Path(zoo[mode]).glob("*.safetensors")
    start = load_file(file)
    settings = COMMON | {"max_steps": 1, "learning_rate": 0.0}
    for stage, data in ((train.sft, DEMONSTRATIONS), (train.dpo, PREFERENCES), (train.reward_model, PREFERENCES)):
        out = stage(zoo[mode], data, tmp_path / stage.__name__, **settings)
        (file,) = Path(out).glob("*.safetensors")
        now = load_file(file)
        is_reward = stage is train.reward_model
        only_now, only_start = now.keys() - start.keys(), start.keys() - now.keys()
        assert len([key for key in only_now if key.endswith("score.weight")]) == len(only_now) == is_reward
        assert only_start <= ({"lm_head.weight"} if is_reward else set())
        assert all(torch.equal(now[key], start[key]) for key in start.keys() & now.keys()), stage.__name__
    # and the reward's loss there is -log sigmoid(r_chosen - r_rejected), 2203.02155, eq. 1, of the head that was saved
    notes, reward = models.read_notes(out), RewardModel(out)
    chosen, rejected = (
        torch.tensor(reward(PREFERENCES["prompt"][:], PREFERENCES[s][:])) for s in ("chosen", "rejected")
    )
    loss = -torch.nn.functional.logsigmoid((chosen - rejected) * notes["scale"]).mean().item()
    assert train.history(out)["loss"][0] == pytest.approx(loss, abs=1e-4)


# --- refusals and crashes --------------------------------------------------------------------------------------------


def test_a_trained_model_is_never_overwritten(zoo: Zoo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("weights")
    for stage, data in ((train.sft, DEMONSTRATIONS), (train.reward_model, PREFERENCES), (train.dpo, PREFERENCES)):
        with pytest.raises(FileExistsError, match="out: is there already.*name another `out` or delete it"):
            stage(zoo["full"], data, out, **COMMON)
    assert [(path.name, path.read_text()) for path in out.iterdir()] == [("precious", "weights")]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_and_a_killed_attempts_leftovers_do_not_disturb(zoo: Zoo, tmp_path: Path) -> None:
    out, left = tmp_path / "deep" / "out", tmp_path / "deep" / ".out.1.part"
    out.mkdir(parents=True)
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (left / "adapter_config.json").write_text("{}")  # would make the result an adapter
    train.sft(zoo["full"], DEMONSTRATIONS, out, max_steps=1, **COMMON)
    assert not (out / "adapter_config.json").exists()
    assert models.load_causal(out) is not None and len(train.history(out)) == 1


@pytest.mark.slow
def test_a_reward_model_is_normalised_when_its_trainer_is_gone(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are loaded once more to score: those that were trained must not still be held."""
    alive = []

    def count(*arguments: Any) -> None:
        alive.append(sum(isinstance(each, LlamaForSequenceClassification) for each in gc.get_objects()))

    gc.collect()
    before = sum(isinstance(each, LlamaForSequenceClassification) for each in gc.get_objects())
    monkeypatch.setattr("rlhf_kit.train.reward.normalise", count)
    train.reward_model(zoo["full"], PREFERENCES, tmp_path / "reward", max_steps=1, lora=models.lora(r=2))
    assert alive == [before]


def test_lora_settings_are_not_written_into(zoo: Zoo, tmp_path: Path) -> None:
    settings = models.lora(r=2)
    train.sft(zoo["full"], DEMONSTRATIONS, tmp_path / "sft", max_steps=1, lora=settings)
    models.load_roles(zoo["full"], lora=settings)
    assert settings.to_dict() == models.lora(r=2).to_dict()


def test_a_stage_that_fails_leaves_nothing_under_the_final_name(zoo: Zoo, tmp_path: Path) -> None:
    """A reward model is whole only once it is normalised: identical completions cannot be."""
    same = PREFERENCES.map(lambda row: {"prompt": "why ?", "chosen": " no .", "rejected": " no ."})
    with pytest.raises(ValueError, match="same score"):
        train.reward_model(zoo["full"], same, tmp_path / "reward", max_steps=1, **COMMON)
    assert not (tmp_path / "reward").exists()


def test_a_parent_directory_is_made(zoo: Zoo, tmp_path: Path) -> None:
    out = train.sft(zoo["full"], DEMONSTRATIONS, tmp_path / "a" / "b" / "sft", max_steps=1, **COMMON)
    assert models.max_length(out) == 64


def test_wrong_models_are_refused_in_one_sentence(zoo: Zoo, tmp_path: Path) -> None:
    stages: list[tuple[Any, Dataset]] = [
        (train.sft, DEMONSTRATIONS),
        (train.reward_model, PREFERENCES),
        (train.dpo, PREFERENCES),
    ]
    for stage, data in stages:
        with pytest.raises(models.ModelError, match="no such model directory"):
            stage(tmp_path / "absent", data, tmp_path / "out", **COMMON)
        with pytest.raises(models.ModelError, match="is an adapter already"):
            stage(zoo["lora"], data, tmp_path / "out", lora=models.lora(), **COMMON)
        with pytest.raises(models.ModelError, match="4-bit weights cannot be trained"):
            stage(zoo["full"], data, tmp_path / "out", load_in_4bit=True, **COMMON)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_chat_rows_train_like_the_same_text(zoo: Zoo, tmp_path: Path) -> None:
    def chat(row: dict[str, str]) -> dict[str, Any]:
        turns: dict[str, Any] = {"prompt": [{"role": "user", "content": row["prompt"]}]}
        return turns | {name: [{"role": "assistant", "content": row[name][1:]}] for name in row if name != "prompt"}

    for stage, data in ((train.sft, DEMONSTRATIONS), (train.reward_model, PREFERENCES), (train.dpo, PREFERENCES)):
        losses = []
        for name, rows in (("text", data), ("chat", Dataset.from_list([chat(row) for row in data]))):
            out = stage(
                zoo["full"], rows, tmp_path / f"{stage.__name__}-{name}", max_steps=2, learning_rate=1e-3, **COMMON
            )
            losses.append(train.history(out)["loss"].tolist())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), stage.__name__


def test_canary_trl_patches_a_models_forward(zoo: Zoo, tmp_path: Path) -> None:
    """Trap: a deepcopy of a model that TRL has held runs the original's weights; so stages hand over directories."""
    from trl import SFTConfig, SFTTrainer

    model = models.load_causal(zoo["full"], trainable=True)
    args = SFTConfig(
        output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to="none", max_steps=1, disable_tqdm=True
    )
    SFTTrainer(
        model=model, args=args, train_dataset=DEMONSTRATIONS, processing_class=models.load_tokenizer(zoo["full"])
    )
    assert "forward" in vars(model)
    twin = copy.deepcopy(model)
    ids = torch.tensor([[300, 301, 302]])
    with torch.no_grad():
        before = twin(input_ids=ids).logits
        model.lm_head.weight.mul_(2.0)
        assert not torch.equal(twin(input_ids=ids).logits, before)


def test_history_is_a_row_per_logged_step(zoo: Zoo, tmp_path: Path) -> None:
    out = train.sft(zoo["full"], DEMONSTRATIONS, tmp_path / "sft", max_steps=3, **COMMON)
    frame = train.history(out)
    assert frame.columns[0] == "step" and frame["step"].tolist() == [1, 2, 3] and frame["loss"].notna().all()
