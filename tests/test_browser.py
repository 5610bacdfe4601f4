"""What a reader does in a browser: run the tour in JupyterLab; rate in JupyterLab and on the served page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import browsing
import nbformat
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from notebooks import build
from rlhf_kit.feedback import Item, Store
from rlhf_kit.rating import Session

pytestmark = [pytest.mark.browser, pytest.mark.slow]

expect.set_options(timeout=browsing.START_SECONDS * 1000)  # JupyterLab on a busy machine

ITEMS = [Item(f"is {i} an animal ?", (f"no , {i} is a number .", f"yes , {i} is .")) for i in range(12)]
CELL = 'import rlhf_kit as rk\nrk.rate(rk.feedback.Store("judgments.db").items(), store="judgments.db", rater="ana")'
END = "12 judged, 0 skipped, all kept under the name ana."
LONG = " ".join(["the sea otter holds hands while it sleeps ."] * 200)
CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a <b>bold</b>\n  question ?"}]

# The notebook as JupyterLab itself knows it, since cells out of sight are not in the page; null until it has run. Run
# All stops at the first error, so an error ends the wait too.
FINISHED = f"""() => {{
    const cells = [...{browsing.PANEL}.content.model.cells].filter(cell => cell.type === "code");
    const counts = cells.map(cell => cell.executionCount);
    const errors = cells.flatMap(cell => cell.outputs.toJSON()).filter(output => output.output_type === "error");
    return {browsing.IDLE} && (counts.every(count => count !== null) || errors.length > 0) ? {{counts, errors}} : null;
}}"""
PICTURES = """() => [...document.querySelectorAll(".jp-OutputArea-output img")]
    .filter(image => image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().height > 0).length"""
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


# A judgment: the prompt, the answers as shown, their ranks, the strength and the note.
Judgment = tuple[str, list[str], list[int], str | None, str]


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


def seen(root: Locator) -> tuple[str, list[str]]:
    prompt, *shown = (part.inner_text() for part in root.get_by_role("group", name=re.compile(", text$")).all())
    return prompt, shown


def judge(page: Page, position: int) -> Judgment:
    """One item, in a way that its position says: by mouse or key, with a note, a strength, for the first or a tie."""
    root = rating_page(page, position)

    def press(key: str) -> None:
        page.keyboard.press(key) if position % 2 else root.locator(f"[aria-keyshortcuts='{key}']").click()

    prompt, shown = seen(root)
    note = "" if position % 5 else "1 s g"  # keys that must not be read as a choice
    if note:
        press("n")
        page.keyboard.type(note)
        page.keyboard.press("Escape")
    key, strength = [(None, None), ("9", "much"), ("7", "slightly"), (None, None)][position % 4]
    if key:
        press(key)
    key, ranks = ("0", [1, 1]) if position % 7 == 0 else ("1", [1, 2]) if position % 3 else ("2", [2, 1])
    press(key)
    return prompt, shown, ranks, None if key == "0" else strength, note


def kept(store: Store) -> list[Judgment]:
    """What the store has, in the order of the page."""
    rows = store.judgments().itertuples()
    in_order = [(row, [row.completions[i] for i in row.shown], [row.ranks[i] for i in row.shown]) for row in rows]
    return [(row.prompt, shown, ranks, row.strength, row.note) for row, shown, ranks in in_order]


def undo_and_judge_again(page: Page, clicked: list[Judgment]) -> None:
    prompt, shown, ranks, *_ = clicked.pop()
    rating_page(page, len(clicked) + 2)
    page.keyboard.press("ArrowLeft")
    assert seen(rating_page(page, len(clicked) + 1)) == (prompt, shown)
    page.keyboard.press("2" if ranks == [1, 2] else "1")
    clicked.append((prompt, shown, ranks[::-1], None, ""))
    rating_page(page, len(clicked) + 1)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browsing.browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Browser, tmp_path: Path) -> Iterator[Page]:
    page = chromium.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    page.set_default_timeout(browsing.START_SECONDS * 1000)
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    yield page
    page.screenshot(path=tmp_path / "page.png")
    page.context.close()
    assert said == []


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "judgments.db")


def test_run_all_on_the_tour_shows_its_pictures_and_no_error(page: Page, tmp_path: Path) -> None:
    notebook = tmp_path / "notebooks" / "00_tour.ipynb"
    notebook.parent.mkdir()
    nbformat.write(build.read(build.FOLDER / "py" / "00_tour.py", PRESET="quick"), notebook)
    with browsing.jupyterlab(page, notebook):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        state = page.wait_for_function(FINISHED, timeout=900_000, polling=500).json_value()
        assert state["errors"] == []
        assert state["counts"] == list(range(1, len(state["counts"]) + 1))
        assert page.get_by_role("dialog").count() == 0, page.get_by_role("dialog").inner_text()
        assert page.evaluate(PICTURES) >= 2


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
        root.get_by_role("button", name="Answer 1 is better").dblclick(delay=400)  # the next item takes answers by then
        rating_page(page, 2)
        for _ in range(3):
            page.keyboard.down("2")  # repeats, as a held key does
            page.wait_for_timeout(400)
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
