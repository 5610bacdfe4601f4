"""The pocket world: an animal help desk small enough for a laptop, with a gold utility that is known exactly."""

from .answers import CAREFUL, CARELESS, DEMONSTRATION, corpus
from .facts import SPLITS, World, world
from .language import parse_prompt
from .raters import Rater, SimulatedRater, choice_probability, known_cells, perceived_gap, perceived_scores, utility
from .revising import JUDGE_TEMPLATE, RuleReader
from .scoring import GOLD_WEIGHTS, features, gold
from .task import BASE_MODEL, Pocket
from .tokenizer import EOS, PAD, pocket_tokenizer

__all__ = [
    "BASE_MODEL",
    "CAREFUL",
    "CARELESS",
    "DEMONSTRATION",
    "EOS",
    "GOLD_WEIGHTS",
    "JUDGE_TEMPLATE",
    "PAD",
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
    "perceived_gap",
    "perceived_scores",
    "pocket_tokenizer",
    "utility",
    "world",
]
