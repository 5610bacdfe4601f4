"""PPO's policy, reference, value and reward models behind one interface: separate models, or adapters over one base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_kit.models.loading import (
    Model,
    ModelError,
    ModelPath,
    base_of,
    decoder,
    hidden_size,
    is_adapter,
    load_backbone,
    load_base,
    load_causal,
    read_notes,
    read_score_head,
    same_base,
    write_notes,
)
from rlhf_kit.models.logprobs import Tokens, check_logprobs, completion_hidden

VALUE_HEAD = "value_head.safetensors"


class Roles(nn.Module):
    """The models of PPO by role: `policy`, `reference`, `value` and, where they stand on the same base, `reward_0`, ...

    Each role is a module and, where modules are shared, the adapter to switch on. A trainer asks for log-probs and
    values by role and cannot tell separate models from adapters over one base.
    """

    def __init__(self, parts: dict[str, tuple[Any, str | None]], value_head: nn.Linear) -> None:
        super().__init__()
        self.parts = parts  # not registered: several roles may stand on one module
        self.models = nn.ModuleList(dict.fromkeys(module for module, _ in parts.values()))
        self.value_head = value_head.float()
        self.accepts_loss_kwargs = False  # read by transformers.Trainer
        self.learning = [parameter for _, parameter in self.trainable_parameters()]
        self.set_trainable()
        self.use("policy")

    def use(self, role: str) -> Model:
        """The module that plays `role`, its adapter switched on: run forward AND backward before using another role."""
        module, adapter = self.parts[role]
        if adapter is not None and module.active_adapter != adapter:
            # Switching freezes every adapter but the one switched on: the roles that learn are made to learn again, or
            # an optimizer built now would miss one of them and its gradient would be lost without an error.
            module.set_adapter(adapter, inference_mode=True)
            for parameter in self.learning:
                parameter.requires_grad_(True)
        return module

    def set_trainable(self) -> None:
        """Policy and value learn, everything else is frozen."""
        self.requires_grad_(False)
        for parameter in self.learning:
            parameter.requires_grad_(True)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of everything that learns."""
        for role in ("policy", "value"):
            module, adapter = self.parts[role]
            for name, parameter in module.named_parameters():
                if adapter is None or f".{adapter}." in name:
                    yield f"{role}.{name}", parameter
        for name, parameter in self.value_head.named_parameters():
            yield f"value_head.{name}", parameter

    def backbone(self, role: str) -> PreTrainedModel:
        """The transformer of a role without its head, its adapter switched on: token ids in, hidden states out."""
        module = self.use(role)
        return decoder(module) if self.parts[role][1] is not None else module

    def activation_checkpointing_enable(self, **kwargs: object) -> None:
        """Recompute activations in the backward pass; called by transformers.Trainer."""
        model: Any
        for model in self.models:
            model.activation_checkpointing_enable(**kwargs)

    def values(self, tokens: Tokens) -> torch.Tensor:
        """V(x, y_<t) (B, C) in fp32, 0 where masked: index t has seen only the tokens before t."""
        hidden = completion_hidden(self.backbone("value"), tokens)
        with torch.autocast(hidden.device.type, enabled=False):  # heads stay in fp32
            return self.value_head(hidden.float()).squeeze(-1) * tokens.completion_mask

    def save(self, out: ModelPath) -> None:
        """Write the policy to `out` and the value model with its head to `out`/value, each a directory of its own."""
        for role, folder in (("policy", Path(out)), ("value", Path(out) / "value")):
            module, adapter = self.parts[role]
            if adapter is None:
                module.save_pretrained(folder)
                continue
            module.save_pretrained(folder, selected_adapters=[adapter])
            for file in (folder / adapter).iterdir():  # peft puts a named adapter one folder too deep
                file.replace(folder / file.name)
            (folder / adapter).rmdir()
            write_notes(folder, load_in_4bit=bool(getattr(module.get_base_model(), "is_loaded_in_4bit", False)))
        save_file(self.value_head.state_dict(), Path(out) / "value" / VALUE_HEAD)

    def load(self, saved: ModelPath) -> None:
        """Take the weights of policy and value back from a directory written by `save`, bit for bit."""
        for role, folder in (("policy", Path(saved)), ("value", Path(saved) / "value")):
            module, adapter = self.parts[role]
            if adapter is not None:
                set_peft_model_state_dict(module, load_file(folder / "adapter_model.safetensors"), adapter)
            else:
                module.load_state_dict(type(module).from_pretrained(folder, dtype=module.dtype).state_dict())
        self.value_head.load_state_dict(load_file(Path(saved) / "value" / VALUE_HEAD))


def load_roles(
    policy: ModelPath,
    reference: ModelPath | None = None,
    value: ModelPath | None = None,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    rewards: Sequence[ModelPath] = (),
) -> Roles:
    """Policy and its frozen copy, the reference (by default the same directory), and a value model.

    `value` is a saved value model or a reward model; its head becomes the value head. Without one, the value model
    starts from the policy with a zero head. With an adapter as policy, or `lora`, all roles are adapters over one base,
    and so are `rewards`, reward-model adapters of that base (their heads stay with `rlhf_kit.rewards`).
    """
    if is_adapter(policy) or lora is not None:
        roles = _adapter_roles(policy, reference, value, lora, load_in_4bit, rewards)
    elif rewards:
        raise ModelError(f"{policy}: full weights share nothing, so reward models cannot stand on them")
    else:
        roles = _separate_roles(policy, reference, value, load_in_4bit)
    switch_off_dropout(roles)
    check_logprobs(roles.use("policy"))
    return roles


def _separate_roles(
    policy: ModelPath, reference: ModelPath | None, value: ModelPath | None, load_in_4bit: bool | None
) -> Roles:
    model = load_causal(policy, load_in_4bit, trainable=True)
    frozen = load_causal(reference or policy, load_in_4bit)
    backbone = load_backbone(value or policy, trainable=True)
    return Roles(
        {"policy": (model, None), "reference": (frozen, None), "value": (backbone, None)}, _value_head(backbone, value)
    )


def _adapter_roles(
    policy: ModelPath,
    reference: ModelPath | None,
    value: ModelPath | None,
    lora: LoraConfig | None,
    load_in_4bit: bool | None,
    rewards: Sequence[ModelPath],
) -> Roles:
    """Named adapters over one base, loaded once; a fresh adapter (`lora`) over full weights starts as the identity."""
    for other in (reference, value, *rewards):
        if other is not None and not same_base(other, policy):
            raise ModelError(
                f"{other}: stands on {base_of(other)}, the policy on {base_of(policy)}; adapters need one base"
            )
    if is_adapter(policy) and lora is not None:
        raise ModelError(f"{policy}: is an adapter already, and is trained on as it is; leave `peft_config` out")
    base = load_base(policy, AutoModelForCausalLM.from_pretrained, load_in_4bit)
    if lora is None:
        model = PeftModel.from_pretrained(base, str(policy), adapter_name="policy", is_trainable=True)
    else:
        model = get_peft_model(base, deepcopy(lora), adapter_name="policy")  # peft writes what it finds into it
    for role, source in (("reference", reference), ("value", value)):
        if source is not None and is_adapter(source):
            model.load_adapter(str(source), role)
            continue
        model.add_adapter(
            role, model.peft_config["policy"]
        )  # the identity, which is what a full `source` is over itself
        if source is None:
            set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="policy"), role)
    names = [f"reward_{i}" for i in range(len(rewards))]
    for name, source in zip(names, rewards, strict=True):
        model.load_adapter(str(source), name)
    return Roles({role: (model, role) for role in ("policy", "reference", "value", *names)}, _value_head(model, value))


def _value_head(backbone: Model, value: ModelPath | None) -> nn.Linear:
    """A fp32 head: saved with a value model, taken over from a reward model (with its normalisation), or zero."""
    head = nn.Linear(hidden_size(backbone), 1, device=backbone.device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if value is not None and (Path(value) / VALUE_HEAD).is_file():
        head.load_state_dict(load_file(Path(value) / VALUE_HEAD))
    elif value is not None:
        notes = read_notes(value)
        shift, scale = notes.get("shift", 0.0), notes.get("scale", 1.0)
        head.weight.data.copy_(read_score_head(value) / scale)
        head.bias.data.fill_(-shift / scale)
    return head


def switch_off_dropout(model: nn.Module) -> None:
    """A policy that drops units while it is trained is not the policy that was sampled, and its ratio is never 1."""
    module: Any
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
