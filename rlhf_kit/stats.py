"""Numbers with intervals from frames of scores: means, differences, win rates, calibration, best-of-n.

A score belongs to a sample, a sample to a prompt and a prompt to a seed. Samples of one prompt are alike, so none are
treated as independent: each prompt counts once, however many samples it has, and intervals come from resampling prompts
(and seeds, where the frame has several). A row without a number is an error; what was not measured at all is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
DRAWS_AT_ONCE = 4_000_000  # bounds the memory of one block of resamples: 32 MB of indices


class Interval(NamedTuple):
    """A mean with the bounds of its interval; the bounds are NaN where they cannot be estimated."""

    mean: float
    lo: float
    hi: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.lo:.2f}, {self.hi:.2f}]"


Z = 1.959963984540054  # standard errors on either side of a 95% interval
NOT_MEASURED = Interval(math.nan, math.nan, math.nan)


def bootstrap(
    values: ArrayLike, groups: ArrayLike | None = None, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of the mean of `values` [N], resampling whole `groups` [N] (prompts) where they are given.

    One value, or one group, says nothing about the spread: its bounds are NaN. ValueError if a value is not finite.
    """
    flat = _finite(values, "values")
    sums, counts = flat, np.ones_like(flat)
    if groups is not None:
        labels = np.asarray(groups)
        if labels.shape != flat.shape:
            raise ValueError(f"groups has shape {labels.shape}, values {flat.shape}: give one group per value")
        _, index = np.unique(labels, return_inverse=True)
        sums, counts = (np.bincount(index, weights=weights).astype(float) for weights in (flat, counts))
    means = _resampled_ratio(sums, counts, n_resamples, np.random.default_rng(seed))
    return _percentiles(float(flat.mean()), means, level, enough=len(sums) > 1)


def bootstrap_of(
    statistic: Callable[[NDArray[np.int64]], float],
    groups: ArrayLike,
    n_resamples: int = 500,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap of any `statistic` of row numbers, resampling whole `groups` [N] of rows (items, prompts).

    The bounds are NaN with one group, or where more than 1 - `level` of the resamples leave the statistic undefined
    (NaN); fewer such are left out.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    rows, size, rng = np.arange(len(index)), index.max() + 1, np.random.default_rng(seed)
    value = float(statistic(rows))
    if size < 2 or math.isnan(value):
        return Interval(value, math.nan, math.nan)
    times = (np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(n_resamples))
    draws = [statistic(np.repeat(rows, drawn[index])) for drawn in times]
    found = np.array(draws)[~np.isnan(draws)]
    if len(found) < level * n_resamples:
        return Interval(value, math.nan, math.nan)
    return _percentiles(value, found, level, enough=True)


def hierarchical_bootstrap(
    frame: pd.DataFrame,
    value: str,
    levels: Sequence[str] = ("seed", "prompt_id"),
    n_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of means over nested `levels`, resampling the outer level (seeds) and, within each draw, the next (prompts).

    Rows below the last level (samples of a prompt) are averaged first. A level with one member adds no spread: with one
    seed the interval covers prompts only. Raises ValueError naming the column and row of the first fault.
    """
    _need(frame, *levels, value)
    for name in levels:
        if frame[name].isna().any():  # groupby would drop these rows without a word
            raise ValueError(f"column {name!r} is empty in row {frame.index[frame[name].isna()][0]}")
    _finite(frame[value], value, frame.index)
    means = frame.groupby(list(levels))[value].mean()
    nested = _nest(means)
    draws = _resampled_means(nested, n_resamples, np.random.default_rng(seed))
    return _percentiles(_mean_of_means(nested), draws, level, enough=len(means) > 1)


def _nest(means: pd.Series) -> Any:
    """Means indexed by L levels -> lists of lists (L-1 deep) of arrays."""
    if means.index.nlevels == 1:
        return means.to_numpy(dtype=float)
    return [_nest(part.droplevel(0)) for _, part in means.groupby(level=0)]


def _mean_of_means(nested: Any) -> float:
    return float(np.mean(nested if isinstance(nested, np.ndarray) else [_mean_of_means(child) for child in nested]))


def _resampled_means(nested: Any, size: int, rng: np.random.Generator) -> Array:
    """`size` draws [size] of the mean of means: every slot draws a child, and the child redraws its own members."""
    if isinstance(nested, np.ndarray):
        return _resampled_ratio(nested, np.ones_like(nested), size, rng)
    total = np.zeros(size)
    for _ in nested:
        drawn = rng.integers(len(nested), size=size)
        for position, child in enumerate(nested):
            chosen = drawn == position
            total[chosen] += _resampled_means(child, int(chosen.sum()), rng)
    return total / len(nested)


def _resampled_ratio(sums: Array, counts: Array, size: int, rng: np.random.Generator) -> Array:
    """`size` draws [size] of sum(sums) / sum(counts) over groups [G] drawn with replacement."""
    step = max(1, DRAWS_AT_ONCE // len(sums))
    draws = []
    for start in range(0, size, step):
        index = rng.integers(len(sums), size=(min(step, size - start), len(sums)))
        draws.append(sums[index].sum(axis=1) / counts[index].sum(axis=1))
    return np.concatenate(draws) if draws else np.empty(0)


def _percentiles(mean: float, draws: Array, level: float, enough: bool) -> Interval:
    if not 0 < level < 1 or len(draws) == 0:
        raise ValueError(
            f"level must lie between 0 and 1, got {level}, and n_resamples be at least 1, got {len(draws)}"
        )
    if not enough:
        return Interval(mean, math.nan, math.nan)
    lo, hi = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(lo), float(hi))


def _need(frame: pd.DataFrame, *columns: str) -> None:
    for name in columns:
        if name not in frame.columns:
            raise ValueError(f"the frame has no column {name!r}; it has {', '.join(map(str, frame.columns))}")


def _finite(values: ArrayLike, name: str, index: Any = None) -> Array:
    """The values as floats [N], or a ValueError that says which one is not a number."""
    flat = np.asarray(values, dtype=float)
    if flat.ndim != 1 or len(flat) == 0:
        raise ValueError(f"{name} must be a list of at least one number, got shape {flat.shape}")
    bad = np.flatnonzero(~np.isfinite(flat))
    if len(bad):
        row = bad[0] if index is None else index[bad[0]]
        raise ValueError(f"{name} is not finite in {len(bad)} of {len(flat)} rows, first in row {row}: {flat[bad[0]]}")
    return flat


def paired_difference(
    scores: pd.DataFrame, a: str, b: str, value: str, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean over prompts of (mean `value` of a's samples - mean of b's), on the same prompts, with its interval.

    It covers prompts, and seeds if the column `seed` has several. Raises ValueError if a model or a prompt is missing.
    """
    levels = _levels(scores)
    left, right = _same_prompts(scores, a, b, value, levels)
    difference = left.groupby(levels)[value].mean() - right.groupby(levels)[value].mean()
    return hierarchical_bootstrap(difference.reset_index(), value, levels, n_resamples, seed, level)


def win_rate(
    scores: pd.DataFrame, a: str, b: str, by: str, n_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Chance that a sample of a beats a sample of b to the same prompt by the score `by`; a tie is half a win.

    All pairs of samples of a prompt count: that is the prompt's Mann-Whitney U over its number of pairs, from ranks.
    A policy against itself is exactly 0.5. Interval over prompts (and seeds); raises ValueError as `paired_difference`.
    """
    levels = _levels(scores)
    left, right = _same_prompts(scores, a, b, by, levels)
    both = pd.concat([left.assign(_left=True), right.assign(_left=False)], ignore_index=True)
    both["_rank"] = both.groupby(levels)[by].rank()  # ties share their mean rank
    mine = both[both["_left"]].groupby(levels)["_rank"].agg(["sum", "size"])
    theirs = both[~both["_left"]].groupby(levels).size()
    u = mine["sum"] - mine["size"] * (mine["size"] + 1) / 2
    wins = (u / (mine["size"] * theirs)).rename("win").reset_index()
    return hierarchical_bootstrap(wins, "win", levels, n_resamples, seed, level)


def _levels(scores: pd.DataFrame) -> list[str]:
    several_seeds = "seed" in scores.columns and scores["seed"].nunique(dropna=False) > 1
    return ["seed", "prompt_id"] if several_seeds else ["prompt_id"]


def _of_model(scores: pd.DataFrame, model: str) -> pd.DataFrame:
    rows = scores[scores["model"] == model]
    if rows.empty:
        raise ValueError(f"no rows of model {model!r}; the scores have {', '.join(map(str, scores['model'].unique()))}")
    return rows


def _same_prompts(
    scores: pd.DataFrame, a: str, b: str, value: str, levels: list[str]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of a and of b, after a check that both have numbers for the very same prompts."""
    _need(scores, value)
    left, right = _of_model(scores, a), _of_model(scores, b)
    for name, rows in ((a, left), (b, right)):
        _finite(rows[value], f"{value} of {name}", rows.index)
    prompts_a, prompts_b = (set(rows[levels].itertuples(index=False, name=None)) for rows in (left, right))
    if odd := sorted(prompts_a ^ prompts_b):
        raise ValueError(
            f"{a} and {b} must be scored on the same prompts, but {len(odd)} are on one side only, "
            f"first {' '.join(f'{level} {key}' for level, key in zip(levels, odd[0], strict=True))}"
        )
    return left, right


def summary(
    scores: pd.DataFrame,
    baseline: str = "SFT",
    values: Sequence[str] = ("gold", "proxy", "kl", "n_tokens"),
    win_by: Sequence[str] = ("gold", "proxy"),
) -> pd.DataFrame:
    """One row per model, in order of appearance: `X`, `X_lo`, `X_hi` per value and per `win_rate_<by>` over `baseline`.

    What was not measured (no such column, or empty for that model) stays NaN. ValueError if the baseline is missing.
    """
    levels = _levels(scores)
    base = _of_model(scores, baseline)
    table: list[dict[str, Any]] = []
    for model in scores["model"].unique():
        rows = _of_model(scores, model)
        row: dict[str, Any] = {"model": model}
        for value in values:
            measured = _measured(rows, value)
            row |= columns(value, hierarchical_bootstrap(rows, value, levels) if measured else NOT_MEASURED)
        for by in win_by:
            measured = _measured(rows, by) and _measured(base, by)
            row |= columns(f"win_rate_{by}", win_rate(scores, model, baseline, by) if measured else NOT_MEASURED)
        table.append(row)
    return pd.DataFrame(table)


def _measured(rows: pd.DataFrame, value: str) -> bool:
    return value in rows.columns and bool(rows[value].notna().any())


def columns(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three cells of a row: `X`, `X_lo`, `X_hi`."""
    return {name: interval.mean, f"{name}_lo": interval.lo, f"{name}_hi": interval.hi}


def compare(scores: pd.DataFrame, a: str = "PPO", b: str = "DPO") -> pd.DataFrame:
    """RLHF against DPO on the same prompts: win rate of a over b, and a - b in gold, proxy, `kl` (nats) and `n_tokens`.

    Columns: `quantity`, `mean`, `lo`, `hi`, `if_equal` (the value that means no difference) and `verdict`, which is
    "<a> higher" or "<b> higher" where the interval excludes `if_equal`, else "cannot tell", or "not measured".
    """
    left, right = _of_model(scores, a), _of_model(scores, b)
    table = []
    for quantity in ("win_rate_gold", "win_rate_proxy", "gold", "proxy", "kl", "n_tokens"):
        value = quantity.removeprefix("win_rate_")
        is_rate = value != quantity
        if_equal = 0.5 if is_rate else 0.0
        if _measured(left, value) and _measured(right, value):
            interval = (win_rate if is_rate else paired_difference)(scores, a, b, value)
            verdict = f"{a} higher" if interval.lo > if_equal else "cannot tell"
            verdict = f"{b} higher" if interval.hi < if_equal else verdict
        else:
            interval, verdict = NOT_MEASURED, "not measured"
        table.append({"quantity": quantity, **interval._asdict(), "if_equal": if_equal, "verdict": verdict})
    return pd.DataFrame(table)


def quantiles(
    scores: pd.DataFrame, value: str, by: str = "model", q: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)
) -> pd.DataFrame:
    """Quantiles of `value` over all samples: a row per `by` in order of appearance, columns `q05`, ... or NaN."""
    table = []
    for name, rows in scores.groupby(by, sort=False):
        found = np.full(len(q), math.nan)
        if _measured(rows, value):
            found = np.quantile(_finite(rows[value], f"{value} of {name}", rows.index), q)
        table.append({by: name, **{f"q{f'{100 * p:g}'.zfill(2)}": x for p, x in zip(q, found, strict=True)}})
    return pd.DataFrame(table)


def pair_accuracy(chosen_scores: ArrayLike, rejected_scores: ArrayLike, groups: ArrayLike | None = None) -> Interval:
    """Share of pairs [N] whose chosen side scores higher, ties 1/2; `groups` (prompts, [N]) are resampled whole."""
    chosen, rejected = _finite(chosen_scores, "chosen_scores"), _finite(rejected_scores, "rejected_scores")
    if chosen.shape != rejected.shape:
        raise ValueError(f"{len(chosen)} chosen scores but {len(rejected)} rejected scores: give one of each per pair")
    return bootstrap((chosen > rejected) + 0.5 * (chosen == rejected), groups)


def calibration_curve(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> pd.DataFrame:
    """Predicted against observed frequency in `bins` equal bins of probability, empty bins included (n = 0).

    Columns: `left`, `right` (edges of the bin), `n`, `predicted`, `observed` (means within the bin), and `observed_lo`,
    `observed_hi` (95% Wilson interval). Outcomes lie in [0, 1], a tie being 1/2; ValueError otherwise.
    """
    predicted, observed = _finite(probabilities, "probabilities"), _finite(outcomes, "outcomes")
    if predicted.shape != observed.shape:
        raise ValueError(f"{len(predicted)} probabilities but {len(observed)} outcomes: give one of each per pair")
    for name, values in (("probabilities", predicted), ("outcomes", observed)):
        if values.min() < 0 or values.max() > 1:
            raise ValueError(f"{name} must lie in [0, 1], but they reach from {values.min():g} to {values.max():g}")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    edges = np.linspace(0, 1, bins + 1)
    index = np.minimum((predicted * bins).astype(int), bins - 1)  # 1.0 belongs to the last bin
    n = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN is what an empty bin should hold
        mean_predicted = np.bincount(index, weights=predicted, minlength=bins) / n
        mean_observed = np.bincount(index, weights=observed, minlength=bins) / n
        lo, hi = _wilson(mean_observed, n)
    columns = {"left": edges[:-1], "right": edges[1:], "n": n, "predicted": mean_predicted, "observed": mean_observed}
    return pd.DataFrame({**columns, "observed_lo": lo, "observed_hi": hi})


def _wilson(p: Array, n: NDArray[np.int64]) -> tuple[Array, Array]:
    """95% interval of a proportion (Wilson 1927): unlike p +- 1.96 se it stays in [0, 1] and is not empty at 0 or 1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)  # at 0 and 1 rounding would leave [0, 1]


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, bins: int = 10) -> float:
    """Mean over pairs of |predicted - observed| of their bin (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
    table = calibration_curve(probabilities, outcomes, bins)
    gap = (table["predicted"] - table["observed"]).abs()
    return float((gap * table["n"]).sum() / table["n"].sum())


def best_of_n_kl(n: int) -> float:
    """UPPER BOUND on KL(best-of-n || policy) in nats: log n - (n - 1) / n; equal only if no completion comes twice.

    Beirami et al. 2024, arXiv:2401.01879: in a small world where completions repeat, the true KL is far below it.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    return math.log(n) - (n - 1) / n


def best_of_n_estimate(frame: pd.DataFrame, reward: str, value: str, n: int) -> pd.DataFrame:
    """Expected `value` of the sample of highest `reward` among n drawn without replacement from a prompt's N samples.

    Unbiased for best-of-n: the sample of rank i (1 = lowest) is the best of C(i-1, n-1) of the C(N, n) subsets; tied
    samples share theirs. A row per prompt (and seed, if several) with the column `value`, for `hierarchical_bootstrap`.
    Raises ValueError if a prompt has fewer than n samples or a row has no number.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    for name in (reward, value):
        _need(frame, name)
        _finite(frame[name], name, frame.index)
    levels = _levels(frame)
    prompts = frame.groupby(levels)
    size = prompts[reward].transform("size").to_numpy()
    if size.min() < n:
        short = frame[levels].iloc[int(size.argmin())].to_dict()
        raise ValueError(f"best of {n} needs {n} samples per prompt, but prompt {short} has {size.min()}")
    lowest = prompts[reward].rank("min").to_numpy().astype(int)  # a tie fills the ranks lowest..highest
    highest = prompts[reward].rank("max").to_numpy().astype(int)
    weight = np.empty(len(frame))
    for total in np.unique(size):
        within = np.array([math.comb(rank, n) / math.comb(total, n) for rank in range(total + 1)])  # P(best <= rank)
        rows = size == total
        share = within[highest[rows]] - within[lowest[rows] - 1]
        weight[rows] = share / (highest[rows] - lowest[rows] + 1)
    weighted = frame[levels].assign(**{value: weight * frame[value].to_numpy(dtype=float)})
    return weighted.groupby(levels)[value].sum().reset_index()
