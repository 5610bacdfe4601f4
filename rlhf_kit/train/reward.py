"""Reward models from comparisons, pairs of one ranking kept together."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, TrainerCallback
from trl import RewardConfig, RewardTrainer

from rlhf_kit import models
from rlhf_kit.files import replacing
from rlhf_kit.models import Lora, Model, ModelPath
from rlhf_kit.rewards import RewardModel, normalise
from rlhf_kit.train.common import Request, fit, make_trainer, prepare

CHECKED = 16  # rows whose scores are compared once more after the model was saved and loaded


class ItemBatches:
    """Row numbers in batches of whole items, up to `batch_size` rows each; a bigger item is a batch of its own.

    How many items of which size share a batch is drawn once from the seed, so that every epoch has the same number of
    batches (Trainer counts them once); which items those are, and the batches' order, are drawn anew each epoch.
    """

    def __init__(self, items: Sequence[Any], batch_size: int, seed: int) -> None:
        self.seed = seed
        self.epoch = 0
        rows: dict[Any, list[int]] = defaultdict(list)
        for row, item in enumerate(items):
            rows[item].append(row)
        self.items_of_size: dict[int, list[list[int]]] = defaultdict(list)
        for item_rows in rows.values():
            self.items_of_size[len(item_rows)].append(item_rows)
        self.batches: list[list[int]] = []  # sizes of the items in each
        for size in np.random.default_rng(seed).permutation([len(item_rows) for item_rows in rows.values()]).tolist():
            if not self.batches or sum(self.batches[-1]) + size > batch_size:
                self.batches.append([])
            self.batches[-1].append(size)

    def set_epoch(self, epoch: int) -> None:
        """Accelerate says which epoch comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        waiting = {size: [of[i] for i in rng.permutation(len(of))] for size, of in self.items_of_size.items()}
        for batch in rng.permutation(len(self.batches)):
            yield [row for size in self.batches[batch] for row in waiting[size].pop()]


class ItemRewardTrainer(RewardTrainer):
    """TRL's trainer on batches of whole items (column `item`)."""

    def get_train_dataloader(self) -> DataLoader:
        """Batches as `ItemBatches` makes them; TRL has dropped over-long rows by now, and kept the column."""
        batches = ItemBatches(self.train_dataset["item"][:], self.args.train_batch_size, self.args.seed)
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)


def reward_model(
    model: ModelPath,
    dataset: Dataset,
    out: ModelPath,
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Fit a reward to `prompt, chosen, rejected` by -log sigmoid(r_chosen - r_rejected) (2203.02155, eq. 1).

    Starts from the SFT model with a fresh head. The result is shifted and scaled to mean 0 and variance 1 over the
    dataset's completions, so these should be the SFT model's own. A column `margin` m asks for more where the raters
    were sure: -log sigmoid(r_chosen - r_rejected - m) (Llama 2, 2307.09288, eq. 2). A column `item` names the ranking
    that a pair comes from: the pairs of one item stay in one batch, because they are overfitted when they are shuffled
    among others (2203.02155, section 3.5). Raises ValueError if there are items and several processes.
    """
    request = Request("reward model", model, out, lora, load_in_4bit, seed, callbacks, settings)
    with replacing(out) as folder:
        rows, own, tolerance = _fit_and_score(request, dataset, folder)
        # The saved model is loaded next: the trained one must not be in memory beside it.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _check_reloaded(folder, rows, own, tolerance)
        normalise(folder, 2 * dataset["prompt"][:], dataset["chosen"][:] + dataset["rejected"][:])
    return str(out)


def _fit_and_score(request: Request, dataset: Dataset, folder: Path) -> tuple[Dataset, torch.Tensor, float]:
    """Train and save; returns rows, the trained model's scores of them (2N,), and how far rounding may move these.

    The rows are as TRL tokenised them; the scores are of all chosen completions and then of all rejected ones.
    """
    tokenizer, args = prepare(request, RewardConfig, folder)
    by_item = "item" in dataset.column_names
    if by_item and args.world_size > 1:
        raise ValueError(
            "reward_model: batches of whole items cannot be shared out among processes; train in one process, or "
            "remove the column `item`"
        )
    start = _with_score_head(request, tokenizer)
    trainer = make_trainer(ItemRewardTrainer if by_item else RewardTrainer, request, args, tokenizer, dataset, start)
    fit(trainer, folder)
    rows = trainer.train_dataset.select(range(min(CHECKED, len(trainer.train_dataset))))
    batch = trainer.data_collator(list(rows))
    inputs = {name: batch[name].to(trainer.model.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), trainer.accelerator.autocast():
        own = trainer.model.eval()(**inputs).logits[:, 0].float().cpu()
    return rows, own, 2e-2 if args.bf16 or getattr(start, "is_loaded_in_4bit", False) else 1e-4


def _check_reloaded(path: Path, rows: Dataset, own: torch.Tensor, tolerance: float) -> None:
    """ModelError unless the saved model, loaded again, gives the rows' texts the trained model's scores."""
    reward = RewardModel(path)
    eos = reward.tokenizer.eos_token
    # TRL has joined each prompt with its completions and has put EOS after those that are texts.
    texts = [row[side][len(row["prompt"]) :] for side in ("chosen", "rejected") for row in rows]
    texts = [text.removesuffix(eos) if isinstance(text, str) else text for text in texts]
    again = torch.tensor(reward(2 * rows["prompt"][:], texts))
    furthest = ((again - own).abs() / own.abs().clamp(min=1)).max().item()
    if not furthest <= tolerance:
        raise models.ModelError(
            f"{path}: loaded again, it scores the rows it was trained on differently, by up to {furthest:.3g} of a "
            "score; its tokenizer and its head do not read the same token, so it is not published"
        )


def _with_score_head(request: Request, tokenizer: PreTrainedTokenizerBase) -> Model:
    """The model with a fresh score head, N(0, 1 / (d + 1)) as in Stiennon et al. 2020 (2009.01325), to train."""
    model, load_in_4bit = request.model, request.load_in_4bit
    torch.manual_seed(request.seed)  # a new adapter is drawn from it; the trainer seeds only later
    base = models.load_base(model, AutoModelForSequenceClassification.from_pretrained, load_in_4bit, num_labels=1)
    base.config.pad_token_id = tokenizer.pad_token_id
    generator = torch.Generator().manual_seed(request.seed)
    head = torch.randn(base.score.weight.shape, generator=generator) / (base.score.in_features + 1) ** 0.5
    base.score.weight.data.copy_(head)
    start = models.load_causal(model, load_in_4bit) if models.is_adapter(model) else None
    config = models.lora_config(request.lora if start is None else start.peft_config["default"])
    if config is None:
        if getattr(base, "is_loaded_in_4bit", False):
            raise models.ModelError(
                f'{model}: 4-bit weights cannot be trained; pass `lora={{"r": 16}}` to train an adapter'
            )
        return base
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], False
    wrapped = get_peft_model(base, config)
    if start is not None:
        score = {"base_model.model.score.weight": head}
        set_peft_model_state_dict(wrapped, get_peft_model_state_dict(start) | score)
    return wrapped
