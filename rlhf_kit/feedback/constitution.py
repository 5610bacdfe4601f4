"""The words of AI feedback: principles to judge, criticise and revise by, templates of a judgment, reading a reply."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion

DEFAULT = Path(__file__).parent / "constitution.yaml"


@dataclass(frozen=True)
class Principle:
    """One principle: the question by which two answers are compared, and the requests for a critique and a revision.

    `weight` says how much it counts in a judgment. Raises FeedbackError for what is no text, or no weight above 0.
    """

    name: str
    compare: str
    critique: str
    revise: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        for key in ("name", "compare", "critique", "revise"):
            if not isinstance(getattr(self, key), str):
                raise FeedbackError(f"{key} is {getattr(self, key)!r}; write a sentence")
        if not 0 < self.weight < math.inf:
            raise FeedbackError(f"weight is {self.weight}; give a number above 0")


OVERALL = Principle("overall", "Which answer is better?", "", "")  # asked about where there is no constitution


def constitution(path: str | Path = DEFAULT) -> list[Principle]:
    """The principles in a YAML file `principles: [{name, compare, critique, revise, weight (default 1)}, ...]`.

    Bai et al. 2022 (2212.08073). Raises FeedbackError that names the file and the principle.
    """
    rules: list[Principle] = []
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["principles"]
        for row in rows:
            rules.append(Principle(**row))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, FeedbackError) as error:
        said = " ".join(str(error).split())
        raise FeedbackError(f"{path}, after {len(rules)} principles: is no constitution ({said})") from None
    if not rules or len({each.name for each in rules}) < len(rules):
        raise FeedbackError(f"{path}: a constitution has one principle or more, each with a name of its own")
    return rules


@dataclass(frozen=True)
class Template:
    """The words of a judgment; `{question}`, `{prompt}`, `{first}`, `{second}`, `{completion}` are filled in.

    choices: the answer words to `compare`, for the first and the second completion; verdicts: those to `rate`, yes and
    no. Without `compare` the model rates each completion of a pair alone, and the ratings are compared. chat: the text
    goes through the model's chat template if it has one; otherwise the answer follows the text after one space.
    """

    compare: str
    rate: str
    choices: tuple[str, str] = ("A", "B")
    verdicts: tuple[str, str] = ("yes", "no")
    chat: bool = True

    def comparison(self, prompt: Prompt, first: Completion, second: Completion, question: str) -> str:
        """The text that asks which of two completions is better."""
        texts = {"prompt": as_text(prompt), "first": as_text(first), "second": as_text(second)}
        return self.compare.format(question=question, **texts)

    def rating(self, prompt: Prompt, completion: Completion) -> str:
        """The text that asks whether a completion is good."""
        return self.rate.format(prompt=as_text(prompt), completion=as_text(completion))


PLAIN = Template(
    compare="You judge two answers to the same conversation.\n\n[Conversation]\n{prompt}\n\n[Answer A]\n{first}\n\n"
    "[Answer B]\n{second}\n\n{question} Reply with one letter, A or B.\nBetter answer:",
    rate="You judge an answer to a conversation.\n\n[Conversation]\n{prompt}\n\n[Answer]\n{completion}\n\n"
    "Is this a good answer? Reply with one word, yes or no.\nGood answer:",
)


def as_text(content: Prompt | Completion) -> str:
    """A prompt or completion as plain text; in a chat of several messages each line names the message's role."""
    if isinstance(content, str):
        return content.strip()
    if len(content) == 1:
        return content[0]["content"].strip()
    return "\n".join(f"{message['role'].capitalize()}: {message['content'].strip()}" for message in content)


def read_reply(reply: str, words: tuple[str, str]) -> int | None:
    """Which of two answer words a reply is, 0 or 1; None for anything else, because a guess is no judgment."""
    either = "|".join(map(re.escape, words))
    found = re.fullmatch(rf"\W*(?:(?:better )?answer\W+)?({either})\W*", reply.strip(), re.IGNORECASE)
    return [word.lower() for word in words].index(found[1].lower()) if found else None
