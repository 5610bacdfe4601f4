"""Every way to train but PPO, each thin over one of TRL's trainers. Only this folder knows TRL.

A method takes a model directory or hub id and a dataset in TRL's columns, writes the directory `out` and returns its
path. Options are the settings of its trainer's config in TRL (`SFTConfig`: `max_steps`, `learning_rate`, ...) and:

    lora           settings of a new adapter (`models.lora_config`); without it, all weights or the given adapter train
    load_in_4bit   whether the base is in 4 bits; by default as the given model was trained
    dtype          "bfloat16" (on a GPU the default) or "float32" for the base of an adapter; what trains is fp32
    attn_implementation   transformers' name of an attention kernel
    seed           of the order of the data, a new adapter, a score head and samples; 0 by default
    callbacks      transformers' callbacks in place of the one that shows progress

FileExistsError if `out` holds anything, ModelError if the model cannot be trained so, TypeError for an unknown option.
"""
# ruff: noqa: F401 (these imports are what this room offers)

from trl import DPOConfig, RewardConfig, SFTConfig

from rlhf_kit.train.common import history
from rlhf_kit.train.policies import dpo, grpo, kto, pretrain, rejection_sampling, rloo, sft, train_tokenizer
from rlhf_kit.train.reward import reward_model
