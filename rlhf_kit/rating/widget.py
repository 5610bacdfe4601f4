"""The rating page in a notebook: an anywidget over a session. Needs the `notebooks` extra."""

import anywidget
import traitlets

from .server import STATIC
from .session import Session


class RatingWidget(anywidget.AnyWidget):
    """The page of a session; other cells run while it is open."""

    _esm = STATIC / "page.js"
    _css = STATIC / "page.css"
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, session: Session) -> None:
        super().__init__(state=session.state())
        self.on_msg(lambda _, message, buffers: self.set_trait("state", session.act(message)))
