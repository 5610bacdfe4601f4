"""rlhf_kit.memory: estimates held against bytes really allocated on the CPU, and against arithmetic by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pandas as pd
import pytest
import torch
from peft import get_peft_model
from tiny import in_a_new_process
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from rlhf_kit import cli, memory, models
from rlhf_kit.models import Tokens, completion_hidden, completion_logprobs, decoder, load_base, load_causal, lora

Zoo = dict[str, str]
GIB = 2**30
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    tie_word_embeddings=False,
)
SMALL = {"prompt_length": 16, "max_completion_length": 16, "on_gpu": False}  # the zoo's models have 64 positions
QLORA = {"lora": lora(), "load_in_4bit": True, "on_gpu": True}


def real_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each block of memory once."""
    blocks = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(blocks.values())


def held(model: torch.nn.Module, adapters: bool = False) -> Iterator[torch.Tensor]:
    """Parameters and buffers of a model, its adapters or the rest; of 4-bit weights all of their quant_state."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ("lora_" in name) == adapters:
            yield tensor
            if isinstance(tensor, bitsandbytes.nn.Params4bit):
                state = tensor.quant_state
                yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def settings(mode: str, **more: Any) -> dict[str, Any]:
    return {**SMALL, "lora": None if mode == "full" else lora(), "load_in_4bit": mode == "4bit", **more}


def real(zoo: Zoo, mode: str, auto: Any = AutoModelForCausalLM) -> Any:
    base = load_base(zoo["full"], auto.from_pretrained, mode == "4bit")
    return base if mode == "full" else get_peft_model(base, lora(), adapter_name="policy")


def as_bytes(gib: float) -> int:
    return round(gib * GIB)


# Static parts, to the byte ---


@pytest.mark.parametrize("mode", ["full", "lora", "4bit"])
def test_parameters_to_the_byte(zoo: Zoo, mode: str) -> None:
    model = real(zoo, mode)
    estimate = memory.estimate(zoo["full"], "ppo", **settings(mode))
    assert as_bytes(estimate.static["base"]) == real_bytes(held(model))
    if mode == "full":
        backbone = models.load_backbone(zoo["full"])
        assert as_bytes(estimate.static["reference"]) == real_bytes(held(model))
        assert as_bytes(estimate.static["value model"]) == real_bytes(held(backbone))
        assert as_bytes(estimate.static["reward models"]) == real_bytes(held(backbone))
        assert estimate.static["adapters"] == 0
    else:
        for role in ("reference", "value", "reward"):
            model.add_adapter(role, model.peft_config["policy"])
        assert as_bytes(estimate.static["adapters"]) == real_bytes(held(model, adapters=True))
        assert estimate.static["reference"] == estimate.static["value model"] == estimate.static["reward models"] == 0
    assert as_bytes(estimate.static["heads"]) == 4 * (64 + 1) + 4 * 64  # a value head with its bias, a score head


@pytest.mark.parametrize("mode", ["full", "lora", "4bit"])
def test_gradients_and_optimizer_to_the_byte(zoo: Zoo, mode: str) -> None:
    roles = models.load_roles(zoo["full"], lora=None if mode == "full" else lora(), load_in_4bit=mode == "4bit")
    trained = [parameter for _, parameter in roles.trainable_parameters()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    estimate = memory.estimate(zoo["full"], "ppo", **settings(mode))
    assert estimate.trained_parameters == sum(parameter.numel() for parameter in trained)
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert as_bytes(estimate.phases["optimise"]["gradients"]) == real_bytes(gradients)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert as_bytes(estimate.static["optimizer"]) == real_bytes(states)


def test_8_bit_adam_holds_two_bytes_and_its_block_scales(zoo: Zoo) -> None:
    model = load_causal(zoo["full"], trainable=True)
    embeddings = model.get_input_embeddings().weight
    trained = [parameter for parameter in model.parameters() if parameter is not embeddings]
    optimizer = bitsandbytes.optim.AdamW8bit(trained)
    for group, parameters in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(parameters["params"]):
            parameter.grad = torch.zeros_like(parameter)
            optimizer.init_state(parameters, parameter, group, index)
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    shared = {t.data_ptr() for state in optimizer.state.values() for name, t in state.items() if "qmap" in name}
    estimate = memory.estimate(zoo["full"], "sft", **settings("full", optim="paged_adamw_8bit"))
    real_states = real_bytes(states) + 8 * embeddings.numel()  # which transformers keeps in fp32
    assert as_bytes(estimate.static["optimizer"]) == pytest.approx(real_states, rel=0.1, abs=2048 * len(trained))
    assert as_bytes(estimate.static["optimizer"]) < 0.5 * 8 * estimate.trained_parameters + 8 * embeddings.numel()
    assert shared


def test_a_reward_model_trains_its_head_in_full(zoo: Zoo) -> None:
    model = load_base(zoo["full"], AutoModelForSequenceClassification.from_pretrained, True, num_labels=1)
    estimate = memory.estimate(zoo["full"], "reward_model", **settings("4bit"))
    scores = 2 * 4 * 64  # the head as it was and the copy that is trained
    assert as_bytes(estimate.static["base"]) == real_bytes(held(model)) - 4 * 64
    assert as_bytes(estimate.static["heads"]) == scores
    adapters = get_peft_model(load_base(zoo["full"], AutoModelForCausalLM.from_pretrained, False), lora())
    assert estimate.trained_parameters == adapters.get_nb_trainable_parameters()[0] + 64


def test_an_adapter_directory_says_its_rank_and_its_bits(zoo: Zoo) -> None:
    named = memory.estimate(zoo["4bit"], "dpo", **SMALL)
    by_hand = memory.estimate(zoo["full"], "dpo", **SMALL, lora=lora(r=4), load_in_4bit=True)
    assert named == by_hand


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_kv_cache_to_the_byte(architecture: str) -> None:
    config = wide(architecture, layers=2)
    config.vocab_size = 50_000  # so that the peak lies where a token is sampled, and the cache is whole
    model = AutoModelForCausalLM.from_config(config)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(input_ids=torch.ones(5, 32, dtype=torch.long), past_key_values=cache, use_cache=True)
    phases = memory.estimate(config, "ppo", **settings("full", rollout=5)).phases
    real_cache = real_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert as_bytes(phases["generate"]["KV cache"]) == real_cache
    assert as_bytes(phases["prefill"]["KV cache"]) == real_cache // 2  # half of the tokens are the prompt's


# Activations, against torch's own count of a real step ---


def wide(architecture: str, layers: int) -> PreTrainedConfig:
    """Large enough that what is left out (kernels' own workspaces, Python's small tensors) does not matter."""
    if architecture == "gpt2":
        return GPT2Config(vocab_size=600, n_embd=128, n_layer=layers, n_head=4, n_positions=256)
    return LlamaConfig(
        vocab_size=600,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )


def tokens(rows: int, padded: bool) -> Tokens:
    ids = torch.randint(2, 600, (rows, 192))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    return Tokens(ids, mask, torch.ones(rows, 64, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_activations_of_a_real_step_within_five_percent(architecture: str, checkpointing: bool, rows: int) -> None:
    config = wide(architecture, layers=6)
    policy: Any = get_peft_model(AutoModelForCausalLM.from_config(config), lora(), adapter_name="policy")
    policy.add_adapter("value", policy.peft_config["policy"])
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    inner = policy.get_base_model()
    if checkpointing:
        inner.activation_checkpointing_enable({"use_reentrant": False})
    policy.train()
    head = torch.nn.Linear(128, 1)
    for adapter in ("policy", "value"):
        policy.set_adapter(adapter)
        for parameter in policy.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else parameter.grad
    batch = tokens(rows, padded=rows > 1)
    with memory.measure("cpu") as measured:
        policy.set_adapter("policy")
        logprobs, _ = completion_logprobs(policy, batch)
        logprobs.sum().backward()
        del logprobs
        policy.set_adapter("value")
        head(completion_hidden(decoder(policy), batch)).sum().backward()
    estimate = memory.estimate(
        config,
        "ppo",
        lora=lora(),
        prompt_length=128,
        max_completion_length=64,
        micro_batch_size=rows,
        gradient_checkpointing=checkpointing,
        on_gpu=False,
    )
    added = estimate.phases["optimise"]
    assert added["activations"] + added["logits"] == pytest.approx(measured.gib, rel=0.05)


def test_what_autograd_saves_is_counted(zoo: Zoo) -> None:
    """By hooks: the distinct blocks that a forward pass saves, but parameters, are most of the estimate."""
    config = wide("llama", layers=3)
    model = AutoModelForCausalLM.from_config(config).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs, _ = completion_logprobs(model, tokens(2, padded=True))
    del logprobs
    lengths = {"prompt_length": 128, "max_completion_length": 64, "micro_batch_size": 2, "on_gpu": False}
    added = memory.estimate(config, "ppo", gradient_checkpointing=False, **lengths).phases["optimise"]
    assert real_bytes(saved.values()) == pytest.approx(as_bytes(added["activations"] + added["logits"]), rel=0.15)
    assert real_bytes(saved.values()) < as_bytes(added["activations"] + added["logits"])


def test_measure_counts_what_is_alive_together() -> None:
    with memory.measure("cpu") as measured:
        first = torch.empty(2**20, dtype=torch.uint8)
        second = torch.empty(2**21, dtype=torch.uint8)
        del first
        third = torch.empty(2**19, dtype=torch.uint8)
    assert measured.gib * GIB == pytest.approx(2**20 + 2**21, rel=1e-3)
    assert len(second) > len(third)


def test_device_memory_of_a_cpu_is_its_ram() -> None:
    kib = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert memory.device_memory("cpu") == pytest.approx(kib * 1024 / GIB, rel=0.01)


# An 8B model by hand ---


@pytest.mark.slow
def test_llama_8b_in_four_roles_by_hand() -> None:
    estimate = memory.estimate(LLAMA_8B, "ppo", **QLORA)
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    embeddings = 2 * 2 * 128256 * 4096  # input and output, bf16
    nf4 = linears * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert embeddings / GIB == pytest.approx(1.96, abs=0.01)
    assert estimate.static["base"] == pytest.approx((nf4 + embeddings) / GIB, rel=1e-3)
    assert estimate.static["base"] == pytest.approx(5.3, abs=0.05)
    of_layer = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14336)] * 3]
    adapter = 32 * sum(16 * (n + m) for n, m in of_layer)
    assert adapter == 41_943_040
    assert estimate.trained_parameters == 2 * adapter + 4097
    assert estimate.static["adapters"] == pytest.approx(4 * 4 * adapter / GIB)  # four roles, fp32 as peft keeps them
    assert estimate.static["optimizer"] == pytest.approx(2 * 8 * adapter / GIB, rel=1e-3)
    assert estimate.phases["optimise"]["gradients"] == pytest.approx(2 * 4 * adapter / GIB, rel=1e-3)
    static = sum(estimate.static.values()) + estimate.phases["optimise"]["gradients"]
    assert static == pytest.approx(6.7, abs=0.25)
    assert estimate.phases["generate"]["KV cache"] == pytest.approx(8 * 1024 * 128 / 2**20, rel=2e-3)  # 128 KiB a token


@pytest.mark.slow
def test_a_reward_model_on_another_base_costs_that_base() -> None:
    shared = memory.estimate(LLAMA_8B, "ppo", **QLORA)
    other = memory.estimate(LLAMA_8B, "ppo", **QLORA, reward_model=LlamaConfig(**LLAMA_8B.to_dict()))
    adapter = shared.static["adapters"] / 4
    without_output = shared.static["base"] - 2 * 128256 * 4096 / GIB  # scored without its lm_head
    assert other.static["reward models"] == pytest.approx(without_output + adapter, rel=1e-4)
    assert other.static["adapters"] == pytest.approx(3 * adapter)
    three = memory.estimate(LLAMA_8B, "ppo", **QLORA, ensemble=3)
    assert three.static["adapters"] == pytest.approx(6 * adapter)
    assert three.static["base"] == shared.static["base"]


# Knobs, advice, mistakes ---

KNOBS: dict[str, list[dict[str, Any]]] = {
    "prompt_length": [{"prompt_length": n} for n in (128, 256, 512)],
    "max_completion_length": [{"max_completion_length": n} for n in (128, 256, 512)],
    "rollout": [{"rollout": n} for n in (2, 8, 32)],
    "micro_batch_size": [{"micro_batch_size": n} for n in (1, 4, 16)],
    "gradient_checkpointing": [{"gradient_checkpointing": on} for on in (True, False)],
    "rank": [{"lora": lora(r=r)} for r in (4, 16, 64)],
    "optim": [{"optim": name} for name in ("paged_adamw_8bit", "adamw_torch_fused")],
    "bits": [{"load_in_4bit": True}, {"load_in_4bit": False}],
    "ensemble": [{"ensemble": k} for k in (1, 3)],
}


@pytest.mark.slow
@pytest.mark.parametrize("knob", KNOBS)
def test_each_knob_turned_up_never_needs_less(knob: str) -> None:
    config = wide("llama", layers=4)
    config.max_position_embeddings = 1024
    common = {"lora": lora(), "load_in_4bit": True, "gradient_checkpointing": False, "on_gpu": True}
    totals = []
    for change in KNOBS[knob]:
        estimate = memory.estimate(config, "ppo", **{**common, "micro_batch_size": 8, **change})
        totals.append([sum(estimate.static.values()) + sum(parts.values()) for parts in estimate.phases.values()])
        assert estimate.peak == max(totals[-1])
    for less, more in zip(totals, totals[1:], strict=False):
        assert all(a <= b for a, b in zip(less, more, strict=True)) and less != more


@pytest.mark.slow
def test_the_first_knob_named_makes_it_fit(zoo: Zoo) -> None:
    tight = memory.advise(LLAMA_8B, "sft", 24, **QLORA, micro_batch_size=8, gradient_checkpointing=False)
    assert not tight.fits and tight.knob is not None
    named = next(turn for turn in tight.turns if turn.knob == tight.knob)
    changed = {"gradient_checkpointing=True": {"gradient_checkpointing": True}}
    changed["per_device_train_batch_size=1"] = {"micro_batch_size": 1}
    start = {**QLORA, "micro_batch_size": 8, "gradient_checkpointing": False}
    mended = memory.advise(LLAMA_8B, "sft", 24, **{**start, **changed[tight.knob]})
    assert mended.fits and mended.estimate == named.estimate
    earlier = tight.turns[: tight.turns.index(named)]
    assert not any(turn.fits for turn in earlier)
    assert memory.advise(LLAMA_8B, "sft", 80, **QLORA).fits
    adapter = memory.advise(zoo["lora"], "dpo", 0.79, **SMALL)  # what is kept in reserve leaves half a MiB
    assert not adapter.fits and "load_in_4bit=True" in {turn.knob for turn in adapter.turns}
    assert not any("lora" in turn.knob for turn in adapter.turns)  # it is one already
    hopeless = memory.advise(LLAMA_8B, "sft", 4, **QLORA)
    assert hopeless.knob is None and hopeless.turns[-1].knob == "all of these"


def test_settings_that_make_no_stage_are_refused() -> None:
    config = wide("llama", layers=2)
    for wrong, words in (
        ({"stage": "grpo"}, "sft"),
        ({"rollout": 0}, "rollout"),
        ({"prompt_length": 300}, "256 positions"),
        ({"load_in_4bit": True}, "lora"),
        ({"optim": "sgd"}, "AdamW"),
    ):
        arguments: dict[str, Any] = {"stage": "sft", "prompt_length": 64, "max_completion_length": 64, **wrong}
        with pytest.raises(ValueError, match=words):
            memory.estimate(config, **arguments)


def test_the_callers_settings_stay_as_they_were() -> None:
    settings = lora()
    for stage in memory.STAGES:
        memory.estimate(wide("llama", layers=2), stage, lora=settings, prompt_length=64, max_completion_length=64)
        assert settings.target_modules == "all-linear", stage


# The command ---


@pytest.mark.slow
def test_the_command_prints_parts_peak_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LLAMA_8B.save_pretrained(tmp_path)  # an architecture: no weights
    small = ["--prompt", "512", "--completion", "512", "--rollout", "8"]
    assert cli.main(["memory", str(tmp_path), "--stage", "ppo", "--gpu", "24", *small]) == 0
    out = capsys.readouterr().out
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines() if line[:1].isalpha()}
    assert rows["GiB"] == ["prefill", "generate", "score", "optimise"]
    assert rows["base"] == ["5.31"] * 4
    columns = [[float(cells[i]) for name, cells in rows.items() if name in memory.PARTS] for i in range(4)]
    for total, parts in zip(rows["total"], columns, strict=True):
        assert float(total) == pytest.approx(sum(parts), abs=0.05)
    peak = max(float(total) for total in rows["total"])
    assert f"It fits: {peak:.1f} GiB at the peak" in out

    assert cli.main(["memory", str(tmp_path), "--stage", "sft", "--gpu", "12", "--no-checkpointing"]) == 0
    out = capsys.readouterr().out
    assert "It does not fit" in out and "Turn first: gradient_checkpointing=True" in out


def test_wrong_uses_of_the_command(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing").mkdir()
    wrong_uses = {
        "no model": ([str(tmp_path / "nothing")], ["nothing", "config.json"]),
        "hub id offline": (["someone/some-model"], ["someone/some-model"]),
        "too long": ([zoo["full"]], ["prompt_length=512", "64 positions"]),
        "4 bits in full": ([zoo["full"], "--full", "--4bit"], ["--full", "--4bit"]),
        "no GPU so small": ([zoo["full"], "--gpu", "0", "--prompt", "8", "--completion", "8"], ["GPU", "12"]),
        "an adapter in full": ([zoo["4bit"], "--full"], ["--full", "adapter"]),
        "no rank": ([zoo["full"], "--lora", "0"], ["--lora 0", "at least 1"]),
        "no rollout": ([zoo["full"], "--rollout", "0"], ["rollout", "at least 1"]),
    }
    for name, (arguments, words) in wrong_uses.items():
        assert cli.main(["memory", *arguments]) == 2, name
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("rlhf-kit: ") and "Traceback" not in message, name
        assert all(word in message for word in words), (name, message)


# The whole ---


@pytest.mark.slow
def test_4_bit_models_load_after_an_estimate(zoo: Zoo) -> None:
    """bitsandbytes keeps a code book for the whole process; one from the meta device would spoil every real load."""
    script = """
import json, sys, torch
from rlhf_kit import memory, models
torch.set_num_threads(1)
path = json.loads(sys.argv[1])
memory.estimate(path, "sft", lora=models.lora(), load_in_4bit=True, prompt_length=16, max_completion_length=16)
model = models.load_causal(path, load_in_4bit=True)
print("ANSWERS", json.dumps(model(input_ids=torch.tensor([[3, 4, 5]])).logits.isfinite().all().item()))
"""
    assert in_a_new_process(script, zoo["full"]) is True


@pytest.mark.slow
def test_the_experiment_measures_what_was_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parent.parent / "experiments" / "ppo_memory.py"
    spec = importlib.util.spec_from_file_location("ppo_memory", path)
    assert spec is not None and spec.loader is not None
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    table = experiment.main(["--shape", "tiny", "--scratch", str(tmp_path / "scratch"), "--out", str(tmp_path / "out")])
    assert set(table["stage"]) == {"sft", "reward_model", "dpo", "ppo"}
    assert table["ratio"].between(0.85, 1.15).all(), table
    assert table["measured_gib"].gt(0).all() and table["torch"].notna().all() and table["device"].notna().all()
    written = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert (written["ratio"] * written["measured_gib"] - written["estimate_gib"]).abs().max() < 1e-9
    [figure] = (tmp_path / "out" / "figures").glob("*.png")
    assert figure.stat().st_size > 10_000
