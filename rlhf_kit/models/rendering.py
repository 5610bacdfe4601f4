"""Texts and chats as tokens, rendered as TRL's trainers render them, and tokens as texts; the kit's own tokenizers."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_kit.models.logprobs import Tokens, padded

Prompt = str | list[dict[str, str]]

EOS = "<|endoftext|>"
PAD = "<|pad|>"  # not EOS: a model whose padding is its EOS never learns to stop
# Renders exactly the text format: a prompt as it is, a completion after one space and closed by EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the kit's special tokens and chat template; it adds no BOS and no EOS."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    own: dict[str, Any] = {"eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **own)


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Any = None) -> str:
    """What is tokenised of a row: its texts closed by one EOS, or its chat by the template.

    Without a completion: the text alone, or the chat with the generation prompt.
    """
    if isinstance(prompt, str):
        eos = tokenizer.eos_token
        return prompt if completion is None else prompt + completion.removesuffix(eos) + eos
    reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion or []
    return tokenizer.apply_chat_template(prompt + reply, add_generation_prompt=completion is None, tokenize=False)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[Any] | None = None
) -> list[list[int]]:
    """Token ids of each prompt, or of each prompt with its completion; all are texts or all are chats."""
    texts = [render(tokenizer, *row) for row in zip(prompts, completions or [None] * len(prompts), strict=True)]
    return list(tokenizer(texts, add_special_tokens=isinstance(prompts[0], str), verbose=False)["input_ids"])


def encode_pairs(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], completions: list[Any]) -> Tokens:
    """Prompts with given completions; ValueError where a prompt's tokens are not the first of the whole."""
    heads, wholes = encode(tokenizer, prompts), encode(tokenizer, prompts, completions)
    for row, (head, whole) in enumerate(zip(heads, wholes, strict=True)):
        if whole[: len(head)] != head:
            raise ValueError(f"row {row}: one token spans prompt and completion; end the prompt without a space")
    tails = [whole[len(head) :] for head, whole in zip(heads, wholes, strict=True)]
    (head_ids, head_mask), (tail_ids, tail_mask) = padded(heads, "left"), padded(tails, "right")
    return Tokens(torch.cat([head_ids, tail_ids], dim=1), torch.cat([head_mask, tail_mask], dim=1), tail_mask)


def decode_completions(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[str]:
    """The text of each completion up to its first stop token, without special tokens."""
    return [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids, mask in zip(tokens.completion_ids, tokens.completion_mask, strict=True)
    ]
