"""rlhf_kit.memory: estimates held against bytes really allocated on the CPU, and against arithmetic by hand."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import ppo_memory
import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache

from rlhf_kit import cli, memory, models, rewards

Zoo = dict[str, str]
LORA = {"r": 16}
SMALL = {"prompt_length": 16, "max_completion_length": 16, "on_gpu": False}  # the zoo's models have 64 positions
LLAMA = {"vocab_size": 128256, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA |= {"intermediate_size": 14336, "max_position_embeddings": 8192}
TINY = {"vocab_size": 200, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"intermediate_size": 160, "ffn_dim": 160, "word_embed_proj_dim": 64, "num_local_experts": 4}
ARCHITECTURES = ["Llama", "Qwen2", "Mistral", "Gemma2", "Mixtral", "GPT2", "OPT", "GPTNeoX"]


def config_of(architecture: str, sizes: dict[str, Any], layers: int = 2) -> Any:
    """The sizes that an architecture has no use for are left out."""
    kind = getattr(transformers, f"{architecture}Config")
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})} | set(kind.attribute_map)
    return kind(num_hidden_layers=layers, **{name: size for name, size in sizes.items() if name in known})


def settings(mode: str, **more: Any) -> dict[str, Any]:
    return {**SMALL, "lora": None if mode == "full" else LORA, "load_in_4bit": mode == "4bit", **more}


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


def as_bytes(gib: float) -> int:
    return round(gib * 2**30)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_to_the_byte_and_a_table_for_each_stage(architecture: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config_of(architecture, TINY)).save_pretrained(tmp_path)
    for four_bit, dtype in ((False, None), (True, None), (False, "bfloat16")):
        base = models.load_base(tmp_path, AutoModelForCausalLM.from_pretrained, four_bit, dtype=dtype)
        estimate = memory.estimate(tmp_path, "ppo", **SMALL, lora=LORA, load_in_4bit=four_bit, dtype=dtype)
        assert as_bytes(estimate.parts["base"]) == real_bytes(held(base))
        adapted = get_peft_model(base, models.lora_config(LORA))
        for role in ("policy", "reference", "value", "reward models"):
            assert as_bytes(estimate.parts[role]) == real_bytes(held(adapted, adapters=True))
        trained = 2 * adapted.get_nb_trainable_parameters()[0] + 64 + 1
        assert as_bytes(estimate.phases["backward"]["gradients"]) == 4 * trained
    whole, backbone = models.load_causal(tmp_path), models.load_backbone(tmp_path)
    parts = memory.estimate(tmp_path, "ppo", **SMALL, ensemble=2).parts
    assert as_bytes(parts["policy"]) == as_bytes(parts["reference"]) == real_bytes(held(whole))
    assert as_bytes(parts["value"]) == as_bytes(parts["reward models"] / 2) == real_bytes(held(backbone))
    assert as_bytes(parts["heads"]) == 4 * (64 + 1) + 2 * 4 * 64  # a value head with its bias, score heads
    config = config_of(architecture, {**TINY, "hidden_size": 1024, "head_dim": 256})
    for stage in memory.TRAINED:
        found = [memory.estimate(config, stage, **settings(mode, on_gpu=True)) for mode in ("4bit", "lora", "full")]
        totals = [f"{sum(phase.values()):.2f}" for phase in found[0].phases.values()]
        assert found[0].table().splitlines()[-1].split() == ["total", *totals]
        assert found[0].peak < found[1].peak < found[2].peak


def test_gradients_and_optimizer_to_the_byte(zoo: Zoo, mode: str) -> None:
    lora = None if mode == "full" else models.lora_config(LORA)
    roles = models.load_roles(zoo["full"], lora=lora, load_in_4bit=mode == "4bit")
    trained = [parameter for _, parameter in roles.trainable_parameters()]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    estimate = memory.estimate(zoo["full"], "ppo", **settings(mode))
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    assert as_bytes(estimate.phases["backward"]["gradients"]) == real_bytes(gradients)
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert as_bytes(estimate.parts["optimizer"]) == real_bytes(states)


def test_8_bit_adam_holds_two_bytes_and_its_block_scales(zoo: Zoo) -> None:
    model = models.load_causal(zoo["full"], trainable=True)
    embeddings = model.get_input_embeddings().weight
    trained = [parameter for parameter in model.parameters() if parameter is not embeddings]
    optimizer = bitsandbytes.optim.AdamW8bit(trained)
    for index, parameter in enumerate(trained):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    estimate = memory.estimate(zoo["full"], "sft", **settings("full", optim="paged_adamw_8bit"))
    real_states = real_bytes(states) + 8 * embeddings.numel()  # which transformers keeps in fp32
    assert as_bytes(estimate.parts["optimizer"]) == pytest.approx(real_states, rel=0.1, abs=2048 * len(trained))


def test_a_reward_model_trains_its_head_in_full(zoo: Zoo) -> None:
    model = models.load_base(zoo["full"], AutoModelForSequenceClassification.from_pretrained, True, num_labels=1)
    estimate = memory.estimate(zoo["full"], "reward_model", **settings("4bit"))
    assert as_bytes(estimate.parts["base"]) == real_bytes(held(model)) - 4 * 64
    assert as_bytes(estimate.parts["heads"]) == 2 * 4 * 64  # the head as it was and the copy that is trained


def test_an_adapter_directory_says_its_rank_and_its_bits(zoo: Zoo) -> None:
    named = memory.estimate(zoo["4bit"], "ppo", **SMALL)
    adapter = get_peft_model(models.load_causal(zoo["full"]), models.lora_config({"r": 4}))
    assert as_bytes(named.parts["policy"]) == real_bytes(held(adapter, adapters=True))
    assert named.parts["base"] == memory.estimate(zoo["full"], "ppo", **settings("4bit")).parts["base"]


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Gemma2"])
def test_kv_cache_to_the_byte(architecture: str) -> None:
    config = config_of(architecture, TINY)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config)
        model(input_ids=torch.ones(5, 32, dtype=torch.long), past_key_values=cache, use_cache=True)
    phases = memory.estimate(config, "ppo", **settings("full", rollout=5)).phases
    real_cache = real_bytes(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert as_bytes(phases["generate"]["KV cache"]) == real_cache
    assert as_bytes(phases["prefill"]["KV cache"]) == real_cache // 2  # half of the tokens are the prompt's


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["pocket", "llama-30m --rollout 2"])
def test_measured_peaks_are_within_a_quarter(shape: str, mode: str, tmp_path: Path) -> None:
    """Every stage runs whole, through the kit's own functions; each shape and each mode once without checkpointing."""
    places = ["--scratch", str(tmp_path / "scratch"), "--out", str(tmp_path / "out")]
    keeps_all = ["--no-checkpointing"] if (shape == "pocket") == (mode == "lora") else []
    table = ppo_memory.main(["--shape", *shape.split(), "--mode", mode, *keeps_all, *places])
    assert set(table["stage"]) == set(memory.TRAINED)
    assert table["ratio"].between(0.75, 1.25).all(), table[["stage", "estimate_gib", "measured_gib", "load_gib"]]
    [figure] = (tmp_path / "out" / "figures").glob("*.png")
    assert figure.stat().st_size > 10_000 and (tmp_path / "out" / "summary.csv").is_file()


def test_measure_counts_what_is_alive_together() -> None:
    with ppo_memory.measure() as measured:
        first = torch.empty(2**20, dtype=torch.uint8)
        second = torch.empty(2**21, dtype=torch.uint8)
        del first
        third = torch.empty(2**19, dtype=torch.uint8)
    assert measured.gib * 2**30 == pytest.approx(2**20 + 2**21, rel=1e-3)
    assert len(second) > len(third)


def test_scoring_batches_and_ram_are_the_real_ones() -> None:
    assert (memory.SCORED_ROWS, memory.SCORED_TOKENS) == (rewards.BATCH_ROWS, rewards.BATCH_TOKENS)
    kib = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert memory.device_memory() == pytest.approx(kib / 2**20, rel=0.01)


def test_what_is_no_causal_lm_or_no_stage_is_refused() -> None:
    for wrong, words in (
        ({"model": transformers.T5Config()}, "model type 't5'"),
        ({"model": transformers.MambaConfig(num_hidden_layers=2)}, "model type 'mamba'"),
        ({"model": config_of("Llama", LLAMA | {"num_key_value_heads": 0})}, "no causal LM of this config"),
        ({"model": config_of("Llama", LLAMA | {"hidden_size": 0})}, "no hidden_size"),
        ({"model": config_of("Llama", LLAMA, layers=0), "lora": LORA}, "no num_hidden_layers"),
        ({"stage": "grpo"}, "sft"),
        ({"rollout": 0}, "rollout"),
        ({"prompt_length": 9000}, "8192 positions"),
        ({"load_in_4bit": True}, "lora"),
        ({"optim": "sgd"}, "AdamW"),
    ):
        with pytest.raises(ValueError, match=words):
            memory.estimate(**{"model": config_of("Llama", LLAMA), "stage": "sft", **wrong})  # type: ignore[arg-type]


def test_llama_8b_in_four_roles_by_hand() -> None:
    config, way = config_of("Llama", LLAMA, layers=32), {"lora": LORA, "load_in_4bit": True, "on_gpu": True}
    estimate = memory.estimate(config, "ppo", **way)
    assert estimate.parts["base"] == pytest.approx(5.3, abs=0.05)
    assert as_bytes(estimate.phases["backward"]["gradients"]) == 4 * (2 * 41_943_040 + 4097)
    assert estimate.parts["policy"] == pytest.approx(4 * 41_943_040 / 2**30)  # fp32, as peft keeps it
    static = [gib for part, gib in estimate.phases["backward"].items() if part not in ("activations", "dequantisation")]
    assert sum(static) == pytest.approx(6.7, abs=0.25)
    assert estimate.phases["generate"]["KV cache"] == pytest.approx(8 * 1024 * 128 / 2**20)  # 128 KiB a token
    apart = memory.estimate(config, "ppo", **way, reward_model=config_of("Llama", LLAMA, layers=32), ensemble=3).parts
    without_output = estimate.parts["base"] - 2 * 128256 * 4096 / 2**30  # scored without its lm_head, which is bf16
    assert apart["reward models"] == pytest.approx(3 * (without_output + 4 * 41_943_040 / 2**30), rel=1e-4)


def test_each_setting_turned_up_never_needs_less() -> None:
    start = {"lora": LORA, "load_in_4bit": True, "activation_checkpointing": True, "optim": "paged_adamw_8bit"}
    start |= {"prompt_length": 128, "max_completion_length": 128, "rollout": 8, "micro_batch_size": 2, "ensemble": 1}
    more = {"lora": {"r": 64}, "load_in_4bit": False, "activation_checkpointing": False, "optim": "adamw_torch_fused"}
    more |= {"prompt_length": 512, "max_completion_length": 512, "rollout": 16, "micro_batch_size": 16, "ensemble": 4}
    config = config_of("Llama", TINY)
    less = memory.estimate(config, "ppo", on_gpu=True, **start).phases
    for setting, value in more.items():
        found = memory.estimate(config, "ppo", on_gpu=True, **{**start, setting: value}).phases
        assert all(sum(less[phase].values()) <= sum(found[phase].values()) for phase in less) and less != found, setting


def test_the_first_change_named_makes_it_fit(zoo: Zoo) -> None:
    config, checkpointing = config_of("Llama", LLAMA, layers=4), "activation_checkpointing=True"
    start = {"lora": LORA, "load_in_4bit": True, "on_gpu": True, "micro_batch_size": 8}
    start["activation_checkpointing"] = False
    fits, before, sentence = memory.advise(config, "sft", 8, **start)
    assert not fits and f"Change first: {checkpointing}" in sentence
    fits, after, _ = memory.advise(config, "sft", 8, **{**start, "activation_checkpointing": True})
    assert fits and f"{after.peak:6.1f} GiB fits  {checkpointing}" in sentence
    assert all(float(line.split()[0]) <= before.peak for line in sentence.splitlines()[2:])
    assert "No setting helps" in memory.advise(config, "sft", 2, **start)[2]
    _, _, sentence = memory.advise(config, "sft", 4, on_gpu=True)
    assert 'lora={"r": 16}, load_in_4bit=True' in sentence and "all of these" in sentence
    _, _, sentence = memory.advise(zoo["lora"], "dpo", 0.79, **SMALL)  # what is kept in reserve leaves half a MiB
    assert "  load_in_4bit=True" in sentence and "lora=" not in sentence


def test_the_command_prints_parts_peak_and_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config_of("Llama", LLAMA, layers=2).save_pretrained(tmp_path)  # no weights
    command = ["memory", str(tmp_path), "--stage", "sft", "--no-checkpointing", "--gpu"]
    in_fp32 = (["--full"], ["--no-4bit", "--dtype", "float32"])
    for way in ([], ["--no-4bit"], *in_fp32):
        assert cli.main([*command, "80", *way]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"frozen in {'float32' if way in in_fp32 else 'bfloat16'})" in lines[-1]
        assert lines[0].split() == ["GiB", "forward", "backward"] and lines[-1].startswith("It fits: ")
        rows = {line[:18].strip(): [float(cell) for cell in line[18:].split()] for line in lines[1:-2]}
        for i, total in enumerate(rows.pop("total")):
            assert total == pytest.approx(sum(cells[i] for cells in rows.values()), abs=0.05)
    assert cli.main([*command, "2"]) == 0
    assert "It does not fit" in capsys.readouterr().out


def test_wrong_uses_of_the_command(zoo: Zoo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(tmp_path)], ["config.json"]),
        ([zoo["full"], "--full", "--4bit"], ["--full", "--4bit"]),
        ([zoo["4bit"], "--full"], ["--full", "adapter"]),
    ):
        assert cli.main(["memory", *arguments]) == 2, arguments
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert message.startswith("rlhf-kit: ") and all(word in message for word in words), message
    for option, least in (("--lora", "1"), ("--gpu", "0.1")):
        with pytest.raises(SystemExit):
            cli.main(["memory", zoo["full"], option, "0"])
        assert f"argument {option}: 0: give a number from {least} to" in capsys.readouterr().err
    with pytest.raises(ValueError, match="a GPU of 0 GiB: give its memory, for example 12"):
        memory.advise(zoo["full"], "sft", 0)
