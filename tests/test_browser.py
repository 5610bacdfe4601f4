"""What a reader does: open the tour in JupyterLab in a browser, Run All Cells, and look at the pictures."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from browsing import PANEL, browser, jupyterlab, opened

from notebooks import build

pytestmark = [pytest.mark.browser, pytest.mark.slow]

RUN_SECONDS = 900
# The state of the notebook as JupyterLab itself knows it: cells out of sight are not in the page.
STATE = f"""() => {{
    const cells = [...{PANEL}.content.model.cells].filter(cell => cell.type === "code");
    const outputs = cells.flatMap(cell => cell.outputs.toJSON());
    return {{
        kernel: {PANEL}.sessionContext.session?.kernel?.status,
        counts: cells.map(cell => cell.executionCount),
        errors: outputs.filter(output => output.output_type === "error").map(o => `${{o.ename}}: ${{o.evalue}}`),
    }};
}}"""
# Run All stops at the first error, so an error ends the wait too.
FINISHED = f"""() => {{
    const {{kernel, counts, errors}} = ({STATE})();
    return kernel === "idle" && (counts.every(count => count !== null) || errors.length > 0);
}}"""
PICTURES = """() => [...document.querySelectorAll(".jp-OutputArea-output img")]
    .filter(image => image.complete && image.naturalWidth > 0 && image.getBoundingClientRect().height > 0).length"""


def test_run_all_on_the_tour_shows_its_pictures_and_no_error(tmp_path: Path) -> None:
    notebook = tmp_path / "notebooks" / "00_tour.ipynb"
    notebook.parent.mkdir()
    nbformat.write(build.read(build.FOLDER / "py" / "00_tour.py", PRESET="quick"), notebook)
    with browser() as chromium:
        page = opened(chromium)
        with jupyterlab(page, notebook):
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            page.wait_for_function(FINISHED, timeout=RUN_SECONDS * 1000, polling=500)
            page.screenshot(path=tmp_path / "tour.png")
            state = page.evaluate(STATE)
            assert state["errors"] == []
            assert state["counts"] == list(range(1, len(state["counts"]) + 1))
            assert page.get_by_role("dialog").count() == 0, page.get_by_role("dialog").inner_text()
            assert page.evaluate(PICTURES) >= 2
