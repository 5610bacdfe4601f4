"""A Chromium that calls nobody, and a JupyterLab on loopback: for the tests that look at pages."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import pytest
from playwright.sync_api import Browser, sync_playwright

from rlhf_kit.rating import Page as Served
from rlhf_kit.rating import Session

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


def chromium() -> str:
    """The browser's path; without one the test skips, or fails where RLHF_KIT_REQUIRE_BROWSER=1 lets nothing skip."""
    if CHROMIUM is None:
        reason = "no Chromium is installed, so nothing was opened in a browser (on Debian: apt install chromium)"
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


@contextmanager
def served(session: Session) -> Iterator[Served]:
    """The rating page of a session, answering until the block ends."""
    with Served(session) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium that Playwright drives; the test skips, or fails, where there is none."""
    path = chromium()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=QUIET_CHROMIUM)
        try:
            yield opened
        finally:
            opened.close()
