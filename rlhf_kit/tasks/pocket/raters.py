"""Simulated raters: gold seen through what a person knows, likes and overlooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from .facts import Cell, World
from .language import ANIMALS, ATTRIBUTES
from .scoring import GOLD_WEIGHTS, features

TINY = 1e-9  # of utility: less than any difference between two completions


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
    indifference: float = 0.0  # a felt gap below this is called a tie, in units of utility
    standard: float = 1.0  # the utility above which a completion is called good
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


def perceived_gap(rater: Rater, first: float, second: float, uniform: float) -> float:
    """How much better the first of two completions feels in one judgment, in units of utility; positive: preferred.

    One uniform draw decides: its outer ends, `lapse` in all, are lapses, which feel anything; the rest is logistic
    noise. So P(gap > 0) is `choice_probability`.
    """
    if uniform < rater.lapse / 2 or uniform >= 1 - rater.lapse / 2:  # a lapse: the side is a coin, the size anything
        ahead = uniform < rater.lapse / 2
        size = (uniform if ahead else 1 - uniform) / (rater.lapse / 2)
        return (1 if ahead else -1) * 3 * size
    gap = first - second
    if rater.temperature == 0:
        return gap or (rater.position_bias or (uniform < 0.5) - 0.5) * TINY
    rest = (uniform - rater.lapse / 2) / (1 - rater.lapse)
    noise = np.log(rest / (1 - rest)) if rest > 0 else -np.inf
    return float(rater.temperature * (gap / rater.temperature + rater.position_bias - noise))


def perceived_scores(rater: Rater, utilities: Sequence[float], rng: np.random.Generator) -> list[float]:
    """How good each of several completions shown feels in one ranking: Plackett-Luce with lapses, ties by indifference.

    Utilities over temperature, the position bias on the first, plus Gumbel noise; of two this is Bradley-Terry (Luce
    1959). Scores closer to the next higher one than `indifference` are made equal to it.
    """
    if rng.random() < rater.lapse:
        return list(rng.permutation(len(utilities)).astype(float))
    scale = rater.temperature or TINY
    scores = np.array(utilities, dtype=float) + scale * rng.gumbel(size=len(utilities))
    scores[0] += scale * rater.position_bias
    order = np.argsort(-scores)
    for above, below in pairwise(order):
        if scores[above] - scores[below] < rater.indifference:
            scores[below] = scores[above]
    return list(scores)


def perceived_score(rater: Rater, felt: float, rng: np.random.Generator) -> float:
    """How far above the rater's standard one completion feels in one judgment, in units of utility: good if above 0."""
    if rng.random() < rater.lapse:
        return float(rng.uniform(-4, 4))
    return float(felt - rater.standard + rater.temperature * rng.logistic())
