"""Feedback of people and models: what is judged, who judges it, the store of judgments, and the datasets they make."""

from .agreement import agreement, votes
from .bias import biases
from .collecting import MARGINS, ask, choose, collect, items, labels, preferences
from .constitution import PLAIN, Principle, Template, constitution
from .endpoint import Endpoint, EndpointRater
from .judging import SCALES, STRENGTHS, Answer, FeedbackError, Item, Question, Rater
from .language_model import LanguageModelRater, train_judge
from .reporting import raters, report
from .revising import as_demonstrations, critique_and_revise, writer
from .store import Store

__all__ = [
    "MARGINS",
    "PLAIN",
    "SCALES",
    "STRENGTHS",
    "Answer",
    "Endpoint",
    "EndpointRater",
    "FeedbackError",
    "Item",
    "LanguageModelRater",
    "Principle",
    "Question",
    "Rater",
    "Store",
    "Template",
    "agreement",
    "as_demonstrations",
    "ask",
    "biases",
    "choose",
    "collect",
    "constitution",
    "critique_and_revise",
    "items",
    "labels",
    "preferences",
    "raters",
    "report",
    "train_judge",
    "votes",
    "writer",
]
