"""The rating page behind its looks: what it asks, what it keeps, what it refuses, and who may open it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browsing import served

import rlhf_kit as rk
from rlhf_kit import cli, rating
from rlhf_kit.feedback import Answer, FeedbackError, Item, Store
from rlhf_kit.feedback.judging import as_row
from rlhf_kit.rating import Page, Session

PAIRS = [Item(f"is {i} even ?", (f"yes , {i} is .", f"no , {i} is odd ."), {"model": "secret-7b"}) for i in range(5)]
TRIPLE = Item("how many ?", ("one", "two", "three"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "judgments.db")


def act(session: Session, do: str = "answer", **message: Any) -> dict[str, Any]:
    return session.act({"do": do, "showing": session.state()["showing"], **message})


def best(session: Session, completion: int) -> dict[str, Any]:
    """Judge the pair on the page: the item's first or second completion is the better one."""
    prompt, first, _ = texts(session.state())
    completions = next(item.completions for item in PAIRS if item.prompt == prompt)
    return act(session, ranks=[1, 2] if completions[completion] == first else [2, 1])


def texts(state: dict[str, Any]) -> list[str]:
    return [messages[0]["content"] for messages in (state["prompt"], *state["completions"])]


# The session ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_what_was_chosen_in_the_items_own_order(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    assert "secret" not in json.dumps(session.state()) and "model" not in json.dumps(session.state())
    for completion in (0, 1, 0):
        assert best(session, completion)["error"] is None
    act(session, "skip", note="both garbled")
    assert not act(session, ranks=[1, 1])["prompt"]
    assert (session.state()["judged"], session.state()["skipped"]) == (5, 1)
    three = Session(store, [TRIPLE], "ana")
    shown = [TRIPLE.completions.index(text) for text in texts(three.state())[1:]]
    act(three, ranks=[2, 1, 1])
    act(Session(store, [Item("a ?", ("b",))], "ana", "good/bad"), rating=0)
    act(Session(store, PAIRS, "ben"), ranks=[2, 1], strength="clearly")  # another rater is asked from the start
    kept = store.judgments()
    assert list(kept["ranks"])[:5] == [[1, 2], [2, 1], [1, 2], None, [1, 1]] and kept["note"][3] == "both garbled"
    assert [kept["ranks"][5][completion] for completion in shown] == [2, 1, 1]
    assert kept["rating"][6] == 0 and kept["strength"][7] == "clearly" and kept["item"][7] == kept["item"][0]


def test_each_completion_is_shown_first_about_half_the_time(store: Store) -> None:
    items = [Item(f"question {i}", ("a", "b")) for i in range(60)]
    ana, ben = ([Session(store, items, rater)._order(item)[0] for item in items] for rater in ("ana", "ben"))
    assert 17 <= ana.count(0) <= 43  # 3.5 standard deviations
    assert ana != ben


def test_items_come_again_at_the_end_with_their_sides_swapped_and_resume_and_undo_hold_there(store: Store) -> None:
    session = Session(store, PAIRS, "ana", seed=1, repeats=2)
    assert "no judgment to take back" in act(session, "undo")["error"]
    for _ in range(3):
        best(session, 0)
    again = Session(Store(store.path), PAIRS, "ana", seed=1, repeats=2)  # stopped, and opened again
    assert texts(again.state()) == texts(session.state())
    assert (again.state()["judged"], again.state()["total"]) == (3, 7)
    for _ in range(2):
        best(again, 0)
    sixth = texts(again.state())
    session = Session(Store(store.path), PAIRS, "ana", seed=1, repeats=2)
    assert texts(session.state()) == sixth
    assert best(session, 1)["error"] is None
    undone = act(session, "undo")
    assert (texts(undone), undone["judged"]) == (sixth, 5)
    best(session, 1)
    assert not best(session, 0)["prompt"]
    judged = store.judgments()
    first, second = judged.iloc[:5].set_index("item"), judged.iloc[5:].set_index("item")
    assert list(first.index) == [item.id for item in PAIRS] and second.index.is_unique
    assert list(second["shown"]) == list(first.loc[second.index, "shown"].str[::-1])
    assert list(second["ranks"]) == [[2, 1], [1, 2]]
    assert list(store.judgments(withdrawn=True)["withdrawn"]) == [False] * 5 + [True] + [False] * 2
    table, _ = rk.feedback.report(store)
    assert tuple(table[["repeats", "repeats_changed", "swaps", "changed"]].iloc[0]) == (2, 0.5, 2, 1)


def test_a_page_that_is_behind_records_nothing_and_then_stands_where_the_other_does(store: Store) -> None:
    """The two are a cell that was run again, or the command in two terminals: two sessions on one store."""
    old, new = Session(store, PAIRS, "ana", repeats=5), Session(store, PAIRS, "ana", repeats=5)
    best(old, 0)
    for do in ("answer", "undo"):
        assert act(new, ranks=[1, 2])["error"].startswith("nothing was recorded: another tab or cell has gone on")
        assert texts(new.state()) == texts(old.state())
        assert best(new, 0)["error"] is None
        refused = act(old, do, ranks=[1, 2])
        assert "another tab or cell" in refused["error"] and texts(refused) == texts(new.state())
        assert best(old, 0)["error"] is None
    assert len(store.judgments(withdrawn=True)) == 5 == store.judgments()["item"].nunique()
    assert best(old, 0)["error"] is None and "another tab" in best(new, 0)["error"]  # the same item, a second time


def test_two_processes_that_answer_at_the_same_moment_judge_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(store, PAIRS, "ana")
    best(Session(store, PAIRS, "ana"), 0)
    with monkeypatch.context() as late:
        late.setattr(session, "_look", lambda: None)  # the other's judgment is made after this look at the store
        assert "judged this item before, as judgment 1" in best(session, 0)["error"]
    assert len(store.judgments()) == 1


def test_an_answer_that_does_not_fit_is_refused_and_the_item_stays(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    before = session.state()
    skips = ({"do": "skip", "ranks": [1, 2]}, {"do": "skip", "showing": "another"})
    for wrong in ({"ranks": [1]}, {"ranks": []}, {"rating": 1}, {"ranks": [1, 1], "strength": "much"}, {}, *skips):
        after = act(session, **wrong)
        assert after["error"] and after["time"] > before["time"], wrong
        assert (texts(after), after["showing"]) == (texts(before), before["showing"])
    assert store.judgments(withdrawn=True).empty


def test_nothing_moves_on_until_the_store_has_it(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    best(session, 0)
    before = session.state()
    away = store.path.with_name("away.db")
    for suffix in ("-wal", "-shm"):
        Path(f"{store.path}{suffix}").unlink(missing_ok=True)
    store.path.rename(away)
    failed = best(session, 0)
    assert failed["error"] and failed["showing"] == before["showing"] and texts(failed) == texts(before)
    store.path.unlink()  # SQLite made an empty one
    away.rename(store.path)
    assert best(session, 0)["error"] is None
    assert len(store.judgments()) == 2


def test_the_pace_is_the_median_so_that_one_break_does_not_spoil_it(store: Store) -> None:
    assert Session(store, PAIRS, "ana").state()["progress"] == "1 of 5"
    for item, seconds in zip(PAIRS, (10.0, 3600.0, 10.0), strict=False):
        store.append(as_row(item, "ana", "rank", Answer(), (0, 1), seconds, "test"))
    assert Session(store, PAIRS, "ana").state()["progress"] == "4 of 5 · 6.0 a minute · about 0:20 left"


@pytest.mark.parametrize("change", [{"question": "1-7"}, {"repeats": -1}, {"repeats": 6}, {"rater": " "}])
def test_a_page_that_cannot_be_is_refused_at_once(store: Store, change: dict[str, Any]) -> None:
    with pytest.raises(FeedbackError, match=r"asks about one completion|there are 5 different items|rater's name"):
        Session(store, PAIRS, **{"rater": "ana", **change})


def test_the_cell_takes_samples_and_goes_on_where_the_rater_stopped(tmp_path: Path) -> None:
    samples = pd.DataFrame({"prompt_id": [0, 0, 1, 1], "prompt": ["a ?", "a ?", "b ?", "b ?"], "completion": [*"1234"]})
    store = Store(tmp_path / "j.db")
    assert rk.rate(samples, store, rater="ana").state["progress"] == "1 of 2"
    act(Session(store, rk.feedback.items(samples), "ana"), "skip")
    assert rk.rate(samples, tmp_path / "j.db", rater="ana").state["progress"].startswith("2 of 2")
    assert rk.rate(samples, store, rater="ana", question="1-7").state["total"] == 4


def test_without_anywidget_the_cell_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rlhf_kit.rating.widget", raising=False)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(FeedbackError, match=r"anywidget is not installed; pip install 'rlhf-kit\[notebooks\]', or use"):
        rk.rate(PAIRS, store, rater="ana")


# The served page -----------------------------------------------------------------------------------------------------


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.getheaders())


def skip(port: int, token: str) -> str:
    """The message that skips the item which is open."""
    return json.dumps({"do": "skip", "showing": json.loads(ask(port, "GET", f"/{token}/state")[1])["showing"]})


def test_the_page_is_served_to_its_address_and_to_nobody_else(store: Store) -> None:
    with served(Session(store, PAIRS, "ana")) as page:
        port, token = page.server_port, page.token
        assert page.server_address[0] == "127.0.0.1" and page.address == f"http://127.0.0.1:{port}/{token}/page.html"
        for name in ("page.html", "page.js", "page.css"):
            status, text, headers = ask(port, "GET", f"/{token}/{name}")
            assert status == 200 and len(text) > 100
            assert headers["Cache-Control"] == "no-store" and headers["X-Content-Type-Options"] == "nosniff"
            assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        message = skip(port, token)
        strange = ("/state", *(f"/{wrong}/{name}" for wrong in ("", "wrong", "%C3%A9") for name in ("", "state")))
        absent = ("", "/", "/../server.py", "/%2e%2e/server.py", "/page.js/")
        refused = [
            *((403, "GET", path, {}) for path in strange),
            *((403, "GET", f"/{token}/state", {"Host": host}) for host in ("evil", f"evil:{port}", "127.0.0.1:1", "")),
            *((403, "POST", f"/{token}/act", {"Origin": origin}) for origin in ("http://evil", "null")),
            *((404, "GET", f"/{token}{path}", {}) for path in absent),
            *((403, "POST", "/wrong/act", {}), (501, "PUT", f"/{token}/act", {})),
        ]
        for status, method, path, headers in refused:
            body = None if method == "GET" else message
            assert ask(port, method, path, body, **headers)[0] == status, (method, path, headers)
        assert store.judgments().empty
        with pytest.raises(FeedbackError, match=f"port {port} cannot be used .*; name another with --port"):
            Page(page.session, port)


def test_of_answers_that_arrive_together_one_is_kept(store: Store) -> None:
    with served(Session(store, PAIRS, "ana")) as page, ThreadPoolExecutor(8) as clicks:
        path, port = f"/{page.token}/act", page.server_port
        message = skip(port, page.token)
        hosts = [f"127.0.0.1:{port}", f"localhost:{port}"] * 4
        made = clicks.map(lambda host: ask(port, "POST", path, message, Host=host, Origin=f"http://{host}"), hosts)
        states = [json.loads(text) for _, text, _ in made]
    assert sorted(state["error"] is None for state in states) == [False] * 7 + [True]
    assert {state["judged"] for state in states} == {1} and len(store.judgments()) == 1


# Files and the command -----------------------------------------------------------------------------------------------


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lists_of_completions_and_samples_become_the_same_items(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ?", "completions": ["a", "b"], "topic": "x"} for i in range(3)]
    listed = written(tmp_path / "lists.jsonl", rows)
    each = [{"prompt": row["prompt"], "completion": text, "topic": "x"} for text in "ab" for row in rows]
    samples = written(tmp_path / "samples.jsonl", each)
    pd.DataFrame(rows).to_parquet(tmp_path / "lists.parquet")
    pd.DataFrame(rows).assign(completions='["a", "b"]').to_csv(tmp_path / "lists.csv", index=False)
    expected = rating.read(listed)
    assert [item.completions for item in expected] == [("a", "b")] * 3 and expected[0].columns == {"topic": "x"}
    for path in (samples, tmp_path / "lists.parquet", tmp_path / "lists.csv"):
        assert rating.read(path) == expected
    numbered = written(tmp_path / "own.jsonl", [row | {"prompt_id": i} for i, row in enumerate(each)])
    with pytest.warns(UserWarning, match="prompt_id_dataset: differs"):
        assert rating.read(numbered) == expected
    assert [item.completions for item in rating.read(listed, "1-7")] == [("a",), ("b",)] * 3
    assert rating.read(samples, "good/bad")[0].completions == ("a",)
    with pytest.raises(FeedbackError, match="k=10: a ranking is of 2 to 9 completions"):
        rating.read(samples, k=10)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "b ?", "completions": ["x"]}, "row 1.*two or more completions"),
        ({"prompt": "b ?", "completions": ["x", None]}, "row 1.*completion 1 is missing"),
        ({"prompt": "b ?", "completions": []}, "row 1.*completions"),
        ({"prompt": "b ?"}, "row 1.*completions"),
        ({"completions": ["x", "y"]}, "row 2.*prompt"),
        ({"prompt": " ", "completions": ["x", "y"]}, "row 1.*column 'prompt'"),
        ({"prompt": "b ?", "completions": ["x", {"y": 1}]}, "row 1.*column 'completions'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "row 2.*prompt"),
    ],
)
def test_a_row_at_fault_is_named_and_the_command_ends_with_2(
    tmp_path: Path, row: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "f.jsonl", [{"prompt": "a ?", "completions": ["x", "y"]}, row])
    assert cli.main(["rate", str(path), "--rater", "ana", "--store", str(tmp_path / "j.db")]) == 2
    assert re.fullmatch(f".*f.jsonl.*{says}.*\n", capsys.readouterr().err)  # in one line
    assert not (tmp_path / "j.db").exists()


def test_the_command_serves_until_ctrl_c_and_says_how_many_were_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path / "f.jsonl", [{"prompt": f"{i} ?", "completions": ["x", "y"]} for i in range(3)])
    monkeypatch.chdir(tmp_path)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C

    def rate_and_leave() -> None:
        try:
            printed, deadline = "", time.monotonic() + 10
            while "page.html" not in printed and time.monotonic() < deadline:
                printed += capsys.readouterr().out
            port, token = printed.partition("http://127.0.0.1:")[2].split("/")[:2]
            assert ask(int(port), "POST", f"/{token}/act", skip(int(port), token))[0] == 200
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as background:
        left = background.submit(rate_and_leave)
        assert cli.main(["rate", str(path), "--rater", "ana"]) == 0
        left.result()
    assert "ana has judged 1 of 3; in judgments.db: 1 that count" in capsys.readouterr().out
    assert len(Store(tmp_path / "judgments.db").judgments()) == 1
