"""How good feedback is: votes, agreement beyond chance, and what sways raters besides quality."""

from functools import partial
from itertools import combinations
from typing import Any

import krippendorff
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.linalg import block_diag
from scipy.optimize import OptimizeResult, minimize
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import logit
from scipy.stats import binomtest

from rlhf_kit import stats
from rlhf_kit.feedback.judging import SCALES, FeedbackError
from rlhf_kit.rewards import Completion
from rlhf_kit.stats import NOT_MEASURED, Interval, Z, columns

Array = NDArray[np.float64]
Codes = NDArray[np.integer[Any]]
DOMAINS: dict[str, list[int]] = {"rank": [-1, 0, 1], **{question: list(scale) for question, scale in SCALES.items()}}
PAIR = ["question", "item", "pair"]  # what a vote is about
NUMBERS = [name + end for name in ("position", "length", "lapse") for end in ("", "_lo", "_hi")]
NODES = 21  # of the quadrature
# Weak priors keep parameters that few choices hardly determine from running away (Gelman et al. 2008, 0901.4011).
WEIGHT_SD = 3.0  # normal, log-odds for a difference of root-mean-square size
LAPSE = (1.5, 6.0)  # Beta, with its mode at .09
SLOPE_SD, WIDTH_SDS, ODDS_SD = 2.0, (2.0, 8.0), 1.5  # of the mixture: normal, half-normal, normal


def votes(judgments: pd.DataFrame, repeats: bool = False) -> pd.DataFrame:
    """A row per rater and pair, or rated completion: `question, item, rater, pair, value, first, words`.

    `pair` names two completions by their places in the item, such as "0-1". `value` is +1 where the rater prefers the
    first of them, 0 for a tie, else -1; a rated completion is "0", and its value the rating. `first` is +1 where the
    page began with the pair's first completion, -1 with its second, else 0; `words` is the length of the first less
    that of the second. The last of repeated votes counts, or with `repeats` all. FeedbackError if there is none.
    """
    present = judgments[~judgments["withdrawn"]]
    if present.empty:
        raise FeedbackError("there are no judgments yet; collect some with feedback.ask or rk.rate")
    rows: list[tuple[Any, ...]] = []
    for judgment in present.to_dict("records"):
        known = (judgment["question"], judgment["item"], judgment["rater"])
        lengths = [words(completion) for completion in judgment["completions"]]
        if not np.isnan(judgment["rating"]):
            rows.append((*known, "0", int(judgment["rating"]), 0, lengths[0]))
        ranks, top = judgment["ranks"] or (), judgment["shown"][0]
        for one, other in combinations(range(len(ranks)), 2):
            value, first = int(np.sign(ranks[other] - ranks[one])), (top == one) - (top == other)
            rows.append((*known, f"{one}-{other}", value, first, lengths[one] - lengths[other]))
    frame = pd.DataFrame(rows, columns=["question", "item", "rater", "pair", "value", "first", "words"])
    return frame if repeats else frame.drop_duplicates([*PAIR, "rater"], keep="last").reset_index(drop=True)


def words(completion: Completion) -> int:
    """Words of a text or a chat: the parts between spaces that have a letter or a digit."""
    texts = [completion] if isinstance(completion, str) else [message.get("content") or "" for message in completion]
    return sum(any(map(str.isalnum, word)) for text in texts for word in text.split())


def agreement(judgments: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row per question and measure: `question, measure, raters, value, lo, hi, used, left_out, why`.

    "alpha" is Krippendorff's ordinal alpha (2011), 1 - observed / expected disagreement: 1 is perfect agreement, 0 is
    what chance gives. "percent agreement" is the chance that two raters of a pair say the same. `used` counts the pairs
    or rated completions with two raters or more, `left_out` the others; `why` says why a value is NaN. Intervals are
    95%, by bootstrap over items.
    """
    rows = []
    for question, part in votes(judgments).groupby("question", sort=False):
        domain = DOMAINS[str(question)]
        table = part.groupby(["item", "pair", "value"]).size().unstack(fill_value=0)
        counts = table.reindex(columns=domain, fill_value=0).to_numpy()  # votes for each value, (pairs, values)
        shared = counts.sum(1) > 1
        counts, items = counts[shared], table.index.get_level_values("item")[shared]
        alpha = percent = NOT_MEASURED
        if len(counts):
            raters = counts.sum(1)
            same = (counts * (counts - 1)).sum(1) / (raters * (raters - 1))
            alpha = stats.bootstrap_of(partial(_alpha, counts, domain), items, seed=seed)
            percent = stats.bootstrap(same, items, seed=seed)
        undefined = "only one value was ever given" if len(counts) else "no two raters judged the same"
        for measure, found in {"alpha": alpha, "percent agreement": percent}.items():
            used, why = (len(counts), len(table) - len(counts)), undefined if np.isnan(found.mean) else ""
            rows.append((question, measure, part["rater"].nunique(), *found, *used, why))
    return pd.DataFrame(rows, columns=["question", "measure", "raters", "value", "lo", "hi", "used", "left_out", "why"])


def _alpha(counts: NDArray[np.int64], domain: list[int], rows: NDArray[np.int64]) -> float:
    drawn = counts[rows]
    if domain == DOMAINS["rank"]:
        # Each pair in both orders, because the order of an item's completions means nothing. Preferences that list the
        # better one first would otherwise look like agreement by chance.
        drawn = np.concatenate([drawn, drawn[:, ::-1]])
    if (drawn.sum(0) > 0).sum() < 2:
        return float("nan")
    return float(krippendorff.alpha(value_counts=drawn, value_domain=domain, level_of_measurement="ordinal"))


def biases(judgments: pd.DataFrame) -> pd.DataFrame:
    """A row per rater: `position`, `length`, `lapse` with `_lo` and `_hi`, `choices` (pairs, without ties) and `why`.

    `position` is in log-odds for the completion that the page begins with, `length` in log-odds per word, `lapse` is
    the share of choices made at random; `why` says why a number is NaN. Intervals are 95%, robust to what pairs of one
    item share. `length` is relative to the raters who share pairs with this one, whose mean is 0: a liking for length
    that all of them share looks like quality. What one rater alone does not know of a pair looks like lapses. In pocket
    panels of three or six raters, who all judged 60 to 300 pairs, 90% to 100% of the intervals held the planted value.
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

    For a quality gap d and a bias b the rater prefers the first place with chance s(b + d) in one order and s(b - d) in
    the other, and s(x) / s(-x) = exp(x). So P(first place twice) / P(second place twice) = exp(2b) whatever d is, and
    b = log(n_FF / n_SS) / 2. The interval is that of the share n_FF / (n_FF + n_SS) by Clopper and Pearson (1934).
    `swaps` counts pairs judged in both orders, `changed` those where the choice followed the place. The first of
    several judgments in one order counts.
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
    """The number of each choice's panel: raters who are linked by pairs that both judged."""
    rater, pair = pd.factorize(decided["rater"])[0], decided.groupby(["item", "pair"]).ngroup()
    judged = csr_array((np.ones(len(decided)), (rater, pair)))
    panels: Codes = connected_components(judged @ judged.T)[1]
    return panels[rater]


def _of_panel(own: pd.DataFrame) -> pd.DataFrame:
    rater, raters = pd.factorize(own["rater"], sort=True)
    names, n, items = list(raters), len(raters), own["item"].nunique()
    if own.groupby(["item", "pair"])["value"].nunique().max() == 1:
        return _table(names, f"{'shares no pair' if n == 1 else 'never disagrees'} with another rater")
    mine = rater[:, None] == np.arange(n)
    value, first, words = (own[name].to_numpy(dtype=float) for name in ("value", "first", "words"))
    free = np.vstack([np.eye(n - 1), -np.ones(n - 1)])  # n tastes for length with mean 0, from n - 1 free ones
    sways = np.hstack([mine * first[:, None], mine * words[:, None] @ free])
    spread = block_diag(np.eye(n), free)  # weights to positions and lengths
    varied = np.abs(sways).max(0) > 0
    used, k = sways[:, varied], int(varied.sum())
    if not k or np.linalg.matrix_rank(used) < k or items <= k + n:
        return _table(names, f"{len(own)} choices about {items} items are too few")
    scale = np.sqrt((used**2).sum(0) / (used != 0).sum(0))  # a typical difference: words have a unit
    pair = own.groupby(["item", "pair"], sort=False).ngroup().to_numpy()
    item_of_pair = pd.factorize(own.drop_duplicates(["item", "pair"])["item"])[0]
    model = Posterior(value, used / scale, words, rater, pair, item_of_pair)
    found = model.mode()
    if not found.success:
        return _table(names, f"no model of the choices was found ({found.message})")
    covariance, scaled = model.covariance(found.x), spread[:, varied] / scale
    middle, half = scaled @ found.x[:k], Z * np.sqrt(np.diag(scaled @ covariance[:k, :k] @ scaled.T))
    middle[(spread[:, ~varied] != 0).any(1)] = np.nan  # a sum is unknown where one of its weights is
    position, length = np.split(np.stack([middle, middle - half, middle + half], 1), 2)
    lapses, errors = found.x[k : k + n, None], np.sqrt(np.diag(covariance)[k : k + n, None])
    bounded = np.clip(lapses + np.array([0, -1, 1]) * Z * errors, 0, 1)
    why = "" if varied.all() else "order or length never differed"
    return _table(names, why, np.hstack([position, length, bounded]))


class Posterior:
    """The posterior of one row of parameters: weights, lapses, then the mixture's slopes, log widths and log-odds.

    The model is Bradley-Terry (1952) with lapses. Rater r prefers the first completion of a pair, better by q, with
    chance (1 - lapse_r) sigmoid(q + weights_r . x) + lapse_r / 2, where x is what may sway the rater. The quality q is
    a random effect of the pair that all its raters share. It comes from a mixture of two normals whose means are
    proportional to the difference in words (a logistic mixed model, integrated by Gauss-Hermite quadrature).

    Of N choices about U pairs: `chosen` (N,) is +1 for the first completion or -1, `sways` (N, P), `words` (N,), the
    numbers of `rater` and `pair` (N,), and of the `item` of each pair (U,).
    """

    def __init__(self, chosen: Array, sways: Array, words: Array, rater: Codes, pair: Codes, item: Codes) -> None:
        self.chosen, self.sways = torch.from_numpy(chosen)[:, None], torch.from_numpy(sways)
        self.words = torch.from_numpy(words / max(float(words.std()), 1e-9))[:, None]
        self.rater, self.pair, self.item = torch.tensor(rater), torch.tensor(pair), torch.tensor(item)
        self.sizes = [sways.shape[1], int(rater.max()) + 1, 2, 2, 1]
        nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
        self.nodes, self.log_weights = torch.from_numpy(nodes), torch.from_numpy(np.log(weights / weights.sum()))

    def of_pairs(self, parameters: torch.Tensor) -> torch.Tensor:
        """log P of the choices about each pair: (U,)."""
        weights, lapses, slopes, widths, odds = parameters.split(self.sizes)
        swayed, lapse = (self.sways @ weights)[:, None], lapses[self.rater][:, None]
        parts = []
        for share, slope, width in zip(torch.cat([odds, -odds]), slopes, widths, strict=True):
            gap = swayed + slope * self.words + width.exp() * self.nodes  # (N, nodes)
            chance = (1 - lapse) * torch.sigmoid(self.chosen * gap) + lapse / 2
            total = torch.zeros(len(self.item), NODES, dtype=torch.double)
            said = total.index_add(0, self.pair, chance.clamp_min(1e-300).log())
            parts.append(torch.nn.functional.logsigmoid(share) + torch.logsumexp(said + self.log_weights, 1))
        return torch.logsumexp(torch.stack(parts), 0)

    def prior(self, parameters: torch.Tensor) -> torch.Tensor:
        """-log of the priors' density, without its constant."""
        weights, lapses, slopes, widths, odds = parameters.split(self.sizes)
        a, b = LAPSE
        of_lapses = -(a - 1) * lapses.log() - (b - 1) * (-lapses).log1p()
        normal = [weights / WEIGHT_SD, slopes / SLOPE_SD, widths.exp() / torch.tensor(WIDTH_SDS), odds / ODDS_SD]
        return of_lapses.sum() + torch.cat(normal).square().sum() / 2

    def loss(self, parameters: torch.Tensor) -> torch.Tensor:
        return self.prior(parameters) - self.of_pairs(parameters).sum()

    def mode(self) -> OptimizeResult:
        weights, lapses, *_ = self.sizes
        start = [0.0] * weights + [0.1] * lapses + [0.0, 0.0, -0.5, 1.8, 0.0]
        bounds = [(-100.0, 100.0)] * weights + [(1e-4, 0.95)] * lapses
        bounds += [(-12.0, 12.0)] * 2 + [(-3.0, 3.5)] * 2 + [(-6.0, 6.0)]

        def at(parameters: Array) -> tuple[float, Array]:
            point = torch.tensor(parameters, requires_grad=True)
            loss = self.loss(point)
            (gradient,) = torch.autograd.grad(loss, point)
            return loss.item(), gradient.numpy()

        return minimize(at, start, bounds=bounds, jac=True, method="L-BFGS-B", options={"maxiter": 500})

    def covariance(self, mode: Array) -> Array:
        """H^-1 (S + P) H^-1 (White 1982): H, P the curvatures of posterior and prior, S the items' scores, squared."""
        at = torch.from_numpy(mode)
        each = torch.func.jacfwd(self.of_pairs)(at)  # (U, parameters)
        scores = torch.zeros(int(self.item.max()) + 1, len(at), dtype=at.dtype).index_add(0, self.item, each)
        prior = torch.autograd.functional.hessian(self.prior, at)
        inverse = torch.linalg.pinv(torch.autograd.functional.hessian(self.loss, at), hermitian=True, rtol=1e-8)
        return np.asarray(inverse @ (scores.T @ scores + prior) @ inverse)
