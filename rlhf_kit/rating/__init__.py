"""The page on which people judge: in a notebook cell (`rate`), or served to a browser (`rlhf-kit rate`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from rlhf_kit.feedback import FeedbackError, Item, Question, Store

from .reading import of_samples, read
from .server import Page
from .session import Session

if TYPE_CHECKING:
    from .widget import RatingWidget

__all__ = ["Page", "Session", "rate", "read"]


def rate(
    samples: pd.DataFrame | Sequence[Item],
    store: str | Path | Store = "judgments.db",
    rater: str = "",
    question: Question = "rank",
    k: int = 2,
    seed: int = 0,
    repeats: int = 0,
) -> RatingWidget:
    """The rating page as a widget: `rater` judges samples, or items, and each judgment is in the `store` at once.

    Samples are ranked `k` at a time per prompt, or rated one by one. The cell can be run again at any time: the new
    page goes on where this rater stopped. `repeats` items come a second time at the end in the reverse order; they show
    how steady the rater is. Raises FeedbackError without anywidget (the `notebooks` extra).
    """
    try:
        from .widget import RatingWidget
    except ModuleNotFoundError as error:
        raise FeedbackError(
            f"rate: {error.name} is not installed; pip install 'rlhf-kit[notebooks]', or use the command rlhf-kit rate"
        ) from None
    if isinstance(samples, pd.DataFrame):
        samples = of_samples(samples, question, k)
    store = store if isinstance(store, Store) else Store(store)
    return RatingWidget(Session(store, samples, rater, question, seed, "notebook", repeats))
