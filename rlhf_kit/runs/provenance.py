"""What a run was made from: its config as strict JSON, hashes of its inputs, commit, versions and device.

Neither this nor anything it calls imports torch: a finished run must be found again in no time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import numbers
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "rlhf_kit")
SECRET = re.compile(r"token|key|secret|password", re.IGNORECASE)
NOT_SECRET = re.compile(r"^(bos|eos|pad|unk|stop)_token$|tokenizer", re.IGNORECASE)


class RunError(ValueError):
    """A run cannot be made or read; the message is one sentence for the user."""


def name_of(config: Mapping[str, Any]) -> str:
    """A readable name that is a function of the config: its `stage` (or "run") and eight digits of its hash."""
    known = plain(config)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", str(known.get("stage", "run"))).strip("-._") or "run"
    text = json.dumps(known, sort_keys=True, separators=(",", ":"))
    return f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plain(value: Any, where: str = "config", secret: bool = False) -> Any:
    """The value as strict JSON holds it: paths and not-a-numbers as text, text under the key of a secret as "***".

    So two configs that differ in a secret only are the same config. Raises RunError naming what cannot be held.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}", secret or _is_secret(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]", secret) for i, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(list(value), where, secret), key=json.dumps)
    if isinstance(value, (str, os.PathLike)):
        return "***" if secret and str(value) else str(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else str(float(value))
    raise RunError(f"{where} is a {type(value).__name__}, which run.json cannot hold; give numbers, text, lists, dicts")


def _is_secret(key: object) -> bool:
    """True for `hub_token` or `apiKey`; numbers such as `max_tokens` are never masked, as only text is."""
    return bool(SECRET.search(str(key))) and not NOT_SECRET.search(str(key))


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes or, for a directory, of the relative paths and hashes of all files in it, sorted."""
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
        for relative in sorted(files):
            digest.update(f"{sha256_of(files[relative])}  {relative}\n".encode())
    else:
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    return digest.hexdigest()


def git() -> dict[str, Any] | None:
    """Commit of the checkout that holds this file, and whether tracked files outside results/ differ from it."""
    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    try:
        done = subprocess.run(
            [*command, "--", ":/", ":(exclude,top)results"],
            cwd=Path(__file__).parent,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), "(initial)")
    return {"commit": commit, "dirty": any(line[0] != "#" for line in lines)} if commit != "(initial)" else None


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a result depends on; None for those not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(PACKAGES)}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device() -> str:
    """The accelerator's name if torch is loaded and sees one, else the processor's kind and number of cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    if torch is not None and torch.backends.mps.is_available():
        return "mps"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
