"""The book: each notebook is built from its text, keeps the rhythm, reads well on a page, and runs from scratch."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat import NotebookNode

from notebooks import build

SOURCES = build.sources(build.FOLDER)
# A path that only the machine has which built it.
LOCAL_PATH = re.compile(r"(?<![\w.:/<])/(?:home|root|work|tmp|Users|mnt|opt|usr|var|srv)/")
CELL_TIMEOUT = 900.0
Executions = dict[Path, Future[NotebookNode]]

every_notebook = pytest.mark.parametrize("source", SOURCES, ids=[source.stem for source in SOURCES])


@cache
def text(source: Path) -> NotebookNode:
    return build.read(source)


@cache
def built(source: Path) -> NotebookNode:
    path = build.FOLDER / f"{source.stem}.ipynb"
    assert path.exists(), f"{path.name} is not built: make notebooks ARGS={source.stem}"
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def output_text(output: NotebookNode) -> str:
    """What an output says in words: a stream, an error, or all its forms but pictures."""
    said = [output.get("text", ""), *output.get("traceback", [])]
    said += [str(value) for form, value in output.get("data", {}).items() if not form.startswith("image/")]
    return "\n".join(said)


def test_every_built_notebook_has_its_text() -> None:
    texts = {source.stem for source in SOURCES}
    orphans = sorted(path.name for path in build.FOLDER.glob("*.ipynb") if path.stem not in texts)
    assert not orphans, f"built from no text in notebooks/py: {orphans}"


@pytest.mark.xfail(reason="the texts have the new names; the notebooks are run anew with the new world")
@every_notebook
def test_the_built_notebook_is_its_text(source: Path) -> None:
    pairs = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (text(source), built(source))]
    assert pairs[0] == pairs[1], f"{source.stem}.ipynb is not built from this text: make notebooks ARGS={source.stem}"


@every_notebook
def test_the_built_notebook_reads_well_on_a_page(source: Path) -> None:
    notebook = built(source)
    assert (build.FOLDER / f"{source.stem}.ipynb").stat().st_size < build.MAX_BYTES
    assert notebook.metadata == build.METADATA, "widget state, or a machine's name or version"
    shown = outputs(notebook)
    assert shown, "no outputs"
    assert not [output for output in shown if output.output_type == "error"]
    for output in shown:
        said = output_text(output)
        forms = output.get("data", {})
        assert "application/vnd.jupyter.widget-view+json" not in forms, "a widget, which a page cannot show"
        assert not LOCAL_PATH.search(said), f"a path of the machine that built it: {said[:500]}"
        assert not re.search(r"\bat 0x[0-9a-f]+", said), f"an address in memory: {said[:500]}"
    if any(re.search(r"\b(plots|plt|sns)\.", cell.source) for cell in code_cells(notebook)):
        assert any("image/png" in output.get("data", {}) for output in shown), "it plots, but shows no picture"


@every_notebook
def test_the_rhythm(source: Path) -> None:
    cells = text(source).cells
    low, high = (10, 20) if source.stem == "00_tour" else (20, 35)
    assert low <= len(cells) <= high, f"{len(cells)} cells"
    assert cells[0].cell_type == "markdown"
    assert all(device in cells[0].source for device in ("CPU", "GPU")), "the first cell says the minutes on each"
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.search(r"^#+ .*exercises", prose, re.IGNORECASE | re.MULTILINE), "no heading for the exercises"
    for cell in code_cells(text(source)):
        assert len(cell.source.splitlines()) <= 25, f"more than 25 lines:\n{cell.source}"
        assert not re.search(r"^\s*class ", cell.source, re.MULTILINE), f"a class in a cell:\n{cell.source}"
        assert not re.search(r"^\s*[!%]\s*(pip|conda)\b", cell.source, re.MULTILINE), f"an install:\n{cell.source}"


@every_notebook
def test_one_cell_holds_the_parameters(source: Path) -> None:
    [cell] = [cell for cell in text(source).cells if "parameters" in cell.metadata.get("tags", [])]
    values = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    assert values == {"PRESET": "pocket", "SEED": 0}


def execute(source: Path, results: Path) -> NotebookNode:
    notebook = build.read(source, PRESET="quick")
    environment = {"RLHF_KIT_RESULTS": str(results), "OMP_NUM_THREADS": "1"}
    build.run(notebook, build.FOLDER, CELL_TIMEOUT, environment)
    return notebook


@pytest.fixture(scope="module")
def executions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executions]:
    """The selected notebooks, run two at a time, one thread each, every one in a results folder of its own.

    They run at the preset `quick`; at their own size `make notebooks` runs them, and what it showed is committed.

    The one that scores every model needs every stage and runs from nothing. Those that share stages with it (the ones
    with a Pipeline) get a copy of what it made, so nothing is trained twice and none can lean on an earlier notebook
    having run.
    """
    items: list[Any] = [item for item in request.session.items if isinstance(item, pytest.Function)]
    selected = {item.callspec.params["source"] for item in items if item.originalname == "test_it_runs_from_scratch"}
    first, *rest = sorted(sorted(selected), key=lambda source: "flow.scores(" not in source.read_text())
    rest.sort(key=lambda source: "Pipeline(" in source.read_text())
    folder = tmp_path_factory.mktemp("results")

    def run(source: Path) -> NotebookNode:
        if "Pipeline(" in source.read_text() and futures[first].exception() is None:  # waits for it
            shutil.copytree(folder / first.stem, folder / source.stem)
        return execute(source, folder / source.stem)

    pool = ThreadPoolExecutor(max_workers=2)
    futures = {first: pool.submit(execute, first, folder / first.stem)}
    futures |= {source: pool.submit(run, source) for source in rest}
    yield futures
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@every_notebook
def test_it_runs_from_scratch(source: Path, executions: Executions) -> None:
    notebook = executions[source].result()

    def plotting(cells: list[NotebookNode]) -> list[bool]:
        return [any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in cells]

    now, then = plotting(code_cells(notebook)), plotting(code_cells(built(source)))
    assert now == then, f"other cells plot than in the built notebook: make notebooks ARGS={source.stem}"


# The builder itself, on a notebook of three cells.

SMALL = """# %% [markdown]
# # Small

# %% tags=["parameters"]
SEED = 0

# %%
import matplotlib.pyplot as plt
print("seed", SEED)
plt.plot([0, 1]);
"""


def folder_with(tmp_path: Path, **notebooks: str) -> Path:
    (tmp_path / "py").mkdir()
    for name, content in notebooks.items():
        (tmp_path / "py" / f"{name}.py").write_text(content)
    return tmp_path


@pytest.mark.slow
def test_a_rebuild_changes_no_byte_and_keeps_what_was_shown(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, **{"00_small": SMALL})
    builds = []
    for _ in range(2):
        build.build(folder=folder)
        builds.append((folder / "00_small.ipynb").read_bytes())
    assert builds[0] == builds[1]
    notebook = nbformat.reads(builds[0].decode(), as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == build.METADATA
    assert notebook.cells[1].metadata == {"tags": ["parameters"]}
    assert [output.output_type for output in outputs(notebook)] == ["stream", "display_data"]
    assert "image/png" in outputs(notebook)[1].data
    assert [cell.execution_count for cell in code_cells(notebook)] == [None, None]
    assert sorted(path.name for path in folder.iterdir()) == ["00_small.ipynb", "py"]


@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_old_build_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "# %%\nx = 0\n\n# %%\n1 / x\n\n# %%\nprint('never')\n"
    folder = folder_with(tmp_path, **{"00_bad": bad, "01_next": SMALL})
    (folder / "00_bad.ipynb").write_text("the old build")
    says = r"00_bad.py: cell 2 of 3 failed(.|\n)*1 / x(.|\n)*ZeroDivisionError"
    with pytest.raises(build.NotebookFailed, match=says):
        build.build(folder=folder)
    assert (folder / "00_bad.ipynb").read_text() == "the old build"
    assert not (folder / "01_next.ipynb").exists()
    assert capsys.readouterr().out == "00_bad .."


def test_a_name_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, **{"00_small": SMALL, "01_next": SMALL})
    assert [path.name for path in build.sources(folder, ["01_next.py"])] == ["01_next.py"]
    with pytest.raises(ValueError, match=r"no notebook 02_gone in .*; there is: 00_small, 01_next"):
        build.sources(folder, ["02_gone"])
