"""The pocket world: an animal help desk small enough for a laptop, with a gold utility that is known exactly."""

from .answers import CAREFUL, CARELESS, DEMONSTRATION, Quality, corpus, demonstrations
from .facts import SPLITS, World, prompts, world
from .language import KINDS, Prompt, parse_prompt
from .raters import (
    Rater,
    choice_probability,
    known_cells,
    perceived_gap,
    perceived_score,
    perceived_scores,
    utility,
)
from .revising import JUDGE_TEMPLATE, RuleReader
from .scoring import GOLD_WEIGHTS, features, gold
from .simulated import SimulatedRater
from .task import BASE_MODEL, Pocket
from .tokenizer import CHAT_TEMPLATE, EOS, PAD, pocket_tokenizer

__all__ = [
    "BASE_MODEL",
    "CAREFUL",
    "CARELESS",
    "CHAT_TEMPLATE",
    "DEMONSTRATION",
    "EOS",
    "GOLD_WEIGHTS",
    "JUDGE_TEMPLATE",
    "KINDS",
    "PAD",
    "Pocket",
    "SPLITS",
    "Prompt",
    "Quality",
    "Rater",
    "RuleReader",
    "SimulatedRater",
    "World",
    "choice_probability",
    "corpus",
    "demonstrations",
    "features",
    "gold",
    "known_cells",
    "parse_prompt",
    "perceived_gap",
    "perceived_score",
    "perceived_scores",
    "pocket_tokenizer",
    "prompts",
    "utility",
    "world",
]
