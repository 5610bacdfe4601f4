"""Supervised fine-tuning, reward modelling and DPO: thin over TRL's trainers; every contact with TRL is in this file.

Each function takes a model directory or hub id and a dataset in TRL's columns, writes a model directory and returns its
path. Settings not named here go to TRL's config by its own names (`max_steps`, `learning_rate`, `max_length`, ...).
"""

from __future__ import annotations

import gc
import os
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

# TRL reports every trainer to the hub unless told otherwise; a research kit should not.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer  # noqa: E402

from rlhf_kit.models import (  # noqa: E402
    Model,
    ModelError,
    ModelPath,
    hidden_size,
    is_adapter,
    load_base,
    load_causal,
    load_tokenizer,
    write_notes,
)
from rlhf_kit.progress import ProgressCallback  # noqa: E402
from rlhf_kit.rewards import normalise  # noqa: E402


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
    tokenizer, args = _prepare(model, out, SFTConfig, lora, seed, settings)
    start = load_causal(model, load_in_4bit, trainable=lora is None)
    exact = _exact(start)
    trainer = SFTTrainer(
        model=start,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=deepcopy(lora),  # peft writes the modules that it finds into it
        callbacks=_callbacks("SFT", callbacks),
    )
    _train(trainer, out, exact)
    return _publish(out)


def reward_model(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Fit a reward to `prompt, chosen, rejected` by -log sigmoid(r_chosen - r_rejected) (2203.02155, eq. 1).

    Starts from the SFT model with a fresh head; the result is shifted and scaled to mean 0 and variance 1 over the
    dataset's completions, so these should be the SFT model's own.
    """
    tokenizer, args = _prepare(model, out, RewardConfig, lora, seed, settings)
    start = _with_score_head(model, lora, load_in_4bit, tokenizer, seed)
    exact = _exact(start)
    trainer = RewardTrainer(
        model=start,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=_callbacks("reward model", callbacks),
    )
    _train(trainer, out, exact)
    # What was written is loaded once more to be normalised: without this, weights would be held twice.
    del trainer, start, exact
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    normalise(_partial(out), 2 * dataset["prompt"][:], dataset["chosen"][:] + dataset["rejected"][:])
    return _publish(out)


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
    tokenizer, args = _prepare(model, out, DPOConfig, lora, seed, settings)
    # Full weights go in as a path: TRL loads the reference from it again. An adapter goes in loaded: TRL clones it as
    # the reference, for with the adapter merely switched off the reference would be the raw base, not the SFT model.
    as_path = lora is None and not is_adapter(model) and not load_in_4bit
    start = str(model) if as_path else load_causal(model, load_in_4bit, trainable=lora is None)
    exact = _exact(start)
    trainer = DPOTrainer(
        model=start,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=deepcopy(lora),
        callbacks=_callbacks("DPO", callbacks),
    )
    _train(trainer, out, exact)
    return _publish(out)


def history(model: ModelPath) -> pd.DataFrame:
    """What a trained model's trainer logged: a row per logging step, `step` first."""
    state = pd.read_json(Path(model) / "trainer_state.json", typ="series")
    rows = pd.DataFrame([row for row in state["log_history"] if "loss" in row])
    return rows[["step", *(column for column in rows.columns if column != "step")]]


def _prepare(
    model: ModelPath, out: ModelPath, config: type[Any], lora: LoraConfig | None, seed: int, settings: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer for training and TRL's config with this kit's defaults; refuses to overwrite a directory."""
    if Path(out).exists() and any(Path(out).iterdir()):
        raise FileExistsError(
            f"{out}: is there already; a trained model is never overwritten, so name another `out` or delete it"
        )
    if is_adapter(model) and lora is not None:
        raise ModelError(f"{model}: is an adapter already, and is trained on as it is; leave `lora` out")
    tokenizer = load_tokenizer(model)
    tokenizer.padding_side = "right"
    on_gpu = torch.cuda.is_available()
    defaults: dict[str, Any] = {
        "seed": seed,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    shutil.rmtree(_partial(out), ignore_errors=True)  # left by an attempt that was killed
    return tokenizer, config(output_dir=str(_partial(out)), **{**defaults, **settings})


def _callbacks(label: str, callbacks: list[TrainerCallback] | None) -> list[TrainerCallback]:
    return [ProgressCallback(label)] if callbacks is None else callbacks


def _with_score_head(
    model: ModelPath, lora: LoraConfig | None, load_in_4bit: bool | None, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Model:
    """The model with a fresh score head, N(0, 1 / (d + 1)) as in Stiennon et al. 2020 (2009.01325), to train."""
    base = load_base(model, AutoModelForSequenceClassification.from_pretrained, load_in_4bit, num_labels=1)
    base.config.pad_token_id = tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(base.score.weight.shape, generator=generator) / (hidden_size(base) + 1) ** 0.5
    base.score.weight.data.copy_(head)
    if lora is None and not is_adapter(model):
        if getattr(base, "is_loaded_in_4bit", False):
            raise ModelError(
                f"{model}: 4-bit weights cannot be trained; pass `lora=rlhf_kit.models.lora()` to train an adapter"
            )
        return base
    start = None
    if is_adapter(model):
        start = load_causal(model, load_in_4bit)
        lora = start.peft_config["default"]
    fields = {"r", "lora_alpha", "lora_dropout", "target_modules", "bias", "use_rslora", "use_dora"}
    same = {name: getattr(lora, name) for name in fields}
    wrapped = get_peft_model(base, LoraConfig(**same, task_type="SEQ_CLS", modules_to_save=["score"]))
    if start is not None:
        score = {"base_model.model.score.weight": head}
        set_peft_model_state_dict(wrapped, get_peft_model_state_dict(start) | score)
    return wrapped


def _exact(model: Model | str) -> dict[str, torch.Tensor]:
    """What is to be trained over a 4-bit base, by name, before TRL rounds it to bf16 (DPO's policy off its start)."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return {}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]


def _train(trainer: Trainer, out: ModelPath, exact: dict[str, torch.Tensor]) -> None:
    """Train, and write beside `out`."""
    trainer.remove_callback(PrinterCallback)
    quantised = bool(getattr(trainer.model, "is_loaded_in_4bit", False))
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            # In fp32 small updates are not rounded away.
            parameter.data = exact.get(name, parameter.data).float()
    trainer.train()
    partial = _partial(out)
    if isinstance(trainer.model, PeftModel):
        trainer.model.save_pretrained(partial, selected_adapters=["default"])  # not DPO's clone of the reference
    else:
        trainer.model.save_pretrained(partial)
    trainer.processing_class.save_pretrained(partial)
    trainer.save_state()
    write_notes(partial, load_in_4bit=quantised)


def _publish(out: ModelPath) -> str:
    """Give what was written its final name: a directory under that name is always whole."""
    if Path(out).exists():
        Path(out).rmdir()
    _partial(out).replace(out)
    return str(out)


def _partial(out: ModelPath) -> Path:
    """Where a model lies while it is being written."""
    return Path(f"{out}.partial")
