"""What a reader does: open the tour in JupyterLab in a browser, Run All Cells, and look at the pictures."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from browsing import START_SECONDS, browser, jupyterlab
from playwright.sync_api import Page

from notebooks import build

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOUR = build.FOLDER / "py" / "00_tour.py"
RUN_SECONDS = 900

# The state of the notebook as JupyterLab itself knows it: cells out of sight are not in the page.
STATE = """() => {
    const panel = window.jupyterapp.shell.currentWidget;
    const cells = [...panel.content.model.cells].filter(cell => cell.type === "code");
    const outputs = cells.flatMap(cell => cell.outputs.toJSON());
    return {
        kernel: panel.sessionContext.session?.kernel?.status,
        counts: cells.map(cell => cell.executionCount),
        errors: outputs.filter(output => output.output_type === "error").map(o => `${o.ename}: ${o.evalue}`),
    };
}"""
# Run All stops at the first error, so an error ends the wait too.
FINISHED = f"""() => {{
    const {{kernel, counts, errors}} = ({STATE})();
    return kernel === "idle" && (counts.every(count => count !== null) || errors.length > 0);
}}"""
PICTURES = """() => [...document.querySelectorAll(".jp-OutputArea-output img")]
    .filter(image => image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().height > 0).length"""


def run_all_cells(page: Page, url: str) -> None:
    """Open a notebook and click Run > Run All Cells; returns when the last cell has run or one has failed."""
    page.goto(url)
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(FINISHED, timeout=RUN_SECONDS * 1000, polling=500)


@pytest.mark.skipif(not TOUR.exists(), reason="there is no notebooks/py/00_tour.py yet")
def test_run_all_on_the_tour_shows_its_pictures_and_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(build.read(TOUR, PRESET="quick"), folder / "00_tour.ipynb")  # without the committed outputs
    with browser() as chromium, jupyterlab(folder, tmp_path) as (address, token):
        page = chromium.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(START_SECONDS * 1000)
        try:
            run_all_cells(page, f"{address}/lab/tree/00_tour.ipynb?token={token}")
            state = page.evaluate(STATE)
            assert state["errors"] == []
            assert state["counts"] == list(range(1, len(state["counts"]) + 1))
            assert page.get_by_role("dialog").count() == 0, page.get_by_role("dialog").inner_text()
            assert page.evaluate(PICTURES) >= 2
        finally:
            page.screenshot(path=tmp_path / "tour.png")
