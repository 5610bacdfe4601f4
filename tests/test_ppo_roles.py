"""Four roles over one base: held once, switched without loss, and the same numbers as models that stand alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_ppo import PROMPTS, Zoo, make, rolled_out, rows_of, same, updates, vowels, weights
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_kit import models, train
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.rewards import Ensemble, RewardModel

ADAPTERS = pytest.mark.parametrize("mode", ["lora", "4bit"])
TEXTS = [" the river .", " i will not help .", "", " leaves", " at dawn . at dawn .", " no", " by the sea", " yes ."]


def held(*modules: nn.Module) -> int:
    """Bytes of the distinct storages of weights that modules hold."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.fixture(scope="module")
def rewards(zoo: Zoo, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Three reward adapters over the zoo's base for each mode."""
    names = {f"{mode}-{seed}": (mode == "4bit", seed) for mode in ("lora", "4bit") for seed in range(3)}
    root = tmp_path_factory.mktemp("rewards")
    return {name: tiny.save_adapter(root / name, zoo["full"], tokenizer, *how, True) for name, how in names.items()}


@ADAPTERS
def test_the_base_is_held_once_whatever_stands_on_it(zoo: Zoo, mode: str, rewards: Zoo, tmp_path: Path) -> None:
    """Policy, reference, value and k reward models cost one base and 3 + k adapters, to the byte."""
    base = models.load_causal(zoo["full"], load_in_4bit=mode == "4bit")
    head = 4 * (base.config.hidden_size + 1)
    saved = load_file(Path(zoo[mode]) / "adapter_model.safetensors")
    adapter = sum(4 * tensor.numel() for name, tensor in saved.items() if "lora" in name)
    for k in (1, 3):
        trainer = make(zoo, mode, tmp_path, reward=[rewards[f"{mode}-{i}"] for i in range(k)])
        members = trainer.reward.members if k > 1 else [trainer.reward]
        assert held(trainer.roles, *(each.backbone() for each in members)) == held(base) + (3 + k) * adapter + head
        assert [role for role in trainer.roles.parts if role.startswith("reward")] == [f"reward_{i}" for i in range(k)]


@pytest.mark.slow
def test_stages_chain_onto_one_base(zoo: Zoo, tmp_path: Path) -> None:
    """SFT adapter -> reward adapter that starts from it -> PPO over the same 4-bit base, as README shows it."""
    rows = [{"prompt": prompt, "completion": " it lives by the river ."} for prompt in PROMPTS]
    pairs = [{"prompt": p, "chosen": f" yes , the {i} .", "rejected": f" no {i}"} for i, p in enumerate(PROMPTS)]
    few = {"max_steps": 1, "per_device_train_batch_size": 2, "max_length": 48}
    sft = train.sft(zoo["full"], Dataset.from_list(rows), tmp_path / "sft", lora={"r": 4}, load_in_4bit=True, **few)
    reward = train.reward_model(sft, Dataset.from_list(pairs), tmp_path / "reward", **few)
    args = PPOConfig(output_dir=str(tmp_path / "ppo"), max_steps=1, per_device_train_batch_size=2, micro_batch_size=1)
    args.max_completion_length, args.gradient_checkpointing = 6, True
    trainer = PPOTrainer(sft, reward, args, Dataset.from_list(rows), callbacks=[])
    assert set(trainer.roles.parts) == {"policy", "reference", "value", "reward_0"} and len(trainer.roles.models) == 1
    assert trainer.policy.get_base_model().is_loaded_in_4bit
    trainer.train()
    trainer.save_model(str(tmp_path / "ppo" / "model"))
    assert models.loading.base_of(tmp_path / "ppo" / "model") == zoo["full"]


@ADAPTERS
def test_a_reward_on_the_shared_base_acts_as_one_alone(zoo: Zoo, mode: str, rewards: Zoo, tmp_path: Path) -> None:
    """With the reward as a fourth adapter an update is the one that a separate reward model gives, bit for bit."""
    alone = RewardModel(rewards[f"{mode}-0"])
    expected = alone(PROMPTS, TEXTS)
    ends = []
    for separate in (False, True):
        trainer = make(zoo, mode, tmp_path, reward=rewards[f"{mode}-0"], value_model=rewards[f"{mode}-1"])
        trainer.reward = alone if separate else trainer.reward
        assert trainer.reward(PROMPTS, TEXTS) == expected
        trainer.train()
        assert trainer.reward(PROMPTS, TEXTS) == expected  # policy and value have learned, the reward has not
        assert not [n for n, p in trainer.roles.named_parameters() if ".reward_0." in n and p.requires_grad]
        ends.append(weights(trainer))
    assert same(*ends)
    texts = list(trainer.samples["completion"])
    assert list(trainer.samples["reward"]) == pytest.approx(alone(list(trainer.samples["prompt"]), texts))


def test_a_reward_on_another_base_keeps_its_own_weights(zoo: Zoo, rewards: Zoo, tmp_path: Path) -> None:
    in_bf16 = shutil.copytree(rewards["lora-0"], tmp_path / "bf16")
    models.write_notes(in_bf16, dtype="bfloat16")
    for other in (zoo["full-reward"], rewards["4bit-0"], in_bf16):
        trainer = make(zoo, "lora", tmp_path, reward=other)
        assert set(trainer.roles.parts) == {"policy", "reference", "value"}
        assert trainer.rewards(rows_of(PROMPTS), rolled_out(trainer)[0].tokens)["reward"].notna().all()


def test_an_ensemble_holds_models_and_functions(zoo: Zoo, rewards: Zoo, tmp_path: Path) -> None:
    members = [RewardModel(rewards["lora-0"]), RewardModel(rewards["lora-1"]), vowels]
    each = torch.tensor([member(PROMPTS, TEXTS) for member in members])
    smallest = make(zoo, "lora", tmp_path, reward=Ensemble(members, "min"), max_steps=1)
    assert smallest.reward(PROMPTS, TEXTS) == pytest.approx(each.min(0).values.tolist())
    trainer = make(zoo, "lora", tmp_path, reward=[rewards["lora-0"], rewards["lora-1"], vowels], max_steps=1)
    assert trainer.reward(PROMPTS, TEXTS) == pytest.approx(each.mean(0).tolist())
    trainer.train()
    samples = (list(trainer.samples["prompt"]), list(trainer.samples["completion"]))
    scores = torch.tensor([member(*samples) for member in members])
    assert updates(trainer)[0]["disagreement"] == pytest.approx(scores.std(0).mean().item(), rel=1e-4)
    for given, how in (([vowels], "mean"), ([vowels, vowels], "max")):
        with pytest.raises(ValueError, match="the mean or the min of two or more"):
            Ensemble(given, how)


def test_bf16_is_honoured_and_heads_stay_in_fp32(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, reward=zoo["full-reward"], bf16=True, use_cpu=True, max_steps=1)
    seen: dict[str, set[torch.dtype]] = {"layer": set(), "head": set()}
    for name, module in (("layer", trainer.policy.model.layers[0].mlp.down_proj), ("head", trainer.roles.value_head)):
        module.register_forward_hook(lambda module, inputs, output, name=name: seen[name].add(output.dtype))
    trainer.train()
    assert seen == {"layer": {torch.bfloat16}, "head": {torch.float32}}
    assert {p.dtype for p in trainer.roles.parameters()} == {torch.float32}
    assert updates(trainer)[0]["first_ratio_deviation"] == 0


def test_a_run_that_would_not_fit_is_refused_before_it_loads(
    zoo: Zoo, rewards: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"micro_batch_size": 8, "optim": "adamw_torch"}
    make(zoo, "lora", tmp_path, reward=vowels, max_memory_gib=2.0, **args)
    loaded = []
    monkeypatch.setattr(models, "load_roles", lambda *a, **k: loaded.append(a))
    with pytest.raises(ValueError, match="does not fit: .* GiB at the peak(.|\n)*micro_batch_size=1") as refused:
        make(zoo, "lora", tmp_path, reward=rewards["lora-0"], max_memory_gib=0.79, **args)
    assert "max_memory_gib" in str(refused.value) and not loaded
