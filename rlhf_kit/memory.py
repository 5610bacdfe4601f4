"""What a stage will need, in GiB by part, from a model's config alone; which setting makes it fit; what a block took.

Weights, gradients, optimizer and KV cache are exact: the model is built on torch's meta device, where tensors have a
shape and no data, and is counted. Activations and logits are formulas (`_Activations`, `_logits`). They hold on a CPU
within 25%; on a GPU nothing has been measured yet, and the CUDA context and fragmentation come on top.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_kit import models
from rlhf_kit.models import Lora, ModelError, ModelPath
from rlhf_kit.models.logprobs import LOGITS_CHUNK_GIB

GIB = 2**30
STAGES = ("sft", "reward_model", "dpo", "ppo")
Shape: TypeAlias = ModelPath | PreTrainedConfig
# TRL's loss holds the logits of so many tokens and words of the vocabulary at once.
TRL_TOKENS, TRL_WORDS = 4096, 32768
# `rewards.RewardModel` scores so many rows and tokens at once, at most.
SCORED_ROWS, SCORED_TOKENS = 64, 4096
# On a GPU the CUDA context, the workspaces of cuBLAS and the gaps between blocks take memory that no tensor has: an
# allowance, not a measurement.
RESERVE_GIB, RESERVE_SHARE = 0.75, 0.05


@dataclass(frozen=True)
class Estimate:
    """GiB of a stage: in each phase by part, a row per part and role."""

    stage: str
    trained_parameters: int
    phases: dict[str, dict[str, float]]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """GiB by part at the peak; they add up to `peak`."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> float:
        """GiB at the peak."""
        return sum(self.parts.values())

    def table(self) -> str:
        """Parts in rows, phases in columns, GiB; the largest total is the peak."""
        columns = list(self.phases.values())
        rows = [(part, [column[part] for column in columns]) for part in columns[0]]
        rows = [(part, cells) for part, cells in rows if any(cells)]
        rows.append(("total", [sum(column.values()) for column in columns]))
        lines = [f"{'GiB':<18}" + "".join(f"{name:>12}" for name in self.phases)]
        return "\n".join(
            [*lines, *(f"{part:<18}" + "".join(f"{cell:12.2f}" for cell in cells) for part, cells in rows)]
        )


@dataclass(frozen=True)
class Knob:
    """One setting changed: how to write it, and what the stage needs then."""

    setting: str
    estimate: Estimate
    fits: bool


@dataclass(frozen=True)
class Advice:
    """Whether an estimate fits `gib` GiB and, where it does not, what each knob alone would do (the last: all)."""

    gib: float
    estimate: Estimate
    fits: bool
    knobs: list[Knob]

    @property
    def knob(self) -> str | None:
        """The first setting that makes it fit; None where nothing has to change, or nothing helps."""
        return None if self.fits else next((knob.setting for knob in self.knobs if knob.fits), None)

    def sentence(self) -> str:
        """The verdict in words and, where it does not fit, a line for each knob."""
        peak = f"{self.estimate.peak:.1f} GiB at the peak ({self.estimate.peak_phase})"
        left = f"the {_room(self.gib):.1f} GiB that {self.gib:g} GiB leave for tensors"
        if self.fits:
            return f"It fits: {peak}, within {left}."
        first = f"Turn first: {self.knob}" if self.knob else "No knob suffices; take a smaller model or a larger GPU."
        lines = [
            f"  {knob.estimate.peak:6.1f} GiB {'fits' if knob.fits else '    '}  {knob.setting}" for knob in self.knobs
        ]
        return "\n".join([f"It does not fit: {peak}, above {left}.", first, *lines])


@dataclass(frozen=True)
class _Weights:
    """A causal LM's bytes as stored, with and without an output head of its own, and its tensors' sizes.

    tensors: (name, parameters, is an embedding) of the causal LM, the output head's own named "head"; adapter: the
    parameters of each tensor that one LoRA adapter trains; linears, largest: parameters of all linear layers but the
    head, and of the largest.
    """

    base: int
    backbone: int
    tensors: list[tuple[str, int, bool]]
    adapter: list[int]
    linears: int
    largest: int
    tied: bool


def _weights(config: PreTrainedConfig, lora: LoraConfig | None, load_in_4bit: bool, dtype: torch.dtype) -> _Weights:
    """Build the model on the meta device and count it."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        head, inside = model.get_output_embeddings(), {id(p) for p in models.decoder(model).parameters()}
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"model type {config.model_type!r}: transformers builds no causal LM from this config"
        ) from error
    total, own_head, linears, tensors = 0, 0, [], {}
    for module in model.modules():
        linear = isinstance(module, nn.Linear | Conv1D) and module is not head
        if linear:
            linears.append(module.weight.numel())
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in tensors:  # tied
                continue
            n, is_parameter = tensor.numel(), isinstance(tensor, nn.Parameter)
            size = _nf4(n) if load_in_4bit and linear and name == "weight" else n * tensor.element_size()
            total += size
            is_head = is_parameter and id(tensor) not in inside
            own_head += size * is_head
            if is_parameter:
                tensors[id(tensor)] = ("head" if is_head else name, n, isinstance(module, nn.Embedding))
    adapter = []
    if lora is not None:
        with torch.device("meta"):
            adapted = get_peft_model(model, models.lora_config(lora))
        adapter = [p.numel() for p in adapted.parameters() if p.requires_grad]
    tied = not own_head
    return _Weights(total, total - own_head, list(tensors.values()), adapter, sum(linears), max(linears), tied)


def _nf4(n: int) -> int:
    """Bytes of n weights in NF4 with double quantisation (QLoRA, 2305.14314), as bitsandbytes stores them.

    Half a byte a weight, a byte a block of 64, four a block of 256 of those, the mean of the scales and two code books.
    """
    blocks = ceil(n / 64)
    return ceil(n / 2) + blocks + 4 * ceil(blocks / 256) + 4 + 4 * 16 + 4 * 256


def _adam(n: int, is_embedding: bool, optim: str) -> int:
    """Bytes of AdamW's state of a tensor with n parameters: two moments, in fp32 or in 8 bits with their scales."""
    if "8bit" not in optim:
        return 8 * n + 4  # torch also keeps a step count
    # transformers keeps embeddings out of the 8-bit optimizers, bitsandbytes tensors of less than 4096 numbers.
    return 8 * n if is_embedding or n < 4096 else 2 * (n + 4 * ceil(n / 256) + 4 * 256)


@dataclass(frozen=True)
class _Activations:
    """Bytes a token that a model makes.

    kept: by autograd, in each layer; checkpoint: in each layer whose activations are recomputed; working: what the
    backward pass of one layer adds to `kept`; scoring: at most at once in a forward pass without gradients; ends: of
    the hidden states that leave the last layer.
    """

    kept: int
    checkpoint: int
    working: int
    scoring: int
    ends: int


def _activations(config: PreTrainedConfig, rank: int, compute: int, stored: int, autocast: bool) -> _Activations:
    """The formula, for layers of attention and a gated MLP.

    With d the width, q and k those of all query and all key heads, f the MLP's (times the experts of a token), autograd
    keeps in a layer: queries, keys, values and attention's result (2q + 2k); gate, its activation and the other factor
    (3f); the inputs of linear layers (2d + f); the inputs of norms in fp32 (2d). Full training keeps these normalised
    too (2d); LoRA keeps A(x) of seven linear layers. compute, stored: bytes of a number in linear layers, in weights.
    """
    d, q, k, f = _widths(config)
    kept = compute * (2 * q + 2 * k + 3 * f) + 4 * 2 * d
    if rank and compute == 2:
        # Frozen layers keep no input; the adapters in fp32 take a copy each (under autocast rounded again).
        kept += (2 if autocast else 4) * (5 * d + q + f)
    else:
        kept += compute * (2 * d + f)
    kept += 4 * 7 * rank if rank else 4 * 2 * d
    mlp = (4 if rank else 3) * f
    return _Activations(kept, stored * d, compute * mlp, compute * (4 * d + max(mlp, 4 * q + 2 * k)), 4 * 4 * d)


def _widths(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """d, q, k, f of `_activations`; ModelError where a config does not say them."""
    text = config.get_text_config()
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"):
        if not isinstance(getattr(text, name, None), int):
            raise ModelError(
                f"model type {config.model_type!r}: its config has no number {name}; estimates are for transformers"
            )
    d, heads = text.hidden_size, text.num_attention_heads
    kv_heads, head = getattr(text, "num_key_value_heads", None), getattr(text, "head_dim", None) or d // heads
    named = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    f = next((value for name in named if isinstance(value := getattr(text, name, None), int)), 4 * d)
    experts = getattr(text, "num_experts_per_tok", None) or 1
    return d, heads * head, (kv_heads if isinstance(kv_heads, int) else heads) * head, f * experts


def _kv_cache(config: PreTrainedConfig, rows: int, tokens: int, size: int) -> int:
    """Bytes of keys and values: key heads x head size x tokens x 2 in each layer, up to the window where it slides."""
    text, (_, _, k, _) = config.get_text_config(), _widths(config)
    window = getattr(text, "sliding_window", None)
    kinds = (
        getattr(text, "layer_types", None) or [f"{'sliding' if window else 'full'}_attention"] * text.num_hidden_layers
    )
    held = sum(min(tokens, window) if window and kind == "sliding_attention" else tokens for kind in kinds)
    return 2 * rows * k * held * size


def _logits(config: PreTrainedConfig, stage: str, rows: int, prompt: int, completion: int, on_gpu: bool) -> int:
    """Bytes of the logits in a loss, which takes them chunk by chunk."""
    words = config.get_text_config().vocab_size
    if stage == "reward_model":
        return 0
    if stage == "ppo":  # three copies: log-probs, their gradient and that of the logits
        return 3 * min(4 * rows * completion * words, int(LOGITS_CHUNK_GIB * GIB))
    if on_gpu:
        return 2 * min(rows * completion, TRL_TOKENS) * TRL_WORDS
    # On a CPU TRL takes the prompts' tokens too, and works on seven fp32 copies of a tile.
    return 4 * min(rows * (prompt + completion - 1), TRL_TOKENS) * (TRL_WORDS + 7 * min(words, TRL_WORDS))


def estimate(
    model: Shape,
    stage: str,
    *,
    lora: Lora | None = None,
    load_in_4bit: bool | None = None,
    dtype: str = "float32",
    prompt_length: int = 512,
    max_completion_length: int = 512,
    rollout: int = 8,
    micro_batch_size: int = 1,
    gradient_checkpointing: bool = True,
    optim: str = "adamw_torch_fused",
    reward_model: Shape | None = None,
    ensemble: int = 1,
    on_gpu: bool | None = None,
) -> Estimate:
    """GiB that `stage` ("sft", "reward_model", "dpo" or "ppo") will need on one device, before anything is loaded.

    model: a directory, a hub id or a transformers config; lora: train adapters (None: all weights, or the adapter that
    `model` is); load_in_4bit: None means as the directory remembers; dtype: of frozen weights that are not in 4 bits
    (what trains is fp32); prompt_length, max_completion_length: tokens; rollout: completions that PPO generates at
    once; micro_batch_size: rows (of preferences: pairs) in one forward pass; reward_model: the reward models stand on
    this model, not on the policy's base; ensemble: how many of them (0: the reward is a function).
    Raises ValueError on settings that make no stage, ModelError where there is no such model.
    """
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r}: choose one of {', '.join(STAGES)}")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: choose float32 or bfloat16")
    if "adam" not in optim:
        raise ValueError(f"optim={optim!r}: the memory of AdamW is known, in fp32 (adamw_torch_fused) or 8 bits")
    sizes = (prompt_length, max_completion_length, rollout, micro_batch_size, ensemble + 1)
    names = ("prompt_length", "max_completion_length", "rollout", "micro_batch_size", "ensemble")
    for name, size in zip(names, sizes, strict=True):
        if size < 1:
            raise ValueError(f"{name} is too small; it must be at least {int(name != 'ensemble')}")
    settings = models.lora_config(lora)
    if not isinstance(model, PreTrainedConfig):
        if models.is_adapter(model):
            if lora is not None:
                raise ModelError(f"{model}: is an adapter already, and is trained on as it is; leave `lora` out")
            settings = PeftConfig.from_pretrained(str(model))
        load_in_4bit = models.is_4bit(model, load_in_4bit)
    if load_in_4bit and settings is None:
        raise ModelError('4-bit weights cannot be trained; pass `lora={"r": 16}` to train an adapter')
    config, length = _config(model), prompt_length + max_completion_length
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ValueError(
            f"prompt_length={prompt_length} and max_completion_length={max_completion_length} exceed the model's "
            f"{limit} positions; shorten the prompts or the completions"
        )
    on_gpu = models.device().type == "cuda" if on_gpu is None else on_gpu
    four, bf16, fp32 = bool(load_in_4bit), torch.bfloat16, torch.float32
    frozen = bf16 if (on_gpu if four else dtype == "bfloat16") else fp32

    # Weights: by role, and what of them trains.
    d = _widths(config)[0]
    base = _weights(config, settings, four, frozen)
    own = None if reward_model is None or _same(model, reward_model) else _config(reward_model)
    rewards = base if own is None else _weights(own, settings, four, frozen)
    held: dict[str, int] = {}
    trained: list[tuple[int, bool]] = []
    trains = {"sft": ["policy"], "reward_model": ["reward"], "dpo": ["policy"], "ppo": ["policy", "value"]}[stage]
    frozen_roles = ["reference"] if stage in ("dpo", "ppo") else []
    if settings is None:
        full = _weights(config, None, False, fp32)
        for role in trains:
            held[f"{role} weights"] = full.base if role == "policy" else full.backbone
            trained += [(n, e) for name, n, e in full.tensors if role == "policy" or name != "head"]
        held |= {f"{role} weights": base.base for role in frozen_roles}
    else:
        held["base"] = base.backbone if stage == "reward_model" else base.base
        held |= {f"{role} adapter": 4 * sum(base.adapter) for role in (*trains, *frozen_roles)}
        trained += [(n, False) for _ in trains for n in base.adapter]
    if stage == "ppo":
        if settings is None or own is not None:
            held["reward models"] = ensemble * (rewards.backbone + 4 * sum(rewards.adapter))
        else:
            held["reward adapters"] = ensemble * 4 * sum(base.adapter)
        held["heads"] = 4 * (d + 1) + ensemble * 4 * (d if own is None else _widths(own)[0])
        trained += [(d, False), (1, False)]
    elif stage == "reward_model":
        held["heads"] = 4 * d + (0 if settings is None else frozen.itemsize * d)  # peft trains a copy
        trained.append((d, False))

    # Activations and logits of one forward and backward pass.
    autocast = on_gpu and stage != "ppo"  # TRL computes in bf16 there
    stored = fp32.itemsize if settings is None else frozen.itemsize
    compute = 2 if autocast else stored
    made = _activations(config, 0 if settings is None else settings.r, compute, stored, autocast)
    layers = config.get_text_config().num_hidden_layers
    rows = min(micro_batch_size, rollout) if stage == "ppo" else micro_batch_size * (1 if stage == "sft" else 2)
    tokens = rows * length
    logits = _logits(config, stage, rows, prompt_length, max_completion_length, on_gpu)
    one_layer = tokens * (made.kept + made.working)
    at_work = one_layer if gradient_checkpointing else tokens * made.working
    stack = tokens * (layers * (made.checkpoint if gradient_checkpointing else made.kept) + made.ends)
    if autocast and stored == 4:  # autograd keeps a bf16 copy of the weights that it computes with
        stack += 2 * base.linears // (layers if settings is not None and gradient_checkpointing else 1)
    gradients = 4 * sum(n for n, _ in trained)
    first = 0  # gradients that are there before the first layer's: an earlier micro-batch's, the policy's, the head's
    head = next((n for name, n, e in base.tensors if name == "head" or (base.tied and e)), 0)
    if stage == "ppo":
        first = gradients if rollout > rows else gradients // 2
    elif settings is None and stage != "reward_model":
        first = 4 * head
    tied = 2 * 4 * head if settings is None and base.tied and stage != "reward_model" else 0

    def phase(**more: int) -> dict[str, float]:
        state = {"optimizer": sum(_adam(n, e, optim) for n, e in trained), "gradients": 0, "KV cache": 0}
        state |= {"activations": 0, "logits": 0, "dequantisation": 2 * compute * base.largest if four else 0}
        return {part: size / GIB for part, size in {**held, **state, **more}.items()}

    phases: dict[str, dict[str, float]] = {}
    scored = min(SCORED_ROWS, max(1, SCORED_TOKENS // length))
    if stage == "ppo":
        caches = [_kv_cache(config, rollout, n, stored) for n in (prompt_length, length)]
        sampled = 3 * 4 * rollout * config.get_text_config().vocab_size
        prefill = rollout * prompt_length * made.scoring
        phases["prefill"] = phase(**{"KV cache": caches[0]}, activations=prefill)
        phases["generate"] = phase(**{"KV cache": caches[1]}, activations=caches[1] // layers, logits=sampled)
        scoring = tokens * made.scoring + logits, min(scored, rollout) * length * made.scoring * (ensemble > 0)
        phases["score"] = phase(activations=max(scoring))
    phases["forward"] = phase(gradients=first, activations=stack + max(0, at_work - logits), logits=logits)
    phases["backward"] = phase(gradients=gradients, activations=one_layer + tied)
    if stage == "reward_model":  # loaded again, it scores the dataset to be normalised
        phases["score"] = phase(activations=scored * length * made.scoring, optimizer=0)
    return Estimate(stage, sum(n for n, _ in trained), phases)


def _config(model: Shape) -> PreTrainedConfig:
    return model if isinstance(model, PreTrainedConfig) else models.load_config(model)


def _same(model: Shape, other: Shape) -> bool:
    """Whether two models stand on one base, which is then held once."""
    if isinstance(model, PreTrainedConfig) or isinstance(other, PreTrainedConfig):
        return model is other
    return models.same_base(model, other)


def _room(gib: float) -> float:
    """GiB that tensors can have of a GPU with `gib`."""
    return gib * (1 - RESERVE_SHARE) - RESERVE_GIB


def advise(model: Shape, stage: str, gib: float, **settings: Any) -> Advice:
    """Hold `estimate(model, stage, **settings)` against a device of `gib` GiB; knobs that cost nothing come first."""
    if gib <= 0:
        raise ValueError(f"a GPU of {gib} GiB: give its memory, for example 12")
    needed = estimate(model, stage, **settings)
    if needed.peak <= _room(gib):
        return Advice(gib, needed, True, [])
    known = {name: value for name, value in settings.items() if value is not None}
    if not isinstance(model, PreTrainedConfig) and models.is_adapter(model):
        known = {"lora": {}, "load_in_4bit": models.is_4bit(model, None), **known}
    changes = list(_changes(stage, known))
    if len(changes) > 1:
        changes.append(("all of these", {name: value for _, change in changes for name, value in change.items()}))
    knobs = []
    for setting, change in changes:
        changed = estimate(model, stage, **{**settings, **change})
        knobs.append(Knob(setting, changed, changed.peak <= _room(gib)))
    return Advice(gib, needed, False, knobs)


def _changes(stage: str, settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(how it is written, what it changes) of every knob not turned yet: first those that change no result."""
    ppo, lora = stage == "ppo", settings.get("lora")
    if not settings.get("gradient_checkpointing", True):
        yield "gradient_checkpointing=True", {"gradient_checkpointing": True}
    if settings.get("micro_batch_size", 1) > 1:
        name = "micro_batch_size" if ppo else "per_device_train_batch_size"
        yield f"{name}=1", {"micro_batch_size": 1}
    if "8bit" not in settings.get("optim", ""):
        yield 'optim="paged_adamw_8bit"', {"optim": "paged_adamw_8bit"}
    if ppo and settings.get("reward_model") is not None and lora is not None:
        yield "a reward model that is an adapter over the policy's base", {"reward_model": None}
    if lora is None:
        yield 'lora={"r": 16}', {"lora": {"r": 16}}
    if not settings.get("load_in_4bit"):
        way = {"load_in_4bit": True} if lora is not None else {"lora": {"r": 16}, "load_in_4bit": True}
        yield ", ".join(f"{name}={json.dumps(value) if name == 'lora' else value}" for name, value in way.items()), way
    smaller = models.lora_config(lora)
    if lora and smaller is not None and smaller.r > 1:
        smaller.r //= 2
        yield f'lora={{"r": {smaller.r}}}', {"lora": smaller}
    if ppo and (rollout := settings.get("rollout", 8)) > 1:
        yield f"per_device_train_batch_size={rollout // 2}", {"rollout": rollout // 2}
    if (half := settings.get("max_completion_length", 512) // 2) > 0:
        value = f"max_completion_length={half}" if ppo else f"max_length={settings.get('prompt_length', 512) + half}"
        yield value, {"max_completion_length": half}
    if settings.get("ensemble", 1) > 1:
        yield "one reward model instead of an ensemble", {"ensemble": 1}


@dataclass
class Measured:
    """Peak of a block in GiB, known when it ends: on a GPU of all that torch held, on a CPU of what the block added."""

    gib: float = float("nan")


def device_memory(device: torch.device | str | None = None) -> float:
    """GiB of a GPU, or of the machine's RAM where `device` is a CPU (default: the GPU where there is one)."""
    where = torch.device(device) if device is not None else models.device()
    if where.type == "cuda":
        return torch.cuda.get_device_properties(where).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


@contextmanager
def measure(device: torch.device | str | None = None) -> Iterator[Measured]:
    """Measure the peak of torch's allocator in a block; on a CPU each allocation is traced, so keep it short.

    What torch does not allocate is not seen: the CUDA context, files mapped into memory; nor, on a CPU, other threads.
    """
    where = torch.device(device) if device is not None else models.device()
    measured = Measured()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        yield measured
        measured.gib = torch.cuda.max_memory_allocated(where) / GIB
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield measured
    with tempfile.TemporaryDirectory() as folder:
        trace.export_chrome_trace(str(Path(folder) / "trace.json"))
        events = json.loads((Path(folder) / "trace.json").read_text())["traceEvents"]
    total = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    measured.gib = peak / GIB
