"""Pretraining from scratch: it learns, it is deterministic, it saves whole directories, it refuses nonsense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf_kit import models, train
from rlhf_kit.train.pretrain import _rows

TEXTS = ["the cat sat on the mat .", "the dog sat on the log , and slept ."] * 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train.train_tokenizer(TEXTS, vocab_size=280)


def config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**{"vocab_size": len(tokenizer), "max_position_embeddings": 64, **sizes, **changes})


def run(tokenizer: PreTrainedTokenizerFast, out: Path, **changes: Any) -> str:
    few = {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return train.pretrain(TEXTS, tokenizer, config(tokenizer), out, callbacks=[], **few | changes)


def test_a_trained_tokenizer_round_trips_and_has_distinct_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) <= 280 and tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in [*TEXTS[:2], "Ünseen 🦉 text\n\n  here"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(TEXTS[0]).input_ids) < len(TEXTS[0])
    with pytest.raises(ValueError, match="at least 258"):
        train.train_tokenizer(TEXTS, vocab_size=100)


def test_it_learns_the_same_from_the_same_seed_and_leaves_a_whole_directory(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    outs = [run(tokenizer, tmp_path / "deep" / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a", "b", "c"], "temporary files are left"
    losses = train.history(outs[0])["loss"]
    assert len(losses) == 30 and losses.iloc[-1] < 0.5 * losses.iloc[0]
    one, same, other = (load_file(f"{out}/model.safetensors") for out in outs)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)
    model, reloaded = AutoModelForCausalLM.from_pretrained(outs[0]), models.load_tokenizer(outs[0])
    assert model.config.eos_token_id == model.generation_config.eos_token_id == reloaded.eos_token_id
    assert model.generation_config.pad_token_id == reloaded.pad_token_id
    assert reloaded.chat_template == tokenizer.chat_template


def test_long_texts_go_on_in_further_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [*tokenizer(TEXTS[0] * 5).input_ids, tokenizer.eos_token_id]
    rows = _rows([TEXTS[0] * 5], tokenizer, max_length=16)
    assert all(len(row) <= 16 for row in rows) and len(rows) > 2
    assert [token for row in rows for token in row] == ids[: sum(map(len, rows))] and len(ids) - sum(map(len, rows)) < 2


def test_what_makes_no_model_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        train.pretrain([], tokenizer, config(tokenizer), tmp_path / "model")
    with pytest.raises(ValueError, match="vocab_size=7"):
        train.pretrain(TEXTS, tokenizer, config(tokenizer, vocab_size=7), tmp_path / "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="never overwritten"):
        run(tokenizer, tmp_path / "notes", max_steps=1)
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"
