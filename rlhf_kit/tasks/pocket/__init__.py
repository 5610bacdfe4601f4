"""The pocket world: an animal help desk small enough for a laptop, with a gold utility that is known exactly."""
# ruff: noqa: F401 (these imports are what this world offers)

from .answers import corpus
from .facts import SPLITS, World, world
from .language import parse_prompt
from .raters import JUDGE_TEMPLATE, Rater, RuleReader, SimulatedRater, choice_probability, utility
from .scoring import GOLD_WEIGHTS, features, gold
from .task import Pocket
