"""PPO in two real ranks against one process on the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_ppo import PROMPTS, Zoo, make

CONFIGS = Path(__file__).resolve().parent.parent / "experiments" / "accelerate"

# Each prompt has one completion of its own, so that any number of processes rolls out the same global batch.
SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from datasets import Dataset
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.progress import quiet
from tiny import layout
quiet()
task = json.loads(sys.argv[1])

class Fixed(PPOTrainer):
    def rollout(self, rows):
        prompts = [self.processing_class(row["prompt"])["input_ids"] for row in rows]
        return layout([(p, task["completions"][row["number"]]) for p, row in zip(prompts, rows)], 1, [0])

dataset = Dataset.from_dict({"prompt": task["prompts"], "number": list(range(len(task["prompts"])))})
reward = lambda prompts, completions, number, **_: [0.3 * n - 1 for n in number]
answers = {}
for name, run in task["runs"].items():
    args = PPOConfig(output_dir=run["out"], use_cpu=True, **task["settings"])
    args.per_device_train_batch_size //= args.world_size
    trainer = Fixed(run["policy"], reward, args, dataset, value_model=run["value"], callbacks=[])
    assert args.world_size == task["processes"], f"{args.world_size} processes were started"
    trainer.train(resume_from_checkpoint=run.get("resume"))
    trainer.save_model()
    weights = torch.cat([p.detach().flatten() for p in trainer.roles.learning])
    everyone, drawn = trainer.accelerator.gather(weights[None]), trainer.accelerator.gather(torch.rand(1))
    assert torch.equal(everyone, everyone[:1].expand_as(everyone)), "processes hold different weights"
    assert len(set(drawn.tolist())) == args.world_size, "processes draw the same numbers"
    answers[name] = [row for row in trainer.state.log_history if "loss" in row]
if args.process_index == 0:
    print("ANSWERS" + json.dumps(answers), flush=True)
trainer.accelerator.end_training()  # a process that ends inside a group can abort
"""
MODES = ("full", "4bit")


def launch(task: dict[str, Any], runs: dict[str, Any], processes: int, folder: Path) -> dict[str, Any]:
    """The metrics of each update of each run in so many ranks (on a CPU, accelerate launch would start one)."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(script), json.dumps(task | {"processes": processes, "runs": runs})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWERS")[1])


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one_and_resume(zoo: Zoo, tmp_path: Path) -> None:
    """In full and in 4 bits: one process, two, and two that go on from the checkpoint of update 1."""
    settings = {"per_device_train_batch_size": 4, "micro_batch_size": 2, "max_steps": 2, "ppo_epochs": 2}
    settings |= {"learning_rate": 1e-3, "entropy_coef": 0.05, "adaptive_kl_target": 0.1, "kl_horizon": 10}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    completions = [[310 + i] * (1 + i % 5) + [0] * (i % 3 > 0) for i in range(len(PROMPTS))]
    task = {"prompts": PROMPTS, "completions": completions, "settings": settings}

    def run(mode: str, name: str, **resume: str) -> dict[str, str]:
        return {"policy": zoo[mode], "value": zoo[f"{mode}-reward"], "out": str(tmp_path / mode / name), **resume}

    one = launch(task, {mode: run(mode, "one") for mode in MODES}, 1, tmp_path)
    runs = {f"{mode} two": run(mode, "two") for mode in MODES}
    for mode in MODES:
        runs[f"{mode} resumed"] = run(mode, "resumed", resume=str(tmp_path / mode / "two" / "checkpoint-1"))
    two = launch(task, runs, 2, tmp_path)
    for mode in MODES:
        assert len(one[mode]) == len(two[f"{mode} two"]) == len(two[f"{mode} resumed"]) == 2
        for a, b, c in zip(one[mode], two[f"{mode} two"], two[f"{mode} resumed"], strict=True):
            for name in a.keys() - {"seconds_rollout", "seconds_optimise", "epoch"}:
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name
                assert b[name] == c[name], name
        file = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
        for part in (file, f"value/{file}", "value/value_head.safetensors"):
            single, double, resumed = (load_file(tmp_path / mode / name / part) for name in ("one", "two", "resumed"))
            for name, tensor in single.items():
                torch.testing.assert_close(double[name], tensor, atol=1e-5, rtol=0)
                assert torch.equal(double[name], resumed[name])


@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_a_configuration_that_ppo_refuses_says_so(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    assert "PPO refuses it" in text
    assert yaml.safe_load(text)["distributed_type"] in ("FSDP", "DEEPSPEED")


def test_sharded_weights_are_refused(zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    def sharded(self: Trainer, *args: Any, **kwargs: Any) -> None:
        create(self, *args, **kwargs)
        self.is_fsdp_enabled = True  # what Trainer sets under such a configuration, which needs GPUs

    create = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    with pytest.raises(ValueError, match="PPO divides prompts among processes, not weights"):
        make(zoo, "lora", tmp_path)
