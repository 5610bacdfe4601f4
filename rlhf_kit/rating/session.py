"""What is behind the rating page: which item comes next, in which order it is shown, and how far the rater is."""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from rlhf_kit.feedback import STRENGTHS, Answer, FeedbackError, Item, Question, Showing, Store
from rlhf_kit.feedback.collecting import draw_order
from rlhf_kit.feedback.converting import rows_of
from rlhf_kit.feedback.judging import check_question

RECENT = 20  # judgments whose median time makes the pace: a coffee break among them changes little
MOST_TEXT = 10_000  # characters of a note


class Judged(NamedTuple):
    """A judgment of this rater that counts."""

    judgment: int
    item: str
    shown: tuple[int, ...]
    skipped: bool


class Session:
    """One rater's way through items: `state` is what the page shows, `act` what the page asks for.

    Where this rater stopped before, it goes on, with the same item in the same order; what this rater has judged is not
    asked again, but for `repeats` of the items, drawn by the seed, which come a second time after all others, their
    completions in the reverse order. It moves on only when the store has the judgment on the disk. The page is told
    neither the items' columns nor which completion is which. Raises FeedbackError for a question that the items do not
    fit, and for more repeats than items.
    """

    def __init__(
        self,
        store: Store,
        items: Sequence[Item],
        rater: str,
        question: Question = "rank",
        seed: int = 0,
        interface: str = "page",
        repeats: int = 0,
    ) -> None:
        if not items:
            raise FeedbackError("rate: there are no items to judge")
        if not rater.strip():
            raise FeedbackError("a judgment needs a rater's name; give one, such as rater='ana'")
        check_question(question, items)
        self.store, self.rater, self.question, self.seed = store, rater, question, seed
        self.items = {item.id: item for item in items}
        if not 0 <= repeats <= len(self.items):
            raise FeedbackError(f"rate: repeats={repeats}, but there are {len(self.items)} different items")
        once = list(self.items.values())
        again = np.random.default_rng([seed, 12]).permutation(len(once))[:repeats]
        self.asked = once + [once[i] for i in sorted(again)]
        self.interface = f"{interface}, rlhf-kit {version('rlhf-kit')}"
        self.made: set[int] = set()  # judgments of this session that count
        self._error: str | None = None
        self._turn = 0
        self._seconds: list[float] = []
        self._history: list[Judged] = []
        self._showing: Showing | None = None
        self._started: float | None = None
        self._lock = threading.RLock()
        store.add(items)
        self._resume()

    # What the page shows -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What the page needs, as plain JSON; `turn` grows with each action, so that a page sees its answer."""
        with self._lock:
            showing, total = self._showing, len(self.asked)
            done = total - len(self._pending())
            if showing is not None and self._started is None:
                self._started = time.monotonic()  # the page asks for the item: its time runs
            pace = median(self._seconds[-RECENT:]) if self._seconds else None
            return {
                "turn": self._turn,
                "showing": showing and showing.showing,
                "question": self.question,
                "prompt": _turns(showing.item.prompt) if showing else [],
                "completions": [_turns(showing.item.completions[i]) for i in showing.shown] if showing else [],
                "strengths": list(STRENGTHS),
                "position": min(done + 1, total),
                "judged": done,
                "skipped": sum(each.skipped for each in self._history),
                "total": total,
                "done": showing is None,
                "per_minute": pace and 60 / max(pace, 0.1),
                "seconds_left": pace and pace * (total - done),
                "can_undo": bool(self._history),
                "rater": self.rater,
                "error": self._error,
            }

    def act(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a page asks for, `{"do": "answer" | "skip" | "undo" | "look", "showing": number, ...}`.

        Returns the state after it. What cannot be done is in its `error`, and the rest is then what the store says.
        """
        with self._lock:
            self._turn += 1
            self._error = None
            try:
                self._do(message)
            except (FeedbackError, sqlite3.Error) as error:
                self._error = str(error)
                try:
                    self._resume()
                except (FeedbackError, sqlite3.Error) as unreadable:
                    self._error = f"{self._error}; the store cannot be read ({unreadable})"
            return self.state()

    def _do(self, message: Mapping[str, Any]) -> None:
        do, showing, note = message.get("do"), message.get("showing"), message.get("note", "")
        if not isinstance(note, str) or len(note) > MOST_TEXT:
            raise FeedbackError(f"not recorded: a note is a text of up to {MOST_TEXT:,} characters; shorten it")
        if do == "answer":
            ranks, rating = message.get("ranks"), message.get("rating")
            numbers = ranks if isinstance(ranks, list) else [rating]
            if not all(type(number) is int for number in numbers):
                raise FeedbackError("not recorded: an answer has ranks or a rating, in whole numbers; reload the page")
            ranks = tuple(ranks) if isinstance(ranks, list) else None
            self.answer(showing, Answer(ranks, rating, message.get("strength"), note))
        elif do == "skip":
            self.skip(showing, note)
        elif do == "undo":
            self.undo(showing)
        elif do == "look":
            self._resume()
        else:
            raise FeedbackError(f"the page asked for {do!r}, which is not known here; reload the page")

    # What the rater does -------------------------------------------------------------------------------------------

    def answer(self, showing: int | None, answer: Answer) -> None:
        """Keep an answer to the item on the page; FeedbackError, and nothing kept, if `showing` is not that item."""
        with self._lock:
            open_now = self._check_open(showing)
            if open_now is None:
                raise FeedbackError("not recorded: everything is judged already")
            seconds = time.monotonic() - (self._started or time.monotonic())
            try:
                before = sum(each.item == open_now.item.id for each in self._history)
                judgment = self.store.record(open_now.showing, self.rater, answer, seconds, self.interface, before)
            except FeedbackError:
                self._resume()
                if self._showing is open_now:
                    raise  # the answer is at fault
                raise FeedbackError(f"nothing was recorded: {self._elsewhere}; this item is open now") from None
            self._history.append(Judged(judgment, open_now.item.id, open_now.shown, answer.skipped))
            self._seconds.append(seconds)
            self.made.add(judgment)
            self._next()

    def skip(self, showing: int | None, note: str = "") -> None:
        """Leave the item on the page without a judgment; that it was skipped is kept."""
        self.answer(showing, Answer(note=note))

    def undo(self, showing: int | None) -> None:
        """Take this rater's last judgment back, and show its item again in the same order."""
        with self._lock:
            self._check_open(showing)
            before = self._history
            self._history = self._judged()
            if [each.judgment for each in before] != [each.judgment for each in self._history]:
                raise FeedbackError(f"nothing was taken back: {self._elsewhere}; this item is open now")
            if not self._history:
                raise FeedbackError("there is no judgment to take back")
            last = self._history[-1]
            self.store.withdraw(last.judgment, self.rater)
            self._history.pop()
            self.made.discard(last.judgment)
            del self._seconds[-1:]
            self._show(self.items[last.item], last.shown)

    @property
    def _elsewhere(self) -> str:
        return f"{self.rater} has gone on in another tab or cell"

    def _check_open(self, showing: int | None) -> Showing | None:
        number = self._showing.showing if self._showing else None
        if showing != number or isinstance(showing, bool):
            raise FeedbackError("nothing was recorded: that page was out of date; this is the item that is open now")
        return self._showing

    # Where the rater is --------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Take everything from the store: what is judged, and what was shown last and not answered."""
        self._history = self._judged()
        last = self.store.open_showing(self.rater, self.question)
        if last is not None and last.item.id in {item.id for item in self._pending()}:
            if self._showing is None or last.showing != self._showing.showing:
                self._showing, self._started = last, None
        else:
            self._next()

    def _judged(self) -> list[Judged]:
        found = self.store.judgments()
        found = found[(found["rater"] == self.rater) & (found["question"] == self.question)]
        return [
            Judged(
                row["judgment"],
                row["item"],
                tuple(row["shown"]),
                row["ranks"] is None and row["rating"] != row["rating"],
            )
            for row in rows_of(found)
            if row["item"] in self.items
        ]

    def _pending(self) -> list[Item]:
        """What is still to be asked, in order: each judgment of an item settles one asking of it."""
        made = Counter(each.item for each in self._history)
        pending = []
        for item in self.asked:
            if not made[item.id]:
                pending.append(item)
            made[item.id] = max(0, made[item.id] - 1)
        return pending

    def _next(self) -> None:
        pending, self._showing = self._pending(), None
        if pending:
            self._show(pending[0], self._order(pending[0]))

    def _show(self, item: Item, order: Sequence[int]) -> None:
        self._showing, self._started = self.store.show(item, self.rater, self.question, order), None

    def _order(self, item: Item) -> tuple[int, ...]:
        """Drawn by seed, rater and item alone; an item that comes again comes in the reverse of its order before."""
        before = [each.shown for each in self._history if each.item == item.id and each.shown]
        if before:
            return before[-1][::-1]
        drawn = hashlib.sha256(f"{self.rater}/{item.id}".encode()).digest()[:8]
        return draw_order(len(item.completions), np.random.default_rng([self.seed, 10, int.from_bytes(drawn)]))


def _turns(text: Any) -> list[dict[str, str | None]]:
    """A prompt or completion as turns of a chat; a plain text is one turn without a role."""
    if isinstance(text, str):
        return [{"role": None, "content": text}]
    return [{"role": str(turn.get("role", "")), "content": _content(turn.get("content"))} for turn in text]


def _content(content: Any) -> str:
    if isinstance(content, list):  # parts, as some chat templates have them
        return "\n".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)
