"""Constitutional AI (Bai et al. 2022, 2212.08073): principles, the words of a judgment, critique and revision."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from datasets import Dataset

from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion

Writer = Callable[[Sequence[Prompt]], list[str]]  # a text for each prompt
DEFAULT = Path(__file__).parent / "constitution.yaml"


@dataclass(frozen=True)
class Principle:
    """A question by which two answers are compared, requests for a critique and a revision, and how much it counts."""

    name: str
    compare: str
    critique: str
    revise: str
    weight: float = 1.0


OVERALL = Principle("overall", "Which answer is better?", "", "")  # asked about where there is no constitution


def constitution(path: str | Path = DEFAULT) -> list[Principle]:
    """The principles in a YAML file `principles: [{name, compare, critique, revise, weight (default 1)}, ...]`.

    Raises FeedbackError that names the file, the principle and the fault.
    """
    rules: list[Principle] = []
    try:
        for row in yaml.safe_load(Path(path).read_text(encoding="utf-8"))["principles"]:
            rules.append(Principle(**row))
            *texts, weight = astuple(rules[-1])
            if not all(isinstance(text, str) for text in texts) or not 0 < weight < math.inf:
                raise TypeError(f"{rules.pop()} needs texts, and a weight above 0")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise FeedbackError(f"{path}, after {len(rules)} principles: is no constitution ({said})") from None
    if not rules or len({each.name for each in rules}) < len(rules):
        raise FeedbackError(f"{path}: a constitution has one principle or more, each with a name of its own")
    return rules


@dataclass(frozen=True)
class Template:
    """The words of a judgment; `{question}`, `{prompt}`, `{first}`, `{second}`, `{completion}` are filled in.

    `choices` answer `compare`, `verdicts` answer `rate`. Without `compare` the model rates each completion of a pair
    alone, and the ratings are compared. chat: ask through the model's chat template if it has one; otherwise the answer
    follows the text after one space.
    """

    compare: str
    rate: str
    choices: tuple[str, str] = ("A", "B")
    verdicts: tuple[str, str] = ("yes", "no")
    chat: bool = True

    def comparison(self, prompt: Prompt, first: Completion, second: Completion, question: str) -> str:
        texts = {"prompt": as_text(prompt), "first": as_text(first), "second": as_text(second)}
        return self.compare.format(question=question, **texts)

    def rating(self, prompt: Prompt, completion: Completion) -> str:
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
    first, second = map(re.escape, words)
    found = re.fullmatch(rf"\W*(?:(?:better )?answer\W+)?(?:({first})|({second}))\W*", reply.strip(), re.IGNORECASE)
    return int(found[2] is not None) if found else None


def critique_and_revise(
    write: Writer, answers: pd.DataFrame, rules: Sequence[Principle] | None = None, rounds: int = 1, seed: int = 0
) -> pd.DataFrame:
    """A row per answer and round: its `answer`, the `principle` drawn, the `critique` asked for and the `revision`.

    Each round draws a principle by weight, shows the model the prompt and the answer as a chat, and asks for a
    critique, then for a revision, which is the next round's answer (section 3.1). `write` returns a text for each chat,
    such as `EndpointRater.replies`. `answers` has `prompt, completion`; other columns are carried. An empty revision
    leaves the answer as it was; a warning counts these.
    """
    rules = rules or constitution()
    weights = np.array([principle.weight for principle in rules])
    given, parts, empty = [as_text(completion) for completion in answers["completion"]], [], 0
    carried = answers.drop(columns="completion").assign(row=range(len(answers)))
    for number in range(1, rounds + 1):
        generator = np.random.default_rng([seed, 10, number])
        principles = [rules[k] for k in generator.choice(len(rules), len(answers), p=weights / weights.sum())]
        chats = [
            [*as_chat("user", prompt), *as_chat("assistant", answer), *as_chat("user", principle.critique)]
            for prompt, answer, principle in zip(answers["prompt"], given, principles, strict=True)
        ]
        critiques = [text.strip() for text in write(chats)]
        chats = [
            [*chat, *as_chat("assistant", critique), *as_chat("user", principle.revise)]
            for chat, critique, principle in zip(chats, critiques, principles, strict=True)
        ]
        revisions = [text.strip() for text in write(chats)]
        empty += revisions.count("")
        made = {"principle": [principle.name for principle in principles], "answer": given, "critique": critiques}
        given = [text or answer for text, answer in zip(revisions, given, strict=True)]
        parts.append(carried.assign(round=number, **made, revision=given))
    if empty:
        note = f"{empty} of {rounds * len(answers)} revisions were empty; those answers stayed as they were"
        warnings.warn(note, stacklevel=2)
    return pd.concat(parts, ignore_index=True)


def as_demonstrations(frame: pd.DataFrame) -> Dataset:
    """`prompt, completion` of each answer's last revision, for `train.sft`; completions of texts begin with a space."""
    last = frame.sort_values(["row", "round"]).drop_duplicates("row", keep="last")
    rows = []
    for prompt, text in zip(last["prompt"], last["revision"], strict=True):
        completion = f" {text}" if isinstance(prompt, str) else as_chat("assistant", text)
        rows.append({"prompt": prompt, "completion": completion})
    return Dataset.from_list(rows)


def as_chat(role: str, content: Prompt) -> list[dict[str, str]]:
    """A text as a chat of one message; a chat as it is."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)
