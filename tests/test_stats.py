"""Every estimator against hand numbers, enumeration or simulation, never against itself."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from rlhf_kit import stats as st


def scores_frame(n_prompts=30, n_samples=4, models=("SFT", "PPO"), seeds=(0,), shift=0.5):
    """Scores with a prompt effect shared by the models; the k-th model is k * shift above the first."""
    rng = np.random.default_rng(1)
    rows = []
    for seed in seeds:
        prompt_effect, kinds = rng.normal(size=n_prompts), enumerate(models)
        for (k, model), prompt, sample in itertools.product(kinds, range(n_prompts), range(n_samples)):
            gold = prompt_effect[prompt] + k * shift + rng.normal(scale=0.5)
            rows.append((seed, model, prompt, sample, gold, float(k), 5 + k))
    return pd.DataFrame(rows, columns=["seed", "model", "prompt_id", "sample", "gold", "kl", "n_tokens"])


def covers(interval):
    return interval.lo <= 0 <= interval.hi


def test_bootstrap_of_clusters_covers_as_often_as_it_says_and_ignoring_them_does_not():
    rng = np.random.default_rng(0)
    hits_clustered = hits_naive = 0
    groups = np.repeat(np.arange(40), 8)
    for trial in range(300):
        values = rng.normal(size=40)[groups] + 0.3 * rng.normal(size=320)
        hits_clustered += covers(st.bootstrap(values, groups, n_resamples=500, seed=trial))
        hits_naive += covers(st.bootstrap(values, n_resamples=500, seed=trial))
    assert 0.89 <= hits_clustered / 300 <= 0.98
    assert hits_naive / 300 < 0.65


def test_bootstrap_matches_the_standard_error_and_is_a_function_of_its_seed():
    values = np.random.default_rng(3).exponential(size=500)
    interval = st.bootstrap(values, n_resamples=4000)
    assert interval.mean == values.mean()
    assert (interval.hi - interval.lo) / (2 * 1.96) == pytest.approx(values.std(ddof=1) / math.sqrt(500), rel=0.05)
    assert st.bootstrap(values, seed=1) == st.bootstrap(values, seed=1) != st.bootstrap(values, seed=2)
    unequal = st.bootstrap([0.0, 0.0, 0.0, 1.0], ["b", "b", "b", "a"], n_resamples=3000)
    assert unequal == (0.25, 0.0, 1.0)  # both groups drawn from "b", or both from "a"


def test_bootstraps_of_means_are_one_whatever_computes_them(monkeypatch):
    values, groups = np.random.default_rng(0).normal(size=200), np.arange(200) % 50
    flat = st.bootstrap(values, groups, n_resamples=300, seed=1)
    assert st.bootstrap_of(lambda rows: values[rows].mean(), groups, n_resamples=300, seed=1) == pytest.approx(flat)
    frame = pd.DataFrame({"seed": 0, "prompt_id": groups, "x": values})
    for same in (frame, frame.drop(columns="seed")):
        assert st.hierarchical_bootstrap(same, "x", n_resamples=300, seed=1) == pytest.approx(flat)
    monkeypatch.setattr(st, "DRAWS_AT_ONCE", 170)  # three resamples at a time
    assert st.bootstrap(values, groups, n_resamples=300, seed=1) == flat


def test_bootstrap_of_leaves_out_undefined_resamples_unless_they_are_many():
    assert math.isnan(st.bootstrap_of(lambda rows: 1.0 if rows[0] == 0 else math.nan, np.arange(9)).lo)
    assert st.bootstrap_of(lambda rows: math.nan if (rows == 0).sum() > 3 else 1.0, np.arange(9)) == (1.0, 1.0, 1.0)


def test_one_value_or_one_group_has_a_mean_but_no_interval():
    one_group = st.bootstrap_of(lambda rows: 3.0, np.zeros(5))
    for interval in (st.bootstrap([3.0]), st.bootstrap([3.0, 3.0], [7, 7]), one_group):
        assert interval.mean == 3.0 and math.isnan(interval.lo) and math.isnan(interval.hi)
    assert [str(st.Interval(1.234, -1, 2)), str(st.NOT_MEASURED)] == ["1.23 [-1.00, 2.00]", "-"]
    assert f"{st.Interval(1.234, -1, 2):+.1f}" == "+1.2 [-1.0, 2.0]" and str(interval) == f"3.00 ({st.NO_INTERVAL})"
    assert set(st.compare(scores_frame(1), "PPO", "SFT")["verdict"]) == {st.NO_INTERVAL, "not measured"}


def test_hierarchical_bootstrap_covers_over_seeds_and_prompts():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(list(itertools.product(range(10), range(20))), columns=["seed", "prompt_id"])
    hits = hits_prompts_only = 0
    for trial in range(150):
        frame["x"] = rng.normal(size=10)[frame["seed"]] + rng.normal(size=200)
        hits += covers(st.hierarchical_bootstrap(frame, "x", n_resamples=200, seed=trial))
        hits_prompts_only += covers(st.bootstrap(frame["x"], n_resamples=200, seed=trial))
    assert 0.86 <= hits / 150 <= 0.99  # ten seeds are few: a percentile interval is slightly short
    assert hits_prompts_only / 150 < 0.6
    few = pd.DataFrame({"seed": [0, 0, 0, 1], "prompt_id": [0, 0, 1, 0], "x": [1.0, 3.0, 4.0, 9.0]})
    assert st.hierarchical_bootstrap(few, "x").mean == pytest.approx(((2 + 4) / 2 + 9) / 2)  # seeds weigh alike


def test_paired_difference_on_hand_numbers():
    rows = [("PPO", 0, 1.0), ("PPO", 0, 3.0), ("DPO", 0, 1.0), ("PPO", 1, 5.0), ("DPO", 1, 1.0), ("DPO", 1, 2.0)]
    scores = pd.DataFrame(rows, columns=["model", "prompt_id", "gold"])
    interval = st.paired_difference(scores, "PPO", "DPO", "gold")
    assert interval.mean == pytest.approx(((2 - 1) + (5 - 1.5)) / 2)
    assert (interval.lo, interval.hi) == (1.0, 3.5)  # two prompts: the extreme draws are the prompts themselves


def test_win_rate_equals_the_double_loop_with_ties_and_unequal_numbers_of_samples():
    rng = np.random.default_rng(0)
    scores = scores_frame(n_prompts=20).assign(gold=lambda frame: rng.integers(0, 4, size=len(frame)))
    scores = scores[~((scores["model"] == "PPO") & (scores["sample"] > scores["prompt_id"] % 4))]
    per_prompt = []
    for _, rows in scores.groupby("prompt_id"):
        left, right = (rows[rows["model"] == model]["gold"] for model in ("PPO", "SFT"))
        per_prompt.append(np.mean([1.0 if x > y else 0.5 if x == y else 0.0 for x in left for y in right]))
    assert st.win_rate(scores, "PPO", "SFT", "gold").mean == pytest.approx(np.mean(per_prompt))


def test_a_policy_against_itself_wins_half_the_time_and_rates_of_two_add_up_to_one():
    assert st.win_rate(scores_frame(), "PPO", "PPO", "gold") == (0.5, 0.5, 0.5)
    scores = scores_frame(seeds=(0, 1))
    there, back = st.win_rate(scores, "PPO", "SFT", "gold"), st.win_rate(scores, "SFT", "PPO", "gold")
    assert there.mean + back.mean == pytest.approx(1.0) and there.lo + back.hi == pytest.approx(1.0)
    assert there.lo > 0.5


def test_several_seeds_widen_the_interval_when_seeds_differ():
    scores = scores_frame(seeds=(0, 1, 2))
    scores["gold"] += (scores["model"] == "PPO") * scores["seed"]  # an effect that differs between seeds
    nested = st.paired_difference(scores, "PPO", "SFT", "gold")
    one_seed = st.paired_difference(scores[scores["seed"] == 1], "PPO", "SFT", "gold")
    assert nested.mean == pytest.approx(1.5, abs=0.1)
    assert nested.hi - nested.lo > 2 * (one_seed.hi - one_seed.lo)


def test_summary_has_a_row_per_model_in_order_and_three_columns_per_number():
    scores = scores_frame(models=("base", "SFT", "PPO"))
    scores.loc[scores["model"] == "base", "kl"] = math.nan
    table = st.summary(scores)
    assert table["model"].tolist() == ["base", "SFT", "PPO"]
    names = ["gold", "proxy", "kl", "n_tokens", "win_rate_gold", "win_rate_proxy"]
    assert table.columns.tolist() == ["model"] + [name + end for name in names for end in ("", "_lo", "_hi")]
    base, sft, ppo = (table.loc[row] for row in range(3))
    assert np.isnan(base[["kl", "kl_lo", "kl_hi"]].astype(float)).all()  # nothing measured, nothing invented
    assert table.filter(like="proxy").isna().all(axis=None)
    assert tuple(sft[["win_rate_gold", "win_rate_gold_lo", "win_rate_gold_hi"]]) == (0.5, 0.5, 0.5)
    assert ppo["gold"] == pytest.approx(scores[scores["model"] == "PPO"]["gold"].mean())
    assert base["win_rate_gold"] < 0.5 < ppo["win_rate_gold_lo"]
    assert tuple(ppo[["n_tokens", "n_tokens_lo", "n_tokens_hi"]]) == (7.0, 7.0, 7.0)


def test_compare_gives_a_verdict_in_plain_words():
    scores = scores_frame(models=("DPO", "PPO"))
    scores["n_tokens"] = 9 - scores["n_tokens"]
    scores["proxy"] = np.random.default_rng(0).normal(size=len(scores))
    table = st.compare(scores).set_index("quantity")
    ppo, dpo, equal = "PPO higher", "DPO higher", "cannot tell"
    assert table.index.tolist() == ["win_rate_gold", "win_rate_proxy", "gold", "proxy", "kl", "n_tokens"]
    assert table["verdict"].tolist() == [ppo, equal, ppo, equal, ppo, dpo]
    assert table["if_equal"].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    assert tuple(table.loc["gold", ["mean", "lo", "hi"]]) == st.paired_difference(scores, "PPO", "DPO", "gold")
    table = st.compare(scores.drop(columns="gold")).set_index("quantity")
    assert table.loc[["gold", "win_rate_gold"], "verdict"].tolist() == ["not measured"] * 2
    assert math.isnan(table.loc["gold", "mean"])


def test_pair_accuracy_counts_ties_half_and_resamples_prompts():
    assert st.pair_accuracy([1, 0, -1, 1]).mean == pytest.approx(2.5 / 4)
    prompts = np.repeat(np.arange(20), 10)
    margins = np.repeat(np.random.default_rng(0).choice([-1, 1], size=20), 10)
    by_pair, by_prompt = st.pair_accuracy(margins), st.pair_accuracy(margins, prompts)
    assert by_prompt.hi - by_prompt.lo > 2 * (by_pair.hi - by_pair.lo)


def test_calibration_on_hand_numbers():
    table = st.calibration_curve([0.1, 0.2, 0.9, 1.0, 0.5], [0, 1, 1, 1, 0.5], bins=4)
    assert table["n"].tolist() == [2, 1, 2]  # no pair is in the second bin
    assert table["predicted"].tolist() == pytest.approx([0.15, 0.5, 0.95])
    assert table["observed"].tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert table.loc[3, ["observed_lo", "observed_hi"]].tolist() == pytest.approx([0.3424, 1.0], abs=1e-4)  # Wilson
    assert st.expected_calibration_error(table) == pytest.approx((2 * 0.35 + 0 + 2 * 0.05) / 5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_equals_the_mean_over_all_subsets(n, ties):
    rng = np.random.default_rng(n)
    frame = pd.DataFrame({"seed": np.repeat([0, 1], 7), "prompt_id": 4, "gold": rng.normal(size=14)})
    frame["proxy"] = rng.integers(0, 3, size=14) if ties else rng.normal(size=14)
    estimates = st.best_of_n_estimate(frame, "proxy", "gold", n)["gold"]
    for estimate, (_, rows) in zip(estimates, frame.groupby("seed"), strict=True):
        subsets = [rows.iloc[list(drawn)] for drawn in itertools.combinations(range(7), n)]
        # A tie is drawn at random.
        expected = [drawn[drawn["proxy"] == drawn["proxy"].max()]["gold"].mean() for drawn in subsets]
        assert estimate == pytest.approx(np.mean(expected))


def test_best_of_n_kl_is_an_upper_bound_reached_only_without_repeated_completions():
    def exact(probabilities, n):  # of completions in order of reward
        best = np.diff(np.cumsum(probabilities) ** n, prepend=0.0)
        return float((best * np.log(best / probabilities)).sum())

    assert st.best_of_n_kl(1) == 0.0 and st.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)
    assert exact(np.full(2, 0.5), 4) == pytest.approx(0.459, abs=1e-3)  # against 0.636
    assert exact(np.full(100_000, 1e-5), 4) == pytest.approx(st.best_of_n_kl(4), abs=1e-3)


SCORES = scores_frame(n_prompts=5)
HOLE = SCORES.assign(gold=SCORES["gold"].where(SCORES.index != 5))
NO_SEED = SCORES.assign(seed=SCORES["seed"].where(SCORES.index != 3))
UNEQUAL = SCORES[~((SCORES["model"] == "PPO") & (SCORES["prompt_id"] == 3))]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: st.bootstrap([1.0, math.nan, math.inf]), "not finite in 2 of 3 rows, first in row 1"),
        (lambda: st.bootstrap([]), "at least one number"),
        (lambda: st.bootstrap([1.0, 2.0], groups=[1]), "one group per value"),
        (lambda: st.hierarchical_bootstrap(SCORES, "silver"), "no column 'silver'; it has seed, model"),
        (lambda: st.hierarchical_bootstrap(NO_SEED, "gold"), "'seed' is empty in row 3"),
        (lambda: st.win_rate(UNEQUAL, "PPO", "SFT", "gold"), "but 1 are on one side only, first prompt_id 3"),
        (lambda: st.win_rate(HOLE, "PPO", "SFT", "gold"), "gold is not finite in 1 of 20 rows, first in row 5"),
        (lambda: st.summary(HOLE), "gold is not finite in 1 of 20 rows, first in row 5"),
        (lambda: st.summary(SCORES, baseline="sft"), "no rows of model 'sft'; the scores have SFT, PPO"),
        (lambda: st.pair_accuracy([1, math.nan]), "margins is not finite"),
        (lambda: st.calibration_curve([1.2], [1]), r"lie in \[0, 1\]"),
        (lambda: st.calibration_curve([0.2, 0.3], [1]), "same length"),
        (lambda: st.best_of_n_estimate(SCORES[1:20], "gold", "gold", 4), "one prompt has 3"),
        (lambda: st.best_of_n_estimate(SCORES, "gold", "gold", 0), "n of at least 1"),
    ],
)
def test_what_is_wrong_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()
