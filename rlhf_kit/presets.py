"""One name that sets everything: the task, the sizes, and each stage's settings."""

import json
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, get_type_hints

from rlhf_kit import train
from rlhf_kit.models import LOADING
from rlhf_kit.ppo import PPOConfig
from rlhf_kit.ppo.config import check_settings, kinds_of
from rlhf_kit.tasks import Pairs, Pocket, Task

Settings = dict[str, Any]
# Where the settings of a stage are checked against, by name and by type.
CONFIGS = {"sft": train.SFTConfig, "reward_model": train.RewardConfig, "dpo": train.DPOConfig, "ppo": PPOConfig}
# Settings of every stage that are none of TRL's.
ADAPTER: dict[str, Any] = {"lora": dict | None} | dict.fromkeys(LOADING, str | None) | {"load_in_4bit": bool | None}


@dataclass(frozen=True)
class Preset:
    """Sizes and settings of a whole run; the dicts go to the stages as they are, by the names of their own configs.

    base_model: a directory or hub id, or None to pretrain a small one of `base_shape` (a LlamaConfig's settings) on the
    task's preferences. shares: the measured part of the whole run's time that each stage takes, to tell the time left.
    """

    name: str
    seed: int
    task: Task
    base_model: str | None
    sampling: Settings
    sft: Settings
    reward_model: Settings
    ppo: Settings
    dpo: Settings
    n_demonstrations: int | None = None
    n_preference_prompts: int | None = None
    samples_per_prompt: int = 4
    n_train_prompts: int | None = None
    n_test_prompts: int = 400
    best_of: int = 16
    base_shape: Settings = field(default_factory=dict)
    pretrain: Settings = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a misspelt setting now, not when its stage comes; raises ValueError."""
        for stage, config in CONFIGS.items():
            known = [*(each.name for each in fields(config)), *ADAPTER]
            for name in (each for each in getattr(self, stage) if each not in known):
                near = "".join(f"; did you mean {each}?" for each in get_close_matches(name, known, 1))
                raise ValueError(f"{stage}.{name}: no such setting{near}")

    def override(self, assignment: str) -> "Preset":
        """A copy with one setting changed, written as "ppo.kl_coef=0.2" or "seed=3"; ValueError says what is wrong."""
        name, equals, text = assignment.partition("=")
        stage, dot, setting = name.partition(".")
        if not equals or stage not in self.__dataclass_fields__ or stage in ("task", "shares"):
            raise ValueError(f"{assignment!r}: write STAGE.SETTING=VALUE, such as ppo.kl_coef=0.2 or dpo.beta=0.3")
        settings = getattr(self, stage)
        if isinstance(settings, dict) != bool(dot):
            raise ValueError(f"{assignment!r}: write {stage}{'.SETTING' if isinstance(settings, dict) else ''}=VALUE")
        if stage in CONFIGS:
            hints = get_type_hints(CONFIGS[stage]) | ADAPTER
        elif dot:
            hints = {known: type(value) for known, value in settings.items()}
        else:
            hints = get_type_hints(Preset)
        value = _typed(text, hints.get(setting or stage, str))
        check_settings({setting or stage: value}, hints, repr(assignment))
        changed: dict[str, Any] = {stage: {**settings, setting: value} if dot else value}
        return replace(self, **changed)


def _typed(text: str, hint: Any) -> Any:
    """A setting's value, read as JSON (or "none", "True") where its config does not declare text."""
    kinds = kinds_of(hint)
    if str in kinds and type(None) not in kinds:
        return text
    try:
        value = json.loads({"none": "null", "true": "true", "false": "false"}.get(text.lower(), text))
    except json.JSONDecodeError:
        value = text
    if float in kinds and type(value) is int:
        value = float(value)
    return value if type(value) in kinds else text


def _steps(max_steps: int, batch_size: int, learning_rate: float) -> Settings:
    return {"max_steps": max_steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate}


def _checkpoints(every: int) -> Settings:
    """Weights are kept each so many steps, to draw reward against KL along the way."""
    return {"save_strategy": "steps", "save_steps": every, "save_only_model": True}


def _pocket(seed: int, task: Task) -> Preset:
    """The built-in world: everything is known, and everything runs in minutes on a laptop."""
    return Preset(
        name="pocket",
        seed=seed,
        task=task,
        base_model=task.base_model,
        n_demonstrations=3000,
        sampling={"max_completion_length": 40},
        sft=_steps(250, 32, 5e-4) | {"max_length": 128},
        reward_model=_steps(250, 32, 1e-3) | {"max_length": 128},
        # At a beta of 0.1 DPO left the text it had seen, on one seed of three.
        dpo=_steps(150, 32, 1e-4) | {"beta": 0.3, "max_length": 128} | _checkpoints(50),
        # Micro-batches of rows of like length are a fifth faster than whole minibatches, whose padding costs more.
        ppo=_steps(25, 128, 3e-4) | {"kl_coef": 0.2, "num_minibatches": 2, "micro_batch_size": 32} | _checkpoints(5),
        shares={"sft": 0.10, "preferences": 0.09, "reward_model": 0.17, "ppo": 0.25, "dpo": 0.18, "scores": 0.21},
    )


def _quick(seed: int, task: Task) -> Preset:
    """The pocket world in a minute, to see that everything runs: too short for its numbers to mean anything."""
    whole = _pocket(seed, task)
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


def _data(seed: int, task: Task) -> Preset:
    """A person's own preferences: the same stages; without a base model, a small one is pretrained on their text."""
    shape = {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 384, "max_position_embeddings": 512}
    shape |= {"num_hidden_layers": 4, "num_attention_heads": 6, "tie_word_embeddings": True}
    return Preset(
        name="data",
        seed=seed,
        task=task,
        base_model=task.base_model,
        n_test_prompts=150,
        best_of=4,
        sampling={"max_completion_length": 48},
        base_shape=shape,
        pretrain={"max_steps": 300, "per_device_train_batch_size": 16},
        sft=_steps(60, 16, 5e-4) | {"max_length": 384},
        reward_model=_steps(120, 16, 2e-4) | {"max_length": 384},
        dpo=_steps(60, 8, 1e-4) | {"beta": 0.1, "max_length": 384},
        ppo=_steps(15, 32, 1e-4) | {"micro_batch_size": 8, "kl_coef": 0.1},
        shares={"base": 0.14, "sft": 0.08, "reward_model": 0.17, "ppo": 0.26, "dpo": 0.15, "scores": 0.20},
    )


PRESETS = {"pocket": _pocket, "quick": _quick, "data": _data}


def preset(name: str | None = None, seed: int = 0, data: str | None = None, base_model: str | None = None) -> Preset:
    """The preset of that name (default: "pocket", or "data" with `data`, a file or hub id of preferences).

    base_model: a directory or hub id to start from instead of the preset's own. ValueError where these do not fit.
    """
    name = name or ("pocket" if data is None else "data")
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    if (name == "data") != (data is not None):
        raise ValueError(f"preset {name!r} {'needs' if name == 'data' else 'does not go with'} data, a preference file")
    task: Task = Pocket() if data is None else Pairs(data, seed)
    chosen = PRESETS[name](seed, task)
    return chosen if base_model is None else replace(chosen, base_model=base_model)
