"""A report of a body of feedback: a row per rater, a figure, and both as a self-contained page."""

from __future__ import annotations

import base64
import html
from datetime import UTC, datetime
from importlib import metadata
from io import BytesIO
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rlhf_kit import plots, stats
from rlhf_kit.feedback.agreement import PAIR, agreement, votes, words
from rlhf_kit.feedback.bias import biases, position_from_swaps
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.store import Store
from rlhf_kit.stats import NOT_MEASURED, Interval, columns

PACKAGES = ("rlhf-kit", "krippendorff", "scipy", "pandas")  # the numbers depend on these
BLUE, GREY = plots.COLOURS["SFT"], plots.COLOURS["base"]
TOO_FAST = 1 / 3  # of a rater's own median time per word
# What the columns of each table mean, as the page says it.
MEANINGS = {
    "How much, how well, how fast": {
        "rater": "",
        "judgments": "judgments given, with skipped ones, without those taken back",
        "skips": "items skipped",
        "ties": "pairs called equal",
        "agree": "share of pairs in which the rater says what most of the others say",
        "even_votes": "pairs that agree leaves out, because the others are evenly divided",
        "lapse": "share of choices made at random, from the same model as position and length; what only this rater "
        "does not know of a pair counts too",
        "seconds": "median time of a judgment, in seconds",
        "too_fast": "share of timed judgments that took less than a third of the rater's own median time per word",
        "repeats": "pairs that the rater judged again",
        "repeats_changed": "share of these in which the later vote differs",
    },
    "What sways them": {
        "rater": "",
        "side_bias": "share of decided pairs in which the rater prefers the first place on the page, less 1/2",
        "position": "log-odds that the first place on the page adds, from a model of choices that holds quality and "
        "length equal and allows for lapses, with weak priors",
        "position_swapped": "log-odds of the first place from pairs judged in both orders, log(n first-first / n "
        "second-second) / 2: exact whatever the quality",
        "length": "log-odds that each further word adds, from the same model, relative to the mean of the panel, "
        "because a taste that all share cannot be told from quality",
        "choices": "pairs that the model uses; ties are left out",
        "swaps": "pairs judged in both orders",
        "why": "why the model gives no number",
    },
    "Agreement": {
        "measure": "",  # its values are explained below
        "question": "what was asked",
        "raters": "number of raters",
        "value": "alpha is Krippendorff's, ordinal: 1 - observed / expected disagreement; 1 is perfect, 0 is what "
        "chance gives. Each pair counts in both orders, because the order in which an item lists its completions means "
        "nothing. Percent agreement is the chance that two raters of a pair say the same",
        "used": "pairs of completions, or rated completions, that two raters or more judged",
        "left_out": "the others",
        "why": "why a measure has no value",
    },
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8888; text-align: left; white-space: nowrap; }
td:last-child { white-space: normal; } img { max-width: 100%; background: #fff; } dt { font-weight: 600; }
"""


def raters(judgments: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """A row per rater with the columns of MEANINGS; `_lo` and `_hi` are the bounds of 95% intervals.

    Intervals of shares are bootstrapped over items; those of log-odds come from `biases` and `position_from_swaps`.
    What cannot be measured is NaN, and `why` says why a bias is. The last of repeated votes counts.
    """
    found, present = votes(judgments), judgments[~judgments["withdrawn"]]
    others, again = _majority_of_others(found), votes(judgments, repeats=True)
    again["before"] = again.groupby([*PAIR, "rater"])["value"].shift()
    repeated = again[again["before"].notna()]
    rows = []
    for rater, given in present.groupby("rater"):
        own, said, twice = (frame[frame["rater"] == rater] for frame in (found, others, repeated))
        pairs, clear = own[own["question"] == "rank"], said[said["majority"].notna()]
        decided = pairs[pairs["value"] != 0]
        sided = decided[decided["first"] != 0]
        skips = int((given["ranks"].isna() & given["rating"].isna()).sum())
        row: dict[str, Any] = {"rater": rater, "judgments": len(given), "skips": skips}
        row |= {"ties": len(pairs) - len(decided), "votes": len(own)}
        row |= _share("agree", clear["value"] == clear["majority"], clear["item"], seed)
        row |= {"even_votes": len(said) - len(clear)}
        row |= _share("side_bias", sided["value"] == sided["first"], sided["item"], seed, less=0.5)
        row |= _speed(given) | {"repeats": len(twice)}
        row |= _share("repeats_changed", twice["value"] != twice["before"], twice["item"], seed)
        rows.append(row)
    return pd.DataFrame(rows).merge(biases(judgments), on="rater").merge(position_from_swaps(judgments), on="rater")


def _majority_of_others(found: pd.DataFrame) -> pd.DataFrame:
    """Votes with `majority`, what most of the other raters say (NaN: evenly divided), where there are others."""
    said = pd.get_dummies(found["value"], dtype=int)  # (votes, values)
    others = said.groupby([found[name] for name in PAIR]).transform("sum") - said
    others = others[others.sum(axis=1) > 0]
    if others.empty:
        return found.iloc[:0].assign(majority=np.nan)
    sole = others.eq(others.max(axis=1), axis=0).sum(axis=1) == 1
    return found.loc[others.index].assign(majority=others.idxmax(axis=1).where(sole))


def _speed(given: pd.DataFrame) -> dict[str, float]:
    """Median seconds of a rater's judgments, and the share that took far less time per word than the median one."""
    lengths = given["completions"].map(lambda texts: max(1, sum(map(words, texts))))
    per_word = (given["seconds"] / lengths).dropna()
    too_fast = float((per_word < TOO_FAST * per_word.median()).mean())  # NaN where nothing was timed
    return {"seconds": float(given["seconds"].median()), "too_fast": too_fast}


def _share(name: str, hits: pd.Series, items: pd.Series, seed: int, less: float = 0.0) -> dict[str, float]:
    share = stats.bootstrap(hits.astype(float), items, seed=seed) if len(hits) else NOT_MEASURED
    return columns(name, Interval(*(bound - less for bound in share)))


def report(judgments: pd.DataFrame | Store) -> tuple[pd.DataFrame, Figure]:
    """The table of `raters` and its figure: agreement, position bias, length bias and speed, with 95% intervals.

    Raises FeedbackError if there is no judgment.
    """
    frame = judgments.judgments() if isinstance(judgments, Store) else judgments
    table = raters(frame)
    numbers = table.set_index("rater").replace([np.inf, -np.inf], np.nan)
    quartiles = frame[~frame["withdrawn"]].groupby("rater")["seconds"].quantile(np.array([0.25, 0.75]))
    numbers[["seconds_lo", "seconds_hi"]] = quartiles.unstack()
    panels = {
        "agree": ("Do they agree?", "agreement with most of the others [share of pairs]"),
        "position": ("Does the place sway them?", "bias to the first place [log-odds]"),
        "length": ("Does length sway them?", "bias to length, quality from the panel [log-odds per word]"),
        "seconds": ("How fast are they?", "time of a judgment [s]: median, middle half"),
    }
    rows = np.arange(len(table))
    figure, grid = plt.subplots(2, 2, figsize=(12.4, 3 + 0.76 * len(table)), layout="constrained", sharey=True)
    for axes, (name, (title, label)) in zip(grid.flat, panels.items(), strict=True):
        axes.hlines(rows, numbers[f"{name}_lo"], numbers[f"{name}_hi"], color=BLUE, linewidth=2.4)
        axes.plot(numbers[name], rows, "o", color=BLUE, markersize=8)
        for row in rows[numbers[name].isna()]:
            transform = axes.get_yaxis_transform()
            axes.text(0.5, row, "not measured", color=GREY, ha="center", va="center", transform=transform)
        axes.set_title(title, loc="right")
        axes.set(xlabel=label, ylim=(len(table) - 0.5, -0.5))
        axes.set_yticks(rows, table["rater"])
        axes.grid(axis="y", visible=False)
        if name in ("position", "length"):
            axes.axvline(0, color=GREY, linewidth=2, linestyle="--", zorder=1)
    grid[1, 1].set_xlim(left=0)
    figure.suptitle(f"{len(table)} rater{'s' * (len(table) > 1)}, {table['judgments'].sum()} judgments; 95% intervals")
    plt.close(figure)
    return table, figure


def page(store: Store, command: str) -> str:
    """A report of a store as one HTML file that needs no other file: no script, no font, no picture beside it.

    Raises FeedbackError if the store holds no judgment that counts.
    """
    everything = store.judgments(withdrawn=True)
    frame = everything[~everything["withdrawn"]]
    if frame.empty:
        raise FeedbackError(f"{store.path}: holds no judgment that counts ({len(everything)} taken back); judge first")
    plots.style()
    table, figure = report(frame)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    used = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    tables = zip(MEANINGS.items(), (table, table, agreement(frame)), strict=True)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Feedback</title><style>{STYLE}</style></head><body>
<h1>Feedback in {html.escape(store.path.name)}</h1>
<p>{len(frame)} judgments, {len(table)} raters, {frame["item"].nunique()} items judged, {len(store.items())} items in
the store, {table["skips"].sum()} skipped, {everything["withdrawn"].sum()} taken back; {frame["time"].min()[:16]} to
{frame["time"].max()[:16]} UTC. Square brackets hold 95% intervals; a dash stands where there is no number.</p>
<p><img alt="Agreement, position bias, length bias and speed of each rater"
src="data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"></p>
{"".join(_html(title, numbers, meanings) for (title, meanings), numbers in tables)}
<p>Made by <code>{html.escape(command)}</code> on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC with {used}.</p>
</body></html>
"""


def _html(title: str, frame: pd.DataFrame, meanings: dict[str, str]) -> str:
    """Columns of a frame, each number with its interval, and what they mean; `why` only where it says something."""
    shown = [name for name in meanings if not (name == "why" and (frame[name] == "").all())]
    cells = {name.replace("_", " "): [_cell(row, name) for row in frame.to_dict("records")] for name in shown}
    meant = (f"<dt>{name.replace('_', ' ')}</dt><dd>{html.escape(meanings[name])}</dd>" for name in shown[1:])
    return f"<h2>{title}</h2><div>{pd.DataFrame(cells).to_html(index=False, border=0)}</div><dl>{''.join(meant)}</dl>"


def _cell(row: dict[Any, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, float):
        return str(value)
    lo, hi = ("lo", "hi") if name == "value" else (f"{name}_lo", f"{name}_hi")
    digits = 3 if name == "length" else 2
    text = f"{value:.{digits}f} [{row[lo]:.{digits}f}, {row[hi]:.{digits}f}]" if lo in row else f"{value:.3g}"
    return "-" if np.isnan(value) else text.replace("nan", "-")
