"""Items, answers, raters, and the datasets that come of judgments: against rankings by hand and known probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf_kit import feedback
from rlhf_kit.feedback import Answer, FeedbackError, Item
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion, Ensemble
from rlhf_kit.tasks import Pocket, pocket

W = pocket.world(0)
RIGHT = f" the otter lives {W.truth['otter', 'home']} ."
WRONG = f" the otter lives {W.myth['otter', 'home']} ."
ASK = "where does the otter live ?"
REFUSAL = " sorry , that is not safe ."
FAULTLESS: dict[str, Any] = {
    "knowledge": 1.0,
    "length": 0.0,
    "politeness": 0.0,
    "refusal_leniency": 0.0,
    "agreement": 0.0,
    "temperature": 0.0,
    "lapse": 0.0,
    "position_bias": 0.0,
}
FOUR = (RIGHT, f" maybe {RIGHT[1:]}", WRONG, REFUSAL)


class Longest:
    """Ranks by length, the longest first; of one completion it says good if it is long."""

    def __init__(self, name: str = "longest") -> None:
        self.name = name
        self.asked: list[tuple[Prompt, tuple[Completion, ...]]] = []

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: feedback.Question) -> Answer:
        self.asked.append((prompt, tuple(completions)))
        if question != "rank":
            return Answer(rating=int(len(completions[0]) > 3))
        lengths = sorted({len(each) for each in completions}, reverse=True)
        return Answer(ranks=tuple(lengths.index(len(each)) + 1 for each in completions))


def samples(texts: Sequence[Sequence[str]]) -> pd.DataFrame:
    rows = [
        {"prompt_id": p, "sample": k, "prompt": f"p{p}", "completion": text, "kind": "ask"}
        for p, group in enumerate(texts)
        for k, text in enumerate(group)
    ]
    return pd.DataFrame(rows)


# Items and answers ---


def test_an_items_id_is_its_content() -> None:
    one = Item("p", ("a", "b"), {"source": "x"})
    assert one.id == Item("p", ("a", "b")).id
    assert len({one.id, Item("p", ("b", "a")).id, Item("q", ("a", "b")).id, Item("p", ("a",)).id}) == 4


@pytest.mark.parametrize(
    ("completions", "said"),
    [
        ((), "has 0 completions; an item has 1 to 9"),
        (tuple("abcdefghij"), "has 10 completions"),
        (("a", None), r"completion 1 is missing \(None\)"),
        (("a", float("nan")), "completion 1 is missing"),
        (("a", "b", "a"), "completions 0 and 2 are equal"),
    ],
)
def test_items_that_cannot_be_judged_are_refused(completions: tuple[Any, ...], said: str) -> None:
    with pytest.raises(FeedbackError, match=said):
        Item("how do i ?", completions)


@pytest.mark.parametrize(
    ("answer", "question", "n", "said"),
    [
        (Answer(ranks=(1, 2)), "rank", 3, "a ranking of 3 completions is 3 numbers"),
        (Answer(ranks=(0, 1)), "rank", 2, "numbers from 1 to 2"),
        (Answer(rating=1), "rank", 2, "ranks None"),
        (Answer(rating=2), "good/bad", 1, "from 0 to 1"),
        (Answer(rating=0), "1-7", 1, "from 1 to 7"),
        (Answer(ranks=(1,)), "1-7", 1, "rating None"),
    ],
)
def test_answers_to_another_question_are_refused(answer: Answer, question: Any, n: int, said: str) -> None:
    with pytest.raises(FeedbackError, match=said):
        answer.check(question, n)


def test_impossible_answers_are_refused() -> None:
    with pytest.raises(FeedbackError, match="not both"):
        Answer(ranks=(1, 2), rating=1)
    for ranks in (None, (1, 1), (1, 2, 3)):
        with pytest.raises(FeedbackError, match="of a pair that is no tie"):
            Answer(ranks=ranks, strength="clearly")
    with pytest.raises(FeedbackError, match="slightly, clearly, much"):
        Answer(ranks=(1, 2), strength="hugely")
    Answer().check("rank", 2)  # a skip answers every question


def test_samples_become_items_of_k_in_order_and_equal_ones_are_counted() -> None:
    frame = samples([["a", "b", "c", "c"], ["d", "e", "f", "g"]])
    with pytest.warns(UserWarning, match="1 of 4 pairs held two equal completions"):
        pairs = feedback.items(frame)
    assert [item.completions for item in pairs] == [("a", "b"), ("d", "e"), ("f", "g")]
    assert pairs[0].columns == {"prompt_id": 0, "kind": "ask"}
    assert [item.completions for item in feedback.items(frame, k=4)] == [("a", "b", "c"), ("d", "e", "f", "g")]
    assert len(feedback.items(frame, k=1)) == 8
    with pytest.warns(UserWarning, match="2 of 8 samples were too few for another group of 3"):
        assert [item.completions for item in feedback.items(frame, k=3)] == [("a", "b", "c"), ("d", "e", "f")]
    with pytest.raises(FeedbackError, match="no prompt has 2 different samples"):
        feedback.items(samples([["a", "a"]]))


def test_columns_of_completions_are_not_taken_for_the_items() -> None:
    frame = samples([["a", "b"], ["c", "d"]]).assign(gold=[1.0, 2.0, 3.0, 3.0], topic=["x", "x", "y", "y"])
    with pytest.warns(UserWarning, match="^gold: differs between completions of one prompt"):
        pairs = feedback.items(frame)
    assert [item.columns["topic"] for item in pairs] == ["x", "y"]
    assert all("gold" not in item.columns for item in pairs)
    assert [item.columns["gold"] for item in feedback.items(frame, k=1)] == [1.0, 2.0, 3.0, 3.0]


# Asking ---


def test_ranks_follow_the_completions_whatever_order_they_were_shown_in() -> None:
    item = Item("p", ("aa", "a", "aaaa", "aaa"))
    orders = set()
    for seed in range(30):
        judged = feedback.ask([item], Longest(), seed=seed)
        assert judged["ranks"][0] == [3, 4, 1, 2]
        orders.add(tuple(judged["shown"][0]))
    assert len(orders) > 10


def test_what_a_rater_sees_is_the_order_that_is_written_down() -> None:
    rater = Longest()
    judged = feedback.ask(feedback.items(samples([["a", "bb"]] * 20)), rater)
    for (_, seen), row in zip(rater.asked, judged.itertuples(), strict=True):
        assert seen == tuple(row.completions[i] for i in row.shown)
    assert 3 <= sum(row[0] == 0 for row in judged["shown"]) <= 17


def test_raters_take_turns_and_the_budget_ends_it() -> None:
    raters = [Longest(name) for name in ("ana", "ben", "cy")]
    made = feedback.items(samples([["a", "bb"], ["c", "dd"], ["e", "ff"]]))
    judged = feedback.ask(made, raters, per_item=2)
    assert judged["rater"].value_counts().to_dict() == {"ana": 2, "ben": 2, "cy": 2}
    assert all(names.nunique() == 2 for _, names in judged.groupby("item")["rater"])
    assert len(feedback.ask(made, raters, per_item=2, budget=3)) == 3


@pytest.mark.parametrize(
    ("raters", "asking", "said"),
    [
        ([Longest("")], {}, "give each a `name` of its own"),
        ([Longest(), Longest()], {}, "give each a `name` of its own"),
        ([Longest()], {"per_item": 2}, "there are 1 raters"),
        ([Longest()], {"question": "stars"}, "there are rank, good/bad, 1-7"),
        ([Longest()], {"question": "1-7"}, "asks about one completion"),
    ],
)
def test_wrong_ways_to_ask_are_refused(raters: list[Longest], asking: dict[str, Any], said: str) -> None:
    with pytest.raises(FeedbackError, match=said):
        feedback.ask([Item("p", ("a", "bb"))], raters, **asking)


def test_asking_with_a_store_goes_on_where_it_stopped(tmp_path: Any) -> None:
    store = feedback.Store(tmp_path / "judgments.db")
    made = feedback.items(samples([["a", "bb"], ["c", "dd"], ["e", "ff"]]))
    first, second = Longest(), Longest()
    feedback.ask(made, first, budget=2, store=store)
    judged = feedback.ask(made, second, store=store)
    assert len(first.asked) == 2 and len(second.asked) == 1
    without = feedback.ask(made, Longest())
    same = [name for name in feedback.COLUMNS if name not in ("seconds", "time", "shown")]
    pd.testing.assert_frame_equal(judged[same], without[same])


def test_items_are_chosen_where_the_ensemble_disagrees_most() -> None:
    scores = [{"a": 0.0, "b": 1.0, "c": 5.0, "d": 6.0}, {"a": 0.0, "b": 1.0, "c": 8.0, "d": 5.0}]
    ensemble = Ensemble([lambda p, c, s=each, **_: [s[text] for text in c] for each in scores])
    made = feedback.items(samples([["a", "b"], ["c", "d"]]))
    # Gaps: 1 and 1; 1 and -3, so each completion's centred score is 2 apart: a standard deviation of sqrt(2).
    np.testing.assert_allclose(feedback.disagreement(made, ensemble), [0.0, math.sqrt(2)])
    assert feedback.choose(made, 1, ensemble) == [made[1]]
    assert feedback.choose(made, 2) == made
    drawn = {feedback.choose(made, 1, seed=seed)[0].id for seed in range(20)}
    assert len(drawn) == 2
    with pytest.raises(FeedbackError, match="there are 2 items"):
        feedback.choose(made, 3)


# Converting ---


def judged(ranks: Sequence[int] | None, n: int, strength: str | None = None, rater: str = "ana") -> dict[str, Any]:
    item = Item("p", tuple("abcdefghi"[:n]), {"kind": "ask"})
    answer = Answer(ranks=None if ranks is None else tuple(ranks), strength=strength)
    return feedback.judging.as_row(0, item, rater, "rank", answer, range(n), 1.0, "test-1")


def as_frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return feedback.judging.judgments_frame(rows)


@pytest.mark.parametrize("k", range(2, 10))
def test_a_ranking_of_k_gives_k_choose_two_pairs_of_one_item(k: int) -> None:
    pairs = feedback.preferences(as_frame(judged(range(k, 0, -1), k)))
    assert len(pairs) == math.comb(k, 2)
    assert all(row["chosen"] > row["rejected"] for row in pairs)  # ranked from the last letter to the first
    assert ("item" in pairs.column_names) == (k > 2)


def test_ties_give_no_pair_and_are_counted() -> None:
    frame = as_frame(judged((1, 1, 3), 3), judged((1, 1), 2), judged(None, 2))
    with pytest.warns(UserWarning, match="2 of 3 judgments are ties or skipped"):
        pairs = feedback.preferences(frame)
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("a", "c"), ("b", "c")]
    with pytest.raises(FeedbackError, match="none of 1 judgments puts"):
        feedback.preferences(as_frame(judged((1, 1), 2)))


def test_strengths_become_llama_2s_margins_only_if_asked() -> None:
    rows = [judged((1, 2), 2, strength) for strength in ("slightly", "clearly", "much", None)]
    assert "margin" not in feedback.preferences(as_frame(*rows)).column_names
    pairs = feedback.preferences(as_frame(*rows), feedback.MARGINS)
    np.testing.assert_allclose(pairs["margin"][:], [1 / 3, 2 / 3, 1, 0])


def test_rankings_of_several_raters_stay_apart() -> None:
    pairs = feedback.preferences(as_frame(judged((1, 2, 3), 3, rater="ana"), judged((3, 2, 1), 3, rater="ben")))
    assert len(set(pairs["item"][:])) == 2 and pairs["rater"][:] == ["ana"] * 3 + ["ben"] * 3


def test_withdrawn_judgments_give_no_pair() -> None:
    taken_back = judged((2, 1), 2) | {"withdrawn": True}
    pairs = feedback.preferences(as_frame(judged((1, 2), 2), taken_back))
    assert pairs["chosen"][:] == ["a"]


def test_ratings_become_ktos_labels() -> None:
    item = Item("p", ("a",), {"kind": "ask"})
    row = feedback.judging.as_row
    good = [row(i, item, "ana", "good/bad", Answer(rating=i), [0], 1.0, "t") for i in (0, 1)]
    stars = [row(i, item, "ana", "1-7", Answer(rating=i), [0], 1.0, "t") for i in (1, 3, 4, 5, 7)]
    assert feedback.labels(as_frame(*good))["label"][:] == [False, True]
    with pytest.warns(UserWarning, match="1 of 5 ratings are in the middle"):
        rated = feedback.labels(as_frame(*stars))
    assert rated["label"][:] == [False, False, True, True]
    assert rated.column_names == ["kind", "prompt", "completion", "label"]
    with pytest.raises(FeedbackError, match="no judgment answers 'rank'; questions asked: good/bad"):
        feedback.preferences(as_frame(*good))


# Simulated raters ---


def test_a_faultless_rater_ranks_and_rates_by_gold() -> None:
    rater = Pocket(W).rater(**FAULTLESS)
    gold = {text: pocket.gold(W, ASK, text) for text in FOUR}
    for order in permutations(FOUR):
        ranks = rater(ASK, order, "rank").ranks
        assert ranks is not None
        by_rank = [text for _, text in sorted(zip(ranks, order, strict=True))]
        assert by_rank == sorted(order, key=lambda text: -gold[text])
    for text in FOUR:
        assert rater(ASK, [text], "good/bad").rating == int(gold[text] > rater.rater.standard)
        stars = rater(ASK, [text], "1-7").rating
        assert stars == min(7, max(1, 4 + round(gold[text] - rater.rater.standard)))


def test_pairs_have_the_stated_probability_and_stronger_words_for_wider_gaps() -> None:
    rater = Pocket(W).rater(temperature=1.0, lapse=0.2, position_bias=0.4)
    expected = pocket.choice_probability(
        rater.rater, *(pocket.utility(W, rater.rater, ASK, text) for text in (WRONG, REFUSAL))
    )
    answers = [rater(ASK, [WRONG, REFUSAL], "rank") for _ in range(4000)]
    first = np.mean([answer.ranks == (1, 2) for answer in answers])
    assert first == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))
    exact = Pocket(W).rater(**FAULTLESS)
    order = [feedback.STRENGTHS.index(str(exact(ASK, [RIGHT, worse], "rank").strength)) for worse in (FOUR[1], WRONG)]
    assert order == [0, 2]


def test_rankings_of_two_are_bradley_terry_and_of_three_plackett_luce() -> None:
    rater = pocket.Rater(temperature=0.7, lapse=0.0, position_bias=0.0)
    rng, utilities = np.random.default_rng(0), [0.5, 0.0, -0.3]
    n = 6000
    orders = [tuple(np.argsort([-s for s in pocket.perceived_scores(rater, utilities, rng)])) for _ in range(n)]
    weight = [math.exp(u / 0.7) for u in utilities]
    for order in permutations(range(3)):
        a, b, c = (weight[i] for i in order)
        chance = a / (a + b + c) * b / (b + c)
        assert orders.count(order) / n == pytest.approx(chance, abs=4 * math.sqrt(chance / n))
    pairs = [pocket.perceived_scores(rater, utilities[:2], rng) for _ in range(n)]
    chance = pocket.choice_probability(rater, 0.5, 0.0)
    assert np.mean([one > other for one, other in pairs]) == pytest.approx(chance, abs=4 * math.sqrt(0.25 / n))


def test_an_indifferent_rater_ties_what_is_close() -> None:
    rater = Pocket(W).rater(**FAULTLESS | {"indifference": 0.5})
    assert rater(ASK, [RIGHT, FOUR[1]], "rank").ranks == (1, 1)
    assert rater(ASK, [RIGHT, WRONG], "rank").ranks == (1, 2)
    ranks = rater(ASK, FOUR, "rank").ranks
    assert ranks is not None and ranks[0] == ranks[1] == 1 and max(ranks) > 1


def test_a_panel_has_groups_of_different_values_and_members_who_know_different_things() -> None:
    raters = Pocket(W).panel(5, groups={"terse": {"length": -0.1}, "wordy": {"length": 0.1}}, lapse=0.0)
    assert [rater.name for rater in raters] == ["terse-1", "wordy-1", "terse-2", "wordy-2", "terse-3"]
    assert [rater.rater.length for rater in raters] == [-0.1, 0.1, -0.1, 0.1, -0.1]
    known = {pocket.known_cells(rater.rater.seed, rater.rater.knowledge) for rater in raters}
    assert len(known) == 5 and {rater.rater.lapse for rater in raters} == {0.0}
    with pytest.raises(FeedbackError, match="one rater or more"):
        Pocket(W).panel(0)


def test_the_same_seed_gives_the_same_judgments() -> None:
    made = [Item(ASK, FOUR), Item(ASK, FOUR[1:3])]
    once, again, other = (feedback.ask(made * 9, Pocket(W).rater(seed=seed), seed=seed) for seed in (0, 0, 1))
    assert once["ranks"].tolist() == again["ranks"].tolist() != other["ranks"].tolist()


def test_simulated_raters_refuse_chats() -> None:
    with pytest.raises(FeedbackError, match="reads the pocket world's texts, not chats"):
        Pocket(W).rater()([{"role": "user", "content": ASK}], [RIGHT, WRONG], "rank")
