"""Models as directories: load and save them, generate, take log-probs, and cast them in PPO's roles."""

from rlhf_kit.models.generation import (
    Prompt,
    decode_completions,
    encode_pairs,
    encode_prompts,
    finished,
    generate,
    stop_ids,
)
from rlhf_kit.models.loading import (
    Model,
    ModelError,
    ModelPath,
    base_of,
    decoder,
    device,
    hidden_size,
    is_adapter,
    load_backbone,
    load_base,
    load_causal,
    load_tokenizer,
    lora,
    max_length,
    read_notes,
    read_score_head,
    same_base,
    write_notes,
)
from rlhf_kit.models.logprobs import Tokens, completion_hidden, completion_kl, completion_logprobs, completion_mask
from rlhf_kit.models.roles import Roles, load_roles

__all__ = [name for name in dir() if not name.startswith("_")]
