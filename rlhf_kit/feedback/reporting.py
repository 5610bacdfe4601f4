"""What is to be known of a body of feedback: the raters as a table and a figure, and both as a page to keep."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rlhf_kit import plots
from rlhf_kit.feedback.agreement import reliability
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.quality import MEANINGS, raters
from rlhf_kit.feedback.store import Store
from rlhf_kit.rewards import Reward

PACKAGES = ("rlhf-kit", "krippendorff", "statsmodels", "scipy", "pandas")  # that the numbers depend on
BLUE, ORANGE, GREY = plots.COLOURS["SFT"], plots.COLOURS["PPO"], plots.COLOURS["base"]
TABLES = {
    "How much, how well, how fast": [
        *("judgments", "skips", "ties", "agree", "even_votes", "agree_gold", "lapse", "seconds", "too_fast", "repeats"),
        "repeats_changed",
    ],
    "What sways them": ["side_bias", "position", "position_swapped", "length", "choices", "swaps", "why"],
}
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d0d0; --soft: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #16181c; --line: #3c4048; --soft: #a0a0a0; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem;
  margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .words { text-align: left; } .words { white-space: normal; min-width: 14rem; }
img { max-width: 100%; background: #fff; border-radius: 4px; } dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; }
footer, .soft { color: var(--soft); font-size: .85rem; } code { overflow-wrap: anywhere; }
"""

OF_AGREEMENT = {
    "alpha": "Krippendorff's alpha, ordinal: 1 - observed / expected disagreement; 1 is perfect, 0 what chance gives",
    "percent agreement": "share of two raters of a unit who give it the same value",
    "Fleiss's kappa": "agreement beyond chance of all raters, over units with the most common number of raters",
    "Cohen's kappa": "agreement beyond chance of two raters",
    "units": "pairs of completions of a ranked item, or rated completions; a measure leaves out what it cannot use. "
    "Measures beyond chance count each pair in both orders, for which one an item names first means nothing",
}


def report(judgments: pd.DataFrame | Store, gold: Reward | None = None) -> tuple[pd.DataFrame, Figure]:
    """The table of `raters` and its figure: agreement, side bias, length bias and speed, with 95% intervals.

    Raises FeedbackError if no judgment is there.
    """
    frame = judgments.judgments() if isinstance(judgments, Store) else judgments
    table = raters(frame, gold)
    return table, draw(table, frame)


def draw(table: pd.DataFrame, judgments: pd.DataFrame) -> Figure:
    """Four panels, a rater in the same row of each."""
    height = 1.5 + 0.38 * len(table)
    figure, grid = plt.subplots(2, 2, figsize=(12.4, 2 * height), layout="constrained", sharey=True, squeeze=False)
    agreement, side, length, speed = grid.flat
    _intervals(agreement, table, "agree", BLUE, "with most of the others", "o")
    if "agree_gold" in table:
        _intervals(agreement, table, "agree_gold", ORANGE, "with gold", "D", below=0.22)
        agreement.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0.2)
    agreement.set(xlabel="agreement [share of units]")
    agreement.set_title("Do they agree?", loc="right")
    _intervals(side, table, "position", BLUE)
    side.set(xlabel="bias to the first place [log-odds]")
    side.set_title("Does the place sway them?", loc="right")
    _intervals(length, table, "length", BLUE)
    against = "gold held equal" if (table["against"] == "gold").all() else "against the panel's mean"
    length.set(xlabel=f"bias to length [log-odds per word]\n{against}")
    length.set_title("Does length sway them?", loc="right")
    for axes in (side, length):
        axes.axvline(0, color=GREY, linewidth=2, linestyle="--", zorder=1)
    _times(speed, table, judgments)
    speed.set_title("How fast are they?", loc="right")
    for axes in grid.flat:
        axes.set_yticks(range(len(table)), table["rater"])
        axes.set_ylim(len(table) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
    raters = "1 rater" if len(table) == 1 else f"{len(table)} raters"
    figure.suptitle(f"{raters}, {table['judgments'].sum()} judgments; bars are 95% intervals")
    plt.close(figure)
    return figure


def page(store: Store, command: str, gold: Reward | None = None) -> str:
    """A report of a store as one HTML file that needs nothing else: no script, no font, no picture beside it."""
    everything = store.judgments(withdrawn=True)
    frame = everything[~everything["withdrawn"]]
    if frame.empty:
        raise FeedbackError(f"{store.path}: holds no judgment, but for {len(everything)} taken back; judge first")
    plots.style()
    table, figure = report(frame, gold)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    picture = base64.b64encode(drawn.getvalue()).decode()
    numbers = {
        "judgments": len(frame),
        "raters": frame["rater"].nunique(),
        "items judged": frame["item"].nunique(),
        "items in the store": len(store.items()),
        "skipped": int(table["skips"].sum()),
        "taken back": int(everything["withdrawn"].sum()),
    }
    agreement = reliability(frame)
    sections = [
        f"<h1>Feedback in {html.escape(store.path.name)}</h1>",
        f"<p>{', '.join(f'{n} {name}' for name, n in numbers.items())}; {frame['time'].min()} to {frame['time'].max()}."
        " Square brackets hold 95% intervals; a dash is a number that these judgments cannot give.</p>",
        f'<p><img alt="Agreement, side bias, length bias and speed of each rater" '
        f'src="data:image/png;base64,{picture}"></p>',
        *(f"<h2>{title}</h2>{_table(table, ['rater', *columns])}" for title, columns in TABLES.items()),
        "<h2>Agreement</h2>",
        _table(agreement, ["measure", "question", "raters", "value", "units", "left_out", "why"]),
        f"<h2>What the numbers mean</h2><dl>{_definitions(table)}</dl>",
        f"<footer><p>Made by <code>{html.escape(command)}</code> on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC with "
        f"{html.escape(', '.join(f'{name} {metadata.version(name)}' for name in PACKAGES))}.</p>"
        "</footer>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    head = f"<head><title>Feedback</title>{head}</head>"
    body = "\n".join(sections)
    return f'<!doctype html>\n<html lang="en">{head}<body>\n{body}\n</body></html>\n'


def _definitions(table: pd.DataFrame) -> str:
    meanings = {name.replace("_", " "): text for name, text in MEANINGS.items() if name in table} | OF_AGREEMENT
    return "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in meanings.items())


def _table(frame: pd.DataFrame, columns: list[str]) -> str:
    columns = [name for name in columns if name in frame and not (name == "why" and (frame[name] == "").all())]
    head = "".join(f"<th{_kind(name)}>{html.escape(name.replace('_', ' '))}</th>" for name in columns)
    rows = []
    for _, row in frame.iterrows():
        cells = "".join(f"<td{_kind(name)}>{html.escape(_cell(row, name))}</td>" for name in columns)
        rows.append(f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _kind(name: str) -> str:
    return ' class="words"' if name in ("why", "raters") else ""


def _cell(row: pd.Series, name: str) -> str:
    value = row[name]
    if isinstance(value, str):
        return value
    if value != value:
        return "-"
    lo, hi = ("lo", "hi") if name == "value" else (f"{name}_lo", f"{name}_hi")
    if lo in row:
        digits = 3 if name == "length" else 2
        return f"{value:.{digits}f} [{row[lo]:.{digits}f}, {row[hi]:.{digits}f}]".replace("nan", "-")
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _intervals(
    axes: Axes, table: pd.DataFrame, name: str, colour: str, label: str = "", marker: str = "o", below: float = 0.0
) -> None:
    rows = np.arange(len(table)) + below
    numbers = table[[name, f"{name}_lo", f"{name}_hi"]].replace([np.inf, -np.inf], np.nan)
    axes.hlines(rows, numbers[f"{name}_lo"], numbers[f"{name}_hi"], color=colour, linewidth=2.4)
    axes.plot(numbers[name], rows, marker, color=colour, markersize=8, label=label)
    for row in rows[numbers[name].isna()]:
        axes.text(0.5, row, "not measured", color=GREY, ha="center", va="center", transform=axes.get_yaxis_transform())


def _times(axes: Axes, table: pd.DataFrame, judgments: pd.DataFrame) -> None:
    """Median and middle half of the seconds of a judgment, on a log axis."""
    for row, rater in enumerate(table.to_dict("records")):
        seconds = judgments.loc[(judgments["rater"] == rater["rater"]) & ~judgments["withdrawn"], "seconds"].dropna()
        if not (seconds > 0).any():
            axes.text(0.5, row, "not timed", color=GREY, ha="center", va="center", transform=axes.get_yaxis_transform())
            continue
        low, middle, high = seconds[seconds > 0].quantile([0.25, 0.5, 0.75])
        axes.hlines(row, low, high, color=BLUE, linewidth=2.4)
        axes.plot([middle], [row], "o", color=BLUE, markersize=8)
        if rater["too_fast"] > 0:
            text = f"{rater['too_fast']:.0%} too fast "
            axes.text(1, row, text, color=ORANGE, ha="right", va="center", transform=axes.get_yaxis_transform())
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, (low * high) ** 0.5 / 4), max(high, (low * high) ** 0.5 * 4))  # small differences look small
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="time of a judgment [s]: median, middle half")


def write(path: str | Path, make: Callable[[], str], force: bool = False) -> Path:
    """Make a page and write it; FeedbackError where a file of that name is there and `force` is not given."""
    target = Path(path)
    if target.exists() and not force:
        raise FeedbackError(f"{target}: is there already; name another file with --out, or overwrite it with --force")
    target.write_text(make(), encoding="utf-8")
    return target
