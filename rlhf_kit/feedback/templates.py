"""How a question is put to a language model in words, and how its reply is read."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf_kit.feedback.constitution import Constitution, Principle, constitution
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion

OVERALL = Principle("overall", "Which answer is better?", "", "")  # asked about where there is no constitution


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


def principles_for(template: Template, rules: Constitution | None, principle: str | None) -> list[Principle]:
    """The principles to ask about: the named one, or all; [OVERALL] if the template has no place for a question."""
    if "{question}" not in template.compare:
        if principle is not None:
            raise FeedbackError(f"principle {principle!r}: the template has no {{question}} to ask about it")
        return [OVERALL]
    rules = rules or constitution()
    return list(rules.principles) if principle is None else [rules[principle]]


def read_reply(reply: str, words: tuple[str, str]) -> int | None:
    """Which of two answer words a reply is, 0 or 1; None for anything else, because a guess is no judgment."""
    either = "|".join(map(re.escape, words))
    found = re.fullmatch(rf"\W*(?:(?:better )?answer\W+)?({either})\W*", reply.strip(), re.IGNORECASE)
    return [word.lower() for word in words].index(found[1].lower()) if found else None
