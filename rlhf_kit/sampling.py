"""Completions from a model directory as a frame, and best-of-n among them."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from datasets import Dataset

from rlhf_kit import data, models
from rlhf_kit.rewards import ARGUMENTS, Reward, checked

KL_ROWS = 64  # completions in one forward pass for the KL; sorted by length, they cost half of a whole batch at once


@torch.no_grad()
def sample(
    model: models.ModelPath,
    prompts: Dataset,
    n: int = 1,
    temperature: float = 1.0,
    max_completion_length: int = models.MAX_COMPLETION_LENGTH,
    reference: models.ModelPath | None = None,
    seed: int = 0,
    batch_tokens: int = 2**15,
    **loading: Any,
) -> pd.DataFrame:
    """`n` completions of each prompt: a row per (prompt_id, sample) with `finished`, `n_tokens`, the prompt columns.

    A completion is text after a text, an assistant message after a chat. A prompt column of the name of one of these
    gets `_dataset` behind its name. With a `reference`, `kl` is `models.completion_kl` to it in nats. batch_tokens: the
    most tokens in memory at once, prompts and completions at their longest. loading: as of `models.load_causal`.
    ValueError where there are no prompts or n is below 1.
    """
    if n < 1 or len(prompts) == 0:
        raise ValueError(f"sample: needs prompts and n of at least 1; got {len(prompts)} prompts and n={n}")
    torch.manual_seed(seed)
    tokenizer = models.load_tokenizer(model)
    prompts = data.ready(prompts, tokenizer, ["prompt"], source="prompts")
    policy = models.load_causal(model, **loading)
    other = models.load_causal(reference, **loading) if reference is not None else None
    encoded = models.encode(tokenizer, prompts["prompt"][:])
    stops = models.stop_ids(policy, tokenizer)
    batch_size = max(1, batch_tokens // (max(map(len, encoded)) + max_completion_length))
    rows = [(prompt_id, k) for prompt_id in range(len(prompts)) for k in range(n)]
    parts = []
    for start in range(0, len(rows), batch_size):
        batch = pd.DataFrame(rows[start : start + batch_size], columns=["prompt_id", "sample"])
        ids = [encoded[i] for i in batch.prompt_id]
        tokens = models.generate(policy, tokenizer, ids, max_completion_length, temperature)
        texts = zip(batch.prompt_id, models.decode_completions(tokenizer, tokens), strict=True)
        batch["completion"] = [models.as_completion(prompts[i]["prompt"], text) for i, text in texts]
        batch["finished"] = models.finished(tokens, stops).tolist()
        batch["n_tokens"] = tokens.completion_mask.sum(1).tolist()
        if other is not None:
            kl = torch.zeros(len(batch))
            for index in tokens.attention_mask.sum(1).argsort().split(KL_ROWS):
                kl[index] = models.completion_kl(policy, other, tokens.rows(index), temperature or 1.0).cpu()
            batch["kl"] = kl.tolist()
        parts.append(batch)
    frame = pd.concat(parts, ignore_index=True)
    for name in prompts.column_names:
        cells = prompts[name][:]
        frame[f"{name}_dataset" if name in frame else name] = [cells[i] for i in frame["prompt_id"]]
    frame.insert(2, "prompt", frame.pop("prompt"))  # before the completion
    return frame


def add_rewards(samples: pd.DataFrame, rewards: Mapping[str, Reward]) -> pd.DataFrame:
    """The samples with a column for each reward, which gets the columns of the prompts as it does in training."""
    names = [name for name in samples.columns if name not in ARGUMENTS]
    columns = {name: samples.get(f"{name}_dataset", samples[name]).tolist() for name in names}
    texts = samples["prompt"].tolist(), samples["completion"].tolist()
    found = {name: checked(reward(*texts, **columns), len(samples)).tolist() for name, reward in rewards.items()}
    return samples.assign(**found)


def best_of_n(scored: pd.DataFrame, by: str, n: int | None = None) -> pd.DataFrame:
    """The sample with the highest `by` among the first `n` (default: all) of each prompt: a row per prompt."""
    if by not in scored.columns:
        raise ValueError(f"best_of_n: no column {by!r} to choose by; add it to the samples by add_rewards")
    pool = scored if n is None else scored[scored["sample"] < n]
    return scored.loc[pool.groupby("prompt_id")[by].idxmax()].reset_index(drop=True)
