"""One name that sets everything: where prompts and judgments come from, the sizes, and each stage's settings."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_kit.tasks import pocket

Settings = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """Sizes and settings of a whole run.

    task: the pocket world, whose gold utility is known, or None with `data`: a person's own preferences (a file or hub
    id). base_model: a directory or hub id, or None to pretrain a small one on `data`. The dicts go to the stages as
    they are, by the names of their own configs. shares: what part of the whole run's time each stage took when it was
    measured, to tell a person how long is left.
    """

    name: str
    seed: int
    task: pocket.World | None
    base_model: str | None
    sampling: Settings
    sft: Settings
    reward_model: Settings
    ppo: Settings
    dpo: Settings
    data: str | None = None
    n_demonstrations: int | None = None
    n_preference_prompts: int | None = None
    samples_per_prompt: int = 4
    n_train_prompts: int | None = None
    n_test_prompts: int = 400
    best_of: int = 16
    pretrain: Settings | None = None
    shares: dict[str, float] = field(default_factory=dict)

    def override(self, assignment: str) -> Preset:
        """A copy with one setting changed, written as "ppo.kl_coef=0.2" or "seed=3"; ValueError says what is wrong."""
        name, equals, text = assignment.partition("=")
        stage, dot, setting = name.partition(".")
        if not equals or stage not in self.__dataclass_fields__:
            raise ValueError(f"{assignment!r}: write STAGE.SETTING=VALUE, such as ppo.kl_coef=0.2 or dpo.beta=0.3")
        value, sizes = (
            _number(text),
            ("batch_size", "steps", "length", "prompts", "demonstrations", "best_of", "epochs"),
        )
        if name.endswith(sizes) and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{assignment!r}: {name} is a size, a whole number above 0")
        settings = getattr(self, stage)
        if isinstance(settings, dict) != bool(dot):
            raise ValueError(f"{assignment!r}: write {stage}{'.SETTING' if isinstance(settings, dict) else ''}=VALUE")
        changed: dict[str, Any] = {stage: {**settings, setting: value} if dot else value}
        return replace(self, **changed)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _checkpoints(every: int) -> Settings:
    """Weights kept each so many steps, to draw reward against KL along the way."""
    return {"save_strategy": "steps", "save_steps": every, "save_only_model": True}


def _pocket(seed: int) -> Preset:
    """The built-in world: everything is known, and everything runs in minutes on a laptop."""
    return Preset(
        name="pocket",
        seed=seed,
        task=pocket.world(),
        base_model=pocket.BASE_MODEL,
        n_demonstrations=3000,
        sampling={"max_completion_length": 40},
        sft={"max_steps": 250, "per_device_train_batch_size": 32, "learning_rate": 5e-4, "max_length": 128},
        reward_model={"max_steps": 250, "per_device_train_batch_size": 32, "learning_rate": 1e-3, "max_length": 128},
        dpo={
            "max_steps": 150,
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-4,
            "beta": 0.3,  # at 0.1 DPO left the text it had seen on one seed of three
            "max_length": 128,
            **_checkpoints(50),
        },
        ppo={
            "max_steps": 25,
            "per_device_train_batch_size": 128,
            "num_minibatches": 2,
            "micro_batch_size": 32,  # of like length: a fifth faster than whole minibatches, whose padding costs more
            "learning_rate": 3e-4,
            "kl_coef": 0.2,
            **_checkpoints(5),
        },
        shares={
            "sft": 0.10,
            "preferences": 0.09,
            "reward_model": 0.17,
            "ppo": 0.25,
            "dpo": 0.18,
            "scores": 0.21,
        },
    )


def _quick(seed: int) -> Preset:
    """The pocket world in a minute, to see that everything runs: too short for its numbers to mean anything."""
    whole = _pocket(seed)
    return replace(
        whole,
        name="quick",
        n_demonstrations=400,
        n_preference_prompts=300,
        n_test_prompts=100,
        best_of=4,
        sft=whole.sft | {"max_steps": 50},
        reward_model=whole.reward_model | {"max_steps": 30},
        dpo=whole.dpo | {"max_steps": 20} | _checkpoints(10),
        ppo=whole.ppo | {"max_steps": 4, "per_device_train_batch_size": 32} | _checkpoints(2),
    )


def _data(seed: int) -> Preset:
    """A person's own preference file: the same stages; without a base model, a small one is pretrained on that text."""
    length = 384
    return Preset(
        name="data",
        seed=seed,
        task=None,
        base_model=None,
        n_test_prompts=150,
        best_of=4,
        sampling={"max_completion_length": 48},
        pretrain={
            "vocab_size": 4096,
            "hidden_size": 192,
            "layers": 4,
            "max_length": 512,
            "steps": 300,
            "batch_size": 16,
        },
        sft={"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 5e-4, "max_length": length},
        reward_model={"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": 2e-4, "max_length": length},
        dpo={
            "max_steps": 60,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-4,
            "beta": 0.1,
            "max_length": length,
        },
        ppo={
            "max_steps": 15,
            "per_device_train_batch_size": 32,
            "micro_batch_size": 8,
            "learning_rate": 1e-4,
            "kl_coef": 0.1,
        },
        shares={"base": 0.14, "sft": 0.08, "reward_model": 0.17, "ppo": 0.26, "dpo": 0.15, "scores": 0.20},
    )


PRESETS = {"pocket": _pocket, "quick": _quick, "data": _data}


def preset(name: str = "pocket", seed: int = 0) -> Preset:
    """The preset of that name; ValueError lists the names there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name](seed)
