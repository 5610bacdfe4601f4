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
        prompt_effect = rng.normal(size=n_prompts)
        for k, model in enumerate(models):
            for prompt in range(n_prompts):
                for sample in range(n_samples):
                    gold = prompt_effect[prompt] + k * shift + rng.normal(scale=0.5)
                    rows.append((seed, model, prompt, sample, gold, float(k), 5 + k))
    columns = ["seed", "model", "prompt_id", "sample", "gold", "kl", "n_tokens"]
    return pd.DataFrame(rows, columns=columns)


# bootstrap


def test_bootstrap_covers_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(400):
        interval = st.bootstrap(rng.normal(2.0, 1.0, size=60), n_resamples=500, seed=trial)
        hits += interval.lo <= 2.0 <= interval.hi
    assert 0.90 <= hits / 400 <= 0.98


def test_bootstrap_of_clusters_covers_and_ignoring_them_does_not():
    rng = np.random.default_rng(0)
    hits_clustered = hits_naive = 0
    groups = np.repeat(np.arange(40), 8)
    for trial in range(300):
        values = rng.normal(size=40)[groups] + 0.3 * rng.normal(size=320)
        clustered = st.bootstrap(values, groups, n_resamples=500, seed=trial)
        naive = st.bootstrap(values, n_resamples=500, seed=trial)
        assert clustered.hi - clustered.lo > naive.hi - naive.lo
        hits_clustered += clustered.lo <= 0 <= clustered.hi
        hits_naive += naive.lo <= 0 <= naive.hi
    assert 0.89 <= hits_clustered / 300 <= 0.98
    assert hits_naive / 300 < 0.65


def test_bootstrap_matches_the_standard_error():
    values = np.random.default_rng(3).exponential(size=500)
    interval = st.bootstrap(values, n_resamples=4000)
    assert interval.mean == values.mean()
    assert (interval.hi - interval.lo) / (2 * 1.96) == pytest.approx(values.std(ddof=1) / math.sqrt(500), rel=0.05)


def test_bootstrap_groups_may_have_unequal_sizes_and_any_labels():
    interval = st.bootstrap([0.0, 0.0, 0.0, 1.0], ["b", "b", "b", "a"], n_resamples=3000)
    assert interval == (0.25, 0.0, 1.0)  # both groups drawn from "b", or both from "a"


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).normal(size=50)
    assert st.bootstrap(values, seed=1) == st.bootstrap(values, seed=1)
    assert st.bootstrap(values, seed=1) != st.bootstrap(values, seed=2)


def test_bootstrap_in_blocks_draws_all_resamples(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = st.bootstrap(values)
    monkeypatch.setattr(st, "DRAWS_AT_ONCE", 170)  # three resamples at a time
    blocks = st.bootstrap(values)
    assert blocks.lo == pytest.approx(whole.lo, abs=0.03) and blocks.hi == pytest.approx(whole.hi, abs=0.03)


@pytest.mark.parametrize("values, groups", [([3.0], None), ([3.0, 3.0], [7, 7])])
def test_one_value_or_one_group_has_a_mean_but_no_interval(values, groups):
    interval = st.bootstrap(values, groups)
    assert interval.mean == 3.0 and math.isnan(interval.lo) and math.isnan(interval.hi)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(values=[1.0, math.nan, math.inf]), "not finite in 2 of 3 rows, first in row 1"),
        (dict(values=[]), "at least one number"),
        (dict(values=[[1.0]]), "shape"),
        (dict(values=[1.0, 2.0], groups=[1]), "one group per value"),
        (dict(values=[1.0, 2.0], level=95), "level must lie between 0 and 1"),
        (dict(values=[1.0, 2.0], n_resamples=0), "n_resamples be at least 1, got 0"),
    ],
)
def test_bootstrap_says_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        st.bootstrap(**arguments)


# seeds, then prompts


@pytest.mark.slow
def test_hierarchical_bootstrap_covers_over_seeds_and_prompts():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(list(itertools.product(range(10), range(20))), columns=["seed", "prompt_id"])
    hits = hits_prompts_only = 0
    for trial in range(200):
        frame["x"] = rng.normal(size=10)[frame["seed"]] + rng.normal(size=200)
        both = st.hierarchical_bootstrap(frame, "x", n_resamples=400, seed=trial)
        prompts_only = st.bootstrap(frame["x"], n_resamples=400, seed=trial)
        hits += both.lo <= 0 <= both.hi
        hits_prompts_only += prompts_only.lo <= 0 <= prompts_only.hi
    assert 0.86 <= hits / 200 <= 0.99  # ten seeds are few: a percentile interval is slightly short
    assert hits_prompts_only / 200 < 0.6


def test_hierarchical_bootstrap_weighs_seeds_and_prompts_equally():
    frame = pd.DataFrame({"seed": [0, 0, 0, 1], "prompt_id": [0, 0, 1, 0], "x": [1.0, 3.0, 4.0, 9.0]})
    assert st.hierarchical_bootstrap(frame, "x").mean == pytest.approx(((2 + 4) / 2 + 9) / 2)


def test_hierarchical_bootstrap_with_one_seed_is_the_bootstrap_over_prompts():
    frame = scores_frame(models=("SFT",))
    nested = st.hierarchical_bootstrap(frame, "gold", n_resamples=4000)
    flat = st.bootstrap(frame["gold"], frame["prompt_id"], n_resamples=4000)
    assert nested == pytest.approx(flat, abs=0.02)


def test_hierarchical_bootstrap_takes_any_depth_and_any_row_order():
    frame = scores_frame(n_prompts=8, models=("SFT",), seeds=(0, 1, 2))
    levels = ("seed", "prompt_id", "sample")
    deep = st.hierarchical_bootstrap(frame, "gold", levels)
    assert deep == pytest.approx(st.hierarchical_bootstrap(frame.sample(frac=1, random_state=0), "gold", levels))
    shallow = st.hierarchical_bootstrap(frame, "gold")
    assert deep.hi - deep.lo > shallow.hi - shallow.lo - 0.02


def test_hierarchical_bootstrap_names_the_faulty_column_and_row():
    frame = scores_frame(n_prompts=2, models=("SFT",))
    with pytest.raises(ValueError, match="no column 'silver'; it has seed, model"):
        st.hierarchical_bootstrap(frame, "silver")
    with pytest.raises(ValueError, match="'seed' is empty in row 3"):
        st.hierarchical_bootstrap(frame.assign(seed=frame["seed"].where(frame.index != 3)), "gold")
    with pytest.raises(ValueError, match="gold is not finite in 1 of 8 rows, first in row 5"):
        st.hierarchical_bootstrap(frame.assign(gold=frame["gold"].where(frame.index != 5)), "gold")


# models against each other


def test_paired_difference_on_hand_numbers():
    scores = pd.DataFrame(
        {
            "model": ["PPO", "PPO", "DPO", "PPO", "DPO", "DPO"],
            "prompt_id": [0, 0, 0, 1, 1, 1],
            "gold": [1.0, 3.0, 1.0, 5.0, 1.0, 2.0],
        }
    )
    interval = st.paired_difference(scores, "PPO", "DPO", "gold")
    assert interval.mean == pytest.approx(((2 - 1) + (5 - 1.5)) / 2)
    assert (interval.lo, interval.hi) == (1.0, 3.5)  # two prompts: the extreme draws are the prompts themselves


def test_paired_difference_is_narrower_than_the_two_means_apart():
    scores = scores_frame(n_prompts=60)
    paired = st.paired_difference(scores, "PPO", "SFT", "gold")
    rows = {name: scores[scores["model"] == name] for name in ("SFT", "PPO")}
    sft, ppo = (st.bootstrap(rows[name]["gold"], rows[name]["prompt_id"]) for name in ("SFT", "PPO"))
    assert paired.mean == pytest.approx(ppo.mean - sft.mean)
    assert paired.hi - paired.lo < 0.6 * (ppo.hi - ppo.lo)
    differences = rows["PPO"].groupby("prompt_id")["gold"].mean() - rows["SFT"].groupby("prompt_id")["gold"].mean()
    assert paired == pytest.approx(st.bootstrap(differences), abs=1e-9)


def double_loop(scores, a, b, by):
    """The definition: every pair of samples of every prompt."""
    per_prompt = []
    for _, rows in scores.groupby("prompt_id"):
        left, right = rows[rows["model"] == a][by], rows[rows["model"] == b][by]
        wins = [1.0 if x > y else 0.5 if x == y else 0.0 for x in left for y in right]
        per_prompt.append(sum(wins) / len(wins))
    return sum(per_prompt) / len(per_prompt)


def test_win_rate_equals_the_double_loop_with_ties_and_unequal_numbers_of_samples():
    rng = np.random.default_rng(0)
    scores = scores_frame(n_prompts=20).assign(gold=lambda frame: rng.integers(0, 4, size=len(frame)))
    scores = scores[~((scores["model"] == "PPO") & (scores["sample"] > scores["prompt_id"] % 4))]
    assert st.win_rate(scores, "PPO", "SFT", "gold").mean == pytest.approx(double_loop(scores, "PPO", "SFT", "gold"))


def test_a_policy_against_itself_wins_exactly_half_the_time():
    assert st.win_rate(scores_frame(), "PPO", "PPO", "gold") == (0.5, 0.5, 0.5)


def test_win_rates_of_two_models_add_up_to_one():
    scores = scores_frame(seeds=(0, 1))
    there, back = st.win_rate(scores, "PPO", "SFT", "gold"), st.win_rate(scores, "SFT", "PPO", "gold")
    assert there.mean + back.mean == pytest.approx(1.0)
    assert there.lo + back.hi == pytest.approx(1.0)
    assert there.lo > 0.5


def test_several_seeds_widen_the_interval_when_seeds_differ():
    scores = scores_frame(seeds=(0, 1, 2))
    scores["gold"] += np.where(
        scores["model"] == "PPO", scores["seed"].astype(float), 0.0
    )  # an effect that varies by seed
    nested = st.paired_difference(scores, "PPO", "SFT", "gold")
    one_seed = st.paired_difference(scores[scores["seed"] == 1], "PPO", "SFT", "gold")
    assert nested.mean == pytest.approx(1.5, abs=0.1)
    assert nested.hi - nested.lo > 2 * (one_seed.hi - one_seed.lo)


def test_prompts_of_one_model_only_are_refused():
    scores = scores_frame(n_prompts=5)
    scores = scores[~((scores["model"] == "PPO") & (scores["prompt_id"] == 3))]
    with pytest.raises(ValueError, match="same prompts, but 1 are on one side only, first prompt_id 3"):
        st.win_rate(scores, "PPO", "SFT", "gold")
    with pytest.raises(ValueError, match="no rows of model 'KTO'; the scores have SFT, PPO"):
        st.paired_difference(scores, "KTO", "SFT", "gold")
    with pytest.raises(ValueError, match="gold of PPO is not finite"):
        st.win_rate(scores.assign(gold=scores["gold"].where(scores["model"] != "PPO")), "PPO", "SFT", "gold")


# tables


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


def test_summary_refuses_half_measured_columns_and_a_missing_baseline():
    scores = scores_frame()
    with pytest.raises(ValueError, match="gold is not finite in 1 of 120 rows, first in row 2"):
        st.summary(scores.assign(gold=scores["gold"].where(scores.index != 2)))
    with pytest.raises(ValueError, match="no rows of model 'sft'"):
        st.summary(scores, baseline="sft")


def test_compare_gives_a_verdict_in_plain_words():
    scores = scores_frame(models=("DPO", "PPO"))
    scores["n_tokens"] = 9 - scores["n_tokens"]
    scores["proxy"] = np.random.default_rng(0).normal(size=len(scores))
    table = st.compare(scores).set_index("quantity")
    assert table["verdict"].to_dict() == {
        "win_rate_gold": "PPO higher",
        "win_rate_proxy": "cannot tell",
        "gold": "PPO higher",
        "proxy": "cannot tell",
        "kl": "PPO higher",
        "n_tokens": "DPO higher",
    }
    assert table["if_equal"].tolist() == [0.5, 0.5, 0, 0, 0, 0]
    expected = st.paired_difference(scores, "PPO", "DPO", "gold")
    assert tuple(table.loc["gold", ["mean", "lo", "hi"]]) == expected


def test_compare_of_what_was_not_measured_says_so():
    table = st.compare(scores_frame(models=("PPO", "DPO")).drop(columns="gold")).set_index("quantity")
    assert table.loc[["gold", "win_rate_gold", "proxy"], "verdict"].tolist() == ["not measured"] * 3
    assert math.isnan(table.loc["gold", "mean"])


def test_quantiles():
    frame = pd.DataFrame({"model": ["b"] * 101 + ["a"], "x": [*np.arange(101.0), math.nan]})
    table = st.quantiles(frame, "x", q=(0.05, 0.5, 0.975))
    assert table.columns.tolist() == ["model", "q05", "q50", "q97.5"]
    assert table.loc[0].tolist() == ["b", 5.0, 50.0, 97.5]
    assert table.loc[1, "model"] == "a" and table.loc[1, ["q05", "q50"]].isna().all()


# reward models


def test_pair_accuracy_counts_ties_half_and_resamples_prompts():
    assert st.pair_accuracy([1, 2, 3, 0], [0, 2, 4, -1]).mean == pytest.approx(2.5 / 4)
    prompts = np.repeat(np.arange(20), 10)
    right = np.repeat(np.random.default_rng(0).integers(0, 2, size=20), 10)
    by_pair, by_prompt = st.pair_accuracy(right, 1 - right), st.pair_accuracy(right, 1 - right, prompts)
    assert by_prompt.hi - by_prompt.lo > 2 * (by_pair.hi - by_pair.lo)
    with pytest.raises(ValueError, match="2 chosen scores but 1 rejected"):
        st.pair_accuracy([1, 2], [1])


def test_calibration_on_hand_numbers():
    table = st.calibration([0.1, 0.2, 0.9, 1.0, 0.5], [0, 1, 1, 1, 0.5], bins=4)
    assert table["n"].tolist() == [2, 0, 1, 2]
    assert table["predicted"].tolist() == pytest.approx([0.15, math.nan, 0.5, 0.95], nan_ok=True)
    assert table["observed"].tolist() == pytest.approx([0.5, math.nan, 0.5, 1.0], nan_ok=True)
    assert table["observed_lo"][3] == pytest.approx(0.3424, abs=1e-4)  # Wilson, 2 of 2
    assert table["observed_hi"][3] == pytest.approx(1.0)
    error = st.expected_calibration_error([0.1, 0.2, 0.9, 1.0, 0.5], [0, 1, 1, 1, 0.5], bins=4)
    assert error == pytest.approx((2 * 0.35 + 0 + 2 * 0.05) / 5)


def test_calibration_error_tells_calibrated_from_overconfident():
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=20_000)
    outcomes = rng.uniform(size=20_000) < truth
    logit = np.log(truth / (1 - truth))
    assert st.expected_calibration_error(truth, outcomes) < 0.02
    assert st.expected_calibration_error(1 / (1 + np.exp(-3 * logit)), outcomes) > 0.1


@pytest.mark.parametrize(
    "probabilities, outcomes, bins, words",
    [
        ([1.2], [1], 10, "probabilities must lie in"),
        ([0.2], [2], 10, "outcomes must lie in"),
        ([0.2, 0.3], [1], 10, "one of each per pair"),
        ([0.2], [1], 0, "bins must be at least 1"),
    ],
)
def test_calibration_says_what_is_wrong(probabilities, outcomes, bins, words):
    with pytest.raises(ValueError, match=words):
        st.calibration(probabilities, outcomes, bins)


# best-of-n


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_best_of_n_equals_the_mean_over_all_subsets(n, ties):
    rng = np.random.default_rng(n)
    frame = pd.DataFrame({"prompt_id": np.repeat([4, 2], 7), "gold": rng.normal(size=14)})
    frame["proxy"] = rng.integers(0, 3, size=14) if ties else rng.normal(size=14)
    estimate = st.best_of_n_estimate(frame, "proxy", "gold", n).set_index("prompt_id")["gold"]
    for prompt, rows in frame.groupby("prompt_id"):
        expected = []
        for subset in itertools.combinations(range(7), n):
            drawn = rows.iloc[list(subset)]
            expected.append(drawn[drawn["proxy"] == drawn["proxy"].max()]["gold"].mean())  # a tie is drawn at random
        assert estimate[prompt] == pytest.approx(np.mean(expected))


def test_best_of_one_is_the_mean_and_best_of_all_the_maximum():
    frame = scores_frame(models=("SFT",))
    one = st.best_of_n_estimate(frame, "gold", "gold", 1)
    assert one["gold"].tolist() == pytest.approx(frame.groupby("prompt_id")["gold"].mean().tolist())
    everything = st.best_of_n_estimate(frame, "gold", "gold", 4)
    assert everything["gold"].tolist() == pytest.approx(frame.groupby("prompt_id")["gold"].max().tolist())


def test_best_of_n_of_several_seeds_feeds_the_hierarchical_bootstrap():
    frame = scores_frame(models=("SFT",), seeds=(0, 1))
    estimate = st.best_of_n_estimate(frame, "gold", "gold", 2)
    assert estimate.columns.tolist() == ["seed", "prompt_id", "gold"] and len(estimate) == 60
    assert st.hierarchical_bootstrap(estimate, "gold").mean > frame["gold"].mean()


def test_best_of_n_needs_n_samples_of_every_prompt():
    frame = scores_frame(n_prompts=3, models=("SFT",)).drop(index=5)
    with pytest.raises(ValueError, match=r"best of 4 needs 4 samples per prompt, but prompt {'prompt_id': 1} has 3"):
        st.best_of_n_estimate(frame, "gold", "gold", 4)
    with pytest.raises(ValueError, match="n must be at least 1"):
        st.best_of_n_estimate(frame, "gold", "gold", 0)


def test_best_of_n_kl_is_an_upper_bound_reached_only_without_repeated_completions():
    assert st.best_of_n_kl(1) == 0.0
    assert st.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)

    def exact(probabilities, n):  # of completions in order of reward
        best = np.diff(np.cumsum(probabilities) ** n, prepend=0.0)
        return float((best * np.log(best / probabilities)).sum())

    assert exact(np.full(2, 0.5), 4) == pytest.approx(0.459, abs=1e-3)  # against 0.636
    assert exact(np.full(100_000, 1e-5), 4) == pytest.approx(st.best_of_n_kl(4), abs=1e-3)
    with pytest.raises(ValueError, match="n must be at least 1"):
        st.best_of_n_kl(0)
