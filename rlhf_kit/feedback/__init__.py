"""Human feedback: what is judged, the raters who judge it, the store of judgments, and the datasets that come of it."""

from .agreement import alpha, reliability, units
from .bias import biases, swapped
from .collecting import ask, choose, collect, disagreement, items
from .consensus import Consensus, dawid_skene
from .converting import MARGINS, labels, preferences
from .exchange import export, load
from .judging import COLUMNS, QUESTIONS, SCALES, STRENGTHS, Answer, FeedbackError, Item, Question, Rater
from .quality import raters
from .reporting import report
from .simulated import SimulatedRater, panel, simulated
from .store import Showing, Store

__all__ = [
    "biases",
    "export",
    "load",
    "report",
    "raters",
    "dawid_skene",
    "Consensus",
    "swapped",
    "units",
    "reliability",
    "alpha",
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
