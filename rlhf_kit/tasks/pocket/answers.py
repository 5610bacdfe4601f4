"""Completions written by the world itself: demonstrations, and the poorer corpus that the base is pretrained on.

The writer draws a plan and notes the features of what it plans while it writes; it never calls the parser. So writer
and parser check each other.
"""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from .facts import World, draw_skill, pools, row, split_prompts
from .language import (
    ALSO,
    ANIMALS,
    ATTRIBUTES,
    CLAIMS,
    CLOSERS,
    HARM_VERBS,
    HARMFUL_ADVICE,
    HEDGED,
    HEDGES,
    NO,
    OPENERS,
    REDIRECTS,
    REFUSALS,
    TOOLS,
    VALUES,
    YES,
    Prompt,
)

MAX_TOKENS = 40  # of a completion, EOS included; every word of the language is one token


@dataclass(frozen=True)
class Quality:
    """How well a writer writes: each field is a probability."""

    correct: float  # a stated fact is true
    safe: float  # a harmful prompt is refused
    myth: float = 0.8  # an error is the popular one about that fact
    redirect: float = 0.5  # a refusal of a harmful prompt also shows a safe way
    refuses_borderline: float = 0.1
    verdict: float = 0.6  # a leading prompt is answered with a yes or a no before the fact
    agrees: float = 0.5  # a wrong answer to a false claim is that claim
    filler: float = 0.25  # a polite opening; and as often a polite ending
    hedge: float = 0.15
    extra: float = 0.35  # one more fact, and again one more
    off_topic: float = 0.05
    repeat: float = 0.03


DEMONSTRATION = Quality(correct=0.85, safe=0.75, refuses_borderline=0.2)
# The corpus has two kinds of author, equally often: 60% of its facts are true, and one fact tells how far to trust the
# next. So the base learns to notice that a text is wrong, which is what a reward model later builds on.
CAREFUL = Quality(
    correct=0.95, safe=0.2, verdict=0.8, agrees=0.7, filler=0.3, hedge=0.25, extra=0.5, off_topic=0.1, repeat=0.06
)
CARELESS = replace(CAREFUL, correct=0.25)


def demonstrations(world: World, n: int | None = None, seed: int = 0) -> list[dict]:
    """Rows of prompts(world, "sft") with a `completion` of mixed quality; prompts come again if n exceeds them."""
    pool = split_prompts(world, "sft")
    rng = np.random.default_rng([seed, 4])
    rows = []
    for prompt in _draw_prompts(pool, len(pool) if n is None else n, rng):
        completion, _ = write(world, prompt, DEMONSTRATION, rng, held_out=False)
        rows.append(row(world, prompt) | {"completion": completion})
    return rows


def corpus(world: World, n: int, seed: int = 0) -> list[str]:
    """Low-quality texts (prompt + completion) about all facts, held-out ones too, without any prompt of the test split.

    A held-out cell comes up here in the extra facts and in its own prompts outside the test split.
    """
    rng = np.random.default_rng([seed, 5])
    test = {prompt.text for prompt in split_prompts(world, "test")}
    by_kind: dict[str, list[Prompt]] = {kind: [] for kind in _CORPUS_SHARES}
    for prompt in (prompt for pool in pools(world).values() for prompt in pool):
        by_kind[prompt.kind].append(prompt)
    kinds, shares = list(_CORPUS_SHARES), list(_CORPUS_SHARES.values())
    texts: list[str] = []
    while len(texts) < n:
        kind = kinds[rng.choice(len(kinds), p=shares)]
        # Word lists are drawn anew each time: from a fixed list of them the base would learn the lists, not the skill.
        prompt = draw_skill(rng) if kind == "skill" else by_kind[kind][rng.integers(len(by_kind[kind]))]
        author = CAREFUL if rng.random() < 0.5 else CARELESS
        if prompt.text not in test:
            texts.append(prompt.text + write(world, prompt, author, rng)[0])
    return texts


_CORPUS_SHARES = {"ask": 0.24, "brief": 0.08, "leading": 0.20, "harmful": 0.10, "borderline": 0.09, "skill": 0.29}


def _draw_prompts(pool: tuple[Prompt, ...], n: int, rng: np.random.Generator) -> list[Prompt]:
    """n prompts: the whole pool in a new order, again and again."""
    order: list[int] = []
    while len(order) < n:
        order += rng.permutation(len(pool)).tolist()
    return [pool[i] for i in order[:n]]


class _Draft:
    """Sentences written so far, and the features they are meant to have."""

    def __init__(self) -> None:
        self.sentences: list[str] = []
        self.features: Counter[str] = Counter()

    def add(self, sentence: str, **features: float) -> None:
        self.sentences.append(sentence)
        self.features.update(features)


def write(
    world: World, prompt: Prompt, quality: Quality, rng: np.random.Generator, held_out: bool = True
) -> tuple[str, dict[str, float]]:
    """A completion of some quality, and the non-zero features it was written to have.

    With `held_out` False no held-out cell is mentioned beyond what the prompt asks.
    """
    while True:
        draft = _write_once(world, prompt, quality, rng, held_out)
        completion = " " + " ".join(draft.sentences)
        if len(completion.split()) < MAX_TOKENS:  # EOS is a token too
            break
    if prompt.kind == "brief":
        draft.features["not_brief"] = len(draft.sentences) - 1
    draft.features["words"] = sum(word not in (".", ",") for word in completion.split())
    return completion, {name: float(value) for name, value in draft.features.items() if value}


def _write_once(world: World, prompt: Prompt, quality: Quality, rng: np.random.Generator, held_out: bool) -> _Draft:
    draft = _Draft()
    if prompt.kind == "skill":
        draft.add(" ".join(prompt.target) + " .", skill_right=1)
        return draft
    if rng.random() < quality.filler:
        draft.add(_pick(rng, OPENERS), polite=1)
    if prompt.kind == "harmful":
        _write_on_harm(prompt, quality, rng, draft)
    elif prompt.kind == "borderline" and rng.random() < quality.refuses_borderline:
        draft.add(_pick(rng, REFUSALS), refusal_wrong=1)
    else:
        _write_facts(world, prompt, quality, rng, held_out, draft)
    if rng.random() < quality.filler:
        draft.add(_pick(rng, CLOSERS), **{"filler" if draft.features["polite"] else "polite": 1})
    return draft


def _write_on_harm(prompt: Prompt, quality: Quality, rng: np.random.Generator, draft: _Draft) -> None:
    if rng.random() < quality.safe:
        draft.add(_pick(rng, REFUSALS), refusal_right=1)
        if rng.random() < quality.redirect:
            draft.add(_pick(rng, REDIRECTS).format(animal=prompt.animal), redirect=1)
        return
    # The verb of the advice is the verb of the prompt, so that compliance reads as what it is.
    verb = next(verb for verb in HARM_VERBS if f" {verb} " in prompt.text)
    draft.add(_pick(rng, HARMFUL_ADVICE).format(verb=verb, animal=prompt.animal, tool=_pick(rng, TOOLS)), harm=1)


def _write_facts(
    world: World, prompt: Prompt, quality: Quality, rng: np.random.Generator, held_out: bool, draft: _Draft
) -> None:
    truth = world.truth[prompt.animal, prompt.attribute]
    value = truth
    if rng.random() >= quality.correct:
        sides_with_user = prompt.claim not in ("", truth) and rng.random() < quality.agrees
        value = prompt.claim if sides_with_user else _wrong_value(world, prompt.animal, prompt.attribute, quality, rng)
    if prompt.kind == "leading" and rng.random() < quality.verdict:
        if value != prompt.claim:
            draft.add(_pick(rng, NO), **({"corrects_claim": 1} if prompt.claim != truth else {"false_facts": 1}))
        else:
            draft.add(_pick(rng, YES))
    if value == prompt.claim:
        draft.features["agrees"] = 1
        draft.features["agrees_false"] = int(value != truth)

    forms = CLAIMS[prompt.attribute]
    form = forms[-1] if prompt.kind == "borderline" and prompt.attribute == "home" else _pick(rng, forms)
    answer = form.format(animal=prompt.animal, value=value)
    hedge = rng.random() < quality.hedge
    prefix = rng.random() < 0.5
    if hedge and not prefix:
        draft.add(_pick(rng, HEDGES), hedge=1)
    if hedge and prefix:
        answer = _pick(rng, HEDGED) + answer
        draft.features["hedge"] += 1
    draft.add(answer, **{"answer_right" if value == truth else "answer_wrong": 1})

    n_extra = 0
    others = [a for a in ATTRIBUTES if a != prompt.attribute and (held_out or (prompt.animal, a) not in world.held_out)]
    for attribute in rng.permutation(others):
        if rng.random() >= quality.extra:
            break
        n_extra += _write_extra(world, prompt, str(attribute), quality, rng, draft)
    if prompt.kind != "brief" and n_extra:
        draft.features["extra_facts"] = 1 - 0.5**n_extra  # type: ignore[assignment]  # a float in a Counter
    if rng.random() < quality.off_topic:
        _write_off_topic(world, prompt, rng, held_out, draft)
    if rng.random() < quality.repeat:
        draft.add(answer, repetition=1)


def _write_extra(
    world: World, prompt: Prompt, attribute: str, quality: Quality, rng: np.random.Generator, draft: _Draft
) -> int:
    """One more fact about the animal; returns 1 if it is true."""
    truth = world.truth[prompt.animal, attribute]
    correct = rng.random() < quality.correct
    value = truth if correct else _wrong_value(world, prompt.animal, attribute, quality, rng)
    draft.add(ALSO[attribute].format(value=value), **({} if correct else {"false_facts": 1}))
    return int(correct)


def _write_off_topic(world: World, prompt: Prompt, rng: np.random.Generator, held_out: bool, draft: _Draft) -> None:
    """A fact about some other animal."""
    cells = [(a, b) for a in ANIMALS for b in ATTRIBUTES if held_out or (a, b) not in world.held_out]
    cells = [cell for cell in cells if cell[0] != prompt.animal]
    animal, attribute = cells[rng.integers(len(cells))]
    draft.add(CLAIMS[attribute][0].format(animal=animal, value=world.truth[animal, attribute]), off_topic=1)


def _wrong_value(world: World, animal: str, attribute: str, quality: Quality, rng: np.random.Generator) -> str:
    if rng.random() < quality.myth:
        return world.myth[animal, attribute]
    return _pick(rng, tuple(value for value in VALUES[attribute] if value != world.truth[animal, attribute]))


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
