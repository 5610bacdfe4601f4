"""What is behind the rating page: which item comes next, in which order it is shown, and how far the rater is."""

import hashlib
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
from rlhf_kit.feedback.judging import as_row, check_question, check_rater
from rlhf_kit.feedback.store import Judged
from rlhf_kit.models import plain
from rlhf_kit.progress import clock


class Session:
    """One rater's way through items: `state` is what the page shows, `act` does what the page asks for.

    What is open follows from the store alone: the first item that this rater has not judged. `repeats` of the items,
    drawn by the seed, are asked a second time after all others, with their completions in the reverse order. The page
    learns neither the items' columns nor which completion is which. Raises FeedbackError for a question that the items
    do not fit, and for more repeats than items.
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
        check_question(question, items)
        check_rater(rater)
        self.store, self.rater, self.question, self.seed = store, rater, question, seed
        self.items = {item.id: item for item in items}
        once = list(self.items)
        if not 0 <= repeats <= len(once):
            raise FeedbackError(f"rate: repeats={repeats}, but there are {len(once)} different items")
        again = np.random.default_rng([seed, 12]).permutation(len(once))[:repeats]
        self.asked = once + [once[i] for i in sorted(again)]
        self.interface = f"{interface}, rlhf-kit {version('rlhf-kit')}"
        self._lock = threading.RLock()  # each request of a browser has a thread of its own
        self._state: dict[str, Any] = {}
        self._started: float | None = None
        self._history: list[Judged] = []
        self._withdrawn = 0  # of the store, when the history was read
        store.add(items)
        self._look()

    def state(self, error: str | None = None) -> dict[str, Any]:
        """What the page shows, as plain JSON; `time` makes each one another, so that a widget always sends it."""
        with self._lock:
            self._started = self._started or time.monotonic()
            return self._state | {"time": time.monotonic(), "error": error}

    def act(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Do `{"do": "answer" | "skip" | "undo", "showing": text, ...}`; the new state says in `error` what failed."""
        with self._lock:
            error = None
            try:
                self._look()
                try:
                    self._do(message)
                finally:
                    self._look()
            except FeedbackError as refused:
                error = str(refused)
            return self.state(error)

    def _look(self) -> None:
        """Read from the store which item is open, and how far the rater is."""
        withdrawn = self.store.withdrawals()
        if withdrawn != self._withdrawn:  # otherwise the store has only grown, and what is new is enough
            self._withdrawn, self._history = withdrawn, []
        found = self.store.judged(self.rater, self.question, self._history[-1].judgment if self._history else 0)
        self._history += [each for each in found if each.item in self.items]
        made, pending = Counter(each.item for each in self._history), []
        for item in self.asked:  # each judgment of an item settles one asking of it
            made[item] -= 1
            if made[item] < 0:
                pending.append(self.items[item])
        self._item = pending[0] if pending else None
        self._shown = self._order(pending[0]) if pending else ()
        # Names what is open, since judgments are only added at the end or withdrawn. An answer to anything else, such
        # as what a second tab still shows, is refused.
        showing = f"{len(self._history)} until {self._history[-1].judgment if self._history else 0}"
        if showing != self._state.get("showing"):
            self._started = None
        total, judged = len(self.asked), len(self.asked) - len(pending)
        progress = f"{min(judged + 1, total)} of {total}"
        times = [each.seconds for each in self._history if each.seconds is not None]
        if times:
            pace = max(median(times), 0.1)  # the median, so that one break changes little
            progress += f" · {60 / pace:.1f} a minute · about {clock(pace * len(pending))} left"
        self._state = {
            "showing": showing,
            "question": self.question,
            "prompt": _messages(pending[0].prompt) if pending else [],
            "completions": [_messages(pending[0].completions[i]) for i in self._shown],
            "strengths": STRENGTHS,
            "progress": progress,
            "judged": judged,
            "skipped": sum(each.skipped for each in self._history),
            "total": total,
            "rater": self.rater,
        }

    def _order(self, item: Item) -> tuple[int, ...]:
        """Drawn by seed, rater and item alone; an item that comes again comes in the reverse of its order before."""
        before = [each.shown for each in self._history if each.item == item.id]
        if before:
            return before[-1][::-1]
        drawn = hashlib.sha256(f"{self.rater}/{item.id}".encode()).digest()[:8]
        return draw_order(len(item.completions), np.random.default_rng([self.seed, 10, int.from_bytes(drawn)]))

    def _do(self, message: Mapping[str, Any]) -> None:
        """Keep a judgment, or take the last one back."""
        if message.get("showing") != self._state["showing"]:
            raise FeedbackError("nothing was recorded: another tab or cell has gone on; this item is open now")
        if message["do"] == "undo":
            if not self._history:
                raise FeedbackError("there is no judgment to take back")
            self.store.withdraw(self._history[-1].judgment, self.rater)
            return
        ranks, rating = message.get("ranks"), message.get("rating")
        # Without ranks and rating it would be kept as a skip.
        if self._item is None or (message["do"] == "skip") != (ranks is None and rating is None):
            raise FeedbackError("nothing was recorded: this answers no open item; reload the page")
        answer = Answer(ranks and tuple(ranks), rating, message.get("strength"), message.get("note", ""))
        seconds = time.monotonic() - (self._started or time.monotonic())
        before = sum(each.item == self._item.id for each in self._history)
        row = as_row(self._item, self.rater, self.question, answer, self._shown, seconds, self.interface)
        self.store.append(row, before)


def _messages(text: Any) -> list[dict[str, str | None]]:
    """A prompt or completion as messages of a chat; a plain text is one message without a role."""
    messages = [{"role": None, "content": text}] if isinstance(text, str) else plain(text)
    return [{"role": each["role"], "content": each["content"] or ""} for each in messages]
