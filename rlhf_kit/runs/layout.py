"""The layout of results/: the one file that knows where a run's config, metrics, samples and weights lie.

    results/<experiment>/summary.csv, figures/*.png        what is quoted (committed)
    results/<experiment>/runs/<name>/                      a finished run, always whole:
        run.json  metrics.csv  samples.parquet  model/     whatever its function wrote, and run.json
    results/<experiment>/runs/.<name>.partial/             the same, while it is being made
    results/<experiment>/runs/.<name>.lock                 held by the process that makes it

A process may be killed at any moment. So a run is made in its partial directory and renamed when whole, and a file that
is written at once gets a temporary name first. The lock is the operating system's: it goes when its holder dies.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import numbers
import os
import re
import shutil
import socket
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from rlhf_kit.runs import provenance
from rlhf_kit.runs.provenance import RunError, plain, sha256_of

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, what its run.json says, and whether it was found made already."""

    directory: Path
    info: dict[str, Any]
    reused: bool = False

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.info["config"])


# --- making a run ---


def make(
    experiment: str | Path,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str | Path],
    function: Callable[[Path], object],
    *,
    fresh: bool = False,
    resume: bool = False,
    wait: float = 0.0,
) -> Run:
    """Return the run `name`, made by `function(directory)` unless it is there already, of equal config and inputs.

    `inputs` are files or directories and count by their contents. An unfinished run is begun again in an empty one or,
    with `resume`, given back as it was left. `fresh` makes a finished run again, and replaces it once the new one is
    whole. Another process at the same run is waited for up to `wait` seconds.
    Raises RunError if the name stands for another config or other inputs, if the run is being made elsewhere, or if the
    folder cannot be written; whatever `function` raises is noted in run.json and passed on.
    """
    if not NAME.fullmatch(name):
        raise RunError(f"a run cannot be called {name!r}: use letters, digits and . _ - = only")
    folder = _writable(Path(experiment) / "runs")
    final, partial = folder / name, folder / f".{name}.partial"
    with _locked(folder / f".{name}.lock", final, wait):
        asked = {"config": plain(config), "inputs": {key: _input(key, path) for key, path in inputs.items()}}
        if _read_info(partial).get("status") == "finished":  # killed between its last write and its rename
            _publish(partial, final)
        if final.exists() and not fresh:
            _same_or_refuse(final, asked)
            return dataclasses.replace(load_run(final), reused=True)
        left = _read_info(partial)
        if resume and left and not fresh:
            _same_or_refuse(partial, asked)
            for torn in partial.rglob(".*.part"):
                torn.unlink()
        else:
            _remove(partial)
            partial.mkdir()
            left = {}
        info = {
            "name": name,
            "status": "running",
            "error": None,
            "started": _now(),
            "finished": None,
            "seconds": left.get("seconds", 0.0),  # over all attempts that ended or failed, when resumed
            "git": provenance.git(),
            "versions": provenance.versions(),
            "device": None,  # known once the function has loaded torch
            "seed": asked["config"].get("seed"),
            **asked,
        }
        _write_info(partial, info)
        begun = time.monotonic()
        try:
            function(partial)
        except BaseException as error:
            info |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            raise
        else:
            info["status"] = "finished"
        finally:
            info |= {"finished": _now(), "seconds": round(info["seconds"] + time.monotonic() - begun, 3)}
            _write_info(partial, info | {"device": provenance.device()})
        _publish(partial, final)
    return load_run(final)


def _input(key: str, path: str | Path) -> dict[str, str]:
    try:
        return {"path": str(path), "sha256": sha256_of(path)}
    except OSError as error:
        raise RunError(f"input {key!r} cannot be read: {path}: {error.strerror}") from None


def _same_or_refuse(directory: Path, asked: dict[str, Any]) -> None:
    """RunError naming what differs, if the run in `directory` was made from another config or other inputs."""
    info = _read_info(directory)
    if not info:
        raise RunError(f"{directory} is no run (it has no whole run.json): move it away or choose another name")
    there, here = (
        _flat(known["config"]) | {f"input {key}": item["sha256"][:12] for key, item in known["inputs"].items()}
        for known in (info, asked)
    )
    differing = [
        f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
        for key in dict.fromkeys([*there, *here])
        if there.get(key) != here.get(key)
    ]
    if differing:
        raise RunError(
            f"{directory} was made from something else ({'; '.join(differing)}): "
            "choose another name or folder, or ask for a fresh run"
        )


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(config, dict) or not config:
        return {prefix: json.dumps(config)}
    parts = (_flat(item, f"{prefix}.{key}" if prefix else key) for key, item in config.items())
    return {key: text for part in parts for key, text in part.items()}


def _publish(partial: Path, final: Path) -> None:
    """Give the whole run its name; an older run of that name is put aside first and removed last."""
    aside = final.with_name(f".{final.name}.old")
    _remove(aside)
    if final.exists():
        final.rename(aside)
    partial.rename(final)
    _remove(aside)


def _remove(directory: Path) -> None:
    (directory / "run.json").unlink(missing_ok=True)  # first, so that half a directory is not taken for a run
    if directory.exists():
        shutil.rmtree(directory)


@contextmanager
def _locked(path: Path, run: Path, wait: float) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except filelock.Timeout:
        holder = path.read_text(errors="replace").strip() or "another process"
        raise RunError(f"{run} is being made by {holder}: wait for it to end, or choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write to the results folder {path.parent}: {error.strerror}") from None
    try:
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
    finally:
        lock.release()


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to the results folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise RunError(f"cannot write to the results folder {folder}: permission denied")
    return folder


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` that becomes `path`, whole, if the block ends without an error."""
    path = Path(path)
    _writable(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())  # or a power cut could leave the new name on an empty file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append_metrics(directory: str | Path, row: Mapping[str, Any]) -> None:
    """Append a row (numbers, text or None) to metrics.csv; a new column rewrites the file, empty in the rows before.

    A last row torn by a kill is dropped first. Raises RunError on a value that is no single number or text.
    """
    path = Path(directory) / "metrics.csv"
    for key, value in row.items():
        if not (value is None or isinstance(value, (numbers.Real, str))):
            raise RunError(f"metric {key!r} is a {type(value).__name__}; log numbers or text, one value per column")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    header = next(csv.reader([text.partition("\n")[0]]), [])
    columns = list(dict.fromkeys([*header, *row]))
    if columns == header and text.endswith("\n"):
        with path.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, columns, lineterminator="\n").writerow(dict(row))
    else:
        _write_rows(path, columns, [*_whole_rows(text), dict(row)])


def keep_metrics(directory: str | Path, last: float, column: str = "update") -> None:
    """Drop the rows of metrics.csv after `column` = `last`, for a function resuming from the checkpoint at `last`."""
    path = Path(directory) / "metrics.csv"
    if path.exists():
        rows = _whole_rows(path.read_text(encoding="utf-8"))
        _write_rows(path, list(rows[0]) if rows else [], [row for row in rows if float(row[column]) <= last])


def _whole_rows(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _write_rows(path: Path, columns: list[str], rows: Sequence[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_samples(directory: str | Path, samples: pd.DataFrame) -> Path:
    """Write samples.parquet: a row per (prompt, sample), columns prompt, completion and one per reward."""
    path = Path(directory) / "samples.parquet"
    with replacing(path) as temporary:
        samples.to_parquet(temporary, index=False)
    return path


def _write_info(directory: Path, info: Mapping[str, Any]) -> None:
    with replacing(directory / "run.json") as temporary:
        temporary.write_text(json.dumps(info, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _read_info(directory: Path) -> dict[str, Any]:
    """What run.json says, or nothing if there is none."""
    try:
        return dict(json.loads((directory / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


# --- files of an experiment ---


def load_run(directory: str | Path) -> Run:
    """The finished run in `directory`; RunError if it is not there or not finished."""
    info = _read_info(Path(directory))
    if info.get("status") != "finished":
        raise RunError(f"{directory} holds no finished run (status: {info.get('status', 'no run.json')})")
    return Run(Path(directory), info)


def load_runs(experiment: str | Path) -> list[Run]:
    """All finished runs of an experiment by name; the unfinished are skipped, and a warning says how many and which."""
    folder = Path(experiment) / "runs"
    if not folder.is_dir():
        raise RunError(f"no runs in {experiment}: {folder} is not a directory")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.endswith(".old")]
    whole = {path for path in found if path.name[0] != "." and _read_info(path).get("status") == "finished"}
    if unfinished := [path.name.removeprefix(".").removesuffix(".partial") for path in found if path not in whole]:
        warnings.warn(f"{len(unfinished)} unfinished in {folder} skipped: {', '.join(unfinished)}", stacklevel=2)
    return [load_run(path) for path in found if path in whole]


def load_metrics(experiment: str | Path, columns: Sequence[str] = ("stage", "seed", "beta")) -> pd.DataFrame:
    """metrics.csv of all finished runs in one frame, with `run` and those of `columns` that a run's config has."""
    return _load(experiment, "metrics.csv", pd.read_csv, columns)


def load_samples(experiment: str | Path, columns: Sequence[str] = ("stage", "seed", "beta")) -> pd.DataFrame:
    """samples.parquet of all finished runs in one frame, with `run` and those of `columns` that a run's config has."""
    return _load(experiment, "samples.parquet", pd.read_parquet, columns)


def _load(
    experiment: str | Path, file: str, read: Callable[[Path], pd.DataFrame], columns: Sequence[str]
) -> pd.DataFrame:
    frames = []
    for run in load_runs(experiment):
        if (run.directory / file).exists():
            frame = read(run.directory / file)
            known = {"run": run.name, **{name: run.config[name] for name in columns if name in run.config}}
            added = pd.DataFrame([{name: known[name] for name in known if name not in frame}] * len(frame))
            frames.append(pd.concat([added, frame], axis=1))
    if not frames:
        raise RunError(f"no finished run in {experiment} has a {file}")
    return pd.concat(frames, ignore_index=True)


def write_summary(experiment: str | Path, table: pd.DataFrame) -> Path:
    """Write summary.csv of the experiment, at full precision."""
    path = Path(experiment) / "summary.csv"
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)
    return path


def save_figure(experiment: str | Path, name: str, figure: Any, dpi: int = 150) -> Path:
    """Write a matplotlib Figure as figures/<name>.png of the experiment."""
    path = Path(experiment) / "figures" / f"{name}.png"
    with replacing(path) as temporary:  # no version in the file: equal pictures are equal files
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
    return path
