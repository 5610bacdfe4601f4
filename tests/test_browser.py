"""What a reader does: open the tour in JupyterLab in a browser, Run All Cells, and look at the pictures."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import nbformat
import pytest
from playwright.sync_api import Page, sync_playwright

from notebooks import build

pytestmark = [pytest.mark.browser, pytest.mark.slow]

TOUR = build.FOLDER / "py" / "00_tour.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET_CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START_SECONDS = 60
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


def chromium() -> str:
    """The browser's path; without one the test skips, or fails where RLHF_KIT_REQUIRE_BROWSER=1 lets nothing skip."""
    if CHROMIUM is None:
        reason = "no Chromium is installed, so the tour was not opened in a browser (on Debian: apt install chromium)"
        if os.environ.get("RLHF_KIT_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return CHROMIUM


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (URLError, OSError):
        return False


@contextmanager
def jupyterlab(folder: Path, home: Path) -> Iterator[tuple[str, str]]:
    """A JupyterLab on loopback over `folder`, with nothing of this person's settings; yields its address and token."""
    settings = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))  # else a cell out of sight is not in the page
    address, token = f"http://127.0.0.1:{free_port()}", secrets.token_hex(16)
    environment = os.environ | {
        "JUPYTER_TOKEN": token,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "RLHF_KIT_RESULTS": str(home / "results"),
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ip=127.0.0.1", f"--port={address.rpartition(':')[2]}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={folder}"]
    log = home / "jupyterlab.log"
    with log.open("w") as lines:
        server = subprocess.Popen(command, env=environment, stdout=lines, stderr=lines, start_new_session=True)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(f"{address}/api/status?token={token}"):
            assert server.poll() is None and time.monotonic() < deadline, (
                f"JupyterLab did not start:\n{log.read_text()}"
            )
            time.sleep(0.2)
        yield address, token
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def run_all_cells(page: Page, url: str) -> None:
    """Open a notebook and click Run > Run All Cells; returns when the last cell has run or one has failed."""
    page.goto(url)
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(FINISHED, timeout=RUN_SECONDS * 1000, polling=500)


@pytest.mark.skipif(not TOUR.exists(), reason="there is no notebooks/py/00_tour.py yet")
def test_run_all_on_the_tour_shows_its_pictures_and_no_error(tmp_path: Path) -> None:
    browser_path = chromium()
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(build.read(TOUR), folder / "00_tour.ipynb")  # without the committed outputs
    with jupyterlab(folder, tmp_path) as (address, token), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=QUIET_CHROMIUM)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
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
            browser.close()
