"""The pocket tokenizer: byte-level BPE in which every word of the pocket language is one token."""

from itertools import product

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_kit.models.rendering import EOS, PAD, wrap

from .language import LIST_WORDS, OPERATIONS, SKILL_TEMPLATES, prompt_table, sentence_table, skill_prompt


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the shipped base: 256 bytes, pad, EOS, and each word after a space.

    Words that can begin a text are tokens without the space too. Any text encodes: there are no merges, and
    `ignore_merges` makes a word that is in the vocabulary one token; any other word falls apart into its bytes.
    """
    skill = [skill_prompt(*words, LIST_WORDS).text for words in product(SKILL_TEMPLATES, OPERATIONS)]
    texts = [text.split() for text in (*prompt_table(), *sentence_table(), *skill, *LIST_WORDS)]
    pieces = [EOS, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["Ġ" + word for word in sorted({word for text in texts for word in text})]  # Ġ: a space in byte-level BPE
    pieces += sorted({text[0] for text in texts})
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)))
