"""A Chromium that calls nobody, and a JupyterLab on loopback: for the tests that look at pages."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from rlhf_kit import rating

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = "no-sandbox disable-gpu disable-quic no-first-run disable-sync disable-background-networking "
QUIET += "disable-component-update"
START_SECONDS = 60
PANEL = "window.jupyterapp?.shell.currentWidget"
IDLE = f"{PANEL}?.sessionContext?.session?.kernel?.status === 'idle'"


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium; without one the test skips, or fails under RLHF_KIT_REQUIRE_BROWSER=1."""
    if CHROMIUM is None:
        stop = pytest.fail if os.environ.get("RLHF_KIT_REQUIRE_BROWSER") == "1" else pytest.skip
        stop("no Chromium is installed, so nothing was opened in a browser (on Debian: apt install chromium)")
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=[f"--{name}" for name in QUIET.split()])


@contextmanager
def jupyterlab(page: Page, notebook: Path) -> Iterator[None]:
    """The notebook, open in a JupyterLab on loopback that has nothing of this person's settings, its kernel idle."""
    home = notebook.parent.parent / "home"
    settings = home / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))  # else a cell out of sight is not in the page
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    folders |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    environment = os.environ | folders | {"JUPYTER_TOKEN": token, "RLHF_KIT_RESULTS": str(home / "results")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={notebook.parent}"]
    log = home / "jupyterlab.log"
    with log.open("w") as lines:
        server = subprocess.Popen(command, env=environment, stdout=lines, stderr=lines)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not list((home / "runtime").glob("jpserver-*.json")):  # written once it listens
            up = server.poll() is None and time.monotonic() < deadline
            assert up, f"JupyterLab did not start:\n{log.read_text()}"
            time.sleep(0.2)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token={token}")
        page.wait_for_function(IDLE)
        yield
    finally:
        server.terminate()  # it ends its kernels too
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()


@contextmanager
def served(session: rating.Session) -> Iterator[rating.Page]:
    """The rating page of a session, answering until the block ends."""
    with rating.Page(session) as server, ThreadPoolExecutor(1) as background:
        background.submit(server.serve_forever, 0.02)
        try:
            yield server
        finally:
            server.shutdown()
