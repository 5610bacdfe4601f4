"""Numbers with intervals from frames of scores: means, differences, win rates, calibration, best-of-n.

A score belongs to a sample, a sample to a prompt and a prompt to a seed. Samples of one prompt are alike, so they are
not treated as independent: each prompt counts once, however many samples it has, and intervals come from resampling
prompts (and seeds if the frame has several). A row without a number is an error; what was not measured at all is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import comb
from statsmodels.stats.proportion import proportion_confint

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
DRAWS_AT_ONCE = 4_000_000  # bounds the memory of one block of resamples: 32 MB of indices


class Interval(NamedTuple):
    """A mean with the bounds of its interval; the bounds are NaN where they cannot be estimated."""

    mean: float
    lo: float
    hi: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.lo:.2f}, {self.hi:.2f}]"


LEVEL = 0.95
Z = 1.959963984540054  # standard errors on either side of a 95% interval
NOT_MEASURED = Interval(math.nan, math.nan, math.nan)

# The bootstrap


def bootstrap(values: ArrayLike, groups: ArrayLike | None = None, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """95% percentile bootstrap of the mean of `values` [N], resampling whole `groups` [N] (prompts) if they are given.

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
    draws = _resample(lambda drawn: sums[drawn].sum(1) / counts[drawn].sum(1), len(sums), n_resamples, seed)
    return _percentiles(float(flat.mean()), draws, enough=len(sums) > 1)


def bootstrap_of(
    statistic: Callable[[Indices], float], groups: ArrayLike, n_resamples: int = 500, seed: int = 0
) -> Interval:
    """95% percentile bootstrap of any `statistic` of row numbers, resampling whole `groups` [N] of rows (prompts).

    Resamples that leave the statistic undefined (NaN) are left out. The bounds are NaN if these are more than 5% of
    all, or if there is only one group.
    """
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    rows, size = np.arange(len(index)), int(index.max()) + 1

    def of_each(drawn: Indices) -> Array:
        times = [np.bincount(resample, minlength=size) for resample in drawn]
        return np.array([statistic(np.repeat(rows, each[index])) for each in times])

    value = float(statistic(rows))
    if size < 2 or math.isnan(value):
        return Interval(value, math.nan, math.nan)
    draws = _resample(of_each, size, n_resamples, seed)
    found = draws[~np.isnan(draws)]
    return _percentiles(value, found, enough=len(found) >= LEVEL * n_resamples)


def hierarchical_bootstrap(
    frame: pd.DataFrame,
    value: str,
    levels: Sequence[str] = ("seed", "prompt_id"),
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Mean over seeds of means over prompts, resampling seeds and, within each draw, prompts; 95% percentile interval.

    `levels` are both columns or only the prompts'. Samples of a prompt are averaged first. A level with one member adds
    no spread: with one seed the interval covers prompts only. ValueError names the column and row of the first fault.
    """
    _need(frame, *levels, value)
    for name in levels:
        if frame[name].isna().any():  # groupby would drop these rows without a word
            raise ValueError(f"column {name!r} is empty in row {frame.index[frame[name].isna()][0]}")
    if len(levels) > 2:
        raise ValueError(f"levels must be one or two columns, the outer one first, got {', '.join(levels)}")
    _finite(frame[value], value, frame.index)
    means = frame.groupby(list(levels))[value].mean()
    parts = [part.to_numpy(float) for _, part in means.groupby(level=0)] if len(levels) > 1 else [means.to_numpy(float)]
    draws, rng = np.zeros(n_resamples), np.random.default_rng(seed)
    for _ in parts:  # each slot draws a seed, and that seed draws its prompts anew
        drawn = rng.integers(len(parts), size=n_resamples)
        for position, part in enumerate(parts):
            chosen = drawn == position
            draws[chosen] += _resample(partial(_means, part), len(part), int(chosen.sum()), rng)
    return _percentiles(float(np.mean([part.mean() for part in parts])), draws / len(parts), enough=len(means) > 1)


def _means(values: Array, drawn: Indices) -> Array:
    return np.asarray(values[drawn].mean(axis=1))


def _resample(statistic: Callable[[Indices], Array], members: int, size: int, seed: int | np.random.Generator) -> Array:
    """The statistic [size] of `size` resamples: `members` numbers below `members`, drawn with replacement.

    `statistic` takes a block of resamples [R, members] and returns [R], so that memory stays bounded.
    """
    rng = np.random.default_rng(seed)  # which returns a generator as it is
    step = max(1, DRAWS_AT_ONCE // members)
    blocks = [min(step, size - start) for start in range(0, size, step)]
    return np.concatenate([np.empty(0), *(statistic(rng.integers(members, size=(rows, members))) for rows in blocks)])


def _percentiles(mean: float, draws: Array, enough: bool) -> Interval:
    if len(draws) == 0:
        raise ValueError("n_resamples must be at least 1")
    lo, hi = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if enough else (math.nan, math.nan)
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


# Models against each other


def paired_difference(scores: pd.DataFrame, a: str, b: str, value: str, seed: int = 0) -> Interval:
    """Mean over prompts of (mean `value` of a's samples - mean of b's), on the same prompts, with its 95% interval.

    It covers prompts, and seeds if the column `seed` has several. Raises ValueError if a model or a prompt is missing.
    """
    left, right, levels = _same_prompts(scores, a, b, value)
    difference = left.groupby(levels)[value].mean() - right.groupby(levels)[value].mean()
    return hierarchical_bootstrap(difference.reset_index(), value, levels, seed=seed)


def win_rate(scores: pd.DataFrame, a: str, b: str, by: str, seed: int = 0) -> Interval:
    """Chance that a sample of a beats a sample of b to the same prompt by the score `by`; a tie is half a win.

    All pairs of samples of a prompt count: that is the prompt's Mann-Whitney U over its number of pairs, from ranks.
    A policy against itself is exactly 0.5. Interval and errors are those of `paired_difference`.
    """
    left, right, levels = _same_prompts(scores, a, b, by)
    both = pd.concat([left.assign(_left=True), right.assign(_left=False)], ignore_index=True)
    both["_rank"] = both.groupby(levels)[by].rank()  # ties share their mean rank
    mine = both[both["_left"]].groupby(levels)["_rank"].agg(["sum", "size"])
    theirs = both[~both["_left"]].groupby(levels).size()
    u = mine["sum"] - mine["size"] * (mine["size"] + 1) / 2
    wins = (u / (mine["size"] * theirs)).rename("win").reset_index()
    return hierarchical_bootstrap(wins, "win", levels, seed=seed)


def _levels(scores: pd.DataFrame) -> list[str]:
    several_seeds = "seed" in scores.columns and scores["seed"].nunique(dropna=False) > 1
    return ["seed", "prompt_id"] if several_seeds else ["prompt_id"]


def of_model(scores: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of a model; ValueError if there are none."""
    rows = scores[scores["model"] == model]
    if rows.empty:
        raise ValueError(f"no rows of model {model!r}; the scores have {', '.join(map(str, scores['model'].unique()))}")
    return rows


def numbers_of(scores: pd.DataFrame, model: str, value: str) -> Array:
    """A model's numbers [N] in the column `value`; ValueError naming the first row without one."""
    _need(scores, value)
    rows = of_model(scores, model)
    return _finite(rows[value], f"{value} of {model}", rows.index)


def _same_prompts(scores: pd.DataFrame, a: str, b: str, value: str) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The rows of a and of b and their levels, after a check that both have numbers for the very same prompts."""
    levels, left, right = _levels(scores), of_model(scores, a), of_model(scores, b)
    for name in (a, b):
        numbers_of(scores, name, value)
    prompts_a, prompts_b = (set(rows[levels].itertuples(index=False, name=None)) for rows in (left, right))
    if odd := sorted(prompts_a ^ prompts_b):
        first = " ".join(f"{level} {key}" for level, key in zip(levels, odd[0], strict=True))
        raise ValueError(
            f"{a} and {b} must be scored on the same prompts, but {len(odd)} are on one side only, first {first}"
        )
    return left, right, levels


def summary(
    scores: pd.DataFrame,
    baseline: str = "SFT",
    values: Sequence[str] = ("gold", "proxy", "kl", "n_tokens"),
    win_by: Sequence[str] = ("gold", "proxy"),
) -> pd.DataFrame:
    """One row per model, in order of appearance: `X`, `X_lo`, `X_hi` per value and per `win_rate_<by>` over `baseline`.

    What was not measured (no such column, or empty for that model) stays NaN. ValueError if the baseline is missing.
    """
    levels, base = _levels(scores), of_model(scores, baseline)
    table: list[dict[str, Any]] = []
    for model in scores["model"].unique():
        rows = of_model(scores, model)
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
    left, right = of_model(scores, a), of_model(scores, b)
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
    table = scores.groupby(by, sort=False)[value].quantile(np.asarray(q)).unstack(sort=False)
    table.columns = [f"q{f'{100 * p:g}'.zfill(2)}" for p in q]
    return table.reset_index()


# Reward models


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
    inside = pd.DataFrame({"predicted": predicted, "observed": observed}).groupby(index)
    table = pd.DataFrame({"left": edges[:-1], "right": edges[1:], "n": inside.size()}, index=range(bins))
    table = table.fillna({"n": 0}).astype({"n": int}).join(inside.mean())
    with np.errstate(divide="ignore", invalid="ignore"):  # an empty bin has no interval
        lo, hi = proportion_confint(table["observed"] * table["n"], table["n"], method="wilson")
    return table.assign(observed_lo=lo, observed_hi=hi)


def expected_calibration_error(curve: pd.DataFrame) -> float:
    """Mean over pairs of |predicted - observed| of their bin (Guo et al. 2017, arXiv:1706.04599, eq. 3) of a curve."""
    return float(((curve["predicted"] - curve["observed"]).abs() * curve["n"]).sum() / curve["n"].sum())


# Best-of-n


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
    size = prompts[reward].transform("size")
    if size.min() < n:
        short = frame[levels].iloc[int(size.to_numpy().argmin())].to_dict()
        raise ValueError(f"best of {n} needs {n} samples per prompt, but prompt {short} has {size.min()}")
    lowest, highest = (prompts[reward].rank(method) for method in ("min", "max"))  # a tie fills these ranks
    share = comb(highest, n) / comb(size, n) - comb(lowest - 1, n) / comb(size, n)  # P(best is among the tied)
    weighted = frame[levels].assign(**{value: share / (highest - lowest + 1) * frame[value]})
    return weighted.groupby(levels)[value].sum().reset_index()
