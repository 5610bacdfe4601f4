"""Quality of feedback against numbers worked out by hand, published examples, integrals and planted biases."""

from __future__ import annotations

import math
import re
import warnings
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import integrate
from scipy.stats import beta, halfnorm, norm

from rlhf_kit import cli, feedback
from rlhf_kit.feedback import Answer, FeedbackError, Item, Store, reporting
from rlhf_kit.feedback.judging import as_row, judgments_frame
from rlhf_kit.feedback.quality import Posterior, position_from_swaps
from rlhf_kit.tasks import Pocket, pocket
from rlhf_kit.tasks.pocket import answers

WORLD = pocket.world(0)
PROMPTS = WORLD.splits["preference"]
A, B, TIE, SKIP = (1, 2), (2, 1), (1, 1), None  # ranks of a pair, in the item's own order


def pair(k: int, longer: int = 0) -> Item:
    return Item(f"q{k}", ("a" + " a" * longer, "b"))


def judged(*said: tuple[Item, str, Any], shown: tuple[tuple[int, ...], ...] = ()) -> pd.DataFrame:
    """A frame of (item, rater, ranks in the item's order | rating | None); `shown` by row, else the item's order."""
    rows = []
    for number, (item, rater, value) in enumerate(said):
        order = shown[number] if shown else tuple(range(len(item.completions)))
        question, answer = "1-7", Answer(rating=value)
        if len(item.completions) > 1:
            question, answer = "rank", Answer(ranks=value and tuple(value[i] for i in order))
        rows.append(as_row(item, rater, question, answer, order, 1.0, "test"))
    return judgments_frame(rows)


def alpha(*said: tuple[Item, str, Any]) -> float:
    return float(feedback.agreement(judged(*said)).set_index("measure").loc["alpha", "value"])


# votes and agreement ---


def test_a_ranking_is_a_vote_per_pair_and_repeats_count_once() -> None:
    three = Item("q", ("a", "b b", "c , c c"))
    frame = judged((three, "ana", (1, 3, 2)), (three, "ana", (1, 2, 2)), shown=((2, 0, 1), (1, 0, 2)))
    last = feedback.votes(frame).set_index("pair")
    assert last["value"].to_dict() == {"0-1": 1, "0-2": 1, "1-2": 0}
    assert last["first"].to_dict() == {"0-1": -1, "0-2": 0, "1-2": 1}  # the page began with completion 1
    assert last["words"].to_dict() == {"0-1": -1, "0-2": -2, "1-2": -1}  # a comma is no word
    assert len(feedback.votes(frame, repeats=True)) == 6


def test_agreement_of_two_raters_on_pairs_is_what_hand_arithmetic_says() -> None:
    """Ten pairs, eight the same, two opposite. Each pair in both orders: 20 pairs, 40 values, 20 of each.

    Observed disagreement 4/20 = .2; expected 2 x 20 x 20 / (40 x 39) = 20/39; alpha = 1 - .2 x 39/20 = .61.
    """
    said = [(pair(k), name, B if name == "ben" and k < 2 else A) for k in range(10) for name in ("ana", "ben")]
    turned = [(Item(item.prompt, item.completions[::-1]), name, ranks[::-1]) for item, name, ranks in said]
    for votes in (said, turned):  # the order in which items list their completions changes nothing
        found = feedback.agreement(judged(*votes, (pair(10), "ana", A))).set_index("measure")
        assert found.loc["alpha", "value"] == pytest.approx(0.61)
        assert found.loc["percent agreement", "value"] == pytest.approx(0.8)
        assert (found["used"] == 10).all() and (found["left_out"] == 1).all() and (found["why"] == "").all()
        assert (found["lo"] < found["value"]).all() and (found["value"] < found["hi"]).all()


def test_alpha_of_krippendorffs_own_example() -> None:
    """Krippendorff (2011), section C: 4 observers, 12 units, 5 values, missing data; ordinal alpha .815."""
    observers = {
        "A": [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        "B": [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        "C": [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        "D": [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    }
    said = ((Item(f"q{k}", ("a",)), name, v or None) for name, row in observers.items() for k, v in enumerate(row))
    assert alpha(*said) == pytest.approx(0.815, abs=5e-4)


def test_a_tie_is_half_way_between_opposite_preferences() -> None:
    """Without ties alpha is nominal; one tie against a preference costs less than an opposite preference."""
    same = [(pair(k), name, [A, B][k % 2]) for k in range(2, 12) for name in ("ana", "ben")]
    tie = alpha(*same, (pair(0), "ana", A), (pair(0), "ben", TIE))
    against = alpha(*same, (pair(0), "ana", A), (pair(0), "ben", B))
    assert against < tie < 1


# odd inputs ---


def test_one_rater_has_no_agreement_and_is_told_why() -> None:
    frame = judged((pair(0), "ana", A), (Item("q", ("a",)), "ana", 5))
    found = feedback.agreement(frame)
    assert found["question"].tolist() == ["rank", "rank", "1-7", "1-7"]  # never mixed in one alpha
    assert found["value"].isna().all() and set(found["why"]) == {"no two raters judged the same"}
    row = feedback.raters(frame).iloc[0]
    assert math.isnan(row["agree"]) and row["judgments"] == 2 and "no pair with another" in row["why"]


def test_all_ties_agree_but_not_beyond_chance() -> None:
    frame = judged(*((pair(k), name, TIE) for k in range(3) for name in ("ana", "ben")))
    found = feedback.agreement(frame).set_index("measure")
    assert found.loc["percent agreement", "value"] == 1
    assert math.isnan(found.loc["alpha", "value"]) and found.loc["alpha", "why"] == "only one value was ever given"
    rows = feedback.raters(frame)
    assert (rows["ties"] == 3).all() and set(rows["why"]) == {"no pair was decided by this rater"}
    assert rows["side_bias"].isna().all() and (rows["agree"] == 1).all()


def test_a_rater_with_only_skips_keeps_a_row() -> None:
    frame = judged((pair(0), "ana", A), (pair(0), "cy", SKIP), (pair(1), "cy", SKIP))
    for part in (frame, frame[frame["rater"] == "cy"]):
        row = feedback.raters(part).set_index("rater").loc["cy"]
        assert (row["skips"], row["judgments"]) == (2, 2) and math.isnan(row["agree"])
    for nobody in (judgments_frame([]), frame.assign(withdrawn=True)):
        with pytest.raises(FeedbackError, match="there are no judgments yet"):
            feedback.report(nobody)


# raters ---


def test_the_table_of_raters_is_what_can_be_counted_by_hand() -> None:
    """ana says A, A, A, B, A; the others' majorities are A, A, B, none (one each), A: three of four hit."""
    said = [(pair(k), "ana", B if k == 3 else A) for k in range(5)]
    said += [(pair(k), "ben", ranks) for k, ranks in enumerate((A, A, B, A, A))]
    said += [(pair(k), "cy", ranks) for k, ranks in enumerate((A, A, B, B, A))]
    said += [(pair(0), "ana", A), (pair(1), "ana", B), (pair(2), "ana", SKIP)]  # again: one the same, one changed
    said.append((pair(1), "ana", A))  # and changed back
    frame = judged(*said)
    frame.loc[frame["rater"] == "ana", "seconds"] = [3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0, 0.5, 0.9]
    row = feedback.raters(frame).set_index("rater").loc["ana"]
    assert (row["judgments"], row["skips"], row["ties"]) == (9, 1, 0)
    assert row["agree"] == 3 / 4 and row["even_votes"] == 1
    assert row["side_bias"] == pytest.approx(4 / 5 - 1 / 2)
    assert row["repeats"] == 3 and row["repeats_changed"] == pytest.approx(2 / 3)
    assert row["seconds"] == 3.0 and row["too_fast"] == pytest.approx(2 / 9)


# biases ---


def test_pairs_judged_in_both_orders_give_the_bias_by_hand() -> None:
    """Six pairs with the first place preferred both times, two with the second, three unmoved: log(6 / 2) / 2."""
    both = [(A, B)] * 6 + [(B, A)] * 2 + [(A, A)] * 3
    said = [(pair(k), "ana", ranks) for k, votes in enumerate(both) for ranks in votes]
    shown = ((0, 1), (1, 0)) * len(both)
    row = position_from_swaps(judged(*said, shown=shown)).iloc[0]
    assert (row["swaps"], row["changed"]) == (11, 8)
    assert row["position_swapped"] == pytest.approx(math.log(3) / 2)
    # Clopper and Pearson of 6 in 8: [.3491, .9681]
    assert row["position_swapped_lo"] == pytest.approx(0.5 * math.log(0.3491 / 0.6509), abs=1e-3)
    assert row["position_swapped_hi"] == pytest.approx(0.5 * math.log(0.9681 / 0.0319), abs=1e-2)
    one_way = position_from_swaps(judged(*said[:12], shown=shown)).iloc[0]
    assert one_way["position_swapped"] == math.inf and math.isfinite(one_way["position_swapped_lo"])


def test_at_even_quality_place_and_lapses_say_together_how_often_the_first_is_preferred() -> None:
    """Every two of three raters see the two orders. P(first) = 3/4 each, independently: 9 of 16 pairs both the first,
    1 of 16 both the second, 3 and 3 of 16 agree. So quality plays no part, and (1 - lapse) s(position) + lapse / 2 is
    3/4. Nothing says how much of that is lapses, so these stay at the mode of their prior Beta(1.5, 6), .5 / 5.5."""
    said, same = [], [(A, A)] * 12 + [(B, B)] * 12
    for names in (("ana", "ben"), ("ben", "cy"), ("cy", "ana")):
        for votes in [(A, B)] * 36 + [(B, A)] * 4 + same:
            k = len(said)
            said += [(pair(k), rater, ranks) for rater, ranks in zip(names, votes, strict=True)]
    shown = ((0, 1), (1, 0)) * (len(said) // 2)
    found = feedback.biases(judged(*said, shown=shown))
    assert np.allclose(found["lapse"], 0.5 / 5.5, atol=0.01)
    first = (1 - found["lapse"]) / (1 + np.exp(-found["position"])) + found["lapse"] / 2
    assert np.allclose(first, 0.75, atol=0.005)
    # Were lapses known to be none, the standard error of 128 choices would be (128 * 3/16) ** -.5 = .204.
    assert ((found["position_hi"] - found["position"]) / 1.96 > 0.204).all()
    assert (found["lapse_lo"] == 0).all() and found["length"].isna().all()
    assert set(found["why"]) == {"order or length never differed"}


def test_the_likelihood_equals_numerical_integration() -> None:
    rng = np.random.default_rng(0)
    rater, pairs, items = np.array([0, 1, 2] * 3), np.repeat([0, 1, 2], 3), np.array([0, 0, 1])
    chosen, sways = rng.choice([-1.0, 1.0], 9), rng.normal(size=(9, 2))
    words = np.repeat([3.0, -1.0, 0.0], 3)
    weights, lapses = np.array([0.4, -0.7]), np.array([0.0, 0.1, 0.3])
    slopes, widths, odds = np.array([0.5, -1.0]), np.array([0.3, 2.0]), 0.7
    given = np.concatenate([weights, lapses, slopes, np.log(widths), [odds]])
    found = Posterior(chosen, sways, words, rater, pairs, items).of_pairs(torch.tensor(given))
    words /= words.std()
    shares = 1 / (1 + np.exp([-odds, odds]))
    for pair_id in range(3):
        rows = np.flatnonzero(pairs == pair_id)

        def weighed(quality: float, k: int, rows: Any = rows) -> float:
            chance = norm.pdf(quality, slopes[k] * words[rows[0]], widths[k])
            for n in rows:
                gap = quality + sways[n] @ weights
                right, lapse = 1 / (1 + np.exp(-chosen[n] * gap)), lapses[rater[n]]
                chance *= (1 - lapse) * right + lapse / 2
            return float(chance)

        whole = sum(shares[k] * integrate.quad(weighed, -25, 25, (k,), limit=200)[0] for k in range(2))
        assert found[pair_id].item() == pytest.approx(math.log(whole), abs=2e-3)


def test_the_prior_is_the_one_that_is_written_down() -> None:
    """Against scipy's densities, but for a constant: so between two points."""
    model = Posterior(np.ones(1), np.ones((1, 2)), np.ones(1), *(np.zeros(1, dtype=int) for _ in range(3)))
    density = []
    points = [[0.4, -5.0, 0.1, 0.5, -1.0, 0.3, 2.0, 0.7], [-1.0, 2.0, 0.5, 3.0, 0.0, 1.0, 7.0, -2.0]]
    for a, b, lapse, slope, other_slope, width, other_width, odds in points:
        normal = norm.logpdf([a / 3, b / 3, slope / 2, other_slope / 2, odds / 1.5]).sum()
        widths = halfnorm.logpdf([width / 2, other_width / 8]).sum()
        density.append(normal + widths + beta.logpdf(lapse, 1.5, 6))
    at = torch.tensor(points, dtype=torch.double)
    at[:, 5:7] = at[:, 5:7].log()
    assert (model.prior(at[1]) - model.prior(at[0])).item() == pytest.approx(density[0] - density[1])


@cache
def texts(n: int, seed: int, k: int = 2) -> list[Item]:
    """Items of the pocket world with k different completions each, good and poor ones."""
    rng, found = np.random.default_rng([seed, 99]), []
    while len(found) < n:
        prompt = PROMPTS[rng.integers(len(PROMPTS))]
        qualities = [answers.CAREFUL if rng.random() < 0.5 else answers.CARELESS for _ in range(k)]
        written = {answers.write(WORLD, prompt, quality, rng)[0] for quality in qualities}
        if len(written) == k:
            found.append(Item(prompt.text, tuple(sorted(written))))
    return found


GROUPS = {
    "left": {"position_bias": 0.6, "length": -0.1},
    "right": {"position_bias": -0.3, "length": 0.05},
    "long": {"position_bias": 0.0, "length": 0.2},
}
NO_FAULTS = {"knowledge": 1.0, "lapse": 0.0, "politeness": 0.0, "refusal_leniency": 0.0, "agreement": 0.0}


def recovered(n_seeds: int, pairs: int, k: int = 2, raters: int = 6, **faults: Any) -> pd.DataFrame:
    """What `biases` finds in panels, and what was planted: `bias, truth, value, lo, hi`, over several seeds."""
    rows = []
    for seed in range(n_seeds):
        panel = Pocket(WORLD).panel(raters, seed=100 * seed, groups=GROUPS, **faults)
        judgments = feedback.ask(texts(pairs, seed, k), panel, per_item=raters, seed=seed)
        found = feedback.biases(judgments).set_index("rater")
        mean = np.mean([rater.rater.length for rater in panel])
        for rater in panel:
            truth = {"position": rater.rater.position_bias, "lapse": rater.rater.lapse}
            truth["length"] = (rater.rater.length - mean) / rater.rater.temperature
            for bias, planted in truth.items():
                rows.append([bias, planted, *found.loc[rater.name, [bias, f"{bias}_lo", f"{bias}_hi"]]])
    return pd.DataFrame(rows, columns=["bias", "truth", "value", "lo", "hi"])


def coverage(frame: pd.DataFrame) -> pd.Series:
    return frame["truth"].between(frame["lo"], frame["hi"]).groupby(frame["bias"]).mean()


@pytest.mark.slow
def test_planted_biases_lie_in_their_intervals_whatever_else_the_panel_gets_wrong() -> None:
    """Lapses, gaps of knowledge and tastes that gold does not share, from the judgments alone."""
    frame = recovered(10, pairs=150)
    assert (coverage(frame) >= 0.85).all(), coverage(frame)
    for _, part in frame[frame["bias"] != "lapse"].groupby("bias"):  # that is the same for all of them
        assert np.polyfit(part["truth"], part["value"], 1)[0] == pytest.approx(1, abs=0.35)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_seeds", "least", "panel"), [(5, 0.8, {"k": 4, "temperature": 1.0, **NO_FAULTS}), (20, 0.85, {"raters": 3})]
)
def test_rankings_of_four_and_few_pairs_give_no_wrong_intervals(n_seeds: int, least: float, panel: Any) -> None:
    frame = recovered(n_seeds, pairs=60, **panel)
    assert (coverage(frame) >= least).all(), coverage(frame)


@pytest.mark.slow
def test_a_careless_rater_is_told_from_the_careful() -> None:
    """In all of eight panels. Of eight intervals of 95% at least six hold the truth with probability .994."""
    lows, inside = [], []
    for seed in range(8):
        panel = Pocket(WORLD).panel(3, seed=100 * seed, lapse=0.02)
        panel.append(pocket.SimulatedRater(WORLD, pocket.Rater(lapse=0.4, name="careless"), 1000 + seed))
        judgments = feedback.ask(texts(300, seed), panel, per_item=4, seed=seed)
        found = feedback.biases(judgments).set_index("rater")
        assert found["lapse"].idxmax() == "careless"
        low, high = found.loc["careless", ["lapse_lo", "lapse_hi"]]
        lows.append(low)
        inside.append(low < 0.4 < high)
    assert sum(inside) >= 6
    assert sum(low > 0.1 for low in lows) >= 7 and min(lows) > 0.05  # the careful ones lapse in .02


@pytest.mark.slow
def test_both_orders_recover_position_with_nothing_but_bradley_terry() -> None:
    """Tastes and gaps of knowledge do not matter to it: one quality per rater and pair is all it needs."""
    inside = []
    for seed in range(10):
        panel = Pocket(WORLD).panel(6, seed=100 * seed, groups=GROUPS, lapse=0.0, temperature=1.5)
        rows = []
        for item, rater, order in product(texts(100, seed), panel, ((0, 1), (1, 0))):
            answer = rater(item.prompt, [item.completions[i] for i in order], "rank")
            rows.append(as_row(item, rater.name, "rank", answer, order, None, "test"))
        truth = pd.Series({rater.name: rater.rater.position_bias for rater in panel})
        found = position_from_swaps(judgments_frame(rows)).set_index("rater").loc[truth.index]
        inside += truth.between(found["position_swapped_lo"], found["position_swapped_hi"]).tolist()
    assert len(inside) == 60 and np.mean(inside) >= 0.9  # exact intervals are wide rather than narrow


# the report ---


def kept(path: Path) -> Store:
    store = Store(path)
    feedback.ask(texts(40, 0), Pocket(WORLD).panel(3, groups={"<b>": {}, "plain": {}}), per_item=3, store=store)
    store.withdraw(1, "<b>-1")
    return store


@pytest.mark.slow
def test_a_report_is_one_page_with_the_tables_the_figure_and_the_meanings(tmp_path: Path, capsys: Any) -> None:
    store = kept(tmp_path / "<i>.sqlite")
    arguments = ["report", str(store.path), "--out", str(tmp_path / "report.html")]
    assert cli.main(arguments) == 0
    page = (tmp_path / "report.html").read_text()
    for words in ("119 judgments", "3 raters", "40 items judged", "1 taken back", "alpha is Krippendorff's"):
        assert words in page, words
    assert "data:image/png;base64,iVBOR" in page and "rlhf-kit report" in page and "pandas 3." in page
    assert "<script" not in page and "http" not in page and "<b>" not in page and "<i>" not in page
    tables = "".join(re.findall("<table.*?</table>", page, re.DOTALL))
    rows = [[cell.text for cell in row] for row in ElementTree.fromstring(f"<all>{tables}</all>").iter("tr")]
    columns = [name for row in rows if "rater" in row or "raters" in row for name in row]
    assert {"agree", "lapse", "position", "length", "value"} <= set(columns)
    assert all(f"<dt>{name}</dt>" in page for name in columns if name not in ("rater", "measure"))
    assert ["<b>-1", "39", "0", "0"] in [row[:4] for row in rows]
    assert cli.main(arguments) == 2 and "--force" in capsys.readouterr().err
    assert cli.main([*arguments, "--force"]) == 0


def test_a_report_of_no_store_is_one_sentence_and_touches_nothing(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text").write_text("no store")
    Store(tmp_path / "empty.sqlite")
    for name, word in (("absent", "no such file"), ("text", "no store of"), ("empty.sqlite", "no judgment")):
        assert cli.main(["report", str(tmp_path / name), "--out", str(tmp_path / "out.html")]) == 2
        message = capsys.readouterr().err.strip()
        assert word in message and "\n" not in message, message
    (tmp_path / "link").hardlink_to(tmp_path / "empty.sqlite")
    for out in ("empty.sqlite", "link"):
        assert cli.main(["report", str(tmp_path / "empty.sqlite"), "--out", str(tmp_path / out), "--force"]) == 2
        assert "not the store" in capsys.readouterr().err
    assert (tmp_path / "text").read_text() == "no store"
    assert not (tmp_path / "absent").exists() and not (tmp_path / "out.html").exists()


def test_the_figure_says_what_is_in_the_table() -> None:
    frame = judged(*((pair(k, k % 3), name, A if k % 4 else B) for k in range(9) for name in ("ana", "ben")))
    table, figure = feedback.report(frame)
    for axes, name in zip(figure.axes, ("agree", "position", "length", "seconds"), strict=True):
        assert np.allclose(axes.lines[0].get_xdata(), table[name], equal_nan=True)
        assert "[" in axes.get_xlabel()  # the quantity's unit
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == list(table["rater"])


def test_any_name_can_be_reported_and_one_item_has_no_interval(tmp_path: Path) -> None:
    store = Store(tmp_path / "j.db")
    names = ["$x^{$", "\u674e\u56db", "ana"]
    store.add([pair(1)])
    for name in names:
        store.append(as_row(pair(1), name, "rank", Answer(ranks=A), (0, 1), 1.0, "test"))
    with warnings.catch_warnings(action="error"):
        page, (_, figure) = reporting.page(store, "x"), feedback.report(store)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["$x^{$", "ana", "rater 3"]
    assert all(name in page for name in names) and "1.00 (no interval: one item only)" in page
    assert "nan" not in re.sub('base64,[^"]*', "", page)
