"""Frames in, matplotlib figures out: each says one thing, with units on its axes and intervals on its claims."""

from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from scipy.stats import norm

from rlhf_kit import stats
from rlhf_kit.stats import Array

# Okabe and Ito's palette, which colour-blind readers can tell apart; each model has a marker of its own as well.
COLOURS = {"base": "#7F7F7F", "SFT": "#0072B2", "best-of-n": "#CC79A7", "PPO": "#D55E00", "DPO": "#009E73"}
MARKERS = {"base": "X", "SFT": "o", "best-of-n": "^", "PPO": "s", "DPO": "D"}
OTHERS = ("#E69F00", "#56B4E9", "#332288", "#882255", "#999933", "#44AA99")
LAST = 11  # size of the last point of a curve
LABELS = {
    "gold": "gold utility",
    "proxy": "proxy reward (reward model)",
    "kl": "KL to SFT [nats/sequence]",
    "n_tokens": "completion length [tokens]",
    "completion_length": "completion length [tokens]",
    "entropy": "entropy [nats/token]",
    "approx_kl": "KL of an update [nats/token]",
    "clip_fraction": "clipped ratios [share]",
    "value_loss": "value loss [reward²]",
    "kl_coef": "KL coefficient [reward/nat]",
    "reward": "reward of the rollouts",
    "unfinished": "unfinished completions [share]",
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
    sizes = {"axes.titlesize": 13, "axes.labelsize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12}
    sizes |= {"legend.fontsize": 12, "legend.title_fontsize": 12, "figure.dpi": 100, "savefig.dpi": 150}
    look = {"grid.color": "#E5E5E5", "axes.edgecolor": "#808080"}
    sns.set_theme(style="whitegrid", palette=list(COLOURS.values()), rc=sizes | look)


def colours(models: Iterable[str]) -> dict[str, str]:
    """A colour per model: its own, the same in all figures, or else the next of the others in order of appearance."""
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

    The legend gives each model's mean shift from the baseline with the interval of `stats.paired_difference`. A reward
    that was not measured has no panel. Raises ValueError if none was.
    """
    rewards, colour = _measured(scores, rewards), colours(models)
    figure, panels = _panels(len(rewards), width=6.2, height=4.8)
    for axes, reward in zip(panels, rewards, strict=True):
        x, densities = _densities(scores, models, reward)
        for model, density in densities.items():
            mean = stats.of_model(scores, model)[reward].mean()
            text = f"mean {mean:.2f}"
            if model != baseline:
                shift = stats.paired_difference(scores, model, baseline, reward)
                text = f"shift {shift:+.2f}"
            axes.plot(x, density, color=colour[model], linewidth=2.2, label=f"{model}  {text}")
            axes.fill_between(x, density, color=colour[model], alpha=0.15, linewidth=0)
            axes.plot([mean, mean], [0, np.interp(mean, x, density)], "--", color=colour[model], linewidth=1.6)
        axes.set(xlabel=label(reward), ylabel="density of completions", xlim=(x[0], x[-1]), ylim=(0, None))
        _legend_on_top(axes, title="dashed: mean; its shift [95% interval]")
    figure.suptitle(f"Reward of the completions of the same {scores['prompt_id'].nunique()} prompts")
    return done(figure)


def reward_ridge(scores: pd.DataFrame, reward: str = "proxy", models: Sequence[str] | None = None) -> Figure:
    """A ridge per model, first on top, of one reward; lines mark the quantiles .05, .5 and .95 of its samples."""
    models = list(models or scores["model"].unique())
    colour = colours(models)
    figure, (axes,) = _panels(1, width=7.5, height=1.2 + 0.85 * len(models))
    x, densities = _densities(scores, models, reward)
    scale = 1.5 / max(density.max() for density in densities.values())  # a peak reaches half into the row above
    for row, (model, density) in enumerate(densities.items()):
        top = scale * density - row
        axes.fill_between(x, -row, top, color=colour[model], alpha=0.85, zorder=row + 2, linewidth=0)
        axes.plot(x, top, color="white", linewidth=1.5, zorder=row + 2)
        at = stats.of_model(scores, model)[reward].quantile([0.05, 0.5, 0.95]).to_numpy()
        axes.vlines(at, -row, np.interp(at, x, top), "black", linewidths=(1.5, 3.0, 1.5), zorder=row + 2)
    axes.set_yticks([-row for row in range(len(models))], models)
    axes.set(xlabel=label(reward), xlim=(x[0], x[-1]), ylim=(0.75 - len(models), 1.6))
    axes.grid(axis="y", visible=False)
    axes.set_title(f"{label(reward).capitalize()} by model; lines: quantiles .05, .50, .95")
    sns.despine(figure, left=True)
    return done(figure)


def _densities(scores: pd.DataFrame, models: Sequence[str], reward: str) -> tuple[Array, dict[str, Array]]:
    """Places [G] and each model's kernel density there, of one width so that shapes can be compared.

    The width is the largest that Silverman's rule (1986, eq. 3.31) gives a model: 0.9 min(standard deviation, quartile
    range / 1.349) n^-1/5, and never finer than the picture can show.
    """
    samples = {model: stats.of_model(scores, model, reward)[reward].to_numpy(float) for model in models}
    pooled = np.concatenate(list(samples.values()))
    span = np.ptp(pooled) or 1.0
    width = span / 160
    for values in samples.values():
        quartiles = np.ptp(np.quantile(values, [0.25, 0.75])) / 1.349 or np.inf
        width = max(width, 0.9 * min(values.std(), quartiles) * len(values) ** -0.2)
    margin = max(0.12 * span, 3 * width)
    x = np.linspace(pooled.min() - margin, pooled.max() + margin, 400)
    return x, {model: norm.pdf(x[:, None], values, width).mean(1) for model, values in samples.items()}


def reward_against_kl(frame: pd.DataFrame, rewards: Sequence[str] = ("gold", "proxy")) -> Figure:
    """Mean reward against KL to SFT: a point per row of a summary, or a curve per model where it has several rows.

    Columns: `model`, `kl` and one per reward, with `_lo` and `_hi` where there are intervals; `beta`, `step` or `n`
    orders a curve, whose last point is large. Several values of `seed` give a curve each, without intervals. Rows with
    `n` (best-of-n) are marked: their `kl` is an upper bound. The legend names models without `kl`.
    """
    rewards, drawn = _measured(frame, rewards), frame[frame["kl"].notna()]
    missing = frame.loc[frame["kl"].isna(), "model"].unique()
    if drawn.empty:
        raise ValueError("no row has a KL to draw against: column 'kl' is empty")
    figure, panels = _panels(len(rewards), width=5.8, height=4.8)
    colour = colours(drawn["model"])
    for axes, reward in zip(panels, rewards, strict=True):
        for name, rows in drawn[drawn[reward].notna()].groupby("model", sort=False):
            model = str(name)
            _curves(axes, rows, reward, {"color": colour[model], "marker": MARKERS.get(model, "o"), "label": model})
        axes.set(xlabel=label("kl"), ylabel=f"mean {label(reward)}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(0.06)
    notes = []
    if any(line.get_markersize() == LAST for line in panels[0].lines):
        notes.append("large point: the last of its curve")
    if "n" not in drawn or (drawn := drawn[drawn["n"].isna()]).size:  # the bounds of best-of-n have no intervals
        notes += dict.fromkeys(filter(None, (_barless(drawn, reward) for reward in rewards)))
    if len(missing):
        notes.append(f"not drawn, no KL: {', '.join(missing)}")
    _legend_below(figure, panels[0], 2 * len(panels), title="; ".join(notes))
    figure.suptitle("Reward against distance from the SFT model")
    return done(figure)


def _curves(axes: Axes, rows: pd.DataFrame, reward: str, look: dict[str, Any]) -> None:
    """The rows of one model: points with both intervals, joined in order of what varies, a line per seed."""
    order = next((name for name in ("beta", "step", "n") if name in rows and rows[name].nunique() > 1), None)
    bound = " (KL: upper bound)" if stats.measured("n", rows) else ""
    seeds = [part for _, part in rows.groupby("seed", sort=False, dropna=False)] if "seed" in rows else [rows]
    for i, part in enumerate(seeds):
        part = part.sort_values(order) if order else part
        span = f", {order} {part[order].iloc[0]:g} to {part[order].iloc[-1]:g}" if order else ""
        text = look["label"] + bound + span if i == 0 else "_nolegend_"
        shown = look | {"label": text, "linestyle": "-" if order else "none", "markersize": 5 if order else 9}
        errors: dict[str, Any] = {"xerr": _error(part, "kl"), "yerr": _error(part, reward)} if len(seeds) == 1 else {}
        axes.errorbar(part["kl"], part[reward], **errors, **shown, capsize=3, elinewidth=1.5)
        if order:
            end = look | {"label": "_nolegend_", "markersize": LAST, "markeredgecolor": "black", "zorder": 5}
            axes.plot(part["kl"].iloc[-1], part[reward].iloc[-1], **end)


def _error(rows: pd.DataFrame, column: str) -> Array | None:
    """Distances [2, N] from the mean down to `_lo` and up to `_hi`, NaN where they are not known, None without them."""
    if f"{column}_lo" not in rows:
        return None
    ends = [rows[column] - rows[f"{column}_lo"], rows[f"{column}_hi"] - rows[column]]
    return np.clip(np.asarray(ends, dtype=float), 0, None)


def _barless(frame: pd.DataFrame, column: str) -> str:
    """What a legend says of points that have no interval; nothing where all have one."""
    alone = frame[column].notna() & frame[f"{column}_lo"].isna() if f"{column}_lo" in frame else pd.Series([False])
    return f"no bar: {stats.NO_INTERVAL}" if alone.any() else ""


def by_kind(scores: pd.DataFrame, value: str = "gold", models: Sequence[str] | None = None) -> Figure:
    """Mean of `value` per kind of prompt and model, with 95% intervals over prompts (and seeds)."""
    models = list(models or scores["model"].unique())
    colour, kinds = colours(models), sorted(scores["kind"].unique())
    figure, (axes,) = _panels(1, width=max(6.5, 1.5 * len(kinds)), height=4.8)
    barless = ""
    for i, model in enumerate(models):
        rows = stats.of_model(scores, model).groupby("kind")
        found = {kind: stats.columns(value, stats.hierarchical_bootstrap(part, value)) for kind, part in rows}
        table = pd.DataFrame.from_dict(found, orient="index").reindex(kinds)
        x = np.arange(len(kinds)) + (i - (len(models) - 1) / 2) * 0.7 / len(models)
        look: dict[str, Any] = {"color": colour[model], "marker": MARKERS.get(model, "o"), "label": model}
        bars: dict[str, Any] = {"linestyle": "", "markersize": 8, "capsize": 3, "elinewidth": 1.8}
        axes.errorbar(x, table[value], _error(table, value), **look, **bars)
        barless = _barless(table, value) or barless
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(xlabel="kind of prompt", ylabel=f"mean {label(value)}")
    axes.grid(axis="x", visible=False)
    for edge in range(len(kinds) - 1):
        axes.axvline(edge + 0.5, color="#E5E5E5", linewidth=1)
    _legend_on_top(axes, title=barless or "mean [95% interval]", columns=5)
    return done(figure)


def training(metrics: pd.DataFrame, columns: Sequence[str], x: str = "update") -> Figure:
    """Small multiples of what was logged over updates, a line for every run: no seed hides behind a mean.

    A run is a value of the column `run`, if there is one; a column `model` gives its line's name and colour.
    Raises ValueError if a column is missing or empty.
    """
    for name in (x, *columns):
        _measured(metrics, [name])
    lines = [part for _, part in metrics.groupby("run", sort=False)] if "run" in metrics else [metrics]
    by = next((name for name in ("model", "run") if name in metrics), None)
    names = [str(part[by].iloc[0]) if by else "" for part in lines]
    colour = colours(names) if by else {"": COLOURS["SFT"]}
    figure, panels = _panels(len(columns), width=4.4, height=3.4, across=2 if len(columns) in (2, 4) else 3)
    for axes, column in zip(panels, columns, strict=True):
        for name, part in zip(names, lines, strict=True):
            part = part[part[column].notna()].sort_values(x)
            marker = "o" if len(part) == 1 else ""  # a line of one point would not be seen
            look: dict[str, Any] = {"color": colour[name], "label": name, "marker": marker}
            axes.plot(part[x], part[column], **look, linewidth=1.8)
        axes.set_xlabel(label(x), fontsize=12)
        axes.set_ylabel(label(column), fontsize=12)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if len(lines) > 1:
        _legend_below(figure, panels[0], columns=5)
    figure.suptitle(f"Training by {label(x)}" + (f", all {len(lines)} runs" if len(lines) > 1 else ""))
    return done(figure)


def calibration(frame: pd.DataFrame) -> Figure:
    """Observed against predicted frequency of preference (`stats.calibration_curve`); large points hold many pairs."""
    colour, x, y = COLOURS["SFT"], frame["predicted"], frame["observed"]
    figure, (axes,) = _panels(1, width=5.2, height=5.4)
    axes.plot([0, 1], [0, 1], color="#606060", linestyle="--", linewidth=1.5, label="perfectly calibrated")
    axes.errorbar(x, y, _error(frame, "observed"), fmt="none", color=colour, capsize=3)
    sizes = 20 + 180 * frame["n"] / frame["n"].max()
    axes.scatter(x, y, sizes, color=colour, label="pairs of a bin [95% interval]", zorder=3)
    axes.set(xlabel="predicted preference [probability]", ylabel="observed preference [share of pairs]")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    error = stats.expected_calibration_error(frame)
    _legend_on_top(axes, title=f"calibration error {error:.3f}, {frame['n'].sum()} pairs")
    return done(figure)


def accuracy(frame: pd.DataFrame) -> Figure:
    """A reward model's accuracy against chance: a point with its interval per row of `pairs, n, accuracy[_lo, _hi]`."""
    figure, (axes,) = _panels(1, width=7, height=1.6 + 0.6 * len(frame))
    rows = np.arange(len(frame))[::-1]
    axes.axvline(0.5, color="#606060", linestyle="--", linewidth=1.5, label="chance")
    look: dict[str, Any] = {"fmt": "o", "color": COLOURS["SFT"], "label": "reward model [95% interval]"}
    axes.errorbar(frame["accuracy"], rows, xerr=_error(frame, "accuracy"), **look, capsize=4, markersize=9)
    names = [f"{name}\n({n} pairs)" for name, n in zip(frame["pairs"], frame["n"], strict=True)]
    axes.set(yticks=rows, yticklabels=names, ylim=(-0.6, len(frame) - 0.4), xlabel="accuracy [share of pairs]")
    axes.set_xlim(min(0.45, frame["accuracy_lo"].min() - 0.03), max(0.8, frame["accuracy_hi"].max() + 0.03))
    _legend_on_top(axes, title=_barless(frame, "accuracy") or "Preferred completion scored higher", columns=2)
    return done(figure)


def _measured(frame: pd.DataFrame, columns: Sequence[str]) -> list[str]:
    """Those columns that hold a number; ValueError if none does."""
    found = [name for name in columns if stats.measured(name, frame)]
    if not found:
        raise ValueError(f"nothing to draw: {' and '.join(columns)} not measured; there are {', '.join(frame.columns)}")
    return found


def _panels(number: int, width: float, height: float, across: int | None = None) -> tuple[Figure, list[Axes]]:
    across = min(across or number, number)
    down = -(-number // across)
    figure = plt.figure(figsize=(width * across, height * down), layout="constrained")
    return figure, [figure.add_subplot(down, across, i + 1) for i in range(number)]


def _legend_on_top(axes: Axes, title: str, columns: int = 1) -> None:
    """A legend above the panel, where it can cover no data."""
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "alignment": "left", "borderaxespad": 0.2}
    axes.legend(**place, ncols=columns, title=title, frameon=False)


def _legend_below(figure: Figure, axes: Axes, columns: int, title: str = "") -> None:
    """One legend for all panels, under them; what has the same text comes once."""
    known = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": min(len(known), columns), "frameon": False}
    figure.legend(list(known.values()), list(known), **place, title=title or None)


def done(figure: Figure) -> Figure:
    """Let pyplot close the figure: a cell shows it once, and hundreds leave no memory. No name is a formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    plt.close(figure)
    return figure
