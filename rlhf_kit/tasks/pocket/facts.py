"""The pocket world: which facts are true, which are held out, and the prompts of each split."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np

from .language import (
    ANIMALS,
    ATTRIBUTES,
    FACTUAL_KINDS,
    KINDS,
    LIST_WORDS,
    OPERATIONS,
    SKILL_LENGTHS,
    SKILL_TEMPLATES,
    VALUES,
    Prompt,
    prompt_table,
    skill_prompt,
)

Cell = tuple[str, str]  # (animal, attribute)

SPLITS = ("sft", "preference", "train", "test")
_SIZE = {"sft": 2000, "preference": 2000, "train": 2000, "test": 800}
# The skill is practised in pretraining and in SFT and then never rewarded again: its loss is the alignment tax.
_REWARDED = {"ask": 0.30, "brief": 0.13, "leading": 0.24, "harmful": 0.17, "borderline": 0.16, "skill": 0.0}
_PRACTISED = {"ask": 0.27, "brief": 0.11, "leading": 0.22, "harmful": 0.15, "borderline": 0.13, "skill": 0.12}
_SHARES = {"sft": _PRACTISED, "preference": _REWARDED, "train": _REWARDED, "test": _PRACTISED}
_TRUE_CLAIMS = 0.4  # share of leading prompts whose claim is true
_HELD_OUT_IN_TEST = 0.25  # share of factual test prompts about held-out cells
_TEST_POOL = 0.2  # share of the combinations of template and fact that only the test split may use
_HELD_OUT_PER_ATTRIBUTE = 3
_SKILL_POOL = 3000


@dataclass(frozen=True)
class World:
    """The true facts, the popular errors, and the (animal, attribute) cells held out of SFT, preferences and RL."""

    seed: int
    facts: tuple[tuple[str, str, str], ...] = field(repr=False)  # (animal, attribute, value)
    myths: tuple[tuple[str, str, str], ...] = field(repr=False)  # the false value that most wrong answers give
    held_out: frozenset[Cell] = field(repr=False)

    @cached_property
    def truth(self) -> dict[Cell, str]:
        """The true value of each (animal, attribute) cell."""
        return {(animal, attribute): value for animal, attribute, value in self.facts}

    @cached_property
    def myth(self) -> dict[Cell, str]:
        """The most common error about each (animal, attribute) cell."""
        return {(animal, attribute): value for animal, attribute, value in self.myths}


def world(seed: int = 0) -> World:
    """The world of a seed; the shipped base model was pretrained on the world of seed 0."""
    rng = np.random.default_rng([seed, 0])
    facts, myths = [], []
    for attribute in ATTRIBUTES:
        # Every value is true of equally many animals (within one), so that no answer is a safe guess.
        values = np.resize(np.array(VALUES[attribute]), len(ANIMALS))
        for animal, value in zip(ANIMALS, rng.permutation(values), strict=True):
            facts.append((animal, attribute, str(value)))
            myths.append((animal, attribute, str(rng.choice([other for other in VALUES[attribute] if other != value]))))
    held_out_animals = rng.permutation(np.array(ANIMALS))[: _HELD_OUT_PER_ATTRIBUTE * len(ATTRIBUTES)]
    attributes = np.repeat(np.array(ATTRIBUTES), _HELD_OUT_PER_ATTRIBUTE)
    held_out = frozenset((str(a), str(b)) for a, b in zip(held_out_animals, attributes, strict=True))
    return World(seed, tuple(facts), tuple(myths), held_out)


def is_seen(world: World, prompt: Prompt) -> bool:
    """Whether the prompt asks nothing about a held-out cell."""
    return (prompt.animal, prompt.attribute) not in world.held_out


def prompts(world: World, split: str, n: int | None = None, seed: int = 0) -> list[dict]:
    """Rows {prompt, kind, animal, attribute, seen} of a split in an order drawn by `seed`, the first `n` of them.

    No prompt is in two splits. The test split has combinations of paraphrase and fact that no other split has, and
    alone asks about the held-out cells (`seen` False). ValueError for an unknown split or more rows than there are.
    """
    pool = split_prompts(world, split)
    if n is not None and not 0 <= n <= len(pool):
        raise ValueError(f"n={n}: split {split!r} of the pocket world has {len(pool)} prompts; ask for 0..{len(pool)}.")
    order = np.random.default_rng([seed, 1]).permutation(len(pool))[:n]
    return [row(world, pool[i]) for i in order]


def row(world: World, prompt: Prompt) -> dict:
    """The prompt as a row of a dataset: text, kind, animal, attribute ("" where there is none), seen."""
    return {
        "prompt": prompt.text,
        "kind": prompt.kind,
        "animal": prompt.animal,
        "attribute": prompt.attribute,
        "seen": is_seen(world, prompt),
    }


@cache
def split_prompts(world: World, split: str) -> tuple[Prompt, ...]:
    """The fixed prompts of a split, by kind; ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: the pocket world has the splits {', '.join(SPLITS)}.")
    strata: dict[tuple[str, bool, bool], list[Prompt]] = defaultdict(list)
    for prompt in pools(world)[split]:
        claim_is_true = prompt.claim == world.truth.get((prompt.animal, prompt.attribute), "")
        strata[prompt.kind, is_seen(world, prompt), claim_is_true].append(prompt)
    chosen: list[Prompt] = []
    for (kind, seen, claim_is_true), members in strata.items():
        share = _SHARES[split][kind]
        if split == "test" and kind in FACTUAL_KINDS:
            share *= 1 - _HELD_OUT_IN_TEST if seen else _HELD_OUT_IN_TEST
        if kind == "leading":
            share *= _TRUE_CLAIMS if claim_is_true else 1 - _TRUE_CLAIMS
        chosen += members[: round(share * _SIZE[split])]
    return tuple(chosen)


@cache
def pools(world: World) -> dict[str, list[Prompt]]:
    """All prompts of the language, each in the one split that may use it, in an order drawn by the world's seed."""
    by_kind: dict[str, list[Prompt]] = {kind: [] for kind in KINDS}
    for prompt in prompt_table().values():
        by_kind[prompt.kind].append(prompt)
    rng = np.random.default_rng([world.seed, 2])
    by_kind["skill"] = list({prompt.text: prompt for prompt in (draw_skill(rng) for _ in range(_SKILL_POOL))}.values())
    pools: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
    for members in by_kind.values():
        members = [members[i] for i in rng.permutation(len(members))]
        pools["test"] += [prompt for prompt in members if not is_seen(world, prompt)]
        seen = [prompt for prompt in members if is_seen(world, prompt)]
        n_test = round(_TEST_POOL * len(seen))
        pools["test"] += seen[:n_test]
        for i, split in enumerate(SPLITS[:-1]):
            pools[split] += seen[n_test + i :: len(SPLITS) - 1]
    return pools


def draw_skill(rng: np.random.Generator) -> Prompt:
    """A prompt that asks for the skill, drawn evenly over its templates, operations and lengths."""
    template, operation = str(rng.choice(SKILL_TEMPLATES)), str(rng.choice(OPERATIONS))
    words = rng.choice(LIST_WORDS, size=rng.choice(SKILL_LENGTHS), replace=False)
    return skill_prompt(template, operation, tuple(map(str, words)))
