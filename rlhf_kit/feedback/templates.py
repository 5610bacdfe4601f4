"""How a question is put to a language model in words, and how preferences between pairs become a rater's answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

from rlhf_kit.feedback.constitution import Constitution, Principle, constitution
from rlhf_kit.feedback.judging import Answer, FeedbackError, Question, dense_ranks
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion

# P(preferred) from which a preference is clear, and from which it is strong.
STEPS = (0.7, 0.9)
OVERALL = Principle("overall", "Which answer is better?", "", "")  # where no principle is asked about


@dataclass(frozen=True)
class Template:
    """The words of a judgment; `{question}`, `{prompt}`, `{first}`, `{second}`, `{completion}` are filled in.

    choices: the one-word answers to `compare`, first and second; verdicts: those to `rate`, yes and no. Without
    `compare` each completion of a pair is rated alone, and the odds are compared. chat: goes through the model's chat
    template where it has one; otherwise an answer follows the text after one space.
    """

    compare: str
    rate: str
    choices: tuple[str, str] = ("A", "B")
    verdicts: tuple[str, str] = ("yes", "no")
    chat: bool = True

    def comparison(self, prompt: Prompt, first: Completion, second: Completion, question: str) -> str:
        """The text that asks which of two completions is better."""
        said = {"first": spoken(first), "second": spoken(second)}
        return self.compare.format(question=question, prompt=spoken(prompt), **said)

    def rating(self, prompt: Prompt, completion: Completion) -> str:
        """The text that asks whether a completion is good."""
        return self.rate.format(prompt=spoken(prompt), completion=spoken(completion))


PLAIN = Template(
    compare="You judge two answers to the same conversation.\n\n[Conversation]\n{prompt}\n\n[Answer A]\n{first}\n\n"
    "[Answer B]\n{second}\n\n{question} Reply with one letter, A or B.\nBetter answer:",
    rate="You judge an answer to a conversation.\n\n[Conversation]\n{prompt}\n\n[Answer]\n{completion}\n\n"
    "Is this a good answer? Reply with one word, yes or no.\nGood answer:",
)


def spoken(text: Prompt | Completion) -> str:
    """A prompt or completion as plain text: of a chat of several messages each line says whose it is."""
    if isinstance(text, str):
        return text.strip()
    if len(text) == 1:
        return text[0]["content"].strip()
    return "\n".join(f"{message['role'].capitalize()}: {message['content'].strip()}" for message in text)


def questions(template: Template, rules: Constitution | None, principle: str | None) -> list[Principle]:
    """The principles that are asked about: one by name, else all, else (the template has no place for them) none."""
    if "{question}" not in template.compare:
        if principle is not None:
            raise FeedbackError(f"principle {principle!r}: the template has no {{question}} to ask about it")
        return [OVERALL]
    rules = rules or constitution()
    return list(rules.principles) if principle is None else [rules[principle]]


def read_reply(reply: str, words: tuple[str, str]) -> int | None:
    """Which of two answer words a reply is, 0 or 1; None where it is anything else, for a guess is no judgment."""
    either = "|".join(map(re.escape, words))
    found = re.fullmatch(rf"\W*(?:(?:better )?answer\W+)?({either})\W*", reply.strip(), re.IGNORECASE)
    return [word.lower() for word in words].index(found[1].lower()) if found else None


def rank_by(
    preference: Callable[[Prompt, Completion, Completion], float], prompt: Prompt, completions: list[Completion]
) -> Answer:
    """Ranks by the mean probability of being preferred to each of the others; of a pair also its strength.

    The note holds that probability of each completion, the soft label of RLAIF (2309.00267, section 2.1).
    """
    n = len(completions)
    mean = [0.0] * n
    for a, b in combinations(range(n), 2):
        p = preference(prompt, completions[a], completions[b])
        mean[a] += p / (n - 1)
        mean[b] += (1 - p) / (n - 1)
    ranks = dense_ranks([round(p, 9) for p in mean])  # sums in another order differ by rounding
    strength = None
    if n == 2 and ranks != (1, 1):
        strength = ("slightly", "clearly", "much")[sum(max(mean) >= step for step in STEPS)]
    return Answer(ranks=ranks, strength=strength, note="preferred " + " ".join(f"{p:.4f}" for p in mean))


def check_asked(question: Question, name: str) -> None:
    """FeedbackError for a scale that no yes and no can answer."""
    if question == "1-7":
        raise FeedbackError(f"{name}: a language model is asked to rank or for good/bad here; '1-7' is for people")
