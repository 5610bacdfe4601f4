"""What a stage will need, in GiB by part, from a model's config alone, and which setting makes it fit.

Weights, gradients, optimizer and KV cache are exact, counted on torch's meta device. Activations and logits are
formulas: measured peaks come within 25% on a CPU, and none was measured on a GPU. Not counted: the loading, the CUDA
context, fragmentation.
"""

import os
from math import ceil
from typing import Any, NamedTuple, TypeAlias

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_kit import models
from rlhf_kit.models import Lora, ModelError, ModelPath
from rlhf_kit.models.logprobs import LOGITS_CHUNK_GIB

GIB = 2**30
Shape: TypeAlias = ModelPath | PreTrainedConfig
TRAINED = {"sft": ["policy"], "reward_model": ["reward"], "dpo": ["policy"], "ppo": ["policy", "value"]}  # roles
TRL_TILE = (4096, 32768)  # tokens and words of the vocabulary whose logits TRL's loss holds at once
SCORED_ROWS, SCORED_TOKENS = 64, 4096  # what rewards.RewardModel scores at once, at most
# For the CUDA context, the workspaces of cuBLAS and the gaps between blocks: an allowance, not a measurement.
RESERVE_GIB, RESERVE_SHARE = 0.75, 0.05


class Estimate(NamedTuple):
    """GiB of a stage by phase and part (weights or adapter of a role); the phase of the peak, its parts, their sum."""

    phases: dict[str, dict[str, float]]
    peak_phase: str
    parts: dict[str, float]
    peak: float
    frozen: str  # the dtype of weights that do not train and are not quantised

    def table(self) -> str:
        """Parts in rows, phases in columns, GiB; the largest total is the peak."""
        rows = {part: [phase[part] for phase in self.phases.values()] for part in self.parts}
        rows["total"] = [sum(phase.values()) for phase in self.phases.values()]
        lines = [f"{part:<18}" + "".join(f"{x:12.2f}" for x in row) for part, row in rows.items() if any(row)]
        return "\n".join([f"{'GiB':<18}" + "".join(f"{name:>12}" for name in self.phases), *lines])


def _model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The causal LM of a config on the meta device; ModelError where transformers builds none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"model type {config.model_type!r}: transformers has no causal LM of this config") from error


def _weights(model: Any, four_bit: bool | None = False, head: bool = True) -> tuple[int, list[Any], list[int]]:
    """Count a causal LM, with its output head or without; in 4 bits its other linear layers are quantised.

    Returns bytes as stored, (parameters, whether it is an embedding) of each tensor, parameters of each linear layer.
    """
    stored, tensors, linears, output = 0, {}, [], model.get_output_embeddings()
    for module in (model if head else models.decoder(model)).modules():
        linear = isinstance(module, nn.Linear | Conv1D) and module is not output
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in tensors:  # tied, and counted before
                continue
            n, is_weight = tensor.numel(), linear and name == "weight"
            if is_weight and four_bit:
                # NF4, quantised twice (QLoRA, 2305.14314, section 3): half a byte a weight, a byte for each block of
                # 64, four for each 256 of those, the mean of the blocks' scales and two code books.
                stored += ceil(n / 2) + ceil(n / 64) + 4 * ceil(n / 64 / 256) + 4 + 4 * 16 + 4 * 256
            else:
                stored += n * tensor.element_size()
            linears += [n] * is_weight
            if isinstance(tensor, nn.Parameter):
                tensors[id(tensor)] = n, isinstance(module, nn.Embedding)
    return stored, list(tensors.values()), linears


def _adam(n: int, is_embedding: bool, optim: str) -> int:
    """Bytes of AdamW's state of n parameters: two moments, in fp32 with a step count or in 8 bits with their scales."""
    if "8bit" not in optim:
        return 8 * n + 4
    # transformers keeps embeddings out of the 8-bit optimizers, bitsandbytes tensors of less than 4096 numbers.
    return 8 * n if is_embedding or n < 4096 else 2 * (n + 4 * ceil(n / 256) + 4 * 256)


def _activations(config: PreTrainedConfig, rank: int, compute: int, stored: int, autocast: bool) -> tuple[int, ...]:
    """Bytes a token: kept in a layer, kept of a recomputed one, added by a layer's backward, made in scoring, cached.

    compute, stored: bytes of a number in linear layers and in frozen weights. With d, q, k, f the widths of hidden
    states, all query heads, all key heads and a gated MLP (times the experts that see a token), autograd keeps queries,
    keys, values and attention's result (2q + 2k), the gate, its activation and the other factor (3f), the inputs of
    linear layers (2d + f) and, in fp32, of norms (2d); full training also these normalised (2d), LoRA A(x) of seven
    linear layers. Scoring holds four hidden states and the larger of MLP and attention.
    """
    d, f = _number(config, 0, "hidden_size"), _number(config, 1, "num_experts_per_tok")
    f *= _number(config, 4 * d, "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    heads = _number(config, 0, "num_attention_heads")
    q, k = (n * _number(config, d // heads, "head_dim") for n in (heads, _number(config, heads, "num_key_value_heads")))
    inputs = compute * (2 * d + f)
    if rank and compute == 2:  # frozen layers keep none; each adapter keeps a copy in fp32, which autocast rounds again
        inputs = (2 if autocast else 4) * (5 * d + q + f)
    kept = compute * (2 * q + 2 * k + 3 * f) + inputs + 4 * 2 * d + 4 * (7 * rank if rank else 2 * d)
    mlp = (4 if rank else 3) * f
    return kept, stored * d, compute * mlp, compute * (4 * d + max(mlp, 4 * q + 2 * k)), 2 * k * stored


def _number(config: PreTrainedConfig, default: int, *names: str) -> int:
    """The first of these that a config has; ModelError where it has none and there is no default."""
    numbers = [getattr(config.get_text_config(), name, None) for name in names]
    found = next((number for number in numbers if isinstance(number, int)), default)
    if not found:
        raise ModelError(f"model type {config.model_type!r}: its config has no {names[0]}; only transformers are known")
    return found


def estimate(
    model: Shape,
    stage: str,
    *,
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    dtype: str | None = None,
    prompt_length: int = 512,
    max_completion_length: int = 512,
    rollout: int = 8,
    micro_batch_size: int = 1,
    activation_checkpointing: bool = True,
    optim: str = "adamw_torch_fused",
    reward_model: Shape | None = None,
    ensemble: int = 1,
    on_gpu: bool | None = None,
) -> Estimate:
    """GiB that `stage` ("sft", "reward_model", "dpo" or "ppo") will need on one device, before anything is loaded.

    model: a directory, a hub id or a transformers config; lora: train adapters (None: all weights, or the adapter that
    `model` is); load_in_4bit, dtype: as of `models.load_causal`; rollout: completions that PPO generates at once;
    micro_batch_size: rows or pairs in one forward pass; reward_model: what reward models stand on, if not the policy's
    base; ensemble: how many there are (0: a function). Lengths are tokens. ValueError on settings that make no stage,
    ModelError where there is no such model.
    """
    if stage not in TRAINED or "adam" not in optim:
        known = f"a stage of {', '.join(TRAINED)}; AdamW in fp32 (adamw_torch_fused) or 8 bits (paged_adamw_8bit)"
        raise ValueError(f"stage={stage!r}, optim={optim!r}: choose {known}")
    if min(prompt_length, max_completion_length, rollout, micro_batch_size) < 1 or ensemble < 0:
        raise ValueError("prompt_length, max_completion_length, rollout and micro_batch_size must be at least 1")
    shapes = (model, model if reward_model is None else reward_model)
    config, scorer = (each if isinstance(each, PreTrainedConfig) else models.load_config(each) for each in shapes)
    settings, notes = models.lora_config(lora), {}
    if not isinstance(model, PreTrainedConfig):
        models.check_trainable(model, settings, load_in_4bit=load_in_4bit, dtype=dtype)
        if models.is_adapter(model):
            settings = PeftConfig.from_pretrained(str(model))
            settings.inference_mode = False  # it was saved frozen
        load_in_4bit, notes = models.is_4bit(model, load_in_4bit), models.read_notes(model)
    if load_in_4bit and settings is None:
        raise ModelError('4-bit weights cannot be trained; pass `lora={"r": 16}` to train an adapter')
    length = prompt_length + max_completion_length
    text, width = config.get_text_config(), _number(config, 0, "hidden_size")
    layers = _number(config, 0, "num_hidden_layers")
    if (limit := getattr(text, "max_position_embeddings", None)) is not None and length > limit:
        raise ValueError(f"prompt_length + max_completion_length = {length} exceeds the model's {limit} positions")
    on_gpu = models.device().type == "cuda" if on_gpu is None else on_gpu
    frozen = torch.float32 if settings is None else models.loading.frozen_dtype(dtype, notes, on_gpu)

    # What each role holds in bytes, and the tensors that are trained.
    base, _, linears = _weights(_model(config, frozen), load_in_4bit, head=stage != "reward_model")
    if settings is None:
        adapter, held, trained = 0, {}, []
        for role in TRAINED[stage]:
            held[role], tensors, _ = _weights(_model(config), head=role == "policy")
            trained += tensors
    else:
        adapted = get_peft_model(_model(config), settings, low_cpu_mem_usage=True)
        tensors = [(parameter.numel(), False) for parameter in adapted.parameters() if parameter.requires_grad]
        adapter = 4 * sum(n for n, _ in tensors)
        held = {"base": base, **dict.fromkeys(TRAINED[stage], adapter)}
        trained = tensors * len(TRAINED[stage])
    if stage in ("dpo", "ppo"):
        held["reference"] = base if settings is None else adapter
    if stage == "ppo":
        shared = reward_model is None and settings is not None
        own = 0 if shared else _weights(_model(scorer, frozen), load_in_4bit, head=False)[0]
        held["reward models"] = ensemble * (own + adapter)
        held["heads"] = 4 * (width + 1) + ensemble * 4 * _number(scorer, 0, "hidden_size")
        trained += [(width, False), (1, False)]
    elif stage == "reward_model":
        held["heads"] = 4 * width + 4 * width * (settings is not None)  # peft trains a copy
        trained += [(width, False)]
    optimizer, gradients = sum(_adam(n, embedding, optim) for n, embedding in trained), 4 * sum(n for n, _ in trained)

    # What one forward and backward pass makes.
    autocast = on_gpu and stage != "ppo"  # TRL computes in bf16 there
    stored = 4 if settings is None else frozen.itemsize
    compute = 2 if autocast else stored
    rank = settings.r if settings else 0
    kept, checkpoint, backward, scoring, cached = _activations(config, rank, compute, stored, autocast)
    rows = min(micro_batch_size, rollout) if stage == "ppo" else micro_batch_size * (1 if stage == "sft" else 2)
    tokens = rows * length
    logits = 0
    if stage == "ppo":  # of a chunk: log-probs, their gradient, the logits' gradient
        logits = 3 * min(4 * rows * max_completion_length * text.vocab_size, int(LOGITS_CHUNK_GIB * GIB))
    elif stage != "reward_model" and on_gpu:
        logits = 2 * min(rows * max_completion_length, TRL_TILE[0]) * TRL_TILE[1]
    elif stage != "reward_model":  # on a CPU TRL takes prompts' tokens too, and works on seven fp32 copies of a tile
        logits = 4 * min(tokens - rows, TRL_TILE[0]) * (TRL_TILE[1] + 7 * min(text.vocab_size, TRL_TILE[1]))
    one_layer = tokens * (kept + backward)
    all_layers = tokens * (layers * (checkpoint if activation_checkpointing else kept) + 4 * 4 * width)
    if autocast and stored == 4:  # autograd keeps the weights in bf16 with the activations
        all_layers += 2 * sum(linears) // (layers if rank and activation_checkpointing else 1)
    at_work = one_layer if activation_checkpointing else tokens * backward
    accumulated = gradients // (1 if rollout > rows else 2) if stage == "ppo" else 0  # of earlier rows, or the policy's

    def phase(**made: int) -> dict[str, float]:
        parts = {"optimizer": optimizer, "gradients": 0, "KV cache": 0, "activations": 0, "logits": 0}
        parts["dequantisation"] = 2 * compute * max(linears) if load_in_4bit else 0  # a layer's weights, and transposed
        return {part: size / GIB for part, size in {**held, **parts, **made}.items()}

    phases = {}
    scored = scoring * length * min(SCORED_ROWS, max(1, SCORED_TOKENS // length))
    if stage == "ppo":
        token = cached * layers * rollout  # of all rows' KV cache, which is copied layer by layer as it grows
        prefill, sampled = rollout * prompt_length * scoring, 3 * 4 * rollout * text.vocab_size
        phases["prefill"] = phase(**{"KV cache": prompt_length * token}, activations=prefill)
        phases["generate"] = phase(**{"KV cache": length * token}, activations=length * token // layers, logits=sampled)
        scored = min(scored, scoring * length * rollout) if ensemble else 0
        phases["score"] = phase(activations=max(tokens * scoring + logits, scored))
    phases["forward"] = phase(gradients=accumulated, activations=all_layers + max(0, at_work - logits), logits=logits)
    phases["backward"] = phase(gradients=gradients, activations=one_layer)
    if stage == "reward_model":  # loaded again, it scores the dataset to be normalised
        phases["score"] = phase(optimizer=0, activations=scored)
    peak = max(phases, key=lambda name: sum(phases[name].values()))
    return Estimate(phases, peak, phases[peak], sum(phases[peak].values()), str(frozen).removeprefix("torch."))


def advise(model: Shape, stage: str, gib: float, **settings: Any) -> tuple[bool, Estimate, str]:
    """Whether `estimate(model, stage, **settings)` fits a device of `gib` GiB, the estimate, and the verdict in words.

    Where it does not fit the words name what each change gives, and first the first that is enough.
    """
    if gib <= 0:
        raise ValueError(f"a GPU of {gib} GiB: give its memory, for example 12")
    needed, room = estimate(model, stage, **settings), gib * (1 - RESERVE_SHARE) - RESERVE_GIB
    peak = f"{needed.peak:.1f} GiB at the peak ({needed.peak_phase}; what is frozen in {needed.frozen})"
    left = f"the {room:.1f} GiB that {gib:g} GiB leave for tensors"
    if needed.peak <= room:
        return True, needed, f"It fits: {peak}, within {left}."
    changes = _changes(model, stage, settings)
    tried = {name: estimate(model, stage, **{**settings, **change}) for name, change in changes.items()}
    tried = {name: changed for name, changed in tried.items() if changed.peak < needed.peak}
    if len(tried) > 1:
        together = {name: value for change in tried for name, value in changes[change].items()}
        tried["all of these"] = estimate(model, stage, **{**settings, **together})
    enough = [name for name, changed in tried.items() if changed.peak <= room]
    first = f"Change first: {enough[0]}" if enough else "No setting helps; take a smaller model or a larger GPU."
    rows = [f"  {each.peak:6.1f} GiB {'fits' if name in enough else '    '}  {name}" for name, each in tried.items()]
    return False, needed, "\n".join([f"It does not fit: {peak}, above {left}.", first, *rows])


def _changes(model: Shape, stage: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings that may need less memory, by what a person would write; those that cost nothing come first."""
    ppo, lora = stage == "ppo", models.lora_config(settings.get("lora"))
    adapter = not isinstance(model, PreTrainedConfig) and models.is_adapter(model)
    rank = 16 if lora is None else max(1, lora.r // 2)
    smaller = {} if adapter else {"lora": {"r": rank}}
    added = "" if adapter or lora is not None else 'lora={"r": 16}, '
    rollout = max(1, settings.get("rollout", 8) // 2)
    half = max(1, settings.get("max_completion_length", 512) // 2)
    shorter = f"max_completion_length={half}" if ppo else f"max_length={settings.get('prompt_length', 512) + half}"
    return {
        "activation_checkpointing=True": {"activation_checkpointing": True},
        f"{'micro' if ppo else 'per_device_train'}_batch_size=1": {"micro_batch_size": 1},
        'optim="paged_adamw_8bit"': {"optim": "paged_adamw_8bit"},
        "a reward model that is an adapter over the policy's base": {"reward_model": None},
        f'lora={{"r": {rank}}}': smaller,
        f"{added}load_in_4bit=True": {**(smaller if added else {}), "load_in_4bit": True},
        f"per_device_train_batch_size={rollout}": {"rollout": rollout} if ppo else {},
        shorter: {"max_completion_length": half},
        "one reward model instead of an ensemble": {"ensemble": 1},
    }


def device_memory() -> float:
    """GiB of the GPU or, where there is none, of the machine's RAM."""
    if models.device().type == "cuda":
        return torch.cuda.get_device_properties(models.device()).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
