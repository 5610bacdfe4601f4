"""Constitutional AI's first half: a model criticises and revises its own answers, and learns from the revisions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset

from rlhf_kit.feedback.constitution import Constitution, constitution
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.templates import spoken
from rlhf_kit.models import (
    ModelPath,
    Prompt,
    decode_completions,
    encode_prompts,
    generate,
    load_causal,
    load_ready,
    load_tokenizer,
)
from rlhf_kit.progress import Countdown

# A reply to each prompt, text or chat. An `Endpoint` is one.
Writer = Callable[[list[Prompt]], list[str]]
BATCH = 64


def critique_and_revise(
    write: Writer,
    answers: pd.DataFrame | Dataset,
    rules: Constitution | None = None,
    rounds: int = 1,
    seed: int = 0,
    batch_size: int = BATCH,
) -> pd.DataFrame:
    """A row per answer and round: its `answer`, the `principle` drawn, the `critique` asked for and the `revision`.

    Bai et al. 2022 (2212.08073, section 3.1): each round draws a principle by weight, shows the model the prompt and
    the answer as a chat, and asks for a critique, then for a revision, which is the next round's answer. `answers` has
    `prompt, completion`; other columns are carried. An empty revision leaves the answer as it was; a warning counts
    these. Raises FeedbackError where a column is missing.
    """
    rules = rules or constitution()
    frame = answers if isinstance(answers, pd.DataFrame) else pd.DataFrame(answers.to_list())
    missing = {"prompt", "completion"} - set(frame.columns)
    if missing or frame.empty:
        raise FeedbackError(f"critique_and_revise: no answers, or no column {' and '.join(sorted(missing))}")
    if rounds < 1:
        raise FeedbackError(f"critique_and_revise: rounds={rounds}; there is one round or more")
    weights = np.array([principle.weight for principle in rules.principles])
    countdown, done = Countdown("critiques and revisions", rounds * len(frame)), 0
    current, parts, empty = [spoken(completion) for completion in frame["completion"]], [], 0
    for number in range(1, rounds + 1):
        generator = np.random.default_rng([seed, 10, number])
        drawn = generator.choice(len(weights), size=len(frame), p=weights / weights.sum())
        principles = [rules.principles[k] for k in drawn]
        critiques, revisions = [], []
        for start in range(0, len(frame), batch_size):
            rows = range(start, min(start + batch_size, len(frame)))
            asked = [_chat(frame["prompt"].iloc[i], current[i], principles[i].critique) for i in rows]
            found = _written(write, asked)
            again = [
                [*chat, _said("assistant", critique), _said("user", principles[i].revise)]
                for chat, critique, i in zip(asked, found, rows, strict=True)
            ]
            critiques += found
            written = _written(write, again)
            empty += written.count("")
            revisions += [text or current[i] for text, i in zip(written, rows, strict=True)]
            done += len(rows)
            countdown.at(done)
        parts.append(
            frame.drop(columns="completion").assign(
                row=range(len(frame)),
                round=number,
                principle=[principle.name for principle in principles],
                answer=current,
                critique=critiques,
                revision=revisions,
            )
        )
        current = revisions
    if empty:
        total = rounds * len(frame)
        warnings.warn(f"{empty} of {total} revisions were empty; those answers stayed as they were", stacklevel=2)
    return pd.concat(parts, ignore_index=True)


def as_demonstrations(frame: pd.DataFrame) -> Dataset:
    """`prompt, completion` of each answer's last revision, for `train.sft`; completions of texts begin with a space."""
    last = frame.sort_values("round", kind="stable").groupby("row").tail(1).sort_values("row")
    return Dataset.from_list(
        [
            {
                "prompt": prompt,
                "completion": f" {said}" if isinstance(prompt, str) else [{"role": "assistant", "content": said}],
            }
            for prompt, said in zip(last["prompt"], last["revision"], strict=True)
        ]
    )


def writer(
    model: ModelPath,
    max_completion_length: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    load_in_4bit: bool | None = None,
) -> Writer:
    """A model directory or hub id that writes critiques and revisions; for one at an endpoint take `Endpoint`.

    Raises FeedbackError where its tokenizer has no chat template, for the requests are chats.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer.chat_template is None:
        raise FeedbackError(f"{model}: has no chat template, and a critique is asked for in a chat; take a chat model")
    loaded = load_ready(load_causal, model, load_in_4bit)
    torch_seed = iter(range(seed, 2**31))

    def write(prompts: list[Prompt]) -> list[str]:
        with torch.random.fork_rng():
            torch.manual_seed(next(torch_seed))
            tokens = generate(loaded, tokenizer, encode_prompts(tokenizer, prompts), max_completion_length, temperature)
        return [text.strip() for text in decode_completions(tokenizer, tokens)]

    return write


def _chat(prompt: Prompt, answer: str, request: str) -> list[dict[str, str]]:
    before = [_said("user", prompt)] if isinstance(prompt, str) else list(prompt)
    return [*before, _said("assistant", answer), _said("user", request)]


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _written(write: Writer, chats: Sequence[Any]) -> list[str]:
    found = write(list(chats))
    if len(found) != len(chats):
        raise FeedbackError(f"critique_and_revise: {len(chats)} texts were asked for, and {len(found)} came back")
    return [text.strip() for text in found]
