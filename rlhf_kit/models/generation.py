"""Sample completions from the softmax at a temperature: no top-k, no penalties of a model's generation config."""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_kit.models.loading import Model
from rlhf_kit.models.logprobs import Tokens, completion_mask, padded
from rlhf_kit.models.rendering import closing_token

DROP_EVERY = 8  # tokens after which finished rows leave the batch; more often would cost more calls than it saves


def stop_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: EOS, those of the generation config, and the one that closes a chat's turn."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, closing_token(tokenizer), *(own if isinstance(own, list) else [own])}
    return sorted(ends - {None})


def check_positions(model: Model, longest: int, max_completion_length: int) -> None:
    """Raise ValueError where a prompt of `longest` tokens and its completion exceed the model's positions."""
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
    """One completion for each prompt of token ids, sampled at `temperature` (0: greedy): Tokens of (B, P + C).

    In eval mode, as checkpointing would drop the cache and spoil the text. ValueError as of `check_positions`.
    """
    longest = max(map(len, prompts))
    check_positions(model, longest, max_completion_length)
    stops, pad = stop_ids(model, tokenizer), tokenizer.pad_token_id
    input_ids, attention_mask = (tensor.to(model.device) for tensor in padded(prompts, "left", pad))
    # Every default that would change the distribution is off.
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    chosen = drawn if temperature > 0 else {"do_sample": False}
    ends = {"max_new_tokens": max_completion_length, "eos_token_id": stops, "pad_token_id": pad}
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training, own_config = model.training, inner.generation_config
    model.eval()
    # Otherwise transformers would take what these leave open, such as min_p or forbidden words, from the model.
    inner.generation_config = GenerationConfig(**chosen, **ends, repetition_penalty=1.0, return_dict_in_generate=True)
    try:
        output = _generate_dropping(inner, input_ids, attention_mask)
    finally:
        inner.generation_config = own_config
        model.train(was_training)
    completions = completion_mask(output[:, longest:], stops)
    return Tokens(output, torch.cat([attention_mask, completions], dim=1), completions)


def _generate_dropping(model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """`model.generate`: prompts with completions (B, P + C). Rows that have ended leave each DROP_EVERY tokens."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    attends = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}  # a recurrent cache drops no rows
    settings, width = model.generation_config, input_ids.shape[1]
    length = settings.max_new_tokens
    output = F.pad(input_ids, (0, length), value=settings.pad_token_id)
    stops = torch.tensor(settings.eos_token_id, device=input_ids.device)
    rows, cache = torch.arange(len(input_ids), device=input_ids.device), None
    while True:
        settings.max_new_tokens = min(DROP_EVERY, output.shape[1] - width) if attends else length
        found = model.generate(input_ids, attention_mask=attention_mask, past_key_values=cache)
        written = found.sequences[:, width:]
        output[rows, width : width + written.shape[1]] = written
        width += written.shape[1]
        going = ~torch.isin(written, stops).any(1)
        if not attends or width == output.shape[1] or not going.any():
            return output[:, :width]
        rows, input_ids, cache = rows[going], found.sequences[going], found.past_key_values
        attention_mask = torch.cat([attention_mask[going], torch.ones_like(written[going])], dim=1)
        cache.batch_select_indices(going)


def finished(tokens: Tokens, stops: list[int]) -> Tensor:
    """Whether each completion ends with a stop token: (B,) bool."""
    last = tokens.completion_mask.sum(1, keepdim=True) - 1
    return torch.isin(tokens.completion_ids.gather(1, last), torch.tensor(stops, device=last.device)).squeeze(1)
