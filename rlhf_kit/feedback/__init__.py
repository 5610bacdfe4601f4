"""Feedback of people and models: what is judged, who judges it, the store of judgments, and the datasets they make."""

from .agreement import alpha, reliability, units
from .bias import biases, swapped
from .collecting import ask, choose, collect, disagreement, items
from .consensus import Consensus, dawid_skene
from .constitution import Constitution, Principle, constitution
from .converting import MARGINS, labels, preferences
from .endpoint import Endpoint, EndpointRater
from .exchange import export, load
from .judging import COLUMNS, QUESTIONS, SCALES, STRENGTHS, Answer, FeedbackError, Item, Question, Rater
from .language_model import LanguageModelRater, train_judge
from .quality import raters
from .reporting import report
from .revising import Writer, as_demonstrations, critique_and_revise, writer
from .store import Showing, Store
from .templates import PLAIN, Template

__all__ = [
    "COLUMNS",
    "MARGINS",
    "PLAIN",
    "QUESTIONS",
    "SCALES",
    "STRENGTHS",
    "Answer",
    "Consensus",
    "Constitution",
    "Endpoint",
    "EndpointRater",
    "FeedbackError",
    "Item",
    "LanguageModelRater",
    "Principle",
    "Question",
    "Rater",
    "Showing",
    "Store",
    "Template",
    "Writer",
    "alpha",
    "as_demonstrations",
    "ask",
    "biases",
    "choose",
    "collect",
    "constitution",
    "critique_and_revise",
    "dawid_skene",
    "disagreement",
    "export",
    "items",
    "labels",
    "load",
    "preferences",
    "raters",
    "reliability",
    "report",
    "swapped",
    "train_judge",
    "units",
    "writer",
]
