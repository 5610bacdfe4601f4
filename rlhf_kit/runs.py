"""Runs on disk: made once, whole or not there at all, with a note of what they were made from.

    results/<experiment>/summary.csv, figures/*.png        what is quoted (committed)
    results/<experiment>/runs/<name>/                      a finished run:
        run.json  metrics.csv  samples.parquet  model/     run.json, and whatever its function wrote
    results/<experiment>/runs/.<name>.partial, .lock       while a process makes it

A process may be killed at any moment, so a run is made in its partial directory and renamed when it is whole. The lock
is the operating system's: it goes when its holder dies. Nothing here imports torch: a finished run is found at once.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import numbers
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import filelock
import pandas as pd

from rlhf_kit import files

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]*")
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "rlhf_kit")
# What tells when and how fast a run or a model was made: without these, one that is made again has the same hash.
CLOCKS = {"run.json", "metrics.csv", "trainer_state.json", "training_args.bin", "README.md"}
SECRET = re.compile(r"token(?!izer)|key|secret|password", re.IGNORECASE)
NOT_SECRET = {"bos_token", "eos_token", "pad_token", "unk_token", "stop_token"}


class RunError(ValueError):
    """A run cannot be made or read; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its directory, the contents of its run.json, and whether it had been made before."""

    directory: Path
    info: dict[str, Any]
    reused: bool = False


def make(
    experiment: str | Path,
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str | Path],
    function: Callable[[Path], object],
    *,
    fresh: bool = False,
) -> Run:
    """The run `name`: made by `function(directory)` unless it is there already.

    inputs: files or directories, which count by their contents; fresh: make a finished run again, and replace it once
    the new one is whole. An unfinished run is begun again in an empty folder. Raises RunError if the name stands for
    another config or other inputs, if another process makes the run, or if the folder cannot be written, OSError if an
    input cannot be read, and an error of `function` once it is noted in run.json.
    """
    if not NAME.fullmatch(name):
        raise RunError(f"a run cannot be called {name!r}: use letters, digits and . _ - = only")
    folder = Path(experiment) / "runs"
    final, partial = folder / name, folder / f".{name}.partial"
    with _lock(folder / f".{name}.lock", final):
        hashes = {key: {"path": str(path), "sha256": sha256_of(path)} for key, path in inputs.items()}
        asked = {"config": _as_json(config), "inputs": hashes}
        if _read_info(partial).get("status") == "finished":  # killed between its last write and its rename
            files.publish(partial, final)
        if final.exists() and not fresh:
            return Run(final, _same_or_refuse(final, asked), reused=True)
        files.remove(partial)
        partial.mkdir()
        info = {"name": name, "status": "running", "error": None, "seed": asked["config"].get("seed")}
        info |= {"started": str(pd.Timestamp.now("UTC").floor("s")), "git": git(), "versions": versions(), **asked}
        _write_info(partial, info)
        begun = time.monotonic()
        try:
            function(partial)
            info["status"] = "finished"
        except BaseException as error:
            info |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            raise
        finally:  # the device is known only now that the function has loaded torch
            info |= {"seconds": round(time.monotonic() - begun, 3), "device": device()}
            _write_info(partial, info)
        files.publish(partial, final)
    return Run(final, _read_info(final))


def _lock(path: Path, run: Path) -> AbstractContextManager[Any]:
    """The lock, held; RunError if another process holds it or the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(path).acquire(timeout=0)
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        return held
    except filelock.Timeout:
        holder = path.read_text(errors="replace").strip() or "another process"
        raise RunError(f"{run} is being made by {holder}: wait for it to end, or choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write to the results folder {path.parent}: {error.strerror}") from None


def _same_or_refuse(directory: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """What the run.json of `directory` says; RunError naming what differs if it was made from something else."""
    info = _read_info(directory)
    if info.get("status") != "finished":
        raise RunError(f"{directory} is no finished run: move it away or choose another name")
    there, here = (
        known["config"] | {f"input {key}": item["sha256"][:12] for key, item in known["inputs"].items()}
        for known in (info, asked)
    )
    if differing := "; ".join(files.differences(there, here)):
        remedy = "choose another name or folder, or ask for a fresh run"
        raise RunError(f"{directory} was made from something else ({differing}): {remedy}")
    return info


def _as_json(value: Any, where: str = "config", secret: bool = False) -> Any:
    """The value as strict JSON: paths, nan and inf become text, and a secret's text (not a number) becomes "***"."""
    if isinstance(value, Mapping):
        hidden = {key for key in value if secret or (SECRET.search(str(key)) and key not in NOT_SECRET)}
        return {str(key): _as_json(item, f"{where}.{key}", key in hidden) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item, f"{where}[{i}]", secret) for i, item in enumerate(value)]
    if isinstance(value, (str, os.PathLike)):
        return "***" if secret and str(value) else str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))
    raise RunError(f"{where} is a {type(value).__name__}, which run.json cannot hold; give numbers, text, lists, dicts")


def _write_info(directory: Path, info: Mapping[str, Any]) -> None:
    text = json.dumps(info, indent=2, allow_nan=False) + "\n"
    _write(directory / "run.json", lambda path: path.write_text(text, encoding="utf-8"))


def _read_info(directory: Path) -> dict[str, Any]:
    """What run.json says, or nothing if there is none."""
    try:
        return dict(json.loads((directory / "run.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes or, of a directory, of the relative paths and hashes of its files (not CLOCKS)."""
    path = Path(path)
    if path.is_dir():
        found = {f.relative_to(path).as_posix(): f for f in path.rglob("*") if f.is_file() and f.name not in CLOCKS}
        lines = [f"{sha256_of(found[relative])}  {relative}\n" for relative in sorted(found)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    if path.name == "adapter_config.json":  # peft writes sets into it, in another order in each process
        parts = sorted(line.strip(b" ,") for line in path.read_bytes().splitlines())
        return hashlib.sha256(b"\n".join(parts)).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def git() -> dict[str, Any] | None:
    """Commit of the checkout that holds this file, and whether tracked files outside results/ differ from it."""
    status = "git --no-optional-locks status --porcelain=v2 --branch --untracked-files=no -- :/ :(exclude,top)results"
    try:
        found = subprocess.check_output(status.split(), cwd=Path(__file__).parent, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    first, *lines = found.splitlines()  # "# branch.oid <commit>", or "(initial)" before the first commit
    return {"commit": first.split()[-1], "dirty": any(line[0] != "#" for line in lines)}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on; None for those not installed."""
    installed = {each.name.replace("-", "_"): each.version for each in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **{name: installed.get(name) for name in PACKAGES}}


def device() -> str:
    """The accelerator's name if torch is loaded and sees one, else the processor's kind and number of cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        return str(torch.cuda.get_device_name() if kind == "cuda" else kind)
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"


def append_metrics(directory: str | Path, row: Mapping[str, Any]) -> None:
    """Append a row to metrics.csv, written anew so that a kill tears no row; a new column is empty in the rows before.

    RunError for a value that is not a number, a text or None.
    """
    path = Path(directory) / "metrics.csv"
    for key, value in row.items():
        if not (value is None or isinstance(value, (numbers.Real, str))):
            raise RunError(f"metric {key!r} is a {type(value).__name__}; log numbers or text, one value per column")
    # Cells stay text, so that no number is read and rounded.
    before = pd.read_csv(path, dtype=str, keep_default_na=False) if path.exists() else pd.DataFrame()
    rows = pd.DataFrame([*before.to_dict("records"), dict(row)], dtype=object)
    _write(path, lambda temporary: rows.to_csv(temporary, index=False))


def write_summary(experiment: str | Path, table: pd.DataFrame) -> Path:
    """Write summary.csv of the experiment, at full precision."""
    return _write(Path(experiment) / "summary.csv", lambda path: table.to_csv(path, index=False))


def save_figure(experiment: str | Path, name: str, figure: Any) -> Path:
    """Write a matplotlib Figure as figures/<name>.png of the experiment."""
    look = {"format": "png", "dpi": 150, "metadata": {"Software": None}}  # no version: equal pictures, equal files
    return _write(Path(experiment) / "figures" / f"{name}.png", lambda path: figure.savefig(path, **look))


def _write(path: Path, save: Callable[[Path], object]) -> Path:
    """Let `save` write the whole of `path`; a full disk or a lack of permission is one sentence."""
    try:
        with files.replacing(path) as temporary:
            save(temporary)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error
    return path
