"""The picture of the rating page: python notebooks/page_picture.py writes notebooks/figures/rating_page.png.

The served page over three items of the pocket world, one judged, in the Chromium of this machine.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

from rlhf_kit.feedback import Item, Store
from rlhf_kit.rating import Page, Session
from rlhf_kit.tasks import Pocket

PICTURE = Path(__file__).resolve().parent / "figures" / "rating_page.png"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MAX_BYTES = 150_000


def items(n: int = 3) -> list[Item]:
    """Prompts of the pocket world, each with two demonstrations by different writers."""
    one, other = (
        {row["prompt"]: row["completion"].strip() for row in Pocket().demonstrations(seed=seed)} for seed in (0, 1)
    )
    found = [(prompt, one[prompt], other[prompt]) for prompt in one if one[prompt] != other.get(prompt, one[prompt])]
    return [Item(prompt, (first, second)) for prompt, first, second in found[:n]]


def photograph(session: Session, out: Path) -> None:
    """Judge the first item by keys, say how much better on the second, and save what the page shows then."""
    with Page(session) as server, sync_playwright() as playwright:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = browser.new_page(viewport={"width": 900, "height": 600}, color_scheme="light")
            page.goto(server.address)
            page.wait_for_selector(".rk-rating[aria-busy=false]")
            page.wait_for_timeout(6000)  # a pace that a reader would have
            page.keyboard.press("1")
            page.wait_for_selector("[aria-label='Item 2 of 3']")
            page.wait_for_selector(".rk-rating[aria-busy=false]")
            page.keyboard.press("8")
            page.locator(".rk-rating").screenshot(path=out)
        finally:
            browser.close()
            server.shutdown()
            thread.join()


def main() -> None:
    PICTURE.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        photograph(Session(Store(Path(folder) / "judgments.db"), items(), "ana"), PICTURE)
    size = PICTURE.stat().st_size
    if size > MAX_BYTES:
        raise SystemExit(f"{PICTURE}: {size} bytes, over {MAX_BYTES}; make the page smaller")
    print(f"{PICTURE}: {size} bytes")


if __name__ == "__main__":
    main()
