"""The rating page as a person meets it: in JupyterLab and served, by keyboard and by mouse, in light and in dark."""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
from browsing import START_SECONDS, browser, jupyterlab, served
from playwright.sync_api import Browser, Locator, Page, expect

import rlhf_kit as rk
from rlhf_kit.feedback import Item, Store
from rlhf_kit.rating import Session

pytestmark = [pytest.mark.browser, pytest.mark.slow]

expect.set_options(timeout=START_SECONDS * 1000)  # JupyterLab on a busy machine

ITEMS = [Item(f"is {i} an animal ?", (f"no , {i} is a number .", f"yes , {i} is .")) for i in range(20)]
CELL = """
import rlhf_kit as rk
items = [rk.feedback.Item(f"is {i} an animal ?", (f"no , {i} is a number .", f"yes , {i} is .")) for i in range(20)]
rk.rate(items, store="judgments.db", rater="ana")
"""
LONG = " ".join(["the sea otter holds hands while it sleeps ."] * 200)
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a <b>bold</b>\n  question ?"}]

# The texts whose contrast with what is behind them is below 4.5:1, by WCAG 2.1's relative luminance; with a canvas, which
# reads any notation of a colour.
POOR_CONTRASTS = """() => {
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const painted = (colours) => {
        for (const colour of ["white", ...colours]) {
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
        }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
    };
    const luminance = (rgb) => rgb.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const contrast = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
        const [back, front] = [layers, [...layers, getComputedStyle(element).color]].map(all => luminance(painted(all)));
        return (Math.max(back, front) + 0.05) / (Math.min(back, front) + 0.05);
    };
    return [...document.querySelectorAll(".rk-rating *")]
        .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
        .filter(element => element.getBoundingClientRect().height > 0 && contrast(element) < 4.5)
        .map(element => [contrast(element), element.textContent.slice(0, 40), element.className]);
}"""


class Clicked(NamedTuple):
    prompt: str
    ranks: tuple[int, int]  # of the answers as shown
    shown: tuple[str, str]
    strength: str | None = None
    note: str = ""


def rating_page(page: Page, position: int | None = None) -> Locator:
    """The page, once it takes answers to that item."""
    root = page.get_by_role("region", name="Rating", exact=True)
    if position is not None:
        expect(root.get_by_role("status").first).to_contain_text(f"{position} of ")
    expect(root).to_have_attribute("aria-busy", "false")
    return root


def seen(root: Locator) -> tuple[str, tuple[str, str]]:
    parts = [root.get_by_role("group", name=f"{name}, text") for name in ("Prompt", "Answer 1", "Answer 2")]
    prompt, first, second = (part.inner_text() for part in parts)
    return prompt, (first, second)


def judge(page: Page, position: int) -> Clicked:
    """One item, in a way that its position says: by key or mouse, the first, the second or neither, with a strength."""
    root = rating_page(page, position)
    prompt, shown = seen(root)
    mouse = position % 2 == 0
    strength, note = (None, "")
    if position % 5 == 0:
        note = "1 s g"  # keys that must not be read as a choice
        if mouse:
            root.get_by_role("textbox").click()
        else:
            page.keyboard.press("n")
        page.keyboard.type(note)
        page.keyboard.press("Escape")
    if position % 4 == 1:
        strength = "much"
        page.keyboard.press("9")
    elif position % 4 == 2:
        strength = "slightly"
        root.get_by_role("radio", name="slightly").check()
    ranks = (1, 1) if position % 7 == 0 else (1, 2) if position % 3 else (2, 1)
    key = {(1, 1): "0", (1, 2): "1", (2, 1): "2"}[ranks]
    if mouse:
        root.get_by_role("button", name="Tie" if key == "0" else f"Answer {key} is better").click()
    else:
        page.keyboard.press(key)
    return Clicked(prompt, ranks, shown, strength if ranks != (1, 1) else None, note)


def kept(path: Path) -> list[Clicked]:
    """What SQLite has, and what was taken back is not there, read without the kit."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT prompt, completions, ranks, shown, strength, note FROM judgments JOIN items USING (item) "
            "WHERE judgment NOT IN (SELECT judgment FROM withdrawals) ORDER BY judgment"
        ).fetchall()
    found = []
    for prompt, completions, ranks, shown, strength, note in rows:
        order, texts = json.loads(shown), json.loads(completions)
        first, second = ((json.loads(ranks)[i], texts[i]) for i in order)
        found.append(Clicked(json.loads(prompt), (first[0], second[0]), (first[1], second[1]), strength, note))
    return found


def takes_the_focus(page: Page, item: str) -> None:
    """JupyterLab gives the focus to the notebook when a cell has run; the page has it in the end."""
    expect(page.get_by_role("group", name=item)).to_be_visible()
    page.wait_for_timeout(1500)
    expect(page.get_by_role("group", name=item)).to_be_focused()


def undo_and_judge_again(page: Page, clicked: list[Clicked]) -> None:
    position = len(clicked) + 1
    rating_page(page, position)
    page.keyboard.press("ArrowLeft")
    root = rating_page(page, position - 1)
    assert seen(root) == (clicked[-1].prompt, clicked[-1].shown)
    page.keyboard.press("2" if clicked[-1].ranks == (1, 2) else "1")
    other = (2, 1) if clicked[-1].ranks == (1, 2) else (1, 2)
    clicked[-1] = clicked[-1]._replace(ranks=other, strength=None, note="")
    rating_page(page, position)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(START_SECONDS * 1000)
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    try:
        yield page
        assert said == []
    finally:
        page.screenshot(path=tmp_path / "page.png")
        page.close()


def trains_a_reward_model(path: Path, out: Path) -> None:
    with pytest.warns(UserWarning, match="2 of 20 judgments are ties"):
        pairs = rk.feedback.preferences(Store(path).judgments())
    assert len(pairs) == 18
    preset = rk.presets.preset("pocket")
    settings = preset.reward_model | {"max_steps": 2}
    model = rk.RewardModel(rk.train.reward_model(preset.base_model, pairs, out=out, **settings))
    assert len(model(pairs["prompt"][:2], pairs["chosen"][:2])) == 2


def test_twenty_items_in_jupyterlab(page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    notebook.metadata["kernelspec"] = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(notebook, folder / "rating.ipynb")
    idle = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
    run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"
    with jupyterlab(folder, tmp_path) as (address, token):
        page.goto(f"{address}/lab/tree/rating.ipynb?token={token}")
        page.wait_for_function(idle)
        page.evaluate(run)
        takes_the_focus(page, "Item 1 of 20")
        clicked = [judge(page, position) for position in range(1, 7)]
        undo_and_judge_again(page, clicked)
        clicked += [judge(page, position) for position in range(7, 10)]
        rating_page(page, 10)
        before = seen(rating_page(page, 10))
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_function("!window.jupyterapp.shell.currentWidget.context.model.dirty")
        page.reload()
        assert seen(rating_page(page, 10)) == before  # the widget is in the kernel still
        takes_the_focus(page, "Item 10 of 20")
        clicked += [judge(page, position) for position in range(10, 13)]
        before = seen(rating_page(page, 13))
        page.wait_for_function(idle)
        page.evaluate(run)
        page.wait_for_function("window.jupyterapp.shell.currentWidget.content.model.cells.get(0).executionCount === 2")
        page.wait_for_function("document.querySelectorAll('.rk-rating').length === 1")
        assert seen(rating_page(page, 13)) == before
        takes_the_focus(page, "Item 13 of 20")
        clicked += [judge(page, position) for position in range(13, 21)]
        expect(page.get_by_text("20 judged, 0 skipped, all kept under the name ana.")).to_be_visible()
        kinds = "[...window.jupyterapp.shell.currentWidget.content.model.cells].map(cell => cell.type)"
        assert page.evaluate(kinds) == ["code"], "a key reached JupyterLab's command mode"
        assert page.get_by_role("dialog").count() == 0
    assert kept(folder / "judgments.db") == clicked
    trains_a_reward_model(folder / "judgments.db", tmp_path / "reward")


def test_twenty_items_on_the_served_page(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "judgments.db"
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    with served(Session(Store(path), ITEMS, "ana")) as server:
        page.goto(server.address)
        clicked = [judge(page, position) for position in range(1, 9)]
        undo_and_judge_again(page, clicked)
        before = seen(rating_page(page, 9))
        page.reload()
        assert seen(rating_page(page, 9)) == before
        clicked += [judge(page, position) for position in range(9, 12)]
        rating_page(page, 12)
    with served(Session(Store(path), ITEMS, "ana")) as server:  # Ctrl-C, and the same command again
        page.goto(server.address)
        clicked += [judge(page, position) for position in range(12, 21)]
        expect(page.get_by_text("20 judged, 0 skipped, all kept under the name ana.")).to_be_visible()
        assert re.search(r"20 of 20 · [\d.]+ a minute", page.get_by_role("status").first.inner_text())
    assert kept(path) == clicked
    assert all(url.startswith(("http://127.0.0.1:", "data:")) for url in requested)
    trains_a_reward_model(path, tmp_path / "reward")


def test_a_double_click_and_a_held_key_judge_one_item(page: Page, tmp_path: Path) -> None:
    store = Store(tmp_path / "j.db")
    with served(Session(store, ITEMS, "ana")) as server:
        page.goto(server.address)
        rating_page(page, 1).get_by_role("button", name="Answer 1 is better").dblclick()
        rating_page(page, 2)
        for _ in range(5):
            page.keyboard.down("2")  # repeats, as a held key does
        page.keyboard.up("2")
        rating_page(page, 3)
        assert len(store.judgments()) == 2


def test_a_second_tab_that_is_behind_is_told_so(chromium: Browser, page: Page, tmp_path: Path) -> None:
    store = Store(tmp_path / "j.db")
    with served(Session(store, ITEMS, "ana")) as server:
        page.goto(server.address)
        rating_page(page, 1)
        behind = chromium.new_page()
        behind.goto(server.address)
        rating_page(behind, 1)
        judge(page, 1)
        rating_page(page, 2)
        behind.keyboard.press("1")
        expect(behind.get_by_role("alert")).to_contain_text("nothing was recorded")
        rating_page(behind, 2)
        assert len(store.judgments()) == 1


def test_two_pages_in_one_document_keep_apart(page: Page, tmp_path: Path) -> None:
    """As in a notebook with the cell twice: the second has the same showing."""
    second = """async () => {
        const {default: {render}} = await import("./page.js");
        const state = await (await fetch("state")).json();
        const el = document.body.appendChild(document.createElement("div"));
        render({model: {get: () => state, on() {}, off() {}, send() {}}, el});
    }"""
    with served(Session(Store(tmp_path / "j.db"), ITEMS, "ana")) as server:
        page.goto(server.address)
        rating_page(page, 1)
        page.evaluate(second)
        expect(page.get_by_role("radio", name="not said", checked=True)).to_have_count(2)


def test_a_server_that_is_gone_loses_nothing_in_silence(page: Page, tmp_path: Path) -> None:
    with served(Session(Store(tmp_path / "j.db"), ITEMS, "ana")) as server:
        page.goto(server.address)
        rating_page(page, 1)
    page.keyboard.press("1")
    expect(page.get_by_role("alert")).to_contain_text("Not saved: rlhf-kit rate does not answer")
    expect(page.get_by_role("status").first).to_contain_text("1 of 20")


def test_a_ranking_by_keys_with_a_tie_and_a_step_back(page: Page, tmp_path: Path) -> None:
    store = Store(tmp_path / "j.db")
    items = [Item(f"{i} ?", ("a", "b", "c", "d")) for i in range(2)]
    with served(Session(store, items, "ana")) as server:
        page.goto(server.address)
        root = rating_page(page, 1)
        letters = [root.get_by_role("group", name=f"Answer {place}, text").inner_text() for place in range(1, 5)]
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("Rank all 4 answers")
        for key in ("3", "1", "Backspace", "2", "0", "4", "1"):
            page.keyboard.press(key)
        expect(root).to_contain_text("Your order: 3 = 2 > 4 > 1")
        page.keyboard.press("Enter")
        root = rating_page(page, 2)
        for place in (1, 2, 3, 4):
            root.get_by_role("button", name=f"Answer {place}").click()
        root.get_by_role("button", name="Confirm").click()
        expect(page.get_by_text("2 judged")).to_be_visible()
    first, second = store.judgments()["ranks"]
    assert [first["abcd".index(letter)] for letter in letters] == [3, 1, 1, 2]
    assert sorted(second) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("question", "keys", "ratings"), [("good/bad", "gb12", [1, 0, 1, 0]), ("1-7", "1746", [1, 7, 4, 6])]
)
def test_ratings_by_keys(page: Page, tmp_path: Path, question: str, keys: str, ratings: list[int]) -> None:
    store = Store(tmp_path / "j.db")
    with served(Session(store, [Item(f"{i} ?", ("a",)) for i in range(5)], "ana", question)) as server:  # type: ignore[arg-type]
        page.goto(server.address)
        for position, key in enumerate(keys, 1):
            rating_page(page, position)
            page.keyboard.press(key)
        rating_page(page, 5)
        page.keyboard.press("s")
        expect(page.get_by_text("4 judged, 1 skipped")).to_be_visible()
    assert list(store.judgments()["rating"])[:4] == ratings


def test_texts_are_shown_as_they_are_and_none_becomes_markup(page: Page, tmp_path: Path) -> None:
    script = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    with served(Session(Store(tmp_path / "j.db"), [Item(CHAT, (script, LONG))], "ana")) as server:
        page.goto(server.address)
        root = rating_page(page, 1)
        assert root.get_by_role("group", name="Prompt, text").inner_text() == (
            "system\nbe brief\nuser\na <b>bold</b>\n  question ?"
        )
        assert root.locator("img, script, b").count() == 0
        assert page.title() == "Rating"
        columns = root.locator(".rk-text").evaluate_all(
            "all => all.map(each => each.getBoundingClientRect().width / parseFloat(getComputedStyle(each).fontSize))"
        )
        assert max(columns) < 45  # em: 70 characters of about .6 em
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def named(page: Page) -> str:
    return str(
        page.evaluate(
            "(document.activeElement.ariaLabel ?? document.activeElement.labels?.[0]?.textContent ?? "
            "document.activeElement.textContent).trim()"
        )
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_for_everybody(chromium: Browser, tmp_path: Path, scheme: str) -> None:
    """Each control has a role and a name, Tab reaches it, focus is visible and goes along, and texts have 4.5:1."""
    page = chromium.new_page(color_scheme=scheme, reduced_motion="reduce", viewport={"width": 1100, "height": 900})  # type: ignore[arg-type]
    with served(Session(Store(tmp_path / "j.db"), [Item(CHAT, ("a", LONG)), *ITEMS], "ana")) as server:
        page.goto(server.address)
        root = rating_page(page, 1)
        assert named(page) == "Item 1 of 21"
        for role, name, key in [
            ("button", "Answer 1 is better", "1"),
            ("button", "Answer 2 is better", "2"),
            ("button", "Tie", "0"),
            ("button", "Undo", "ArrowLeft"),
            ("button", "Skip", "s"),
            ("radio", "slightly", "7"),
            ("radio", "clearly", "8"),
            ("radio", "much", "9"),
            ("textbox", "Note", "n"),
        ]:
            expect(root.get_by_role(role, name=name)).to_have_attribute("aria-keyshortcuts", key)  # type: ignore[arg-type]
        expect(root.get_by_role("radiogroup")).to_be_visible()
        expect(root.get_by_role("progressbar", name="Judged")).to_be_visible()
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            if page.evaluate("!document.activeElement.closest('.rk-item')"):
                break
            reached.append(named(page))
            outline = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
            assert outline >= 3, reached[-1]
        names = [re.sub(r"^[0-9s\u2190](?=[A-Z])", "", name) for name in reached]  # the key that a button shows
        answers = ["Answer 1, text", "Answer 1 is better", "Answer 2, text", "Answer 2 is better"]
        assert names[:5] == ["Prompt, text", *answers]
        assert [name.split()[0] for name in names[5:]] == ["not", "Tie", "Note", "Undo", "Skip"]
        judge(page, 1)
        rating_page(page, 2)
        assert named(page) == "Item 2 of 21"  # a screen reader reads on from there
        page.keyboard.press("ArrowLeft")
        rating_page(page, 1)
        page.evaluate("document.querySelector('.rk-error').hidden = false")
        page.evaluate("document.querySelector('.rk-error').textContent = 'a fault'")
        assert page.evaluate(POOR_CONTRASTS) == []
    page.close()
