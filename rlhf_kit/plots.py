"""Frames in, matplotlib figures out: each says one thing, with units on its axes and intervals on its claims.

Every function returns a figure that pyplot has let go of: a notebook shows it once, as the value of its cell, and
hundreds of them leave no memory behind. A model has the same colour in all figures, whatever else is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from rlhf_kit import stats

# Okabe and Ito's palette, which colour-blind readers can tell apart; each model has a marker of its own as well.
COLOURS = {"base": "#7F7F7F", "SFT": "#0072B2", "best-of-n": "#CC79A7", "PPO": "#D55E00", "DPO": "#009E73"}
MARKERS = {"base": "X", "SFT": "o", "best-of-n": "^", "PPO": "s", "DPO": "D"}
OTHERS = ("#E69F00", "#56B4E9", "#332288", "#882255", "#999933", "#44AA99")

BOUND = " (KL: upper bound)"
LABELS = {
    "gold": "gold utility",
    "proxy": "proxy reward (reward model)",
    "kl": "KL to SFT [nats/sequence]",
    "n_tokens": "completion length [tokens]",
    "completion_length": "completion length [tokens]",
    "entropy": "entropy [nats/token]",
    "approx_kl": "KL of an update [nats/token]",
    "clip_fraction": "clipped ratios [share]",
    "value_clip_fraction": "clipped values [share]",
    "value_loss": "value loss [reward²]",
    "kl_coef": "KL coefficient [reward/nat]",
    "reward": "reward of the rollouts",
    "objective": "reward - kl_coef KL",
    "unfinished": "unfinished completions [share]",
    "finished": "finished completions [share]",
    "accuracy": "accuracy [share of pairs]",
    "rewards/accuracies": "accuracy [share of pairs]",
    "rewards/margins": "margin of implicit rewards",
    "rewards/chosen": "implicit reward of chosen",
    "rewards/rejected": "implicit reward of rejected",
    "logps/chosen": "log-prob of chosen [nats/sequence]",
    "logps/rejected": "log-prob of rejected [nats/sequence]",
    "loss": "loss [nats]",
    "step": "optimizer step",
}


def style() -> None:
    """Set seaborn's theme for all later figures: legible when printed at half their size."""
    sns.set_theme(context="notebook", style="whitegrid", palette=list(COLOURS.values()))
    plt.rcParams.update({"figure.dpi": 100, "savefig.dpi": 150, "axes.titlesize": 13, "axes.labelsize": 13})
    plt.rcParams.update({"xtick.labelsize": 12, "ytick.labelsize": 12, "legend.fontsize": 12})
    plt.rcParams.update({"legend.title_fontsize": 12, "grid.color": "#E5E5E5", "axes.edgecolor": "#808080"})


def colours(models: Iterable[str]) -> dict[str, str]:
    """A colour per model: its own if it has one, else the next of the others in order of appearance."""
    unknown = [model for model in dict.fromkeys(models) if model not in COLOURS]
    return COLOURS | {model: OTHERS[i % len(OTHERS)] for i, model in enumerate(unknown)}


def label(column: str) -> str:
    """A column's name in words, with its unit where it has one."""
    return LABELS.get(column, column.replace("_", " "))


def reward_shift(
    scores: pd.DataFrame,
    rewards: Sequence[str] = ("proxy", "gold"),
    models: Sequence[str] = ("SFT", "PPO", "DPO"),
    baseline: str = "SFT",
) -> Figure:
    """Distribution of each reward under each model on the same prompts: the picture of the Llama 2 report (Fig. 20).

    Beside each model stands its mean shift from the baseline with the 95% interval of `stats.paired_difference`; a
    dashed line marks its mean. A reward that was not measured has no panel. Raises ValueError if none was.
    """
    rewards = _measured(scores, rewards)
    models = _present(scores, models)
    colour = colours(models)
    figure, panels = _panels(len(rewards), width=6.2, height=4.8)
    for axes, reward in zip(panels, rewards, strict=True):
        samples = {model: _numbers(scores, model, reward) for model in models}
        grid, densities = _densities(samples)
        for model, values in samples.items():
            density = densities[model]
            shift = stats.paired_difference(scores, model, baseline, reward) if model != baseline else None
            text = f"{model}  mean {values.mean():.2f}" if shift is None else f"{model}  shift {_signed(shift)}"
            axes.plot(grid, density, color=colour[model], linewidth=2.2, label=text)
            axes.fill_between(grid, density, color=colour[model], alpha=0.15, linewidth=0)
            top = np.interp(values.mean(), grid, density)
            axes.plot([values.mean()] * 2, [0, top], color=colour[model], linestyle="--", linewidth=1.6)
        axes.set(xlabel=label(reward), ylabel="density of completions", ylim=(0, None))
        _legend_on_top(axes, title="dashed: mean; its shift [95% interval]")
    figure.suptitle(f"Reward of the completions of the same {scores['prompt_id'].nunique()} prompts")
    return _done(figure)


def reward_ridge(scores: pd.DataFrame, reward: str = "proxy", models: Sequence[str] | None = None) -> Figure:
    """A ridge per model, first on top, of one reward; ticks mark the quantiles .05, .5 and .95 of its samples."""
    _measured(scores, [reward])
    models = _present(scores, models)
    colour = colours(models)
    samples = {model: _numbers(scores, model, reward) for model in models}
    grid, densities = _densities(samples)
    scale = 1.5 / max(density.max() for density in densities.values())  # a peak reaches half into the row above
    figure, (axes,) = _panels(1, width=7.5, height=1.2 + 0.85 * len(models))
    for row, (model, values) in enumerate(samples.items()):
        floor, ridge = -row, scale * densities[model]
        axes.fill_between(grid, floor, floor + ridge, color=colour[model], alpha=0.85, zorder=row + 2, linewidth=0)
        outline = np.where(ridge > 0.01, floor + ridge, np.nan)  # no white line where there is nothing to outline
        axes.plot(grid, outline, color="white", linewidth=1.5, zorder=row + 2)
        for quantile, width in ((0.05, 1.5), (0.5, 3.0), (0.95, 1.5)):
            x = float(np.quantile(values, quantile))
            top = floor + np.interp(x, grid, ridge)
            axes.plot([x, x], [floor, top], color="black", linewidth=width, zorder=row + 2, solid_capstyle="butt")
    axes.set_yticks([-row for row in range(len(models))], models)
    axes.set(xlabel=label(reward), ylim=(0.75 - len(models), 1.6))
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{label(reward).capitalize()} by model; lines: quantiles .05, .50, .95")
    sns.despine(figure, left=True)
    return _done(figure)


def _densities(samples: dict[str, NDArray[np.float64]]) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """A grid [G] and on it each model's Gaussian kernel density [G], of one width so that shapes can be compared.

    The width is the largest of Silverman's rule, and never finer than the grid can show.
    """
    pooled = np.concatenate(list(samples.values()))
    margin = 0.12 * (np.ptp(pooled) or 1.0)
    grid = np.linspace(pooled.min() - margin, pooled.max() + margin, 400)
    width = max(2 * (grid[1] - grid[0]), *(_silverman(values) for values in samples.values()))
    densities = {}
    for model, values in samples.items():
        unique, counts = np.unique(
            values, return_counts=True
        )  # completions repeat: few distinct rewards, fewer kernels
        kernels = np.exp(-0.5 * ((grid[:, None] - unique) / width) ** 2) / (width * np.sqrt(2 * np.pi))
        densities[model] = kernels @ (counts / len(values))
    return grid, densities


def _silverman(values: NDArray[np.float64]) -> float:
    quartiles = np.quantile(values, [0.25, 0.75])
    return float(0.9 * min(values.std(), np.ptp(quartiles) / 1.349 or np.inf) * len(values) ** -0.2)


def reward_against_kl(frame: pd.DataFrame, rewards: Sequence[str] = ("gold", "proxy")) -> Figure:
    """Mean reward against KL to SFT: a point per row of a summary, or a curve per model where it has several rows.

    Columns: `model`, `kl` and one per reward, with `_lo` and `_hi` where there are intervals; `beta`, `step` or `n`
    orders a curve, whose last point is large. `seed` gives a curve per seed: where there are several, they show the
    spread and the intervals are left out. Rows without `kl` but with `n` (best-of-n) stand at the upper bound
    log n - (n-1)/n. Rows with neither are named in a corner.
    """
    frame = frame.copy()
    if "n" in frame:
        bound = frame["n"].map(stats.best_of_n_kl, na_action="ignore")
        frame["model"] = frame["model"].where(frame["kl"].notna() | bound.isna(), frame["model"] + BOUND)
        frame["kl"] = frame["kl"].fillna(bound)
    rewards = _measured(frame, rewards)
    missing = frame.loc[frame["kl"].isna(), "model"].unique()
    drawn = frame[frame["kl"].notna()]
    if drawn.empty:
        raise ValueError("no row has a KL to draw against: column 'kl' is empty")
    figure, panels = _panels(len(rewards), width=5.8, height=4.8)
    colour = colours(model.removesuffix(BOUND) for model in drawn["model"])
    for axes, reward in zip(panels, rewards, strict=True):
        for model in drawn["model"].unique():
            rows = drawn[(drawn["model"] == model) & drawn[reward].notna()]
            name = model.removesuffix(BOUND)
            _curves(axes, rows, reward, {"color": colour[name], "marker": MARKERS.get(name, "o"), "label": model})
        axes.set(xlabel=label("kl"), ylabel=f"mean {label(reward)}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(0.06)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside lower center", ncols=min(len(texts), 2 * len(panels)), frameon=False,
        title="large point: the last of its curve" if any(" to " in text for text in texts) else None,
    )  # fmt: skip
    figure.suptitle("Reward against distance from the SFT model")
    if len(missing):
        note = f"not drawn, no KL: {', '.join(missing)}"
        panels[0].annotate(note, (0.02, 0.02), xycoords="axes fraction", fontsize=10, color="#606060")
    return _done(figure)


def _curves(axes: Axes, rows: pd.DataFrame, reward: str, look: dict[str, Any]) -> None:
    """The rows of one model: points with both intervals, joined in order of what varies, a line per seed."""
    order = next((name for name in ("beta", "step", "update", "n") if name in rows and rows[name].nunique() > 1), None)
    seeds = [part for _, part in rows.groupby("seed", sort=False, dropna=False)] if "seed" in rows else [rows]
    for i, part in enumerate(seeds):
        part = part.sort_values(order) if order else part
        span = f", {order} {part[order].iloc[0]:g} to {part[order].iloc[-1]:g}" if order else ""
        text = look["label"] + span if i == 0 else "_nolegend_"
        shown = look | {"label": text, "linestyle": "-" if order else "none"}
        errors: dict[str, Any] = {"xerr": _error(part, "kl"), "yerr": _error(part, reward)} if len(seeds) == 1 else {}
        size = 5 if order else 9
        axes.errorbar(part["kl"], part[reward], **errors, **shown, markersize=size, capsize=3, elinewidth=1.5)
        if order:
            end = look | {"label": "_nolegend_", "markersize": 11, "markeredgecolor": "black", "zorder": 5}
            axes.plot(part["kl"].iloc[-1], part[reward].iloc[-1], **end)


def _error(rows: pd.DataFrame, column: str) -> NDArray[np.float64] | None:
    """Distances [2, N] from the mean down to `_lo` and up to `_hi`, none where they are not known."""
    if f"{column}_lo" not in rows:
        return None
    ends = [rows[column] - rows[f"{column}_lo"], rows[f"{column}_hi"] - rows[column]]
    return np.clip(np.nan_to_num(np.asarray(ends, dtype=float)), 0, None)


def length_against_reward(scores: pd.DataFrame, reward: str = "proxy", models: Sequence[str] | None = None) -> Figure:
    """Each completion's reward against its length, with each model's mean (large) and its correlation of the two."""
    _measured(scores, [reward])
    models = _present(scores, models)
    colour = colours(models)
    figure, (axes,) = _panels(1, width=7.0, height=5.0)
    shake = np.random.default_rng(0)  # lengths are whole numbers: shaken by less than half a token, points do not hide
    for model in models:
        lengths, values = _numbers(scores, model, "n_tokens"), _numbers(scores, model, reward)
        points = lengths + shake.uniform(-0.3, 0.3, len(lengths))
        axes.scatter(points, values, s=9, alpha=0.25, color=colour[model], linewidths=0)
        varies = np.ptp(lengths) > 0 and np.ptp(values) > 0
        text = f"{model}  r = {np.corrcoef(lengths, values)[0, 1]:.2f}" if varies else f"{model}  r undefined"
        axes.plot(
            lengths.mean(), values.mean(), MARKERS.get(model, "o"), color=colour[model], markersize=12, label=text,
            markeredgecolor="black", linestyle="none", zorder=5,
        )  # fmt: skip
    axes.set(xlabel=label("n_tokens"), ylabel=label(reward))
    _legend_on_top(axes, title="mean of a model, and its correlation of reward with length")
    return _done(figure)


def by_kind(scores: pd.DataFrame, value: str = "gold", models: Sequence[str] | None = None) -> Figure:
    """Mean of `value` per kind of prompt and model, with 95% intervals over prompts (and seeds)."""
    _measured(scores, [value])
    models = _present(scores, models)
    colour, kinds = colours(models), sorted(scores["kind"].unique())
    figure, (axes,) = _panels(1, width=max(6.5, 1.5 * len(kinds)), height=4.8)
    for i, model in enumerate(models):
        rows = scores[scores["model"] == model]
        table = stats.summary(rows.assign(model=rows["kind"]), rows["kind"].iloc[0], [value], win_by=())
        table = table.set_index("model").reindex(kinds)
        x = np.arange(len(kinds)) + (i - (len(models) - 1) / 2) * 0.7 / len(models)
        axes.errorbar(
            x, table[value], _error(table, value), fmt=MARKERS.get(model, "o"), color=colour[model], label=model,
            markersize=8, capsize=3, elinewidth=1.8,
        )  # fmt: skip
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(xlabel="kind of prompt", ylabel=f"mean {label(value)}")
    axes.grid(axis="x", visible=False)
    for edge in range(len(kinds) - 1):
        axes.axvline(edge + 0.5, color="#E5E5E5", linewidth=1)
    _legend_on_top(axes, title="mean [95% interval over prompts]", columns=5)
    return _done(figure)


def training(metrics: pd.DataFrame, columns: Sequence[str] | None = None, x: str = "update") -> Figure:
    """Small multiples of what was logged over updates, a line for every run: no seed hides behind a mean.

    A run is a value of the columns `run` and `seed`, where there are any; a column `model` gives its line's colour.
    Default: all numeric columns that change. Raises ValueError if a column is missing or empty.
    """
    keys = [name for name in ("run", "seed") if name in metrics]
    if "seed" in keys[1:] and (metrics.groupby("run")["seed"].nunique() <= 1).all():
        keys = ["run"]  # which names the seed already
    if columns is None:
        numeric = metrics.select_dtypes("number").columns.difference([x, "seed", "step", "epoch", "beta"], sort=False)
        columns = [name for name in numeric if metrics[name].nunique() > 1]
    for name in (x, *columns):
        _measured(metrics, [name])
    lines = [("", metrics)] if not keys else [(_text(key), part) for key, part in metrics.groupby(keys, sort=False)]
    shades = sns.color_palette("colorblind", len(lines)).as_hex()
    known = colours(metrics["model"].astype(str)) if "model" in metrics else {}
    figure, panels = _panels(len(columns), width=4.4, height=3.4, across=2 if len(columns) in (2, 4) else 3)
    for axes, column in zip(panels, columns, strict=True):
        for shade, (name, part) in zip(shades, lines, strict=True):
            part = part[part[column].notna()].sort_values(x)
            model = str(part["model"].iloc[0]) if "model" in part and len(part) else None
            colour, text = (known[model], model) if model else (shade, name)
            marker = "o" if len(part) == 1 else ""  # a line of one point would not be seen
            axes.plot(part[x], part[column], color=colour, linewidth=1.8, label=text, marker=marker)
        axes.set_xlabel(label(x), fontsize=12)
        axes.set_ylabel(label(column), fontsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    texts, handles = _unique(panels[0])
    if len(texts) > 1:
        figure.legend(handles, texts, loc="outside lower center", ncols=min(5, len(texts)), frameon=False)
    figure.suptitle(f"Training by {label(x)}" + (f", all {len(lines)} runs" if len(lines) > 1 else ""))
    return _done(figure)


def _text(key: Any) -> str:
    return " ".join(dict.fromkeys(f"seed {part}" if isinstance(part, (int, np.integer)) else str(part) for part in key))


def calibration(frame: pd.DataFrame) -> Figure:
    """Observed against predicted frequency of preference (`stats.calibration`); large points hold many pairs."""
    used = frame[frame["n"] > 0]
    error = float(((used["predicted"] - used["observed"]).abs() * used["n"]).sum() / used["n"].sum())
    figure, (axes,) = _panels(1, width=5.2, height=5.4)
    axes.plot([0, 1], [0, 1], color="#606060", linestyle="--", linewidth=1.5, label="perfectly calibrated")
    axes.errorbar(
        used["predicted"], used["observed"], _error(used, "observed"), fmt="none", color=COLOURS["SFT"], capsize=3,
    )  # fmt: skip
    sizes = 20 + 180 * used["n"] / used["n"].max()
    axes.scatter(
        used["predicted"],
        used["observed"],
        sizes,
        color=COLOURS["SFT"],
        label="pairs of a bin [95% interval]",
        zorder=3,
    )
    axes.set(xlabel="predicted preference [probability]", ylabel="observed preference [share of pairs]")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    _legend_on_top(axes, title=f"calibration error {error:.3f}, {int(used['n'].sum())} pairs")
    return _done(figure)


def accuracy(frame: pd.DataFrame) -> Figure:
    """A reward model's accuracy against chance: a point with its interval per row of `pairs, n, accuracy[_lo, _hi]`."""
    figure, (axes,) = _panels(1, width=7, height=1.6 + 0.6 * len(frame))
    rows = np.arange(len(frame))[::-1]
    axes.axvline(0.5, color="#606060", linestyle="--", linewidth=1.5, label="chance")
    axes.errorbar(
        frame["accuracy"], rows, xerr=_error(frame, "accuracy"), fmt="o", color=COLOURS["SFT"], capsize=4,
        markersize=9, label="reward model [95% interval]",
    )  # fmt: skip
    names = [f"{name}\n({n} pairs)" for name, n in zip(frame["pairs"], frame["n"], strict=True)]
    axes.set(yticks=rows, yticklabels=names, ylim=(-0.6, len(frame) - 0.4), xlabel="accuracy [share of pairs]")
    axes.set_xlim(min(0.45, frame["accuracy_lo"].min() - 0.03), max(0.8, frame["accuracy_hi"].max() + 0.03))
    _legend_on_top(axes, title="Preferred completion scored higher", columns=2)
    return _done(figure)


def _measured(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Those columns that hold a number; ValueError if none does."""
    found = [name for name in columns if name in frame and frame[name].notna().any()]
    if not found:
        raise ValueError(f"nothing to draw: {' and '.join(columns)} not measured; there are {', '.join(frame.columns)}")
    return found


def _present(scores: pd.DataFrame, models: Sequence[str] | None) -> list[str]:
    known = list(scores["model"].unique())
    if missing := [model for model in models or () if model not in known]:
        raise ValueError(f"no rows of model {', '.join(missing)}; the scores have {', '.join(known)}")
    return list(models or known)


def _numbers(scores: pd.DataFrame, model: str, column: str) -> NDArray[np.float64]:
    rows = scores.loc[scores["model"] == model, column]
    if rows.isna().any():
        empty = rows.index[rows.isna()]
        raise ValueError(f"{column} of {model} is empty in {len(empty)} of {len(rows)} rows, first in row {empty[0]}")
    return rows.to_numpy(dtype=float)


def _signed(interval: stats.Interval) -> str:
    return f"{interval.mean:+.2f} [{interval.lo:.2f}, {interval.hi:.2f}]"


def _panels(number: int, width: float, height: float, across: int | None = None) -> tuple[Figure, list[Axes]]:
    across = min(across or number, number)
    down = -(-number // across)
    figure, grid = plt.subplots(
        down, across, figsize=(width * across, height * down), squeeze=False, layout="constrained"
    )
    panels = list(grid.flat)
    for unused in panels[number:]:
        unused.remove()
    return figure, panels[:number]


def _unique(axes: Axes) -> tuple[list[str], list[Any]]:
    handles, texts = axes.get_legend_handles_labels()
    kept = dict(zip(reversed(texts), reversed(handles), strict=True))
    return list(reversed(kept)), list(reversed(kept.values()))


def _legend_on_top(axes: Axes, title: str, columns: int = 1) -> None:
    """A legend above the panel, where it can cover no data."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, title=title, frameon=False, alignment="left",
        borderaxespad=0.2,
    )  # fmt: skip


def _done(figure: Figure) -> Figure:
    plt.close(figure)
    return figure
