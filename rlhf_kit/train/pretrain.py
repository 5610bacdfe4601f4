"""Pretraining of small causal language models from scratch, so that the mechanics of RLHF run on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from rlhf_kit.files import replacing
from rlhf_kit.models import ModelPath
from rlhf_kit.models.rendering import CHAT_TEMPLATE, wrap
from rlhf_kit.progress import ProgressCallback
from rlhf_kit.train.common import arguments, fit, refuse_existing

DEFAULTS: dict[str, Any] = {
    "max_steps": 2000,
    "per_device_train_batch_size": 64,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # share of the steps
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts, with the kit's special tokens (pad is not EOS) and chat template.

    It has at most `vocab_size` entries, 256 bytes and 2 special tokens among them; ValueError if that is fewer.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and 2 special tokens need at least 258.")
    tokenizer = wrap(Tokenizer(BPE())).train_new_from_iterator(texts, vocab_size, show_progress=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pretrain(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    config: LlamaConfig,
    out: ModelPath,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Train a Llama from random weights on texts by cross-entropy (nats per token); `settings` as TrainingArguments.

    Every text is followed by EOS. A text longer than `config.max_position_embeddings` goes on in a further row. Raises
    ValueError if there is no text or the vocabularies of config and tokenizer differ.
    """
    if not texts:
        raise ValueError("pretrain: there are no texts; give at least one")
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"config.vocab_size={config.vocab_size}, but the tokenizer has {len(tokenizer)} entries.")
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    refuse_existing(out)
    with replacing(out) as folder:
        args = arguments(TrainingArguments, folder, seed, DEFAULTS | settings)
        set_seed(seed)
        model = LlamaForCausalLM(config)
        special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model.generation_config = GenerationConfig(**special, do_sample=True)
        rows = _rows(texts, tokenizer, config.max_position_embeddings)
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            processing_class=tokenizer,
            data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads labels with -100, which the loss leaves out
            callbacks=[ProgressCallback("pretraining")] if callbacks is None else callbacks,
        )
        fit(trainer, folder)
    return str(out)


def _rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """Token ids of each text with EOS, in pieces of at most `max_length`; one token alone predicts nothing."""
    ended = [f"{text}{tokenizer.eos_token}" for text in texts]
    pieces = tokenizer(ended, truncation=True, max_length=max_length, return_overflowing_tokens=True)["input_ids"]
    return [ids for ids in pieces if len(ids) > 1]
