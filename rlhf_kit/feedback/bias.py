"""What sways raters besides quality: a completion's place on the page and its length; and how often raters lapse.

The model is Bradley-Terry (1952) with lapses. Rater r prefers the first completion of a pair, better by q, with chance

    (1 - lapse_r) sigmoid(q + bias_r . x) + lapse_r / 2

where x is what may sway the rater: the place on the page, the difference in words. The quality q is a random effect of
the pair that all its raters share. It comes from a mixture of two normals whose means are proportional to the
difference in words (a logistic mixed model, integrated by Gauss-Hermite quadrature).

Weak priors keep parameters that few choices hardly determine from running away (Gelman et al. 2008, 0901.4011): normal
for the weights, sd 3 log-odds at a typical difference; Beta(1.5, 6) for the lapses, with its mode at .09; in the
mixture, normal for the slopes on length and the log-odds of the first normal, half-normal for the widths.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, minimize
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import logit
from scipy.stats import binomtest

from rlhf_kit.feedback.agreement import PAIR, votes
from rlhf_kit.stats import NOT_MEASURED, Interval, Z, columns

Array = NDArray[np.float64]
Codes = NDArray[np.integer[Any]]
NUMBERS = [name + end for name in ("position", "length", "lapse") for end in ("", "_lo", "_hi")]
NODES = 21  # of the quadrature
WEIGHT_SD = 3.0  # log-odds for a difference of root-mean-square size
LAPSE = (1.5, 6.0)  # Beta
SLOPE_SD, WIDTH_SDS, ODDS_SD = 2.0, (2.0, 8.0), 1.5  # of the mixture
# Where the search for the mode starts and the bounds it keeps. The mixture has two slopes, two log widths, log-odds.
WEIGHT_RANGE, LAPSE_START, LAPSE_RANGE = (-100.0, 100.0), 0.1, (1e-4, 0.95)
MIXTURE_START = [0.0, 0.0, -0.5, 1.8, 0.0]
MIXTURE_RANGES = [(-12.0, 12.0), (-12.0, 12.0), (-3.0, 3.5), (-3.0, 3.5), (-6.0, 6.0)]


def biases(judgments: pd.DataFrame) -> pd.DataFrame:
    """A row per rater: `position`, `length`, `lapse` with `_lo` and `_hi`, `choices` (pairs, without ties) and `why`.

    `position` is in log-odds for the completion that the page begins with, `length` in log-odds per word, `lapse` is
    the share of choices made at random; `why` says why a number is NaN. Intervals are 95%, robust to what pairs of one
    item share. `length` is relative to the raters who share pairs with this one, whose mean is 0: a liking for length
    that all of them share looks like quality. What one rater alone does not know of a pair looks like lapses.

    In pocket panels with the usual faults, each pair judged by all, the intervals held the planted value in 94%
    (position), 92% (length) and 97% (lapse) of 120 cases with six raters and 300 pairs; in 97%, 90%, 100% of 60 cases
    with three raters and 100 pairs; and in 93%, 90%, 100% with 60 pairs.
    """
    found = votes(judgments)
    decided = found[(found["question"] == "rank") & (found["value"] != 0)]
    table = _table(_raters(judgments), "no pair was decided by this rater")
    for _, own in decided.groupby(_panels(decided)) if len(decided) else ():
        part = _of_panel(own)
        table.loc[part.index] = part
    table["choices"] = decided["rater"].value_counts().reindex(table.index, fill_value=0)
    return table.rename_axis("rater").reset_index()


def position_from_swaps(judgments: pd.DataFrame) -> pd.DataFrame:
    """Position bias from pairs judged in both orders: `rater, position_swapped[_lo, _hi], swaps, changed`.

    It is exact whatever the quality. For a quality gap d and a bias b the rater prefers the first place with chance
    s(b + d) in one order and s(b - d) in the other, and s(x) / s(-x) = exp(x). So P(first place twice) / P(second place
    twice) = exp(2b), and b = log(n_FF / n_SS) / 2. The interval is that of the share n_FF / (n_FF + n_SS) by Clopper
    and Pearson (1934). `swaps` counts pairs judged in both orders, `changed` those where the choice followed the place.
    The first of several judgments in one order counts.
    """
    found = votes(judgments, repeats=True)
    pairs = found[(found["question"] == "rank") & (found["first"] != 0) & (found["value"] != 0)]
    orders = pairs.drop_duplicates([*PAIR, "rater", "first"])
    sided = orders.assign(side=orders["value"] * orders["first"])  # +1: the rater preferred the first place
    twice = sided.groupby([*PAIR, "rater"])["side"].agg(["size", "sum"]).query("size == 2").reset_index("rater")
    rows = []
    for rater in _raters(judgments):
        sums = twice.loc[twice["rater"] == rater, "sum"]
        first, changed = int((sums == 2).sum()), int((sums != 0).sum())
        bias = NOT_MEASURED
        if changed:  # where all went one way, the estimate is infinite and one bound is finite
            share = binomtest(first, changed).proportion_ci(method="exact")
            bias = Interval(*(logit([first / changed, share.low, share.high]) / 2).tolist())
        rows.append({"rater": rater, "swaps": len(sums), "changed": changed, **columns("position_swapped", bias)})
    return pd.DataFrame(rows)


def _raters(judgments: pd.DataFrame) -> list[str]:
    return sorted(judgments.loc[~judgments["withdrawn"], "rater"].unique())


def _table(raters: list[str], why: str, numbers: Array | float = np.nan) -> pd.DataFrame:
    return pd.DataFrame(numbers, index=raters, columns=NUMBERS).assign(why=why)


def _panels(decided: pd.DataFrame) -> Codes:
    """The number of each choice's panel: the raters who are linked by pairs that both judged."""
    rater, pair = pd.factorize(decided["rater"])[0], decided.groupby(["item", "pair"]).ngroup()
    judged = csr_array((np.ones(len(decided)), (rater, pair)))
    panels: Codes = connected_components(judged @ judged.T)[1]
    return panels[rater]


def _of_panel(own: pd.DataFrame) -> pd.DataFrame:
    """The posterior mode for one panel, with standard errors robust to what pairs of one item share."""
    rater, raters = pd.factorize(own["rater"], sort=True)
    names, n, items = list(raters), len(raters), own["item"].nunique()
    if own.groupby(["item", "pair"])["value"].nunique().max() == 1:
        return _table(names, f"{'shares no pair' if n == 1 else 'never disagrees'} with another rater")
    mine = rater[:, None] == np.arange(n)
    first, words = (own[name].to_numpy(dtype=float) for name in ("first", "words"))
    free = np.vstack([np.eye(n - 1), -np.ones(n - 1)])  # n tastes for length with mean 0, from n - 1 free ones
    sways = np.hstack([mine * first[:, None], mine * words[:, None] @ free])
    spread = np.block([[np.eye(n), np.zeros((n, n - 1))], [np.zeros((n, n)), free]])  # weights to positions, lengths
    varied = np.abs(sways).max(0) > 0
    used, k = sways[:, varied], int(varied.sum())
    if not k or np.linalg.matrix_rank(used) < k or items <= k + n:
        return _table(names, f"{len(own)} choices about {items} items are too few")
    scale = np.sqrt((used**2).sum(0) / (used != 0).sum(0))  # a typical difference: words have a unit
    pair = own.groupby(["item", "pair"], sort=False).ngroup().to_numpy()
    item_of_pair = pd.factorize(own.drop_duplicates(["item", "pair"])["item"])[0]
    model = Posterior(own["value"].to_numpy(dtype=float), used / scale, words, rater, pair, item_of_pair)
    found = model.mode()
    if not found.success:
        return _table(names, f"no model of the choices was found ({found.message})")
    covariance = model.covariance(found.x)
    weights, of_weights = np.zeros(len(varied)), np.zeros((len(varied), len(varied)))
    weights[varied] = found.x[:k] / scale
    of_weights[np.ix_(varied, varied)] = covariance[:k, :k] / np.outer(scale, scale)
    middle, half = spread @ weights, Z * np.sqrt(np.diag(spread @ of_weights @ spread.T))
    middle[(spread[:, ~varied] != 0).any(1)] = np.nan  # a sum is unknown where one of its weights is
    position, length = np.split(np.stack([middle, middle - half, middle + half], 1), 2)
    lapses, errors = found.x[k : k + n, None], np.sqrt(np.diag(covariance)[k : k + n, None])
    bounded = np.clip(lapses + np.array([0, -1, 1]) * Z * errors, 0, 1)
    why = "" if varied.all() else "order or length never differed"
    return _table(names, why, np.hstack([position, length, bounded]))


class Posterior:
    """The posterior of one row of parameters: weights, lapses, then the mixture's slopes, log widths and log-odds.

    Of N choices about U pairs: `chosen` (N,) is +1 for the first completion or -1, `sways` (N, P), `words` (N,), the
    numbers of `rater` and `pair` (N,), and of the `item` of each pair (U,).
    """

    def __init__(self, chosen: Array, sways: Array, words: Array, rater: Codes, pair: Codes, item: Codes) -> None:
        self.chosen, self.sways = torch.from_numpy(chosen)[:, None], torch.from_numpy(sways)
        self.words = torch.from_numpy(words / max(float(words.std()), 1e-9))[:, None]
        self.rater, self.pair, self.item = torch.tensor(rater), torch.tensor(pair), torch.tensor(item)
        self.sizes = [sways.shape[1], int(rater.max()) + 1, len(MIXTURE_START)]
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        self.nodes, self.log_weights = torch.from_numpy(nodes), torch.from_numpy(np.log(weights / weights.sum()))

    def of_pairs(self, parameters: torch.Tensor) -> torch.Tensor:
        """log P of the choices about each pair: (U,)."""
        weights, lapses, mixture = parameters.split(self.sizes)
        slopes, widths, odds = mixture.split([2, 2, 1])
        swayed, lapse = (self.sways @ weights)[:, None], lapses[self.rater][:, None]
        shares = torch.nn.functional.logsigmoid(torch.cat([odds, -odds]))
        parts = []
        for share, slope, width in zip(shares, slopes, widths, strict=True):
            gap = swayed + slope * self.words + width.exp() * self.nodes  # (N, nodes)
            chance = (1 - lapse) * torch.sigmoid(self.chosen * gap) + lapse / 2
            total = torch.zeros(len(self.item), NODES, dtype=torch.double)
            said = total.index_add(0, self.pair, chance.clamp_min(1e-300).log())
            parts.append(share + torch.logsumexp(said + self.log_weights, 1))
        return torch.logsumexp(torch.stack(parts), 0)

    def prior(self, parameters: torch.Tensor) -> torch.Tensor:
        """-log of the priors' density, without its constant."""
        weights, lapses, mixture = parameters.split(self.sizes)
        slopes, widths, odds = mixture.split([2, 2, 1])
        a, b = LAPSE
        of_lapses = -(a - 1) * lapses.log() - (b - 1) * (-lapses).log1p()
        normal = [weights / WEIGHT_SD, slopes / SLOPE_SD, widths.exp() / torch.tensor(WIDTH_SDS), odds / ODDS_SD]
        return of_lapses.sum() + torch.cat(normal).square().sum() / 2

    def loss(self, parameters: torch.Tensor) -> torch.Tensor:
        """-log of the posterior density, without its constant."""
        return self.prior(parameters) - self.of_pairs(parameters).sum()

    def mode(self) -> OptimizeResult:
        """Where the posterior is highest."""
        weights, lapses, _ = self.sizes
        start = [0.0] * weights + [LAPSE_START] * lapses + MIXTURE_START
        ranges = [WEIGHT_RANGE] * weights + [LAPSE_RANGE] * lapses + MIXTURE_RANGES

        def at(parameters: Array) -> tuple[float, Array]:
            point = torch.tensor(parameters, requires_grad=True)
            loss = self.loss(point)
            (gradient,) = torch.autograd.grad(loss, point)
            return loss.item(), gradient.numpy()

        return minimize(at, start, bounds=ranges, jac=True, method="L-BFGS-B", options={"maxiter": 500})

    def covariance(self, mode: Array) -> Array:
        """H^-1 (S + P) H^-1 (White 1982): H, P the curvatures of posterior and prior, S the items' scores, squared."""
        at = torch.from_numpy(mode)
        ways = torch.eye(len(at), dtype=at.dtype)
        each = torch.stack([torch.autograd.functional.jvp(self.of_pairs, at, way)[1] for way in ways], 1)  # (U, ways)
        scores = torch.zeros(int(self.item.max()) + 1, len(at), dtype=at.dtype).index_add(0, self.item, each)
        prior = torch.autograd.functional.hessian(self.prior, at)
        inverse = torch.linalg.pinv(torch.autograd.functional.hessian(self.loss, at), hermitian=True, rtol=1e-8)
        covariance: Array = (inverse @ (scores.T @ scores + prior) @ inverse).numpy()
        return covariance
