"""Items, questions, answers and the raters who give them; a judgment as a row of a frame."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal, Protocol, get_args

import pandas as pd

from rlhf_kit.models import Prompt, plain
from rlhf_kit.rewards import Completion

Question = Literal["rank", "good/bad", "1-7"]
SCALES: dict[Question, range] = {"good/bad": range(2), "1-7": range(1, 8)}  # of ratings; good is 1, bad 0
STRENGTHS = ("slightly", "clearly", "much")  # how much better the preferred one of a pair is
MOST = 9  # completions of one ranking: each has a key

# Columns of the frames of judgments that `ask` and `Store.judgments` return, a row each. `judgment` is a number that
# grows with time. `ranks` are of the item's completions in its own order, 1 the best; None: a rating, or skipped.
# `rating` is NaN for a ranking, or skipped. `shown[place]` is the index of the completion at that place of the page.
# `interface` says where the judgment was given, `time` when (UTC, ISO 8601). `columns` hold what else the item has.
COLUMNS = ["judgment", "item", "rater", "question", "ranks", "rating", "strength", "note", "shown", "seconds"]
COLUMNS += ["interface", "time", "withdrawn", "prompt", "completions", "columns"]


class FeedbackError(ValueError):
    """Feedback that cannot be asked for, kept or read; the message says what to do."""


@dataclass(frozen=True)
class Item:
    """A prompt with one completion to rate, or 2 to 9 different ones to rank; `columns` hold what else is known of it.

    Raises FeedbackError where one is neither a text nor a chat, or where completions are equal or too many.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    columns: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for place, each in enumerate((self.prompt, *self.completions)):
            if not _is_text(each) or (place == 0 and not str(each).strip()):
                what = f"completion {place - 1}" if place else "prompt"
                raise FeedbackError(f"{self}: {what} is missing ({each!r:.80}); give a text or a chat of text")
        n, equal = len(self.completions), len(self.completions) - len(set(map(canonical, self.completions)))
        if not 1 <= n <= MOST or equal:
            raise FeedbackError(f"{self}: has {n} completions, {equal} equal; give 1 to {MOST} different")

    @cached_property
    def id(self) -> str:
        """A hash of the content: the same prompt and completions in the same order have the same id everywhere."""
        return hashlib.sha256(canonical([self.prompt, *self.completions]).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        return f"item {str(self.prompt)[:60]!r}"


def _is_text(cell: Any) -> bool:
    """Whether it is a text of whole characters, or a chat: messages with a role and a text, or with parts of text."""
    try:
        json.dumps(cell, ensure_ascii=False).encode()
        chat = [] if isinstance(cell, str) else [each["role"] and each["content"] for each in plain(cell)]
    except (TypeError, ValueError, KeyError, AttributeError):
        return False
    return isinstance(cell, str) or (cell != [] and all(isinstance(content, str | None) for content in chat))


def check_rater(name: str, note: str = "") -> None:
    """FeedbackError for a rater without a name, and for half a character in it or in the note."""
    if not name.strip() or not _is_text(name + note):
        said = "half a character in it or the note" if name.strip() else "give one, such as rater='ana'"
        raise FeedbackError(f"a judgment needs a rater's name, not {name!r}: {said}")


@dataclass(frozen=True)
class Answer:
    """A rater's answer: ranks (1 the best, equal ones tie), or a rating; neither means skipped.

    Ranks follow the order in which completions were shown. Raises FeedbackError for what no question asks.
    """

    ranks: tuple[int, ...] | None = None
    rating: int | None = None
    strength: str | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.ranks is not None and self.rating is not None:
            raise FeedbackError("an answer has ranks or a rating, not both")
        if self.strength is not None and (self.strength not in STRENGTHS or len(set(self.ranks or ())) != 2):
            raise FeedbackError(f"strength {self.strength!r}: it is one of {STRENGTHS}, of a pair that is no tie")

    def check(self, question: Question, n: int) -> None:
        """FeedbackError unless this answers `question` about `n` completions; a skip answers every question."""
        if self.ranks is None and self.rating is None:
            return
        if question != "rank":
            scale = SCALES[question]
            if self.rating not in scale:
                raise FeedbackError(f"rating {self.rating}: {question} is a number from {scale[0]} to {scale[-1]}")
        elif not (self.ranks and len(self.ranks) == n and set(self.ranks) <= {*range(1, n + 1)}):
            raise FeedbackError(f"ranks {self.ranks}: a ranking of {n} completions is {n} numbers from 1 to {n}")


class Rater(Protocol):
    """Judges completions of one prompt, shown in this order: a simulated person, a language model, a person.

    It may also have an `interface` (a name for the judgments), `timed = False` (they hold no seconds) and `slow = True`
    (`ask` prints the time left).
    """

    name: str

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer: ...


def dense_ranks(scores: Sequence[float]) -> tuple[int, ...]:
    """Ranks of scores, the highest 1; equal scores tie and leave no gap: (3, 9, 3) -> (2, 1, 2)."""
    levels = sorted(set(scores), reverse=True)
    return tuple(levels.index(score) + 1 for score in scores)


def check_question(question: str, items: Sequence[Item]) -> None:
    """FeedbackError for an unknown question, or an item that it cannot be asked of."""
    if question not in get_args(Question):
        raise FeedbackError(f"question {question!r}: there are {', '.join(get_args(Question))}")
    for item in items:
        if (question == "rank") != (len(item.completions) > 1):
            needs = "two or more completions" if question == "rank" else "one completion"
            raise FeedbackError(f"{item}: has {len(item.completions)}; {question!r} asks about {needs}")


def as_row(
    item: Item,
    rater: str,
    question: Question,
    answer: Answer,
    shown: Sequence[int],
    seconds: float | None,
    interface: str,
) -> dict[str, Any]:
    """A judgment made now as a row of COLUMNS, not numbered yet; FeedbackError where these do not fit each other."""
    check_rater(rater, answer.note)
    answer.check(question, len(item.completions))
    if sorted(shown) != list(range(len(item.completions))):
        raise FeedbackError(f"shown {tuple(shown)}: it must name each of {len(item.completions)} completions once")
    ranks = None if answer.ranks is None else [answer.ranks[shown.index(i)] for i in range(len(shown))]
    said = (ranks, answer.rating, answer.strength, answer.note, list(shown), seconds, interface, now())
    known = (False, item.prompt, list(item.completions), dict(item.columns))
    return dict(zip(COLUMNS, (0, item.id, rater, question, *said, *known), strict=True))


def judgments_frame(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of COLUMNS as a frame, with the same types whether they come from memory or from a store."""
    frame = pd.DataFrame([dict(row) for row in rows], columns=COLUMNS, dtype=object)  # keeps None as None
    return frame.astype({"judgment": int, "rating": float, "seconds": float, "withdrawn": bool})


def now() -> str:
    """The time, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def canonical(value: Any) -> str:
    """Equal values as one and the same JSON text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
