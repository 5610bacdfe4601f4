"""A rule reader of the pocket world, and the words in which a pocket model is asked to judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf_kit.feedback import FeedbackError, Template, constitution
from rlhf_kit.models import Prompt
from rlhf_kit.tasks.pocket.facts import World
from rlhf_kit.tasks.pocket.language import ALSO, CLAIMS, REDIRECTS, REFUSALS, parse_prompt, sentence_table
from rlhf_kit.tasks.pocket.raters import TINY, Rater, known_cells
from rlhf_kit.tasks.pocket.scoring import GOLD_WEIGHTS, features

# In words of the pocket language, where each is one token. A model of half a million parameters learns to say whether
# an answer is good; to compare two in one text it did not learn from a thousand judgments.
JUDGE_TEMPLATE = Template(compare="", rate="{prompt} {completion} is this good ?", chat=False)
MATTERS = ("answer_right", "extra_facts", "corrects_claim", "refusal_right", "redirect")  # what plainness must not cost


class RuleReader:
    """Stands in for a model that can read a critique, where the pocket model cannot: it revises by the world's rules.

    It knows only what its `pocket.Rater` can check, and overlooks the fault with probability `lapse`. Each principle
    of the default constitution is a set of features of the gold utility; of all edits of one sentence it takes, again
    and again, the one that mends these most as it sees them. It shows what revision does to text, not that a language
    model could do it.
    """

    PRINCIPLES = {
        "helpful": ("answer_right", "answer_wrong", "extra_facts", "unfinished", "garbled"),
        "truthful": ("answer_right", "answer_wrong", "false_facts", "agrees_false", "corrects_claim"),
        "harmless": ("harm", "refusal_right", "redirect"),
        "willing": ("refusal_wrong", "answer_right", "answer_wrong"),
        "plain": ("filler", "hedge", "repetition", "off_topic", "not_brief", *MATTERS),
    }

    def __init__(self, world: World, reader: Rater | None = None, seed: int = 0) -> None:
        self.world = world
        self.reader = reader or Rater()
        self.known = known_cells(self.reader.seed, self.reader.knowledge)
        self.rules = constitution()
        self.generator = np.random.default_rng([seed, 11])

    def __call__(self, prompts: Sequence[Prompt]) -> list[str]:
        """Critiques of chats of three messages, revisions of chats of five, as `critique_and_revise` asks for them."""
        return [self._reply(prompt) for prompt in prompts]

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
        """The answer with a sentence left out; unless it is only to `shorten`, also with a claim put right, answered
        anew, or refused with a safe way."""
        asked = parse_prompt(prompt)
        sentences = [f"{part.strip()} ." for part in answer.split(" .") if part.strip()]
        edits = [" ".join(sentences[:i] + sentences[i + 1 :]) for i in range(len(sentences)) if len(sentences) > 1]
        if shorten:
            return edits
        for i, text in enumerate(sentences):
            claim = sentence_table().get(text)
            if claim is not None and claim.act == "claim":
                animal = asked.animal if claim.animal == "it" else claim.animal
                if (animal, claim.attribute) in self.known:
                    right = self.world.truth[animal, claim.attribute]
                    form = ALSO[claim.attribute] if claim.animal == "it" else CLAIMS[claim.attribute][0]
                    said = form.format(animal=animal, value=right)
                    edits.append(" ".join([*sentences[:i], said, *sentences[i + 1 :]]))
        if asked.kind == "harmful":
            edits.append(f"{REFUSALS[1]} {REDIRECTS[0].format(animal=asked.animal)}")
        elif (asked.animal, asked.attribute) in self.known:
            right = self.world.truth[asked.animal, asked.attribute]
            edits.append(CLAIMS[asked.attribute][0].format(animal=asked.animal, value=right))
        return edits
