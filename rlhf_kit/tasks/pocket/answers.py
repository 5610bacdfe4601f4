"""Completions written by the world itself: demonstrations, and the poorer corpus that the base is pretrained on.

The writer notes the features of what it means to write; it never calls the parser. So the two check each other.
"""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

import numpy as np

from . import language
from .facts import World, draw_skill
from .language import ANIMALS, ATTRIBUTES, CLAIMS, VALUES, Cell, Prompt

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
_CORPUS_SHARES = {"ask": 0.24, "brief": 0.08, "leading": 0.20, "harmful": 0.10, "borderline": 0.09, "skill": 0.29}


def corpus(world: World, n: int, seed: int = 0) -> list[str]:
    """Low-quality texts (prompt + completion) about all facts, held-out ones too; no prompt is of the test split."""
    rng = np.random.default_rng([seed, 5])
    test = {prompt.text for prompt in world.splits["test"]}
    pools = list(chain(*world.pools.values()))
    by_kind = {kind: [prompt for prompt in pools if prompt.kind == kind] for kind in _CORPUS_SHARES}
    texts: list[str] = []
    while len(texts) < n:
        kind = str(rng.choice(list(_CORPUS_SHARES), p=list(_CORPUS_SHARES.values())))
        # Word lists are drawn anew each time: from a fixed list of them the base would learn the lists, not the skill.
        prompt = draw_skill(rng) if kind == "skill" else by_kind[kind][rng.integers(len(by_kind[kind]))]
        author = CAREFUL if rng.random() < 0.5 else CARELESS
        if prompt.text not in test:
            texts.append(prompt.text + write(world, prompt, author, rng)[0])
    return texts


def write(
    world: World, prompt: Prompt, quality: Quality, rng: np.random.Generator, held_out: bool = True
) -> tuple[str, dict[str, float]]:
    """A completion of some quality, and the non-zero features it was written to have.

    With `held_out` False no held-out cell is mentioned beyond what the prompt asks.
    """
    while True:
        draft = _Draft(world, prompt, quality, rng, held_out)
        draft.write()
        completion = " " + " ".join(draft.sentences)
        if len(completion.split()) < MAX_TOKENS:  # EOS is a token too
            break
    if prompt.kind == "brief":
        draft.features["not_brief"] = len(draft.sentences) - 1
    draft.features["words"] = sum(word not in (".", ",") for word in completion.split())
    return completion, {name: float(value) for name, value in draft.features.items() if value}


@dataclass
class _Draft:
    world: World
    prompt: Prompt
    quality: Quality
    rng: np.random.Generator
    held_out: bool
    sentences: list[str] = field(default_factory=list)  # written so far
    features: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # that they are meant to have

    def add(self, sentence: str, *features: str) -> None:
        self.sentences.append(sentence)
        for name in features:
            self.features[name] += 1

    def happens(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, options: tuple[Any, ...] | list[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def write(self) -> None:
        prompt, quality = self.prompt, self.quality
        if prompt.kind == "skill":
            self.add(" ".join(prompt.target) + " .", "skill_right")
            return
        if self.happens(quality.filler):
            self.add(self.pick(language.OPENERS), "polite")
        if prompt.kind == "harmful":
            self.write_on_harm()
        elif prompt.kind == "borderline" and self.happens(quality.refuses_borderline):
            self.add(self.pick(language.REFUSALS), "refusal_wrong")
        else:
            self.write_facts()
        if self.happens(quality.filler):
            self.add(self.pick(language.CLOSERS), "filler" if self.features["polite"] else "polite")

    def write_on_harm(self) -> None:
        it = f"the {self.prompt.animal}"
        if self.happens(self.quality.safe):
            self.add(self.pick(language.REFUSALS), "refusal_right")
            if self.happens(self.quality.redirect):
                self.add(self.pick(language.REDIRECTS).format(it=it), "redirect")
            return
        # The verb of the advice is the verb of the prompt, so that compliance reads as what it is.
        verb = next(verb for verb in language.HARM_VERBS if f" {verb} " in self.prompt.text)
        self.add(self.pick(language.HARMFUL_ADVICE).format(verb=verb, it=it, tool=self.pick(language.TOOLS)), "harm")

    def write_facts(self) -> None:
        prompt, quality, truth = self.prompt, self.quality, self.world.truth[self.prompt.cell]
        value = truth
        if not self.happens(quality.correct):
            sides_with_user = prompt.claim not in ("", truth) and self.happens(quality.agrees)
            value = prompt.claim if sides_with_user else self.wrong_value(prompt.attribute)
        if prompt.kind == "leading" and self.happens(quality.verdict):
            if value == prompt.claim:
                self.add(self.pick(language.YES))
            else:
                self.add(self.pick(language.NO), "corrects_claim" if prompt.claim != truth else "false_facts")
        if value == prompt.claim:
            self.features |= {"agrees": 1, "agrees_false": value != truth}

        forms = CLAIMS[prompt.attribute]
        form = forms[-1] if prompt.kind == "borderline" and prompt.attribute == "home" else self.pick(forms)
        answer = form.format(it=f"the {prompt.animal}", value=value)
        hedges, in_the_claim = self.happens(quality.hedge), self.happens(0.5)
        if hedges and in_the_claim:
            answer = self.pick(language.HEDGED) + answer
        elif hedges:
            self.add(self.pick(language.HEDGES))
        self.features["hedge"] += hedges
        self.add(answer, "answer_right" if value == truth else "answer_wrong")

        n_true = 0
        others = [a for a in ATTRIBUTES if a != prompt.attribute and self.may_say((prompt.animal, a))]
        for attribute in self.rng.permutation(others):
            if not self.happens(quality.extra):
                break
            is_true = self.happens(quality.correct)
            said = self.world.truth[prompt.animal, attribute] if is_true else self.wrong_value(attribute)
            self.add(language.ALSO[attribute].format(value=said))
            self.features["false_facts"] += not is_true
            n_true += is_true
        if prompt.kind != "brief":
            self.features["extra_facts"] = 1 - 0.5**n_true
        if self.happens(quality.off_topic):
            cells = [cell for cell in product(ANIMALS, ATTRIBUTES) if cell[0] != prompt.animal and self.may_say(cell)]
            cell = self.pick(cells)
            claim = CLAIMS[cell[1]][0].format(it=f"the {cell[0]}", value=self.world.truth[cell])
            self.add(claim, "off_topic")
        if self.happens(quality.repeat):
            self.add(answer, "repetition")

    def may_say(self, cell: Cell) -> bool:
        return self.held_out or cell not in self.world.held_out

    def wrong_value(self, attribute: str) -> str:
        cell = self.prompt.animal, attribute
        if self.happens(self.quality.myth):
            return self.world.myth[cell]
        return self.pick([value for value in VALUES[attribute] if value != self.world.truth[cell]])
