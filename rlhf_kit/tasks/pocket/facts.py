"""The pocket world: which facts are true, which are held out, and the prompts of each split."""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from . import language
from .language import ANIMALS, ATTRIBUTES, FACTUAL_KINDS, LIST_WORDS, VALUES, Cell, Prompt

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
    truth: dict[Cell, str] = field(repr=False)
    myth: dict[Cell, str] = field(repr=False)  # the false value that most wrong answers give
    held_out: frozenset[Cell] = field(repr=False)

    @cached_property
    def splits(self) -> dict[str, list[Prompt]]:
        """The fixed prompts of each split, by kind; no prompt is in two splits.

        The test split alone asks about the held-out cells, and no other has its combinations of paraphrase and fact.
        """
        chosen: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        for split, pool in self.pools.items():
            strata: dict[tuple[str, bool, bool], list[Prompt]] = defaultdict(list)
            for prompt in pool:
                claim_is_true = prompt.claim == self.truth.get(prompt.cell, "")
                strata[prompt.kind, prompt.cell not in self.held_out, claim_is_true].append(prompt)
            for (kind, seen, claim_is_true), members in strata.items():
                share = _SHARES[split][kind]
                if split == "test" and kind in FACTUAL_KINDS:
                    share *= 1 - _HELD_OUT_IN_TEST if seen else _HELD_OUT_IN_TEST
                if kind == "leading":
                    share *= _TRUE_CLAIMS if claim_is_true else 1 - _TRUE_CLAIMS
                chosen[split] += members[: round(share * _SIZE[split])]
        return chosen

    @cached_property
    def pools(self) -> dict[str, list[Prompt]]:
        """All prompts of the language, each in the one split that may use it, in an order drawn by the world's seed."""
        everything = language.prompt_table().values()
        by_kind = {kind: [prompt for prompt in everything if prompt.kind == kind] for kind in _PRACTISED}
        rng = np.random.default_rng([self.seed, 2])
        by_kind["skill"] = list(dict.fromkeys(draw_skill(rng) for _ in range(_SKILL_POOL)))
        pools: dict[str, list[Prompt]] = {split: [] for split in SPLITS}
        for members in by_kind.values():
            members = [members[i] for i in rng.permutation(len(members))]
            pools["test"] += [prompt for prompt in members if prompt.cell in self.held_out]
            seen = [prompt for prompt in members if prompt.cell not in self.held_out]
            n_test = round(_TEST_POOL * len(seen))
            pools["test"] += seen[:n_test]
            for i, split in enumerate(SPLITS[:-1]):
                pools[split] += seen[n_test + i :: len(SPLITS) - 1]
        return pools


def world(seed: int = 0) -> World:
    """The world of a seed; the shipped base model was pretrained on the world of seed 0."""
    rng = np.random.default_rng([seed, 0])
    truth, myth = {}, {}
    for attribute in ATTRIBUTES:
        # Every value is true of equally many animals (within one), so that no answer is a safe guess.
        values = np.resize(VALUES[attribute], len(ANIMALS))
        for animal, value in zip(ANIMALS, rng.permutation(values), strict=True):
            truth[animal, attribute] = str(value)
            myth[animal, attribute] = str(rng.choice([other for other in VALUES[attribute] if other != value]))
    animals = rng.permutation(ANIMALS)[: _HELD_OUT_PER_ATTRIBUTE * len(ATTRIBUTES)]
    held_out = frozenset((str(animal), ATTRIBUTES[i // _HELD_OUT_PER_ATTRIBUTE]) for i, animal in enumerate(animals))
    return World(seed, truth, myth, held_out)


def draw_skill(rng: np.random.Generator) -> Prompt:
    """A prompt that asks for the skill, drawn evenly over its templates, operations and lengths."""
    template, operation = str(rng.choice(language.SKILL_TEMPLATES)), str(rng.choice(language.OPERATIONS))
    words = rng.choice(LIST_WORDS, size=rng.choice(language.SKILL_LENGTHS), replace=False)
    return language.skill_prompt(template, operation, tuple(map(str, words)))
