"""What every function of this room does: refuse before it trains, train in fp32, and publish only a whole directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback

from rlhf_kit import models
from rlhf_kit.models import Lora, Model, ModelPath
from rlhf_kit.progress import ProgressCallback


@dataclass
class Request:
    """The arguments that all functions share; `label` names the run in its progress, `settings` go to the config."""

    label: str
    model: ModelPath
    out: ModelPath
    lora: Lora | None
    load_in_4bit: bool | None
    seed: int
    callbacks: list[TrainerCallback] | None
    settings: dict[str, Any]


def refuse_existing(out: ModelPath) -> None:
    """FileExistsError if `out` holds anything already."""
    if Path(out).is_file() or (Path(out).is_dir() and any(Path(out).iterdir())):
        raise FileExistsError(
            f"{out}: is there already; a trained model is never overwritten, so name another `out` or delete it"
        )


def arguments(config: type[Any], folder: Path, seed: int, settings: dict[str, Any]) -> Any:
    """A trainer's config with this kit's defaults, `settings` taking precedence."""
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
    return config(output_dir=str(folder), **(defaults | settings))


def prepare(request: Request, config: type[Any], folder: Path, **defaults: Any) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer and TRL's config; FileExistsError if `out` is taken, ModelError for an adapter on an adapter."""
    refuse_existing(request.out)
    if models.is_adapter(request.model) and request.lora is not None:
        raise models.ModelError(f"{request.model}: is an adapter already, and is trained on as it is; leave `lora` out")
    tokenizer = models.load_tokenizer(request.model)
    tokenizer.padding_side = "right"
    return tokenizer, arguments(config, folder, request.seed, defaults | request.settings)


def load_trainable(request: Request) -> Model:
    """The model, to train whole or by its adapter; with `lora` it is frozen, because a new adapter is trained."""
    return models.load_causal(request.model, request.load_in_4bit, trainable=request.lora is None)


def make_trainer(
    trainer_class: type[Trainer],
    request: Request,
    args: Any,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    start: Model | None = None,
    **more: Any,
) -> Trainer:
    """One of TRL's trainers, with what it trains in fp32: in bf16 small updates would be rounded away.

    Without a `start`, TRL makes the reference, which must be `request.model` as it was. Full weights go in as a path:
    TRL loads the reference from it again. An adapter goes in loaded: TRL clones it as the reference. If TRL only
    switched the adapter off, the reference would be the raw base, not the SFT model.
    """
    as_path = request.lora is None and not models.is_adapter(request.model) and not request.load_in_4bit
    given: Any = start or (str(request.model) if as_path else load_trainable(request))
    exact = {}
    if getattr(given, "is_loaded_in_4bit", False):  # TRL rounds what it trains to bf16, so it would leave its reference
        exact = {name: p.detach().clone() for name, p in given.named_parameters() if p.requires_grad}
    callbacks = [ProgressCallback(request.label)] if request.callbacks is None else request.callbacks
    common = {"args": args, "train_dataset": dataset, "processing_class": tokenizer, "callbacks": callbacks}
    trainer = trainer_class(model=given, **common, **more)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = exact.get(name, parameter.data).float()
    return trainer


def fit(trainer: Trainer, folder: Path) -> None:
    """Train, and write the model, its tokenizer and its history to `folder`."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    # With adapters, TRL leaves the reference's clone in the model: only the trained adapter is written.
    trained = {"selected_adapters": ["default"]} if isinstance(trainer.model, PeftModel) else {}
    trainer.model.save_pretrained(folder, **trained)
    trainer.processing_class.save_pretrained(folder)
    trainer.save_state()
    models.write_notes(folder, load_in_4bit=bool(getattr(trainer.model, "is_loaded_in_4bit", False)))


def history(model: ModelPath) -> pd.DataFrame:
    """What a trained model's trainer logged: a row per logging step, `step` first."""
    state = pd.read_json(Path(model) / "trainer_state.json", typ="series")
    rows = pd.DataFrame([row for row in state["log_history"] if "loss" in row])
    return rows[["step", *(column for column in rows.columns if column != "step")]]
