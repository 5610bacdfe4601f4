"""Feedback of people and models: what is judged, who judges it, the store of judgments, and the datasets they make."""

from .agreement import agreement, votes
from .bias import biases
from .collecting import MARGINS, ask, choose, collect, items, labels, preferences
from .constitution import PLAIN, Principle, Template, as_demonstrations, constitution, critique_and_revise
from .endpoint import EndpointRater
from .judging import SCALES, STRENGTHS, Answer, FeedbackError, Item, Question, Rater
from .language_model import LanguageModelRater, train_judge
from .reporting import raters, report
from .store import Store

__all__ = ["SCALES", "STRENGTHS", "Answer", "FeedbackError", "Item", "Question", "Rater", "Store"]
__all__ += ["MARGINS", "ask", "choose", "collect", "items", "labels", "preferences"]
__all__ += ["agreement", "biases", "raters", "report", "votes"]
__all__ += ["PLAIN", "EndpointRater", "LanguageModelRater", "Principle", "Template", "constitution"]
__all__ += ["as_demonstrations", "critique_and_revise", "train_judge"]
