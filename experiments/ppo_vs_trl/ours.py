"""rlhf_kit's PPO at the given settings: python ours.py SETTINGS.json, run by compare.py in the kit's environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from watch import PPO_SETTINGS, Watch, read_settings

from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.progress import quiet


def main() -> None:
    settings, out = read_settings(sys.argv[1])
    quiet()
    names = {"objective": "objective", "kl": "kl"}
    watch = Watch(settings, out, lambda path: trainer.save_model(str(path)), names)
    trainer = make_trainer(settings, out, watch)
    trainer.train()
    watch.write()


def make_trainer(settings: dict[str, Any], out: Path, watch: Watch) -> PPOTrainer:
    """The trainer of a run; micro-batches of completions of like length are part of it, and TRL has none."""
    lora = {"r": settings["lora_r"], "lora_alpha": settings["lora_alpha"]}
    args = PPOConfig(
        output_dir=str(out / "trainer"),
        micro_batch_size=settings["micro_batch_size"],
        lora=lora if settings["mode"] == "lora" else None,
        **{name: settings[name] for name in PPO_SETTINGS},
    )
    prompts = Dataset.from_dict({"prompt": json.loads(Path(settings["prompts"]).read_text())})
    return PPOTrainer(settings["sft"], settings["reward"], args, prompts, callbacks=[watch])


if __name__ == "__main__":
    main()
