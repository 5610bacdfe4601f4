"""Human feedback: what is judged, the raters who judge it, the store of judgments, and the datasets that come of it."""

from .collecting import ask, choose, collect, disagreement, items
from .converting import MARGINS, labels, preferences
from .judging import COLUMNS, QUESTIONS, SCALES, STRENGTHS, Answer, FeedbackError, Item, Question, Rater
from .simulated import SimulatedRater, panel, simulated
from .store import Showing, Store

__all__ = [
    "COLUMNS",
    "MARGINS",
    "QUESTIONS",
    "SCALES",
    "STRENGTHS",
    "Answer",
    "FeedbackError",
    "Item",
    "Question",
    "Rater",
    "Showing",
    "SimulatedRater",
    "Store",
    "ask",
    "choose",
    "collect",
    "disagreement",
    "items",
    "labels",
    "panel",
    "preferences",
    "simulated",
]
