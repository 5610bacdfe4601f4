"""What a stage will need, in GiB by part, from a model's config alone; which setting makes it fit; what a block took.

Weights, gradients, optimizer and KV cache are exact: they are counted on torch's meta device, where a model has shapes
and no data. Activations and logits are formulas (`_activations`, `_logits`): on a CPU peaks come within 25% of what is
measured, on a GPU nothing has been measured yet. Not counted: the loading, the CUDA context, fragmentation.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rlhf_kit import models
from rlhf_kit.models import Lora, ModelError, ModelPath
from rlhf_kit.models.logprobs import LOGITS_CHUNK_GIB

GIB = 2**30
Shape: TypeAlias = ModelPath | PreTrainedConfig
TRAINED = {"sft": ["policy"], "reward_model": ["reward"], "dpo": ["policy"], "ppo": ["policy", "value"]}
STAGES = tuple(TRAINED)
TRL_TILE = (4096, 32768)  # tokens and words of the vocabulary whose logits TRL's loss holds at once
SCORED_ROWS, SCORED_TOKENS = 64, 4096  # what rewards.RewardModel scores at once, at most
# On a GPU the CUDA context, the workspaces of cuBLAS and the gaps between blocks take memory that no tensor has: an
# allowance, not a measurement.
RESERVE_GIB, RESERVE_SHARE = 0.75, 0.05


@dataclass(frozen=True)
class Estimate:
    """GiB of a stage by phase and part; a part is a role's weights or adapter, or what training adds."""

    trained_parameters: int
    phases: dict[str, dict[str, float]]

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, float]:
        """GiB by part in that phase; they add up to `peak`."""
        return self.phases[self.peak_phase]

    @property
    def peak(self) -> float:
        """GiB at the peak."""
        return sum(self.parts.values())

    def table(self) -> str:
        """Parts in rows, phases in columns, GiB; the largest total is the peak."""
        rows = {part: [phase[part] for phase in self.phases.values()] for part in self.parts}
        rows["total"] = [sum(phase.values()) for phase in self.phases.values()]
        lines = [f"{part:<18}" + "".join(f"{x:12.2f}" for x in row) for part, row in rows.items() if any(row)]
        return "\n".join([f"{'GiB':<18}" + "".join(f"{name:>12}" for name in self.phases), *lines])


@dataclass(frozen=True)
class Advice:
    """Whether an estimate fits the `room` GiB that a device of `gib` GiB has for tensors; if not, what changes give."""

    gib: float
    room: float
    fits: bool
    estimate: Estimate
    changes: dict[str, Estimate]

    @property
    def knob(self) -> str | None:
        """The first change that makes it fit, as it is written in settings, if there is one."""
        return next((name for name, changed in self.changes.items() if changed.peak <= self.room), None)

    def sentence(self) -> str:
        """The verdict in words and, where it does not fit, a line for each change."""
        peak = f"{self.estimate.peak:.1f} GiB at the peak ({self.estimate.peak_phase})"
        left = f"the {self.room:.1f} GiB that {self.gib:g} GiB leave for tensors"
        if self.fits:
            return f"It fits: {peak}, within {left}."
        first = f"Change first: {self.knob}" if self.knob else "No setting helps; take a smaller model or a larger GPU."
        lines = [f"It does not fit: {peak}, above {left}.", first]
        for name, changed in self.changes.items():
            lines.append(f"  {changed.peak:6.1f} GiB {'fits' if changed.peak <= self.room else '    '}  {name}")
        return "\n".join(lines)


def _model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> Any:
    """The causal LM of a config on the meta device; ModelError where transformers builds none."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"model type {config.model_type!r}: no causal LM can be built from it ({reason})") from error


def _weights(model: Any, four_bit: bool = False, head: bool = True) -> tuple[int, list[tuple[int, bool]], list[int]]:
    """Count a causal LM, with its output head or without; in 4 bits its other linear layers are quantised.

    Returns bytes as stored, (parameters, whether it is an embedding) of each tensor, parameters of each linear layer.
    """
    stored, tensors, linears = 0, {}, []
    for module in (model if head else models.decoder(model)).modules():
        linear = isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in tensors:  # tied, and counted before
                continue
            n, is_weight = tensor.numel(), linear and name == "weight"
            stored += _nf4(n) if is_weight and four_bit else n * tensor.element_size()
            linears += [n] * is_weight
            if isinstance(tensor, nn.Parameter):
                tensors[id(tensor)] = n, isinstance(module, nn.Embedding)
    return stored, list(tensors.values()), linears


def _nf4(n: int) -> int:
    """Bytes of n weights in NF4 with double quantisation (QLoRA, 2305.14314, section 3), as bitsandbytes stores them.

    Half a byte a weight; a byte for each block of 64, four for each 256 of those; the scales' mean and two code books.
    """
    blocks = ceil(n / 64)
    return ceil(n / 2) + blocks + 4 * ceil(blocks / 256) + 4 + 4 * 16 + 4 * 256


def _adam(n: int, is_embedding: bool, optim: str) -> int:
    """Bytes of AdamW's state of n parameters: two moments, in fp32 with a step count or in 8 bits with their scales."""
    if "8bit" not in optim:
        return 8 * n + 4
    # transformers keeps embeddings out of the 8-bit optimizers, bitsandbytes tensors of less than 4096 numbers.
    return 8 * n if is_embedding or n < 4096 else 2 * (n + 4 * ceil(n / 256) + 4 * 256)


def _widths(config: PreTrainedConfig) -> tuple[int, int, int, int]:
    """d, q, k, f: of hidden states, all query heads, all key heads, and the MLP times the experts that see a token."""

    def first(default: int | None, *names: str) -> int:
        numbers = (getattr(config.get_text_config(), name, None) for name in names)
        found = next((number for number in numbers if isinstance(number, int)), default)
        if found is None:
            raise ModelError(f"model type {config.model_type!r}: its config has no number {names[0]!r}")
        return found

    d, heads = first(None, "hidden_size"), first(None, "num_attention_heads")
    head = first(d // heads, "head_dim")
    f = first(4 * d, "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    return d, heads * head, first(heads, "num_key_value_heads") * head, f * first(1, "num_experts_per_tok")


def _activations(config: PreTrainedConfig, rank: int, compute: int, stored: int, autocast: bool) -> tuple[int, ...]:
    """Bytes a token: kept in a layer, kept of one that is recomputed, added by a layer's backward, made in scoring.

    compute, stored: bytes of a number in linear layers and in frozen weights. For layers of attention and a gated MLP:
    autograd keeps queries, keys, values and attention's result (2q + 2k), the gate, its activation and the other factor
    (3f), the inputs of linear layers (2d + f) and, in fp32, of norms (2d); full training also these normalised (2d),
    LoRA A(x) of seven linear layers. Scoring holds four hidden states and the larger of MLP and attention.
    """
    d, q, k, f = _widths(config)
    inputs = compute * (2 * d + f)
    if rank and compute == 2:  # frozen layers keep none; each adapter keeps a copy in fp32, which autocast rounds again
        inputs = (2 if autocast else 4) * (5 * d + q + f)
    kept = compute * (2 * q + 2 * k + 3 * f) + inputs + 4 * 2 * d + 4 * (7 * rank if rank else 2 * d)
    mlp = (4 if rank else 3) * f
    return kept, stored * d, compute * mlp, compute * (4 * d + max(mlp, 4 * q + 2 * k))


def _logits(words: int, stage: str, rows: int, length: int, completion: int, on_gpu: bool) -> int:
    """Bytes of the logits in a loss, which takes them chunk by chunk."""
    if stage == "reward_model":
        return 0
    if stage == "ppo":  # log-probs, their gradient, the logits' gradient
        return 3 * min(4 * rows * completion * words, int(LOGITS_CHUNK_GIB * GIB))
    if on_gpu:
        return 2 * min(rows * completion, TRL_TILE[0]) * TRL_TILE[1]
    # On a CPU TRL takes the prompts' tokens too, and works on seven fp32 copies of a tile.
    return 4 * min(rows * (length - 1), TRL_TILE[0]) * (TRL_TILE[1] + 7 * min(words, TRL_TILE[1]))


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
    `model` is); load_in_4bit: None means as the directory remembers; dtype: of frozen weights outside 4 bits (what
    trains is float32); prompt_length, max_completion_length: tokens; rollout: completions that PPO generates at once;
    micro_batch_size: rows (of preferences: pairs) in one forward pass; reward_model: reward models stand on this model,
    not on the policy's base; ensemble: how many there are (0: the reward is a function).
    Raises ValueError on settings that make no stage, ModelError where there is no such model.
    """
    counts = {"prompt_length": prompt_length, "max_completion_length": max_completion_length, "rollout": rollout}
    for name, value in {**counts, "micro_batch_size": micro_batch_size, "ensemble": ensemble}.items():
        if value < (least := 0 if name == "ensemble" else 1):
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if stage not in STAGES or dtype not in ("float32", "bfloat16") or "adam" not in optim:
        raise ValueError(
            f"stage={stage!r}, dtype={dtype!r}, optim={optim!r}: known are the stages {', '.join(STAGES)}, float32 and "
            "bfloat16, and AdamW in fp32 (adamw_torch_fused) or in 8 bits (paged_adamw_8bit)"
        )
    settings = models.lora_config(lora)
    if not isinstance(model, PreTrainedConfig):
        if models.is_adapter(model):
            if settings is not None:
                raise ModelError(f"{model}: is an adapter already, and is trained on as it is; leave `lora` out")
            settings = PeftConfig.from_pretrained(str(model))
        load_in_4bit = models.is_4bit(model, load_in_4bit)
    if load_in_4bit and settings is None:
        raise ModelError('4-bit weights cannot be trained; pass `lora={"r": 16}` to train an adapter')
    config, length = _config(model), prompt_length + max_completion_length
    text, (width, _, keys, _) = config.get_text_config(), _widths(config)
    if (limit := getattr(text, "max_position_embeddings", None)) is not None and length > limit:
        raise ValueError(
            f"prompt_length={prompt_length} and max_completion_length={max_completion_length} exceed the model's "
            f"{limit} positions; shorten the prompts or the completions"
        )
    on_gpu = models.device().type == "cuda" if on_gpu is None else on_gpu
    four_bit = bool(load_in_4bit)
    frozen = torch.bfloat16 if (on_gpu if four_bit else dtype == "bfloat16") else torch.float32

    # What each role holds in bytes, and the tensors that are trained.
    held: dict[str, int] = {}
    base, _, linears = _weights(_model(config, frozen), four_bit, head=stage != "reward_model")
    if settings is None:
        adapter = 0
        trained = []
        for role in TRAINED[stage]:
            held[f"{role} weights"], tensors, _ = _weights(_model(config), head=role == "policy")
            trained += tensors
        held |= {"reference weights": base} if stage in ("dpo", "ppo") else {}
    else:
        adapted = get_peft_model(_model(config), models.lora_config(settings), low_cpu_mem_usage=True)
        trained = [(p.numel(), False) for p in adapted.parameters() if p.requires_grad]
        adapter = 4 * sum(n for n, _ in trained)
        trained *= len(TRAINED[stage])
        roles = TRAINED[stage] + ["reference"] * (stage in ("dpo", "ppo"))
        held |= {"base": base, **{f"{role} adapter": adapter for role in roles}}
    if stage == "ppo":
        scorer = config if reward_model is None else _config(reward_model)
        paths = [each for each in (model, reward_model) if isinstance(each, str | Path)]
        shared = reward_model in (None, model) or (len(paths) == 2 and models.same_base(*paths))
        held["reward models"] = ensemble * adapter
        if settings is None or not shared:
            held["reward models"] += ensemble * _weights(_model(scorer, frozen), four_bit, head=False)[0]
        held["heads"] = 4 * (width + 1) + ensemble * 4 * _widths(scorer)[0]
        trained += [(width, False), (1, False)]
    elif stage == "reward_model":
        held["heads"] = 4 * width + (0 if settings is None else frozen.itemsize * width)  # peft trains a copy
        trained += [(width, False)]
    optimizer, gradients = sum(_adam(n, embedding, optim) for n, embedding in trained), 4 * sum(n for n, _ in trained)

    # What one forward and backward pass makes.
    autocast = on_gpu and stage != "ppo"  # TRL computes in bf16 there
    stored = 4 if settings is None else frozen.itemsize
    compute = 2 if autocast else stored
    rank, layers = settings.r if settings is not None else 0, text.num_hidden_layers
    kept, checkpoint, backward, scoring = _activations(config, rank, compute, stored, autocast)
    rows = min(micro_batch_size, rollout) if stage == "ppo" else micro_batch_size * (1 if stage == "sft" else 2)
    tokens = rows * length
    logits = _logits(text.vocab_size, stage, rows, length, max_completion_length, on_gpu)
    one_layer = tokens * (kept + backward)
    all_layers = tokens * (layers * (checkpoint if gradient_checkpointing else kept) + 4 * 4 * width)
    if autocast and stored == 4:  # autograd keeps the weights in bf16 with the activations
        all_layers += 2 * sum(linears) // (layers if rank and gradient_checkpointing else 1)
    at_work = one_layer if gradient_checkpointing else tokens * backward
    accumulated = gradients // (1 if rollout > rows else 2) if stage == "ppo" else 0  # of earlier rows, or the policy's

    def phase(**made: int) -> dict[str, float]:
        parts = {"optimizer": optimizer, "gradients": 0, "KV cache": 0, "activations": 0, "logits": 0}
        parts["dequantisation"] = 2 * compute * max(linears) if four_bit else 0  # a layer's weights, and transposed
        return {part: size / GIB for part, size in {**held, **parts, **made}.items()}

    phases = {}
    scored = scoring * length * min(SCORED_ROWS, max(1, SCORED_TOKENS // length))
    if stage == "ppo":
        token = 2 * keys * layers * rollout * stored  # of the KV cache
        prefill, sampled = rollout * prompt_length * scoring, 3 * 4 * rollout * text.vocab_size
        phases["prefill"] = phase(**{"KV cache": prompt_length * token}, activations=prefill)
        one_copied = length * token // layers
        phases["generate"] = phase(**{"KV cache": length * token}, activations=one_copied, logits=sampled)
        scored = min(scored, scoring * length * rollout) if ensemble else 0
        phases["score"] = phase(activations=max(tokens * scoring + logits, scored))
    phases["forward"] = phase(gradients=accumulated, activations=all_layers + max(0, at_work - logits), logits=logits)
    phases["backward"] = phase(gradients=gradients, activations=one_layer)
    if stage == "reward_model":  # loaded again, it scores the dataset to be normalised
        phases["score"] = phase(optimizer=0, activations=scored)
    return Estimate(sum(n for n, _ in trained), phases)


def _config(model: Shape) -> PreTrainedConfig:
    return model if isinstance(model, PreTrainedConfig) else models.load_config(model)


def advise(model: Shape, stage: str, gib: float, **settings: Any) -> Advice:
    """Hold `estimate(model, stage, **settings)` against a device of `gib` GiB; changes that cost nothing come first."""
    if gib <= 0:
        raise ValueError(f"a GPU of {gib} GiB: give its memory, for example 12")
    needed, room = estimate(model, stage, **settings), gib * (1 - RESERVE_SHARE) - RESERVE_GIB
    if needed.peak <= room:
        return Advice(gib, room, True, needed, {})
    lora, ppo = models.lora_config(settings.get("lora")), stage == "ppo"
    rollout, completion = settings.get("rollout", 8), max(1, settings.get("max_completion_length", 512) // 2)
    changes: dict[str, dict[str, Any]] = {
        "gradient_checkpointing=True": {"gradient_checkpointing": True},
        f"{'micro' if ppo else 'per_device_train'}_batch_size=1": {"micro_batch_size": 1},
        'optim="paged_adamw_8bit"': {"optim": "paged_adamw_8bit"},
        "a reward model that is an adapter over the policy's base": {"reward_model": None},
    }
    if lora is None and (isinstance(model, PreTrainedConfig) or not models.is_adapter(model)):
        changes['lora={"r": 16}'] = {"lora": {"r": 16}}
        changes['lora={"r": 16}, load_in_4bit=True'] = {"lora": {"r": 16}, "load_in_4bit": True}
    else:
        changes["load_in_4bit=True"] = {"load_in_4bit": True}
    if lora is not None and lora.r > 1:
        lora.r //= 2
        changes[f'lora={{"r": {lora.r}}}'] = {"lora": lora}
    if ppo:
        changes[f"per_device_train_batch_size={max(1, rollout // 2)}"] = {"rollout": max(1, rollout // 2)}
    length = f"max_length={settings.get('prompt_length', 512) + completion}"
    changes[f"max_completion_length={completion}" if ppo else length] = {"max_completion_length": completion}
    changes["one reward model instead of an ensemble"] = {"ensemble": 1}
    tried = {name: estimate(model, stage, **{**settings, **change}) for name, change in changes.items()}
    tried = {name: changed for name, changed in tried.items() if changed.peak < needed.peak}
    if len(tried) > 1:
        together = {name: value for change in tried for name, value in changes[change].items()}
        tried["all of these"] = estimate(model, stage, **{**settings, **together})
    return Advice(gib, room, False, needed, tried)


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

    Not seen: the CUDA context and, on a CPU, what other threads allocate. A file mapped into memory counts as a whole.
    """
    where, measured = torch.device(device) if device is not None else models.device(), Measured()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        yield measured
        measured.gib = torch.cuda.max_memory_allocated(where) / GIB
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield measured
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    changes = (event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"]))
    measured.gib = max(accumulate(changes), default=0) / GIB
