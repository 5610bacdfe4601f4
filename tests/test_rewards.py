"""rlhf_kit.rewards: scores against a naive row-by-row computation, in full, LoRA and 4-bit + LoRA."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tiny import score_head
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_kit import evaluate, models, rewards
from rlhf_kit.rewards import RewardModel
from rlhf_kit.sampling import add_rewards

Zoo = dict[str, str]
EOS = 0
PROMPTS = ["where does the otter live ?", "why ?", "what food does the owl like ?", "does the falcon eat leaves ?"]
COMPLETIONS = [" the otter lives by the river .", "", " mice .", " no , the falcon likes to eat mice . it wakes ."]


@torch.no_grad()
def naive_scores(directory: str, tokenizer: PreTrainedTokenizerBase) -> list[float]:
    """One row at a time, no padding: the head on the state of the EOS that follows prompt + completion."""
    backbone, head, scores = models.load_backbone(directory), score_head(directory), []
    for pair in zip(PROMPTS, COMPLETIONS, strict=True):
        ids = [token for text in pair for token in tokenizer(text)["input_ids"]] + [EOS]
        scores.append((head @ backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item())
    return scores


def test_scores_equal_those_of_each_row_alone(
    zoo: Zoo, mode: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = naive_scores(zoo[f"{mode}-reward"], tokenizer)
    assert max(expected) - min(expected) > 0.5
    for batch_size in (64, 3, 1):
        monkeypatch.setattr(rewards, "BATCH_ROWS", batch_size)
        ours = RewardModel(zoo[f"{mode}-reward"])(PROMPTS, COMPLETIONS)
        assert ours == pytest.approx(expected, abs=1e-4)


def test_scores_equal_those_of_transformers_own_classifier(zoo: Zoo, tokenizer: PreTrainedTokenizerBase) -> None:
    classifier = AutoModelForSequenceClassification.from_pretrained(zoo["full-reward"], dtype=torch.float32).eval()
    texts = [f"{''.join(pair)}{tokenizer.eos_token}" for pair in zip(PROMPTS, COMPLETIONS, strict=True)]
    batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side="right")
    with torch.no_grad():
        logits = classifier(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = logits[:, 0].tolist()
    assert RewardModel(zoo["full-reward"])(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-4)


def test_long_texts_are_scored_in_batches_that_fit(zoo: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    reward = RewardModel(zoo["full-reward"])
    expected = reward(PROMPTS, COMPLETIONS)
    widths: list[tuple[int, int]] = []
    inner = reward._score
    monkeypatch.setattr(reward, "_score", lambda rows: widths.append((len(rows), max(map(len, rows)))) or inner(rows))
    monkeypatch.setattr(rewards, "BATCH_TOKENS", 30)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert sum(rows for rows, _ in widths) == len(PROMPTS)
    assert all(rows == 1 or rows * width <= 30 for rows, width in widths) and max(rows for rows, _ in widths) > 1


def test_chat_and_text_agree(zoo: Zoo, mode: str) -> None:
    reward = RewardModel(zoo[f"{mode}-reward"])
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[2:]]
    replies = [[{"role": "assistant", "content": completion[1:]}] for completion in COMPLETIONS[2:]]
    expected = reward(PROMPTS[2:], COMPLETIONS[2:])
    assert reward(chats, replies) == expected  # type: ignore[arg-type]
    assert reward(chats, [reply[0]["content"] for reply in replies]) == expected  # type: ignore[arg-type]


def test_normalise_gives_mean_zero_and_standard_deviation_one(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    path = shutil.copytree(zoo[f"{mode}-reward"], tmp_path / "reward")
    before = torch.tensor(RewardModel(path)(PROMPTS, COMPLETIONS))
    for _ in range(2):  # doing it again changes nothing
        rewards.normalise(path, PROMPTS, COMPLETIONS)  # type: ignore[arg-type]
        after = torch.tensor(RewardModel(path)(PROMPTS, COMPLETIONS))
        assert after.mean().item() == pytest.approx(0, abs=1e-5) and after.std().item() == pytest.approx(1, abs=1e-5)
        assert torch.allclose(after, (before - before.mean()) / before.std(), atol=1e-4)
    assert models.read_notes(path).get("load_in_4bit", False) == (mode == "4bit")  # what else it remembered


def test_completions_that_all_score_the_same_cannot_be_normalised(zoo: Zoo, tmp_path: Path) -> None:
    path = shutil.copytree(zoo["full-reward"], tmp_path / "reward")
    with pytest.raises(ValueError, match="same score"):
        rewards.normalise(path, PROMPTS[:1], COMPLETIONS[:1])  # type: ignore[arg-type]
    tensors = load_file(path / "model.safetensors")
    tensors["score.weight"] = torch.zeros_like(tensors["score.weight"])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="same score"):
        rewards.normalise(path, PROMPTS, COMPLETIONS)  # type: ignore[arg-type]


def test_what_is_no_reward_model_is_refused(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    for path, words in ((zoo[mode], "not a reward model"), (tmp_path / "absent", "no such model directory")):
        with pytest.raises(models.ModelError, match=words):
            RewardModel(path)


def test_columns_are_accepted_and_lengths_are_checked(zoo: Zoo) -> None:
    reward = RewardModel(zoo["full-reward"])
    assert reward(PROMPTS, COMPLETIONS, kind=["a"] * 4, number=[1, 2, 3, 4]) == reward(PROMPTS, COMPLETIONS)
    assert reward([], []) == []
    with pytest.raises(ValueError):
        reward(PROMPTS, COMPLETIONS[:2])
    assert reward.__name__ == "reward_model"  # read by TRL's trainers


@pytest.mark.parametrize(
    "given", [None, "ab", {"a": 1.0, "b": 2.0}, [1.0], [1.0, math.nan], [[1.0], [2.0]], [None, 1.0]]
)
def test_what_is_no_list_of_finite_numbers_is_no_reward(given: Any) -> None:
    samples = pd.DataFrame({"prompt_id": [0, 1], "prompt": ["a", "b"], "completion": ["x", "y"]})

    def mine(prompts: list[str], completions: list[str], **columns: Any) -> Any:
        return given

    for reward in (mine, rewards.Ensemble([mine, mine])):
        with pytest.raises(ValueError, match="the reward function gave .*finite"):
            add_rewards(samples, {"mine": reward})


@pytest.mark.parametrize("kind", [pd.Series, np.array, torch.tensor, iter, tuple])
def test_numbers_may_come_in_any_row(kind: Any) -> None:
    samples = pd.DataFrame({"prompt_id": [0, 1], "prompt": ["a", "b"], "completion": ["x", "y"]}, index=[7, 3])
    scored = add_rewards(samples, {"mine": lambda prompts, completions, **columns: kind([1.5, -0.25])})
    assert scored["mine"].tolist() == [1.5, -0.25]
    pairs = Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["x", "yy"], "rejected": ["xx", "y"]})
    assert evaluate.accuracy(lambda prompts, completions: kind([*map(len, completions)]), pairs).mean == 0.5
    with pytest.raises(ValueError, match="gave a NoneType, not a list of 2 finite numbers"):
        evaluate.accuracy(lambda prompts, completions: None, pairs)  # type: ignore[arg-type, return-value]


def test_scores_carry_the_prompts_own_columns_beside_ours(zoo: Zoo) -> None:
    own = {"model": ["x", "y"], "kl": ["far", "near"], "gold": ["Paris", "Rome"], "seed": [7, 8], "mine": [1, 2]}
    prompts = Dataset.from_dict({"prompt": PROMPTS[:2], **own})
    few: dict[str, Any] = {"n": 1, "max_completion_length": 2}
    scores = evaluate.score({"SFT": zoo["full"]}, prompts, {"mine": lambda p, c, gold, **_: map(len, gold)}, **few)
    assert scores["model"].tolist() == ["SFT"] * 2 and scores["mine"].tolist() == [5, 4]
    assert not {"kl", "gold", "seed"} & {*scores} and scores["model_dataset"].tolist() == ["x", "y"]
    assert scores["gold_dataset"].tolist() == ["Paris", "Rome"] and scores["mine_dataset"].tolist() == [1, 2]
    evaluate.summary(scores)
