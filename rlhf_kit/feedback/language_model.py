"""Raters that are causal LMs on this machine, read at their answer token; fine-tuning one to judge."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from datasets import Dataset

from rlhf_kit import train
from rlhf_kit.feedback.constitution import Constitution
from rlhf_kit.feedback.converting import labels, preferences
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.model_rater import ModelRater
from rlhf_kit.feedback.templates import OVERALL, PLAIN, Template, principles_for
from rlhf_kit.models import (
    Model,
    ModelPath,
    load_causal,
    load_tokenizer,
    max_length,
    next_logprobs,
    read_notes,
    write_notes,
)


class LanguageModelRater(ModelRater):
    """A causal LM (directory or hub id) that is asked which of two completions is better, in both orders.

    P(preferred) is read off the log-probs of the two answer words (RLAIF, 2309.00267, section 2.1). The default
    `template` is the one that `train_judge` left in the directory, else PLAIN. Raises FeedbackError if an answer word
    is not one token, or if a text does not fit the model's positions.
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
        noted = None if template is not None else _noted_template(model)
        template = template or noted or PLAIN
        as_trained = noted is not None and constitution is None and principle is None
        principles = [OVERALL] if as_trained else principles_for(template, constitution, principle)
        super().__init__(name or f"lm:{model}", template, principles)
        self.path = str(model)
        self.batch_size = batch_size
        self.tokenizer = load_tokenizer(model)
        self.max_length = max_length(model)
        self.in_chat = template.chat and self.tokenizer.chat_template is not None
        self._load_in_4bit = load_in_4bit
        examples = {template.verdicts: template.rating("q", "a")}
        if template.compare:
            examples[template.choices] = template.comparison("q", "a", "b", "w")
        self._answer_tokens = {words: self._tokens_of(words, text) for words, text in examples.items()}

    @cached_property
    def model(self) -> Model:
        """The weights, loaded when they are first needed."""
        return load_causal(self.path, self._load_in_4bit)

    @torch.no_grad()
    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        rows = [self._encode(text) for text in texts]
        odds = torch.empty(len(rows))
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found = next_logprobs(self.model, [rows[row] for row in batch], self._answer_tokens[words])
            odds[batch] = (found[:, 0] - found[:, 1]).cpu()
        return odds.tolist()

    def _encode(self, text: str) -> list[int]:
        ids = self._ids(self._rendered(text))
        if self.max_length is not None and len(ids) >= self.max_length:
            raise FeedbackError(
                f"{self.name}: a judgment of {len(ids)} tokens and its answer exceed the model's {self.max_length} "
                f"positions (it begins {text[:40]!r}); shorten the completions, or take another judge or template"
            )
        return ids

    def _rendered(self, text: str) -> str:
        if not self.in_chat:
            return text
        chat = [{"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=not self.in_chat)["input_ids"])

    def _tokens_of(self, words: tuple[str, str], text: str) -> list[int]:
        """The one token by which the model would write each of two words after a text."""
        rendered, found = self._rendered(text), []
        for word in words:
            answer = word if self.in_chat else f" {word}"
            before, after = self._ids(rendered), self._ids(rendered + answer)
            if after[:-1] != before or after[-1] in found:
                raise FeedbackError(
                    f"{self.path}: the answer {answer!r} is not one token of its tokenizer, or the same as the other "
                    "answer's; give a template with other answer words"
                )
            found.append(after[-1])
        return found


def train_judge(
    model: ModelPath, judgments: pd.DataFrame, out: ModelPath, template: Template = PLAIN, **settings: Any
) -> str:
    """Fine-tune a causal LM to answer in `template` as raters did; `settings` go to `train.sft`. Returns `out`.

    Each pair of a ranking becomes two rows, one per order, so that no place is better than the other; without
    `template.compare` they are the better completion as good and the other as bad. A rating is one row. Raises
    FeedbackError if there are no judgments, or if a row does not fit the model's positions.
    """
    tokenizer, limit = load_tokenizer(model), max_length(model)
    rows = _as_rows(judgments, template)
    longest = max(len(tokenizer(text)["input_ids"]) for text, _ in rows) + 2  # the answer and EOS
    if limit is not None and longest > limit:
        raise FeedbackError(
            f"train_judge: a judgment of {longest} tokens exceeds the {limit} positions of {model}; leave out long "
            "completions, or give a shorter template"
        )
    texts: list[dict[str, Any]] = [{"prompt": text, "completion": f" {word}"} for text, word in rows]
    if template.chat and tokenizer.chat_template is not None:
        roles = (("prompt", "user"), ("completion", "assistant"))
        texts = [
            {column: [{"role": role, "content": said}] for (column, role), said in zip(roles, row, strict=True)}
            for row in rows
        ]
    train.sft(model, Dataset.from_list(texts), out, **{"max_length": limit, **settings})
    write_notes(out, judge=asdict(template))
    return str(out)


def _as_rows(judgments: pd.DataFrame, template: Template) -> list[tuple[str, str]]:
    """(text, answer word) of each judgment."""
    asked, rows = set(judgments["question"]), []
    for pair in preferences(judgments) if "rank" in asked else ():
        prompt, chosen, rejected = pair["prompt"], pair["chosen"], pair["rejected"]
        if template.compare:
            rows.append((template.comparison(prompt, chosen, rejected, OVERALL.compare), template.choices[0]))
            rows.append((template.comparison(prompt, rejected, chosen, OVERALL.compare), template.choices[1]))
        else:
            rows.append((template.rating(prompt, chosen), template.verdicts[0]))
            rows.append((template.rating(prompt, rejected), template.verdicts[1]))
    for one in labels(judgments) if asked & {"good/bad", "1-7"} else ():
        rows.append((template.rating(one["prompt"], one["completion"]), template.verdicts[0 if one["label"] else 1]))
    if not rows:
        raise FeedbackError("train_judge: there are no judgments to learn from; collect some with feedback.ask")
    return rows


def _noted_template(model: ModelPath) -> Template | None:
    noted: dict[str, Any] | None = read_notes(model).get("judge")
    if noted is None:
        return None
    return Template(**{**noted, "choices": tuple(noted["choices"]), "verdicts": tuple(noted["verdicts"])})
