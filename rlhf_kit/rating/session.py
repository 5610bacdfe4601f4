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
from typing import Any

import numpy as np

from rlhf_kit.feedback import STRENGTHS, Answer, FeedbackError, Item, Question, Store
from rlhf_kit.feedback.collecting import draw_order
from rlhf_kit.feedback.judging import check_question
from rlhf_kit.feedback.store import Judged

RECENT = 20  # judgments whose median time makes the pace: a coffee break among them changes little
MAX_NOTE = 10_000  # characters


class Session:
    """One rater's way through items: `state` is what the page shows, `act` what the page asks for.

    Where this rater stopped before, it goes on, with the same item in the same order. What this rater has judged is not
    asked again, except `repeats` of the items, drawn by the seed: they come a second time after all others, with their
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
            raise FeedbackError("rate: a judgment needs a rater's name; give one, such as rater='ana'")
        check_question(question, items)
        self.store, self.rater, self.question, self.seed = store, rater, question, seed
        self.items = {item.id: item for item in items}
        once = list(self.items.values())
        if not 0 <= repeats <= len(once):
            raise FeedbackError(f"rate: repeats={repeats}, but there are {len(once)} different items")
        again = np.random.default_rng([seed, 12]).permutation(len(once))[:repeats]
        self.asked = once + [once[i] for i in sorted(again)]
        self.interface = f"{interface}, rlhf-kit {version('rlhf-kit')}"
        self.made: set[int] = set()  # judgments of this session that count
        self._lock = threading.RLock()
        self._version = 0
        self._showing = 0  # the number of what is open, so that an answer to what was open before is refused
        self._started: float | None = None
        self._error: str | None = None
        store.add(items)
        self._history = self._judged()
        self._open(None)

    def state(self) -> dict[str, Any]:
        """What the page needs, as plain JSON; `version` grows with each action, so that a page sees its answer."""
        with self._lock:
            total, left = len(self.asked), len(self._pending())
            if self._item is not None and self._started is None:
                self._started = time.monotonic()  # the page asks for the item: its time runs
            times = [each.seconds for each in self._history[-RECENT:] if each.seconds is not None]
            pace = median(times) if times else None
            return {
                "version": self._version,
                "showing": self._showing if self._item else None,
                "question": self.question,
                "prompt": _messages(self._item.prompt) if self._item else [],
                "completions": [_messages(self._item.completions[i]) for i in self._shown] if self._item else [],
                "strengths": list(STRENGTHS),
                "position": min(total - left + 1, total),
                "judged": total - left,
                "skipped": sum(each.skipped for each in self._history),
                "total": total,
                "done": self._item is None,
                "per_minute": pace and 60 / max(pace, 0.1),
                "seconds_left": pace and pace * left,
                "can_undo": bool(self._history),
                "rater": self.rater,
                "error": self._error,
            }

    def act(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Do what a page asks for, `{"do": "answer" | "skip" | "undo", "showing": number, ...}`; returns the new state.

        What cannot be done is in the state's `error`, and the rest is then what the store says.
        """
        with self._lock:
            self._version += 1
            self._error, again = None, None
            try:
                try:
                    again = self._do(message)
                except FeedbackError as error:
                    self._error = str(error)
                history = self._judged()
            except sqlite3.Error as error:
                self._error = f"{self.store.path}: the store does not answer ({error}); the page waits until it does"
            else:
                if history != self._history:
                    self._history = history
                    self._open(again)
            return self.state()

    def _do(self, message: Mapping[str, Any]) -> Judged | None:
        """Keep a judgment, or take the last one back and return it: its item is then shown again in the same order."""
        do, showing = message.get("do"), message.get("showing")
        if do not in ("answer", "skip", "undo"):
            raise FeedbackError(f"the page asked for {do!r}, which is not known here; reload the page")
        if showing != (self._showing if self._item else None):
            raise FeedbackError("nothing was recorded: that page was out of date; this is the item that is open now")
        if self._judged() != self._history:
            raise FeedbackError(
                f"nothing was recorded: {self.rater} has gone on in another tab or cell; this item is open now"
            )
        if do == "undo":
            if not self._history:
                raise FeedbackError("there is no judgment to take back")
            last = self._history[-1]
            self.store.withdraw(last.judgment, self.rater)
            self.made.discard(last.judgment)
            return last
        if self._item is None:
            raise FeedbackError("not recorded: everything is judged already")
        answer, seconds = _answer(message), time.monotonic() - (self._started or time.monotonic())
        before = sum(each.item == self._item.id for each in self._history)
        asked = (self._item, self.rater, self.question, answer, self._shown, seconds, self.interface)
        self.made.add(self.store.append(*asked, before=before))
        return None

    def _judged(self) -> list[Judged]:
        return [each for each in self.store.judged(self.rater, self.question) if each.item in self.items]

    def _pending(self) -> list[Item]:
        """What is still to be asked, in order: each judgment of an item settles one asking of it."""
        made, pending = Counter(each.item for each in self._history), []
        for item in self.asked:
            made[item.id] -= 1
            if made[item.id] < 0:
                pending.append(item)
        return pending

    def _open(self, again: Judged | None) -> None:
        """Open the item of the judgment taken back, or the first that is pending; a page that asks starts its time."""
        pending = self._pending()
        self._item = self.items[again.item] if again else pending[0] if pending else None
        self._shown = again.shown if again else self._order(self._item) if self._item else ()
        self._showing += 1
        self._started = None

    def _order(self, item: Item) -> tuple[int, ...]:
        """Drawn by seed, rater and item alone; an item that comes again comes in the reverse of its order before."""
        before = [each.shown for each in self._history if each.item == item.id]
        if before:
            return before[-1][::-1]
        drawn = hashlib.sha256(f"{self.rater}/{item.id}".encode()).digest()[:8]
        return draw_order(len(item.completions), np.random.default_rng([self.seed, 10, int.from_bytes(drawn)]))


def _answer(message: Mapping[str, Any]) -> Answer:
    """The answer, or the skip, of a page's message; FeedbackError if no page would send it."""
    note, ranks, rating = message.get("note", ""), message.get("ranks"), message.get("rating")
    if not isinstance(note, str) or len(note) > MAX_NOTE:
        raise FeedbackError(f"not recorded: a note is a text of up to {MAX_NOTE:,} characters; shorten it")
    if message["do"] == "skip":
        return Answer(note=note)
    numbers = ranks if isinstance(ranks, list) else [rating]
    if not all(type(number) is int for number in numbers):
        raise FeedbackError("not recorded: an answer has ranks or a rating, in whole numbers; reload the page")
    return Answer(tuple(ranks) if isinstance(ranks, list) else None, rating, message.get("strength"), note)


def _messages(text: Any) -> list[dict[str, str | None]]:
    """A prompt or completion as messages of a chat; a plain text is one message without a role."""
    if isinstance(text, str):
        return [{"role": None, "content": text}]
    return [{"role": str(each.get("role", "")), "content": _content(each.get("content"))} for each in text]


def _content(content: Any) -> str:
    if isinstance(content, list):  # parts, as some chat templates have them
        return "\n".join(str(part.get("text", part)) if isinstance(part, dict) else str(part) for part in content)
    return "" if content is None else str(content)
