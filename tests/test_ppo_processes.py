"""PPO in two real ranks against one process on the same global batch. Each rank runs this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_ppo import PROMPTS, Zoo, make, rows_of, updates
from tiny import MODES, layout
from transformers import Trainer

from rlhf_kit import models
from rlhf_kit.models import Roles, Tokens
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.progress import quiet

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "ppo_epochs": 2, "learning_rate": 1e-3,
    "entropy_coef": 0.05, "adaptive_kl_target": 0.1, "kl_horizon": 10, "save_strategy": "steps", "save_steps": 1,
    "max_completion_length": 6,
}  # fmt: skip
TORCH = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DDP = str(Path(__file__).parents[1] / "experiments" / "accelerate" / "ddp.yaml")
ACCELERATE = ("accelerate.commands.launch", "--config_file", DDP, "--num_processes", "2", "--main_process_port", "0")


class Fixed(PPOTrainer):
    """Each prompt has one completion of its own, so that any number of processes rolls out the same global batch."""

    def rollout(self, rows: list[dict[str, Any]]) -> Tokens:
        self.seen = [*getattr(self, "seen", []), *(row["number"] for row in rows)]
        prompts = [self.processing_class(row["prompt"])["input_ids"] for row in rows]
        numbers = [row["number"] for row in rows]
        completions = [[310 + i] * (1 + i % 5) + [0] * (i % 3 > 0) for i in numbers]
        return layout(list(zip(prompts, completions, strict=True)), 1, [0])


def said(roles: Roles) -> list[Any]:
    """What policy and value model say to fixed tokens: logits, log-probs and values."""
    ids = torch.tensor([[300, 301, 302, 303, 304, 0]])
    tokens = Tokens(ids, torch.ones_like(ids), torch.ones(1, 4, dtype=torch.long))
    with torch.no_grad():
        logits = roles.eval().use("policy")(input_ids=ids, use_cache=False).logits[0, -1]
        logprobs, _ = models.completion_logprobs(roles.use("policy"), tokens)
        return [part.tolist() for part in (logits, logprobs, roles.values(tokens))]


def train(runs: dict[str, dict[str, str]], processes: int) -> dict[str, Any]:
    """The log of each run and what its models say at its end, in this many ranks."""
    answers = {}
    for name, run in runs.items():
        args = PPOConfig(output_dir=run["out"], use_cpu=True, **SETTINGS)
        args.per_device_train_batch_size //= args.world_size
        prompts = Dataset.from_list(rows_of(PROMPTS))
        trainer = Fixed(run["policy"], reward, args, prompts, value_model=run["value"], callbacks=[])
        assert args.world_size == processes, f"{args.world_size} processes were started"
        trainer.train(resume_from_checkpoint=run.get("resume"))
        trainer.save_model()
        weights = torch.cat([p.detach().flatten() for p in trainer.roles.learning])
        everyone, drawn = trainer.accelerator.gather(weights[None]), trainer.accelerator.gather(torch.rand(1))
        assert torch.equal(everyone, everyone[:1].expand_as(everyone)), "processes hold different weights"
        assert len(set(drawn.tolist())) == processes, "processes draw the same numbers"
        seen = trainer.accelerator.gather(torch.tensor(trainer.seen)).tolist()
        assert "resume" in run or sorted(seen) == list(range(8)), f"not each prompt once in an epoch: {seen}"
        answers[name] = [updates(trainer), said(trainer.roles)]
    if processes > 1:
        if trainer.is_world_process_zero():
            print("ANSWERS" + json.dumps(answers), flush=True)
        trainer.accelerator.end_training()  # a process that ends inside a group can abort
    return answers


def reward(prompts: list[Any], completions: list[Any], number: list[int], **columns: Any) -> list[float]:
    return [0.3 * n - 1 for n in number]


def two_ranks(launcher: tuple[str, ...], runs: dict[str, dict[str, str]]) -> dict[str, Any]:
    """What `train` answers in two processes that a launcher starts."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([*sys.path])}
    command = [sys.executable, "-m", *launcher, __file__, json.dumps(runs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.split("ANSWERS")[1]))


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one_and_resume(zoo: Zoo, tmp_path: Path) -> None:
    """One process, two of torch's launcher, and two of accelerate's that go on from these two's update 1."""

    def run(mode: str, name: str, **resume: str) -> dict[str, str]:
        return {"policy": zoo[mode], "value": zoo[f"{mode}-reward"], "out": str(tmp_path / mode / name), **resume}

    one = train({mode: run(mode, "one") for mode in MODES}, 1)
    two = two_ranks(TORCH, {mode: run(mode, "two") for mode in MODES})
    first = {mode: str(tmp_path / mode / "two" / "checkpoint-1") for mode in MODES}
    again = two_ranks(ACCELERATE, {mode: run(mode, "resumed", resume=first[mode]) for mode in MODES})
    for mode in MODES:
        logs = (one[mode][0], two[mode][0], again[mode][0])
        assert [len(rows) for rows in logs] == [2, 2, 2]
        for a, b, c in zip(*logs, strict=True):
            for name in a.keys() - {"epoch"}:
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name
                assert b[name] == c[name], name
        file = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
        for part in (file, f"value/{file}", "value/value_head.safetensors"):
            single, double, resumed = (load_file(tmp_path / mode / name / part) for name in ("one", "two", "resumed"))
            for name, tensor in single.items():
                torch.testing.assert_close(double[name], tensor, atol=1e-5, rtol=0)
                assert torch.equal(double[name], resumed[name])
        # Loaded in this process, what was saved in another says the same to the last bit.
        saved = str(tmp_path / mode / "two")
        assert said(models.load_roles(saved, value=f"{saved}/value")) == two[mode][1]
        assert json.loads(Path(saved, "generation_config.json").read_text())["eos_token_id"] in (0, [0])


def test_a_launcher_that_started_one_process_of_several_is_named(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("ACCELERATE_USE_CPU", "True"), ("MASTER_PORT", "29500")):  # as accelerate 1.15 sets them
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="several processes and started one"):
        make(zoo, "full", tmp_path)


def test_sharded_weights_are_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sharded(self: Trainer, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        self.is_fsdp_enabled = True  # what Trainer sets under such a configuration, which needs GPUs

    create = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="PPO divides prompts among processes, not weights"):
        make(zoo, "lora", tmp_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet()
    train(json.loads(sys.argv[1]), processes=2)
