"""Build notebooks/NN_name.ipynb from notebooks/py/NN_name.py: a full run from a fresh kernel, with its outputs kept.

    python notebooks/build.py              every notebook, in order
    python notebooks/build.py 05_ppo       only this one

What the clock, the machine or the kernel would change is left out, so that a rebuilt notebook differs only where its
code or its results do.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode
from nbstripout import strip_output

FOLDER = Path(__file__).resolve().parent
MAX_BYTES = 1_000_000
METADATA = {
    # A notebook without a kernelspec opens a dialog that asks for one.
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


class NotebookFailed(Exception):
    """A cell raised or the kernel died; the message names the cell and ends in the traceback."""


def read(source: Path, **parameters: object) -> NotebookNode:
    """The notebook of a py:percent text, without outputs; `parameters` are set at the end of the cell of that tag."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    if parameters:
        [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


def run(
    notebook: NotebookNode,
    folder: Path,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
    on_code_cell: Callable[[], None] = lambda: None,
) -> None:
    """Execute in place, in a fresh kernel that stands in `folder` and has these variables besides the caller's own.

    `timeout` is seconds per cell.
    Raises NotebookFailed at the first cell that raises, hangs or loses its kernel.
    """
    started = 0

    def on_start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal started
        started = cell_index
        if cell.cell_type == "code":
            on_code_cell()

    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        timeout=timeout,
        on_cell_start=on_start,
        coalesce_streams=True,  # how output is cut into pieces is chance
        record_timing=False,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # else it warns of each kernel's loopback port
    )
    try:
        client.execute(env=os.environ | (environment or {}))
    except (CellExecutionError, DeadKernelError, TimeoutError) as error:
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        raise NotebookFailed(f"cell {started + 1} of {len(notebook.cells)} failed\n{traceback}") from error


def save(notebook: NotebookNode, path: Path) -> int:
    """Write what is worth keeping of an executed notebook, whole or not at all, and return its size in bytes."""
    notebook = strip_output(notebook, keep_output=True, keep_count=False, keep_id=False)
    notebook.metadata = nbformat.from_dict(METADATA)
    partial = path.with_name(f".{path.name}.partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)
    return path.stat().st_size


def sources(folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """The texts to build, in reading order; ValueError names what is not there."""
    found = {path.stem: path for path in sorted((folder / "py").glob("[0-9][0-9]_*.py"))}
    wanted = [Path(name).stem for name in names] or list(found)
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ValueError(f"no notebook {', '.join(unknown)} in {folder / 'py'}; there is: {', '.join(found) or 'none'}")
    return [found[name] for name in sorted(wanted)]


def build(names: Sequence[str] = (), folder: Path = FOLDER) -> None:
    """Build the named notebooks (default: all) of `folder`; stops at the first that fails and leaves its old build."""
    for source in sources(folder, names):
        notebook = read(source)
        started = time.monotonic()
        print(f"{source.stem} ", end="", flush=True)
        try:
            run(notebook, folder, on_code_cell=lambda: print(".", end="", flush=True))
        except NotebookFailed as error:
            raise NotebookFailed(f"{source.name}: {error}") from error
        size = save(notebook, folder / f"{source.stem}.ipynb")
        print(f" {time.monotonic() - started:.0f} s, {size / 1e6:.2f} MB", flush=True)
        if size > MAX_BYTES:
            print(f"{source.stem}: warning: over {MAX_BYTES / 1e6:.0f} MB; make its figures fewer or smaller")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0 when all are built, 1 when one failed, 2 on a name that is not there."""
    parser = argparse.ArgumentParser(description="Build the notebooks from their texts: a full run, outputs kept.")
    parser.add_argument("names", nargs="*", help="such as 05_ppo (default: all)")
    try:
        build(parser.parse_args(argv).names)
    except NotebookFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
