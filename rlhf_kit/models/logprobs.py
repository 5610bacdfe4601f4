"""Log-probs, entropies and KL of completions from hidden states, so that the full logits of a batch never exist."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_kit.models.loading import Model, decoder

LOGITS_CHUNK_GIB = 0.25


class Tokens(NamedTuple):
    """Prompts padded on the left and completions padded on the right, side by side."""

    input_ids: Tensor  # (B, P + C)
    attention_mask: Tensor  # (B, P + C)
    completion_mask: Tensor  # (B, C), 1 up to and including the first EOS

    @property
    def completion_ids(self) -> Tensor:  # (B, C)
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def rows(self, index: Tensor | slice) -> "Tokens":
        """The given rows, without the columns that are padding in all of them."""
        ids, mask, completion = (tensor[index] for tensor in self)
        width, keep = mask.shape[1] - completion.shape[1], max(1, int(completion.sum(1).max()))
        columns = slice(width - int(mask[:, :width].sum(1).max()), width + keep)
        return Tokens(ids[:, columns], mask[:, columns], completion[:, :keep])

    def to(self, device: torch.device) -> "Tokens":
        """The same tokens on another device."""
        return Tokens(*(tensor.to(device) for tensor in self))


def padded(rows: Sequence[list[int]], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor, padded on the `side` "left" or "right", with its mask: (B, T) each."""
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return pad_sequence(ids, True, pad, padding_side=side), pad_sequence(mask, True, padding_side=side)


def completion_mask(completion_ids: Tensor, stop_ids: list[int]) -> Tensor:
    """1 up to and including the first stop token, 0 after it: (B, C) -> (B, C); the pad token has no effect."""
    is_stop = torch.isin(completion_ids, torch.tensor(stop_ids, device=completion_ids.device)).long()
    return (is_stop.cumsum(1) - is_stop == 0).long()


def completion_hidden(backbone: PreTrainedModel, tokens: Tokens) -> Tensor:
    """Hidden states (B, C, D); index t has seen the prompt and the tokens before token t, never token t."""
    width, length = tokens.completion_mask.shape[1], int(tokens.attention_mask.sum(1).max())
    # Rows are aligned on the left. The padding then comes last, where causal attention never looks: no mask is needed,
    # positions count from 0, and the batch is no wider than its longest row.
    start = tokens.attention_mask.argmax(1, keepdim=True)
    columns = torch.arange(length, device=start.device) + start
    ids = tokens.input_ids.gather(1, columns.clamp(max=tokens.input_ids.shape[1] - 1))
    states = backbone(input_ids=ids, use_cache=False).last_hidden_state
    before = tokens.input_ids.shape[1] - width - start - 1 + torch.arange(width, device=start.device)
    return states.gather(1, before.clamp(max=length - 1).unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def completion_logprobs(
    model: Model, tokens: Tokens, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor]:
    """log pi(y_t | x, y_<t) at a sampling temperature and, if asked, entropy, in nats: (B, C) each, 0 where masked."""
    real = tokens.completion_mask.bool()
    hidden = completion_hidden(decoder(model), tokens)[real]

    def chunk(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        log_softmax = _log_softmax(model, hidden, temperature)
        logprobs = log_softmax.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_softmax.exp() * log_softmax).sum(-1) if with_entropy else torch.zeros_like(logprobs)
        return logprobs, entropy

    logprobs, entropy = _by_chunk(chunk, model, real, hidden, tokens.completion_ids[real])
    return logprobs, entropy


def completion_kl(policy: Model, reference: Model, tokens: Tokens, temperature: float = 1.0) -> Tensor:
    """KL(policy || reference) in nats (B,): the exact KL over the vocabulary, summed over a completion's positions.

    Its mean over the policy's completions is the sequence KL (chain rule); the log-ratio's varies much more.
    """
    real = tokens.completion_mask.bool()
    ours, theirs = (completion_hidden(decoder(model), tokens)[real] for model in (policy, reference))

    def chunk(ours: Tensor, theirs: Tensor) -> tuple[Tensor]:
        p, q = _log_softmax(policy, ours, temperature), _log_softmax(reference, theirs, temperature)
        return ((p.exp() * (p - q)).sum(-1),)

    (kl,) = _by_chunk(chunk, policy, real, ours, theirs)
    return kl.sum(1)


def next_logprobs(model: Model, rows: list[list[int]], choices: list[int]) -> Tensor:
    """Log-probs in nats of each of `choices` as the token after each row of ids: (B, len(choices))."""
    ids, mask = (tensor.to(next(model.parameters()).device) for tensor in padded(rows, "right"))
    # No mask is needed: the padding comes last, where causal attention never looks.
    states = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    last = states[torch.arange(len(rows), device=ids.device), mask.sum(1) - 1]
    return _log_softmax(model, last, 1.0)[:, choices]


def check_logprobs(model: Model) -> None:
    """Raise ValueError where a model changes its logits after the output head in a way this module does not know."""
    ids = list(range(3, 9))
    with torch.no_grad():
        ours = next_logprobs(model, [ids], ids)
        logits = model(input_ids=torch.tensor([ids], device=ours.device), use_cache=False).logits[:, -1].float()
    theirs = logits.log_softmax(-1)[:, ids]
    if not torch.allclose(ours, theirs, atol=0.05, rtol=0.01):  # a bf16 model rounds what it does to its logits
        raise ValueError(
            f"{type(model).__name__}: log-probs from hidden states differ from its own logits by "
            f"{(ours - theirs).abs().max():.3g} nats; it changes its logits in a way that is not supported"
        )


def _log_softmax(model: Model, hidden: Tensor, temperature: float) -> Tensor:
    """Log-probs of the whole vocabulary: (N, D) -> (N, V) in fp32."""
    head = model.get_output_embeddings()
    logits = head(hidden.to(head.weight.dtype)).float()
    config = model.config.get_text_config()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)  # Cohere
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)  # Granite
    if softcap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = softcap * torch.tanh(logits / softcap)
    return F.log_softmax(logits / temperature, dim=-1)


def _by_chunk(function: Callable[..., Any], model: Model, real: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The results of `function` on chunks of (N, ...) tensors, where `real` (B, C) is true: (B, C) each, 0 elsewhere.

    The fp32 logits of a chunk take at most LOGITS_CHUNK_GIB. Where there are several chunks, the backward pass
    recomputes their logits one by one instead of keeping them.
    """
    size = max(1, int(LOGITS_CHUNK_GIB * 2**30 / 4 / model.config.get_text_config().vocab_size))
    chunks = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
    run = function if len(chunks) == 1 else partial(checkpoint, function, use_reentrant=False)
    found = [torch.cat(parts) for parts in zip(*(run(*chunk) for chunk in chunks), strict=True)]
    return [each.new_zeros(real.shape).masked_scatter(real, each) for each in found]
