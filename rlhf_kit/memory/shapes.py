"""Models of the right shape on the meta device, as the kit would load them, and what their training holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.integrations import replace_with_bnb_linear


@dataclass(frozen=True)
class Job:
    """The arguments of `estimate`, looked up and checked; lengths in tokens."""

    config: PreTrainedConfig
    lora: LoraConfig | None
    load_in_4bit: bool
    prompt: int
    completion: int
    rollout: int
    micro_batch: int
    checkpointing: bool
    optim: str
    reward_config: PreTrainedConfig | None
    ensemble: int
    on_gpu: bool

    @property
    def length(self) -> int:
        """Tokens of a whole row."""
        return self.prompt + self.completion


def shaped(job: Job, auto: Any, config: PreTrainedConfig | None = None) -> Any:
    """The model that `rlhf_kit.models.load_base` would load through an Auto class, on the meta device."""
    config = deepcopy(config or job.config)
    config.pad_token_id, config.num_labels = 0, 1
    # As load_base: fp32, but what stays beside 4-bit weights is in the precision that they compute in.
    dtype = torch.bfloat16 if job.load_in_4bit and job.on_gpu else torch.float32
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    if not job.load_in_4bit:
        return model
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    kept = ["lm_head", "score", "embed_out"]
    model = replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=quantization)
    with torch.device("cpu"):
        # bitsandbytes makes this code book once, on the device that asks first: a meta one would spoil all real loads.
        bitsandbytes.functional.name2qmap.setdefault("dynamic", bitsandbytes.functional.create_dynamic_map())
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight._quantize(torch.device("meta"))
    model.is_loaded_in_4bit = True  # read by peft
    return model.requires_grad_(False)


def stored(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor that a model holds; of 4-bit weights their block scales too."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            yield from (part for part in (state.absmax, state.code, state.offset) if part is not None)
            state = state.state2


def optimizer_bytes(parameters: Iterable[nn.Parameter], embeddings: Iterable[torch.Tensor], optim: str) -> int:
    """Bytes of Adam's state: two fp32 numbers a parameter and a step a tensor, or two bytes and their block scales.

    Raises ValueError for an optimizer of unknown size.
    """
    if "adam" not in optim:
        raise ValueError(f"optim={optim!r}: the memory of AdamW is known, in fp32 (adamw_torch_fused) or 8 bits")
    in_fp32 = {id(parameter) for parameter in embeddings}  # transformers keeps these out of the 8-bit optimizers
    total = 0
    for parameter in parameters:
        n = parameter.numel()
        if "8bit" not in optim:
            total += 8 * n + 4
        elif n < 4096 or id(parameter) in in_fp32:  # bitsandbytes leaves small tensors in fp32
            total += 8 * n
        else:
            total += 2 * (n + 4 * -(-n // 256) + 4 * 256)  # each moment: a byte, a scale a block, and a code book
    return total


def mixed_precision(model: nn.Module) -> dict[int, torch.Tensor]:
    """Make linear layers compute in bf16 as under autocast, which knows no meta tensors; returns the cache of casts.

    Within a forward pass autocast keeps a bf16 copy of each trained weight; the caller clears the cache at its end.
    """
    cache: dict[int, torch.Tensor] = {}

    def cast(weight: torch.Tensor | None) -> torch.Tensor | None:
        if weight is None or weight.dtype != torch.float32:
            return weight
        if not (weight.requires_grad and weight.is_leaf) or torch._C._current_graph_task_id() != -1:
            return weight.bfloat16()
        if id(weight) not in cache:
            cache[id(weight)] = weight.bfloat16()
        return cache[id(weight)]

    for module in model.modules():
        if type(module) is nn.Linear:

            def forward(x: torch.Tensor, module: nn.Linear = module) -> torch.Tensor:
                weight = cast(module.weight)
                assert weight is not None
                return nn.functional.linear(x.bfloat16(), weight, cast(module.bias))

            module.forward = forward  # type: ignore[method-assign, assignment]
    return cache
