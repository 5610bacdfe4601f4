"""Items, answers, raters, and the datasets that come of judgments: against rankings by hand and known probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf_kit import data, feedback
from rlhf_kit.feedback import Answer, FeedbackError, Item
from rlhf_kit.feedback.judging import COLUMNS, as_row, dense_ranks, judgments_frame
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion
from rlhf_kit.tasks import Pocket, pocket

W = pocket.world(0)
RIGHT = f" the otter lives {W.truth['otter', 'home']} ."
WRONG = f" the otter lives {W.myth['otter', 'home']} ."
ASK = "where does the otter live ?"
REFUSAL = " sorry , that is not safe ."
FOUR = (RIGHT, f" maybe {RIGHT[1:]}", WRONG, REFUSAL)
NO_FAULT = ("length", "politeness", "refusal_leniency", "agreement", "temperature", "lapse", "position_bias")
FAULTLESS: dict[str, Any] = {"knowledge": 1.0, **dict.fromkeys(NO_FAULT, 0.0)}


class Longest:
    """Ranks by length, the longest first."""

    def __init__(self, name: str = "longest") -> None:
        self.name, self.slow = name, False
        self.asked: list[tuple[Completion, ...]] = []

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: feedback.Question) -> Answer:
        self.asked.append(tuple(completions))
        return Answer(ranks=dense_ranks([len(each) for each in completions]))


def samples(*texts: Sequence[str]) -> pd.DataFrame:
    rows = [(p, k, f"p{p}", text, "ask") for p, group in enumerate(texts) for k, text in enumerate(group)]
    return pd.DataFrame(rows, columns=["prompt_id", "sample", "prompt", "completion", "kind"])


THREE = samples(["a", "bb"], ["c", "dd"], ["e", "ff"])


# Items and answers ---


def test_an_items_id_is_its_content() -> None:
    same = [Item("p", ("a", "b"), {"source": "x"}), Item("p", ("a", "b"))]
    other = [Item("p", ("b", "a")), Item("q", ("a", "b")), Item("p", ("a",))]
    assert same[0].id == same[1].id and len({item.id for item in [*same, *other]}) == 4


@pytest.mark.parametrize(
    ("completions", "said"),
    [
        ((), "has 0 completions"),
        (tuple("abcdefghij"), "has 10 completions"),
        (("a", "b", "a"), "has 3 completions, 1 equal"),
        *((("a", wrong), "completion 1 is missing") for wrong in (None, 5, [["b"]], "half an emoji \ud83d")),
        (("a", [{"from": "human", "value": "b"}]), "completion 1 is missing"),
        (("a", [{"role": "user", "content": [{"type": "image"}]}]), "completion 1 is missing"),
    ],
)
def test_items_that_cannot_be_judged_are_refused(completions: tuple[Any, ...], said: str) -> None:
    with pytest.raises(FeedbackError, match=said):
        Item("how do i ?", completions)
    for prompt in ("", 7, {"role": "user", "content": "hi"}, []):
        with pytest.raises(FeedbackError, match="prompt is missing"):
            Item(prompt, ("a", "b"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "question", "n"),
    [
        ({"ranks": (1, 2)}, "rank", 3),
        ({"ranks": (0, 1)}, "rank", 2),
        ({"rating": 1}, "rank", 2),
        ({"rating": 0}, "1-7", 1),
        ({"ranks": (1,)}, "1-7", 1),
        ({"ranks": (1, 2), "rating": 1}, "rank", 2),
        ({"ranks": (1, 1), "strength": "clearly"}, "rank", 2),  # a tie is not clear
        ({"ranks": (1, 2, 3), "strength": "clearly"}, "rank", 3),
        ({"ranks": (1, 2), "strength": "hugely"}, "rank", 2),
    ],
)
def test_impossible_answers_are_refused(answer: dict[str, Any], question: Any, n: int) -> None:
    with pytest.raises(FeedbackError):
        Answer(**answer).check(question, n)
    Answer().check(question, n)  # a skip answers every question


def test_samples_become_items_of_k_in_order_and_equal_ones_are_counted() -> None:
    frame = samples(["a", "b", "c", "c"], ["d", "e", "f", "g"])
    with pytest.warns(UserWarning, match="1 of 4 pairs held two equal completions"):
        pairs = feedback.items(frame)
    assert [item.completions for item in pairs] == [("a", "b"), ("d", "e"), ("f", "g")]
    assert pairs[0].columns == {"prompt_id": 0, "kind": "ask"}
    assert [item.completions for item in feedback.items(frame, k=4)] == [("a", "b", "c"), ("d", "e", "f", "g")]
    assert len(feedback.items(frame, k=1)) == 8
    with pytest.warns(UserWarning, match="2 of 8 samples were too few for another group of 3"):
        assert [item.completions for item in feedback.items(frame, k=3)] == [("a", "b", "c"), ("d", "e", "f")]
    with pytest.raises(FeedbackError, match="no prompt has 2 different samples"):
        feedback.items(samples(["a", "a"]))


def test_columns_of_completions_are_not_taken_for_the_items() -> None:
    frame = samples(["a", "b"], ["c", "d"]).assign(gold=[1.0, 2.0, 3.0, 3.0], topic=["x", "x", "y", "y"])
    with pytest.warns(UserWarning, match="^gold: differs between completions of one prompt"):
        pairs = feedback.items(frame)
    assert [item.columns["topic"] for item in pairs] == ["x", "y"]
    assert all("gold" not in item.columns for item in pairs)
    assert [item.columns["gold"] for item in feedback.items(frame, k=1)] == [1.0, 2.0, 3.0, 3.0]


def test_peoples_own_columns_are_carried_and_never_taken_for_ours() -> None:
    names = ("sample", "kl", "item", "rater", "judgment", "ranks", "model", "step", "label", "margin", "chosen")
    frame = THREE.assign(**dict.fromkeys(names, "mine"))
    item = feedback.items(frame)[0]
    assert set(item.columns) == {"prompt_id", "kind", *names[2:]}  # sample and kl are of a completion
    pairs = feedback.collect(frame, [Longest("ana"), Longest("ben")], per_item=2)
    assert pairs["rater"][:2] == ["ana", "ben"] and pairs["chosen"][0] == "bb" and pairs["step"][0] == "mine"
    assert {f"{name}_dataset" for name in ("item", "rater", "label", "margin", "chosen")} < {*pairs.column_names}
    assert not {"item", "margin", "label"} & {*pairs.column_names}
    judged = feedback.ask([item, Item("q", ("a", "bb"), {"topic": 5, "step": 3})], Longest())
    assert feedback.preferences(judged)["topic"][:] == [None, 5]
    for said, wrong in {"different prompts": frame.assign(prompt_id=1), "no column 'co": frame[["prompt"]]}.items():
        with pytest.raises(FeedbackError, match=said):
            feedback.items(wrong)


# Asking ---


def test_ranks_and_the_order_shown_are_kept_whatever_the_order() -> None:
    item, rater, orders = Item("p", ("aa", "a", "aaaa", "aaa")), Longest(), set()
    for seed in range(30):
        row = feedback.ask([item], rater, seed=seed).iloc[0]
        assert row["ranks"] == [3, 4, 1, 2]
        assert rater.asked[-1] == tuple(item.completions[i] for i in row["shown"])
        orders.add(tuple(row["shown"]))
    assert len(orders) > 10
    first = feedback.ask(feedback.items(samples(*[["a", "bb"]] * 20)), rater)["shown"].str[0]
    assert 3 <= (first == 0).sum() <= 17


def test_raters_take_turns() -> None:
    made = feedback.items(THREE)
    judged = feedback.ask(made, [Longest(name) for name in ("ana", "ben", "cy")], per_item=2)
    assert judged["rater"].tolist() == ["ana", "ben", "cy"] * 2
    assert judged["item"].tolist() == [item.id for item in made for _ in range(2)]


@pytest.mark.parametrize(
    ("names", "asking", "said"),
    [
        ([""], {}, "name"),
        (["ana", "ana"], {}, "a `name` of its own"),
        (["ana"], {"per_item": 2}, "per_item=2"),
        (["ana"], {"question": "stars"}, "there are rank, good/bad, 1-7"),
        (["ana"], {"question": "1-7"}, "asks about one completion"),
    ],
)
def test_wrong_ways_to_ask_are_refused(names: list[str], asking: dict[str, Any], said: str) -> None:
    with pytest.raises(FeedbackError, match=said):
        feedback.ask([Item("p", ("a", "bb"))], [Longest(name) for name in names], **asking)


def test_asking_with_a_store_goes_on_where_it_stopped(tmp_path: Any) -> None:
    store, made = feedback.Store(tmp_path / "judgments.db"), feedback.items(THREE)
    first, second = Longest(), Longest()
    feedback.ask(made[:2], first, store=store)
    judged = feedback.ask(made, second, store=store)
    assert len(first.asked) == 2 and len(second.asked) == 1
    without = feedback.ask(made, Longest())
    same = [name for name in COLUMNS if name not in ("seconds", "time")]
    pd.testing.assert_frame_equal(judged[same], without[same])


def test_only_slow_raters_have_their_progress_printed(capsys: pytest.CaptureFixture[str]) -> None:
    rater = Longest("model")
    feedback.ask(feedback.items(THREE), rater)
    rater.slow = True
    assert not capsys.readouterr().out
    feedback.ask(feedback.items(THREE), rater)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in lines] == [["judged", "by", "model", f"{n}/3"] for n in (1, 2, 3)]
    assert all("left 0:" in line for line in lines)


def test_items_are_chosen_at_random_by_a_seed() -> None:
    made = feedback.items(THREE)
    assert feedback.choose(made, 3) == made
    assert len({feedback.choose(made, 1, seed=seed)[0].id for seed in range(20)}) == 3
    with pytest.raises(FeedbackError, match="there are 3 items"):
        feedback.choose(made, 4)


# Converting ---


def ranked(ranks: Sequence[int] | None, n: int = 2, strength: str | None = None, rater: str = "ana") -> dict[str, Any]:
    item = Item("p", tuple("abcdefghi"[:n]), {"kind": "ask"})
    answer = Answer(ranks=None if ranks is None else tuple(ranks), strength=strength)
    return as_row(item, rater, "rank", answer, range(n), 1.0, "test-1")


def preferences(*rows: dict[str, Any], **options: Any) -> Any:
    return feedback.preferences(judgments_frame(rows), **options)


@pytest.mark.parametrize("k", [2, 3, 9])
def test_a_ranking_of_k_gives_k_choose_two_pairs_of_one_item(k: int) -> None:
    pairs = preferences(ranked(range(k, 0, -1), k))
    assert len(pairs) == math.comb(k, 2)
    assert all(row["chosen"] > row["rejected"] for row in pairs)  # ranked from the last letter to the first
    assert ("item" in pairs.column_names) == (k > 2)
    both = preferences(ranked(range(k, 0, -1), k), ranked(range(1, k + 1), k, rater="ben"))  # raters stay apart
    assert both["rater"][:] == ["ana"] * len(pairs) + ["ben"] * len(pairs)
    assert k == 2 or len(set(both["item"][:])) == 2


def test_ties_skips_and_withdrawn_judgments_give_no_pair_and_are_counted(tmp_path: Any) -> None:
    taken_back = ranked((2, 1)) | {"withdrawn": True}
    with pytest.warns(UserWarning, match="2 of 3 judgments are ties or skipped"):
        pairs = preferences(ranked((1, 1, 3), 3), ranked((1, 1)), ranked(None), taken_back)
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("a", "c"), ("b", "c")]
    assert pairs["shown_first"][:] == ["chosen", "chosen"]
    assert preferences(ranked((2, 1)))["shown_first"][:] == ["rejected"]
    pairs.to_json(tmp_path / "pairs.jsonl")
    assert data.load(tmp_path / "pairs.jsonl").to_list() == pairs.to_list()
    with pytest.raises(FeedbackError, match="none of 1 judgments puts"):
        preferences(ranked((1, 1)))


def test_strengths_become_llama_2s_margins_only_if_asked() -> None:
    rows = [ranked((1, 2), 2, strength) for strength in ("slightly", "clearly", "much", None)]
    assert "margin" not in preferences(*rows).column_names
    np.testing.assert_allclose(preferences(*rows, margins=feedback.MARGINS)["margin"][:], [1 / 3, 2 / 3, 1, 0])


def test_ratings_become_ktos_labels() -> None:
    def rated(question: Any, *ratings: int | None) -> pd.DataFrame:
        item = Item("p", ("a",), {"kind": "ask"})
        return judgments_frame([as_row(item, "ana", question, Answer(rating=r), [0], 1.0, "t") for r in ratings])

    assert feedback.labels(rated("good/bad", 0, 1))["label"][:] == [False, True]
    with pytest.warns(UserWarning, match="2 of 6 ratings are in the middle"):
        labels = feedback.labels(rated("1-7", 1, 3, 4, None, 5, 7))
    assert labels["label"][:] == [False, False, True, True]
    assert labels.column_names == ["kind", "prompt", "completion", "label"]
    with pytest.raises(FeedbackError, match="no judgment answers 'rank'; questions asked: good/bad"):
        feedback.preferences(rated("good/bad", 1))


# Simulated raters ---


def test_a_faultless_rater_ranks_and_rates_by_gold() -> None:
    rater = Pocket(W).rater(**FAULTLESS)
    gold = {text: pocket.gold(W, ASK, text) for text in FOUR}
    for order in permutations(FOUR):
        ranks = rater(ASK, order, "rank").ranks
        by_rank = [text for _, text in sorted(zip(ranks or (), order, strict=True))]
        assert by_rank == sorted(order, key=lambda text: -gold[text])
    for text in FOUR:
        assert rater(ASK, [text], "good/bad").rating == int(gold[text] > rater.rater.standard)
        stars = rater(ASK, [text], "1-7").rating
        assert stars == min(7, max(1, 4 + round(gold[text] - rater.rater.standard)))
    with pytest.raises(FeedbackError, match="not chats"):
        rater([{"role": "user", "content": ASK}], [RIGHT, WRONG], "rank")


def test_pairs_have_the_stated_probability_and_stronger_words_for_wider_gaps() -> None:
    rater = Pocket(W).rater(temperature=1.0, lapse=0.2, position_bias=0.4)
    utilities = (pocket.utility(W, rater.rater, ASK, text) for text in (WRONG, REFUSAL))
    first = np.mean([rater(ASK, [WRONG, REFUSAL], "rank").ranks == (1, 2) for _ in range(4000)])
    assert first == pytest.approx(pocket.choice_probability(rater.rater, *utilities), abs=4 * math.sqrt(0.25 / 4000))
    exact = Pocket(W).rater(**FAULTLESS)
    assert [exact(ASK, [RIGHT, worse], "rank").strength for worse in (FOUR[1], WRONG)] == ["slightly", "much"]


def test_rankings_of_two_are_bradley_terry_and_of_three_plackett_luce() -> None:
    rater = pocket.Rater(temperature=0.7, lapse=0.0, position_bias=0.0)
    rng, utilities, n = np.random.default_rng(0), [0.5, 0.0, -0.3], 6000
    orders = [tuple(np.argsort([-s for s in pocket.raters.perceived_scores(rater, utilities, rng)])) for _ in range(n)]
    weight = [math.exp(u / 0.7) for u in utilities]
    for order in permutations(range(3)):
        a, b, c = (weight[i] for i in order)
        chance = a / (a + b + c) * b / (b + c)
        assert orders.count(order) / n == pytest.approx(chance, abs=4 * math.sqrt(chance / n))
    pairs = [pocket.raters.perceived_scores(rater, utilities[:2], rng) for _ in range(n)]
    chance = pocket.choice_probability(rater, 0.5, 0.0)
    assert np.mean([one > other for one, other in pairs]) == pytest.approx(chance, abs=4 * math.sqrt(0.25 / n))


def test_a_panel_has_groups_and_members_who_know_different_things_and_a_seed_gives_the_same_judgments() -> None:
    raters = Pocket(W).panel(5, groups={"terse": {"length": -0.1}, "wordy": {"length": 0.1}}, lapse=0.0)
    lengths = {"terse-1": -0.1, "wordy-1": 0.1, "terse-2": -0.1, "wordy-2": 0.1, "terse-3": -0.1}
    assert [(rater.name, rater.rater.length) for rater in raters] == [*lengths.items()]
    known = {pocket.raters.known_cells(rater.rater.seed, rater.rater.knowledge) for rater in raters}
    assert len(known) == 5 and {rater.rater.lapse for rater in raters} == {0.0}
    with pytest.raises(FeedbackError, match="one rater or more"):
        Pocket(W).panel(0)
    made = [Item(ASK, FOUR), Item(ASK, FOUR[1:3])] * 9
    once, again, other = (feedback.ask(made, Pocket(W).rater(seed=seed))["ranks"].tolist() for seed in (0, 0, 1))
    assert once == again != other
