"""A model of choices between two completions: Bradley-Terry with lapses, with quality known or integrated out.

Rater r prefers the first completion of a pair, which is better by q, with probability

    (1 - lapse_r) sigmoid(q + bias_r . x) + lapse_r / 2

where x is what may sway the rater: the place on the page, the length. If q is not known, it is a random effect of the
pair that all its raters share. It comes from a mixture of two normals whose means are proportional to the difference in
length (a logistic mixed model, integrated by Gauss-Hermite quadrature). A lapse shows where the others leave no doubt.

Weak priors keep parameters that few choices hardly determine from running away (Gelman et al. 2008, 0901.4011): normal
for the weights, sd 3 log-odds at a typical difference; Beta(1.5, 6) for the lapses, with its mode at .09; in the
mixture, normal for the slopes on length and the log-odds of the first normal, half-normal for the widths.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize

from rlhf_kit.stats import Z

Array = NDArray[np.float64]
Codes = NDArray[np.integer[Any]]
NODES = 21  # of the quadrature
WEIGHT_SD = 3.0  # log-odds for a difference of root-mean-square size
LAPSE = (1.5, 6.0)  # Beta
SLOPE_SD, WIDTH_SDS, ODDS_SD = 2.0, (2.0, 8.0), 1.5  # of the mixture
# Where the search for the mode starts and the bounds it keeps. The mixture has two slopes, two log widths, log-odds.
WEIGHT_RANGE, LAPSE_START, LAPSE_RANGE = (-100.0, 100.0), 0.1, (1e-4, 0.95)
MIXTURE_START = [0.0, 0.0, -0.5, 1.8, 0.0]
MIXTURE_RANGES = [(-12.0, 12.0), (-12.0, 12.0), (-3.0, 3.5), (-3.0, 3.5), (-6.0, 6.0)]


class Choices(NamedTuple):
    """N choices: +1 for the pair's first completion or -1; what may sway the rater, (N, P); who, which pair and item.

    words: length of the first completion less that of the second; None where a column of `sways` is the quality.
    """

    chosen: Array
    sways: Array
    rater: Codes
    pair: Codes
    item: Codes
    words: Array | None = None


class Fit(NamedTuple):
    """Weights of the columns of `sways` (P,), their covariance (P, P), and lapses with 95% bounds (R, 3)."""

    weights: Array
    covariance: Array
    lapses: Array
    why: str


def fit(choices: Choices) -> Fit:
    """The posterior mode, with standard errors robust to what pairs of one item share; NaN where nothing is known."""
    n, raters = choices.sways.shape[1], int(choices.rater.max()) + 1
    varied = np.flatnonzero(np.abs(choices.sways).max(0) > 0)
    nothing = Fit(np.full(n, np.nan), np.full((n, n), np.nan), np.full((raters, 3), np.nan), "")
    k, used, items = len(varied), choices.sways[:, varied], len(np.unique(choices.item))
    if not k or np.linalg.matrix_rank(used) < k or items <= k + raters:
        return nothing._replace(why=f"{len(choices.chosen)} choices about {items} items are too few")
    scale = np.sqrt((used**2).sum(0) / (used != 0).sum(0))  # a typical difference: gold and words have units
    model = Posterior(choices._replace(sways=used / scale), raters)
    found = model.mode()
    if not found.success:
        return nothing._replace(why=f"no model of the choices was found ({found.message})")
    weights = found.x[:k] / scale
    if choices.words is None and (choices.chosen * (used @ weights) > 0).all():
        return nothing._replace(why="the choices are explained without any error, so no finite bias fits best")
    covariance = model.covariance(found.x)
    nothing.weights[varied] = weights
    nothing.covariance[np.ix_(varied, varied)] = covariance[:k, :k] / np.outer(scale, scale)
    lapses, errors = found.x[k : k + raters, None], np.sqrt(np.diag(covariance)[k : k + raters, None])
    bounded = np.clip(lapses + np.array([0, -1, 1]) * Z * errors, 0, 1)
    return nothing._replace(lapses=bounded, why="" if k == n else "order or length never differed")


class Posterior:
    """The posterior of one row of parameters: weights, lapses, then the mixture's slopes, log widths and log-odds."""

    def __init__(self, choices: Choices, raters: int) -> None:
        self.chosen, self.sways = torch.from_numpy(choices.chosen)[:, None], torch.from_numpy(choices.sways)
        self.rater = torch.tensor(choices.rater)
        _, first, pair = np.unique(choices.pair, return_index=True, return_inverse=True)
        _, item = np.unique(choices.item[first], return_inverse=True)
        self.pair, self.pairs, self.item = torch.from_numpy(pair), len(first), torch.from_numpy(item)
        self.sizes, self.words = [choices.sways.shape[1], raters, 0], None
        if choices.words is not None:
            self.words = torch.from_numpy(choices.words / max(float(choices.words.std()), 1e-9))[:, None]
            nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
            self.nodes, self.log_weights = torch.from_numpy(nodes), torch.from_numpy(np.log(weights / weights.sum()))
            self.sizes[2] = len(MIXTURE_START)

    def of_pairs(self, parameters: torch.Tensor) -> torch.Tensor:
        """log P of the choices about each pair: (U,)."""
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
        parts = []
        for share, slope, width in zip(shares, slopes, widths, strict=True):
            each = said(swayed + slope * self.words + width.exp() * self.nodes)
            parts.append(share + torch.logsumexp(each + self.log_weights, 1))
        return torch.logsumexp(torch.stack(parts), 0)

    def prior(self, parameters: torch.Tensor) -> torch.Tensor:
        """-log of the priors' density, without its constant."""
        weights, lapses, mixture = parameters.split(self.sizes)
        a, b = LAPSE
        of_lapses = -(a - 1) * lapses.log() - (b - 1) * (-lapses).log1p()
        normal = [weights / WEIGHT_SD]
        if self.words is not None:
            slopes, widths, odds = mixture.split([2, 2, 1])
            normal += [slopes / SLOPE_SD, widths.exp() / torch.tensor(WIDTH_SDS), odds / ODDS_SD]
        return of_lapses.sum() + torch.cat(normal).square().sum() / 2

    def loss(self, parameters: torch.Tensor) -> torch.Tensor:
        """-log of the posterior density, without its constant."""
        return self.prior(parameters) - self.of_pairs(parameters).sum()

    def mode(self) -> OptimizeResult:
        """Where the posterior is highest."""
        weights, lapses, mixture = self.sizes
        start = [0.0] * weights + [LAPSE_START] * lapses + MIXTURE_START[:mixture]
        ranges = [WEIGHT_RANGE] * weights + [LAPSE_RANGE] * lapses + MIXTURE_RANGES[:mixture]

        def at(parameters: Array) -> tuple[float, Array]:
            gradient, loss = torch.func.grad_and_value(self.loss)(torch.from_numpy(parameters))
            return loss.item(), gradient.numpy()

        return minimize(at, start, bounds=ranges, jac=True, method="L-BFGS-B", options={"maxiter": 500})

    def covariance(self, mode: Array) -> Array:
        """H^-1 (S + P) H^-1 (White 1982): H, P the curvatures of posterior and prior, S the items' scores, squared."""
        at = torch.from_numpy(mode)
        each = torch.func.jacfwd(self.of_pairs)(at)
        scores = torch.zeros(int(self.item.max()) + 1, len(at), dtype=at.dtype).index_add(0, self.item, each)
        prior = torch.autograd.functional.hessian(self.prior, at)
        inverse = torch.linalg.pinv(torch.autograd.functional.hessian(self.loss, at), hermitian=True, rtol=1e-8)
        covariance: Array = (inverse @ (scores.T @ scores + prior) @ inverse).numpy()
        return covariance
