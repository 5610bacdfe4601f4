"""Reward models from comparisons, pairs of one ranking kept together."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from rlhf_kit import models
from rlhf_kit.models import Model, ModelPath
from rlhf_kit.rewards import RewardModel, normalise
from rlhf_kit.train.common import CHECKED, Training, fit, new_directory, release


class ScoreHead(torch.nn.Linear):
    """A score head that computes in fp32 under autocast and over a bf16 base, as `RewardModel` does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Scores (..., 1) of hidden states (..., D)."""
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


class ItemBatches:
    """Row numbers in batches of whole items, up to `batch_size` rows each; a bigger item is a batch of its own.

    The seed draws once how many items of which size share a batch, so that every epoch has as many batches (Trainer
    counts them once). Each epoch draws anew which items those are, and the order of the batches.
    """

    def __init__(self, items: Sequence[Any], batch_size: int, seed: int) -> None:
        self.seed, self.epoch = seed, 0
        rows = pd.Series(range(len(items))).groupby(list(items), sort=False, dropna=False).agg(list)  # of each item
        sizes = rows.map(len)
        self.items_of_size = {size: found.tolist() for size, found in rows.groupby(sizes, sort=False)}
        self.batches: list[list[int]] = []  # sizes of the items in each
        for size in np.random.default_rng(seed).permutation(sizes).tolist():
            if not self.batches or sum(self.batches[-1]) + size > batch_size:
                self.batches.append([])
            self.batches[-1].append(size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        self.epoch += 1
        waiting = {size: [of[i] for i in rng.permutation(len(of))] for size, of in self.items_of_size.items()}
        for batch in rng.permutation(len(self.batches)):
            yield [row for size in self.batches[batch] for row in waiting[size].pop()]


class ItemRewardTrainer(RewardTrainer):
    """TRL's trainer on batches of whole items (column `item`), once TRL has dropped the rows that are too long."""

    def get_train_dataloader(self) -> DataLoader:
        if self.args.world_size > 1:
            raise ValueError("reward_model: train pairs with a column `item` in one process, or remove the column")
        batches = ItemBatches(self.train_dataset["item"][:], self.args.train_batch_size, self.args.seed)
        loader = DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


def reward_model(model: ModelPath, dataset: Dataset, out: ModelPath, **options: Any) -> str:
    """Fit a reward to `prompt, chosen, rejected` by -log sigmoid(r_chosen - r_rejected) (2203.02155, eq. 1).

    Starts from the SFT model with a fresh head. The result is shifted and scaled to mean 0 and variance 1 over the
    dataset's completions, so these should be the SFT model's own. A column `margin` m asks for more where the raters
    were sure: -log sigmoid(r_chosen - r_rejected - m) (Llama 2, 2307.09288, eq. 2). A column `item` names the ranking
    that a pair comes from: the pairs of one item stay in one batch, because they are overfitted when they are shuffled
    among others (2203.02155, section 3.5). ValueError if several processes train such pairs, or where chosen equals
    rejected in every row. Options: see `help(rk.train)`.
    """
    with new_directory(out) as folder:
        training = Training("reward model", RewardConfig, model, folder, **options)
        margin = ["margin"] if "margin" in dataset.column_names else []
        dataset = training.ready(dataset, "prompt", "chosen", "rejected", *margin)
        if dataset["chosen"][:] == dataset["rejected"][:]:
            raise ValueError("reward_model: chosen equals rejected in every row, so there is nothing to learn")
        trainer_class = ItemRewardTrainer if "item" in dataset.column_names else RewardTrainer
        trainer = training.trainer(trainer_class, dataset, start=_with_score_head(training))
        fit(trainer, folder)
        prompts, texts, own, tolerance = _own_scores(trainer)
        del trainer
        release()
        again = torch.tensor(RewardModel(folder)(prompts, texts))
        furthest = ((again - own).abs() / own.abs().clamp(min=1)).max().item()
        if not furthest <= tolerance:
            raise models.ModelError(
                f"{out}: loaded again, it scores the rows it was trained on differently, by up to {furthest:.3g} of a "
                "score; its tokenizer and its head do not read the same token, so it is not published"
            )
        normalise(folder, 2 * dataset["prompt"][:], dataset["chosen"][:] + dataset["rejected"][:])
    return str(out)


def _own_scores(trainer: RewardTrainer) -> tuple[list[Any], list[Any], torch.Tensor, float]:
    """Some prompts and their 2N completions, the trained model's scores (2N,), how far rounding may move a score."""
    rows, model = list(islice(trainer.train_dataset, CHECKED)), trainer.model.eval()
    batch = trainer.data_collator(rows)
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), trainer.accelerator.autocast():
        own = model(**inputs).logits[:, 0].float().cpu()
    # TRL has joined each prompt with its completions.
    texts = [row[side][len(row["prompt"]) :] for side in ("chosen", "rejected") for row in rows]
    rounded = trainer.args.bf16 or any(weight.dtype != torch.float32 for weight in model.parameters())
    return 2 * [row["prompt"] for row in rows], texts, own, 2e-2 if rounded else 1e-4


def _with_score_head(training: Training) -> Model:
    """The model with a fresh score head, N(0, 1 / (d + 1)) as in Stiennon et al. 2020 (2009.01325), to train."""
    model, given = str(training.model), models.is_adapter(training.model)
    torch.manual_seed(training.args.seed)  # a new adapter is drawn from it; the trainer seeds only later
    auto = AutoModelForSequenceClassification.from_pretrained
    base = models.load_base(model, auto, num_labels=1, **training.loading)
    generator = torch.Generator().manual_seed(training.args.seed)
    head = torch.randn(base.score.weight.shape, generator=generator) / (base.score.in_features + 1) ** 0.5
    base.score = ScoreHead(base.score.in_features, 1, bias=False, device=base.score.weight.device)
    base.score.weight.data.copy_(head)
    config = PeftConfig.from_pretrained(model) if given else models.lora_config(training.lora)
    if config is not None and config.modules_to_save:
        raise models.ModelError(
            f"{model}: its adapter holds whole modules ({', '.join(config.modules_to_save)}), which a reward model "
            "cannot take over; merge the adapter into its base, and train on that"
        )
    if config is None:
        return base
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", ["score"], False
    wrapped = get_peft_model(base, config)
    if given:
        set_peft_model_state_dict(wrapped, load_peft_weights(model) | {"base_model.model.score.weight": head})
    return wrapped
