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
args = PPOConfig(output_dir=task["out"], use_cpu=True, **task["settings"])
args.per_device_train_batch_size //= args.world_size
trainer = Fixed(task["policy"], reward, args, dataset, value_model=task["value"], callbacks=[])
assert args.world_size == task["processes"], f"{args.world_size} processes were started"
trainer.train(resume_from_checkpoint=task.get("resume"))
trainer.save_model()
weights = torch.cat([p.detach().flatten() for p in trainer.roles.learning])
everyone, drawn = trainer.accelerator.gather(weights[None]), trainer.accelerator.gather(torch.rand(1))
assert torch.equal(everyone, everyone[:1].expand_as(everyone)), "processes hold different weights"
assert len(set(drawn.tolist())) == args.world_size, "processes draw the same numbers"
if args.process_index == 0:
    print("ANSWERS" + json.dumps([row for row in trainer.state.log_history if "loss" in row]))
"""


def launch(task: dict[str, Any], processes: int, folder: Path) -> list[dict[str, float]]:
    """The metrics of each update of a run in so many ranks (on a CPU, accelerate launch would start one)."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parent.parent)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(script), json.dumps(task | {"processes": processes})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("ANSWERS")[1])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "4bit"])
def test_two_processes_make_the_updates_of_one_and_resume(zoo: Zoo, mode: str, tmp_path: Path) -> None:
    completions = [[310 + i] * (1 + i % 5) + [0] * (i % 3 > 0) for i in range(len(PROMPTS))]
    settings = {"per_device_train_batch_size": 4, "max_steps": 3, "ppo_epochs": 2, "learning_rate": 1e-3}
    settings |= {
        "entropy_coef": 0.05,
        "adaptive_kl_target": 0.1,
        "kl_horizon": 10,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    settings |= {"micro_batch_size": 2}
    task = {"policy": zoo[mode], "value": zoo[f"{mode}-reward"], "prompts": PROMPTS, "completions": completions}
    task |= {"settings": settings}
    outs = [str(tmp_path / name) for name in ("one", "two", "resumed")]
    one = launch(task | {"out": outs[0]}, 1, tmp_path)
    two = launch(task | {"out": outs[1]}, 2, tmp_path)
    resumed = launch(task | {"out": outs[2], "resume": f"{outs[1]}/checkpoint-2"}, 2, tmp_path)
    assert len(one) == len(two) == len(resumed) == 3
    for a, b, c in zip(one, two, resumed, strict=True):
        for name in a.keys() - {"seconds_rollout", "seconds_optimise", "epoch"}:
            assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), name
            assert b[name] == c[name], name
    file = "model.safetensors" if mode == "full" else "adapter_model.safetensors"
    for part in (file, f"value/{file}", "value/value_head.safetensors"):
        weights = [load_file(Path(out) / part) for out in outs]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, atol=1e-5, rtol=0)
            assert torch.equal(weights[1][name], weights[2][name])


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
    with pytest.raises(ValueError, match="PPO shares prompts out, not weights"):
        make(zoo, "lora", tmp_path)
