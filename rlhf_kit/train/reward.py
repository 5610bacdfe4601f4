"""Reward models from comparisons, pairs of one ranking kept together."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase, TrainerCallback
from trl import RewardConfig, RewardTrainer

from rlhf_kit.models import Model, ModelError, ModelPath, hidden_size, is_adapter, load_base, load_causal
from rlhf_kit.rewards import RewardModel, normalise
from rlhf_kit.train.stage import exact_start, fit, partial, prepare, publish, watched

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
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    seed: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> str:
    """Fit a reward to `prompt, chosen, rejected` by -log sigmoid(r_chosen - r_rejected) (2203.02155, eq. 1).

    Starts from the SFT model with a fresh head; the result is shifted and scaled to mean 0 and variance 1 over the
    dataset's completions, so these should be the SFT model's own. A column `margin` m asks for more where the raters
    were sure: -log sigmoid(r_chosen - r_rejected - m) (Llama 2, 2307.09288, eq. 2). A column `item` names the ranking
    that a pair comes from: its pairs stay in one batch, for shuffled among others they are overfitted (2203.02155,
    section 3.5). Raises ValueError where items are to be kept together over several processes.
    """
    tokenizer, args = prepare(model, out, RewardConfig, lora, seed, settings)
    by_item = "item" in dataset.column_names
    if by_item and args.world_size > 1:
        raise ValueError(
            "reward_model: batches of whole items cannot be shared out among processes; train in one process, or "
            "remove the column `item`"
        )
    start = _with_score_head(model, lora, load_in_4bit, tokenizer, seed)
    exact = exact_start(start)
    trainer = (ItemRewardTrainer if by_item else RewardTrainer)(
        model=start,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=watched("reward model", callbacks),
    )
    fit(trainer, out, exact)
    rows = trainer.train_dataset.select(range(min(CHECKED, len(trainer.train_dataset))))
    own, rounded = _own_scores(trainer, rows), args.bf16 or bool(exact)
    # What was written is loaded once more to be normalised: without this, weights would be held twice.
    del trainer, start, exact
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _check_reloaded(partial(out), rows, own, tolerance=2e-2 if rounded else 1e-4)
    normalise(partial(out), 2 * dataset["prompt"][:], dataset["chosen"][:] + dataset["rejected"][:])
    return publish(out)


@torch.no_grad()
def _own_scores(trainer: RewardTrainer, rows: Dataset) -> torch.Tensor:
    """What the trained model itself gives the rows as TRL tokenised them, chosen before rejected: (2N,)."""
    trainer.model.eval()
    batch = trainer.data_collator(list(rows))
    where = trainer.model.device
    with trainer.accelerator.autocast():
        logits = trainer.model(
            input_ids=batch["input_ids"].to(where), attention_mask=batch["attention_mask"].to(where)
        ).logits
    return logits[:, 0].float().cpu()


def _check_reloaded(path: ModelPath, rows: Dataset, own: torch.Tensor, tolerance: float) -> None:
    """ModelError unless the saved model, loaded again, gives the texts of the rows what the trained one gave them."""
    reward = RewardModel(path)
    eos = reward.tokenizer.eos_token
    # TRL has joined each prompt with its completions and, where they are texts, closed these with EOS.
    texts = [row[side][len(row["prompt"]) :] for side in ("chosen", "rejected") for row in rows]
    texts = [text.removesuffix(eos) if isinstance(text, str) else text for text in texts]
    again = torch.tensor(reward(2 * rows["prompt"][:], texts))
    furthest = ((again - own).abs() / own.abs().clamp(min=1)).max().item()
    if not furthest <= tolerance:
        raise ModelError(
            f"{path}: loaded again, it scores the rows it was trained on differently, by up to {furthest:.3g} of a "
            "score; its tokenizer and its head do not read the same token, so it is not published"
        )


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
