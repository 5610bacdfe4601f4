"""Feedback of people and models: what is judged, who judges it, the store of judgments, and the datasets they make."""
# ruff: noqa: F401 (these imports are what this room offers)

from .collecting import MARGINS, ask, choose, collect, items, labels, preferences
from .constitution import PLAIN, Principle, Template, as_demonstrations, constitution, critique_and_revise
from .endpoint import EndpointRater
from .judging import SCALES, STRENGTHS, Answer, FeedbackError, Item, Question, Rater
from .language_model import LanguageModelRater, train_judge
from .quality import agreement, biases, votes
from .reporting import raters, report
from .store import Store
