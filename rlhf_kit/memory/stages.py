"""The stages as they run on the meta device: what each holds, and what each of its phases adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from rlhf_kit.memory.ledger import Ledger
from rlhf_kit.memory.shapes import Job, mixed_precision, optimizer_bytes, shaped, stored
from rlhf_kit.models import Tokens, completion_hidden, completion_logprobs, decoder, switch_off_dropout

TRL_TILE = (4096, 32768)  # tokens and words of the vocabulary whose logits TRL's head holds at once
REWARD_BATCH, REWARD_TOKENS = 64, 4096  # rows and tokens that rlhf_kit.rewards.RewardModel scores at once, at most
Phases: TypeAlias = dict[str, dict[str, int]]  # bytes by part at the peak of each phase


# PPO ---------------------------------------------------------------------------------------------------------------


def ppo(job: Job, ledger: Ledger) -> tuple[int, Phases]:
    """Roll out, score, optimise; with LoRA all roles are adapters over one base, otherwise models of their own."""
    roles = _roles(job, ledger)
    head_width = (job.reward_config or job.config).get_text_config().hidden_size
    value_head = nn.Linear(job.config.get_text_config().hidden_size, 1)
    reward_heads = [nn.Linear(head_width, 1, bias=False) for _ in range(job.ensemble)]
    ledger.hold("heads", (p for head in (value_head, *reward_heads) for p in head.parameters()))
    trained = [*value_head.parameters()]
    for role in ("policy", "value"):
        named = roles[role].named_parameters()
        trained += [p for name, p in named if job.lora is None or f".{role}." in name]

    def use(role: str) -> Any:
        module = roles[role]
        if isinstance(module, PeftModel):
            module.set_adapter(role)
        _train_only(trained, roles.values())  # set_adapter flips requires_grad
        return module

    def backbone(role: str) -> Any:
        module = use(role)
        return decoder(module) if isinstance(module, PeftModel) else module

    _prepare(job, ledger, trained, roles.values())
    micro = _tokens(job, job.micro_batch)
    for module in roles.values():
        module.eval()
    phases = _generate(job, ledger, use("policy"))
    with ledger.phase(1) as phases["score"], torch.no_grad():
        completion_logprobs(use("policy"), micro, with_entropy=True)
        completion_logprobs(use("reference"), micro)
        value_head(completion_hidden(backbone("value"), micro).float())
        ledger.padded = job.rollout > 1
        for i in range(job.ensemble):
            _score(job, backbone(f"reward_{i}"), job.rollout)
    for module in roles.values():
        module.train()
    _hold_gradients(ledger, trained, job.rollout > job.micro_batch)
    with ledger.phase(1) as phases["optimise"]:
        logprobs, _ = completion_logprobs(use("policy"), micro)
        torch.autograd.backward(logprobs.sum())
        del logprobs
        values = value_head(completion_hidden(backbone("value"), micro).float())
        torch.autograd.backward(values.sum())
    return sum(p.numel() for p in trained), phases


def _roles(job: Job, ledger: Ledger) -> dict[str, Any]:
    """policy, reference, value, reward_0, ...: the module of each."""
    rewards = [f"reward_{i}" for i in range(job.ensemble)]
    policy = shaped(job, AutoModelForCausalLM)
    ledger.hold("base", stored(policy))
    if job.lora is None:
        roles = {"policy": policy, "reference": shaped(job, AutoModelForCausalLM), "value": shaped(job, AutoModel)}
        ledger.hold("reference", stored(roles["reference"]))
        ledger.hold("value model", stored(roles["value"]))
    else:
        policy = get_peft_model(policy, deepcopy(job.lora), adapter_name="policy")
        shared = rewards if job.reward_config is None else []
        for role in ("reference", "value", *shared):
            policy.add_adapter(role, policy.peft_config["policy"])
        ledger.hold("adapters", (p for name, p in policy.named_parameters() if "lora_" in name))
        roles = dict.fromkeys(("policy", "reference", "value", *shared), policy)
    for role in rewards:
        if role not in roles:
            roles[role] = _reward_backbone(job)
            ledger.hold("reward models", stored(roles[role]))
    for module in roles.values():
        switch_off_dropout(module)
    return roles


def _generate(job: Job, ledger: Ledger, policy: Any) -> Phases:
    """The prompts at once (prefill), then the last token of the longest completions (generate)."""
    inner = policy.get_base_model() if isinstance(policy, PeftModel) else policy

    class Cache(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> Any:
            updated = super().update(*args, **kwargs)
            ledger.hold("KV cache", updated)
            return updated

    def step(cache: DynamicCache, new: int, seen: int) -> None:
        ids, mask = (torch.empty(job.rollout, n, dtype=torch.long) for n in (new, seen))
        output = inner(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        (output.logits[:, -1].to(torch.float32, copy=True) / 0.9).softmax(-1).multinomial(1)

    phases: Phases = {}
    with torch.no_grad():
        with ledger.phase(job.rollout) as phases["prefill"]:
            step(Cache(config=inner.config), job.prompt, job.prompt)
        cache = Cache(config=inner.config)
        with Ledger():  # answers what the meta device cannot; what it counts is not asked for
            step(cache, job.length - 1, job.length - 1)
        with ledger.phase(job.rollout) as phases["generate"]:
            step(cache, 1, job.length)
    return phases


# TRL's stages ------------------------------------------------------------------------------------------------------


def sft(job: Job, ledger: Ledger) -> tuple[int, Phases]:
    """Forward and backward of one batch of demonstrations."""
    model, cast = _trl_model(job, ledger, AutoModelForCausalLM)
    rows = job.micro_batch
    return _trl_step(job, ledger, model, cast, rows, lambda: _trl_logprobs(job, model, rows).sum())


def reward_model(job: Job, ledger: Ledger) -> tuple[int, Phases]:
    """Forward and backward of one batch of pairs, then the normalisation: the same weights, loaded again, score."""
    model, cast = _trl_model(job, ledger, AutoModelForSequenceClassification)
    ids = torch.empty(2 * job.micro_batch, job.length, dtype=torch.long)

    def loss() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float().sum()

    trained, phases = _trl_step(job, ledger, model, cast, 2 * job.micro_batch, loss)
    model.zero_grad(set_to_none=True)
    with ledger.phase(REWARD_BATCH) as phases["normalise"], torch.no_grad():
        _score(job, model.eval(), REWARD_BATCH)
    return trained, phases


def _reward_backbone(job: Job) -> Any:
    """As load_backbone: an adapter's base is loaded as a causal LM, then its output head is dropped."""
    config = job.reward_config
    if job.lora is None:
        return shaped(job, AutoModel, config)
    return decoder(get_peft_model(shaped(job, AutoModelForCausalLM, config), deepcopy(job.lora)))


def _score(job: Job, backbone: Any, rows: int) -> None:
    rows = min(rows, REWARD_BATCH, max(1, REWARD_TOKENS // job.length))
    ids = torch.empty(rows, job.length, dtype=torch.long)
    backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


def dpo(job: Job, ledger: Ledger) -> tuple[int, Phases]:
    """Forward and backward of one batch of pairs; the reference is a second model or, with LoRA, a second adapter."""
    model, cast = _trl_model(job, ledger, AutoModelForCausalLM)
    reference = model
    if job.lora is None:
        reference = shaped(job, AutoModelForCausalLM).requires_grad_(False).eval()
        ledger.hold("reference", stored(reference))
        if job.on_gpu:
            mixed_precision(reference)
    else:
        model.add_adapter("ref", model.peft_config["default"])
        model.set_adapter("default")
        ledger.hold("adapters", (p for name, p in model.named_parameters() if ".ref." in name))

    def loss() -> torch.Tensor:
        logprobs = _trl_logprobs(job, model, 2 * job.micro_batch)
        with torch.no_grad():
            _trl_logprobs(job, reference, 2 * job.micro_batch)
        return logprobs.sum()

    return _trl_step(job, ledger, model, cast, 2 * job.micro_batch, loss)


def _trl_model(job: Job, ledger: Ledger, auto: Any) -> tuple[Any, dict[int, torch.Tensor]]:
    """The model as rlhf_kit.train hands it to TRL, what it trains in fp32; on a GPU TRL computes in bf16."""
    model = shaped(job, auto)
    ledger.hold("base", stored(model))
    if job.lora is not None:
        config = deepcopy(job.lora)  # peft writes the modules that it finds into it
        if auto is AutoModelForSequenceClassification:
            config = type(config)(
                r=config.r, target_modules=config.target_modules, task_type="SEQ_CLS", modules_to_save=["score"]
            )
        model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        ledger.hold("adapters", (p for name, p in model.named_parameters() if "lora_" in name))
    ledger.hold("heads", (p for name, p in model.named_parameters() if ".score." in f".{name}"))
    return model, mixed_precision(model) if job.on_gpu else {}


def _trl_step(
    job: Job, ledger: Ledger, model: Any, cast: dict[int, torch.Tensor], rows: int, loss: Callable[[], torch.Tensor]
) -> tuple[int, Phases]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _prepare(job, ledger, trained, [model])
    _hold_gradients(ledger, trained, False)
    model.train()
    phases: Phases = {}
    with ledger.phase(rows) as phases["optimise"]:
        value = loss()
        cast.clear()  # autocast forgets its copies at the end of the forward pass
        torch.autograd.backward(value)
    return sum(p.numel() for p in trained), phases


def _trl_logprobs(job: Job, model: Any, rows: int) -> torch.Tensor:
    """Log-probs of the completions as TRL's fused head takes them: tile by tile, on a CPU those of prompts too."""
    tokens = _tokens(job, rows)
    backbone = decoder(model) if isinstance(model, PeftModel) else model.base_model
    hidden = backbone(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, use_cache=False
    ).last_hidden_state
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    hidden = hidden[:, -job.completion - 1 : -1] if job.on_gpu else hidden[:, :-1]
    return _TiledHead.apply(hidden.reshape(-1, hidden.shape[-1]), inner.get_output_embeddings().weight, job.on_gpu)


class _TiledHead(torch.autograd.Function):
    """What TRL's fused output head allocates: a tile of logits, recomputed in the backward pass, and fp32 gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, on_gpu: bool) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.on_gpu = on_gpu
        tile = _TiledHead.tile(hidden, weight, on_gpu)
        return tile[0].new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def tile(hidden: torch.Tensor, weight: torch.Tensor, on_gpu: bool) -> list[torch.Tensor]:
        """One tile of logits; without Triton, on a CPU, it is worked on in seven fp32 copies."""
        rows, words = min(len(hidden), TRL_TILE[0]), min(len(weight), TRL_TILE[1])
        dtype = torch.bfloat16 if on_gpu else hidden.dtype
        held = [hidden.new_empty(rows, TRL_TILE[1], dtype=dtype)]
        if weight.dtype != dtype:
            held.append(weight[:words].to(dtype))
        return held if on_gpu else [*held, *(hidden.new_empty(rows, words, dtype=torch.float32) for _ in range(7))]

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        tile = _TiledHead.tile(hidden, weight, ctx.on_gpu)
        del tile
        return grad_hidden.to(hidden.dtype), None if grad_weight is None else grad_weight.to(weight.dtype), None


# What all stages share ---------------------------------------------------------------------------------------------


def _tokens(job: Job, rows: int) -> Tokens:
    """Rows of full length: the longest a batch can be."""
    ids = torch.empty(rows, job.length, dtype=torch.long)
    return Tokens(ids, torch.ones_like(ids), torch.ones(rows, job.completion, dtype=torch.long))


def _train_only(trained: list[nn.Parameter], models: Iterable[nn.Module]) -> None:
    for module in dict.fromkeys(models):
        module.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)


def _prepare(job: Job, ledger: Ledger, trained: list[nn.Parameter], models: Iterable[Any]) -> None:
    """Gradient checkpointing on, the optimizer's state held."""
    embeddings = []
    for module in dict.fromkeys(models):
        inner = module.get_base_model() if isinstance(module, PeftModel) else module
        if job.checkpointing:
            inner.activation_checkpointing_enable({"use_reentrant": False})
        embeddings += [each.weight for each in inner.modules() if isinstance(each, nn.Embedding)]
    ledger.live["optimizer"] = optimizer_bytes(trained, embeddings, job.optim)


def _hold_gradients(ledger: Ledger, trained: list[nn.Parameter], accumulated: bool) -> None:
    """Count gradients as such as they come; `accumulated`: those of an earlier micro-batch are there already."""
    for parameter in trained:
        if accumulated:
            parameter.grad = torch.empty_like(parameter)
            ledger.hold("gradients", [parameter.grad])
        parameter.register_post_accumulate_grad_hook(lambda p: ledger.hold("gradients", [p.grad]))


STAGES: dict[str, Callable[[Job, Ledger], tuple[int, Phases]]] = {
    "sft": sft,
    "reward_model": reward_model,
    "dpo": dpo,
    "ppo": ppo,
}
