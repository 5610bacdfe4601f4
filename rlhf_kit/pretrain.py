"""Pretraining of small causal language models from scratch: the pocket base, and a base for `--data` runs.

Such models let the mechanics of RLHF run on a CPU. They know only the texts given here.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers import get_cosine_schedule_with_warmup as cosine_schedule

from rlhf_kit.tasks.pocket.tokenizer import EOS, PAD, wrap

_WARMUP = 0.05  # share of the steps
_WEIGHT_DECAY = 0.01
_SORTED_BATCHES = 16  # batches are cut from this many batches' texts sorted by length, which saves half the padding


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on texts, with this project's special tokens (pad != EOS) and chat template.

    The vocabulary has at most `vocab_size` entries, 256 bytes and 2 special tokens among them; fewer than that is a
    ValueError.
    """
    if vocab_size < 258:
        raise ValueError(f"vocab_size={vocab_size}: 256 bytes and 2 special tokens need at least 258.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrap(tokenizer)


def pretrain(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    config: LlamaConfig,
    out: str | os.PathLike[str],
    *,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> str:
    """Train a causal LM from random weights and save it, with its tokenizer, as the directory `out`; returns `out`.

    Every text is followed by EOS; one longer than `config.max_position_embeddings` tokens goes on in a further row, so
    nothing is dropped. AdamW with linear warm-up and cosine decay; mean cross-entropy (nats per token) over the batch.
    The same arguments give the same weights on the same machine. `on_progress(step, steps, loss)` is called after each
    step. ValueError for no text, for numbers that make no sense, or when config and tokenizer disagree;
    FileExistsError if `out` holds something other than a model.
    """
    out = Path(out)
    _check(texts, tokenizer, config, out, steps, batch_size)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.eos_token_id, config.pad_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id, None
    model = LlamaForCausalLM(config).train()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=_WEIGHT_DECAY)
    schedule = cosine_schedule(optimizer, round(_WARMUP * steps), steps)
    batches = _batches(_rows(texts, tokenizer, config.max_position_embeddings), batch_size, seed)
    for step in range(1, steps + 1):
        input_ids, attention_mask = (tensor.to(device) for tensor in _pad(next(batches), tokenizer.pad_token_id))
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        loss = model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_progress is not None:
            on_progress(step, steps, loss.item())
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    _save(model, tokenizer, out)
    return str(out)


def _check(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    config: LlamaConfig,
    out: Path,
    steps: int,
    batch_size: int,
) -> None:
    if not texts:
        raise ValueError("pretrain needs at least one text.")
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps={steps}, batch_size={batch_size}: both must be at least 1.")
    if config.vocab_size != len(tokenizer):
        raise ValueError(f"config.vocab_size={config.vocab_size}, but the tokenizer has {len(tokenizer)} entries.")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give the directory to save the model in.")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise FileExistsError(f"{out} exists and holds no model; give another directory, nothing was overwritten.")


def _rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> list[list[int]]:
    """Token ids of each text with EOS, cut into pieces of at most max_length; a last piece of one token is left out.

    One token predicts nothing, so such a piece would add no loss term.
    """
    rows = []
    for ids in tokenizer(list(texts)).input_ids:
        ids = [*ids, tokenizer.eos_token_id]
        rows += [ids[start : start + max_length] for start in range(0, max(1, len(ids) - 1), max_length)]
    return rows


def _batches(rows: list[list[int]], batch_size: int, seed: int) -> Iterator[list[list[int]]]:
    """Batches of rows of like length, for ever: each pass over the rows is shuffled anew."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(rows))
        for start in range(0, len(order), batch_size * _SORTED_BATCHES):
            group = sorted(order[start : start + batch_size * _SORTED_BATCHES], key=lambda i: len(rows[i]))
            starts = range(0, len(group), batch_size)
            for i in rng.permutation(len(starts)):
                yield [rows[j] for j in group[starts[i] : starts[i] + batch_size]]


def _pad(rows: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask [B, T], padded on the right."""
    length = max(map(len, rows))
    input_ids = torch.tensor([row + [pad_token_id] * (length - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, (torch.arange(length) < lengths[:, None]).long()


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save under a temporary name, then rename: a directory that exists is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        shutil.copymode(out.parent, new)
        if out.exists():
            out.rename(old)
        new.rename(out)
