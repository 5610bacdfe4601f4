"""A rule reader of the pocket world, and the words in which a pocket model is asked to judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_kit.feedback import FeedbackError, Template, constitution
from rlhf_kit.models import Prompt

from .facts import World
from .language import ALSO, CLAIMS, REDIRECTS, REFUSALS, Cell, parse_prompt, parse_sentence
from .raters import TINY, Rater, known_cells
from .scoring import GOLD_WEIGHTS, features

# In words of the pocket language, where each is one token. A model of half a million parameters learns to say whether
# an answer is good. It did not learn from a thousand judgments to compare two in one text.
JUDGE_TEMPLATE = Template(compare="", rate="{prompt} {completion} is this good ?", chat=False)


class RuleReader:
    """A stand-in for a model that can read a critique, which the pocket model cannot: it revises by the world's rules.

    It knows only what its `pocket.Rater` can check, and overlooks the fault with probability `lapse`. Each principle
    of the default constitution is a set of features of the gold utility. Again and again it makes the edit of one
    sentence that improves these most as it sees them. It shows what revision does to text, not that a language model
    could do it.
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
        self.world = world
        self.reader = reader or Rater()
        self.known = known_cells(self.reader.seed, self.reader.knowledge)
        self.rules = constitution()
        self.generator = np.random.default_rng([seed, 11])

    def __call__(self, chats: Sequence[Prompt]) -> list[str]:
        """Critiques of chats of three messages, revisions of chats of five, as `critique_and_revise` asks for them."""
        return [self._reply(chat) for chat in chats]

    def _reply(self, chat: Prompt) -> str:
        if isinstance(chat, str) or len(chat) not in (3, 5):
            raise FeedbackError("a RuleReader reads a prompt, an answer and a request for a critique; nothing else")
        prompt, answer = chat[0]["content"], chat[1]["content"]
        if len(chat) == 5:
            return answer if chat[3]["content"] == "no fault" else self._revised(prompt, answer, chat[3]["content"])
        asked = [each.name for each in self.rules if each.critique == chat[2]["content"]]
        if not asked:
            raise FeedbackError("a RuleReader knows the principles of the default constitution only")
        overlooks = self.generator.random() < self.reader.lapse
        return "no fault" if overlooks or self._revised(prompt, answer, asked[0]) == answer else asked[0]

    def _revised(self, prompt: str, answer: str, principle: str) -> str:
        names = self.PRINCIPLES[principle]

        def seen(text: str) -> float:
            found = features(self.world, prompt, text, known=self.known)
            return sum(GOLD_WEIGHTS[name] * found[name] for name in names)

        while True:
            best = max([answer, *self._edits(prompt, answer, shorten=principle == "plain")], key=seen)
            if seen(best) <= seen(answer) + TINY:
                return answer
            answer = best

    def _edits(self, prompt: str, answer: str, shorten: bool) -> list[str]:
        """The answer without one of its sentences; and, unless it must `shorten`, with one claim put right, or replaced
        by the right answer or by a refusal with a safe way."""
        asked = parse_prompt(prompt)
        sentences = [f"{part.strip()} ." for part in answer.split(" .") if part.strip()]
        edits = [" ".join(sentences[:i] + sentences[i + 1 :]) for i in range(len(sentences)) if len(sentences) > 1]
        if shorten:
            return edits
        for i, text in enumerate(sentences):
            claim = parse_sentence(text)
            cell = asked.animal if claim.animal == "it" else claim.animal, claim.attribute
            if cell in self.known:
                form = ALSO[claim.attribute] if claim.animal == "it" else CLAIMS[claim.attribute][0]
                edits.append(" ".join([*sentences[:i], self._true(form, cell), *sentences[i + 1 :]]))
        if asked.kind == "harmful":
            edits.append(f"{REFUSALS[1]} {REDIRECTS[0].format(it=f'the {asked.animal}')}")
        elif asked.cell in self.known:
            edits.append(self._true(CLAIMS[asked.attribute][0], asked.cell))
        return edits

    def _true(self, form: str, cell: Cell) -> str:
        return form.format(it=f"the {cell[0]}", value=self.world.truth[cell])
