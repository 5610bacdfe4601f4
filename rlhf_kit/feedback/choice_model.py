"""A model of choices between two completions: Bradley-Terry with lapses, its quality known or summed over.

Rater r, asked about a pair of quality gap q, prefers the pair's first completion with probability

    (1 - lapse_r) sigmoid(q + bias_r . x) + lapse_r / 2

where x is what may sway them: the place, the length. Where q is not known it is a random effect of the pair that all
its raters share, drawn from a mixture of two normals whose means are proportional to the difference in length (a
logistic mixed model, summed over by Gauss-Hermite quadrature). A lapse shows where the other raters leave no doubt.

Weak priors keep what few choices hardly say from running away (the idea of Gelman et al. 2008, 0901.4011): weights are
normal, of sd 3 log-odds for a typical difference; lapses Beta(1.5, 6), most likely .09; of the mixture, the slopes on
the words and the log-odds of the first normal are normal, the widths half-normal.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize

from rlhf_kit.stats import NOT_MEASURED, Interval, Z

Array = NDArray[np.float64]
Codes = NDArray[np.integer[Any]]
NODES = 21  # of the quadrature
WEIGHT_SD = 3.0  # log-odds for a difference of root-mean-square size
LAPSE = (1.5, 6.0)  # Beta
SLOPE_SD, WIDTH_SDS, ODDS_SD = 2.0, (2.0, 8.0), 1.5  # of the mixture
# Where the search for the mode begins and what it does not leave; of the mixture: slopes, log widths, log-odds.
WEIGHT_RANGE, LAPSE_START, LAPSE_RANGE = (-100.0, 100.0), 0.1, (1e-4, 0.95)
MIXTURE_START = [0.0, 0.0, -0.5, 1.8, 0.0]
MIXTURE_RANGES = [(-12.0, 12.0), (-12.0, 12.0), (-3.0, 3.5), (-3.0, 3.5), (-6.0, 6.0)]


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
    """Posterior mode; standard errors are robust to what pairs of one item share. NaN where nothing is known."""
    n, raters = choices.sways.shape[1], int(choices.rater.max()) + 1
    varied = np.flatnonzero(np.abs(choices.sways).max(0) > 0)
    nothing = Fit(np.full(n, np.nan), np.full((n, n), np.nan), [NOT_MEASURED] * raters, "")
    used, items = choices.sways[:, varied], len(np.unique(choices.item))
    if not len(varied) or np.linalg.matrix_rank(used) < len(varied) or items <= len(varied) + raters:
        return nothing._replace(why=f"{len(choices.chosen)} choices about {items} items are too few")
    scale = np.sqrt((used**2).sum(0) / (used != 0).sum(0))  # a typical difference: gold and words have units
    model = Posterior(choices._replace(sways=used / scale), raters)
    k = len(varied)
    found = model.mode()
    if not found.success:
        return nothing._replace(why=f"no model of the choices was found ({found.message})")
    if choices.words is None and (choices.chosen * (used @ (found.x[:k] / scale)) > 0).all():
        return nothing._replace(why="the choices are explained without any error, so no finite bias fits best")
    covariance = model.covariance(found.x)
    weights, spread = nothing.weights.copy(), nothing.covariance.copy()
    weights[varied] = found.x[:k] / scale
    spread[np.ix_(varied, varied)] = covariance[:k, :k] / np.outer(scale, scale)
    lapses = []
    for lapse, variance in zip(found.x[k : k + raters], np.diag(covariance)[k : k + raters], strict=True):
        lapses.append(Interval(*np.clip(lapse + np.array([0, -1, 1]) * Z * variance**0.5, 0, 1).tolist()))
    return Fit(weights, spread, lapses, why="" if k == n else "order or length never differed")


class Posterior:
    """Of parameters in one row: weights, lapses and, of the mixture, slopes, log widths, log-odds of the first."""

    def __init__(self, choices: Choices, raters: int) -> None:
        self.chosen, self.sways = torch.from_numpy(choices.chosen)[:, None], torch.from_numpy(choices.sways)
        self.rater = torch.tensor(choices.rater)
        _, first, pair = np.unique(choices.pair, return_index=True, return_inverse=True)
        _, item = np.unique(choices.item[first], return_inverse=True)
        self.pair, self.pairs, self.item = torch.from_numpy(pair), len(first), torch.from_numpy(item)
        self.sizes = [choices.sways.shape[1], raters, 0]
        self.start = [0.0] * self.sizes[0] + [LAPSE_START] * raters
        self.ranges = [WEIGHT_RANGE] * self.sizes[0] + [LAPSE_RANGE] * raters
        self.words = None
        if choices.words is not None:
            self.words = torch.from_numpy(choices.words / max(float(choices.words.std()), 1e-9))
            nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
            self.nodes, self.log_weights = torch.from_numpy(nodes), torch.from_numpy(np.log(weights / weights.sum()))
            self.sizes[2] = len(MIXTURE_START)
            self.start, self.ranges = self.start + MIXTURE_START, self.ranges + MIXTURE_RANGES

    def of_pairs(self, parameters: torch.Tensor) -> torch.Tensor:
        """log P of what was said of each pair: (U,)."""
        weights, lapses, mixture = parameters.split(self.sizes)
        swayed, lapse = (self.sways @ weights)[:, None], lapses[self.rater][:, None]

        def said(gap: torch.Tensor) -> torch.Tensor:  # (N, nodes) -> (U, nodes)
            chance = (1 - lapse) * torch.sigmoid(self.chosen * gap) + lapse / 2
            total = torch.zeros(self.pairs, gap.shape[1], dtype=torch.double)
            return total.index_add(0, self.pair, chance.clamp_min(1e-300).log())

        if self.words is None:
            return said(swayed).squeeze(1)
        slopes, widths, odds = mixture.split([2, 2, 1])
        shares = torch.nn.functional.logsigmoid(torch.cat([odds, -odds]))
        parts = [
            share
            + torch.logsumexp(
                said(swayed + slope * self.words[:, None] + width.exp() * self.nodes) + self.log_weights, 1
            )
            for share, slope, width in zip(shares, slopes, widths, strict=True)
        ]
        return torch.logsumexp(torch.stack(parts), 0)

    def prior(self, parameters: torch.Tensor) -> torch.Tensor:
        """-log of the priors' density, less its constant."""
        weights, lapses, mixture = parameters.split(self.sizes)
        a, b = LAPSE
        of_lapses = -(a - 1) * lapses.log() - (b - 1) * (-lapses).log1p()
        normal = [weights / WEIGHT_SD]
        if self.words is not None:
            slopes, widths, odds = mixture.split([2, 2, 1])
            normal += [slopes / SLOPE_SD, widths.exp() / torch.tensor(WIDTH_SDS), odds / ODDS_SD]
        return of_lapses.sum() + torch.cat(normal).square().sum() / 2

    def loss(self, parameters: Array) -> tuple[float, Array]:
        """-log of the posterior density, less its constant, and its gradient."""
        at = torch.tensor(parameters, requires_grad=True)
        total = self.prior(at) - self.of_pairs(at).sum()
        (gradient,) = torch.autograd.grad(total, at)
        return total.item(), gradient.numpy()

    def mode(self) -> OptimizeResult:
        """Where the posterior is highest, from `start` on."""
        options = {"maxiter": 500}
        return minimize(self.loss, self.start, bounds=self.ranges, jac=True, method="L-BFGS-B", options=options)

    def covariance(self, parameters: Array) -> Array:
        """H^-1 (S + P) H^-1 (White 1982): H, P the curvatures of posterior and prior, S the items' scores, squared."""
        at = torch.tensor(parameters)
        ways = torch.eye(len(at), dtype=at.dtype)
        each = torch.stack([torch.autograd.functional.jvp(self.of_pairs, at, way)[1] for way in ways], 1)
        scores = torch.zeros(int(self.item.max()) + 1, len(at), dtype=at.dtype).index_add(0, self.item, each)
        curved = torch.autograd.functional.hessian(lambda given: -self.of_pairs(given).sum(), at)
        prior = torch.autograd.functional.hessian(self.prior, at)
        inverse = torch.linalg.pinv(curved + prior, hermitian=True, rtol=1e-8)
        covariance: Array = (inverse @ (scores.T @ scores + prior) @ inverse).numpy()
        return covariance
