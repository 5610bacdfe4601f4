"""A report of a body of feedback: the raters as a table and a figure, and both as a self-contained page."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_kit import plots
from rlhf_kit.feedback.agreement import agreement
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.quality import MEANINGS, raters
from rlhf_kit.feedback.store import Store
from rlhf_kit.rewards import Reward

PACKAGES = ("rlhf-kit", "krippendorff", "scipy", "pandas")  # the numbers depend on these
BLUE, ORANGE, GREY = plots.COLOURS["SFT"], plots.COLOURS["PPO"], plots.COLOURS["base"]
OF_AGREEMENT = {
    "measure": "alpha is Krippendorff's, ordinal: 1 - observed / expected disagreement; 1 is perfect, 0 is what chance "
    "gives. Each pair counts in both orders, because the order in which an item lists its completions means nothing. "
    "Percent agreement is the chance that two raters of a pair say the same",
    "question": "what was asked",
    "raters": "number of raters",
    "value": "the measure",
    "used": "pairs of completions, or rated completions, that two raters or more judged",
    "left_out": "the others",
    "why": "why a measure has no value",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8888; text-align: left; white-space: nowrap; }
td:last-child { white-space: normal; } img { max-width: 100%; background: #fff; } dt { font-weight: 600; }
"""


def report(judgments: pd.DataFrame | Store, gold: Reward | None = None) -> tuple[pd.DataFrame, Figure]:
    """The table of `raters` and its figure: agreement, position bias, length bias and speed, with 95% intervals.

    Raises FeedbackError if there is no judgment.
    """
    frame = judgments.judgments() if isinstance(judgments, Store) else judgments
    table = raters(frame, gold)
    return table, draw(table, frame)


def draw(table: pd.DataFrame, judgments: pd.DataFrame) -> Figure:
    """Four panels; each rater has the same row in all of them."""
    panels = {
        "agree": ("Do they agree?", "agreement with most of the others [share of pairs]"),
        "position": ("Does the place sway them?", "bias to the first place [log-odds]"),
        "length": ("Does length sway them?", f"bias to length, quality from {table['against'][0]} [log-odds per word]"),
        "seconds": ("How fast are they?", "time of a judgment [s]: median, middle half"),
    }
    quartiles = (
        judgments[~judgments["withdrawn"]].groupby("rater")["seconds"].quantile(np.array([0.25, 0.75])).unstack()
    )
    numbers = table.set_index("rater").replace([np.inf, -np.inf], np.nan)
    numbers[["seconds_lo", "seconds_hi"]] = quartiles
    rows = np.arange(len(table))
    figure, grid = plt.subplots(2, 2, figsize=(12.4, 3 + 0.76 * len(table)), layout="constrained", sharey=True)
    for axes, (name, (title, label)) in zip(grid.flat, panels.items(), strict=True):
        _intervals(axes, numbers, name, rows, BLUE)
        for row in rows[numbers[name].isna()]:
            transform = axes.get_yaxis_transform()
            axes.text(0.5, row, "not measured", color=GREY, ha="center", va="center", transform=transform)
        axes.set_title(title, loc="right")
        axes.set(xlabel=label, ylim=(len(table) - 0.5, -0.5))
        axes.set_yticks(rows, table["rater"])
        axes.grid(axis="y", visible=False)
    agree, position, length, speed = grid.flat
    if "agree_gold" in table:
        _intervals(agree, numbers, "agree_gold", rows + 0.22, ORANGE)
        agree.set_xlabel("agreement [share of pairs]: with most of the others (blue), with gold (orange)")
    for axes in (position, length):
        axes.axvline(0, color=GREY, linewidth=2, linestyle="--", zorder=1)
    speed.set_xlim(left=0)
    figure.suptitle(f"{len(table)} rater{'s' * (len(table) > 1)}, {table['judgments'].sum()} judgments; 95% intervals")
    plt.close(figure)
    return figure


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
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Feedback</title><style>{STYLE}</style></head><body>
<h1>Feedback in {html.escape(store.path.name)}</h1>
<p>{len(frame)} judgments, {len(table)} raters, {frame["item"].nunique()} items judged, {len(store.items())} items in
the store, {table["skips"].sum()} skipped, {everything["withdrawn"].sum()} taken back; {frame["time"].min()} to
{frame["time"].max()}. Square brackets hold 95% intervals; a dash is a number that these judgments cannot give.</p>
<p><img alt="Agreement, position bias, length bias and speed of each rater"
src="data:image/png;base64,{base64.b64encode(drawn.getvalue()).decode()}"></p>
{"".join(_html(title, table, {"rater": "who judged", **meanings}) for title, meanings in MEANINGS.items())}
{_html("Agreement", agreement(frame), OF_AGREEMENT)}
<p>Made by <code>{html.escape(command)}</code> on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC with {used}.</p>
</body></html>
"""


def write(path: str | Path, make: Callable[[], str], force: bool = False) -> Path:
    """Make a page and write it; FeedbackError where the file exists and `force` is not given."""
    target = Path(path)
    if target.exists() and not force:
        raise FeedbackError(f"{target}: is there already; name another file with --out, or overwrite it with --force")
    target.write_text(make(), encoding="utf-8")
    return target


def _html(title: str, frame: pd.DataFrame, meanings: dict[str, str]) -> str:
    """Columns of a frame, each number with its interval, and what they mean; `why` only where it says something."""
    shown = [name for name in meanings if name in frame and not (name == "why" and (frame[name] == "").all())]
    cells = {name.replace("_", " "): [_cell(row, name) for row in frame.to_dict("records")] for name in shown}
    meant = "".join(f"<dt>{name.replace('_', ' ')}</dt><dd>{html.escape(meanings[name])}</dd>" for name in shown)
    return f"<h2>{title}</h2><div>{pd.DataFrame(cells).to_html(index=False, border=0)}</div><dl>{meant}</dl>"


def _cell(row: dict[Any, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, float):
        return str(value)
    lo, hi = ("lo", "hi") if name == "value" else (f"{name}_lo", f"{name}_hi")
    digits = 3 if name == "length" else 2
    text = f"{value:.{digits}f} [{row[lo]:.{digits}f}, {row[hi]:.{digits}f}]" if lo in row else f"{value:.3g}"
    return "-" if np.isnan(value) else text.replace("nan", "-")


def _intervals(axes: Axes, numbers: pd.DataFrame, name: str, rows: Any, colour: str) -> None:
    axes.hlines(rows, numbers[f"{name}_lo"], numbers[f"{name}_hi"], color=colour, linewidth=2.4)
    axes.plot(numbers[name], rows, "o", color=colour, markersize=8)
