"""The pocket world: an animal help desk small enough for a laptop, with a gold utility that is known exactly."""

from .answers import corpus
from .facts import SPLITS, World, world
from .language import parse_prompt
from .raters import Rater, SimulatedRater, choice_probability, known_cells, perceived_scores, utility
from .revising import JUDGE_TEMPLATE, RuleReader
from .scoring import GOLD_WEIGHTS, features, gold
from .task import Pocket
from .tokenizer import pocket_tokenizer

__all__ = [
    "GOLD_WEIGHTS",
    "JUDGE_TEMPLATE",
    "Pocket",
    "Rater",
    "RuleReader",
    "SPLITS",
    "SimulatedRater",
    "World",
    "choice_probability",
    "corpus",
    "features",
    "gold",
    "known_cells",
    "parse_prompt",
    "perceived_scores",
    "pocket_tokenizer",
    "utility",
    "world",
]
