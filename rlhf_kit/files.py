"""Files and folders that are whole or not there: written under a temporary name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; what the block writes there, a file or a folder, then becomes `path`.

    After an error nothing of it stays, and what had that name before is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())  # or a power cut could leave the new name on an empty file
        publish(temporary, path)
    finally:
        remove(temporary)


def publish(made: Path, path: Path) -> None:
    """Give what was made its final name; an older folder of that name is put aside first and removed last."""
    aside = path.with_name(f".{path.name}.old")
    if path.is_dir():
        remove(aside)
        path.rename(aside)
    made.replace(path)
    remove(aside)  # also after a kill between the two renames


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def differences(there: Any, here: Any, name: str = "") -> list[str]:
    """Each value of two JSON objects that differs, as "optimizer.lr is 0.1 there and 0.2 here"."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys, prefix = dict.fromkeys([*there, *here]), f"{name}." if name else ""
        pairs = [(there.get(key, "absent"), here.get(key, "absent"), f"{prefix}{key}") for key in keys]
        return [text for pair in pairs for text in differences(*pair)]
    return [] if there == here else [f"{name} is {there} there and {here} here"]
