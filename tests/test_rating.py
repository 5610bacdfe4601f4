"""The rating page behind its looks: what it asks, what it keeps, what it refuses, and who may open it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import rlhf_kit as rk
from rlhf_kit import cli, rating
from rlhf_kit.data import DataError
from rlhf_kit.feedback import FeedbackError, Item, Store
from rlhf_kit.rating import Page, Session

ROOT = Path(__file__).resolve().parent.parent
PAIRS = [Item(f"is {i} even ?", (f"yes , {i} is .", f"no , {i} is odd ."), {"model": "secret-7b"}) for i in range(5)]
TRIPLE = Item("how many ?", ("one", "two", "three"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "judgments.db")


def best(session: Session, completion: int) -> dict[str, Any]:
    """The completion of the item, as the item has it, is said to be the better one."""
    state = session.state()
    item = session._showing.item  # type: ignore[union-attr]
    first = state["completions"][0][0]["content"] == item.completions[completion]
    return session.act({"do": "answer", "showing": state["showing"], "ranks": [1, 2] if first else [2, 1]})


def texts(state: dict[str, Any]) -> list[str]:
    return [state["prompt"][0]["content"], *(turns[0]["content"] for turns in state["completions"])]


# The session ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_was_chosen_in_the_items_own_order(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    for i in range(5):
        assert best(session, i % 2)["error"] is None
    assert session.state()["done"]
    assert list(store.judgments()["ranks"]) == [[1, 2], [2, 1], [1, 2], [2, 1], [1, 2]]
    assert set(store.judgments()["rater"]) == {"ana"}


@pytest.mark.parametrize("repeats", [-1, 6])
def test_no_more_repeats_than_items(store: Store, repeats: int) -> None:
    with pytest.raises(FeedbackError, match=f"repeats={repeats}, but there are 5 different items"):
        Session(store, PAIRS, "ana", repeats=repeats)


def test_the_page_is_told_neither_the_columns_nor_the_models(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    assert "secret" not in json.dumps(session.state())
    assert "model" not in json.dumps(session.state())


def test_each_completion_is_shown_first_about_half_the_time(store: Store) -> None:
    many = [Item(f"question {i}", ("a", "b")) for i in range(200)]
    session = Session(store, many, "ana")
    shown = [session._order(item) for item in many]
    first = sum(order == (0, 1) for order in shown)
    assert 75 <= first <= 125  # 3.5 standard deviations
    other = Session(store, many, "ben")
    assert [other._order(item) for item in many] != shown


def test_after_a_restart_the_same_item_comes_in_the_same_order_and_nothing_is_asked_twice(store: Store) -> None:
    session = Session(store, PAIRS, "ana", seed=3)
    for _ in range(2):
        best(session, 0)
    before = session.state()
    again = Session(Store(store.path), PAIRS, "ana", seed=4)  # another seed: what was shown stays as it was shown
    assert texts(again.state()) == texts(before)
    assert again.state()["showing"] == before["showing"]
    assert (again.state()["position"], again.state()["total"]) == (3, 5)
    while not again.state()["done"]:
        best(again, 0)
    assert sorted(store.judgments()["item"]) == sorted(item.id for item in PAIRS)


def test_items_come_again_at_the_end_with_their_sides_swapped_and_resume_and_undo_hold_there(store: Store) -> None:
    session = Session(store, PAIRS, "ana", seed=1, repeats=2)
    assert session.state()["total"] == 7
    for _ in range(5):
        best(session, 0)
    assert not session.state()["done"]
    sixth = texts(session.state())
    session = Session(Store(store.path), PAIRS, "ana", seed=1, repeats=2)  # stopped, and opened again
    assert texts(session.state()) == sixth
    assert best(session, 1)["error"] is None
    undone = session.act({"do": "undo", "showing": session.state()["showing"]})
    assert (texts(undone), undone["position"], undone["total"]) == (sixth, 6, 7)
    best(session, 1)
    assert best(session, 0)["done"]
    judged = store.judgments()
    first, again = judged.iloc[:5].set_index("item"), judged.iloc[5:].set_index("item")
    assert list(first.index) == [item.id for item in PAIRS] and again.index.is_unique
    for item, row in again.iterrows():
        assert row["shown"] == first.loc[item, "shown"][::-1]
    assert list(again["ranks"]) == [[2, 1], [1, 2]]
    table, _ = rk.feedback.report(store)
    assert tuple(table[["repeats", "repeats_changed", "swaps", "changed"]].iloc[0]) == (2, 0.5, 2, 1)


def test_a_repeat_open_in_two_tabs_is_judged_once_more_and_not_twice(store: Store) -> None:
    pages = [Session(store, PAIRS[:1], "ana", repeats=1) for _ in range(2)]
    best(pages[0], 0)
    refused = best(pages[1], 0)  # the second tab has the item as it came first
    assert "another tab or cell" in refused["error"] and not refused["done"]
    assert best(pages[1], 0)["done"] and "another tab" in best(pages[0], 0)["error"]
    assert len(store.judgments()) == 2


def test_two_raters_do_not_see_each_others_progress(store: Store) -> None:
    best(Session(store, PAIRS, "ana"), 0)
    assert Session(store, PAIRS, "ben").state()["position"] == 1


def test_the_second_half_of_a_double_click_judges_nothing(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    click = {"do": "answer", "showing": session.state()["showing"], "ranks": [1, 2]}
    assert session.act(click)["error"] is None
    after = session.act(click)
    assert "out of date" in after["error"]
    assert (len(store.judgments()), after["position"]) == (1, 2)
    assert session.act({"do": "skip", "showing": after["showing"]})["error"] is None  # and the page goes on


def test_an_old_page_is_refused_and_then_stands_where_the_new_one_does(store: Store) -> None:
    old = Session(store, PAIRS, "ana")
    best(old, 0)
    new = Session(store, PAIRS, "ana")
    best(new, 0)
    refused = best(old, 1)
    assert refused["error"] == "nothing was recorded: ana has gone on in another tab or cell; this item is open now"
    assert texts(refused) == texts(new.state())
    assert len(store.judgments()) == 2


def test_an_old_page_takes_back_nothing(store: Store) -> None:
    old = Session(store, PAIRS, "ana")
    best(old, 0)
    best(Session(store, PAIRS, "ana"), 0)
    refused = old.act({"do": "undo", "showing": old.state()["showing"]})
    assert "another tab or cell" in refused["error"]
    assert (len(store.judgments()), refused["position"]) == (2, 3)


def test_an_item_shown_in_two_tabs_is_judged_once(store: Store) -> None:
    store.add(PAIRS)
    one = store.show(PAIRS[0], "ana", "rank", (0, 1))
    other = store.show(PAIRS[0], "ana", "rank", (1, 0))
    session = Session(store, PAIRS, "ana")
    assert session.state()["showing"] == other.showing
    best(session, 0)
    with pytest.raises(FeedbackError, match="judged this item before, as judgment 1"):
        store.record(one.showing, "ana", rk.feedback.Answer(ranks=(1, 2)), 1.0, "test")


def test_undo_takes_back_the_last_and_shows_it_in_the_same_order_also_after_a_restart(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    best(session, 0)
    second = texts(session.state())
    best(session, 0)
    session = Session(store, PAIRS, "ana", seed=9)
    undone = session.act({"do": "undo", "showing": session.state()["showing"]})
    assert undone["error"] is None and undone["position"] == 2
    assert texts(undone) == second
    best(session, 1)
    assert list(store.judgments()["ranks"]) == [[1, 2], [2, 1]]
    assert list(store.judgments(withdrawn=True)["withdrawn"]) == [False, True, False]
    assert len(session.made) == 1


def test_undo_with_nothing_to_take_back_says_so(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    assert not session.state()["can_undo"]
    assert "no judgment to take back" in session.act({"do": "undo", "showing": session.state()["showing"]})["error"]


def test_undo_works_when_all_is_done(store: Store) -> None:
    session = Session(store, PAIRS[:1], "ana")
    assert best(session, 0)["done"]
    undone = session.act({"do": "undo", "showing": None})
    assert not undone["done"] and undone["showing"] is not None


def test_a_skipped_item_is_kept_as_skipped_and_counted(store: Store) -> None:
    session = Session(store, PAIRS[:2], "ana")
    session.act({"do": "skip", "showing": session.state()["showing"], "note": "both garbled"})
    row = store.judgments().iloc[0]
    assert row["ranks"] is None and row["note"] == "both garbled"
    best(session, 0)
    assert (session.state()["judged"], session.state()["skipped"]) == (2, 1)


def test_a_strength_a_tie_and_a_ranking_are_kept(store: Store) -> None:
    pair = Session(store, PAIRS[:2], "ana")
    strong = {"do": "answer", "showing": pair.state()["showing"], "ranks": [2, 1], "strength": "clearly"}
    assert pair.act(strong)["error"] is None
    assert pair.act({"do": "answer", "showing": pair.state()["showing"], "ranks": [1, 1]})["error"] is None
    three = Session(store, [TRIPLE], "ana")
    shown = three._showing.shown  # type: ignore[union-attr]
    three.act({"do": "answer", "showing": three.state()["showing"], "ranks": [2, 1, 1]})
    strengths, ranks = list(store.judgments()["strength"]), list(store.judgments()["ranks"])
    assert strengths == ["clearly", None, None]
    assert ranks[1] == [1, 1]
    assert [ranks[2][completion] for completion in shown] == [2, 1, 1]


@pytest.mark.parametrize(("question", "right", "wrong"), [("good/bad", 0, 2), ("1-7", 7, 8)])
def test_ratings_keep_to_their_scale(store: Store, question: Any, right: int, wrong: int) -> None:
    session = Session(store, [Item("a ?", ("b",)), Item("c ?", ("d",))], "ana", question)
    showing = session.state()["showing"]
    assert f"rating {wrong}" in session.act({"do": "answer", "showing": showing, "rating": wrong})["error"]
    assert session.act({"do": "answer", "showing": showing, "rating": right})["error"] is None
    assert list(store.judgments()["rating"]) == [right]


@pytest.mark.parametrize(
    "wrong",
    [
        {"do": "answer", "ranks": [1]},
        {"do": "answer", "ranks": "12"},
        {"do": "answer", "ranks": 0},
        {"do": "answer", "ranks": [1, True]},
        {"do": "answer", "ranks": [1, 2], "rating": 1},
        {"do": "answer", "ranks": [1, 2], "strength": ["much"]},
        {"do": "answer", "ranks": [1, 1], "strength": "much"},
        {"do": "answer"},
        {"do": "skip", "note": 7},
        {"do": "skip", "note": "x" * 10_001},
        {"do": "drop tables"},
        {},
    ],
)
def test_what_no_page_sends_is_refused_and_the_item_stays(store: Store, wrong: dict[str, Any]) -> None:
    session = Session(store, PAIRS, "ana")
    before = session.state()
    after = session.act(wrong | {"showing": before["showing"]})
    assert after["error"]
    assert texts(after) == texts(before) and after["showing"] == before["showing"]
    assert store.judgments(withdrawn=True).empty


def test_true_is_no_number_of_a_showing(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    assert session.state()["showing"] == 1
    assert "out of date" in session.act({"do": "skip", "showing": True})["error"]


def test_nothing_moves_on_until_the_store_has_it(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    best(session, 0)
    before = session.state()
    away = store.path.with_name("away.db")
    for suffix in ("-wal", "-shm"):
        Path(f"{store.path}{suffix}").unlink(missing_ok=True)
    store.path.rename(away)
    failed = best(session, 0)
    assert failed["error"] and failed["showing"] == before["showing"] and not failed["done"]
    store.path.unlink()  # SQLite made an empty one
    away.rename(store.path)
    assert best(session, 0)["error"] is None
    assert len(store.judgments()) == 2


def test_the_pace_is_the_median_so_that_one_break_does_not_spoil_it(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    assert session.state()["per_minute"] is None
    session._seconds = [10.0, 10.0, 3600.0]
    assert session.state()["per_minute"] == 6
    assert session.state()["seconds_left"] == 50


def test_a_chat_is_shown_as_turns(store: Store) -> None:
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": None}]
    item = Item(chat, ([{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": [{"text": "ho"}]}]))
    state = Session(store, [item], "ana").state()
    assert state["prompt"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]
    assert {turns[0]["content"] for turns in state["completions"]} == {"hi", "ho"}


@pytest.mark.parametrize(
    ("items", "rater", "question", "says"),
    [
        ([], "ana", "rank", "no items"),
        (PAIRS, " ", "rank", "rater's name"),
        (PAIRS, "ana", "1-7", "one completion"),
        (PAIRS, "ana", "best", "question 'best'"),
    ],
)
def test_a_page_that_cannot_be_is_said_at_once(store: Store, items: Any, rater: str, question: Any, says: str) -> None:
    with pytest.raises(FeedbackError, match=says):
        Session(store, items, rater, question)


# The widget ----------------------------------------------------------------------------------------------------------


def test_the_cell_takes_samples_and_the_widget_does_what_its_page_says(tmp_path: Path) -> None:
    samples = pd.DataFrame(
        {"prompt_id": [0, 0, 1, 1], "prompt": ["a ?", "a ?", "b ?", "b ?"], "completion": ["1", "2", "3", "4"]}
    )
    widget = rk.rate(samples, store=tmp_path / "j.db", rater="ana")
    assert widget.state["total"] == 2
    widget._act(widget, {"do": "answer", "showing": widget.state["showing"], "ranks": [1, 1]}, [])
    widget._act(widget, "nonsense", [])
    assert widget.state["position"] == 2 and "None" in widget.state["error"]
    assert rk.rate(samples, store=tmp_path / "j.db", rater="ana").state["position"] == 2
    assert rk.rate(samples, store=tmp_path / "j.db", rater="ana", question="1-7").state["total"] == 4


@pytest.mark.slow
def test_without_anywidget_the_package_imports_and_the_cell_says_what_to_install(tmp_path: Path) -> None:
    script = """
import sys
sys.modules["anywidget"] = None
import rlhf_kit as rk
rk.rating.Session
try:
    rk.rate([rk.feedback.Item("a ?", ("1", "2"))], "j.db", "ana")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == (
        "rate: anywidget is not installed; pip install 'rlhf-kit[notebooks]', or use the command rlhf-kit rate"
    ), done.stderr


# The served page -----------------------------------------------------------------------------------------------------


@contextmanager
def served(session: Session) -> Iterator[Page]:
    with Page(session) as page:
        thread = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield page
        finally:
            page.shutdown()
            thread.join()


@pytest.fixture
def page(store: Store) -> Iterator[Page]:
    with served(Session(store, PAIRS, "ana")) as page:
        yield page


def ask(page: Page, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=10)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, dict(response.getheaders())


JSON = {"Content_Type": "application/json"}


def test_the_page_is_served_to_its_address_with_all_that_it_needs(page: Page) -> None:
    for name in ("", "page.js", "page.css", "served.js"):
        status, text, headers = ask(page, "GET", f"/{page.token}/{name}")
        assert status == 200 and len(text) > 100
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert page.server_address[0] == "127.0.0.1"
    state = json.loads(ask(page, "GET", f"/{page.token}/state")[1])
    act = json.dumps({"do": "skip", "showing": state["showing"]})
    status, text, _ = ask(page, "POST", f"/{page.token}/act", act, **JSON)
    assert status == 200 and json.loads(text)["position"] == 2


@pytest.mark.parametrize("name", ["", "state", "page.js", "act", "nothing"])
@pytest.mark.parametrize("token", ["", "wrong", "%C3%A9"])
def test_without_the_token_nothing_is_served(page: Page, store: Store, name: str, token: str) -> None:
    path = f"/{token}/{name}"
    assert ask(page, "GET", path)[0] == 403
    assert ask(page, "POST", path, '{"do": "skip", "showing": 1}', **JSON)[0] == 403
    assert ask(page, "GET", f"/{name}")[0] == 403
    assert store.judgments().empty


def test_another_name_for_this_machine_is_refused(page: Page) -> None:
    for host in ("evil.example", f"evil.example:{page.server_port}", "127.0.0.1", "127.0.0.1:1", ""):
        assert ask(page, "GET", f"/{page.token}/", Host=host)[0] == 403
    assert ask(page, "GET", f"/{page.token}/", Host=f"localhost:{page.server_port}")[0] == 200


def test_another_page_may_not_ask(page: Page, store: Store) -> None:
    act = '{"do": "skip", "showing": 1}'
    path = f"/{page.token}/act"
    assert ask(page, "POST", path, act, Origin="http://evil.example", **JSON)[0] == 403
    assert ask(page, "POST", path, act, Origin="null", **JSON)[0] == 403
    assert ask(page, "POST", path, act, Content_Type="text/plain")[0] == 415
    assert ask(page, "POST", path, act)[0] == 415
    assert store.judgments().empty
    assert ask(page, "POST", path, act, Origin=f"http://127.0.0.1:{page.server_port}", **JSON)[0] == 200


@pytest.mark.parametrize(
    "path", ["../server.py", "..%2fserver.py", "%2e%2e/session.py", "static/", "./", "/etc/passwd", "page.js/", "."]
)
def test_only_what_the_page_needs_can_be_had(page: Page, path: str) -> None:
    assert ask(page, "GET", f"/{page.token}/{path}")[0] == 404
    assert ask(page, "GET", f"/{page.token}")[0] == 404


def test_a_body_that_is_too_large_or_no_object_is_refused(page: Page, store: Store) -> None:
    path = f"/{page.token}/act"
    assert ask(page, "POST", path, b"x" * (64 * 1024 + 1), **JSON)[0] == 413
    assert ask(page, "POST", path, b"", Content_Length="99999999999999999999", **JSON)[0] == 413
    assert ask(page, "POST", path, b"", Content_Length="-1", **JSON)[0] == 411
    assert ask(page, "POST", path, b"[" * 60_000, **JSON)[0] == 400
    for body in (b"", b"[]", b"1", b"{", b"\xff"):
        assert ask(page, "POST", path, body, **JSON)[0] == 400
    assert ask(page, "PUT", path)[0] == 501
    assert store.judgments().empty


def test_a_stale_page_is_told_what_is_open_now(page: Page, store: Store) -> None:
    act = json.dumps({"do": "answer", "showing": 1, "ranks": [1, 2]})
    assert json.loads(ask(page, "POST", f"/{page.token}/act", act, **JSON)[1])["error"] is None
    stale = json.loads(ask(page, "POST", f"/{page.token}/act", act, **JSON)[1])
    assert "out of date" in stale["error"] and stale["showing"] == 2
    assert len(store.judgments()) == 1


def test_many_clicks_at_once_judge_one_item(page: Page, store: Store) -> None:
    act = json.dumps({"do": "answer", "showing": 1, "ranks": [1, 2]})
    statuses: list[int] = []
    clicks = [
        threading.Thread(target=lambda: statuses.append(ask(page, "POST", f"/{page.token}/act", act, **JSON)[0]))
        for _ in range(8)
    ]
    for click in clicks:
        click.start()
    for click in clicks:
        click.join()
    assert statuses == [200] * 8
    assert len(store.judgments()) == 1


def test_a_port_that_is_taken_is_said_in_a_sentence(page: Page) -> None:
    with pytest.raises(FeedbackError, match=f"port {page.server_port} is taken; name another with --port"):
        Page(page.session, page.server_port)


# Files and the command -----------------------------------------------------------------------------------------------


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lists_of_completions_and_samples_become_the_same_items(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ?", "completions": ["a", "b"], "topic": "x"} for i in range(3)]
    listed = lines(tmp_path / "lists.jsonl", rows)
    samples = lines(
        tmp_path / "samples.jsonl",
        [{"prompt": row["prompt"], "completion": each, "topic": "x"} for each in "ab" for row in rows],
    )
    pd.DataFrame(rows).to_parquet(tmp_path / "lists.parquet")
    cells = pd.DataFrame(rows).assign(completions='["a", "b"]')
    cells.to_csv(tmp_path / "lists.csv", index=False)
    expected = rating.read(listed)
    assert [item.completions for item in expected] == [("a", "b")] * 3
    assert rating.read(samples) == expected
    assert rating.read(tmp_path / "lists.parquet") == expected
    assert rating.read(tmp_path / "lists.csv") == expected
    assert expected[0].columns == {"topic": "x"}
    assert [item.completions for item in rating.read(listed, "1-7")] == [("a",), ("b",)] * 3
    assert rating.read(samples, "good/bad")[0].completions == ("a",)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "b ?", "completions": ["x"]}, ["row 1", "one completion"]),
        ({"prompt": "b ?", "completions": ["x", "x"]}, ["row 1", "equal"]),
        ({"prompt": "b ?", "completions": ["x", None]}, ["row 1", "completion 1 is missing"]),
        ({"prompt": "b ?", "completions": []}, ["row 1", "completions"]),
        ({"prompt": "b ?"}, ["row 1", "completions"]),
        ({"completions": ["x", "y"]}, ["row 2", "prompt"]),
    ],
)
def test_a_row_at_fault_is_named_and_the_command_ends_with_2(
    tmp_path: Path, row: dict[str, Any], says: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "f.jsonl", [{"prompt": "a ?", "completions": ["x", "y"]}, row])
    with pytest.raises((FeedbackError, DataError)):
        rating.read(path)
    assert cli.main(["rate", str(path), "--rater", "ana", "--store", str(tmp_path / "j.db")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in ["f.jsonl", *says]), error
    assert not (tmp_path / "j.db").exists()


def test_a_ranking_of_one_or_of_too_many_is_refused(tmp_path: Path) -> None:
    samples = lines(tmp_path / "s.jsonl", [{"prompt": "a ?", "completion": str(i)} for i in range(12)])
    for k in (0, 1, 10):
        with pytest.raises(FeedbackError, match=f"k={k}: a ranking is of 2 to 9 completions"):
            rating.read(samples, k=k)


def test_a_file_of_something_else_names_the_columns_it_needs(tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="has the columns prompt, chosen, rejected; .* completions"):
        rating.read(lines(tmp_path / "p.jsonl", [{"prompt": "a ?", "chosen": "b", "rejected": "c"}]))


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c_and_says_how_many_were_made(tmp_path: Path) -> None:
    path = lines(tmp_path / "f.jsonl", [{"prompt": f"{i} ?", "completions": ["x", "y"]} for i in range(3)])
    command = [sys.executable, "-m", "rlhf_kit.cli", "rate", str(path), "--rater", "ana"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=heeded
    )
    assert process.stdout is not None
    address = next(line.strip() for line in process.stdout if "http://127.0.0.1:" in line)
    port, token = int(address.split(":")[2].split("/")[0]), address.split("/")[3]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", f"/{token}/act", '{"do": "skip", "showing": 1}', {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert "judgments made: 1; in judgments.db: 1 that count" in rest
    assert len(Store(tmp_path / "judgments.db").judgments()) == 1
