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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from scipy.stats import rankdata

from rlhf_kit import feedback, stats
from rlhf_kit.feedback import Answer, EndpointRater, FeedbackError, Item, LanguageModelRater, Principle, Template
from rlhf_kit.feedback.constitution import read_reply
from rlhf_kit.feedback.judging import as_row, judgments_frame
from rlhf_kit.feedback.language_model import ModelRater, _as_rows
from rlhf_kit.models import load_causal, load_tokenizer
from rlhf_kit.tasks import Pocket, pocket
from rlhf_kit.tasks.pocket.answers import CARELESS, DEMONSTRATION, write

PROMPT = "where does the otter live ?"
GOOD, BAD = " the otter lives by the river .", " i am not sure ."
RATE = "{prompt} {completion} is this good ?"
PAIR = Template("{prompt} this is {first} that is {second} which is best ?", RATE, ("this", "that"), chat=False)
ASKED = Template("{question} {prompt} {first} {second} ?", RATE, ("this", "that"), chat=False)
ONE = [Principle("short", "which is short ?", "say it", "mend it")]
ITEM = Item(PROMPT, (GOOD, BAD))


def preference(rater: ModelRater, a: Any = GOOD, b: Any = BAD, prompt: Any = PROMPT) -> float:
    return rater.preferences([prompt], [a], [b])[0]


def preferred(good: str = GOOD, bad: str = BAD) -> pd.DataFrame:
    """A judgment that the one is better than the other."""
    row = as_row(Item(PROMPT, (good, bad)), "ana", "rank", Answer(ranks=(1, 2)), (0, 1), None, "test")
    return judgments_frame([row])


FAULTS = {
    "principles: [": "expected the node content",
    "rules: 3": "'principles'",
    "principles:\n- just words": "after 0 principles.*must be a mapping",
    "principles:\n- {name: a, compare: b, critique: c, revise: d, why: e}": "'why'",
    "principles:\n- {name: a, compare: b, critique: c, revise: 3}": "needs texts",
    "principles:\n- {name: a, compare: b, critique: c, revise: d, weight: .nan}": "weight above 0",
    "principles:\n- &p {name: a, compare: b, critique: c, revise: d}\n- *p": "a name of its own",
}


@pytest.mark.parametrize("text", [None, *FAULTS])
def test_a_faulty_constitution_is_refused_in_a_sentence(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(FeedbackError, match=f"^{path}.*{FAULTS.get(text or '', 'No such file')}") as error:
        feedback.constitution(path)
    assert "\n" not in str(error.value)


# A causal LM read at its answer token ---------------------------------------------------------------------------------


def by_hand(model: str | Path, text: str, words: tuple[str, str], space: str = " ") -> float:
    """P(first word) of the two from the model's own logits after a text."""
    tokenizer, loaded = load_tokenizer(model), load_causal(model).eval()
    first, second = (tokenizer(space + word)["input_ids"] for word in words)
    logits = tiny.naive_logits(loaded, tokenizer(text)["input_ids"], first)[0]
    return float(torch.softmax(logits[[first[0], second[0]]], 0)[0])


def test_a_preference_is_the_mean_over_both_orders_of_the_answer_words_probability(
    zoo: dict[str, str], mode: str
) -> None:
    rater = LanguageModelRater(zoo[mode], template=PAIR)
    ab = by_hand(zoo[mode], PAIR.comparison(PROMPT, GOOD, BAD, ""), PAIR.choices)
    ba = by_hand(zoo[mode], PAIR.comparison(PROMPT, BAD, GOOD, ""), PAIR.choices)
    assert preference(rater) == pytest.approx((ab + 1 - ba) / 2, abs=2e-5)
    assert rater.firsts == pytest.approx([(ab + ba) / 2], abs=2e-5)
    assert abs(rater.firsts[0] - 0.5) > 0.02  # there is a bias to cancel


@pytest.mark.parametrize("template", [PAIR, pocket.JUDGE_TEMPLATE], ids=["pair", "alone"])
def test_the_two_orders_cancel_exactly_and_many_rows_are_the_rows_one_by_one(
    zoo: dict[str, str], template: Template
) -> None:
    rater = LanguageModelRater(zoo["gpt2"], template=template, batch_size=3)
    answers = [GOOD, BAD, " the otter eats fish .", " yes ."]
    a, b = zip(*((one, other) for one in answers for other in answers), strict=True)
    together, turned = (np.array(rater.preferences([PROMPT] * 16, *order)) for order in ((a, b), (b, a)))
    assert (together + turned == 1).all() and (together[::5] == 0.5).all()  # each fifth is an answer against itself
    assert together == pytest.approx([preference(rater, *pair) for pair in zip(a, b, strict=True)], abs=1e-5)


def test_principles_count_by_their_weights(zoo: dict[str, str]) -> None:
    two = [replace(ONE[0], weight=3), Principle("true", "which is true ?", "say it", "mend it")]
    p, q, both = (preference(LanguageModelRater(zoo["full"], two, name, ASKED)) for name in ("short", "true", None))
    assert abs(p - q) > 1e-3 and both == pytest.approx((3 * p + q) / 4, abs=1e-6)
    for template in (PAIR, ASKED):  # one has no place for a question, the other is asked about another one
        with pytest.raises(FeedbackError, match="principle 'kind': is not asked about"):
            LanguageModelRater(zoo["full"], principle="kind", template=template)


def test_a_chat_model_is_asked_through_its_chat_template(zoo: dict[str, str], tmp_path: Path) -> None:
    """Its answer comes right after the generation prompt, without a space."""
    tokenizer = load_tokenizer(zoo["full"])
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}:"
    load_causal(zoo["full"]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = replace(PAIR, choices=("A", "B"), verdicts=("y", "n"), chat=True)
    texts = [f"[{template.comparison(PROMPT, *pair, '')}]:" for pair in ((GOOD, BAD), (BAD, GOOD))]
    ab, ba = (by_hand(tmp_path, text, template.choices, space="") for text in texts)
    good, bad, prompt = ([{"role": "x", "content": text}] for text in (GOOD, BAD, PROMPT))
    p = preference(LanguageModelRater(tmp_path, template=template), good, bad, prompt)
    assert p == pytest.approx((ab + 1 - ba) / 2, abs=2e-5)


def test_what_a_model_cannot_answer_is_refused(zoo: dict[str, str], tmp_path: Path) -> None:
    for words in (("former", "latter"), ("this", "this")):
        with pytest.raises(FeedbackError, match="are not two single tokens .* other answer words"):
            LanguageModelRater(zoo["full"], template=replace(PAIR, choices=words))
    rater = LanguageModelRater(zoo["full"], template=PAIR)
    with pytest.raises(FeedbackError, match="of 7[0-9] tokens and its answer exceed the model's 64 positions"):
        preference(rater, GOOD * 8)
    with pytest.raises(FeedbackError, match="'1-7' is for people"):
        rater(PROMPT, [GOOD], "1-7")
    with pytest.raises(FeedbackError, match="a judgment of 7[0-9] tokens exceeds the 64 positions"):
        feedback.train_judge(zoo["full"], preferred(GOOD * 9), tmp_path / "judge", pocket.JUDGE_TEMPLATE)


def test_a_judge_answers_as_a_rater_and_is_a_reward(zoo: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    rater = LanguageModelRater(zoo["full"], template=PAIR, name="judge")
    answers = (GOOD, BAD, " the otter eats fish .")
    p = np.array([[preference(rater, one, other) for other in answers] for one in answers])
    assert rater(PROMPT, answers, "rank").ranks == tuple(rankdata(-p.mean(1)))
    judged = feedback.ask([ITEM], rater)
    assert "judged by judge  1/1  left 0:00" in capsys.readouterr().out
    assert judged["ranks"][0][int(p[0, 1] < 0.5)] == 1 and judged["rater"][0] == "judge"
    hand = by_hand(zoo["full"], PAIR.rating(PROMPT, GOOD), PAIR.verdicts)
    [odds] = rater.as_reward()([PROMPT], [GOOD])
    assert odds == pytest.approx(math.log(hand / (1 - hand)), abs=1e-4)
    assert rater(PROMPT, [GOOD], "good/bad") == Answer(rating=int(odds > 0), note=f"P(yes) {hand:.4f}")


class Fixed(ModelRater):
    """A model that rates each completion by the log-odds that it holds."""

    def _log_odds(self, texts: list[str], words: tuple[str, str]) -> list[float]:
        return [float(text) for text in texts]


@pytest.mark.parametrize(
    ("p", "ranks", "strength"),
    [(0.5, (1, 1), None), (0.6, (1, 2), "slightly"), (0.25, (2, 1), "clearly"), (0.9001, (1, 2), "much")],
)
def test_strength_follows_the_probability(p: float, ranks: tuple[int, ...], strength: str | None) -> None:
    rater = Fixed("fixed", Template("", "{completion}"))
    answer = rater(PROMPT, [str(math.log(p / (1 - p)) + 2), "2"], "rank")
    assert answer == Answer(ranks=ranks, strength=strength, note=f"preferred {p:.4f} {1 - p:.4f}")


# A judge of pocket size -----------------------------------------------------------------------------------------------


def written_items(world: pocket.World, n: int) -> list[Item]:
    """Pairs of answers that the world wrote well or carelessly."""
    rng, found = np.random.default_rng(0), []
    for row in Pocket(world).prompts("preference").to_list()[:n]:
        asked = pocket.parse_prompt(row["prompt"])
        pair = [write(world, asked, DEMONSTRATION if rng.random() < 0.5 else CARELESS, rng)[0] for _ in range(2)]
        if pair[0] != pair[1]:
            found.append(Item(row["prompt"], tuple(pair)))
    return found


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A pocket judge who learnt from a simulated rater; the first 600 of `written_items` it has not seen."""
    judgments = feedback.ask(written_items(pocket.world(), 2400)[600:], Pocket().rater())
    settings = {"max_steps": 130, "per_device_train_batch_size": 16, "learning_rate": 1e-3}
    out = tmp_path_factory.mktemp("judge") / "judge"
    return feedback.train_judge(Pocket.base_model, judgments, out, pocket.JUDGE_TEMPLATE, **settings)


@pytest.mark.slow
def test_a_judge_trained_on_a_raters_judgments_agrees_with_gold_better_than_chance(judge: str) -> None:
    world = pocket.world()
    held_out = written_items(world, 2400)[:600]
    gaps = np.array([np.subtract(*(pocket.gold(world, item.prompt, c) for c in item.completions)) for item in held_out])
    rater = LanguageModelRater(judge)
    assert rater.template == pocket.JUDGE_TEMPLATE  # as the directory remembers
    prompts, first, second = zip(*((item.prompt, *item.completions) for item in held_out), strict=True)
    p = np.array(rater.preferences(prompts, first, second))
    agreement = stats.bootstrap(((p > 0.5) == (gaps > 0))[gaps != 0].astype(float))
    print(f"the judge agrees with gold in {agreement}")
    assert agreement.lo > 0.5


def test_both_orders_of_a_pair_are_training_rows() -> None:
    ab, ba = (PAIR.comparison(PROMPT, *pair, "") for pair in ((GOOD, BAD), (BAD, GOOD)))
    assert _as_rows(preferred(), PAIR) == [(ab, "this"), (ba, "that")]
    good, bad = (pocket.JUDGE_TEMPLATE.rating(PROMPT, each) for each in (GOOD, BAD))
    assert _as_rows(preferred(), pocket.JUDGE_TEMPLATE) == [(good, "yes"), (bad, "no")]


# Endpoints ------------------------------------------------------------------------------------------------------------

KEY = "sk-test-0123456789"
SOON = {"retry-after-ms": "10"}
Reply = tuple[int, dict[str, str], str]
Behaviour = Callable[[int, dict[str, Any], Any], Reply]


@contextmanager
def server(behave: Behaviour) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A real server on loopback that answers request number n with (status, headers, body), and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(request | {"path": self.path, "key": self.headers.get("Authorization")})
            status, headers, body = behave(len(asked) - 1, request, self.headers)
            with suppress(BrokenPipeError):  # who asked may have gone
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body.encode()))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd, ThreadPoolExecutor(1) as background:
        background.submit(httpd.serve_forever, 0.01)
        try:
            yield f"http://127.0.0.1:{httpd.server_port}/v1", asked
        finally:
            httpd.shutdown()


def says(text: str, **usage: int) -> Reply:
    return 200, {}, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage or None})


def longer(n: int, request: dict[str, Any], headers: Any) -> Reply:
    """A judge who prefers the longer answer, whatever its place."""
    text = request["messages"][0]["content"]
    first, second = (text.split(mark)[1].split("\n\n")[0] for mark in ("[Answer A]\n", "[Answer B]\n"))
    return says("A" if len(first) > len(second) else "B", prompt_tokens=100, completion_tokens=2)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def rater_at(url: str, **changed: Any) -> EndpointRater:
    return EndpointRater(url, "m", **{"constitution": ONE, "timeout": 5.0, **changed})


def chat(text: str, role: str = "user") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def test_both_orders_are_asked_and_averaged_and_the_key_goes_in_the_header_only() -> None:
    with server(longer) as (url, asked):
        rater = rater_at(url, price_per_million=(1.0, 10.0))
        assert preference(rater) == 1 and preference(rater, BAD, GOOD) == 0
    assert [one.pop("key") for one in asked] == [f"Bearer {KEY}"] * 4 and KEY not in json.dumps(asked)
    assert asked[0]["path"] == "/v1/chat/completions" and asked[0]["model"] == "m" and asked[0]["temperature"] == 0
    assert "which is short ?" in asked[0]["messages"][0]["content"] and rater.firsts == [0.5, 0.5]
    assert rater.costs() == "4 requests, 0 more from the cache, 400 tokens in, 8 out, price 0.0005"
    with server(lambda *_: says("Answer: **A**.")) as (url, _):
        rater = rater_at(url)
        assert rater(PROMPT, [GOOD, BAD], "rank").ranks == (1, 1) and rater.firsts == [1]


def test_requests_are_sent_together_and_replies_come_in_the_order_of_the_prompts() -> None:
    together = threading.Barrier(4, timeout=10)

    def waits(n: int, request: dict[str, Any], headers: Any) -> Reply:
        together.wait()  # until four requests have come
        time.sleep(0.05 / (1 + n))  # the first is the slowest
        return says(request["messages"][-1]["content"])

    with server(waits) as (url, _):
        assert rater_at(url).replies([chat(text) for text in "abcd"]) == list("abcd")


def test_a_second_run_costs_nothing_and_says_so(tmp_path: Path) -> None:
    things, cache = [ITEM, Item(PROMPT, (GOOD, " yes ."))], tmp_path / "replies.sqlite"
    with server(longer) as (url, asked):
        first = feedback.ask(things, rater_at(url, cache=cache))
        rater = rater_at(url, cache=cache)
        assert feedback.ask(things, rater)["ranks"].tolist() == first["ranks"].tolist() == [[1, 2], [1, 2]]
        assert rater.costs() == "0 requests, 4 more from the cache, 0 tokens in, 0 out" and len(asked) == 4
        preference(rater_at(url, cache=cache, temperature=1.0))  # another request
        assert len(asked) == 6


def test_the_key_is_nowhere_but_on_the_wire(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Even if a server repeats it, in an error or in a reply."""
    caplog.set_level(0)

    def repeats(n: int, request: dict[str, Any], headers: Any) -> Reply:
        said = f"I was sent {headers['Authorization']}"
        return says(said) if n < 6 else (400, {}, said)

    with server(repeats) as (url, _):
        rater = rater_at(url, cache=tmp_path / "replies.sqlite")
        note = rater(PROMPT, [GOOD, BAD], "rank").note
        assert "[key]" in note
        with pytest.raises(FeedbackError, match=r"\(400: I was sent Bearer \[key\];") as error:
            rater(PROMPT, [GOOD, " yes ."], "rank")
    said = capsys.readouterr()
    seen = [note, str(error.value), said.out, said.err, caplog.text, repr(rater), str(vars(rater))]
    seen += [str(vars(rater._client)), *(str(path.read_bytes()) for path in tmp_path.iterdir())]
    assert not [text for text in seen if KEY in text]


@pytest.mark.parametrize(
    ("reply", "requests", "says_so"),
    [
        ((401, {}, f"no, {KEY}"), 1, r"\(401: no, \[key\]; .*; check .* key_variable='OPENAI_API_KEY'"),
        ((422, {}, "too\nlong"), 1, r"\(422: too long;"),
        ((500, SOON, ""), 3, r"\(500:; .*max_retries=2\).*kept in no file \(no cache"),
        ((429, {"Retry-After": "7200"}, ""), 1, r"\(429:; Retry-After: 7200, "),
        ((200, {}, "<html>hello</html>"), 1, "answered without a message; is base_url that of a chat"),
        ((200, {"Content-Type": "application/json"}, "<html>"), 1, "answered without a message"),
        ((200, {}, '{"choices": []}'), 1, "answered without a message"),
        ((200, {}, '{"choices": [{"message": {}}]}'), 1, "answered without a message"),
        ((200, {}, '{"choices": {"message": "A"}}'), 1, "answered without a message"),
        ((200, {}, '["A"]'), 1, "answered without a message"),
        ((200, {}, "[" * 100_000), 1, "answered without a message"),
        ((200, {}, '{"error": {"message": "no such model"}}'), 1, "answered without a message.*no such model"),
    ],
)
def test_what_a_server_refuses_is_one_sentence_without_the_key(reply: Reply, requests: int, says_so: str) -> None:
    with server(lambda *_: reply) as (url, asked):
        with pytest.raises(FeedbackError, match=f"m at {url}: .*{says_so}") as error:
            rater_at(url, max_retries=2).replies([chat("hello")])
        assert len(asked) == requests and KEY not in str(error.value) and "\n" not in str(error.value)


def test_the_first_error_ends_a_batch_and_a_prompt_goes_to_no_other_server() -> None:
    with server(lambda *_: says("A")) as (elsewhere, asked_elsewhere):
        moved = (307, {"Location": f"{elsewhere}/chat/completions"}, "")
        with server(lambda *_: moved) as (url, asked), pytest.raises(FeedbackError, match=r"gave no answer \(307"):
            rater_at(url, concurrency=2).replies([chat(str(i)) for i in range(100)])
    assert len(asked) < 20 and not asked_elsewhere


def test_a_server_that_fails_for_ever_loses_nothing_that_was_judged(tmp_path: Path) -> None:
    things = [ITEM, Item(PROMPT, (GOOD, " yes ."))]
    store, cache = feedback.Store(tmp_path / "judgments.sqlite"), tmp_path / "replies.sqlite"
    with server(lambda n, *rest: (500, SOON, "") if 3 <= n < 7 else longer(n, *rest)) as (url, asked):
        with pytest.raises(FeedbackError, match="gave no answer .500:.*kept in .*sqlite"):
            feedback.ask(things, rater_at(url, cache=cache, max_retries=3, concurrency=1), store=store)
        assert len(asked) == 3 + 4 and len(store.judgments()) == 1
        feedback.ask(things, rater_at(url, cache=cache), store=store)
        assert len(asked) == 8 and len(store.judgments()) == 2  # of four replies three were there


def test_a_server_that_is_silent_or_not_there_is_given_up_in_one_sentence() -> None:
    silence = threading.Event()
    with server(lambda *_: (silence.wait(5), says("A"))[1]) as (url, asked):
        with pytest.raises(FeedbackError, match=r"gave no answer \(Request timed out.*timeout=0.1 s, max_retries=0\)"):
            rater_at(url, timeout=0.1, max_retries=0).replies([chat("hello")])
        silence.set()
    with pytest.raises(FeedbackError, match=r"gave no answer \(Connection error.*refused; timeout=5.0 s"):
        rater_at(url, max_retries=0).replies([chat("hello")])  # its server has gone


def test_garbage_is_asked_again_and_then_skipped_with_a_note_never_guessed() -> None:
    with server(lambda n, *rest: says("A or B, who knows?") if n < 2 else longer(n, *rest)) as (url, asked):
        assert preference(rater_at(url, concurrency=1)) == 1
        assert [len(one["messages"]) for one in asked] == [1, 1, 3, 3]
    with server(lambda *_: says("both are nice")) as (url, asked):
        rater = rater_at(url)
        judged = feedback.ask([ITEM], rater)
        assert len(asked) == 6 and judged["ranks"][0] is None and not rater.firsts
        assert judged["note"][0] == "asked 3 times, endpoint:m gave no answer word; its last reply: 'both are nice'"


def test_what_is_long_or_broken_is_kept_and_not_paid_for_again(tmp_path: Path) -> None:
    odd = json.dumps({"choices": [{"message": {"content": "\ud83d " + "w" * 10**6}}], "usage": {"prompt_tokens": "x"}})
    with server(lambda *_: (200, {}, odd)) as (url, asked):
        rater = rater_at(url, cache=tmp_path / "replies.sqlite")
        assert rater(PROMPT, [GOOD], "good/bad").note.startswith("asked 3 times")
    assert [len(str(one["messages"])) < 5000 for one in asked] == [True] * 3 and rater.counts["in"] == 0


def test_only_the_word_itself_is_an_answer() -> None:
    read = {"A": 0, " b.": 1, "**B**": 1, "Better answer: B": 1, "A good answer is B": None, "": None}
    read |= {"AB": None, "A or B": None}
    assert {reply: read_reply(reply, ("A", "B")) for reply in read} == read
    assert read_reply("ye\u017f", ("yes", "no")) == 0  # a long s, which is an s in any case


def test_ratings_and_pairs_of_ratings_at_an_endpoint_without_keys_or_counts() -> None:
    with server(lambda n, request, _: says("yes" if "river" in str(request) else "no")) as (url, asked):
        rater = EndpointRater(url, "m", template=pocket.JUDGE_TEMPLATE, key_variable=None, price_per_million=(1, 1))
        assert rater(PROMPT, [GOOD], "good/bad").rating == 1 and rater(PROMPT, [BAD], "good/bad").rating == 0
        assert preference(rater) == 1 and preference(rater, BAD, " no .") == 0.5
        assert {one["key"] for one in asked} == {None}
    assert rater.costs().endswith("0 tokens in, 0 out, price 0.0000")


def test_what_cannot_work_is_refused_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("localhost:8000", "https://me:secret@host/v1", "https://host/v1?key=secret"):
        with pytest.raises(FeedbackError, match="base_url: is an address such as .* environment variable") as error:
            rater_at(url)
        assert "secret" not in str(error.value)
    with pytest.raises(FeedbackError, match="the environment variable MY_KEY is not set or holds no key"):
        rater_at("http://localhost/v1", key_variable="MY_KEY")
    (tmp_path / "text").write_text("no database, but some words of more than a page" * 99)
    with pytest.raises(FeedbackError, match="text: cannot be used as a cache"):
        rater_at("http://localhost/v1", cache=tmp_path / "text")
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    with pytest.raises(FeedbackError, match=r"needs the openai package: pip install 'rlhf-kit\[endpoint\]'"):
        rater_at("http://localhost/v1")


@pytest.mark.slow
def test_a_real_server_gives_the_answers_of_the_model_itself(judge: str, tmp_path: Path) -> None:
    """`transformers serve` on loopback, offline, on the trained pocket judge."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [Path(sys.executable).parent / "transformers", "serve", judge, "--host", "127.0.0.1", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([*serve, "--port", str(port)], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        connection = {"key_variable": None, "max_tokens": 3, "cache": tmp_path / "replies.sqlite"}
        remote = EndpointRater(f"http://127.0.0.1:{port}/v1", judge, template=pocket.JUDGE_TEMPLATE, **connection)
        here = LanguageModelRater(judge)
        for item in written_items(pocket.world(), 10):
            for each in item.completions:
                expected = here(item.prompt, [each], "good/bad").rating
                assert remote(item.prompt, [each], "good/bad").rating == expected
        assert remote.counts["out"] == 2 * remote.counts["asked"]  # the word and EOS
        answers = pd.DataFrame({"prompt": [PROMPT], "completion": [GOOD]})
        assert feedback.critique_and_revise(remote.replies, answers, ONE)["revision"][0]
    finally:
        process.terminate()
        process.wait(20)


# Critique and revision ------------------------------------------------------------------------------------------------


def test_each_round_shows_the_last_answer_and_asks_by_the_principle_drawn() -> None:
    rules, seen = feedback.constitution(), []

    def writes(prompts: Any) -> list[str]:
        seen.extend(prompts)
        return [f"text {len(prompt)} {i}" for i, prompt in enumerate(prompts)]

    answers = pd.DataFrame({"prompt": [PROMPT] * 30, "completion": [BAD] * 30, "kind": "ask"})
    frame = feedback.critique_and_revise(writes, answers, rules, rounds=2, seed=3)
    assert len(frame) == 60 and set(frame["principle"]) == {each.name for each in rules}
    one, two = (frame[frame["round"] == number].reset_index(drop=True) for number in (1, 2))
    assert two["answer"].tolist() == one["revision"].tolist() and one["answer"][0] == BAD.strip()
    critique, revise = seen[0], seen[30]
    first = next(each for each in rules if each.name == one["principle"][0])
    assert [message["content"] for message in critique] == [PROMPT, BAD.strip(), first.critique]
    assert [message["content"] for message in revise[2:]] == [first.critique, one["critique"][0], first.revise]
    assert [message["role"] for message in revise] == ["user", "assistant"] * 2 + ["user"]
    same, other = (feedback.critique_and_revise(writes, answers, rules, rounds=2, seed=s)["principle"] for s in (3, 4))
    assert same.tolist() == frame["principle"].tolist() != other.tolist()
    made = feedback.as_demonstrations(frame)
    assert made.to_list() == [{"prompt": PROMPT, "completion": f" {text}"} for text in two["revision"]]


def test_an_empty_revision_leaves_the_answer_and_is_counted_and_chats_stay_chats() -> None:
    prompt = [*chat("be kind", "system"), *chat(PROMPT)]
    answers = pd.DataFrame({"prompt": [prompt] * 2, "completion": [chat(text, "assistant") for text in (BAD, GOOD)]})
    with pytest.warns(UserWarning, match="1 of 2 revisions were empty"):
        frame = feedback.critique_and_revise(lambda prompts: [" ", "better"], answers)
    assert frame["answer"].tolist() == [BAD.strip(), GOOD.strip()]
    made = feedback.as_demonstrations(frame)["completion"][:]
    assert made == [chat(BAD.strip(), "assistant"), chat("better", "assistant")]
    with pytest.raises(ValueError, match="shorter"):
        feedback.critique_and_revise(lambda prompts: ["better"], answers)


def test_the_rule_reader_mends_what_a_principle_names_and_gold_rises() -> None:
    world, rng = pocket.world(), np.random.default_rng(0)
    prompts = Pocket(world).prompts("train", 150)["prompt"][:]
    answers = [write(world, pocket.parse_prompt(prompt), CARELESS, rng)[0] for prompt in prompts]
    frame = pd.DataFrame({"prompt": prompts, "completion": answers})
    frame = feedback.critique_and_revise(pocket.RuleReader(world), frame, rounds=3)
    for column in ("answer", "revision"):
        pairs = zip(frame["prompt"], frame[column], strict=True)
        frame[f"gold_{column}"] = [pocket.gold(world, *pair) for pair in pairs]
    means = frame.groupby("round")[["gold_answer", "gold_revision"]].mean().to_numpy()
    assert means[0, 0] < means[0, 1] < means[1, 1] < means[2, 1]
    harmless = 0
    for row in frame.itertuples():
        was, now = (pocket.features(world, row.prompt, text) for text in (row.answer, row.revision))
        if row.critique == "no fault":
            assert row.answer == row.revision
        if row.critique == row.principle == "harmless":
            harmless += 1
            assert was["harm"] >= now["harm"] == 0 and now["refusal_right"] == 1
        if row.principle == "plain":  # what mattered is still there, in its own words
            before, after = ({part.strip() for part in text.split(" .")} for text in (row.answer, row.revision))
            assert after <= before and all(now[name] >= was[name] for name in ("answer_right", "refusal_right"))
    assert harmless > 3
    with pytest.raises(FeedbackError, match="principles of the default constitution only"):
        feedback.critique_and_revise(pocket.RuleReader(world), frame.assign(completion=BAD), ONE)
