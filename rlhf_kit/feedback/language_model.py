"""Raters that are models on this machine: a causal LM read at its answer token, a judge trained to be one, a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from datasets import Dataset

from rlhf_kit import train
from rlhf_kit.feedback.constitution import Constitution
from rlhf_kit.feedback.converting import labels, preferences
from rlhf_kit.feedback.judging import Answer, FeedbackError, Question
from rlhf_kit.feedback.templates import OVERALL, PLAIN, Template, check_asked, questions, rank_by
from rlhf_kit.models import (
    Model,
    ModelPath,
    Prompt,
    load_causal,
    load_ready,
    load_tokenizer,
    max_length,
    next_logprobs,
    read_notes,
    write_notes,
)
from rlhf_kit.rewards import Completion, Reward

GRID = 2.0**40  # probabilities are whole multiples of 1 / GRID, so that 1 - p is exact


class LanguageModelRater:
    """A causal LM (directory or hub id) that is asked which of two completions is better, in both orders.

    P(preferred) is read off the log-probs of the two answer words, and averaged over the orders, so that a liking for
    a place cancels (RLAIF, 2309.00267, section 2.1); over principles it is the mean by weight. Without a `template` it
    is asked in the one that `train_judge` left, else in PLAIN. Raises FeedbackError where an answer word is not one
    token, and where a text does not fit the model's positions.
    """

    interface = "language-model-1"

    def __init__(
        self,
        model: ModelPath,
        constitution: Constitution | None = None,
        principle: str | None = None,
        template: Template | None = None,
        name: str | None = None,
        load_in_4bit: bool | None = None,
        batch_size: int = 32,
    ) -> None:
        self.path = str(model)
        self.name = name or f"lm:{self.path}"
        noted = None if template is not None else _noted_template(model)
        self.template = template or noted or PLAIN
        as_trained = noted is not None and constitution is None and principle is None
        self.principles = [OVERALL] if as_trained else questions(self.template, constitution, principle)
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(model)
        self.max_length = max_length(model)
        self.in_chat = self.template.chat and self.tokenizer.chat_template is not None
        compared, rated = self.template.comparison("q", "a", "b", "w"), self.template.rating("q", "a")
        self.choices = self._answer_tokens(compared, self.template.choices) if self.template.compare else []
        self.verdicts = self._answer_tokens(rated, self.template.verdicts)
        self.firsts: list[float] = []  # of each comparison, P(the one shown first) over both orders
        self._load_in_4bit = load_in_4bit
        self._model: Model | None = None

    @property
    def position_bias(self) -> float:
        """By how much the completion shown first was preferred above 1/2, over all that was asked; NaN before that."""
        return sum(self.firsts) / len(self.firsts) - 0.5 if self.firsts else math.nan

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        check_asked(question, self.name)
        if question == "rank":
            return rank_by(self.preference, prompt, list(completions))
        odds = self.good_odds([prompt], list(completions))[0]
        return Answer(rating=int(odds > 0), note=f"log-odds of yes {odds:.4f}")

    def preference(self, prompt: Prompt, a: Completion, b: Completion) -> float:
        """P(a is preferred to b): exactly 1 - preference(prompt, b, a)."""
        # One row's rounding depends on its place in a batch: both orders of a question are the same batch.
        flipped = str(b) < str(a)
        [p] = self.preferences([prompt], [b if flipped else a], [a if flipped else b])
        return 1 - p if flipped else p

    def preferences(self, prompts: Sequence[Prompt], a: Sequence[Completion], b: Sequence[Completion]) -> list[float]:
        """P(a is preferred to b) of each row, many rows at a time."""
        if not self.template.compare:
            one, other = (torch.tensor(self.good_odds(prompts, each)) for each in (a, b))
            return _on_grid(torch.sigmoid(one - other).double())
        texts = [
            self.template.comparison(prompt, first, second, principle.compare)
            for prompt, one, other in zip(prompts, a, b, strict=True)
            for principle in self.principles
            for first, second in ((one, other), (other, one))
        ]
        odds = self._log_odds(texts, self.choices)
        first = torch.sigmoid(odds).double().view(len(prompts), len(self.principles), 2)  # of the one shown first
        weights = torch.tensor([principle.weight for principle in self.principles], dtype=torch.double)
        mine = (first[..., 0] + 1 - first[..., 1]) / 2 @ (weights / weights.sum())
        self.firsts += first.mean((1, 2)).tolist()
        return _on_grid(mine)

    def good_odds(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """log P(yes) - log P(no) to whether each completion is good."""
        texts = [self.template.rating(prompt, each) for prompt, each in zip(prompts, completions, strict=True)]
        return self._log_odds(texts, self.verdicts).tolist()

    def as_reward(self, against: str | None = None) -> Reward:
        """The judge as a reward (RLAIF without a reward model, 2309.00267, section 2.2): the log-odds that a
        completion is good, or P(it is preferred to the one in the prompts' column `against`)."""

        def judged(prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
            if against is None:
                return self.good_odds(prompts, completions)
            if against not in columns:
                raise FeedbackError(f"{self.name}: the prompts have no column {against!r} to compare with; add it")
            return self.preferences(prompts, completions, columns[against])

        judged.__name__ = "judge"
        return judged

    @torch.no_grad()
    def _log_odds(self, texts: list[str], words: list[int]) -> torch.Tensor:
        """log P(first word) - log P(second word) after each text: (B,) in fp32 on the CPU."""
        rows = [self._encode(text) for text in texts]
        odds = torch.empty(len(rows))
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found = next_logprobs(self.model, [rows[row] for row in batch], words)
            odds[batch] = (found[:, 0] - found[:, 1]).cpu()
        return odds

    @property
    def model(self) -> Model:
        """The weights, loaded when they are first needed."""
        if self._model is None:
            self._model = load_ready(load_causal, self.path, self._load_in_4bit)
        return self._model

    def _encode(self, text: str) -> list[int]:
        ids = self._ids(self._framed(text))
        if self.max_length is not None and len(ids) >= self.max_length:
            raise FeedbackError(
                f"{self.name}: a judgment of {len(ids)} tokens and its answer exceed the model's {self.max_length} "
                f"positions (it begins {text[:40]!r}); shorten the completions, or take another judge or template"
            )
        return ids

    def _framed(self, text: str) -> str:
        if not self.in_chat:
            return text
        said = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not self.in_chat)["input_ids"])

    def _answer_tokens(self, text: str, words: tuple[str, str]) -> list[int]:
        """The one token each by which the model would write these words there."""
        framed, found = self._framed(text), []
        for word in words:
            answer = word if self.in_chat else f" {word}"
            before, after = self._ids(framed), self._ids(framed + answer)
            if after[:-1] != before:
                raise FeedbackError(
                    f"{self.path}: the answer {answer!r} is not one token of its tokenizer; give a template with other "
                    "answer words"
                )
            found.append(after[-1])
        if found[0] == found[1]:
            raise FeedbackError(f"{self.path}: {words[0]!r} and {words[1]!r} are the same token; give other words")
        return found


class RewardRater:
    """A reward as a rater: P(a preferred to b) = sigmoid(r_a - r_b) (Bradley-Terry), good where r is above 0."""

    interface = "reward-1"

    def __init__(self, reward: Reward, name: str = "reward") -> None:
        self.reward = reward
        self.name = name

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        check_asked(question, self.name)
        if question == "rank":
            return rank_by(self.preference, prompt, list(completions))
        return Answer(rating=int(self.reward([prompt], list(completions))[0] > 0))

    def preference(self, prompt: Prompt, a: Completion, b: Completion) -> float:
        """P(a is preferred to b)."""
        one, other = self.reward([prompt, prompt], [a, b])
        return 1 / (1 + math.exp(min(other - one, 700.0)))  # beyond that it is 0 in any case


def train_judge(
    model: ModelPath, judgments: pd.DataFrame, out: ModelPath, template: Template = PLAIN, **settings: Any
) -> str:
    """Fine-tune a causal LM to answer in `template` as raters did; `settings` go to `train.sft`. Returns `out`.

    Each pair of a ranking is two rows: one per order, so that no place is better than the other, or without
    `template.compare` the better one called good and the other not. Ratings are a row each. Raises FeedbackError where
    a row does not fit the model's positions.
    """
    rows = _as_rows(judgments, template)
    tokenizer, limit = load_tokenizer(model), max_length(model)
    in_chat = template.chat and tokenizer.chat_template is not None
    longest = max(len(tokenizer(text)["input_ids"]) for text, _ in rows) + 2  # the answer and EOS
    if limit is not None and longest > limit:
        raise FeedbackError(
            f"train_judge: a judgment of {longest} tokens exceeds the {limit} positions of {model}; leave out long "
            "completions, or give a shorter template"
        )
    if in_chat:
        texts: list[dict[str, Any]] = [
            {
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": word}],
            }
            for text, word in rows
        ]
    else:
        texts = [{"prompt": text, "completion": f" {word}"} for text, word in rows]
    train.sft(model, Dataset.from_list(texts), out, **{"max_length": limit, **settings})
    write_notes(out, judge=asdict(template))
    return str(out)


def _as_rows(judgments: pd.DataFrame, template: Template) -> list[tuple[str, str]]:
    """(text, answer word) of each judgment."""
    asked = set(judgments["question"])
    rows = []
    for pair in preferences(judgments) if "rank" in asked else ():
        prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
        if template.compare:
            rows.append((template.comparison(prompt, chosen, rejected, OVERALL.compare), template.choices[0]))
            rows.append((template.comparison(prompt, rejected, chosen, OVERALL.compare), template.choices[1]))
        else:
            rows.append((template.rating(prompt, chosen), template.verdicts[0]))
            rows.append((template.rating(prompt, rejected), template.verdicts[1]))
    for one in labels(judgments) if asked & {"good/bad", "1-7"} else ():
        word = template.verdicts[0] if one["label"] else template.verdicts[1]
        rows.append((template.rating(one["prompt"], one["completion"]), word))
    if not rows:
        raise FeedbackError("train_judge: there are no judgments to learn from; collect some with feedback.ask")
    return rows


def _on_grid(probabilities: torch.Tensor) -> list[float]:
    return [round(p * GRID) / GRID for p in probabilities.tolist()]


def _noted_template(model: ModelPath) -> Template | None:
    noted = read_notes(model).get("judge")
    if noted is None:
        return None
    pairs = {name: tuple(noted[name]) for name in ("choices", "verdicts")}
    return Template(**{**noted, **pairs})
