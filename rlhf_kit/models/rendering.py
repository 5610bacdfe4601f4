"""Texts and chats as tokens, and tokens as texts: one rendering for what is trained, sampled and scored."""

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_kit.models.logprobs import Tokens, padded

Prompt = str | list[dict[str, Any]]

EOS = "<|endoftext|>"
PAD = "<|pad|>"  # not EOS: a model whose padding is its EOS never learns to stop
# Renders exactly the text format: a prompt as it is, a completion after one space and closed by EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the kit's special tokens and chat template; it adds no BOS and no EOS."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    own: dict[str, Any] = {"eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **own)


class RenderError(ValueError):
    """A row that cannot be rendered as the trainers render it; the message says why and what to do."""


class SharedToken(RenderError):
    """A row of which one token spans prompt and completion, as a sample may end up when it is read as text again."""


def as_completion(prompt: Prompt, text: str) -> Any:
    """What was written after a prompt: text after text, an assistant message after a chat."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def plain(cell: Any) -> Any:
    """A text as it is; a chat with the text parts of its contents joined. RenderError for parts that are no text."""
    if isinstance(cell, str):
        return cell
    chat = [dict(message) for message in cell]
    for message in chat:
        if isinstance(parts := message.get("content"), list):
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
                raise RenderError("a message's content has parts that are not text; this kit trains on text only")
            message["content"] = "".join(part["text"] for part in parts)
    return chat


def render(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Any = None) -> str:
    """What is tokenised of a row: its texts closed by one EOS, or its chat by the template.

    Without a completion: the text alone, or the chat with the generation prompt. A text that already begins with the
    BOS that the tokenizer adds does not get a second. Raises RenderError where the template refuses the chat.
    """
    if isinstance(prompt, str):
        end = "" if completion is None else completion.removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        return without_bos(tokenizer, prompt) + end
    reply = as_completion(prompt, completion) if isinstance(completion, str) else completion or []
    chat = plain([*prompt, *reply])
    try:
        return tokenizer.apply_chat_template(chat, add_generation_prompt=completion is None, tokenize=False)
    except TemplateError as error:
        raise RenderError(f"the chat template refuses it: {error}") from None


def without_bos(tokenizer: PreTrainedTokenizerBase, prompt: Any) -> Any:
    """A text without the BOS with which it begins, where the tokenizer puts one before every text; a chat as it is."""
    bos = tokenizer.bos_token
    if bos is None or not isinstance(prompt, str) or tokenizer("")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return prompt
    return prompt.removeprefix(bos)


def encode(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[Any] | None = None
) -> list[list[int]]:
    """Token ids of each prompt, or of each prompt with its completion; all are texts or all are chats."""
    texts = [render(tokenizer, *row) for row in zip(prompts, completions or [None] * len(prompts), strict=True)]
    return list(tokenizer(texts, add_special_tokens=isinstance(prompts[0], str), verbose=False)["input_ids"])


def split(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Any) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and those of the completion after it (of None: no tokens).

    Raises RenderError, with the cause, where the prompt's tokens are not the first of the whole.
    """
    [head], [whole] = encode(tokenizer, [prompt]), encode(tokenizer, [prompt], [completion])
    if completion is None and not head:
        raise RenderError("it has no token, so nothing could follow it")
    if whole[: len(head)] == head:
        return head, whole[len(head) :]
    asked = render(tokenizer, prompt)
    if not render(tokenizer, prompt, completion).startswith(asked):
        raise RenderError(
            f"the chat template asks for an answer after {asked[-30:]!r}, but renders the answer otherwise; give "
            "`tokenizer.chat_template` a generation prompt with which every answer begins"
        )
    raise SharedToken(
        f"one token spans the end of the prompt ({asked[-10:]!r}) and the start of the completion; move the spaces and "
        "line breaks at the end of the prompt to the start of the completion"
    )


def encode_pairs(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], completions: Sequence[Any]) -> Tokens:
    """Prompts with given completions; RenderError names the row that cannot be split."""
    rows = []
    for row, pair in enumerate(zip(prompts, completions, strict=True)):
        try:
            rows.append(split(tokenizer, *pair))
        except RenderError as error:
            raise type(error)(f"row {row} (counting from 0): {error}") from None
    heads, tails = zip(*rows, strict=True)
    (head_ids, head_mask), (tail_ids, tail_mask) = padded(heads, "left"), padded(tails, "right")
    return Tokens(torch.cat([head_ids, tail_ids], dim=1), torch.cat([head_mask, tail_mask], dim=1), tail_mask)


def closing_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the chat template closes an assistant's turn; None where there is none."""
    if tokenizer.chat_template is None:
        return None
    try:
        text = render(tokenizer, [{"role": "user", "content": "question"}], "ANSWER")
    except RenderError:
        return None
    tail = tokenizer(text.rpartition("ANSWER")[2], add_special_tokens=False)["input_ids"]
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    return next((token for token in tail if token in special), None)


def decode_completions(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[str]:
    """The text of each completion up to its first stop token, without special tokens.

    It is what the whole text has more than the prompt's: a tokenizer of words may drop the space before a first word.
    """
    texts = []
    for ids, seen, written in zip(tokens.input_ids, tokens.attention_mask, tokens.completion_mask, strict=True):
        row, n = ids[seen.bool()].tolist(), int(written.sum())
        before, whole, alone = (
            tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for part in (row[: len(row) - n], row, row[len(row) - n :])
        )
        # A prompt may end in the middle of a character, which its own text then lacks.
        texts.append(whole[len(before) :] if whole.startswith(before) else alone)
    return texts
