"""The pocket tokenizer: byte-level BPE in which every word of the pocket language is one token."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .language import first_words, words

EOS = "<|endoftext|>"
PAD = "<|pad|>"  # not EOS: a model whose padding is its EOS never learns to stop
# Renders exactly the text format: a prompt as it is, a completion after one space and closed by EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


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


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with this project's special tokens and chat template; adds no BOS and no EOS."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
