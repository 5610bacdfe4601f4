"""Raters that are language models, here or (endpoint.py) elsewhere; fine-tuning one to judge."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from scipy.special import expit

from rlhf_kit import models, train
from rlhf_kit.feedback.collecting import labels, preferences
from rlhf_kit.feedback.constitution import OVERALL, PLAIN, Principle, Template, as_chat, constitution
from rlhf_kit.feedback.judging import STRENGTHS, Answer, FeedbackError, Question, dense_ranks
from rlhf_kit.models import Model, ModelPath, Prompt
from rlhf_kit.models.rendering import render
from rlhf_kit.rewards import Completion, Reward

Rules = Sequence[Principle] | None  # None: the default constitution
STEPS = (0.7, 0.9)  # P(preferred) from which a preference is clear, and from which it is strong


class ModelRater(ABC):
    """A language model that rates: it sees each pair in both orders, so that a liking for a place cancels.

    It is asked about each principle of the `rules`, or the one named; [OVERALL] if the template has no place for
    a question. A number is NaN, and a judgment is skipped, where the model gives none of the answer words.
    """

    slow = True

    def __init__(self, name: str, template: Template, rules: Rules = None, principle: str | None = None) -> None:
        self.name, self.template = name, template
        self.firsts: list[float] = []  # of each comparison: P(the one shown first), over both orders and all principles
        self.why_skipped = ""  # the note of a skipped judgment
        rules = (rules or constitution()) if "{question}" in template.compare else [OVERALL]
        self.principles = [each for each in rules if principle in (None, each.name)]
        if not self.principles:
            known = ", ".join(each.name for each in rules)
            raise FeedbackError(f"principle {principle!r}: is not asked about; the principles are {known}")

    @abstractmethod
    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        """log P(first word) - log P(second word) of the model's answer to each text."""

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        if question == "1-7":
            raise FeedbackError(f"{self.name}: a language model ranks or rates good/bad; the scale '1-7' is for people")
        if question == "rank":
            return self._rank(prompt, completions)
        [odds] = self.good_odds([prompt], completions)
        if math.isnan(odds):
            return Answer(note=self.why_skipped)
        return Answer(rating=int(odds > 0), note=f"P(yes) {expit(odds):.4f}")

    def preferences(self, prompts: Sequence[Prompt], a: Sequence[Completion], b: Sequence[Completion]) -> list[float]:
        """P(a is preferred to b) = 1 - P(b is preferred to a) of each row, the mean over principles by their weight."""
        # A row's rounding depends on its batch, so a pair is always asked in the same order, whichever of them is `a`.
        pairs = [sorted(pair, key=str) for pair in zip(a, b, strict=True)]
        one, other = ([pair[side] for pair in pairs] for side in (0, 1))
        if self.template.compare:
            p = self._compare(prompts, one, other)
        else:
            odds = np.reshape(self.good_odds([*prompts, *prompts], [*one, *other]), (2, -1))
            p = expit(odds[0] - odds[1])
        p = np.where([pair[0] == pair[1] for pair in pairs], 0.5, p)
        return np.where([first == pair[0] for first, pair in zip(a, pairs, strict=True)], p, 1 - p).tolist()

    def good_odds(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        """log P(yes) - log P(no) to whether each completion is good."""
        texts = [self.template.rating(prompt, each) for prompt, each in zip(prompts, completions, strict=True)]
        return self._log_odds(texts, self.template.verdicts)

    def as_reward(self) -> Reward:
        """The judge as a reward: the log-odds that a completion is good (RLAIF, 2309.00267, section 2.2)."""

        def judge(prompts: list[Prompt], completions: list[Completion], **columns: Any) -> list[float]:
            return self.good_odds(prompts, completions)

        return judge

    def _compare(self, prompts: Sequence[Prompt], a: list[Completion], b: list[Completion]) -> np.ndarray:
        texts = [
            self.template.comparison(prompt, *shown, principle.compare)
            for prompt, first, second in zip(prompts, a, b, strict=True)
            for principle in self.principles
            for shown in ((first, second), (second, first))
        ]
        first_wins = expit(self._log_odds(texts, self.template.choices)).reshape(len(prompts), len(self.principles), 2)
        self.firsts += [p for p in first_wins.mean((1, 2)).tolist() if not math.isnan(p)]
        weights = np.array([principle.weight for principle in self.principles])
        return (first_wins[..., 0] + 1 - first_wins[..., 1]) / 2 @ (weights / weights.sum())

    def _rank(self, prompt: Prompt, completions: Sequence[Completion]) -> Answer:
        """Ranks by the mean probability of being preferred to another; the note holds it, RLAIF's soft label."""
        n, mean = len(completions), [0.0] * len(completions)
        places = list(combinations(range(n), 2))
        a, b = zip(*combinations(completions, 2), strict=True)
        for (i, j), p in zip(places, self.preferences([prompt] * len(places), a, b), strict=True):
            mean[i] += p / (n - 1)
            mean[j] += (1 - p) / (n - 1)
        if any(map(math.isnan, mean)):
            return Answer(note=self.why_skipped)
        ranks = dense_ranks([round(p, 9) for p in mean])  # sums in another order differ by rounding
        untied_pair = n == 2 and ranks != (1, 1)
        strength = STRENGTHS[sum(max(mean) >= step for step in STEPS)] if untied_pair else None
        return Answer(ranks=ranks, strength=strength, note="preferred " + " ".join(f"{p:.4f}" for p in mean))


class LanguageModelRater(ModelRater):
    """A causal LM (directory or hub id) as a rater, by the log-probs of the answer words (RLAIF, 2309.00267, 2.1).

    The default `template` is the one that `train_judge` left in the directory, else PLAIN. Raises FeedbackError if an
    answer word is not one token, or if a text does not fit the model's positions. loading: as of `models.load_causal`.
    """

    interface = "language-model-1"

    def __init__(
        self,
        model: ModelPath,
        constitution: Rules = None,
        principle: str | None = None,
        template: Template | None = None,
        name: str | None = None,
        batch_size: int = 32,
        **loading: Any,
    ) -> None:
        noted = models.read_notes(model).get("judge")
        if template is None and noted is not None:
            words = {name: tuple(noted[name]) for name in ("choices", "verdicts")}  # JSON has made lists of them
            template = Template(**noted | words)
            constitution = constitution or (None if principle else [OVERALL])  # as it was trained
        super().__init__(name or f"lm:{model}", template or PLAIN, constitution, principle)
        self.path, self.batch_size, self._loading = str(model), batch_size, loading
        self.tokenizer, self.max_length = models.load_tokenizer(model), models.max_length(model)
        self.in_chat = self.template.chat and self.tokenizer.chat_template is not None
        examples = {self.template.verdicts: self.template.rating("q", "a")}
        if self.template.compare:
            examples[self.template.choices] = self.template.comparison("q", "a", "b", "w")
        self._answer_tokens = {words: self._tokens_of(words, text) for words, text in examples.items()}

    @cached_property
    def model(self) -> Model:
        """The weights, loaded when they are first needed."""
        return models.load_causal(self.path, **self._loading)

    @torch.no_grad()
    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        if not texts:
            return []
        rows = models.encode(self.tokenizer, [self._prompt(text) for text in texts])
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))  # the longest first
        longest = len(rows[order[0]])
        if self.max_length is not None and longest >= self.max_length:
            said = f"a judgment of {longest} tokens and its answer exceed the model's {self.max_length} positions"
            mend = "shorten the completions, or change judge or template"
            raise FeedbackError(f"{self.name}: {said} (it begins {texts[order[0]][:40]!r}); {mend}")
        odds = torch.empty(len(rows))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found = models.next_logprobs(self.model, [rows[row] for row in batch], self._answer_tokens[words])
            odds[batch] = (found[:, 0] - found[:, 1]).cpu()
        return odds.tolist()

    def _prompt(self, text: str) -> Prompt:
        return as_chat("user", text) if self.in_chat else text

    def _tokens_of(self, words: tuple[str, str], text: str) -> list[int]:
        """The one token by which the model would write each of two words after a text."""
        before = render(self.tokenizer, self._prompt(text))
        answered = [before, *(before + (word if self.in_chat else f" {word}") for word in words)]
        asked, first, second = self.tokenizer(answered, add_special_tokens=not self.in_chat)["input_ids"]
        if not first[:-1] == second[:-1] == asked or first == second:
            said = f"the answers {words} are not two single tokens of its tokenizer"
            raise FeedbackError(f"{self.path}: {said}; give a template with other answer words")
        return [first[-1], second[-1]]


def train_judge(
    model: ModelPath, judgments: pd.DataFrame, out: ModelPath, template: Template = PLAIN, **settings: Any
) -> str:
    """Fine-tune a causal LM to answer in `template` as raters did; `settings` go to `train.sft`. Returns `out`.

    A pair is compared in both orders, so that no place is better than the other. Without `template.compare` its better
    completion is good and the other is bad. Raises FeedbackError where there are no judgments, or one is too long.
    """
    tokenizer, limit = models.load_tokenizer(model), models.max_length(model)
    in_chat = template.chat and tokenizer.chat_template is not None
    prompts, completions = [], []
    for text, word in _as_rows(judgments, template):
        prompts.append(as_chat("user", text) if in_chat else text)
        completions.append(as_chat("assistant", word) if in_chat else f" {word}")
    longest = max(map(len, models.encode(tokenizer, prompts, completions)))
    if limit is not None and longest > limit:
        said = f"a judgment of {longest} tokens exceeds the {limit} positions of {model}"
        raise FeedbackError(f"train_judge: {said}; leave out long completions, or give a shorter template")
    rows = Dataset.from_dict({"prompt": prompts, "completion": completions})
    train.sft(model, rows, out, **{"max_length": limit, **settings})
    models.write_notes(out, judge=asdict(template))
    return str(out)


def _as_rows(judgments: pd.DataFrame, template: Template) -> list[tuple[str, str]]:
    """(text, answer word) of each judgment."""
    asked = set(judgments["question"])
    rows: list[tuple[str, str]] = []
    for pair in preferences(judgments) if "rank" in asked else ():
        orders = (pair["chosen"], pair["rejected"]), (pair["rejected"], pair["chosen"])
        for order, choice, verdict in zip(orders, template.choices, template.verdicts, strict=True):
            if template.compare:
                rows.append((template.comparison(pair["prompt"], *order, OVERALL.compare), choice))
            else:
                rows.append((template.rating(pair["prompt"], order[0]), verdict))
    for one in labels(judgments) if asked - {"rank"} else ():
        rows.append((template.rating(one["prompt"], one["completion"]), template.verdicts[0 if one["label"] else 1]))
    if not rows:
        raise FeedbackError("train_judge: there are no judgments to learn from; collect some with feedback.ask")
    return rows
