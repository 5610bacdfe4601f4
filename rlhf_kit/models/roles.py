"""The models of PPO by role behind one interface: separate models, or adapters over one base that is loaded once."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_kit.models import loading
from rlhf_kit.models.loading import Lora, Model, ModelError, ModelPath, is_adapter
from rlhf_kit.models.logprobs import Tokens, check_logprobs, completion_hidden

VALUE_HEAD = "value_head.safetensors"


class Roles(nn.Module):
    """The models of PPO by role: `policy`, `reference`, `value`, and reward models that share the policy's base.

    A role is a module and, where the module is shared, the adapter to switch on; a trainer cannot tell which.
    """

    def __init__(self, parts: Mapping[str, tuple[Any, str | None]], value_head: nn.Linear) -> None:
        super().__init__()
        self.parts = parts  # not registered as submodules: several roles may share one module
        self.models: Any = nn.ModuleList(dict.fromkeys(module for module, _ in parts.values()))
        self.value_head = value_head.float()
        self.accepts_loss_kwargs = False  # read by transformers.Trainer
        self.learning = [parameter for _, parameter in self.trainable_parameters()]
        self.requires_grad_(False)
        self.use("policy")

    def use(self, role: str) -> Model:
        """The module of `role` with its adapter switched on; run forward AND backward before using another role."""
        module, adapter = self.parts[role]
        if adapter is not None and module.active_adapter != adapter:
            module.set_adapter(adapter, inference_mode=True)
        # Switching has frozen all adapters. If policy or value stayed so, an optimizer built now would miss it, and its
        # gradient would be lost without an error.
        for parameter in self.learning:
            parameter.requires_grad_(True)
        return module

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the policy, the value model and its head."""
        learning = {"policy": self.parts["policy"], "value": self.parts["value"], "value_head": (self.value_head, None)}
        for role, (module, adapter) in learning.items():
            for name, parameter in module.named_parameters():
                if adapter is None or f".{adapter}." in name:
                    yield f"{role}.{name}", parameter

    def backbone(self, role: str) -> PreTrainedModel:
        """The transformer of a role without its head, with its adapter switched on: token ids to hidden states."""
        return loading.decoder(self.use(role))

    def activation_checkpointing_enable(self, **kwargs: object) -> None:
        """Called by transformers.Trainer."""
        for model in self.models:
            model.activation_checkpointing_enable(**kwargs)

    def values(self, tokens: Tokens) -> torch.Tensor:
        """V(x, y_<t) in fp32 (B, C), 0 where masked: index t has seen only the tokens before t."""
        hidden = completion_hidden(self.backbone("value"), tokens)
        with torch.autocast(hidden.device.type, enabled=False):  # heads stay in fp32
            return self.value_head(hidden.float()).squeeze(-1) * tokens.completion_mask

    def save(self, out: ModelPath) -> None:
        """Write the policy to `out`, and the value model with its head to `out`/value: each is a model directory."""
        for role, folder in (("policy", Path(out)), ("value", Path(out) / "value")):
            module, adapter = self.parts[role]
            module.save_pretrained(folder, **({} if adapter is None else {"selected_adapters": [adapter]}))
            loading.write_loading(folder, module)
            if adapter is not None:  # peft saves it in a folder of its name
                for file in (folder / adapter).iterdir():
                    file.replace(folder / file.name)
                (folder / adapter).rmdir()
        save_file(self.value_head.state_dict(), Path(out) / "value" / VALUE_HEAD)

    def load(self, saved: ModelPath) -> None:
        """Read the weights of policy and value from a directory that `save` wrote, bit for bit."""
        for role, folder in (("policy", Path(saved)), ("value", Path(saved) / "value")):
            module, adapter = self.parts[role]
            if adapter is not None:
                set_peft_model_state_dict(module, load_file(folder / "adapter_model.safetensors"), adapter)
            else:
                how = {"dtype": module.dtype, "trust_remote_code": False}
                module.load_state_dict(type(module).from_pretrained(folder, **how).state_dict())
        self.value_head.load_state_dict(load_file(Path(saved) / "value" / VALUE_HEAD))


def load_roles(
    policy: ModelPath,
    reference: ModelPath | None = None,
    value: ModelPath | None = None,
    lora: Lora | None = None,
    rewards: Mapping[str, ModelPath] | None = None,
    **how: Any,
) -> Roles:
    """Policy, reference (default: a frozen copy of the policy) and value model (default: a copy with a zero head).

    `value` is a saved value model or a reward model, whose head becomes the value head. Where the policy is an adapter
    or `lora` is given, all roles are adapters over one base, and so are `rewards`, by role name; ModelError where one
    is not over it. how: as of `load_causal`.
    """
    loading.check_trainable(policy, lora, **how)
    parts: dict[str, tuple[Any, str | None]]
    if lora is None and not is_adapter(policy):
        parts = {
            "policy": (loading.load_causal(policy, trainable=True, **how), None),
            "reference": (loading.load_causal(reference or policy, trainable=True, **how), None),
            "value": (loading.load_backbone(value or policy, trainable=True, **how), None),
        }
    else:
        others = {"reference": reference, "value": value, **(rewards or {})}
        model = _adapters(policy, others, lora, **how)
        parts = {role: (model, role) for role in ("policy", *others)}
    roles = Roles(parts, _value_head(parts["policy"][0], value))
    switch_off_dropout(roles)
    check_logprobs(roles.use("policy"))
    return roles


def _adapters(policy: ModelPath, others: Mapping[str, ModelPath | None], lora: Lora | None, **how: Any) -> PeftModel:
    """An adapter for each role over one base; a new adapter (`lora`) over full weights starts as the identity."""
    for other in others.values():
        if other is not None and not loading.same_base(other, policy):
            raise ModelError(f"{other}: its base is {loading.base_of(other)}, not the policy's; adapters need one base")
    base = loading.load_base(policy, AutoModelForCausalLM.from_pretrained, **how)
    if lora is None:
        model = loading.with_adapter(base, policy, True, "policy")
    else:
        model = get_peft_model(base, loading.lora_config(lora), adapter_name="policy")
    for role, source in others.items():
        if source is not None and is_adapter(source):
            model.load_adapter(str(source), role)
        else:  # a new adapter is the identity: right where `source` is the base itself
            model.add_adapter(role, model.peft_config["policy"])
        if source is None:
            set_peft_model_state_dict(model, get_peft_model_state_dict(model, adapter_name="policy"), role)
    return model


def _value_head(policy: Model, value: ModelPath | None) -> nn.Linear:
    """The value head in fp32: from a value model, from a reward model (with its shift and scale), or zero."""
    if value is None:
        weight = policy.get_output_embeddings().weight
        state = {"weight": torch.zeros(1, weight.shape[1]), "bias": torch.zeros(1)}
    elif (Path(value) / VALUE_HEAD).is_file():
        state = load_file(Path(value) / VALUE_HEAD)
    else:
        notes = loading.read_notes(value)
        shift, scale = notes.get("shift", 0.0), notes.get("scale", 1.0)
        state = {"weight": loading.read_score_head(value) / scale, "bias": torch.tensor([-shift / scale])}
    head = nn.Linear(state["weight"].shape[1], 1, device=policy.device)
    head.load_state_dict(state)
    return head


def switch_off_dropout(model: nn.Module) -> None:
    """Set dropout to 0: with dropout in training, the ratio to the policy that was sampled would never be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # what models such as OPT pass to functions
            if name.endswith(("dropout", "layerdrop")) and isinstance(value, float):
                setattr(module, name, 0.0)
