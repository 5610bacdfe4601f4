"""Methods that learn from a dataset of texts: supervised fine-tuning, DPO and KTO."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from pandas import DataFrame
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from rlhf_kit.files import replacing
from rlhf_kit.models import Lora, ModelPath, lora_config
from rlhf_kit.train.common import Request, fit, load_trainable, make_trainer, prepare

SAMPLES = "samples.parquet"


def sft(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Fine-tune on demonstrations (`prompt, completion`): cross-entropy on the completion's tokens only."""
    request = Request("SFT", model, out, lora, load_in_4bit, seed, callbacks, settings)
    return fit_texts(SFTTrainer, SFTConfig, request, dataset)


def dpo(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290, eq. 7) against a frozen copy of `model`."""
    request = Request("DPO", model, out, lora, load_in_4bit, seed, callbacks, settings)
    return fit_texts(DPOTrainer, DPOConfig, request, dataset)


def kto(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306, section 4.1) against a frozen copy of `model`.

    Learns from single completions that are wanted or not (`prompt, completion, label`; `label` is a bool). The rows are
    shuffled once by the seed, because a batch's KL is estimated from its own completions under each other's prompts.
    Raises ValueError if the labels are not of both kinds.
    """
    kinds = sorted({repr(label) for label in dataset["label"][:]}) if "label" in dataset.column_names else []
    if kinds != ["False", "True"]:
        raise ValueError(
            "kto: the column `label` must hold both True (wanted) and False (not wanted), because nothing is learned "
            f"from one kind alone; here it holds {', '.join(kinds[:4]) or 'nothing'}"
        )
    request = Request("KTO", model, out, lora, load_in_4bit, seed, callbacks, settings)
    return fit_texts(KTOTrainer, KTOConfig, request, dataset.shuffle(seed=seed))


def fit_texts(
    trainer_class: type[Any], config: type[Any], request: Request, dataset: Dataset, samples: DataFrame | None = None
) -> str:
    """Train by one of TRL's trainers; `samples` are written beside the weights."""
    with replacing(request.out) as folder:
        tokenizer, args = prepare(request, config, folder)
        start = load_trainable(request) if config is SFTConfig else None  # SFT has no reference
        adapter = lora_config(request.lora)
        fit(make_trainer(trainer_class, request, args, tokenizer, dataset, start, peft_config=adapter), folder)
        if samples is not None:
            samples.to_parquet(folder / SAMPLES)
    return str(request.out)
