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
        """The principle of that name; FeedbackError says which there are."""
        for principle in self.principles:
            if principle.name == name:
                return principle
        names = ", ".join(principle.name for principle in self.principles)
        raise FeedbackError(f"principle {name!r}: is not in the constitution, which has {names}")


def constitution(path: str | Path = DEFAULT) -> Constitution:
    """The constitution in a YAML file `principles: [{name, compare, critique, revise, weight (default 1)}, ...]`.

    Raises FeedbackError that names the file, the principle and the key.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise FeedbackError(f"{path}: cannot be read as a constitution ({reason})") from None
    if not isinstance(content, dict) or set(content) != {"principles"}:
        raise FeedbackError(f"{path}: a constitution is one list under the key `principles`, and nothing else")
    found = content["principles"]
    if not isinstance(found, list) or not found:
        raise FeedbackError(f"{path}: `principles` is empty or no list; write one principle or more")
    principles = [_principle(row, f"{path}, principle {number}") for number, row in enumerate(found, 1)]
    names = [principle.name for principle in principles]
    for number, name in enumerate(names, 1):
        if name in names[: number - 1]:
            raise FeedbackError(f"{path}, principle {number}: the name {name!r} was given before; names differ")
    return Constitution(tuple(principles))


def _principle(row: Any, where: str) -> Principle:
    texts, known = ("name", "compare", "critique", "revise"), [field.name for field in fields(Principle)]
    if not isinstance(row, dict):
        raise FeedbackError(f"{where}: has no keys; write {', '.join(texts)}")
    for key in row:
        if key not in known:
            raise FeedbackError(f"{where}: unknown key {key!r}; the keys are {', '.join(known)}")
    for key in texts:
        if key not in row:
            raise FeedbackError(f"{where}: the key {key!r} is missing")
        if not isinstance(row[key], str) or not row[key].strip():
            raise FeedbackError(f"{where}: {key!r} is no text ({row[key]!r}); write a sentence")
    weight = row.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise FeedbackError(f"{where}: 'weight' is {weight!r}; it is a number above 0")
    return Principle(**{key: row[key].strip() for key in texts}, weight=float(weight))
