"""The rating page as a person meets it: in JupyterLab and served, by keyboard and by mouse, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import browsing
import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from rlhf_kit.feedback import Item, Store
from rlhf_kit.rating import Session

pytestmark = [pytest.mark.browser, pytest.mark.slow]

expect.set_options(timeout=browsing.START_SECONDS * 1000)  # JupyterLab on a busy machine

ITEMS = [Item(f"is {i} an animal ?", (f"no , {i} is a number .", f"yes , {i} is .")) for i in range(12)]
CELL = 'import rlhf_kit as rk\nrk.rate(rk.feedback.Store("judgments.db").items(), store="judgments.db", rater="ana")'
END = "12 judged, 0 skipped, all kept under the name ana."
LONG = " ".join(["the sea otter holds hands while it sleeps ."] * 200)
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a <b>bold</b>\n  question ?"}]

# The texts with less than 4.5:1 against what is behind them, by WCAG 2.1. A canvas reads any notation of a colour.
POOR_CONTRASTS = """() => {
    const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const luminance = (layers) => {
        for (const colour of ["white", ...layers]) {
            context.fillStyle = colour;
            context.fillRect(0, 0, 1, 1);
        }
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    };
    const contrast = (element) => {
        const layers = [];
        for (let at = element; at; at = at.parentElement) layers.unshift(getComputedStyle(at).backgroundColor);
        const both = [luminance(layers), luminance([...layers, getComputedStyle(element).color])];
        return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    };
    return [...document.querySelectorAll(".rk-rating *")]
        .filter(element => [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()))
        .filter(element => element.getBoundingClientRect().height > 0 && contrast(element) < 4.5)
        .map(element => [contrast(element), element.textContent.slice(0, 40), element.className]);
}"""


class Clicked(NamedTuple):
    prompt: str
    ranks: tuple[int, ...]  # of the answers as shown
    shown: tuple[str, ...]
    strength: str | None = None
    note: str = ""


def rating_page(page: Page, position: int) -> Locator:
    """The page, once it takes answers to that item."""
    root = page.get_by_role("region", name="Rating", exact=True)
    expect(root.get_by_role("status").first).to_contain_text(f"{position} of ")
    expect(root).to_have_attribute("aria-busy", "false")
    return root


@contextmanager
def opened(page: Page, session: Session) -> Iterator[Locator]:
    """The page of a session, served and open at its first item."""
    with browsing.served(session) as server:
        page.goto(server.address)
        yield rating_page(page, session.state()["judged"] + 1)


def seen(root: Locator) -> tuple[str, tuple[str, ...]]:
    prompt, *shown = (part.inner_text() for part in root.get_by_role("group", name=re.compile(", text$")).all())
    return prompt, tuple(shown)


def judge(page: Page, position: int) -> Clicked:
    """One item, in a way that its position says: by key or mouse, the first, the second or neither, with a strength."""
    root = rating_page(page, position)
    prompt, shown = seen(root)
    mouse, strength, note = position % 2 == 0, None, ""
    if position % 5 == 0:
        note = "1 s g"  # keys that must not be read as a choice
        root.get_by_role("textbox").click() if mouse else page.keyboard.press("n")
        page.keyboard.type(note)
        page.keyboard.press("Escape")
    if position % 4 == 1:
        strength = "much"
        page.keyboard.press("9")
    elif position % 4 == 2:
        strength = "slightly"
        root.get_by_role("button", name="slightly").click()
    key = "0" if position % 7 == 0 else "1" if position % 3 else "2"
    button = root.get_by_role("button", name="Tie" if key == "0" else f"Answer {key} is better")
    button.click() if mouse else page.keyboard.press(key)
    ranks = {"0": (1, 1), "1": (1, 2), "2": (2, 1)}[key]
    return Clicked(prompt, ranks, shown, strength if key != "0" else None, note)


def kept(store: Store) -> list[Clicked]:
    """What the store has, in the order of the page."""
    found = []
    for row in store.judgments().itertuples():
        ranks, shown = zip(*((row.ranks[i], row.completions[i]) for i in row.shown), strict=True)
        found.append(Clicked(row.prompt, ranks, shown, row.strength, row.note))
    return found


def undo_and_judge_again(page: Page, clicked: list[Clicked]) -> None:
    position = len(clicked) + 1
    rating_page(page, position)
    page.keyboard.press("ArrowLeft")
    assert seen(rating_page(page, position - 1)) == (clicked[-1].prompt, clicked[-1].shown)
    key, other = ("2", (2, 1)) if clicked[-1].ranks == (1, 2) else ("1", (1, 2))
    page.keyboard.press(key)
    clicked[-1] = clicked[-1]._replace(ranks=other, strength=None, note="")
    rating_page(page, position)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing.browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    page = browsing.opened(chromium)
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.context.close()
    assert said == []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "judgments.db")


def test_a_cell_in_jupyterlab_keeps_each_judgment_through_undo_reload_and_another_run(
    page: Page, tmp_path: Path
) -> None:
    path = tmp_path / "notebooks" / "rating.ipynb"
    path.parent.mkdir()
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=kernel), path)
    Store(path.parent / "judgments.db").add(ITEMS)
    run = "window.jupyterapp.commands.execute('notebook:run-all-cells')"

    def takes_the_focus(position: int) -> None:
        """JupyterLab gives the focus to the notebook when a cell has run; the page has it in the end."""
        rating_page(page, position)
        page.wait_for_timeout(1500)
        expect(page.get_by_role("group", name=f"Item {position} of 12")).to_be_focused()

    with browsing.jupyterlab(page, path):
        page.evaluate(run)
        takes_the_focus(1)
        clicked = [judge(page, position) for position in range(1, 4)]
        undo_and_judge_again(page, clicked)
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_function(f"!{browsing.PANEL}.context.model.dirty")
        page.reload()
        takes_the_focus(4)  # the widget is in the kernel still
        clicked += [judge(page, position) for position in range(4, 7)]
        before = seen(rating_page(page, 7))
        page.wait_for_function(browsing.IDLE)
        page.evaluate(run)
        page.wait_for_function(f"{browsing.PANEL}.content.model.cells.get(0).executionCount === 2")
        page.wait_for_function("document.querySelectorAll('.rk-rating').length === 1")
        takes_the_focus(7)
        assert seen(rating_page(page, 7)) == before
        clicked += [judge(page, position) for position in range(7, 13)]
        expect(page.get_by_text(END)).to_be_visible()
        kinds = f"[...{browsing.PANEL}.content.model.cells].map(cell => cell.type)"
        assert page.evaluate(kinds) == ["code"], "a key reached JupyterLab's command mode"
        assert page.get_by_role("dialog").count() == 0
    assert kept(Store(path.parent / "judgments.db")) == clicked


def test_the_served_page_goes_on_after_a_reload_and_after_the_command_was_ended(page: Page, store: Store) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    with opened(page, Session(store, ITEMS, "ana")):
        clicked = [judge(page, position) for position in range(1, 6)]
        undo_and_judge_again(page, clicked)
        before = seen(rating_page(page, 6))
        page.reload()
        assert seen(rating_page(page, 6)) == before
    page.keyboard.press("1")
    expect(page.get_by_role("alert")).to_contain_text("Not saved: rlhf-kit rate does not answer")
    expect(page.get_by_role("status").first).to_contain_text("6 of 12")
    with opened(page, Session(store, ITEMS, "ana")):  # the same command again
        clicked += [judge(page, position) for position in range(6, 13)]
        expect(page.get_by_text(END)).to_be_visible()
    assert kept(store) == clicked
    assert all(url.startswith(("http://127.0.0.1:", "data:")) for url in requested)


def test_a_double_click_a_held_key_and_a_second_tab_judge_each_item_once(page: Page, store: Store) -> None:
    with opened(page, Session(store, ITEMS, "ana")) as root, page.context.new_page() as behind:
        behind.goto(page.url)
        rating_page(behind, 1)
        root.get_by_role("button", name="Answer 1 is better").dblclick()
        rating_page(page, 2)
        for _ in range(5):
            page.keyboard.down("2")  # repeats, as a held key does
        page.keyboard.up("2")
        rating_page(page, 3)
        behind.keyboard.press("1")
        expect(behind.get_by_role("alert")).to_contain_text("nothing was recorded")
        rating_page(behind, 3)
        assert len(store.judgments()) == 2


def test_a_ranking_by_keys_with_a_tie_and_a_step_back(page: Page, store: Store) -> None:
    with opened(page, Session(store, [Item("?", ("a", "b", "c", "d"))], "ana")) as root:
        letters = seen(root)[1]
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("Rank all 4 answers")
        root.get_by_role("button", name="Answer 3").click()
        orders = {"14": "3 > 1 > 4", "1": "3 > 4", "20": "3 > 4 = 2", "4B4": "3 > 4", "201": "3 > 4 = 2 > 1"}
        for keys, order in orders.items():
            for key in keys:
                page.keyboard.press("Backspace" if key == "B" else key)
            expect(root.get_by_text("Your order: ")).to_have_text(f"Your order: {order}")
        page.keyboard.press("Enter")
        expect(page.get_by_text("1 judged")).to_be_visible()
    [ranks] = store.judgments()["ranks"]
    assert [ranks["abcd".index(letter)] for letter in letters] == [3, 2, 1, 2]


@pytest.mark.parametrize(("question", "keys", "ratings"), [("good/bad", "gB", [1, 0]), ("1-7", "17", [1, 7])])
def test_ratings_by_keys(page: Page, store: Store, question: Any, keys: str, ratings: list[int]) -> None:
    with opened(page, Session(store, [Item(f"{i} ?", ("a",)) for i in range(3)], "ana", question)):
        for position, key in enumerate([*keys, "s"], 1):
            rating_page(page, position)
            page.keyboard.press(key)
        expect(page.get_by_text("2 judged, 1 skipped")).to_be_visible()
    assert list(store.judgments()["rating"])[:2] == ratings


def named(page: Page) -> str:
    """The name of what has the focus."""
    focused = "document.activeElement"
    name = f"{focused}.ariaLabel ?? {focused}.labels?.[0]?.textContent ?? {focused}.textContent"
    return str(page.evaluate(f"({name}).trim()"))


def test_the_page_is_for_everybody_and_no_text_becomes_markup(page: Page, store: Store) -> None:
    """Each control has a role and a name, Tab reaches it, focus is visible and goes along, and texts have 4.5:1."""
    script = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"
    with opened(page, Session(store, [Item(CHAT, (script, LONG)), *ITEMS], "ana")) as root:
        assert named(page) == "Item 1 of 13"
        assert seen(root)[0] == "system\nbe brief\nuser\na <b>bold</b>\n  question ?"
        assert script in seen(root)[1]
        assert root.locator("img, script, b").count() == 0 and page.title() == "Rating"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        expect(root.get_by_role("progressbar", name="Judged")).to_be_visible()
        controls = {"Answer 1 is better": "1", "Answer 2 is better": "2", "slightly": "7", "clearly": "8", "much": "9"}
        controls |= {"Tie": "0", "Note": "n", "Undo": "ArrowLeft", "Skip": "s"}
        for name, key in controls.items():
            control = root.get_by_role("textbox" if name == "Note" else "button", name=name)
            expect(control).to_have_attribute("aria-keyshortcuts", key)
        reached = []
        for _ in range(12):
            page.keyboard.press("Tab")
            assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 3
            reached.append(re.sub(r"^[0-9s\u2190](?=\w{2})|(?<=Note).*", "", named(page)))  # without the button's key
        assert [name for name in reached if ", text" not in name] == list(controls)
        judge(page, 1)
        rating_page(page, 2)
        assert named(page) == "Item 2 of 13"  # a screen reader reads on from there
        page.keyboard.press("ArrowLeft")
        rating_page(page, 1)
        page.keyboard.press("ArrowLeft")
        expect(page.get_by_role("alert")).to_contain_text("no judgment to take back")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            assert page.evaluate(POOR_CONTRASTS) == []
