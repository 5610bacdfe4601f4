"""What the methods share: refuse before training, train in fp32, publish only a whole directory."""

import gc
from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState

from rlhf_kit import data, models
from rlhf_kit.files import replacing
from rlhf_kit.models import Lora, Model, ModelPath
from rlhf_kit.ppo.config import check_settings
from rlhf_kit.progress import ProgressCallback


def new_directory(out: ModelPath) -> AbstractContextManager[Path]:
    """A temporary name that becomes `out` at the end of the block; FileExistsError if `out` holds anything already."""
    if Path(out).is_file() or any(Path(out).glob("*")):
        raise FileExistsError(f"{out}: is there already, and is not overwritten; name another `out` or delete it")
    return replacing(out)


CHECKED = 16  # rows whose tokens, and whose scores, are compared once
DEFAULTS: dict[str, Any] = {"seed": 0, "save_strategy": "no", "logging_steps": 10}
DEFAULTS |= {"disable_tqdm": True, "log_level": "error", "logging_nan_inf_filter": False}  # or NaN would look harmless


class Training:
    """One use of a trainer; its options are checked before any weights are loaded."""

    def __init__(
        self,
        label: str,
        config_class: type[Any],
        model: ModelPath,
        folder: Path,
        lora: Lora | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.lora = model, lora
        self.loading = {name: settings.pop(name, None) for name in models.LOADING}
        check_settings(settings, get_type_hints(config_class), label, config_class)
        models.check_trainable(model, lora, **self.loading)
        if lora is None and not models.is_adapter(model):
            self.loading["dtype"] = "float32"
        self.callbacks = [ProgressCallback(label)] if callbacks is None else callbacks
        self.tokenizer = models.load_tokenizer(model)
        self.tokenizer.padding_side = "right"
        on_gpu = torch.cuda.is_available()
        settings.setdefault("activation_checkpointing", settings.pop("gradient_checkpointing", False))  # its older name
        settings = DEFAULTS | {"bf16": on_gpu, "use_cpu": not on_gpu} | settings
        self.args = config_class(output_dir=str(folder), **settings)
        models.check_one_device(self.args)

    def trainer(self, trainer_class: type[Trainer], dataset: Dataset, start: Model | None = None, **more: Any) -> Any:
        """The trainer, with what it trains in fp32: in bf16 small updates would be rounded away.

        The reference of the methods that have one must be `self.model` as it was, not the raw base. Full weights go in
        as a path: TRL loads the reference from it again. An adapter goes in loaded: TRL clones it as the reference.
        """
        given: Any = str(self.model)
        adapter = self.lora is not None or models.is_adapter(self.model)
        if adapter or not hasattr(self.args, "beta"):  # beta is the weight of a reference
            given = start or models.load_causal(self.model, trainable=self.lora is None, **self.loading)
        else:
            how = {"trust_remote_code": False, "attn_implementation": self.loading["attn_implementation"]}
            self.args.model_init_kwargs = (self.args.model_init_kwargs or {}) | how
        exact = {}
        if getattr(given, "is_loaded_in_4bit", False):  # TRL rounds what it trains to bf16, unlike its reference
            exact = {name: p.detach().clone() for name, p in given.named_parameters() if p.requires_grad}
        if self.lora is not None and not isinstance(given, PeftModel):
            more["peft_config"] = models.lora_config(self.lora)
        common = {"args": self.args, "processing_class": self.tokenizer, "callbacks": [*self.callbacks, OnlyFinite()]}
        trainer = trainer_class(model=given, train_dataset=dataset, **common, **more)
        self._check_tokens(trainer, dataset)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = exact.get(name, parameter.data).float()
        return trainer

    def ready(self, dataset: Dataset, *columns: str) -> Dataset:
        """The rows as this trainer and the rest of the kit will render them (see `data.ready`), in these columns alone.

        TRL would take a further column `text`, `images` or `input_ids` for its own.
        """
        limits = [getattr(self.args, "max_length", None), models.max_length(self.model)]
        rows = data.ready(dataset, self.tokenizer, columns, min((each for each in limits if each), default=None))
        return rows.select_columns([name for name in rows.column_names if name in (*columns, "item")])

    def _check_tokens(self, trainer: Any, dataset: Dataset) -> None:
        """ModelError where TRL has tokenised a row otherwise than this kit samples and scores it."""
        for given, row in zip(dataset, islice(trainer.train_dataset, CHECKED), strict=False):
            for column in {"completion", "chosen", "rejected"} & set(given):
                found = row.get("prompt_ids", []) + row.get(f"{column}_ids", row.get("input_ids", []))
                expected = models.encode(self.tokenizer, [given["prompt"]], [given[column]])[0]
                if found and not getattr(self.args, "packing", False) and found != expected:
                    raise models.ModelError(
                        f"{self.model}: TRL trains on {self.tokenizer.decode(found)!r}, where this kit would score "
                        f"{self.tokenizer.decode(expected)!r}; give the tokenizer a plainer chat template"
                    )


class OnlyFinite(TrainerCallback):
    """Stops before the first optimizer step whose gradient is not finite, and after a last one that spoilt weights."""

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: Any, **kwargs: Any) -> None:
        _refuse_nan((p.grad for p in model.parameters()), f"step {state.global_step + 1}: the gradient is")

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: Any, **kwargs: Any) -> None:
        _refuse_nan((p for p in model.parameters() if p.requires_grad), "training ended in weights that are")


def _refuse_nan(tensors: Iterable[torch.Tensor | None], what: str) -> None:
    finite = [each.isfinite().all() for each in tensors if each is not None]
    if finite and not torch.stack(finite).all():  # asked of the device once, not for each tensor
        cause = "look for NaN in the dataset and in the given model, or lower learning_rate"
        raise models.ModelError(f"{what} not finite, so nothing is saved; {cause}")


def fit(trainer: Trainer, folder: Path) -> None:
    """Train, and write the model, its tokenizer and its history.

    ModelError where gradients or weights are not finite, and where a policy that is read again gives other log-probs.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model, tokenizer = trainer.model, trainer.processing_class
    policy = getattr(model, "generation_config", None) is not None
    if policy:
        stops = models.stop_ids(model, tokenizer)
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    # With adapters, TRL leaves the reference's clone in the model: only the trained adapter is written.
    trained = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, **trained)
    tokenizer.save_pretrained(folder)
    trainer.save_state()
    models.loading.write_loading(folder, model)
    if policy:
        rows = list(islice(trainer.train_dataset, CHECKED))
        trained_on = [row.get("input_ids") or row.get("prompt_ids") for row in rows]  # on-policy trainers keep prompts
        ids = [a or models.encode(tokenizer, [row["prompt"]])[0] for a, row in zip(trained_on, rows, strict=True)]
        own = _logprobs_after(ids, model)
        del model, trainer
        release()
        furthest = (own - _logprobs_after(ids, models.load_causal(folder))).abs().max().item()
        if not furthest <= 1e-3:
            raise models.ModelError(
                f"{folder}: loaded again, its log-probs differ from the trained model's by up to {furthest:.3g} nats, "
                "so it is not published; a setting of the model or of its adapter is lost when it is saved"
            )


@torch.no_grad()
def _logprobs_after(rows: list[list[int]], model: Model) -> torch.Tensor:
    """Log-probs in nats of all N tokens of the rows as the next after each of B rows: (B, N)."""
    seen = sorted({token for row in rows for token in row})
    return torch.cat(
        [models.next_logprobs(model.eval(), [row], seen).cpu() for row in rows]
    )  # one fits where it trained


def release() -> None:
    """Free what nothing names any more: a saved model is loaded next, and must not lie in memory beside the trained."""
    gc.collect()
    torch.cuda.empty_cache()


def history(model: ModelPath) -> pd.DataFrame:
    """What a trained model's trainer logged: a row per logging step, `step` first."""
    logged = TrainerState.load_from_json(str(Path(model) / "trainer_state.json")).log_history
    return pd.DataFrame([row for row in logged if "loss" in row]).set_index("step").reset_index()
