"""The rating page in a notebook: an anywidget over a session. Needs the `notebooks` extra."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from .server import STATIC
from .session import Session


class RatingWidget(anywidget.AnyWidget):
    """The page of a session; it waits for nobody, so other cells run while it is open."""

    _esm = STATIC / "page.js"
    _css = STATIC / "page.css"
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, session: Session) -> None:
        super().__init__(state=session.state())
        self.session = session
        self.on_msg(self._act)

    def _act(self, _: RatingWidget, message: Any, buffers: list[bytes]) -> None:
        self.state = self.session.act(message if isinstance(message, dict) else {})
