"""Feedback of people and models: what is judged, who judges it, the store of judgments, and the datasets they make."""

from .agreement import agreement, votes
from .bias import biases, position_from_swaps
from .collecting import ask, choose, collect, disagreement, items
from .constitution import Constitution, Principle, constitution
from .converting import MARGINS, labels, preferences
from .endpoint import Endpoint, EndpointRater
from .judging import COLUMNS, QUESTIONS, SCALES, STRENGTHS, Answer, FeedbackError, Item, Question, Rater
from .language_model import LanguageModelRater, train_judge
from .quality import raters
from .reporting import report
from .revising import Writer, as_demonstrations, critique_and_revise, writer
from .store import Store
from .templates import PLAIN, Template

__all__ = [
    "COLUMNS",
    "MARGINS",
    "PLAIN",
    "QUESTIONS",
    "SCALES",
    "STRENGTHS",
    "Answer",
    "Constitution",
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
    "Writer",
    "agreement",
    "as_demonstrations",
    "ask",
    "biases",
    "choose",
    "collect",
    "constitution",
    "critique_and_revise",
    "disagreement",
    "items",
    "labels",
    "position_from_swaps",
    "preferences",
    "raters",
    "report",
    "train_judge",
    "votes",
    "writer",
]
