"""Every family of models that the kit names goes through SFT, reward model, PPO and DPO."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from test_brought import CHATS, FEW, TURNS, chat_of
from test_train import PREFERENCES
from tiny import special
from transformers import PreTrainedTokenizerBase

from rlhf_kit import models, train
from rlhf_kit.models import ModelError
from rlhf_kit.ppo import PPOConfig, PPOTrainer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", GROUPED),
    "Qwen2": ("Qwen2Config", GROUPED),
    "Qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "Gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 8}),
    "Mistral": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "Phi3": ("Phi3Config", GROUPED),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "OPT": ("OPTConfig", {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    "GPT-NeoX": ("GPTNeoXConfig", SIZES),
    "Cohere": ("CohereConfig", {**GROUPED, "logit_scale": 0.25}),
    "Granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0}),
}
# Each family meets every way to train, texts and chats; each way meets both.
RANK: dict[str, Any] = {"lora": {"r": 2}}
WAYS = {"full": {}, "lora": {**RANK, "dtype": "bfloat16"}, "4bit": {**RANK, "load_in_4bit": True}}
MATRIX = [(name, (i + j) % 2 == 1, way) for i, name in enumerate(FAMILIES) for j, way in enumerate(WAYS)]


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A rule as reward."""
    return [float(sum(str(completion).count(vowel) for vowel in "aeiou")) for completion in completions]


@pytest.mark.slow
@pytest.mark.filterwarnings("error:`gradient_checkpointing` is deprecated")
@pytest.mark.parametrize(("family", "chat", "way"), MATRIX)
def test_a_family_goes_through_every_stage(
    family: str, chat: bool, way: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Scores are compared with the reloaded reward model's, and TRL's tokens with ours, in every training."""
    own = chat_of(tokenizer, TURNS)
    config, shape = FAMILIES[family]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**shape, **special(own), max_position_embeddings=128)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "base")
    own.save_pretrained(tmp_path / "base")
    pairs = CHATS if chat else PREFERENCES
    rows = Dataset.from_dict({"prompt": pairs["prompt"][:], "completion": pairs["chosen"][:]})
    how, few = WAYS[way], {**FEW, "max_length": 120}
    sft = train.sft(tmp_path / "base", rows, tmp_path / "sft", **how, **few | {"learning_rate": 1e-2, "max_steps": 10})
    [ids] = models.encode(own, rows["prompt"][:1], rows["completion"][:1])
    end = ids.index(own.convert_tokens_to_ids("<|over|>") if chat else own.eos_token_id, len(ids) - 2)
    same = {name: how.get(name) for name in models.LOADING}
    before, after = (models.load_causal(each, **same) for each in (tmp_path / "base", sft))
    learned = [models.next_logprobs(each, [ids[:end]], [ids[end]]).item() for each in (before, after)]
    assert learned[1] > learned[0] + 0.01  # nats: the frozen heads of adapters are small
    model = models.load_causal(sft, trainable=True)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert (torch.bfloat16 in {weight.dtype for weight in model.parameters()}) == (way == "lora")
    if family in ("Cohere", "Granite"):
        with pytest.raises(ModelError, match="has no SequenceClassification of this family"):
            train.reward_model(sft, pairs, tmp_path / "reward", **few)
        reward: Any = vowels
    else:
        reward = train.reward_model(sft, pairs, tmp_path / "reward", **few)
    train.dpo(sft, pairs, tmp_path / "dpo", **few)
    sizes = {"max_steps": 2, "per_device_train_batch_size": 8, "max_completion_length": 8, "ppo_epochs": 2}
    args = PPOConfig(output_dir=str(tmp_path / "x"), use_cpu=True, learning_rate=1e-3, **sizes)
    trainer = PPOTrainer(sft, reward, args, rows.select_columns(["prompt"]), callbacks=[])
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["first_ratio_deviation"] for row in logged] == [0.0, 0.0] and logged[0]["kl"] == 0.0 != logged[1]["kl"]
    trainer.save_model(str(tmp_path / "ppo"))
    saved, read = models.load_causal(tmp_path / "ppo"), models.load_tokenizer(tmp_path / "ppo")
    tokens = models.encode_pairs(read, pairs["prompt"][:], pairs["chosen"][:])
    policies = saved, trainer.roles.eval().use("policy")
    assert torch.allclose(
        *(models.completion_logprobs(each, tokens)[0] for each in policies), atol=1e-3 if way == "4bit" else 1e-5
    )
    if chat:
        assert read.convert_tokens_to_ids("<|over|>") in models.stop_ids(saved, read)
