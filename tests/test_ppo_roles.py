"""Four roles over one base: held once, switched without loss, and the same numbers as models that stand alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from test_ppo import PROMPTS, Zoo, make, rolled_out, rows_of, updates, vowels
from transformers import PreTrainedTokenizerBase

from rlhf_kit import models, train
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.rewards import Ensemble, RewardModel

ADAPTERS = ["lora", "4bit"]
TEXTS = [" the river .", " i will not help .", "", " leaves", " at dawn . at dawn .", " no", " by the sea", " yes ."]


def held(trainer: PPOTrainer) -> dict[int, int]:
    """Bytes of every distinct storage of weights that a trainer holds, its reward models' included."""
    members = trainer.reward.members if isinstance(trainer.reward, Ensemble) else [trainer.reward]
    modules = [trainer.roles, *(m.backbone() for m in members if isinstance(m, RewardModel))]
    weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights}


def adapter_bytes(directory: str) -> int:
    """fp32 bytes of a LoRA adapter as it lies on the disk, its head left out."""
    from safetensors.torch import load_file

    tensors = load_file(Path(directory) / "adapter_model.safetensors")
    return sum(4 * tensor.numel() for name, tensor in tensors.items() if "lora" in name)


@pytest.fixture(scope="module")
def rewards(zoo: Zoo, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Three reward adapters over the zoo's base for each mode."""
    root = tmp_path_factory.mktemp("rewards")
    return {
        f"{mode}-{seed}": tiny.save_adapter(
            root / f"{mode}-{seed}", zoo["full"], tokenizer, mode == "4bit", seed, score=True
        )
        for mode in ADAPTERS
        for seed in range(3)
    }


@pytest.mark.parametrize("mode", ADAPTERS)
def test_the_base_is_held_once_whatever_stands_on_it(zoo: Zoo, mode: str, rewards: Zoo, tmp_path: Path) -> None:
    """Policy, reference, value and k reward models cost one base and 3 + k adapters, to the byte."""
    base = models.load_causal(zoo["full"], load_in_4bit=mode == "4bit")
    alone = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*base.parameters(), *base.buffers())
    }
    policy = adapter_bytes(zoo[mode])
    for k in (1, 3):
        trainer = make(zoo, mode, tmp_path / str(k), reward=[rewards[f"{mode}-{i}"] for i in range(k)])
        head = 4 * (base.config.hidden_size + 1)
        assert sum(held(trainer).values()) == sum(alone.values()) + (3 + k) * policy + head
        assert [role for role in trainer.roles.parts if role.startswith("reward")] == [f"reward_{i}" for i in range(k)]


@pytest.mark.slow
def test_stages_chain_onto_one_base(zoo: Zoo, tmp_path: Path) -> None:
    """SFT adapter -> reward adapter that starts from it -> PPO over the same 4-bit base, as README shows it."""
    rows = [{"prompt": prompt, "completion": " it lives by the river ."} for prompt in PROMPTS]
    pairs = [{"prompt": p, "chosen": f" yes , the {i} .", "rejected": f" no {i}"} for i, p in enumerate(PROMPTS)]
    few = {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 48}
    lora = {"r": 4}
    sft = train.sft(zoo["full"], Dataset.from_list(rows), tmp_path / "sft", lora=lora, load_in_4bit=True, **few)
    reward = train.reward_model(sft, Dataset.from_list(pairs), tmp_path / "reward", **few)
    args = PPOConfig(output_dir=str(tmp_path / "ppo"), max_steps=1, per_device_train_batch_size=4, micro_batch_size=1)
    args.max_completion_length, args.gradient_checkpointing = 6, True
    trainer = PPOTrainer(sft, reward, args, Dataset.from_list(rows), callbacks=[])
    assert set(trainer.roles.parts) == {"policy", "reference", "value", "reward_0"} and len(trainer.roles.models) == 1
    assert trainer.policy.get_base_model().is_loaded_in_4bit
    trainer.train()
    trainer.save_model(str(tmp_path / "ppo" / "model"))
    assert models.base_of(tmp_path / "ppo" / "model") == zoo["full"]


def test_in_full_the_same_interface_stands_on_separate_models(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, reward=zoo["full-reward"])
    assert set(trainer.roles.parts) == {"policy", "reference", "value"} and len(trainer.roles.models) == 3
    assert isinstance(trainer.reward, RewardModel)


@pytest.mark.parametrize("mode", ADAPTERS)
def test_a_reward_on_the_shared_base_scores_as_it_does_alone(zoo: Zoo, mode: str, rewards: Zoo, tmp_path: Path) -> None:
    alone = RewardModel(rewards[f"{mode}-0"])(PROMPTS, TEXTS)
    trainer = make(zoo, mode, tmp_path, reward=rewards[f"{mode}-0"])
    before = trainer.reward(PROMPTS, TEXTS)
    assert before == alone
    trainer.train()
    assert trainer.reward(PROMPTS, TEXTS) == alone  # policy and value have learned, the reward has not
    rows = rows_of(PROMPTS)
    trainer.roles.eval()
    tokens = trainer.rollout(rows)
    found = trainer.rewards(rows, tokens)
    assert found["reward"].tolist() == pytest.approx(RewardModel(rewards[f"{mode}-0"])(PROMPTS, list(found.completion)))


@pytest.mark.parametrize("mode", ADAPTERS)
def test_scoring_rewards_between_forward_and_optimizer_loses_no_gradient(
    zoo: Zoo, mode: str, rewards: Zoo, tmp_path: Path
) -> None:
    """With the reward as a fourth adapter an update is the one that a separate reward model gives, bit for bit."""
    ends = []
    for name in ("shared", "separate"):
        trainer = make(zoo, mode, tmp_path / name, reward=rewards[f"{mode}-0"], value_model=rewards[f"{mode}-1"])
        if name == "separate":
            trainer.reward = RewardModel(rewards[f"{mode}-0"])
        trainer.train()
        ends.append({n: p.detach().clone() for n, p in trainer.roles.trainable_parameters()})
        frozen = [n for n, p in trainer.roles.named_parameters() if ".reward_0." in n and p.requires_grad]
        assert not frozen
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_reward_on_another_base_or_in_another_precision_keeps_its_own_weights(
    zoo: Zoo, rewards: Zoo, tmp_path: Path
) -> None:
    for i, other in enumerate((zoo["full-reward"], rewards["4bit-0"])):
        trainer = make(zoo, "lora", tmp_path / str(i), reward=other)
        assert set(trainer.roles.parts) == {"policy", "reference", "value"}
        assert trainer.rewards(rows_of(PROMPTS), rolled_out(trainer).trajectory.tokens)["reward"].notna().all()


@pytest.mark.parametrize("combine", ["mean", "min"])
def test_an_ensemble_combines_its_members_and_reports_their_disagreement(
    zoo: Zoo, rewards: Zoo, tmp_path: Path, combine: str
) -> None:
    members = [RewardModel(rewards[f"lora-{i}"]) for i in range(3)]
    trainer = make(zoo, "lora", tmp_path, reward=Ensemble(members, combine), max_steps=1)
    each = torch.tensor([member(PROMPTS, TEXTS) for member in members])
    expected = each.mean(0) if combine == "mean" else each.min(0).values
    assert trainer.reward(PROMPTS, TEXTS) == pytest.approx(expected.tolist())
    trainer.train()
    [row] = updates(trainer)
    completions = list(trainer.samples["completion"])
    scores = torch.tensor([member(list(trainer.samples["prompt"]), completions) for member in members])
    assert row["disagreement"] == pytest.approx(scores.std(0).mean().item(), rel=1e-4)


def test_an_ensemble_may_hold_functions_and_needs_two_members(zoo: Zoo, rewards: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "lora", tmp_path, reward=[rewards["lora-0"], vowels], max_steps=1)
    alone = RewardModel(rewards["lora-0"])(PROMPTS, TEXTS)
    both = [(a + b) / 2 for a, b in zip(alone, vowels(PROMPTS, TEXTS), strict=True)]
    assert trainer.reward(PROMPTS, TEXTS) == pytest.approx(both)
    with pytest.raises(ValueError, match="two or more members"):
        Ensemble([vowels])
    with pytest.raises(ValueError, match="'mean' or 'min'; got 2 and 'max'"):
        Ensemble([vowels, vowels], "max")


def test_the_last_rollouts_can_be_read_as_a_frame(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, max_steps=1)
    trainer.train()
    [row] = updates(trainer)
    frame = trainer.samples
    assert sorted(frame["prompt"]) == sorted(PROMPTS)
    assert frame["reward"].mean() == pytest.approx(row["reward"], abs=1e-5)
    assert frame["kl"].mean() == pytest.approx(row["kl"], abs=1e-6)
    assert frame["n_tokens"].mean() == pytest.approx(row["completion_length"])
    assert 1 - frame["finished"].mean() == pytest.approx(row["unfinished"])


def test_bf16_is_honoured_and_heads_stay_in_fp32(zoo: Zoo, tmp_path: Path) -> None:
    trainer = make(zoo, "full", tmp_path, reward=zoo["full-reward"], bf16=True, use_cpu=True)
    seen: list[torch.dtype] = []
    layer = trainer.policy.model.layers[0].mlp.down_proj
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    head: list[torch.dtype] = []
    trainer.roles.value_head.register_forward_hook(lambda module, inputs, output: head.append(output.dtype))
    trainer.train()
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    assert set(head) == {torch.float32}
    assert {p.dtype for p in trainer.roles.parameters()} == {torch.float32}
    assert all(row["first_ratio_deviation"] == 0 for row in updates(trainer))


@pytest.mark.slow
def test_a_run_that_would_not_fit_is_refused_before_anything_is_loaded_and_a_knob_named(
    zoo: Zoo, rewards: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = {"micro_batch_size": 8, "optim": "adamw_torch"}
    make(zoo, "lora", tmp_path / "fits", reward=rewards["lora-0"], max_memory_gib=2.0, **args)
    make(zoo, "lora", tmp_path / "function", reward=vowels, max_memory_gib=2.0, **args)
    loaded = []
    monkeypatch.setattr(models, "load_roles", lambda *a, **k: loaded.append(a))
    with pytest.raises(ValueError, match="does not fit: .* GiB at the peak(.|\n)*micro_batch_size=1") as refused:
        make(zoo, "lora", tmp_path / "out", reward=rewards["lora-0"], max_memory_gib=0.79, **args)
    assert "max_memory_gib" in str(refused.value) and not loaded
