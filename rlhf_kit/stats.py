"""Numbers with intervals from frames of scores: means, differences, win rates, calibration, best-of-n.

Samples of one prompt are alike, so each prompt counts once, however many it has, and intervals come from resampling
prompts (and seeds if the frame has several). A row without a number is an error; what was not measured at all is NaN.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import comb

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
DRAWS_AT_ONCE = 4_000_000  # bounds the memory of one block of resamples: 32 MB of indices
LEVEL, Z = 0.95, 1.959963984540054  # of intervals, and the standard errors on either side
UNITS = ["seed", "prompt_id"]  # what is resampled, the outer one first
NO_INTERVAL = "no interval: one prompt only"


class Interval(NamedTuple):
    """A mean with the bounds of its interval; the bounds are NaN where they cannot be estimated."""

    mean: float
    lo: float
    hi: float

    def __str__(self) -> str:
        return format(self, ".2f")

    def __format__(self, spec: str) -> str:
        """The mean as `spec` says, with its bounds, or why there are none; "-" where nothing was measured."""
        digits = spec.removeprefix("+") or ".2f"
        unknown = math.isnan(self.lo) and math.isnan(self.hi)
        bounds = f"({NO_INTERVAL})" if unknown else f"[{self.lo:{digits}}, {self.hi:{digits}}]"
        return "-" if math.isnan(self.mean) else f"{self.mean:{spec or digits}} {bounds}"


NOT_MEASURED = Interval(math.nan, math.nan, math.nan)


def bootstrap(values: ArrayLike, groups: ArrayLike | None = None, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """95% percentile bootstrap of the mean of `values` [N], resampling whole `groups` [N] (prompts) if they are given.

    One value, or one group, says nothing about the spread: its bounds are NaN. ValueError if a value is not finite.
    """
    flat = _finite(values, "values")
    labels = np.arange(len(flat)) if groups is None else np.asarray(groups)
    if labels.shape != flat.shape:
        raise ValueError(f"groups has shape {labels.shape}, values {flat.shape}: give one group per value")
    _, index = np.unique(labels, return_inverse=True)
    sums, counts = np.bincount(index, weights=flat), np.bincount(index)
    draws = _resampled_means(sums, counts, n_resamples, np.random.default_rng(seed))
    return _percentiles(float(flat.mean()), draws, enough=len(sums) > 1)


def bootstrap_of(
    statistic: Callable[[Indices], float], groups: ArrayLike, n_resamples: int = 500, seed: int = 0
) -> Interval:
    """95% percentile bootstrap of any `statistic` of row numbers, resampling whole `groups` [N] of rows (prompts).

    Resamples that leave it undefined (NaN) are left out; if more than 5% do, or there is one group, the bounds are NaN.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    rows, size = np.arange(len(index)), int(index.max()) + 1
    value = float(statistic(rows))
    if size < 2 or math.isnan(value):
        return Interval(value, math.nan, math.nan)
    resamples = (drawn for block in _resamples(size, n_resamples, np.random.default_rng(seed)) for drawn in block)
    draws = np.array([statistic(np.repeat(rows, np.bincount(drawn, minlength=size)[index])) for drawn in resamples])
    found = draws[~np.isnan(draws)]
    return _percentiles(value, found, enough=len(found) >= LEVEL * n_resamples)


def hierarchical_bootstrap(frame: pd.DataFrame, value: str, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Mean over seeds of means over prompts, resampling seeds and, within each draw, prompts; 95% percentile interval.

    With one seed, or no column `seed`, it covers prompts only. ValueError names the column and row of the first fault.
    """
    means = _checked(frame, value).groupby(UNITS)[value].mean()
    parts = [part.to_numpy(float) for _, part in means.groupby("seed")]
    draws, rng = np.zeros(n_resamples), np.random.default_rng(seed)
    for _ in parts:  # each slot draws a seed, and that seed draws its prompts anew
        drawn = rng.integers(len(parts), size=n_resamples)
        for position, part in enumerate(parts):
            chosen = drawn == position
            draws[chosen] += _resampled_means(part, np.ones_like(part), int(chosen.sum()), rng)
    return _percentiles(float(np.mean([part.mean() for part in parts])), draws / len(parts), enough=len(means) > 1)


def _resamples(members: int, size: int, rng: np.random.Generator) -> Iterator[Indices]:
    """`size` times `members` numbers below `members`, drawn with replacement, in blocks [R, members] that fit."""
    step = max(1, DRAWS_AT_ONCE // members)
    for start in range(0, size, step):
        yield rng.integers(members, size=(min(step, size - start), members))


def _resampled_means(sums: NDArray[Any], counts: NDArray[Any], size: int, rng: np.random.Generator) -> Array:
    blocks = [sums[drawn].sum(1) / counts[drawn].sum(1) for drawn in _resamples(len(sums), size, rng)]
    return np.concatenate([np.empty(0), *blocks])


def _percentiles(mean: float, draws: Array, enough: bool) -> Interval:
    lo, hi = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if enough else (math.nan, math.nan)
    return Interval(mean, float(lo), float(hi))


def _finite(values: ArrayLike, name: str, index: Any = None) -> Array:
    """The values as floats [N], or a ValueError that says which one is not a number."""
    flat = np.asarray(values, dtype=float)
    if flat.ndim != 1 or len(flat) == 0:
        raise ValueError(f"{name} must be a list of at least one number, got shape {flat.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(flat))):
        row = bad[0] if index is None else index[bad[0]]
        raise ValueError(f"{name} is not finite in {len(bad)} of {len(flat)} rows, first in row {row}: {flat[bad[0]]}")
    return flat


def _checked(frame: pd.DataFrame, *values: str) -> pd.DataFrame:
    """The frame, of seed 0 if it names none; ValueError unless each row has a prompt, a seed and finite `values`."""
    frame = frame if "seed" in frame else frame.assign(seed=0)
    for name in (*UNITS, *values):
        if name not in frame:
            raise ValueError(f"the frame has no column {name!r}; it has {', '.join(map(str, frame.columns))}")
        if name in values:
            _finite(frame[name], name, frame.index)
        elif frame[name].isna().any():  # groupby would drop these rows without a word
            raise ValueError(f"column {name!r} is empty in row {frame.index[frame[name].isna()][0]}")
    return frame


def paired_difference(scores: pd.DataFrame, a: str, b: str, value: str) -> Interval:
    """Mean over prompts of (mean `value` of a's samples - mean of b's), on the same prompts, with its 95% interval.

    It covers prompts, and seeds if the column `seed` has several. Raises ValueError if a model or a prompt is missing.
    """
    left, right = _same_prompts(scores, a, b, value)
    difference = left.groupby(UNITS)[value].mean() - right.groupby(UNITS)[value].mean()
    return hierarchical_bootstrap(difference.reset_index(), value)


def win_rate(scores: pd.DataFrame, a: str, b: str, by: str) -> Interval:
    """Chance that a sample of a beats a sample of b to the same prompt by the score `by`; a tie is half a win.

    All pairs of samples of a prompt count, so a policy against itself is exactly 0.5. Interval and errors are those of
    `paired_difference`.
    """
    left, right = _same_prompts(scores, a, b, by)
    pairs = left.merge(right, on=UNITS, suffixes=("_a", "_b"))
    gap = pairs[f"{by}_a"] - pairs[f"{by}_b"]
    return hierarchical_bootstrap(pairs.assign(win=_wins(gap)), "win")


def _wins(margins: Any) -> Any:
    return (margins > 0) + 0.5 * (margins == 0)


def of_model(scores: pd.DataFrame, model: str, *values: str) -> pd.DataFrame:
    """The rows of a model; ValueError if there are none, or if one has no finite number in a column of `values`."""
    rows = scores[scores["model"] == model]
    if rows.empty:
        raise ValueError(f"no rows of model {model!r}; the scores have {', '.join(map(str, scores['model'].unique()))}")
    return _checked(rows, *values)


def _same_prompts(scores: pd.DataFrame, a: str, b: str, value: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The numbers of a and of b by seed and prompt; ValueError unless both have them for the very same prompts."""
    left, right = (of_model(scores, name, value)[[*UNITS, value]] for name in (a, b))
    prompts_a, prompts_b = (set(rows[UNITS].itertuples(index=False, name=None)) for rows in (left, right))
    if odd := sorted(prompts_a ^ prompts_b):
        said = f"{len(odd)} are on one side only, first prompt_id {odd[0][1]} of seed {odd[0][0]}"
        raise ValueError(f"{a} and {b} must be scored on the same prompts, but {said}")
    return left, right


def summary(scores: pd.DataFrame, baseline: str = "SFT") -> pd.DataFrame:
    """One row per model, in order of appearance: `X`, `X_lo`, `X_hi` per value and per `win_rate_<by>` over `baseline`.

    What was not measured (no such column, or empty for that model) stays NaN. ValueError if the baseline is missing.
    """
    base = of_model(scores, baseline)
    table: list[dict[str, Any]] = []
    for model in scores["model"].unique():
        rows = of_model(scores, model)
        row: dict[str, Any] = {"model": model}
        for value in ("gold", "proxy", "kl", "n_tokens"):
            row |= columns(value, hierarchical_bootstrap(rows, value) if measured(value, rows) else NOT_MEASURED)
        for by in ("gold", "proxy"):
            found = win_rate(scores, model, baseline, by) if measured(by, rows, base) else NOT_MEASURED
            row |= columns(f"win_rate_{by}", found)
        table.append(row)
    return pd.DataFrame(table)


def measured(value: str, *sides: pd.DataFrame) -> bool:
    """Whether every side has the column and a number in it."""
    return all(value in rows and rows[value].notna().any() for rows in sides)


def columns(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three cells of a row: `X`, `X_lo`, `X_hi`."""
    return {name: interval.mean, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}


def compare(scores: pd.DataFrame, a: str = "PPO", b: str = "DPO") -> pd.DataFrame:
    """RLHF against DPO on the same prompts: win rate of a over b, and a - b in gold, proxy, `kl` (nats) and `n_tokens`.

    Columns: `quantity`, `mean`, `lo`, `hi`, `if_equal` (the value that means no difference) and `verdict`, which is
    "<a> higher" or "<b> higher" where the interval excludes `if_equal`, else "cannot tell", or why there is none.
    """
    left, right = of_model(scores, a), of_model(scores, b)
    table = []
    for quantity in ("win_rate_gold", "win_rate_proxy", "gold", "proxy", "kl", "n_tokens"):
        value = quantity.removeprefix("win_rate_")
        estimate, if_equal = (paired_difference, 0.0) if value == quantity else (win_rate, 0.5)
        interval, verdict = NOT_MEASURED, "not measured"
        if measured(value, left, right):
            interval = estimate(scores, a, b, value)
            verdict = f"{a} higher" if interval.lo > if_equal else "cannot tell"
            verdict = f"{b} higher" if interval.hi < if_equal else verdict
            verdict = NO_INTERVAL if math.isnan(interval.lo) else verdict
        table.append({"quantity": quantity, **interval._asdict(), "if_equal": if_equal, "verdict": verdict})
    return pd.DataFrame(table)


def pair_accuracy(margins: ArrayLike, groups: ArrayLike | None = None) -> Interval:
    """Share of `margins` [N] (score of chosen - rejected) above 0, ties 1/2; `groups` [N] (prompts) are drawn whole."""
    return bootstrap(_wins(_finite(margins, "margins")), groups)


def calibration_curve(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> pd.DataFrame:
    """Predicted against observed frequency, a row for each of `bins` equal bins of probability that holds a pair.

    Columns: `predicted`, `observed` (means within the bin), `n`, and `observed_lo`, `observed_hi` (95% Wilson
    interval). Outcomes lie in [0, 1], a tie being 1/2; ValueError otherwise.
    """
    predicted, observed = _finite(probabilities, "probabilities"), _finite(outcomes, "outcomes")
    pairs = pd.DataFrame({"predicted": predicted, "observed": observed})
    if ((pairs < 0) | (pairs > 1)).any(axis=None):
        raise ValueError("probabilities and outcomes must lie in [0, 1]")
    inside = pairs.groupby(np.minimum((pairs["predicted"] * bins).astype(int), bins - 1))  # 1.0 is in the last bin
    table = inside.mean().assign(n=inside.size())
    n, p = table["n"], table["observed"]
    # Wilson 1927: unlike p +- 1.96 standard errors it stays in [0, 1], and is not empty where p is 0 or 1.
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return table.assign(observed_lo=(centre - half).clip(0, 1), observed_hi=(centre + half).clip(0, 1))


def expected_calibration_error(curve: pd.DataFrame) -> float:
    """Mean over pairs of |predicted - observed| of their bin (Guo et al. 2017, arXiv:1706.04599, eq. 3) of a curve."""
    return float(((curve["predicted"] - curve["observed"]).abs() * curve["n"]).sum() / curve["n"].sum())


def best_of_n_kl(n: int) -> float:
    """UPPER BOUND on KL(best-of-n || policy) in nats: log n - (n - 1) / n; equal only if no completion comes twice.

    Beirami et al. 2024, arXiv:2401.01879: in a small world where completions repeat, the true KL is far below it.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_estimate(frame: pd.DataFrame, reward: str, value: str, n: int) -> pd.DataFrame:
    """Expected `value` of the sample of highest `reward` among n drawn without replacement from a prompt's N samples.

    Unbiased for best-of-n: the sample of rank i (1 = lowest) is the best of C(i-1, n-1) of the C(N, n) subsets; tied
    samples share theirs. A row per seed and prompt, for `hierarchical_bootstrap`. ValueError where there are too few.
    """
    frame = _checked(frame, reward, value)
    prompts = frame.groupby(UNITS)
    size = prompts[reward].transform("size")
    if not 1 <= n <= size.min():
        raise ValueError(f"best of {n} needs n of at least 1 and {n} samples per prompt; one prompt has {size.min()}")
    lowest, highest = (prompts[reward].rank(method) for method in ("min", "max"))  # a tie fills these ranks
    share = comb(highest, n) / comb(size, n) - comb(lowest - 1, n) / comb(size, n)  # P(best is among the tied)
    weighted = frame[UNITS].assign(**{value: share / (highest - lowest + 1) * frame[value]})
    return weighted.groupby(UNITS)[value].sum().reset_index()
