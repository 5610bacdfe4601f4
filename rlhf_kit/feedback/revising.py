"""Constitutional AI's first half: a model criticises and revises its own answers, and learns from the revisions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset

from rlhf_kit.feedback.constitution import Principle, as_text, constitution
from rlhf_kit.models import ModelPath, Prompt
from rlhf_kit.sampling import sample

# A reply to each prompt, text or chat. An `Endpoint` is one.
Writer = Callable[[Sequence[Prompt]], list[str]]


def critique_and_revise(
    write: Writer, answers: pd.DataFrame, rules: Sequence[Principle] | None = None, rounds: int = 1, seed: int = 0
) -> pd.DataFrame:
    """A row per answer and round: its `answer`, the `principle` drawn, the `critique` asked for and the `revision`.

    Bai et al. 2022 (2212.08073, section 3.1): each round draws a principle by weight, shows the model the prompt and
    the answer as a chat, and asks for a critique, then for a revision, which is the next round's answer. `answers` has
    `prompt, completion`; other columns are carried. An empty revision leaves the answer as it was; a warning counts
    these. ValueError if `write` returns more or fewer texts than it was asked for.
    """
    rules = rules or constitution()
    weights = np.array([principle.weight for principle in rules])
    given, parts, empty = [as_text(completion) for completion in answers["completion"]], [], 0
    for number in range(1, rounds + 1):
        generator = np.random.default_rng([seed, 10, number])
        drawn = generator.choice(len(weights), size=len(answers), p=weights / weights.sum())
        principles = [rules[k] for k in drawn]
        chats: list[Prompt] = [
            [*_chat("user", prompt), *_chat("assistant", answer), *_chat("user", principle.critique)]
            for prompt, answer, principle in zip(answers["prompt"], given, principles, strict=True)
        ]
        critiques = [text.strip() for text in write(chats)]
        chats = [
            [*_chat("user", chat), *_chat("assistant", critique), *_chat("user", principle.revise)]
            for chat, critique, principle in zip(chats, critiques, principles, strict=True)
        ]
        revisions = [text.strip() for text in write(chats)]
        empty += revisions.count("")
        revisions = [text or answer for text, answer in zip(revisions, given, strict=True)]
        names = [principle.name for principle in principles]
        made = {"principle": names, "answer": given, "critique": critiques, "revision": revisions}
        parts.append(answers.drop(columns="completion").assign(row=range(len(answers)), round=number, **made))
        given = revisions
    if empty:
        total = rounds * len(answers)
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


def writer(model: ModelPath, seed: int = 0, max_completion_length: int = 256, **sampling: Any) -> Writer:
    """A model directory or hub id, with a chat template, that writes critiques and revisions.

    `sampling` goes to `sample`: temperature, load_in_4bit. For a model at an endpoint take `Endpoint`.
    """
    seeds = count(seed)  # each call draws anew

    def write(chats: Sequence[Prompt]) -> list[str]:
        prompts = Dataset.from_list([{"prompt": chat} for chat in chats])
        settings = {"max_completion_length": max_completion_length, "seed": next(seeds), **sampling}
        return sample(model, prompts, **settings)["completion"].tolist()

    return write


def _chat(role: str, content: Prompt) -> list[dict[str, str]]:
    """A text as a chat of one message; a chat as it is."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)
