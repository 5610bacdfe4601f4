"""Pretraining from scratch: it learns, it is deterministic, it saves whole directories, it refuses nonsense."""

import pytest
import torch
from rlhf_kit.pretrain import _rows, pretrain, train_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

torch.set_num_threads(1)
TEXTS = ["the cat sat on the mat .", "the dog sat on the log , and slept ."] * 8


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=280)


def config(tokenizer, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaConfig(**{"vocab_size": len(tokenizer), "max_position_embeddings": 64, **sizes, **changes})


def run(tokenizer, out, **changes):
    arguments = {"steps": 30, "batch_size": 4, "learning_rate": 1e-2, "seed": 0} | changes
    return pretrain(TEXTS, tokenizer, config(tokenizer), out, **arguments)


def test_trained_tokenizer_round_trips_and_has_distinct_special_tokens(tokenizer):
    assert len(tokenizer) <= 280
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in [*TEXTS[:2], "Ünseen 🦉 text\n\n  here"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(TEXTS[0]).input_ids) < len(TEXTS[0])
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(TEXTS, vocab_size=100)


def test_the_loss_falls_and_the_directory_is_complete(tokenizer, tmp_path):
    losses = []
    out = run(tokenizer, tmp_path / "deep" / "model", on_progress=lambda step, steps, loss: losses.append(loss))
    assert len(losses) == 30 and losses[-1] < 0.5 * losses[0]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"], "temporary files are left"
    model, reloaded = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == reloaded.eos_token_id
    assert model.generation_config.pad_token_id == reloaded.pad_token_id
    assert reloaded.chat_template == tokenizer.chat_template


def test_the_same_arguments_give_the_same_weights(tokenizer, tmp_path):
    first, second, other = (run(tokenizer, tmp_path / n, steps=5, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    weights = [load_file(f"{path}/model.safetensors") for path in (first, second, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_a_model_is_replaced_and_anything_else_is_not(tokenizer, tmp_path):
    run(tokenizer, tmp_path / "model", steps=1)
    run(tokenizer, tmp_path / "model", steps=1, seed=1)
    precious = tmp_path / "notes"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="nothing was overwritten"):
        run(tokenizer, precious, steps=1)
    with pytest.raises(FileExistsError, match="is a file"):
        run(tokenizer, precious / "thesis.txt", steps=1)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_long_texts_go_on_in_further_rows(tokenizer):
    ids = tokenizer(TEXTS[0] * 5).input_ids + [tokenizer.eos_token_id]
    rows = _rows([TEXTS[0] * 5, ""], tokenizer, max_length=16)
    assert all(len(row) <= 16 for row in rows)
    assert [token for row in rows[:-1] for token in row] == ids[: 16 * (len(rows) - 1)]
    assert rows[-1] == [tokenizer.eos_token_id], "an empty text is its EOS"


@pytest.mark.parametrize("changes", [{"steps": 0}, {"batch_size": -1}])
def test_impossible_numbers_are_refused(tokenizer, tmp_path, changes):
    with pytest.raises(ValueError, match="at least 1"):
        run(tokenizer, tmp_path / "model", **changes)


def test_no_text_and_a_wrong_vocabulary_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="at least one text"):
        pretrain([], tokenizer, config(tokenizer), tmp_path / "model")
    with pytest.raises(ValueError, match="vocab_size=7"):
        pretrain(TEXTS, tokenizer, config(tokenizer, vocab_size=7), tmp_path / "model")
