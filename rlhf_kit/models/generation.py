"""Sample completions: what the policy says at a temperature, and nothing else (no top-k, no penalties of a config)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_kit.models.loading import Model
from rlhf_kit.models.logprobs import Tokens, completion_mask

Prompt = str | list[dict[str, str]]
DROP_EVERY = 8  # tokens after which completed rows leave the batch; more often costs more in calls than it saves


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    """Token ids of text prompts, or of chat prompts through the chat template with the generation prompt added."""
    if prompts and isinstance(prompts[0], str):
        return list(tokenizer(prompts)["input_ids"])
    return [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]


def encode_pairs(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], completions: list[Any]) -> Tokens:
    """Given completions as TRL tokenises them (text: prompt + completion + EOS; chat: what the template renders).

    Raises ValueError where the prompt's tokens are not a prefix of the whole's, for then no completion can be cut out.
    """
    heads = encode_prompts(tokenizer, prompts)
    tails = []
    for row, (prompt, completion, head) in enumerate(zip(prompts, completions, heads, strict=True)):
        if isinstance(prompt, str):
            whole = list(tokenizer(prompt + completion + tokenizer.eos_token)["input_ids"])
        else:
            reply = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
            whole = tokenizer.apply_chat_template(prompt + reply, tokenize=True, return_dict=True)["input_ids"]
        if whole[: len(head)] != head:
            raise ValueError(
                f"row {row}: prompt and completion share a token where they meet; end prompts without a space"
            )
        tails.append(whole[len(head) :])
    width, length = max(map(len, heads)), max(map(len, tails))
    pairs = list(zip(heads, tails, strict=True))
    ids = [[0] * (width - len(head)) + head + tail + [0] * (length - len(tail)) for head, tail in pairs]
    mask = [
        [0] * (width - len(head)) + [1] * (len(head) + len(tail)) + [0] * (length - len(tail)) for head, tail in pairs
    ]
    attention = torch.tensor(mask)
    return Tokens(torch.tensor(ids), attention, attention[:, width:])


def stop_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the model's generation config."""
    ours = model.generation_config.eos_token_id if model.generation_config is not None else None
    extra = ours if isinstance(ours, list) else [ours] if ours is not None else []
    return sorted({int(tokenizer.eos_token_id), *map(int, extra)})


def sampling_config(max_completion_length: int, temperature: float, stops: list[int], pad: int) -> GenerationConfig:
    """Plain ancestral sampling (greedy at temperature 0): defaults that would change the distribution are off."""
    settings: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_completion_length,
        eos_token_id=stops,
        pad_token_id=pad,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
        **settings,
    )


def check_positions(model: Model, longest: int, max_completion_length: int) -> None:
    """Raises ValueError where a prompt of `longest` tokens and its completion would not fit the model's positions."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest + max_completion_length > limit:
        raise ValueError(
            f"a prompt of {longest} tokens and max_completion_length={max_completion_length} exceed the model's "
            f"{limit} positions; shorten the prompts or the completions"
        )


@torch.no_grad()
def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_completion_length: int,
    temperature: float = 1.0,
) -> Tokens:
    """One completion for each prompt of token ids, drawn at `temperature`: Tokens of (B, P + C).

    Runs in eval mode (with checkpointing in train mode the cache is dropped, and the text wrong) and restores the mode.
    Raises ValueError where prompt and completion would not fit the model's positions.
    """
    longest = max(map(len, prompts))
    check_positions(model, longest, max_completion_length)
    stops = stop_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    batch = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    input_ids, attention_mask = (torch.tensor(rows, device=model.device) for rows in (batch, mask))
    settings = sampling_config(max_completion_length, temperature, stops, pad)
    # A PEFT model generates through the model its adapters sit in.
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, its_own = model.training, inner.generation_config
    model.eval()
    # What `settings` leaves open would be filled in from the model's own config: its min_p, its forbidden words.
    inner.generation_config = settings
    try:
        output = _generate_dropping(inner, input_ids, attention_mask, settings)
    finally:
        inner.generation_config = its_own
        model.train(was_training)
    completions = completion_mask(output[:, longest:], stops)
    return Tokens(output, torch.cat([attention_mask, completions], dim=1), completions)


def _generate_dropping(
    model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, settings: GenerationConfig
) -> torch.Tensor:
    """Prompts with their completions (B, P + C), as `model.generate` gives them, for fewer rows at each step.

    `generate` carries every row along until the longest completion ends. Here it stops each DROP_EVERY tokens, and goes
    on from its own cache with the rows that have not ended. A recurrent model's cache drops no rows; it has one go.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    attends = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
    length, width = settings.max_new_tokens, input_ids.shape[1]
    output = F.pad(input_ids, (0, length), value=settings.pad_token_id)
    stops = torch.tensor(settings.eos_token_id, device=input_ids.device)
    rows, cache = torch.arange(len(input_ids), device=input_ids.device), None
    while True:
        settings.max_new_tokens = min(DROP_EVERY, output.shape[1] - width) if attends else length
        found = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, generation_config=settings
        )
        written = found.sequences[:, width:]
        output[rows, width : width + written.shape[1]] = written
        width += written.shape[1]
        going = ~torch.isin(written, stops).any(1)
        if not attends or width == output.shape[1] or not going.any():
            return output[:, :width]
        rows, input_ids, cache = rows[going], found.sequences[going], found.past_key_values
        attention_mask = torch.cat([attention_mask[going], torch.ones_like(written[going])], dim=1)
        cache.batch_select_indices(going)


def decode_completions(tokenizer: PreTrainedTokenizerBase, tokens: Tokens) -> list[str]:
    """The text of each completion up to its first stop token, special tokens left out."""
    return [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids, mask in zip(tokens.completion_ids, tokens.completion_mask, strict=True)
    ]


def finished(tokens: Tokens, stops: list[int]) -> torch.Tensor:
    """Whether each completion ended with a stop token: (B,) bool."""
    last = tokens.completion_mask.sum(1, keepdim=True) - 1
    return torch.isin(tokens.completion_ids.gather(1, last), torch.tensor(stops, device=last.device)).squeeze(1)
