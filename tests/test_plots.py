"""What is drawn, against the data it is drawn from; never pixels."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex

from rlhf_kit import plots, stats

plots.style()
LABELS = {"proxy": "proxy reward (reward model)", "gold": "gold utility"}


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    frames = []
    for shift, model in enumerate(("base", "SFT", "PPO", "DPO")):
        frame = pd.DataFrame({"prompt_id": np.repeat(np.arange(30), 3), "model": model})
        frame["kind"] = np.where(frame["prompt_id"] % 2 == 0, "ask", "harmful")
        frame["gold"] = np.round(rng.normal(shift, 1.0, size=90) * 2) / 2
        frame["proxy"] = frame["gold"] + rng.normal(size=90)
        frame["kl"] = 0.0 if model == "SFT" else rng.normal(shift, 0.2, size=90)
        frame["n_tokens"] = rng.integers(3, 20, size=90)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def texts_of(legend):
    return [text.get_text() for text in legend.get_texts()]


def points(axes):
    """x and y of every line with markers, by label."""
    return {each.get_label(): np.array(each.lines[0].get_xydata()) for each in axes.containers}


def test_a_model_has_one_colour_whatever_is_drawn_with_it():
    fixed = plots.colours(["V1", "KTO", "V1"])
    assert fixed["SFT"] == plots.colours(["DPO", "SFT"])["SFT"] and len(set(fixed.values())) == len(fixed) == 7


def test_reward_shift_writes_the_interval_that_stats_found(scores):
    figure = plots.reward_shift(scores)
    assert [axes.get_xlabel() for axes in figure.axes] == list(LABELS.values()) and plt.get_fignums() == []
    for axes, reward in zip(figure.axes, LABELS, strict=True):
        sft, *others = texts_of(axes.get_legend())
        assert sft == f"SFT  mean {scores[scores['model'] == 'SFT'][reward].mean():.2f}"
        shifts = {model: stats.paired_difference(scores, model, "SFT", reward) for model in ("PPO", "DPO")}
        assert others == [f"{m}  shift {s.mean:+.2f} [{s.lo:.2f}, {s.hi:.2f}]" for m, s in shifts.items()]


def test_reward_shift_draws_densities_of_area_one_around_the_data_and_marks_means(scores):
    rng = np.random.default_rng(0)
    scores.loc[scores["model"] == "SFT", "gold"] = rng.normal(3.0, 0.5, size=90)
    scores.loc[scores["model"] == "DPO", "gold"] = -1.0  # equal rewards, from which no width follows
    axes = plots.reward_shift(scores, ["gold"]).axes[0]
    lines = {line.get_label().split()[0]: line for line in axes.lines if not line.get_label().startswith("_")}
    for model, peak, error in (("SFT", 3.0, 0.4), ("PPO", 2.0, 0.4), ("DPO", -1.0, 0.02)):
        x, density = lines[model].get_data()
        assert to_hex(lines[model].get_color()).upper() == plots.COLOURS[model]
        assert np.trapezoid(density, x) == pytest.approx(1.0, abs=0.02)
        assert x[density.argmax()] == pytest.approx(peak, abs=error)
    means = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert means == pytest.approx([scores[scores["model"] == model]["gold"].mean() for model in lines])
    # One width for all: the density of equal rewards is one kernel, as wide as the widest of the others by Silverman.
    others = [scores[scores["model"] == model]["gold"] for model in ("SFT", "PPO")]
    widths = [0.9 * min(v.std(), np.ptp(v.quantile([0.25, 0.75])) / 1.349) * 90**-0.2 for v in others]
    assert lines["DPO"].get_ydata().max() == pytest.approx(1 / (max(widths) * math.sqrt(2 * math.pi)), rel=0.01)


def test_reward_ridge_has_a_row_per_model_and_marks_quantiles(scores):
    (axes,) = plots.reward_ridge(scores, "gold").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["base", "SFT", "PPO", "DPO"]
    lines = [each for each in axes.collections if isinstance(each, LineCollection)]
    marks = [segment[0, 0] for each in lines for segment in each.get_segments()]
    expected = [np.quantile(rows["gold"], (0.05, 0.5, 0.95)) for _, rows in scores.groupby("model", sort=False)]
    assert marks == pytest.approx(np.concatenate(expected))
    plots.reward_ridge(scores.assign(gold=1.0), "gold")


def test_a_reward_that_was_not_measured_has_no_panel(scores):
    for some in (scores.drop(columns="gold"), scores.assign(gold=math.nan)):
        assert [axes.get_xlabel() for axes in plots.reward_shift(some).axes] == [LABELS["proxy"]]
        with pytest.raises(ValueError, match="nothing to draw: gold not measured; there are prompt_id"):
            plots.reward_shift(some, rewards=["gold"])
    scores.loc[100, "gold"] = math.nan
    with pytest.raises(ValueError, match="gold is not finite in 1 of 90 rows, first in row 100"):
        plots.reward_ridge(scores, "gold")


def test_names_are_no_formulas(scores):
    scores["model"] = scores["model"].replace("PPO", "ppo$x_1$")
    shift = plots.reward_shift(scores, ["gold"], ["SFT", "ppo$x_1$"]).axes[0].get_legend().get_texts()[1]
    tick = plots.reward_ridge(scores).axes[0].get_yticklabels()[2]
    assert all("ppo$x_1$" in text.get_text() and not text.get_parse_math() for text in (shift, tick))


def test_reward_against_kl_puts_a_summary_where_it_belongs(scores):
    table = stats.summary(scores)
    figure = plots.reward_against_kl(table)
    for axes, reward in zip(figure.axes, ("gold", "proxy"), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("KL to SFT [nats/sequence]", f"mean {LABELS[reward]}")
        drawn = points(axes)
        for container, (_, row) in zip(axes.containers, table.iterrows(), strict=True):
            assert drawn[row["model"]] == pytest.approx(np.array([[row["kl"], row[reward]]]))
            across, upright = (bars.get_segments()[0] for bars in container.lines[2])
            assert across[:, 0] == pytest.approx([row["kl_lo"], row["kl_hi"]])
            assert upright[:, 1] == pytest.approx([row[f"{reward}_lo"], row[f"{reward}_hi"]])


def test_best_of_n_is_marked_and_models_without_kl_are_named(scores):
    table = stats.summary(scores)
    table.loc[table["model"] == "base", ["kl", "kl_lo", "kl_hi"]] = math.nan
    table["n"] = [math.nan, math.nan, 8, math.nan]
    table["model"] = table["model"].replace("PPO", "best-of-n")
    figure = plots.reward_against_kl(table)
    assert set(points(figure.axes[0])) == {"SFT", "best-of-n (KL: upper bound)", "DPO"}
    assert figure.legends[0].get_title().get_text() == "not drawn, no KL: base"
    with pytest.raises(ValueError, match="no row has a KL"):
        plots.reward_against_kl(table.assign(kl=math.nan))


def test_a_frontier_is_a_curve_per_model_and_seed_in_order_of_beta():
    of_beta = {"kl": lambda row: 1 / row["beta"] + row["seed"], "gold": lambda row: -row["beta"]}
    known = pd.MultiIndex.from_product([("PPO", "DPO"), (0, 1), (0.1, 0.5, 0.2)], names=["model", "seed", "beta"])
    best = pd.DataFrame({"model": "best-of-n", "n": [1, 4], "kl": [0.0, 0.6], "gold": [0.0, 1.0]})  # it has no seed
    frame = known.to_frame(index=False).assign(**of_beta).assign(gold_lo=-2.0, gold_hi=2.0)
    figure = plots.reward_against_kl(pd.concat([frame, best]), ["gold"])
    (axes,) = figure.axes
    lines = [container.lines[0] for container in axes.containers]
    assert len(lines) == 2 * 2 + 1 and all(line.get_linestyle() == "-" for line in lines)
    assert lines[1].get_xdata() == pytest.approx([11, 6, 3])
    last = [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 11]
    assert last == pytest.approx([2, 3, 2, 3, 0.6])
    bound = "best-of-n (KL: upper bound), n 1 to 4"
    assert texts_of(figure.legends[0]) == ["PPO, beta 0.1 to 0.5", "DPO, beta 0.1 to 0.5", bound]
    assert not any(container.lines[2] for container in axes.containers[:4])  # seeds show the spread
    one = plots.reward_against_kl(frame[frame["seed"] == 0], ["gold"]).axes[0].containers[0]
    assert [segment[:, 1].tolist() for segment in one.lines[2][0].get_segments()] == [[-2, 2]] * 3


def test_by_kind_draws_the_mean_and_interval_of_each_kind(scores):
    (axes,) = plots.by_kind(scores, "gold").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ask", "harmful"]
    means = scores.groupby(["model", "kind"])["gold"].mean()
    assert all(line[:, 1] == pytest.approx(means[model].to_numpy()) for model, line in points(axes).items())
    harmful = scores[(scores["model"] == "DPO") & (scores["kind"] == "harmful")]
    interval = stats.hierarchical_bootstrap(harmful, "gold")
    assert axes.containers[3].lines[2][0].get_segments()[1][:, 1] == pytest.approx([interval.lo, interval.hi])


def test_what_has_no_interval_has_no_bar_and_the_figure_says_why(scores):
    one = scores[scores["prompt_id"] == 0]
    table = stats.summary(one)
    judged = pd.DataFrame({"pairs": ["held out"], "n": [1], **stats.columns("accuracy", stats.bootstrap([1.0]))}, [0])
    figures = [plots.by_kind(one), plots.reward_against_kl(table), plots.accuracy(judged), plots.reward_shift(one)]
    for figure, bars in zip(figures, (4, 4, 1, 0), strict=True):
        legends = [*figure.legends, *filter(None, (axes.get_legend() for axes in figure.axes))]
        said = [text for legend in legends for text in (legend.get_title().get_text(), *texts_of(legend))]
        assert any(stats.NO_INTERVAL in text for text in said) and not any("nan" in text for text in said)
        found = [bar for container in figure.axes[0].containers for bar in container.lines[2]]
        assert len(found) >= bars and not any(len(s) for bar in found for s in bar.get_segments())


def test_training_draws_every_run_in_order_of_updates():
    keys = pd.MultiIndex.from_product([range(3), reversed(range(5))], names=["seed", "update"]).to_frame(index=False)
    metrics = keys.assign(run="ppo-" + keys["seed"].astype(str), kl=keys["update"] * (keys["seed"] + 1.0))
    metrics["reward"] = (metrics["kl"] / 2).where(metrics["update"] != 2)  # not logged at every update
    figure = plots.training(metrics, ["kl", "reward"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["KL to SFT [nats/sequence]", "reward of the rollouts"]
    assert [line.get_ydata().tolist() for line in figure.axes[0].lines][2] == [0, 3, 6, 9, 12]
    assert [line.get_xdata().tolist() for line in figure.axes[1].lines] == [[0, 1, 3, 4]] * 3
    assert texts_of(figure.legends[0]) == ["ppo-0", "ppo-1", "ppo-2"] and "all 3 runs" in figure.get_suptitle()
    named = plots.training(metrics.assign(model=metrics["seed"].map({0: "ours", 1: "PPO", 2: "PPO"})), ["kl"])
    ours, *others = [line.get_color() for line in named.axes[0].lines]
    assert others == [plots.COLOURS["PPO"]] * 2 and ours not in others and texts_of(named.legends[0]) == ["ours", "PPO"]
    one = plots.training(metrics[metrics["seed"] == 1].drop(columns=["run", "seed"]), ["kl"])
    assert len(one.axes[0].lines) == 1 and not one.legends
    with pytest.raises(ValueError, match="entropy not measured"):
        plots.training(metrics, ["entropy"])


def test_calibration_draws_used_bins_and_writes_the_error():
    curve = stats.calibration_curve([0.1, 0.2, 0.9, 1.0, 0.5], [0, 1, 1, 1, 0.5], bins=4)
    (axes,) = plots.calibration(curve).axes
    dots = np.asarray(axes.collections[-1].get_offsets())
    assert dots == pytest.approx(np.array([[0.15, 0.5], [0.5, 0.5], [0.95, 1.0]]))
    assert axes.get_legend().get_title().get_text() == "calibration error 0.160, 5 pairs"
