"""Constitutional AI's first half: a model criticises and revises its own answers, and learns from the revisions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from rlhf_kit import models
from rlhf_kit.feedback.constitution import Constitution, constitution
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.templates import as_text
from rlhf_kit.models import ModelPath, Prompt
from rlhf_kit.progress import Countdown

# A reply to each prompt, text or chat. An `Endpoint` is one.
Writer = Callable[[Sequence[Prompt]], list[str]]


def critique_and_revise(
    write: Writer, answers: pd.DataFrame | Dataset, rules: Constitution | None = None, rounds: int = 1, seed: int = 0
) -> pd.DataFrame:
    """A row per answer and round: its `answer`, the `principle` drawn, the `critique` asked for and the `revision`.

    Bai et al. 2022 (2212.08073, section 3.1): each round draws a principle by weight, shows the model the prompt and
    the answer as a chat, and asks for a critique, then for a revision, which is the next round's answer. `answers` has
    `prompt, completion`; other columns are carried. An empty revision leaves the answer as it was; a warning counts
    these. Raises FeedbackError if a column is missing.
    """
    rules = rules or constitution()
    frame = answers if isinstance(answers, pd.DataFrame) else pd.DataFrame(answers.to_list())
    missing = {"prompt", "completion"} - set(frame.columns)
    if missing or frame.empty:
        raise FeedbackError(f"critique_and_revise: no answers, or no column {' and '.join(sorted(missing))}")
    if rounds < 1:
        raise FeedbackError(f"critique_and_revise: rounds={rounds}; give 1 or more")
    weights = np.array([principle.weight for principle in rules.principles])
    given, parts, empty = [as_text(completion) for completion in frame["completion"]], [], 0
    for number in range(1, rounds + 1):
        generator = np.random.default_rng([seed, 10, number])
        drawn = generator.choice(len(weights), size=len(frame), p=weights / weights.sum())
        principles = [rules.principles[k] for k in drawn]
        chats: list[Prompt] = [
            [*_chat("user", prompt), *_chat("assistant", answer), *_chat("user", principle.critique)]
            for prompt, answer, principle in zip(frame["prompt"], given, principles, strict=True)
        ]
        critiques = _written(write, chats)
        chats = [
            [*_chat("user", chat), *_chat("assistant", critique), *_chat("user", principle.revise)]
            for chat, critique, principle in zip(chats, critiques, principles, strict=True)
        ]
        revisions = _written(write, chats)
        empty += revisions.count("")
        revisions = [text or answer for text, answer in zip(revisions, given, strict=True)]
        names = [principle.name for principle in principles]
        made = {"principle": names, "answer": given, "critique": critiques, "revision": revisions}
        parts.append(frame.drop(columns="completion").assign(row=range(len(frame)), round=number, **made))
        given = revisions
    if empty:
        total = rounds * len(frame)
        warnings.warn(f"{empty} of {total} revisions were empty; those answers stayed as they were", stacklevel=2)
    return pd.concat(parts, ignore_index=True)


def as_demonstrations(frame: pd.DataFrame) -> Dataset:
    """`prompt, completion` of each answer's last revision, for `train.sft`; completions of texts begin with a space."""
    last = frame.sort_values("round", kind="stable").groupby("row").tail(1).sort_values("row")
    rows = []
    for prompt, text in zip(last["prompt"], last["revision"], strict=True):
        completion = f" {text}" if isinstance(prompt, str) else _chat("assistant", text)
        rows.append({"prompt": prompt, "completion": completion})
    return Dataset.from_list(rows)


def writer(
    model: ModelPath,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    load_in_4bit: bool | None = None,
    batch_size: int = 64,
) -> Writer:
    """A model directory or hub id that writes critiques and revisions; for one at an endpoint take `Endpoint`.

    Raises FeedbackError if its tokenizer has no chat template, because the requests are chats.
    """
    tokenizer = models.load_tokenizer(model)
    if tokenizer.chat_template is None:
        raise FeedbackError(f"{model}: has no chat template, and a critique is asked for in a chat; take a chat model")
    loaded = models.load_causal(model, load_in_4bit)
    torch_seed = iter(range(seed, 2**31))

    def write(prompts: Sequence[Prompt]) -> list[str]:
        countdown, texts = Countdown(f"texts of {model}", len(prompts)), []
        for start in range(0, len(prompts), batch_size):
            ids = models.encode(tokenizer, list(prompts[start : start + batch_size]))
            with torch.random.fork_rng():
                torch.manual_seed(next(torch_seed))
                tokens = models.generate(loaded, tokenizer, ids, max_completion_length, temperature)
            texts += models.decode_completions(tokenizer, tokens)
            countdown.at(len(texts))
        return texts

    return write


def _chat(role: str, content: Prompt) -> list[dict[str, str]]:
    """A text as a chat of one message; a chat as it is."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def _written(write: Writer, chats: Sequence[Prompt]) -> list[str]:
    found = write(chats)
    if len(found) != len(chats):
        raise FeedbackError(f"critique_and_revise: {len(chats)} texts were asked for, and {len(found)} came back")
    return [text.strip() for text in found]
