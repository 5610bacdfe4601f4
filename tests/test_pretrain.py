"""Pretraining from scratch: it learns, it is deterministic, it saves whole directories, it refuses nonsense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from rlhf_kit import train
from rlhf_kit.models.tokenizer import CHAT_TEMPLATE

TEXTS = ["the cat sat on the mat .", "the dog sat on the log , and slept ."] * 8


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train.train_tokenizer(TEXTS, vocab_size=280)


def run(bpe: PreTrainedTokenizerFast, out: Path, texts: list[str] = TEXTS, length: int = 64, **changes: Any) -> str:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=changes.pop("vocab", len(bpe)), max_position_embeddings=length, **sizes)
    few = {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    return train.pretrain(texts, bpe, config, out, callbacks=[], **(few | changes))


def test_a_trained_tokenizer_round_trips_and_has_distinct_special_tokens(bpe: PreTrainedTokenizerFast) -> None:
    assert len(bpe) <= 280 and bpe.pad_token_id != bpe.eos_token_id and bpe.chat_template == CHAT_TEMPLATE
    for text in [*TEXTS[:2], "Ünseen 🦉 text\n\n  here"]:
        assert bpe.decode(bpe(text).input_ids) == text
    assert len(bpe(TEXTS[0]).input_ids) < len(TEXTS[0])
    with pytest.raises(ValueError, match="at least 258"):
        train.train_tokenizer(TEXTS, vocab_size=100)


def test_the_loss_falls_and_the_directory_is_complete(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    out = run(bpe, tmp_path / "deep" / "model")
    losses = train.history(out)["loss"]
    assert len(losses) == 30 and losses.iloc[-1] < 0.5 * losses[0]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"], "temporary files are left"
    model, reloaded = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == reloaded.eos_token_id
    assert model.generation_config.pad_token_id == reloaded.pad_token_id


def test_the_loss_is_the_mean_over_every_text_and_its_eos_but_no_padding(
    bpe: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Nats per token by hand, with learning rate zero; a text that is too long goes on in further rows."""
    texts = [" cat" * 20, "the dog .", "a"]
    out = run(bpe, tmp_path / "model", texts, length=16, max_steps=1, learning_rate=0.0, per_device_train_batch_size=9)
    model, nll, whole = AutoModelForCausalLM.from_pretrained(out), [], []
    for text in texts:
        ids = [*bpe(text).input_ids, bpe.eos_token_id]
        for row in (ids[start : start + 16] for start in range(0, len(ids), 16)):
            with torch.no_grad():
                logits = model(torch.tensor([row])).logits[0]
            nll += (-logits.log_softmax(-1)[range(len(row) - 1), row[1:]]).tolist()
            whole += row
    assert len(whole) > 2 * 16 and train.history(out)["loss"][0] == pytest.approx(sum(nll) / len(nll), rel=1e-4)


def test_the_same_arguments_give_the_same_weights(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    paths = [run(bpe, tmp_path / name, max_steps=3, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    first, second, other = (load_file(f"{path}/model.safetensors") for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_nonsense_is_refused_and_nothing_is_overwritten(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(FileExistsError, match="is there already"):
            run(bpe, out)
    with pytest.raises(ValueError, match="at least one"):
        run(bpe, tmp_path / "model", [])
    with pytest.raises(ValueError, match="vocab_size=7"):
        run(bpe, tmp_path / "model", vocab=7)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["years of work"]
