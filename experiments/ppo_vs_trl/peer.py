"""The last PPO that TRL shipped, at the given settings: python peer.py SETTINGS.json, run by compare.py.

Runs in the environment of `make peer` (trl 1.12.0) and knows trl, peft, transformers and torch only. Every setting that
TRL has by another name is given the kit's value; what TRL 1.12 needs to do its best is said where it is done.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from watch import PPO_SETTINGS, Watch, read_settings

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # a warning at import that the API may change: it did, it is gone

from transformers import PrinterCallback  # noqa: E402
from transformers.utils import logging  # noqa: E402
from trl.experimental.ppo import PPOConfig, PPOTrainer  # noqa: E402, TID251 (that is where this TRL has it)

# TRL's names where they are others than the kit's; `max_steps` has none.
NAMES = {
    "max_completion_length": "response_length",
    "ppo_epochs": "num_ppo_epochs",
    "num_minibatches": "num_mini_batches",
    "gae_lambda": "lam",
    "clip_range": "cliprange",
    "value_clip_range": "cliprange_value",
}


def main() -> None:
    settings, out = read_settings(sys.argv[1])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # TRL logs what is charged and what is earned under these names; the score has the missing-EOS penalty in it.
    names = {"objective": "objective/rlhf_reward", "kl": "objective/kl"}
    watch = Watch(settings, out, lambda path: save(trainer, path), names)
    trainer = make_trainer(settings, out, watch)
    trainer.train()
    watch.write()


def make_trainer(settings: dict[str, Any], out: Path, watch: Watch) -> PPOTrainer:
    """TRL's trainer of a run, with the models loaded as it wants them: as objects, each a copy of its own."""
    batch = settings["per_device_train_batch_size"]
    args = PPOConfig(
        output_dir=str(out / "trainer"),
        **{NAMES.get(name, name): settings[name] for name in PPO_SETTINGS if name != "max_steps"},
        total_episodes=settings["max_steps"] * batch,  # there is no other way to say how many updates
        # Its batch size per device is that of the rollout too; with gradient accumulation `num_mini_batches` would do
        # nothing, so there is none: a minibatch is one forward and backward pass and one step.
        gradient_accumulation_steps=1,
        # The default of 64 would cut the rollout in two; the kit's, which has no such setting, is one batch.
        local_rollout_forward_batch_size=batch,
        # Without a stop token (the default) every completion runs to the full length and no EOS is ever rewarded.
        stop_token="eos",
        # On by default; both are slower than fp32 on a CPU, and the other side trains in fp32.
        bf16=False,
        gradient_checkpointing=False,
        num_sample_generations=0,  # tables of samples, which the other side does not make
        logging_steps=1,
        save_strategy="no",  # `Watch` saves, so that the time it takes is nobody's
        report_to="none",
        disable_tqdm=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(settings["sft"], padding_side="left")
    # It wants token ids, and takes the pad token for padding wherever it stands: one that is EOS as well would end
    # attention at every EOS and never train it. The pocket's pad token is one of its own.
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    prompts = json.loads(Path(settings["prompts"]).read_text())
    dataset = Dataset.from_dict({"input_ids": tokenizer(prompts)["input_ids"]})
    is_lora = settings["mode"] == "lora"
    lora = LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        target_modules="all-linear",
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    policy = AutoModelForCausalLM.from_pretrained(settings["sft"], dtype=torch.float32)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        # With an adapter the reference is the policy with its adapter off, without one a copy made here.
        ref_model=None,
        reward_model=normalised_reward_model(settings["reward"]).eval().requires_grad_(False),
        # Values start from the reward model, as the kit's do. TRL trains it in full beside an adapter as well, and has
        # no way to share its base with the policy or the reward model.
        value_model=normalised_reward_model(settings["reward"]),
        train_dataset=dataset,
        callbacks=[watch],
        peft_config=lora if is_lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    # `max_grad_norm` is a setting that nothing reads: the gradient is clipped here, just before each step.
    parameters = [each for each in trainer.model.parameters() if each.requires_grad]

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])

    trainer.optimizer.optimizer.register_step_pre_hook(clip)
    return trainer


def normalised_reward_model(path: str) -> PreTrainedModel:
    """The reward model with its normalisation in its head: (raw - shift) / scale, the reward that the kit optimises.

    TRL applies the score head to the last hidden state itself, so a head with a bias takes the shift as well.
    """
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    notes = json.loads((Path(path) / "rlhf_kit.json").read_text())
    head = torch.nn.Linear(model.score.in_features, 1)
    head.weight.data.copy_(model.score.weight.data / notes["scale"])
    head.bias.data.fill_(-notes["shift"] / notes["scale"])
    model.score = head
    return model


def save(trainer: PPOTrainer, path: Path) -> None:
    """The policy as a model directory."""
    trainer.policy_model.save_pretrained(path)
    trainer.processing_class.save_pretrained(path)


if __name__ == "__main__":
    main()
