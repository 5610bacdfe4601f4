"""Simulated raters, and a reader who revises: gold seen through what a person knows, likes and overlooks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from rlhf_kit.feedback import SCALES, STRENGTHS, Answer, FeedbackError, Question, Template, constitution
from rlhf_kit.feedback.judging import dense_ranks
from rlhf_kit.models import Prompt
from rlhf_kit.rewards import Completion

from . import language
from .facts import World
from .language import Cell
from .scoring import GOLD_WEIGHTS, features

TINY = 1e-9  # of utility: less than any difference between two completions
STEPS = (0.75, 2.0)  # where a felt gap of a pair becomes clear, and where it becomes large, in units of utility
# In words of the pocket language, where each is one token. A model of half a million parameters learns to say whether
# an answer is good. It did not learn from a thousand judgments to compare two in one text.
JUDGE_TEMPLATE = Template(compare="", rate="{prompt} {completion} is this good ?", chat=False)


@dataclass(frozen=True)
class Rater:
    """A rater's faults; Rater(1, 0, 0, 0, 0, temperature=0, lapse=0, position_bias=0) judges exactly by gold."""

    knowledge: float = 0.9  # share of the facts that the rater can check; claims about the others look true
    length: float = 0.03  # added utility per word
    politeness: float = 0.5  # added utility per polite sentence after the first, which gold counts as flattery
    refusal_leniency: float = 0.5  # added utility of refusing a harmless prompt
    agreement: float = 0.5  # added utility of siding with the user's claim
    temperature: float = 0.5  # Bradley-Terry temperature, in units of utility; 0 always prefers the better
    lapse: float = 0.05  # share of judgments made by a coin
    position_bias: float = 0.1  # log-odds added to whichever completion is shown first
    standard: float = 1.0  # the utility above which a completion is called good
    seed: int = 0  # which facts are known
    name: str = "rater"

    def __post_init__(self) -> None:
        for field, most in (("knowledge", 1), ("lapse", 1), ("temperature", np.inf)):
            if not 0 <= getattr(self, field) <= most:
                raise ValueError(f"Rater.{field}={getattr(self, field)}: give a number from 0 to {most}.")


@cache
def known_cells(rater_seed: int, knowledge: float) -> frozenset[Cell]:
    """The (animal, attribute) cells that a rater can check; more knowledge only ever adds cells."""
    cells = list(product(language.ANIMALS, language.ATTRIBUTES))
    order = np.random.default_rng([rater_seed, 3]).permutation(len(cells))
    return frozenset(cells[i] for i in order[: round(knowledge * len(cells))])


def utility(world: World, rater: Rater, prompt: str, completion: str) -> float:
    """How much a rater likes a completion: gold of what the rater can see, plus the rater's own tastes."""
    seen = features(world, prompt, completion, known=known_cells(rater.seed, rater.knowledge))
    return (
        sum(weight * seen[name] for name, weight in GOLD_WEIGHTS.items())
        + rater.length * seen["words"]
        + rater.politeness * seen["filler"]
        + rater.refusal_leniency * seen["refusal_wrong"]
        + rater.agreement * seen["agrees"]
    )


def choice_probability(rater: Rater, first: float, second: float) -> float:
    """Probability that a rater prefers the first of two completions shown, given their utilities.

    (1 - lapse) sigmoid((u_1 - u_2) / temperature + position_bias) + lapse / 2: Bradley-Terry (1952) with lapses.
    """
    gap = first - second
    if rater.temperature > 0:
        decided = 0.5 * (1 + np.tanh((gap / rater.temperature + rater.position_bias) / 2))
    else:  # the limit: any gap decides, and position breaks ties
        decided = 0.5 * (1 + np.sign(gap or rater.position_bias))
    return float((1 - rater.lapse) * decided + rater.lapse / 2)


class SimulatedRater:
    """A `Rater` who answers questions; the same seed gives the same answers to the same questions in order."""

    interface = "simulated-1"
    timed = False  # a formula has no pace

    def __init__(self, world: World, rater: Rater, seed: int = 0) -> None:
        self.world, self.rater, self.name = world, rater, rater.name
        self.generator = np.random.default_rng([seed, 7])

    def __call__(self, prompt: Prompt, completions: Sequence[Completion], question: Question) -> Answer:
        felt = [self.utility(prompt, completion) for completion in completions]
        if question != "rank":
            return Answer(rating=self._rate(felt[0], question))
        if len(felt) > 2:
            return Answer(ranks=dense_ranks(perceived_scores(self.rater, felt, self.generator)))
        gap = perceived_gap(self.rater, felt[0] - felt[1], self.generator.random())
        strength = STRENGTHS[sum(abs(gap) >= step for step in STEPS)]
        return Answer(ranks=(1, 2) if gap > 0 else (2, 1), strength=strength)

    def utility(self, prompt: Prompt, completion: Completion) -> float:
        """How much the rater likes a completion, before noise; FeedbackError for a chat."""
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise FeedbackError(f"{self.name}: a simulated rater reads the pocket world's texts, not chats")
        return utility(self.world, self.rater, prompt, completion)

    def _rate(self, felt: float, question: Question) -> int:
        """Good if it feels better than the rater's standard; the standard is the middle of a longer scale."""
        rater, rng = self.rater, self.generator
        lapses = rng.random() < rater.lapse
        score = rng.uniform(-4, 4) if lapses else felt - rater.standard + rater.temperature * rng.logistic()
        if question == "good/bad":
            return int(score > 0)
        scale = SCALES[question]
        return int(np.clip(round(score) + scale[len(scale) // 2], scale[0], scale[-1]))


def perceived_gap(rater: Rater, gap: float, uniform: float) -> float:
    """How much better the first of two completions feels in one judgment; `gap` is the difference of their utilities.

    One uniform draw decides: its outer ends, `lapse` in all, are lapses, which feel anything; the rest is logistic
    noise. So P(perceived_gap > 0) is `choice_probability`.
    """
    end = rater.lapse / 2
    if uniform < end:
        return 3 * (uniform / end)
    if uniform >= 1 - end:
        return -3 * ((1 - uniform) / end)
    if rater.temperature == 0:
        return gap or (rater.position_bias or (uniform < 0.5) - 0.5) * TINY
    rest = (uniform - end) / (1 - rater.lapse)
    noise = np.log(rest / (1 - rest)) if rest > 0 else -np.inf
    return float(rater.temperature * (gap / rater.temperature + rater.position_bias - noise))


def perceived_scores(rater: Rater, utilities: Sequence[float], rng: np.random.Generator) -> list[float]:
    """How good each of several completions feels in one ranking: Plackett-Luce with lapses.

    Utilities over temperature, position bias on the first, and Gumbel noise; of two: Bradley-Terry (Luce 1959).
    """
    if rng.random() < rater.lapse:
        return list(rng.permutation(len(utilities)).astype(float))
    scale = rater.temperature or TINY
    scores = np.array(utilities, dtype=float) + scale * rng.gumbel(size=len(utilities))
    scores[0] += scale * rater.position_bias
    return list(scores)


class RuleReader:
    """A stand-in for a model that can read a critique, which the pocket model cannot: it revises by the world's rules.

    It knows only what its `pocket.Rater` can check, and overlooks the fault with probability `lapse`. Each principle
    of the default constitution is a set of features of gold. Again and again it makes the edit of one sentence that it
    sees to improve these most. It shows what revision does to text, not that a language model could do it.
    """

    PRINCIPLES = {
        "helpful": ("answer_right", "answer_wrong", "extra_facts", "unfinished", "garbled"),
        "truthful": ("answer_right", "answer_wrong", "false_facts", "agrees_false", "corrects_claim"),
        "harmless": ("harm", "refusal_right", "redirect"),
        "willing": ("refusal_wrong", "answer_right", "answer_wrong"),
        "plain": ("filler", "hedge", "repetition", "off_topic", "not_brief")
        + ("answer_right", "extra_facts", "corrects_claim", "refusal_right", "redirect"),  # must not be lost
    }

    def __init__(self, world: World, reader: Rater | None = None, seed: int = 0) -> None:
        self.world, self.reader = world, reader or Rater()
        self.known = known_cells(self.reader.seed, self.reader.knowledge)
        self.principles = {principle.critique: principle.name for principle in constitution()}
        self.generator = np.random.default_rng([seed, 11])

    def __call__(self, chats: Sequence[Prompt]) -> list[str]:
        """Critiques of chats of three messages, revisions of chats of five, as `critique_and_revise` asks for them."""
        return [self._reply(chat) for chat in chats]

    def _reply(self, chat: Prompt) -> str:
        if isinstance(chat, str) or len(chat) not in (3, 5):
            raise FeedbackError("a RuleReader reads a prompt, an answer and a request for a critique; nothing else")
        prompt, answer, request, *critique = (message["content"] for message in chat)
        if critique:
            return answer if critique[0] == "no fault" else self._revised(prompt, answer, critique[0])
        principle = self.principles.get(request)
        if principle is None:
            raise FeedbackError("a RuleReader knows the principles of the default constitution only")
        overlooks = self.generator.random() < self.reader.lapse
        return "no fault" if overlooks or self._revised(prompt, answer, principle) == answer else principle

    def _revised(self, prompt: str, answer: str, principle: str) -> str:
        def seen(text: str) -> float:
            found = features(self.world, prompt, text, known=self.known)
            return sum(GOLD_WEIGHTS[name] * found[name] for name in self.PRINCIPLES[principle])

        while True:
            best = max([answer, *self._edits(prompt, answer, shorten=principle == "plain")], key=seen)
            if seen(best) <= seen(answer) + TINY:
                return answer
            answer = best

    def _edits(self, prompt: str, answer: str, shorten: bool) -> list[str]:
        """The answer less a sentence; unless it must `shorten`, also with a claim put right, or another answer."""
        asked = language.parse_prompt(prompt)
        sentences = [f"{part.strip()} ." for part in answer.split(" .") if part.strip()]
        edits = [" ".join(sentences[:i] + sentences[i + 1 :]) for i in range(len(sentences)) if len(sentences) > 1]
        if shorten:
            return edits
        for i, text in enumerate(sentences):
            claim = language.parse_sentence(text)
            cell = asked.animal if claim.animal == "it" else claim.animal, claim.attribute
            if cell in self.known:
                form = language.ALSO[claim.attribute] if claim.animal == "it" else language.CLAIMS[claim.attribute][0]
                edits.append(" ".join([*sentences[:i], self._true(form, cell), *sentences[i + 1 :]]))
        if asked.kind == "harmful":
            edits.append(f"{language.REFUSALS[1]} {language.REDIRECTS[0].format(it=f'the {asked.animal}')}")
        elif asked.cell in self.known:
            edits.append(self._true(language.CLAIMS[asked.attribute][0], asked.cell))
        return edits

    def _true(self, form: str, cell: Cell) -> str:
        return form.format(it=f"the {cell[0]}", value=self.world.truth[cell])
