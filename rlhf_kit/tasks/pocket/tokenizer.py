"""The pocket tokenizer: byte-level BPE in which every word of the pocket language is one token."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_kit.models.rendering import CHAT_TEMPLATE, EOS, PAD, wrap

from .language import first_words, words

__all__ = ["CHAT_TEMPLATE", "EOS", "PAD", "pocket_tokenizer", "wrap"]


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the shipped base: 256 bytes, pad, EOS, and each word after a space.

    Words that can begin a text are tokens without the space too. Any text encodes: a word outside the language falls
    apart into its bytes, since there are no merges at all and `ignore_merges` takes a whole pre-token from the
    vocabulary where it is one.
    """
    vocabulary = {EOS: 0, PAD: 1}
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += ["Ġ" + word for word in words()]  # Ġ: how byte-level BPE writes a space
    pieces += first_words()
    for piece in pieces:
        vocabulary.setdefault(piece, len(vocabulary))
    return wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)))
