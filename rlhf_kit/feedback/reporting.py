"""A report of a body of feedback: a row per rater, a figure, and both as a self-contained page."""

import base64
import html
from datetime import UTC, datetime
from importlib import metadata
from importlib.resources import files
from io import BytesIO
from string import Template
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from rlhf_kit import plots
from rlhf_kit.feedback.judging import FeedbackError
from rlhf_kit.feedback.quality import PAIR, agreement, biases, position_from_swaps, votes, words
from rlhf_kit.feedback.store import Store
from rlhf_kit.stats import NOT_MEASURED, Interval, bootstrap, columns

PACKAGES = ("rlhf-kit", "krippendorff", "scipy", "pandas")  # the numbers depend on these
BLUE, GREY = plots.COLOURS["SFT"], plots.COLOURS["base"]
TOO_FAST = 1 / 3  # of a rater's own median time per word
# The page's tables. report.html says what their columns mean.
TABLES = {
    "work": "rater judgments skips ties agree even_votes lapse seconds too_fast repeats repeats_changed",
    "sways": "rater side_bias position position_swapped length choices swaps why",
    "agreement": "measure question raters value used left_out why",
}


def raters(judgments: pd.DataFrame) -> pd.DataFrame:
    """A row per rater with the columns of TABLES (report.html explains them); `_lo` and `_hi` bound 95% intervals.

    Intervals of shares are bootstrapped over items. What cannot be measured is NaN, and `why` says why a bias is.
    """
    found, present, repeated = votes(judgments), judgments[~judgments["withdrawn"]], votes(judgments, repeats=True)
    repeated["before"] = repeated.groupby([*PAIR, "rater"])["value"].shift()
    repeated, others = repeated[repeated["before"].notna()], _majority_of_others(found)
    clear, pairs = others[others["majority"].notna()], found[found["question"] == "rank"]
    sided = pairs[(pairs["value"] != 0) & (pairs["first"] != 0)]
    shares = {
        "agree": clear.assign(hit=clear["value"] == clear["majority"]),
        "side_bias": sided.assign(hit=(sided["value"] == sided["first"]) - 0.5),
        "repeats_changed": repeated.assign(hit=repeated["value"] != repeated["before"]),
    }
    rows = []
    for rater, given in present.groupby("rater"):
        per_word = given["seconds"] / given["completions"].map(lambda texts: max(1, sum(map(words, texts))))
        row: dict[str, Any] = {
            "rater": rater,
            "judgments": len(given),
            "skips": int((given["ranks"].isna() & given["rating"].isna()).sum()),
            "ties": int((pairs["rater"].eq(rater) & pairs["value"].eq(0)).sum()),
            "even_votes": int((others["rater"].eq(rater) & others["majority"].isna()).sum()),
            "seconds": float(given["seconds"].median()),
            "too_fast": float((per_word.dropna() < TOO_FAST * per_word.median()).mean()),  # NaN where nothing was timed
            "repeats": int(repeated["rater"].eq(rater).sum()),
        }
        for name, frame in shares.items():
            own = frame[frame["rater"] == rater]
            row |= columns(name, bootstrap(own["hit"].astype(float), own["item"]) if len(own) else NOT_MEASURED)
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


def report(judgments: pd.DataFrame | Store) -> tuple[pd.DataFrame, Figure]:
    """The table of `raters` and its figure, with 95% intervals; FeedbackError if there is no judgment."""
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
    glyphs = get_font(findfont(FontProperties())).get_charmap()  # a name in other letters would be a row of boxes
    names = [name if {*map(ord, name)} <= {*glyphs} else f"rater {row + 1}" for row, name in enumerate(table["rater"])]
    figure, grid = plt.subplots(2, 2, figsize=(12.4, 3 + 0.76 * len(table)), layout="constrained", sharey=True)
    for axes, (name, (title, label)) in zip(grid.flat, panels.items(), strict=True):
        axes.hlines(rows, numbers[f"{name}_lo"], numbers[f"{name}_hi"], color=BLUE, linewidth=2.4)
        axes.plot(numbers[name], rows, "o", color=BLUE, markersize=8)
        middle = {"ha": "center", "va": "center", "transform": axes.get_yaxis_transform()}
        for row in rows[numbers[name].isna()]:
            axes.text(0.5, row, "not measured", color=GREY, **middle)
        axes.set_title(title, loc="right")
        axes.set(xlabel=label, ylim=(len(table) - 0.5, -0.5))
        axes.set_yticks(rows, names)
        axes.grid(axis="y", visible=False)
        if name in ("position", "length"):
            axes.axvline(0, color=GREY, linewidth=2, linestyle="--", zorder=1)
    grid[1, 1].set_xlim(left=0)
    figure.suptitle(f"{len(table)} rater{'s' * (len(table) > 1)}, {table['judgments'].sum()} judgments; 95% intervals")
    return table, plots.done(figure)


def page(store: Store, command: str) -> str:
    """The report of a store as HTML that needs no other file; FeedbackError if no judgment in it counts."""
    everything = store.judgments(withdrawn=True)
    frame = everything[~everything["withdrawn"]]
    if frame.empty:
        raise FeedbackError(f"{store.path}: holds no judgment that counts ({len(everything)} taken back); judge first")
    plots.style()
    table, figure = report(frame)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    counted = f"{len(frame)} judgments, {len(table)} raters, {frame['item'].nunique()} items judged, "
    counted += f"{len(store.items())} items in the store, {table['skips'].sum()} skipped, "
    counted += f"{everything['withdrawn'].sum()} taken back; {frame['time'].min()[:16]} to {frame['time'].max()[:16]}"
    return Template(files(__package__).joinpath("report.html").read_text(encoding="utf-8")).substitute(
        store=html.escape(store.path.name),
        counted=f"{counted} UTC",
        figure=base64.b64encode(drawn.getvalue()).decode(),
        work=_html(table, "work"),
        sways=_html(table, "sways"),
        agreement=_html(agreement(frame), "agreement"),
        command=html.escape(command),
        now=f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        versions=", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
    )


def _html(frame: pd.DataFrame, table: str) -> str:
    """The columns of one of TABLES, each number with its interval; `why` only where it says something."""
    rows, names = frame.to_dict("records"), TABLES[table].split()
    shown = [name for name in names if name != "why" or (frame["why"] != "").any()]
    cells = {name.replace("_", " "): [_cell(row, name) for row in rows] for name in shown}
    return pd.DataFrame(cells).to_html(index=False, border=0)


def _cell(row: dict[Any, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, float):
        return str(value)
    lo, hi = ("lo", "hi") if name == "value" else (f"{name}_lo", f"{name}_hi")
    digits = 3 if name == "length" else 2
    text = format(Interval(value, row[lo], row[hi]), f".{digits}f") if lo in row else f"{value:.3g}"
    return "-" if np.isnan(value) else text.replace("nan", "-").replace("prompt", "item")
