"""Methods that learn from a dataset of texts: supervised fine-tuning, DPO and KTO."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from rlhf_kit.models import ModelPath, load_causal
from rlhf_kit.train.stage import exact_start, fit, policy_start, prepare, publish, watched


def sft(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Fine-tune on demonstrations (`prompt, completion`): cross-entropy on the completion's tokens only."""
    fit_demonstrations("SFT", model, dataset, out, lora, load_in_4bit, seed, callbacks, settings)
    return publish(out)


def fit_demonstrations(
    label: str,
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: LoraConfig | None,
    load_in_4bit: bool | None,
    seed: int,
    callbacks: list[TrainerCallback] | None,
    settings: dict[str, Any],
) -> None:
    """Supervised fine-tuning, written beside `out` but not yet published."""
    tokenizer, args = prepare(model, out, SFTConfig, lora, seed, settings)
    start = load_causal(model, load_in_4bit, trainable=lora is None)
    exact = exact_start(start)
    trainer = SFTTrainer(
        model=start,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=deepcopy(lora),  # peft writes the modules that it finds into it
        callbacks=watched(label, callbacks),
    )
    fit(trainer, out, exact)


def dpo(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290, eq. 7) against a frozen copy of `model`."""
    tokenizer, args = prepare(model, out, DPOConfig, lora, seed, settings)
    start = policy_start(model, lora, load_in_4bit)
    exact = exact_start(start)
    trainer = DPOTrainer(
        model=start,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=deepcopy(lora),
        callbacks=watched("DPO", callbacks),
    )
    fit(trainer, out, exact)
    return publish(out)


def kto(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306, section 4.1) against a frozen copy of `model`.

    Learns from single completions that are wanted or not (`prompt, completion, label`, label a bool), shuffled once by
    the seed: a batch's KL is estimated from its own completions under each other's prompts. Raises ValueError where
    the labels are of one kind.
    """
    kinds = sorted({repr(label) for label in dataset["label"][:]}) if "label" in dataset.column_names else []
    if kinds != ["False", "True"]:
        raise ValueError(
            f"kto: the column `label` must hold both True (wanted) and False (not wanted), for from one kind alone "
            f"nothing is learned; here it holds {', '.join(kinds[:4]) or 'nothing'}"
        )
    tokenizer, args = prepare(model, out, KTOConfig, lora, seed, settings)
    start = policy_start(model, lora, load_in_4bit)
    exact = exact_start(start)
    trainer = KTOTrainer(
        model=start,
        args=args,
        train_dataset=dataset.shuffle(seed=seed),
        processing_class=tokenizer,
        peft_config=deepcopy(lora),
        callbacks=watched("KTO", callbacks),
    )
    fit(trainer, out, exact)
    return publish(out)
