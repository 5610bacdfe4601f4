"""The rating page behind its looks: what it asks, what it keeps, what it refuses, and who may open it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from browsing import served

import rlhf_kit as rk
from rlhf_kit import cli, rating
from rlhf_kit.feedback import Answer, FeedbackError, Item, Store
from rlhf_kit.rating import Page, Session

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"}
PAIRS = [Item(f"is {i} even ?", (f"yes , {i} is .", f"no , {i} is odd ."), {"model": "secret-7b"}) for i in range(5)]
TRIPLE = Item("how many ?", ("one", "two", "three"))
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None, "tool_calls": None}]


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
    for i in range(5):
        assert best(session, i % 2)["error"] is None
    assert session.state()["done"]
    assert list(store.judgments()["ranks"]) == [[1, 2], [2, 1], [1, 2], [2, 1], [1, 2]]
    assert Session(store, PAIRS, "ben").state()["position"] == 1  # another rater is not told


def test_each_completion_is_shown_first_about_half_the_time(store: Store) -> None:
    shown = {}
    for rater in ("ana", "ben"):
        session = Session(store, [Item(f"question {i}", ("a", "b")) for i in range(60)], rater)
        shown[rater] = [texts(session.state())[1]]
        while not (state := act(session, "skip"))["done"]:
            shown[rater].append(texts(state)[1])
    assert 17 <= shown["ana"].count("a") <= 43  # 3.5 standard deviations
    assert shown["ana"] != shown["ben"]


def test_after_a_restart_the_same_item_comes_in_the_same_order_and_nothing_is_asked_twice(store: Store) -> None:
    session = Session(store, PAIRS, "ana", seed=3)
    for _ in range(2):
        best(session, 0)
    again = Session(Store(store.path), PAIRS, "ana", seed=3)
    assert texts(again.state()) == texts(session.state())
    assert (again.state()["position"], again.state()["total"]) == (3, 5)
    while not again.state()["done"]:
        best(again, 0)
    assert sorted(store.judgments()["item"]) == sorted(item.id for item in PAIRS)
    assert (len(session.made), len(again.made)) == (2, 3)


def test_items_come_again_at_the_end_with_their_sides_swapped_and_resume_and_undo_hold_there(store: Store) -> None:
    session = Session(store, PAIRS, "ana", seed=1, repeats=2)
    for _ in range(5):
        best(session, 0)
    sixth = texts(session.state())
    session = Session(Store(store.path), PAIRS, "ana", seed=1, repeats=2)  # stopped, and opened again
    assert texts(session.state()) == sixth and not session.state()["done"]
    assert best(session, 1)["error"] is None
    undone = act(session, "undo")
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


def test_a_page_that_is_behind_records_nothing_and_then_stands_where_the_other_does(store: Store) -> None:
    """The two are a cell that was run again, or the command in two terminals: two sessions on one store."""
    old, new = Session(store, PAIRS, "ana", repeats=5), Session(store, PAIRS, "ana", repeats=5)
    best(old, 0)
    for do in ("answer", "undo"):
        assert act(new, ranks=[1, 2])["error"].startswith("nothing was recorded: ana has gone on in another tab")
        assert texts(new.state()) == texts(old.state())
        assert best(new, 0)["error"] is None
        refused = act(old, do, ranks=[1, 2])
        assert "another tab or cell; this item is open now" in refused["error"]
        assert texts(refused) == texts(new.state())
        assert best(old, 0)["error"] is None
    assert len(store.judgments(withdrawn=True)) == 5 == store.judgments()["item"].nunique()
    assert best(old, 0)["error"] is None and "another tab" in best(new, 0)["error"]  # the same item, a second time


def test_two_tabs_that_answer_at_the_same_moment_judge_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(store, PAIRS, "ana")
    best(Session(store, PAIRS, "ana"), 0)
    monkeypatch.setattr(session, "_judged", lambda: [])  # the other's judgment is made after this look at the store
    assert "judged this item before, as judgment 1" in best(session, 0)["error"]
    assert len(store.judgments()) == 1


def test_undo_takes_back_the_last_and_shows_it_in_the_same_order_also_after_a_restart(store: Store) -> None:
    session = Session(store, PAIRS, "ana")
    assert not session.state()["can_undo"] and "no judgment to take back" in act(session, "undo")["error"]
    best(session, 0)
    second = texts(session.state())
    best(session, 0)
    session = Session(store, PAIRS[::-1], "ana", seed=9)
    undone = act(session, "undo")
    assert undone["error"] is None and texts(undone) == second
    best(session, 1)
    assert list(store.judgments()["ranks"]) == [[1, 2], [2, 1]]
    assert list(store.judgments(withdrawn=True)["withdrawn"]) == [False, True, False]
    alone = Session(store, PAIRS[:1], "ben")
    assert best(alone, 0)["done"]
    assert not act(alone, "undo")["done"] and alone.made == set()


def test_skips_strengths_ties_and_rankings_are_kept(store: Store) -> None:
    session = Session(store, PAIRS[:3], "ana")
    act(session, "skip", note="both garbled")
    act(session, ranks=[2, 1], strength="clearly")
    assert act(session, ranks=[1, 1])["done"]
    assert (session.state()["judged"], session.state()["skipped"]) == (3, 1)
    three = Session(store, [TRIPLE], "ana")
    shown = [TRIPLE.completions.index(text) for text in texts(three.state())[1:]]
    act(three, ranks=[2, 1, 1])
    kept = store.judgments()
    assert list(kept["strength"]) == [None, "clearly", None, None] and kept["note"][0] == "both garbled"
    assert kept["ranks"][0] is None and kept["ranks"][2] == [1, 1]
    assert [kept["ranks"][3][completion] for completion in shown] == [2, 1, 1]


@pytest.mark.parametrize(("question", "right", "wrong"), [("good/bad", 0, 2), ("1-7", 7, 8)])
def test_ratings_keep_to_their_scale(store: Store, question: Any, right: int, wrong: int) -> None:
    session = Session(store, [Item("a ?", ("b",))], "ana", question)
    assert f"rating {wrong}" in act(session, rating=wrong)["error"] and act(session, rating=right)["error"] is None
    assert list(store.judgments()["rating"]) == [right]


@pytest.mark.parametrize(
    "wrong",
    [
        {"ranks": [1]},
        {"ranks": "12"},
        {"ranks": [1, True]},
        {"ranks": [1, 2], "rating": 1},
        {"ranks": [1, 2], "strength": ["much"]},
        {"ranks": [1, 1], "strength": "much"},
        {},
        {"do": "skip", "note": 7},
        {"do": "skip", "note": "x" * 10_001},
        {"do": "drop tables"},
        {"do": "skip", "showing": 2},
        {"do": "skip", "showing": None},
    ],
)
def test_what_no_page_sends_is_refused_and_the_item_stays(store: Store, wrong: dict[str, Any]) -> None:
    session = Session(store, PAIRS, "ana")
    before = session.state()
    after = act(session, **wrong)
    assert after["error"] and after["version"] > before["version"]
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
    assert failed["error"] and failed["showing"] == before["showing"] and not failed["done"]
    store.path.unlink()  # SQLite made an empty one
    away.rename(store.path)
    assert best(session, 0)["error"] is None
    assert len(store.judgments()) == 2


def test_the_pace_is_the_median_so_that_one_break_does_not_spoil_it(store: Store) -> None:
    assert Session(store, PAIRS, "ana").state()["per_minute"] is None
    for item, seconds in zip(PAIRS, (10.0, 3600.0, 10.0), strict=False):
        store.append(item, "ana", "rank", Answer(), (0, 1), seconds, "test")
    state = Session(store, PAIRS, "ana").state()
    assert (state["per_minute"], state["seconds_left"]) == (6, 20)


def test_a_chat_is_shown_message_by_message(store: Store) -> None:
    item = Item(CHAT, ([{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": [{"text": "ho"}]}]))
    state = Session(store, [item], "ana").state()
    assert state["prompt"] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": ""}]
    assert set(texts(state)[1:]) == {"hi", "ho"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"items": []}, "no items"),
        ({"rater": " "}, "rater's name"),
        ({"question": "1-7"}, "one completion"),
        ({"question": "best"}, "question 'best'"),
        ({"repeats": -1}, "repeats=-1, but there are 5 different items"),
        ({"repeats": 6}, "repeats=6, but there are 5 different items"),
    ],
)
def test_a_page_that_cannot_be_is_said_at_once(store: Store, change: dict[str, Any], says: str) -> None:
    with pytest.raises(FeedbackError, match=says):
        Session(store, **{"items": PAIRS, "rater": "ana"} | change)


# The widget ----------------------------------------------------------------------------------------------------------


def test_the_cell_takes_samples_and_the_widget_does_what_its_page_says(tmp_path: Path) -> None:
    samples = pd.DataFrame({"prompt_id": [0, 0, 1, 1], "prompt": ["a ?", "a ?", "b ?", "b ?"], "completion": [*"1234"]})
    widget = rk.rate(samples, store=tmp_path / "j.db", rater="ana")
    assert widget.state["total"] == 2
    widget._act(widget, {"do": "answer", "showing": widget.state["showing"], "ranks": [1, 1]}, [])
    widget._act(widget, "nonsense", [])
    assert widget.state["position"] == 2 and "None" in widget.state["error"]
    assert rk.rate(samples, store=tmp_path / "j.db", rater="ana").state["position"] == 2
    assert rk.rate(samples, store=tmp_path / "j.db", rater="ana", question="1-7").state["total"] == 4


def test_without_anywidget_the_cell_says_what_to_install(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rlhf_kit.rating.widget", raising=False)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(FeedbackError, match=r"anywidget is not installed; pip install 'rlhf-kit\[notebooks\]', or use"):
        rk.rate(PAIRS, store, "ana")


# The served page -----------------------------------------------------------------------------------------------------


@pytest.fixture
def page(store: Store) -> Iterator[Page]:
    with served(Session(store, PAIRS, "ana")) as page:
        yield page


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, dict(response.getheaders())


SKIP = '{"do": "skip", "showing": 1}'
JSON = {"Content_Type": "application/json"}


def test_the_page_is_served_to_its_address_with_all_that_it_needs(page: Page) -> None:
    for name in ("", "page.js", "page.css", "served.js"):
        status, text, headers = ask(page.server_port, "GET", f"/{page.token}/{name}")
        assert status == 200 and len(text) > 100
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert page.server_address[0] == "127.0.0.1"
    assert json.loads(ask(page.server_port, "GET", f"/{page.token}/state")[1])["showing"] == 1


@pytest.mark.parametrize(
    ("status", "method", "path", "headers"),
    [
        *((403, "GET", f"/{token}/{name}", {}) for token in ("", "wrong", "%C3%A9") for name in ("", "state")),
        (403, "GET", "/state", {}),
        (403, "POST", "/wrong/act", JSON),
        *((403, "GET", "/TOKEN/", {"Host": host}) for host in ("evil.example", "evil.example:PORT", "127.0.0.1:1", "")),
        *((403, "POST", "/TOKEN/act", {"Origin": origin, **JSON}) for origin in ("http://evil.example", "null")),
        *((415, "POST", "/TOKEN/act", kind) for kind in ({"Content_Type": "text/plain"}, {})),
        *((404, "GET", f"/TOKEN/{path}", {}) for path in ("../server.py", "%2e%2e/server.py", "page.js/", "act")),
        (404, "GET", "/TOKEN", {}),
        (404, "POST", "/TOKEN/state", JSON),
        (501, "PUT", "/TOKEN/act", JSON),
        (411, "POST", "/TOKEN/act", {"Content_Length": "-1", **JSON}),
        (413, "POST", "/TOKEN/act", {"Content_Length": "99999999999999999999", **JSON}),
    ],
)
def test_whoever_may_not_ask_gets_nothing(
    page: Page, store: Store, status: int, method: str, path: str, headers: dict[str, str]
) -> None:
    headers = {name: value.replace("PORT", str(page.server_port)) for name, value in headers.items()}
    path = path.replace("TOKEN", page.token)
    body = SKIP if method == "POST" else None
    assert ask(page.server_port, method, path, body, **headers)[0] == status
    assert store.judgments().empty


def test_the_page_itself_may_ask(page: Page, store: Store) -> None:
    path, port = f"/{page.token}/act", page.server_port
    for body, status in ((b"x" * (64 * 1024 + 1), 413), (b"[" * 60_000, 400), (b"", 400), (b"[]", 400), (b"\xff", 400)):
        assert ask(port, "POST", path, body, **JSON)[0] == status
    assert ask(port, "GET", f"/{page.token}/", Host=f"localhost:{port}")[0] == 200
    with ThreadPoolExecutor(8) as clicks:
        origin = f"http://127.0.0.1:{port}"
        made = list(clicks.map(lambda _: ask(port, "POST", path, SKIP, Origin=origin, **JSON), range(8)))
    states = [json.loads(text) for _, text, _ in made]
    assert sorted(state["error"] is None for state in states) == [False] * 7 + [True]
    assert {state["showing"] for state in states} == {2} and len(store.judgments()) == 1
    assert all("out of date" in state["error"] for state in states if state["error"])


def test_a_port_that_is_taken_is_said_in_a_sentence(page: Page) -> None:
    for port in (page.server_port, 70_000):
        with pytest.raises(FeedbackError, match=f"port {port} cannot be used .*; name another with --port"):
            Page(page.session, port)


# Files and the command -----------------------------------------------------------------------------------------------


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lists_of_completions_and_samples_become_the_same_items(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} ?", "completions": ["a", "b"], "topic": "x"} for i in range(3)]
    listed = lines(tmp_path / "lists.jsonl", rows)
    each = [{"prompt": row["prompt"], "completion": text, "topic": "x"} for text in "ab" for row in rows]
    samples = lines(tmp_path / "samples.jsonl", each)
    pd.DataFrame(rows).to_parquet(tmp_path / "lists.parquet")
    pd.DataFrame(rows).assign(completions='["a", "b"]').to_csv(tmp_path / "lists.csv", index=False)
    expected = rating.read(listed)
    assert [item.completions for item in expected] == [("a", "b")] * 3 and expected[0].columns == {"topic": "x"}
    for path in (samples, tmp_path / "lists.parquet", tmp_path / "lists.csv"):
        assert rating.read(path) == expected
    assert [item.completions for item in rating.read(listed, "1-7")] == [("a",), ("b",)] * 3
    assert rating.read(samples, "good/bad")[0].completions == ("a",)
    for k in (1, 10):
        with pytest.raises(FeedbackError, match=f"k={k}: a ranking is of 2 to 9 completions"):
            rating.read(samples, k=k)
    with pytest.raises(FeedbackError, match="has the columns prompt, chosen, rejected; .* completions"):
        rating.read(lines(tmp_path / "p.jsonl", [{"prompt": "a ?", "chosen": "b", "rejected": "c"}]))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "b ?", "completions": ["x"]}, ["row 1", "two or more completions"]),
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
    assert cli.main(["rate", str(path), "--rater", "ana", "--store", str(tmp_path / "j.db")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(word in error for word in ["f.jsonl", *says]), error
    assert not (tmp_path / "j.db").exists()


@pytest.mark.slow
def test_the_command_serves_until_ctrl_c_and_says_how_many_were_made(tmp_path: Path) -> None:
    path = lines(tmp_path / "f.jsonl", [{"prompt": f"{i} ?", "completions": ["x", "y"]} for i in range(3)])
    command = [sys.executable, "-m", "rlhf_kit.cli", "rate", str(path), "--rater", "ana"]
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, preexec_fn=heeded
    )
    assert process.stdout is not None
    address = next(line.strip() for line in process.stdout if "http://127.0.0.1:" in line)
    port, token = int(address.split(":")[2].split("/")[0]), address.split("/")[3]
    assert ask(port, "POST", f"/{token}/act", SKIP, **JSON)[0] == 200
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert "judgments made: 1; in judgments.db: 1 that count" in rest
    assert len(Store(tmp_path / "judgments.db").judgments()) == 1
