"""What every stage does: settings and refusals before it, training, and a directory that is whole after it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from rlhf_kit.models import Model, ModelError, ModelPath, is_adapter, load_causal, load_tokenizer, write_notes
from rlhf_kit.progress import ProgressCallback


def prepare(
    model: ModelPath, out: ModelPath, config: type[Any], lora: LoraConfig | None, seed: int, settings: dict[str, Any]
) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer for training and TRL's config with this kit's defaults.

    Raises FileExistsError where `out` would be overwritten, ModelError where an adapter would be put on an adapter.
    """
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
    shutil.rmtree(partial(out), ignore_errors=True)  # left by an attempt that was killed
    return tokenizer, config(output_dir=str(partial(out)), **{**defaults, **settings})


def watched(label: str, callbacks: list[TrainerCallback] | None) -> list[TrainerCallback]:
    """The callbacks given, or a line of progress."""
    return [ProgressCallback(label)] if callbacks is None else callbacks


def policy_start(model: ModelPath, lora: LoraConfig | None, load_in_4bit: bool | None) -> Model | str:
    """What TRL gets where it makes the reference itself, so that this is `model` as it was.

    Full weights go in as a path: TRL loads the reference from it again. An adapter goes in loaded: TRL clones it as the
    reference, for with the adapter merely switched off the reference would be the raw base, not the SFT model.
    """
    as_path = lora is None and not is_adapter(model) and not load_in_4bit
    return str(model) if as_path else load_causal(model, load_in_4bit, trainable=lora is None)


def exact_start(model: Model | str) -> dict[str, torch.Tensor]:
    """What is to be trained over a 4-bit base, by name, before TRL rounds it to bf16 (the policy off its reference)."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return {}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]


def fit(trainer: Trainer, out: ModelPath, exact: dict[str, torch.Tensor]) -> None:
    """Train, and write beside `out`."""
    trainer.remove_callback(PrinterCallback)
    quantised = bool(getattr(trainer.model, "is_loaded_in_4bit", False))
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            # In fp32 small updates are not rounded away.
            parameter.data = exact.get(name, parameter.data).float()
    trainer.train()
    directory = partial(out)
    if isinstance(trainer.model, PeftModel):
        trainer.model.save_pretrained(directory, selected_adapters=["default"])  # not the reference's clone
    else:
        trainer.model.save_pretrained(directory)
    trainer.processing_class.save_pretrained(directory)
    trainer.save_state()
    write_notes(directory, load_in_4bit=quantised)


def publish(out: ModelPath) -> str:
    """Give what was written its final name: a directory under that name is always whole."""
    if Path(out).exists():
        Path(out).rmdir()
    partial(out).replace(out)
    return str(out)


def partial(out: ModelPath) -> Path:
    """Where a model lies while it is being written."""
    return Path(f"{out}.partial")


def history(model: ModelPath) -> pd.DataFrame:
    """What a trained model's trainer logged: a row per logging step, `step` first."""
    state = pd.read_json(Path(model) / "trainer_state.json", typ="series")
    rows = pd.DataFrame([row for row in state["log_history"] if "loss" in row])
    return rows[["step", *(column for column in rows.columns if column != "step")]]
