"""What is drawn, against the data it is drawn from; never pixels."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from rlhf_kit import plots, stats

plots.style()


@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    frames = []
    for shift, model in enumerate(("base", "SFT", "PPO", "DPO")):
        frame = pd.DataFrame({"prompt_id": np.repeat(np.arange(30), 3), "sample": np.tile(np.arange(3), 30)})
        frame["model"] = model
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
    containers = {c.get_label(): c.lines[0] for c in axes.containers}
    return {name: np.array(line.get_xydata()) for name, line in containers.items()}


def labelled(figure):
    return all(axes.get_xlabel() and axes.get_ylabel() for axes in figure.axes)


def test_figures_are_not_kept_open(scores):
    assert isinstance(plots.reward_shift(scores), Figure)
    assert plt.get_fignums() == []


def test_a_model_has_one_colour_whatever_is_drawn_with_it():
    assert plots.colours(["DPO", "SFT"])["SFT"] == plots.colours(["SFT", "V1"])["SFT"]
    fixed = plots.colours(["V1", "KTO", "V1"])
    assert len(set(fixed.values())) == len(fixed) == 7


# distributions


def test_reward_shift_writes_the_interval_that_statistics_found(scores):
    figure = plots.reward_shift(scores)
    assert [axes.get_xlabel() for axes in figure.axes] == ["proxy reward (reward model)", "gold utility"]
    assert labelled(figure) and "30 prompts" in figure.get_suptitle()
    for axes, reward in zip(figure.axes, ("proxy", "gold"), strict=True):
        sft, ppo, dpo = texts_of(axes.get_legend())
        assert sft == f"SFT  mean {scores[scores['model'] == 'SFT'][reward].mean():.2f}"
        for text, model in ((ppo, "PPO"), (dpo, "DPO")):
            shift = stats.paired_difference(scores, model, "SFT", reward)
            assert text == f"{model}  shift {shift.mean:+.2f} [{shift.lo:.2f}, {shift.hi:.2f}]"


def test_reward_shift_draws_densities_of_area_one_and_marks_means(scores):
    axes = plots.reward_shift(scores).axes[1]
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    for text, line in lines.items():
        model = text.split()[0]
        assert line.get_color() == plots.COLOURS[model]
        assert np.trapezoid(line.get_ydata(), line.get_xdata()) == pytest.approx(1.0, abs=0.02)
    means = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    expected = [scores[scores["model"] == model]["gold"].mean() for model in ("SFT", "PPO", "DPO")]
    assert means == pytest.approx(expected)


def test_the_density_peaks_where_the_data_are():
    rng = np.random.default_rng(0)
    samples = {"SFT": rng.normal(3.0, 0.5, size=4000), "PPO": np.full(10, -1.0)}
    grid, densities = plots._densities(samples)
    assert grid[densities["SFT"].argmax()] == pytest.approx(3.0, abs=0.15)
    assert densities["SFT"].max() == pytest.approx(1 / (0.5 * math.sqrt(2 * math.pi)), rel=0.1)
    assert grid[densities["PPO"].argmax()] == pytest.approx(-1.0, abs=0.02)


@pytest.mark.parametrize("missing", ["empty", "absent"])
def test_a_reward_that_was_not_measured_has_no_panel(scores, missing):
    scores = scores.drop(columns="gold") if missing == "absent" else scores.assign(gold=math.nan)
    assert [axes.get_xlabel() for axes in plots.reward_shift(scores).axes] == ["proxy reward (reward model)"]
    with pytest.raises(ValueError, match="nothing to draw: gold not measured; there are prompt_id"):
        plots.reward_shift(scores, rewards=["gold"])


def test_a_model_that_is_not_there_and_a_hole_in_the_data_are_named(scores):
    with pytest.raises(ValueError, match="no rows of model KTO; the scores have base, SFT, PPO, DPO"):
        plots.reward_shift(scores, models=("SFT", "KTO"))
    scores.loc[100, "gold"] = math.nan
    with pytest.raises(ValueError, match="gold of SFT is empty in 1 of 90 rows, first in row 100"):
        plots.reward_ridge(scores, "gold")


def test_equal_rewards_of_all_samples_are_still_drawn(scores):
    figure = plots.reward_shift(scores.assign(gold=1.0), rewards=("gold",))
    assert max(figure.axes[0].lines[0].get_ydata()) > 0
    plots.reward_ridge(scores.assign(gold=1.0), "gold")


def test_reward_ridge_has_a_row_per_model_and_marks_quantiles(scores):
    (axes,) = plots.reward_ridge(scores, "gold").axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["base", "SFT", "PPO", "DPO"]
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_color() == "black"]
    expected = [np.quantile(rows["gold"], (0.05, 0.5, 0.95)) for _, rows in scores.groupby("model", sort=False)]
    assert marks == pytest.approx(np.concatenate(expected))
    assert axes.get_xlabel() == "gold utility"


# reward and what it costs


def test_reward_against_kl_puts_a_summary_where_it_belongs(scores):
    table = stats.summary(scores)
    figure = plots.reward_against_kl(table)
    assert labelled(figure) and len(figure.axes) == 2
    for axes, reward in zip(figure.axes, ("gold", "proxy"), strict=True):
        drawn = points(axes)
        for _, row in table.iterrows():
            assert drawn[row["model"]] == pytest.approx(np.array([[row["kl"], row[reward]]]))
        ppo = next(container for container in axes.containers if container.get_label() == "PPO")
        across, upright = (bars.get_segments()[0] for bars in ppo.lines[2])
        row = table.set_index("model").loc["PPO"]
        assert across[:, 0] == pytest.approx([row["kl_lo"], row["kl_hi"]])
        assert upright[:, 1] == pytest.approx([row[f"{reward}_lo"], row[f"{reward}_hi"]])


def test_best_of_n_stands_at_its_upper_bound_and_what_has_no_kl_is_named(scores):
    table = stats.summary(scores)
    table.loc[table["model"].isin(["base", "PPO"]), ["kl", "kl_lo", "kl_hi"]] = math.nan
    table["n"] = [math.nan, math.nan, 8, math.nan]
    table["model"] = table["model"].replace("PPO", "best-of-n")
    axes = plots.reward_against_kl(table).axes[0]
    drawn = points(axes)
    assert set(drawn) == {"SFT", "best-of-n (KL: upper bound)", "DPO"}
    assert drawn["best-of-n (KL: upper bound)"][0, 0] == pytest.approx(stats.best_of_n_kl(8))
    assert [text.get_text() for text in axes.texts] == ["not drawn, no KL: base"]
    with pytest.raises(ValueError, match="no row has a KL"):
        plots.reward_against_kl(table.drop(columns="n").assign(kl=math.nan))


def test_a_frontier_is_a_curve_per_model_and_seed_in_order_of_beta():
    rows = [
        {"model": model, "seed": seed, "beta": beta, "kl": 1 / beta + seed, "gold": -beta}
        for model in ("PPO", "DPO")
        for seed in (0, 1)
        for beta in (0.1, 0.5, 0.2)
    ]
    frame = pd.concat([pd.DataFrame(rows), pd.DataFrame({"model": ["best-of-n"] * 2, "n": [1, 4], "gold": [0.0, 1.0]})])
    figure = plots.reward_against_kl(frame, ["gold"])
    (axes,) = figure.axes
    lines = [container.lines[0] for container in axes.containers]
    assert len(lines) == 2 * 2 + 1  # best-of-n has no seed, and is drawn none the less
    assert lines[1].get_xdata() == pytest.approx([11, 6, 3])
    assert all(line.get_linestyle() == "-" for line in lines)
    last = [line.get_xdata()[0] for line in axes.lines if line.get_markersize() == 11]
    assert last == pytest.approx([2, 3, 2, 3, stats.best_of_n_kl(4)])
    bound = "best-of-n (KL: upper bound), n 1 to 4"
    assert texts_of(figure.legends[0]) == ["PPO, beta 0.1 to 0.5", "DPO, beta 0.1 to 0.5", bound]


@pytest.mark.parametrize("seeds", [1, 2])
def test_intervals_of_a_frontier_are_drawn_unless_several_seeds_show_the_spread(seeds):
    rows = [
        {"model": "PPO", "seed": seed, "step": step, "kl": step, "gold": step, "gold_lo": step - 1, "gold_hi": step + 2}
        for seed in range(seeds)
        for step in (1.0, 2.0)
    ]
    (axes,) = plots.reward_against_kl(pd.DataFrame(rows), ["gold"]).axes
    bars = [bars for container in axes.containers for bars in container.lines[2]]
    if seeds > 1:
        assert not bars
    else:
        assert [segment[:, 1].tolist() for segment in bars[0].get_segments()] == [[0, 3], [1, 4]]


def test_length_against_reward_shows_means_and_correlations(scores):
    (axes,) = plots.length_against_reward(scores, "proxy", ["SFT", "PPO"]).axes
    for text, model in zip(texts_of(axes.get_legend()), ("SFT", "PPO"), strict=True):
        rows = scores[scores["model"] == model]
        assert text == f"{model}  r = {rows['proxy'].corr(rows['n_tokens']):.2f}"
    assert axes.lines[0].get_xdata()[0] == scores[scores["model"] == "SFT"]["n_tokens"].mean()
    assert [len(dots.get_offsets()) for dots in axes.collections] == [90, 90]
    flat = plots.length_against_reward(scores.assign(n_tokens=5), "proxy", ["SFT"]).axes[0]
    assert texts_of(flat.get_legend()) == ["SFT  r undefined"]


def test_by_kind_draws_the_mean_and_interval_of_each_kind(scores):
    (axes,) = plots.by_kind(scores, "gold").axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["ask", "harmful"]
    drawn = points(axes)
    for model in ("base", "SFT", "PPO", "DPO"):
        rows = scores[scores["model"] == model]
        assert drawn[model][:, 1] == pytest.approx(
            [rows[rows["kind"] == kind]["gold"].mean() for kind in ("ask", "harmful")]
        )
    harmful = scores[(scores["model"] == "DPO") & (scores["kind"] == "harmful")]
    interval = stats.hierarchical_bootstrap(harmful, "gold", ["prompt_id"])
    bars = axes.containers[3].lines[2][0].get_segments()[1]
    assert bars[:, 1] == pytest.approx([interval.lo, interval.hi])


# training


@pytest.fixture
def metrics():
    rows = [
        {"run": f"ppo-{seed}", "seed": seed, "update": update, "kl": update * (seed + 1.0), "note": "a", "lr": 0.1}
        for seed in range(3)
        for update in reversed(range(5))
    ]
    return pd.DataFrame(rows).assign(reward=lambda frame: frame["kl"] / 2)


def test_training_draws_every_run_in_order_of_updates(metrics):
    figure = plots.training(metrics)
    assert [axes.get_ylabel() for axes in figure.axes] == ["KL to SFT [nats/sequence]", "reward of the rollouts"]
    assert all(axes.get_xlabel() == "update" for axes in figure.axes)
    for axes in figure.axes:
        assert len(axes.lines) == 3
        assert axes.lines[0].get_xdata().tolist() == [0, 1, 2, 3, 4]
    assert figure.axes[0].lines[2].get_ydata().tolist() == [0, 3, 6, 9, 12]
    assert texts_of(figure.legends[0]) == ["ppo-0", "ppo-1", "ppo-2"]
    assert "all 3 runs" in figure.get_suptitle()


def test_training_colours_lines_by_model_and_lists_each_model_once(metrics):
    metrics["model"] = np.where(metrics["seed"] == 0, "DPO", "PPO")
    figure = plots.training(metrics, ["kl"])
    assert [line.get_color() for line in figure.axes[0].lines] == [plots.COLOURS[m] for m in ("DPO", "PPO", "PPO")]
    assert texts_of(figure.legends[0]) == ["DPO", "PPO"]


def test_training_of_one_run_needs_no_run_column_and_skips_empty_cells(metrics):
    one = metrics[metrics["seed"] == 1].drop(columns=["run", "seed"])
    one.loc[one["update"] == 2, "kl"] = math.nan
    figure = plots.training(one, ["kl", "reward"])
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 1, 3, 4]
    assert not figure.legends
    with pytest.raises(ValueError, match="entropy not measured"):
        plots.training(one, ["entropy"])


def test_training_tells_seeds_of_one_run_name_apart(metrics):
    figure = plots.training(metrics.assign(run="ppo"), ["kl"])
    assert texts_of(figure.legends[0]) == ["ppo seed 0", "ppo seed 1", "ppo seed 2"]


# the reward model


def test_calibration_draws_used_bins_and_writes_the_error():
    predicted, observed = [0.1, 0.2, 0.9, 1.0, 0.5], [0, 1, 1, 1, 0.5]
    (axes,) = plots.calibration(stats.calibration_curve(predicted, observed, bins=4)).axes
    dots = np.asarray(axes.collections[-1].get_offsets())
    assert dots == pytest.approx(np.array([[0.15, 0.5], [0.5, 0.5], [0.95, 1.0]]))
    error = stats.expected_calibration_error(predicted, observed, bins=4)
    assert axes.get_legend().get_title().get_text() == f"calibration error {error:.3f}, 5 pairs"


def test_training_tells_models_that_it_does_not_know_apart(metrics):
    named = metrics.assign(model=metrics["run"].map({"ppo-0": "ours", "ppo-1": "theirs", "ppo-2": "PPO"}))
    drawn = [line.get_color() for line in plots.training(named).axes[0].lines]
    assert len(set(drawn)) == 3 and drawn[2] == plots.COLOURS["PPO"]
