"""The pocket world: an animal help desk small enough for a laptop, with a gold utility that is known exactly."""

from pathlib import Path

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
from .scoring import GOLD_WEIGHTS, features, gold
from .tokenizer import CHAT_TEMPLATE, EOS, PAD, pocket_tokenizer

BASE_MODEL = str(Path(__file__).parent / "base")  # directory of the pretrained model of world(seed=0)

__all__ = [
    "BASE_MODEL",
    "CAREFUL",
    "CARELESS",
    "CHAT_TEMPLATE",
    "DEMONSTRATION",
    "EOS",
    "GOLD_WEIGHTS",
    "KINDS",
    "PAD",
    "SPLITS",
    "Prompt",
    "Quality",
    "Rater",
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
