"""Models as directories: load and save, render and generate, take log-probs, and the roles of PPO over one base."""
# ruff: noqa: F401 (these imports are what this room offers)

from rlhf_kit.models.generation import check_positions, finished, generate, stop_ids
from rlhf_kit.models.loading import (
    LOADING,
    MAX_COMPLETION_LENGTH,
    Lora,
    Model,
    ModelError,
    ModelPath,
    check_one_device,
    check_trainable,
    decoder,
    device,
    is_4bit,
    is_adapter,
    load_backbone,
    load_base,
    load_causal,
    load_config,
    load_tokenizer,
    lora_config,
    max_length,
    read_notes,
    read_score_head,
    same_base,
    stored_as,
    write_notes,
)
from rlhf_kit.models.logprobs import Tokens, completion_kl, completion_logprobs, completion_mask, next_logprobs, padded
from rlhf_kit.models.rendering import (
    Prompt,
    RenderError,
    SharedToken,
    as_completion,
    decode_completions,
    encode,
    encode_pairs,
    plain,
    split,
    without_bos,
)
from rlhf_kit.models.roles import Roles, load_roles, switch_off_dropout
