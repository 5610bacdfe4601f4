"""Simulated raters: gold seen through what a person knows, likes and overlooks."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from .facts import Cell, World
from .language import ANIMALS, ATTRIBUTES
from .scoring import GOLD_WEIGHTS, features


@dataclass(frozen=True)
class Rater:
    """A rater's faults; Rater(1.0, 0, 0, 0, 0, temperature=0, lapse=0, position_bias=0) judges by gold, exactly."""

    knowledge: float = 0.9  # share of the facts that the rater can check; claims about the others look true
    length: float = 0.03  # added utility per word
    politeness: float = 0.5  # added utility per polite sentence after the first, which gold counts as flattery
    refusal_leniency: float = 0.5  # added utility of refusing a harmless prompt
    agreement: float = 0.5  # added utility of siding with the user's claim
    temperature: float = 0.5  # Bradley-Terry temperature, in units of utility; 0 always prefers the better
    lapse: float = 0.05  # share of judgments made by a coin
    position_bias: float = 0.1  # log-odds added to whichever completion is shown first
    seed: int = 0  # which facts are known
    name: str = "rater"

    def __post_init__(self) -> None:
        for field in ("knowledge", "lapse"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"Rater.{field}={getattr(self, field)}: it is a share; give a number from 0 to 1.")
        if self.temperature < 0:
            raise ValueError(f"Rater.temperature={self.temperature}: give 0 (no noise) or a positive number.")


@cache
def known_cells(rater_seed: int, knowledge: float) -> frozenset[Cell]:
    """The (animal, attribute) cells that a rater can check; more knowledge only ever adds cells."""
    cells = [(animal, attribute) for animal in ANIMALS for attribute in ATTRIBUTES]
    order = np.random.default_rng([rater_seed, 3]).permutation(len(cells))
    return frozenset(cells[i] for i in order[: round(knowledge * len(cells))])


def utility(world: World, rater: Rater, prompt: str, completion: str) -> float:
    """How much a rater likes a completion: gold of what the rater can see, plus the rater's own tastes."""
    seen = features(world, prompt, completion, known=known_cells(rater.seed, rater.knowledge))
    return (
        sum(weight * seen[name] for name, weight in GOLD_WEIGHTS.items())
        + rater.length * seen["words"]
        + rater.politeness * seen["filler"]
        + rater.refusal_leniency * seen["refusal_wrong"]
        + rater.agreement * seen["agrees"]
    )


def choice_probability(rater: Rater, first: float, second: float) -> float:
    """Probability that a rater prefers the first of two completions shown, given their utilities.

    (1 - lapse) sigmoid((u_1 - u_2) / temperature + position_bias) + lapse / 2: Bradley-Terry (1952) with lapses.
    """
    gap = first - second
    if rater.temperature > 0:
        decided = 0.5 * (1 + np.tanh((gap / rater.temperature + rater.position_bias) / 2))
    else:  # the limit: any gap decides, and position breaks ties
        decided = 0.5 * (1 + np.sign(gap or rater.position_bias))
    return float((1 - rater.lapse) * decided + rater.lapse / 2)


def prefers_first(world: World, rater: Rater, prompt: str, first: str, second: str, rng: np.random.Generator) -> bool:
    """Draw one judgment: does the rater prefer the completion shown first?"""
    utilities = [utility(world, rater, prompt, completion) for completion in (first, second)]
    return bool(rng.random() < choice_probability(rater, *utilities))
