"""A model of choices between two completions: Bradley-Terry with lapses, its quality known or summed over.

Rater r, asked about a pair of quality gap q, prefers the pair's first completion with probability

    (1 - lapse_r) sigmoid(q + bias_r . x) + lapse_r / 2

where x is what may sway them: the place, the length. Where q is not known it is a random effect of the pair that all
its raters share, drawn from a mixture of two normals whose means are proportional to the difference in length (a
logistic mixed model, summed over by Gauss-Hermite quadrature). A lapse shows where the other raters leave no doubt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, brentq, minimize

from rlhf_kit.statistics import NOT_MEASURED, Interval, Z

Array = NDArray[np.float64]
Codes = NDArray[np.integer[Any]]
LARGEST = 100.0  # log-odds of the largest difference seen; a fit there is on its way to infinity
NODES = 21  # of the quadrature
KNOWN_BY, AT_END = 1e-3, 1e-6  # a flatter log-likelihood says nothing; so near the end of its range a parameter is kept
MOST_LAPSES = 0.95


class Choices(NamedTuple):
    """N choices: +1 for the pair's first completion or -1; what may sway the rater, (N, P); who, which pair and item.

    words: of the first completion less of the second, where quality is to be summed over; None where a column of
    `sways` is the quality.
    """

    chosen: Array
    sways: Array
    rater: Codes
    pair: Codes
    item: Codes
    words: Array | None = None


class Fit(NamedTuple):
    """Weights of the columns of `sways` (P,) with their covariance (P, P), the raters' lapses with 95% bounds."""

    weights: Array
    covariance: Array
    lapses: list[Interval]
    why: str


def fit(choices: Choices) -> Fit:
    """Maximum likelihood; standard errors are robust to what pairs of one item share. NaN where nothing is known."""
    n, raters = choices.sways.shape[1], int(choices.rater.max()) + 1
    varied = np.flatnonzero(np.abs(choices.sways).max(0) > 0)
    nothing = Fit(np.full(n, np.nan), np.full((n, n), np.nan), [NOT_MEASURED] * raters, "")
    used, items = choices.sways[:, varied], len(np.unique(choices.item))
    if not len(varied) or np.linalg.matrix_rank(used) < len(varied) or items <= len(varied) + raters:
        return nothing._replace(why=f"{len(choices.chosen)} choices about {items} items are too few")
    scale = np.abs(used).max(0)  # gold and words have units of their own; the optimiser should not mind
    model = Likelihood(choices._replace(sways=used / scale), raters)
    k = len(varied)
    found = model.likeliest()
    free, covariance = model.covariance(found.x)
    if not found.success or not free[:k].all():
        return nothing._replace(why="the choices are explained without any error, so no finite bias fits best")
    weights, spread = nothing.weights.copy(), nothing.covariance.copy()
    weights[varied] = found.x[:k] / scale
    spread[np.ix_(varied, varied)] = covariance[:k, :k] / np.outer(scale, scale)
    lapses = []
    for j in range(k, k + raters):
        half = Z * covariance[j, j] ** 0.5 if free[j] else model.unlikely(found.x, j)
        lapses.append(Interval(*np.clip([found.x[j], found.x[j] - half, found.x[j] + half], 0, 1).tolist()))
    return Fit(weights, spread, lapses, why="" if k == n else "order or length never differed")


class Likelihood:
    """log P(choices) of parameters in one row: weights, lapses and, of the mixture, slopes, log widths, log-odds."""

    def __init__(self, choices: Choices, raters: int) -> None:
        self.chosen, self.sways = torch.from_numpy(choices.chosen)[:, None], torch.from_numpy(choices.sways)
        self.rater, self.raters = torch.tensor(choices.rater), raters
        _, first, pair = np.unique(choices.pair, return_index=True, return_inverse=True)
        _, item = np.unique(choices.item[first], return_inverse=True)
        self.pair, self.pairs, self.item = torch.from_numpy(pair), len(first), torch.from_numpy(item)
        n = choices.sways.shape[1]
        self.start = np.array([0.0] * n + [0.05] * raters)
        self.bounds = [(-LARGEST, LARGEST)] * n + [(0.0, MOST_LAPSES)] * raters
        self.words = None
        if choices.words is not None:
            self.words = torch.from_numpy(choices.words / max(float(choices.words.std()), 1e-9))
            nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
            self.nodes, self.log_weights = torch.from_numpy(nodes), torch.from_numpy(np.log(weights / weights.sum()))
            self.start = np.concatenate([self.start, [0.0, 0.0, -0.5, 1.8, 0.0]])
            self.bounds += [(-12.0, 12.0)] * 2 + [(-3.0, 2.5)] * 2 + [(-6.0, 6.0)]

    def of_pairs(self, parameters: torch.Tensor) -> torch.Tensor:
        """log P of what was said of each pair: (U,)."""
        n = self.sways.shape[1]
        weights, lapse = parameters[:n], parameters[n : n + self.raters][self.rater][:, None]
        swayed = (self.sways @ weights)[:, None]

        def said(gap: torch.Tensor) -> torch.Tensor:  # (N, nodes) -> (U, nodes)
            chance = (1 - lapse) * torch.sigmoid(self.chosen * gap) + lapse / 2
            total = torch.zeros(self.pairs, gap.shape[1], dtype=torch.double)
            return total.index_add(0, self.pair, chance.clamp_min(1e-300).log())

        if self.words is None:
            return said(swayed).squeeze(1)
        slopes, widths, odds = parameters[n + self.raters :].split([2, 2, 1])
        shares = torch.nn.functional.logsigmoid(torch.cat([odds, -odds]))
        parts = [
            share
            + torch.logsumexp(
                said(swayed + slope * self.words[:, None] + width.exp() * self.nodes) + self.log_weights, 1
            )
            for share, slope, width in zip(shares, slopes, widths, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts), 0)

    def loss(self, parameters: Array) -> tuple[float, Array]:
        """-log P of everything, and its gradient.

        A nat is asked for each whole lapse: where it cannot be told from place, as without any quality, it is place.
        """
        at = torch.tensor(parameters, requires_grad=True)
        n = self.sways.shape[1]
        total = -self.of_pairs(at).sum() + at[n : n + self.raters].sum()
        (gradient,) = torch.autograd.grad(total, at)
        return total.item(), gradient.numpy()

    def likeliest(self) -> OptimizeResult:
        """The better end of two ways: with some lapses at first, and with none until the weights are found."""
        k = self.sways.shape[1]
        options: dict[str, Any] = {"jac": True, "method": "L-BFGS-B", "options": {"maxiter": 500}}
        exact, bounds = self.start.copy(), list(self.bounds)
        exact[k : k + self.raters], bounds[k : k + self.raters] = 0.0, [(0.0, 0.0)] * self.raters
        without = minimize(self.loss, exact, bounds=bounds, **options)
        ends = [minimize(self.loss, start, bounds=self.bounds, **options) for start in (self.start, without.x)]
        return min(ends, key=lambda end: end.fun)

    def unlikely(self, parameters: Array, j: int) -> float:
        """How far parameter j may rise from the end of its range before the likelihood-ratio test rejects it, 0.05."""

        def above(rise: float) -> float:
            moved = parameters.copy()
            moved[j] += rise
            return 2 * (self.loss(moved)[0] - self.loss(parameters)[0]) - Z**2

        most = MOST_LAPSES - parameters[j]
        return float(brentq(above, 0, most)) if most > 0 and above(most) > 0 else 1.0

    def covariance(self, parameters: Array) -> tuple[NDArray[np.bool_], Array]:
        """What is not at the end of its range, and its sandwich H^-1 S H^-1, S summed over items (White 1982)."""
        at = torch.tensor(parameters)
        ways = torch.eye(len(at), dtype=at.dtype)
        each = torch.stack([torch.autograd.functional.jvp(self.of_pairs, at, way)[1] for way in ways], 1)
        scores = torch.zeros(int(self.item.max()) + 1, len(at), dtype=at.dtype).index_add(0, self.item, each)
        curved = -torch.autograd.functional.hessian(lambda given: self.of_pairs(given).sum(), at)
        low, high = torch.tensor(self.bounds, dtype=at.dtype).T
        inside = (at > low + AT_END) & (at < high - AT_END) & (curved.diagonal() > KNOWN_BY)
        free = inside.nonzero().squeeze(1)
        inverse = torch.linalg.pinv(curved[free][:, free], hermitian=True, rtol=1e-8)
        covariance = torch.zeros_like(curved)
        covariance[free[:, None], free] = inverse @ (scores[:, free].T @ scores[:, free]) @ inverse
        return inside.numpy(), covariance.numpy()
