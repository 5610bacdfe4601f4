"""Constitutions: the principles by which a language model judges, criticises and revises answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from rlhf_kit.feedback.judging import FeedbackError

DEFAULT = Path(__file__).parent / "constitution.yaml"


@dataclass(frozen=True)
class Principle:
    """One principle: the question by which two answers are compared, and the requests for a critique and a revision."""

    name: str
    compare: str
    critique: str
    revise: str
    weight: float = 1.0


@dataclass(frozen=True)
class Constitution:
    """Principles in their order (Bai et al. 2022, 2212.08073); `weight` says how much each counts in a judgment."""

    principles: tuple[Principle, ...]

    def __getitem__(self, name: str) -> Principle:
        """The principle of that name; FeedbackError lists the names there are."""
        names = [principle.name for principle in self.principles]
        if name not in names:
            raise FeedbackError(f"principle {name!r}: is not in the constitution, which has {', '.join(names)}")
        return self.principles[names.index(name)]


def constitution(path: str | Path = DEFAULT) -> Constitution:
    """The constitution in a YAML file `principles: [{name, compare, critique, revise, weight (default 1)}, ...]`.

    Raises FeedbackError that names the file, the principle and the key.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FeedbackError(f"{path}: cannot be read as a constitution ({' '.join(str(error).split())})") from None
    rows = content.get("principles") if isinstance(content, dict) and len(content) == 1 else None
    if not isinstance(rows, list) or not rows:
        raise FeedbackError(f"{path}: a constitution is one list under the key `principles`, and it is not empty")
    names: list[str] = []
    for number, row in enumerate(rows, 1):
        fault = _fault(row)
        if not fault and row["name"] in names:
            fault = f"the name {row['name']!r} was given before"
        if fault:
            raise FeedbackError(f"{path}, principle {number}: {fault}")
        names.append(row["name"])
    return Constitution(tuple(Principle(**row) for row in rows))


def _fault(row: Any) -> str | None:
    """What is wrong with a principle as the file has it."""
    keys = [field.name for field in fields(Principle)]
    if not isinstance(row, dict) or set(row) - set(keys):
        return f"{row!r} has a key that is not one of {', '.join(keys)}"
    for key in keys[:-1]:
        if not isinstance(row.get(key), str) or not row[key].strip():
            return f"the key {key!r} is missing or no text ({row.get(key)!r}); write a sentence"
    weight = row.get("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    return None if number and 0 < weight < math.inf else f"'weight' is {weight!r}; it is a number above 0"
