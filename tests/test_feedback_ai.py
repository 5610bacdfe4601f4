"""AI feedback: constitutions, judges read at their answer token, endpoints that misbehave, critique and revision."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_kit import feedback, stats
from rlhf_kit.feedback import Endpoint, EndpointRater, FeedbackError, Item, LanguageModelRater, RewardRater, Template
from rlhf_kit.feedback.templates import rank_by, read_reply
from rlhf_kit.models import load_causal, load_tokenizer
from rlhf_kit.rewards import RewardModel
from rlhf_kit.tasks import Pocket, pocket
from rlhf_kit.tasks.pocket.answers import CARELESS, DEMONSTRATION, write

PROMPT = "where does the otter live ?"
GOOD, BAD = " the otter lives by the river .", " i am not sure ."
RATE = "{prompt} {completion} is this good ?"
PAIR = Template("{prompt} this is {first} that is {second} which is best ?", RATE, ("this", "that"), chat=False)
ASKED = Template("{question} {prompt} {first} {second} ?", RATE, ("this", "that"), chat=False)
ONE = feedback.Constitution((feedback.Principle("short", "which is short ?", "say it", "mend it"),))


# Constitutions --------------------------------------------------------------------------------------------------------


def test_the_default_constitution_has_our_five_principles() -> None:
    rules = feedback.constitution()
    assert [each.name for each in rules.principles] == ["helpful", "truthful", "harmless", "willing", "plain"]
    assert all(each.weight == 1 and each.compare.endswith("?") for each in rules.principles)
    assert rules["harmless"] is rules.principles[2]
    with pytest.raises(
        FeedbackError, match="principle 'kind': is not in the constitution, which has helpful, truthful"
    ):
        rules["kind"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("principles: []", "empty or no list"),
        ("rules: 1", "one list under the key `principles`"),
        ("principles: [", "cannot be read as a constitution"),
        ("principles:\n- {name: a, compare: b, critique: c}", "principle 1: the key 'revise' is missing"),
        ("principles:\n- {name: a, compare: b, critique: c, revise: d, why: e}", "principle 1: unknown key 'why'"),
        ("principles:\n- {name: a, compare: 3, critique: c, revise: d}", "principle 1: 'compare' is no text"),
        ("principles:\n- {name: a, compare: b, critique: c, revise: d, weight: -1}", "principle 1: 'weight' is -1"),
        ("principles:\n- {name: a, compare: b, critique: c, revise: d, weight: .nan}", "principle 1: 'weight' is nan"),
        ("principles:\n- just words", "principle 1: has no keys"),
        (
            "principles:\n- &p {name: a, compare: b, critique: c, revise: d}\n- *p",
            "principle 2: the name 'a' was given before",
        ),
    ],
)
def test_a_faulty_constitution_is_refused_in_a_sentence_that_names_file_and_principle(
    tmp_path: Path, text: str, says: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(FeedbackError) as error:
        feedback.constitution(path)
    assert says in str(error.value) and str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_missing_constitution_is_named(tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="none.yaml: cannot be read as a constitution .*No such file"):
        feedback.constitution(tmp_path / "none.yaml")


# A causal LM read at its answer token ---------------------------------------------------------------------------------


def by_hand(model: str, text: str, words: tuple[str, str], load_in_4bit: bool | None = None) -> float:
    """P(first word) of the two from the model's own logits after a text."""
    tokenizer, loaded = load_tokenizer(model), load_causal(model, load_in_4bit).eval()
    ids = tokenizer(text)["input_ids"]
    first, second = (tokenizer(f" {word}")["input_ids"] for word in words)
    logits = tiny.naive_logits(loaded, ids, first)[0]
    return float(torch.softmax(logits[[first[0], second[0]]], 0)[0])


def test_a_preference_is_the_mean_over_both_orders_of_the_answer_words_probability(
    zoo: dict[str, str], mode: str
) -> None:
    rater = LanguageModelRater(zoo[mode], template=PAIR)
    ab = by_hand(zoo[mode], PAIR.comparison(PROMPT, GOOD, BAD, ""), PAIR.choices)
    ba = by_hand(zoo[mode], PAIR.comparison(PROMPT, BAD, GOOD, ""), PAIR.choices)
    assert rater.preference(PROMPT, GOOD, BAD) == pytest.approx((ab + 1 - ba) / 2, abs=2e-5)
    assert rater.position_bias == pytest.approx((ab + ba) / 2 - 0.5, abs=2e-5)
    assert abs(rater.position_bias) > 0.02  # there is a bias to cancel


@pytest.mark.parametrize("template", [PAIR, pocket.JUDGE_TEMPLATE], ids=["pair", "alone"])
def test_the_two_orders_cancel_exactly(zoo: dict[str, str], template: Template) -> None:
    rater = LanguageModelRater(zoo["gpt2"], template=template)
    answers = [GOOD, BAD, " the otter eats fish .", " maybe the otter lives by the lake .", " yes ."]
    for a in answers:
        for b in answers:
            assert rater.preference(PROMPT, a, b) == 1 - rater.preference(PROMPT, b, a)
    assert rater.preference(PROMPT, GOOD, GOOD) == 0.5


def test_principles_count_by_their_weights(zoo: dict[str, str]) -> None:
    two = feedback.Constitution(
        (
            feedback.Principle("short", "which is short ?", "say it", "mend it", weight=3),
            feedback.Principle("true", "which is true ?", "say it", "mend it"),
        )
    )
    p = {
        name: LanguageModelRater(zoo["full"], two, name, ASKED).preference(PROMPT, GOOD, BAD)
        for name in ("short", "true")
    }
    both = LanguageModelRater(zoo["full"], two, template=ASKED).preference(PROMPT, GOOD, BAD)
    assert abs(p["short"] - p["true"]) > 1e-3
    assert both == pytest.approx((3 * p["short"] + p["true"]) / 4, abs=1e-6)


def test_many_rows_at_once_are_the_rows_one_by_one(zoo: dict[str, str]) -> None:
    rater = LanguageModelRater(zoo["gpt2"], template=PAIR, batch_size=3)
    a, b = [GOOD, BAD, " yes ."], [BAD, " no .", GOOD]
    together = rater.preferences([PROMPT] * 3, a, b)
    assert together == pytest.approx([rater.preference(PROMPT, *pair) for pair in zip(a, b, strict=True)], abs=1e-5)


def test_a_chat_model_is_asked_through_its_chat_template(zoo: dict[str, str], tmp_path: Path) -> None:
    """Its answer comes right after the generation prompt, without a space."""
    path = tmp_path / "chat"
    tokenizer = load_tokenizer(zoo["full"])
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    load_causal(zoo["full"]).save_pretrained(path)
    tokenizer.save_pretrained(path)
    template = replace(PAIR, choices=("A", "B"), verdicts=("y", "n"), chat=True)
    chat = [{"role": "user", "content": PROMPT}]
    rater = LanguageModelRater(path, template=template)
    p = []
    for first, second in ((GOOD, BAD), (BAD, GOOD)):
        ids = tokenizer(f"[{template.comparison(PROMPT, first, second, '')}]:")["input_ids"]
        choices = [tokenizer(word)["input_ids"][0] for word in "AB"]
        logits = tiny.naive_logits(load_causal(path), ids, choices[:1])[0][choices]
        p.append(float(torch.softmax(logits, 0)[0]))
    completions = ([{"role": "assistant", "content": text}] for text in (GOOD, BAD))
    assert rater.preference(chat, *completions) == pytest.approx((p[0] + 1 - p[1]) / 2, abs=2e-5)


def test_answer_words_that_are_not_one_token_each_are_refused(zoo: dict[str, str]) -> None:
    with pytest.raises(FeedbackError, match="the answer ' former' is not one token .* other answer words"):
        LanguageModelRater(zoo["full"], template=replace(PAIR, choices=("former", "latter")))
    with pytest.raises(FeedbackError, match="'this' and 'this' are the same token"):
        LanguageModelRater(zoo["full"], template=replace(PAIR, choices=("this", "this")))


def test_a_text_that_does_not_fit_the_positions_is_refused(zoo: dict[str, str]) -> None:
    rater = LanguageModelRater(zoo["full"], template=PAIR)
    with pytest.raises(FeedbackError, match="of 7[0-9] tokens and its answer exceed the model's 64 positions"):
        rater.preference(PROMPT, GOOD * 8, BAD)


def test_a_principle_needs_a_place_in_the_template(zoo: dict[str, str]) -> None:
    with pytest.raises(FeedbackError, match="principle 'helpful': the template has no {question}"):
        LanguageModelRater(zoo["full"], principle="helpful", template=PAIR)


def test_a_judge_answers_as_a_rater(zoo: dict[str, str]) -> None:
    rater = LanguageModelRater(zoo["full"], template=PAIR, name="judge")
    answers = (GOOD, BAD, " the otter eats fish .")
    p = {(i, j): rater.preference(PROMPT, answers[i], answers[j]) for i in range(3) for j in range(3) if i != j}
    mean = [sum(p[i, j] for j in range(3) if j != i) / 2 for i in range(3)]
    answer = rater(PROMPT, answers, "rank")
    assert answer.ranks == tuple(1 + sum(other > one for other in mean) for one in mean)
    judged = feedback.ask([Item(PROMPT, answers[:2])], rater)
    best = int(p[0, 1] < 0.5)
    assert judged["ranks"][0][best] == 1 and judged["rater"][0] == "judge"
    odds = rater.good_odds([PROMPT], [GOOD])[0]
    hand = by_hand(zoo["full"], PAIR.rating(PROMPT, GOOD), PAIR.verdicts)
    assert odds == pytest.approx(math.log(hand / (1 - hand)), abs=1e-4)
    assert rater(PROMPT, [GOOD], "good/bad").rating == int(odds > 0)
    with pytest.raises(FeedbackError, match="'1-7' is for people"):
        rater(PROMPT, [GOOD], "1-7")


def test_a_judge_is_a_reward(zoo: dict[str, str]) -> None:
    rater = LanguageModelRater(zoo["full"], template=PAIR)
    assert rater.as_reward()([PROMPT], [GOOD]) == rater.good_odds([PROMPT], [GOOD])
    against = rater.as_reward("reference")
    assert against([PROMPT], [GOOD], reference=[BAD]) == rater.preferences([PROMPT], [GOOD], [BAD])
    with pytest.raises(FeedbackError, match="have no column 'reference'"):
        against([PROMPT], [GOOD])


@pytest.mark.parametrize(
    ("p", "ranks", "strength"),
    [(0.5, (1, 1), None), (0.6, (1, 2), "slightly"), (0.25, (2, 1), "clearly"), (0.9, (1, 2), "much")],
)
def test_strength_follows_the_probability(p: float, ranks: tuple[int, ...], strength: str | None) -> None:
    answer = rank_by(lambda prompt, a, b: p, PROMPT, [GOOD, BAD])
    assert (answer.ranks, answer.strength) == (ranks, strength)
    assert answer.note == f"preferred {p:.4f} {1 - p:.4f}"


def test_a_reward_is_a_rater_by_bradley_terry(zoo: dict[str, str]) -> None:
    reward = RewardModel(zoo["full-reward"])
    one, other = reward([PROMPT, PROMPT], [GOOD, BAD])
    rater = RewardRater(reward)
    assert rater.preference(PROMPT, GOOD, BAD) == pytest.approx(1 / (1 + math.exp(other - one)))
    assert rater(PROMPT, [GOOD, BAD], "rank").ranks == ((1, 2) if one > other else (2, 1))
    assert rater(PROMPT, [GOOD], "good/bad").rating == int(one > 0)
    steep = RewardRater(lambda prompts, completions, **_: [0.0, 1e6])
    assert steep.preference(PROMPT, GOOD, BAD) < 1e-100


# A judge of pocket size -----------------------------------------------------------------------------------------------


def written_items(world: pocket.World, n: int) -> list[Item]:
    """Pairs of answers that the world wrote well or carelessly."""
    rng, found = np.random.default_rng(0), []
    for row in pocket.prompts(world, "preference")[:n]:
        asked = pocket.parse_prompt(row["prompt"])
        pair = [write(world, asked, DEMONSTRATION if rng.random() < 0.5 else CARELESS, rng)[0] for _ in range(2)]
        if pair[0] != pair[1]:
            found.append(Item(row["prompt"], tuple(pair)))
    return found


@pytest.fixture(scope="session")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pocket judge who learnt from a simulated rater; the first 400 of `written_items` it has not seen."""
    world = pocket.world()
    judgments = feedback.ask(written_items(world, 2400)[400:], Pocket(world).rater())
    settings = {"max_steps": 130, "per_device_train_batch_size": 32, "learning_rate": 1e-3}
    return feedback.train_judge(pocket.BASE_MODEL, judgments, tmp_path_factory.mktemp("judge") / "judge", **settings)


@pytest.mark.slow
def test_a_judge_trained_on_a_raters_judgments_agrees_with_gold_better_than_chance(judge: str) -> None:
    world = pocket.world()
    held_out = written_items(world, 2400)[:400]
    gaps = np.array([np.subtract(*(pocket.gold(world, item.prompt, c) for c in item.completions)) for item in held_out])
    rater = LanguageModelRater(judge)
    assert rater.template == pocket.JUDGE_TEMPLATE  # as the directory remembers
    prompts, first, second = zip(*((item.prompt, *item.completions) for item in held_out), strict=True)
    p = np.array(rater.preferences(prompts, first, second))
    agreement = stats.bootstrap(((p > 0.5) == (gaps > 0))[gaps != 0].astype(float))
    print(f"the judge agrees with gold in {agreement}")
    assert agreement.lo > 0.5


def test_both_orders_of_a_pair_are_training_rows() -> None:
    judgments = feedback.ask(
        [Item(PROMPT, (GOOD, BAD))], RewardRater(lambda prompts, completions, **_: [float(len(c)) for c in completions])
    )
    from rlhf_kit.feedback.language_model import _as_rows

    ab, ba = (PAIR.comparison(PROMPT, *pair, "") for pair in ((GOOD, BAD), (BAD, GOOD)))
    assert _as_rows(judgments, PAIR) == [(ab, "this"), (ba, "that")]
    good, bad = (pocket.JUDGE_TEMPLATE.rating(PROMPT, each) for each in (GOOD, BAD))
    assert _as_rows(judgments, pocket.JUDGE_TEMPLATE) == [(good, "yes"), (bad, "no")]


def test_a_judgment_longer_than_the_positions_is_not_cut_in_training(zoo: dict[str, str], tmp_path: Path) -> None:
    judgments = feedback.ask([Item(PROMPT, (GOOD * 9, BAD))], RewardRater(lambda prompts, completions, **_: [1.0, 0.0]))
    with pytest.raises(FeedbackError, match="a judgment of 7[0-9] tokens exceeds the 64 positions"):
        feedback.train_judge(zoo["full"], judgments, tmp_path / "judge")


def test_words_of_the_pocket_template_are_one_token_each(tokenizer: PreTrainedTokenizerBase) -> None:
    text = pocket.JUDGE_TEMPLATE.rating(PROMPT, GOOD)
    assert len(tokenizer(text)["input_ids"]) == len(text.split())
    assert max(len(p["prompt"].split()) for p in pocket.prompts(pocket.world(), "test")) + 40 + 6 <= 128


# Endpoints ------------------------------------------------------------------------------------------------------------

KEY = "sk-test-0123456789"
Reply = tuple[int, dict[str, str], str]


@contextmanager
def server(behave: Callable[[int, dict[str, Any], Any], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A real server on loopback that answers request number n with (status, headers, body), and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(
                request | {"path": self.path, "key": self.headers.get("Authorization"), "at": time.monotonic()}
            )
            status, headers, body = behave(len(asked) - 1, request, self.headers)
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())
            except BrokenPipeError:  # who asked has gone
                pass

        def log_message(self, *_: Any) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def says(text: str) -> Reply:
    usage = {"prompt_tokens": 100, "completion_tokens": 2}
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage})


def longer(n: int, request: dict[str, Any], headers: Any) -> Reply:
    """A judge who prefers the longer answer, whatever its place."""
    text = request["messages"][0]["content"]
    first, second = (text.split(mark)[1].split("\n\n")[0] for mark in ("[Answer A]\n", "[Answer B]\n"))
    return says("A" if len(first) > len(second) else "B")


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return KEY


def rater_at(url: str, **changed: Any) -> EndpointRater:
    return EndpointRater(url, "m", **{"constitution": ONE, "backoff": 0.01, "timeout": 5.0, **changed})


def test_both_orders_are_asked_and_averaged_and_the_key_goes_in_the_header_only(key: str) -> None:
    with server(longer) as (url, asked):
        rater = rater_at(url, price_per_million=(1.0, 10.0))
        assert rater.preference(PROMPT, GOOD, BAD) == 1
        assert rater.preference(PROMPT, BAD, GOOD) == 0
        assert [one["key"] for one in asked] == [f"Bearer {KEY}"] * 4
        assert asked[0]["path"] == "/v1/chat/completions" and asked[0]["model"] == "m" and asked[0]["temperature"] == 0
        assert "which is short ?" in asked[0]["messages"][0]["content"]
        assert KEY not in json.dumps([one["messages"] for one in asked])
        assert rater.position_bias == 0
        assert rater.costs() == "4 requests, 0 more from the cache, 400 tokens in, 8 out, price 0.0005"


def test_a_judge_who_always_says_the_first_calls_a_tie(key: str) -> None:
    with server(lambda *_: says("Answer: **A**.")) as (url, _):
        rater = rater_at(url)
        assert rater(PROMPT, [GOOD, BAD], "rank").ranks == (1, 1)
        assert rater.position_bias == 0.5


def test_orders_cancel_exactly_over_principles_of_uneven_weights(key: str) -> None:
    weights = (0.1, 0.7, 0.3)
    rules = feedback.Constitution(
        tuple(replace(ONE.principles[0], name=str(w), compare=f"{w}?", weight=w) for w in weights)
    )

    def torn(n: int, request: dict[str, Any], headers: Any) -> Reply:
        return says("A") if "0.7?" in request["messages"][0]["content"] else longer(n, request, headers)

    with server(torn) as (url, _):
        rater = rater_at(url, constitution=rules)
        p = rater.preference(PROMPT, GOOD, BAD)
        assert p == pytest.approx(0.5 + 0.4 / 1.1 / 2) and p == 1 - rater.preference(PROMPT, BAD, GOOD)


def test_a_second_run_costs_nothing(key: str, tmp_path: Path) -> None:
    things = [Item(PROMPT, (GOOD, BAD)), Item(PROMPT, (GOOD, " yes ."))]
    with server(longer) as (url, asked):
        first = feedback.ask(things, rater_at(url, cache=tmp_path / "replies.sqlite"))
        again = rater_at(url, cache=tmp_path / "replies.sqlite")
        second = feedback.ask(things, again)
        assert len(asked) == 4
        assert second["ranks"].tolist() == first["ranks"].tolist() == [[1, 2], [1, 2]]
        assert (again.endpoint.asked, again.endpoint.from_cache) == (0, 4)
        other = rater_at(url, cache=tmp_path / "replies.sqlite", temperature=1.0)  # another request
        other.preference(PROMPT, GOOD, BAD)
        assert len(asked) == 6


def test_the_key_is_nowhere_but_on_the_wire(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Even where a server repeats it, in an error or in a reply."""
    caplog.set_level(0)

    def repeats(n: int, request: dict[str, Any], headers: Any) -> Reply:
        said = headers["Authorization"]
        return says(f"your key is {said}") if n == 0 else (400, {}, f"bad request with {said}")

    with server(repeats) as (url, _):
        rater = rater_at(url, cache=tmp_path / "replies.sqlite", max_repeats=0)
        note = rater(PROMPT, [GOOD, BAD], "rank").note
        assert "[key]" in note
        with pytest.raises(
            FeedbackError, match=r"refuses the request \(400: bad request with Bearer \[key\]\)"
        ) as error:
            rater(PROMPT, [GOOD, " yes ."], "rank")
    said = capsys.readouterr()
    seen = [note, str(error.value), repr(rater), repr(rater.endpoint), str(vars(rater)), str(vars(rater.endpoint))]
    seen += [said.out, said.err, caplog.text]
    assert not [text for text in seen if KEY in text]
    for path in tmp_path.iterdir():
        assert KEY.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("status", "says_so"), [(401, "does not accept the key"), (403, "does not allow"), (404, "knows no such model")]
)
def test_a_refusal_fails_at_once_in_one_sentence(key: str, status: int, says_so: str) -> None:
    with server(lambda *_: (status, {}, f"no, {KEY}")) as (url, asked):
        with pytest.raises(FeedbackError, match=rf"m at {url}: {says_so}.*\({status}\); .*OPENAI_API_KEY") as error:
            rater_at(url).preference(PROMPT, GOOD, BAD)
        assert len(asked) == 1 and KEY not in str(error.value)


@pytest.mark.slow
def test_too_many_requests_are_waited_out_as_the_server_asks(key: str) -> None:
    def busy(n: int, request: dict[str, Any], headers: Any) -> Reply:
        return (429, {"Retry-After": "1"}, "") if n == 0 else longer(n, request, headers)

    with server(busy) as (url, asked):
        assert rater_at(url).preference(PROMPT, GOOD, BAD) == 1
        assert len(asked) == 3 and asked[1]["at"] - asked[0]["at"] >= 1


def test_a_wait_of_hours_is_not_waited(key: str) -> None:
    with (
        server(lambda *_: (429, {"Retry-After": "7200"}, "")) as (url, asked),
        pytest.raises(FeedbackError, match="answered 429 and asks to wait 120:00; pass cache="),
    ):
        rater_at(url).preference(PROMPT, GOOD, BAD)
    assert len(asked) == 1


def test_a_server_that_fails_for_ever_loses_nothing_that_was_judged(key: str, tmp_path: Path) -> None:
    things = [Item(PROMPT, (GOOD, BAD)), Item(PROMPT, (GOOD, " yes ."))]
    store, cache = feedback.Store(tmp_path / "judgments.sqlite"), tmp_path / "replies.sqlite"
    broken = range(3, 7)

    def fails(n: int, request: dict[str, Any], headers: Any) -> Reply:
        return (500, {}, "") if n in broken else longer(n, request, headers)

    with server(fails) as (url, asked):
        with pytest.raises(FeedbackError, match="answered 500, asked 4 times; earlier replies are kept in .*sqlite"):
            feedback.ask(things, rater_at(url, cache=cache, max_retries=3), store=store)
        assert len(asked) == 3 + 4
        assert asked[6]["at"] - asked[5]["at"] > 0.02  # 0.01 * 2^2, and of that half at least
        assert len(store.judgments()) == 1
        feedback.ask(things, rater_at(url, cache=cache), store=store)
        assert len(asked) == 8 and len(store.judgments()) == 2  # of four replies three were there


def test_a_server_that_does_not_answer_is_given_up_in_one_sentence(key: str) -> None:
    def silent(*_: Any) -> Reply:
        time.sleep(0.6)
        return says("A")

    with (
        server(silent) as (url, asked),
        pytest.raises(FeedbackError, match="gave no answer within 0.2 s, asked 2 times"),
    ):
        rater_at(url, timeout=0.2, max_retries=1).preference(PROMPT, GOOD, BAD)
    assert len(asked) == 2


def test_a_server_that_is_not_there_is_said_so(key: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(FeedbackError, match=r"cannot be reached \(.*refused.*\), asked once"):
        rater_at(f"http://127.0.0.1:{port}/v1", max_retries=0).preference(PROMPT, GOOD, BAD)


@pytest.mark.parametrize("body", ["<html>hello</html>", "[]", '{"choices": []}', '{"choices": [{"message": {}}]}'])
def test_what_is_no_chat_server_is_said_so(key: str, body: str) -> None:
    with server(lambda *_: (200, {}, body)) as (url, _), pytest.raises(FeedbackError, match="chat"):
        rater_at(url).preference(PROMPT, GOOD, BAD)


def test_garbage_is_asked_again_and_then_skipped_with_a_note_never_guessed(key: str) -> None:
    def mumbles(n: int, request: dict[str, Any], headers: Any) -> Reply:
        return says("A or B, who knows?") if n < 2 else longer(n, request, headers)

    with server(mumbles) as (url, asked):
        assert rater_at(url).preference(PROMPT, GOOD, BAD) == 1
        assert [len(one["messages"]) for one in asked] == [1, 3, 5, 1]
    with server(lambda *_: says("both are nice")) as (url, asked):
        judged = feedback.ask([Item(PROMPT, (GOOD, BAD))], rater_at(url))
        assert len(asked) == 3 and judged["ranks"][0] is None
        assert judged["note"][0] == "asked 3 times, endpoint:m never said A or B; its last reply: 'both are nice'"


@pytest.mark.parametrize(
    ("reply", "read"),
    [("A", 0), (" b.", 1), ("**B**", 1), ("Answer: A", 0), ("Better answer: B", 1), ("A good answer is B", None)]
    + [("", None), ("AB", None), ("A or B", None), ("neither", None)],
)
def test_only_the_word_itself_is_an_answer(reply: str, read: int | None) -> None:
    assert read_reply(reply, ("A", "B")) == read


def test_ratings_and_pairs_of_ratings_at_an_endpoint(key: str) -> None:
    with server(lambda n, request, _: says("yes" if "river" in request["messages"][0]["content"] else "no")) as (
        url,
        _,
    ):
        rater = rater_at(url, constitution=None, template=pocket.JUDGE_TEMPLATE)
        assert rater(PROMPT, [GOOD], "good/bad").rating == 1 and rater(PROMPT, [BAD], "good/bad").rating == 0
        assert rater.preference(PROMPT, GOOD, BAD) == 1 and rater.preference(PROMPT, BAD, " no .") == 0.5


def test_requests_keep_the_rate(key: str) -> None:
    with server(longer) as (url, asked):
        rater = rater_at(url, requests_per_minute=240)
        rater.preference(PROMPT, GOOD, BAD), rater.preference(PROMPT, GOOD, " yes .")
        assert asked[3]["at"] - asked[0]["at"] > 3 * 0.25 - 0.15  # the first one takes a while to be sent


def test_what_cannot_work_is_refused_before_anything_is_asked(key: str, tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="base_url 'localhost:8000': is no address"):
        Endpoint("localhost:8000", "m")
    with pytest.raises(FeedbackError, match="keys belong in an environment variable") as error:
        Endpoint("https://me:secret@host/v1", "m")
    assert "secret" not in str(error.value)
    with pytest.raises(FeedbackError, match="the environment variable MY_KEY is not set"):
        Endpoint("http://localhost/v1", "m", key_variable="MY_KEY")
    (tmp_path / "text").write_text("no database, but some words of more than a page" * 99)
    with pytest.raises(FeedbackError, match="text: cannot be used as a cache"):
        Endpoint("http://localhost/v1", "m", cache=tmp_path / "text")
    with server(longer) as (url, asked):
        rater_at(url, key_variable=None).preference(PROMPT, GOOD, BAD)
        assert asked[0]["key"] is None


def test_replies_without_a_count_of_tokens_are_said_so(key: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": "A"}}]})
    with server(lambda *_: (200, {}, body)) as (url, _):
        rater = rater_at(url, price_per_million=(1.0, 1.0))
        rater.preference(PROMPT, GOOD, BAD)
    assert rater.costs().endswith("0 out, price 0.0000 (2 replies came without a count of tokens)")


def test_asking_with_a_label_ends_with_what_it_cost(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server(longer) as (url, _):
        feedback.ask([Item(PROMPT, (GOOD, BAD))], rater_at(url), label="judge")
    assert "endpoint:m: 2 requests, 0 more from the cache, 200 tokens in, 4 out" in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_server_gives_the_answers_of_the_model_itself(judge: str, tmp_path: Path) -> None:
    """`transformers serve` on loopback, offline, on the trained pocket judge."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [
        str(Path(sys.executable).parent / "transformers"),
        "serve",
        judge,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*serve, "--device", "cpu"], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        connection = {"key_variable": None, "max_tokens": 3, "cache": tmp_path / "replies.sqlite"}
        url = f"http://127.0.0.1:{port}/v1"
        remote = EndpointRater(url, judge, template=pocket.JUDGE_TEMPLATE, **connection)
        here = LanguageModelRater(judge)
        for item in written_items(pocket.world(), 20):
            for each in item.completions:
                expected = here(item.prompt, [each], "good/bad").rating
                assert remote(item.prompt, [each], "good/bad").rating == expected
        assert remote.endpoint.tokens_out == 2 * remote.endpoint.asked  # the word and EOS
        answers = pd.DataFrame({"prompt": [PROMPT], "completion": [GOOD]})
        write_there = Endpoint(url, judge, key_variable=None, max_tokens=5)
        frame = feedback.critique_and_revise(write_there, answers, ONE)
        assert frame["revision"][0]
    finally:
        process.terminate()
        process.wait(20)


# Critique and revision ------------------------------------------------------------------------------------------------


def test_each_round_shows_the_last_answer_and_asks_by_the_principle_drawn() -> None:
    rules, seen = feedback.constitution(), []

    def writes(prompts: list[Any]) -> list[str]:
        seen.extend(prompts)
        return [f"text {len(prompt)} {i}" for i, prompt in enumerate(prompts)]

    answers = pd.DataFrame({"prompt": [PROMPT] * 30, "completion": [BAD] * 30, "kind": "ask"})
    frame = feedback.critique_and_revise(writes, answers, rules, rounds=2, seed=3)
    assert len(frame) == 60 and set(frame["principle"]) == {each.name for each in rules.principles}
    one, two = (frame[frame["round"] == number].reset_index(drop=True) for number in (1, 2))
    assert two["answer"].tolist() == one["revision"].tolist() and one["answer"][0] == BAD.strip()
    critique, revise = seen[0], seen[30]
    first = rules[one["principle"][0]]
    assert [message["content"] for message in critique] == [PROMPT, BAD.strip(), first.critique]
    assert [message["content"] for message in revise[2:]] == [first.critique, one["critique"][0], first.revise]
    assert [message["role"] for message in revise] == ["user", "assistant"] * 2 + ["user"]
    same = feedback.critique_and_revise(writes, answers, rules, rounds=2, seed=3)
    assert same["principle"].tolist() == frame["principle"].tolist()
    other = feedback.critique_and_revise(writes, answers, rules, rounds=2, seed=4)
    assert other["principle"].tolist() != frame["principle"].tolist()
    made = feedback.as_demonstrations(frame)
    assert made.to_list() == [{"prompt": PROMPT, "completion": f" {text}"} for text in two["revision"]]


def test_an_empty_revision_leaves_the_answer_and_is_counted() -> None:
    answers = pd.DataFrame({"prompt": [PROMPT] * 2, "completion": [BAD, GOOD]})
    with pytest.warns(UserWarning, match="1 of 2 revisions were empty"):
        frame = feedback.critique_and_revise(lambda prompts: [" ", "better"], answers)
    assert frame["revision"].tolist() == [BAD.strip(), "better"]
    with pytest.raises(FeedbackError, match="no column completion"):
        feedback.critique_and_revise(lambda prompts: [], answers[["prompt"]])
    with pytest.raises(FeedbackError, match="2 texts were asked for, and 1 came back"):
        feedback.critique_and_revise(lambda prompts: ["better"], answers)


@pytest.mark.filterwarnings("ignore:.*revisions were empty")  # a base model may end at once
def test_a_model_directory_writes_and_the_same_seed_writes_the_same() -> None:
    answers = pd.DataFrame({"prompt": [PROMPT] * 2, "completion": [BAD] * 2})
    short = feedback.Constitution((feedback.Principle("p", "which ?", "what is wrong ?", "again ."),))
    one, two = (
        feedback.critique_and_revise(feedback.writer(pocket.BASE_MODEL, 12, seed=seed), answers, short)
        for seed in (5, 5)
    )
    assert one.equals(two) and one["revision"].str.len().min() > 0


def test_chats_are_revised_as_chats() -> None:
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": PROMPT}]
    answers = pd.DataFrame({"prompt": [chat], "completion": [[{"role": "assistant", "content": "no"}]]})
    frame = feedback.critique_and_revise(lambda prompts: ["better"] * len(prompts), answers)
    assert frame["answer"][0] == "no"
    [row] = feedback.as_demonstrations(frame).to_list()
    assert row == {"prompt": chat, "completion": [{"role": "assistant", "content": "better"}]}


def test_the_rule_reader_mends_what_a_principle_names_and_gold_rises() -> None:
    world = pocket.world()
    rng, rows = np.random.default_rng(0), []
    for row in pocket.prompts(world, "train")[:150]:
        rows.append(
            {"prompt": row["prompt"], "completion": write(world, pocket.parse_prompt(row["prompt"]), CARELESS, rng)[0]}
        )
    answers = pd.DataFrame(rows)
    frame = feedback.critique_and_revise(pocket.RuleReader(world), answers, rounds=3)
    before = [pocket.gold(world, *row) for row in answers.itertuples(index=False)]
    rounds = [
        np.mean([pocket.gold(world, p, r) for p, r in zip(part["prompt"], part["revision"], strict=True)])
        for _, part in frame.groupby("round")
    ]
    assert np.mean(before) < rounds[0] < rounds[1] < rounds[2]
    harmless = frame[(frame["principle"] == "harmless") & (frame["critique"] == "harmless")]
    assert len(harmless) > 3
    for row in harmless.itertuples():
        was, now = (pocket.features(world, row.prompt, text) for text in (row.answer, row.revision))
        assert was["harm"] >= now["harm"] == 0 and now["refusal_right"] == 1
    for row in frame[frame["principle"] == "plain"].itertuples():  # what mattered is still there, in its own words
        was, now = (pocket.features(world, row.prompt, text) for text in (row.answer, row.revision))
        assert {part.strip() for part in row.revision.split(" .")} <= {part.strip() for part in row.answer.split(" .")}
        assert all(now[name] >= was[name] for name in ("answer_right", "refusal_right"))
    untouched = frame[frame["critique"] == "no fault"]
    assert (untouched["answer"] == untouched["revision"]).all()


def test_the_rule_reader_knows_the_default_constitution_only() -> None:
    answers = pd.DataFrame({"prompt": [PROMPT], "completion": [BAD]})
    with pytest.raises(FeedbackError, match="principles of the default constitution only"):
        feedback.critique_and_revise(pocket.RuleReader(pocket.world()), answers, ONE)
