"""The whole flow as stages: each is made once, by name, and handed over as a path; asking for one makes what it needs.

pocket:    base -> sft -> preferences -> reward_model -> ppo, dpo -> scores -> report
own data:  data -> base -> preferences, sft -> reward_model -> ppo, dpo -> scores -> report
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import LlamaConfig, TrainerState

from rlhf_kit import data, evaluate, feedback, models, pretrain, rewards, runs, sampling, train
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.presets import Preset, Settings
from rlhf_kit.progress import Countdown, LossCallback, ProgressCallback, clock
from rlhf_kit.tasks import pocket

HELD_OUT_RATER_SEED = 1_000_003  # the held-out pairs are judged by another draw of the same rater
SCORED = {"final": 2, "checkpoint": 1}  # completions of each test prompt; for a point along a curve one will do


@dataclass
class Pipeline:
    """The stages of one preset in one results folder; a finished stage is kept where config and inputs are the same."""

    preset: Preset
    out: Path
    fresh: bool = False
    runs: dict[str, runs.Run] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a misspelt setting now, not when its stage comes; raises ValueError."""
        configs = {"sft": train.SFTConfig, "reward_model": train.RewardConfig, "dpo": train.DPOConfig, "ppo": PPOConfig}
        for stage, config in configs.items():
            known = [*(each.name for each in fields(config)), "load_in_4bit"]
            for name in getattr(self.preset, stage):
                if name not in known:
                    near = get_close_matches(name, known, 1)
                    raise ValueError(f"{stage}.{name}: no such setting{f'; did you mean {near[0]}?' if near else ''}")

    # From prompts to preferences -----------------------------------------------------------------------------------

    def own_data(self) -> Path:
        """A person's own preferences, checked and split by prompt: train.parquet and test.parquet."""
        source = str(self.preset.data)

        def make(out: Path) -> None:
            pairs = data.load(source)
            data.check(pairs, data.PREFERENCE, source)
            for name, part in zip(("train", "test"), data.split_by_prompt(pairs, 0.1, self.preset.seed), strict=True):
                part.to_parquet(out / f"{name}.parquet")

        files = {"file": source} if Path(source).exists() else {}
        return self._stage("data", {"source": source}, files, make)

    def base(self) -> str:
        """The base model's directory or hub id; where there is none, one pretrained on the person's own text."""
        if self.preset.base_model is not None:
            return self.preset.base_model
        source = self.own_data() / "train.parquet"
        settings = dict(self.preset.pretrain or {})

        def make(out: Path) -> None:
            print(
                "  no base model given: a small one is pretrained on this text, for the mechanics; its English is poor"
            )
            rows = Dataset.from_parquet(str(source))
            texts = [text for row in rows for text in (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])]
            tokenizer = pretrain.train_tokenizer(texts, settings["vocab_size"])
            width = settings["hidden_size"]
            shape = LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=settings["layers"],
                num_attention_heads=width // 32,
                num_key_value_heads=width // 32,
                max_position_embeddings=settings["max_length"],
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            steps, batch = settings["steps"], settings["batch_size"]
            progress = Countdown("pretraining", steps)
            pretrain.pretrain(
                texts,
                tokenizer,
                shape,
                out / "model",
                steps=steps,
                batch_size=batch,
                seed=self.preset.seed,
                on_progress=lambda step, _, loss: progress.at(step, loss=loss),
            )

        return str(self._stage("base", settings, {"data": source}, make) / "model")

    def sft(self) -> str:
        """The model fine-tuned on demonstrations: the world's, or the chosen completions of a person's own data."""
        base = self.base()
        config = {"n_demonstrations": self.preset.n_demonstrations, **self.preset.sft}
        inputs: dict[str, str | Path] = {"base": base}
        if self.preset.task is None:
            inputs["preferences"] = self.preferences() / "train.parquet"

        def make(out: Path) -> None:
            train.sft(base, self.demonstrations(), out / "model", **self._training(out, "SFT", self.preset.sft))

        return str(self._stage("sft", config, inputs, make) / "model")

    def demonstrations(self) -> Dataset:
        """What SFT learns from: `prompt, completion`."""
        if self.preset.task is not None:
            return data.demonstrations(self.preset.task, self.preset.n_demonstrations, self.preset.seed)
        pairs = Dataset.from_parquet(str(self.preferences() / "train.parquet"))
        return pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")

    def preferences(self) -> Path:
        """Preferences as train.parquet and test.parquet: raters on the SFT model's samples, or a person's own pairs."""
        if self.preset.task is None:
            source = self.own_data()
            longest = min(self.preset.reward_model["max_length"], models.max_length(self.base()) or sys.maxsize)
            return self._stage(
                "preferences",
                {"max_length": longest},
                {"data": source / "train.parquet", "base": self.base()},
                lambda out: _keep_short(source, out, models.load_tokenizer(self.base()), longest),
            )
        sft, world, seed = self.sft(), self.preset.task, self.preset.seed
        n = self.preset.samples_per_prompt
        config = {"n_prompts": self.preset.n_preference_prompts, "samples_per_prompt": n, **self.preset.sampling}

        def make(out: Path) -> None:
            for name, split, count, rater_seed in (
                ("train", "preference", self.preset.n_preference_prompts, seed),
                ("test", "test", None, seed + HELD_OUT_RATER_SEED),
            ):
                prompts = data.prompts(world, split, count, seed)
                print(f"  {n} samples for each of {len(prompts)} {split} prompts, judged in pairs by a simulated rater")
                samples = sampling.sample(sft, prompts, n=n, seed=seed, **self.preset.sampling)
                feedback.collect(samples, feedback.simulated(world, rater_seed), rater_seed).to_parquet(
                    out / f"{name}.parquet"
                )

        return self._stage("preferences", config, {"sft": sft}, make)

    # From preferences to policies ----------------------------------------------------------------------------------

    def reward_model(self) -> str:
        """The reward model, which starts from the SFT model."""
        sft, pairs = self.sft(), self.preferences() / "train.parquet"

        def make(out: Path) -> None:
            settings = self._training(out, "reward model", self.preset.reward_model)
            train.reward_model(sft, Dataset.from_parquet(str(pairs)), out / "model", **settings)

        return str(
            self._stage("reward_model", self.preset.reward_model, {"sft": sft, "preferences": pairs}, make) / "model"
        )

    def ppo(self) -> str:
        """The policy optimised against the reward model."""
        sft, reward = self.sft(), self.reward_model()
        config = {"n_prompts": self.preset.n_train_prompts, **self.preset.sampling, **self.preset.ppo}

        def make(out: Path) -> None:
            args = PPOConfig(
                output_dir=str(out / "checkpoints"),
                seed=self.preset.seed,
                **{**self.preset.sampling, **self.preset.ppo},
            )
            callbacks = [ProgressCallback("PPO"), LogMetrics(out)]
            trainer = PPOTrainer(sft, reward, args, self.prompts("train"), callbacks=callbacks)
            trainer.train()
            trainer.save_model(str(out / "model"))

        return str(self._stage("ppo", config, {"sft": sft, "reward_model": reward}, make) / "model")

    def dpo(self) -> str:
        """The policy optimised on the preferences directly."""
        sft, pairs = self.sft(), self.preferences() / "train.parquet"

        def make(out: Path) -> None:
            train.dpo(
                sft, Dataset.from_parquet(str(pairs)), out / "model", **self._training(out, "DPO", self.preset.dpo)
            )

        return str(self._stage("dpo", self.preset.dpo, {"sft": sft, "preferences": pairs}, make) / "model")

    def prompts(self, split: str) -> Dataset:
        """Prompts to learn on ("train") or to evaluate on ("test")."""
        if self.preset.task is not None:
            count = self.preset.n_train_prompts if split == "train" else self.preset.n_test_prompts
            return data.prompts(self.preset.task, split, count, self.preset.seed)
        rows = Dataset.from_parquet(str(self.preferences() / f"{split}.parquet"))
        distinct = Dataset.from_dict({"prompt": list(dict.fromkeys(rows["prompt"][:]))})
        return distinct if split == "train" else distinct.select(range(min(len(distinct), self.preset.n_test_prompts)))

    # From policies to numbers --------------------------------------------------------------------------------------

    def rewards(self) -> dict[str, rewards.Reward]:
        """The learned reward as `proxy` and, in the pocket world, the known one as `gold`."""
        found: dict[str, rewards.Reward] = {"proxy": rewards.RewardModel(self.reward_model())}
        world = self.preset.task
        if world is None:
            return found

        def gold(prompts: list[str], completions: list[str], **_: object) -> list[float]:
            return [pocket.gold(world, *pair) for pair in zip(prompts, completions, strict=True)]

        return found | {"gold": gold}

    def scores(self) -> pd.DataFrame:
        """Every model on the same test prompts: a row per (model, step, prompt, sample), `final` or a checkpoint."""
        sft, trained = self.sft(), {"PPO": self.ppo(), "DPO": self.dpo()}
        final = {"base": self.base(), "SFT": sft, **trained}
        sizes = {"n_prompts": self.preset.n_test_prompts, "best_of": self.preset.best_of, "scored": SCORED}

        def make(out: Path) -> None:
            prompts, found, seed = self.prompts("test"), self.rewards(), self.preset.seed
            parts = []
            for method, model in final.items():
                checkpoints = _checkpoints(model) or [(0, Path(model))]
                for step, directory in checkpoints:
                    print(
                        f"  {method}{f' at step {step}' if step else ''}: completions of {len(prompts)} prompts",
                        flush=True,
                    )
                    last = step == checkpoints[-1][0]
                    n = SCORED["final" if last else "checkpoint"]
                    samples = sampling.sample(directory, prompts, n=n, reference=sft, seed=seed, **self.preset.sampling)
                    parts.append(
                        sampling.add_rewards(samples, found).assign(model=method, step=step, n=None, final=last)
                    )
            most = self.preset.best_of
            many = sampling.sample(sft, prompts, n=most, seed=seed + 1, **self.preset.sampling)
            scored = sampling.add_rewards(many, found)
            for n in [2**k for k in range(most.bit_length()) if 2**k < most] + [most]:
                parts.append(evaluate.best_of_n(scored, n=n).assign(step=None, n=n, final=n == most))
            runs.write_samples(out, pd.concat(parts, ignore_index=True))

        inputs = {**final, "reward_model": self.reward_model()}
        return pd.read_parquet(self._stage("scores", sizes | self.preset.sampling, inputs, make) / "samples.parquet")

    # Machinery -----------------------------------------------------------------------------------------------------

    def _stage(
        self, name: str, config: Settings, inputs: Mapping[str, str | Path], make: Callable[[Path], None]
    ) -> Path:
        """The directory of a finished run of this name, made now if need be; in one process each is asked for once."""
        if name not in self.runs:
            started = time.monotonic()

            def say_and_make(out: Path) -> None:
                print(f"{name}: at work{self._left(name)}", flush=True)
                make(out)

            files = {
                key: path for key, path in inputs.items() if Path(path).exists()
            }  # a hub id is in the config below
            ids = {key: str(path) for key, path in inputs.items() if key not in files}
            config = {"stage": name, "preset": self.preset.name, "seed": self.preset.seed, **ids, **config}
            run = runs.make(self.out, name, config, files, say_and_make, fresh=self.fresh)
            print(
                f"{name}: {'done before, kept' if run.reused else f'done in {clock(time.monotonic() - started)}'}",
                flush=True,
            )
            self.runs[name] = run
        return self.runs[name].directory

    def _left(self, name: str) -> str:
        """The time that is left from this stage on: the time spent so far, scaled by the preset's shares."""
        made = [stage for stage, run in self.runs.items() if not run.reused and stage in self.preset.shares]
        known = sum(self.preset.shares[stage] for stage in made)
        ahead = sum(share for stage, share in self.preset.shares.items() if stage not in self.runs)
        if name not in self.preset.shares or known == 0:
            return ""
        return f"; about {clock(sum(self.runs[stage].info['seconds'] for stage in made) / known * ahead)} left in all"

    def _training(self, out: Path, label: str, settings: Settings) -> Settings:
        return {"seed": self.preset.seed, "callbacks": [ProgressCallback(label), LogMetrics(out)], **settings}


class LogMetrics(LossCallback):
    """Appends what a trainer logs to metrics.csv of its run, a row per log, as it goes."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_loss(self, state: TrainerState, logs: dict[str, float]) -> None:
        runs.append_metrics(self.run, {"update": state.global_step, **logs})


def _checkpoints(model: str) -> list[tuple[int, Path]]:
    """(step, directory) of the checkpoints of a run in order, the finished model standing for the last."""
    run = Path(model).parent
    found = [*run.glob("model/checkpoint-*"), *run.glob("checkpoints/checkpoint-*")]
    steps = sorted((int(path.name.split("-")[1]), path) for path in found)
    return [*steps[:-1], (steps[-1][0], Path(model))] if steps else []


def _keep_short(source: Path, out: Path, tokenizer: Any, max_length: int) -> None:
    """Copy the pairs that fit `max_length` tokens, saying how many do not: training would cut or drop them."""
    for name in ("train", "test"):
        pairs = Dataset.from_parquet(str(source / f"{name}.parquet"))
        faults = data.find_faults(pairs, data.PREFERENCE, name, tokenizer, max_length)
        long = {fault.row for fault in faults if fault.kind == "too long"}
        print(f"  {name}: {len(pairs) - len(long)} pairs kept, {len(long)} left out: longer than {max_length} tokens")
        if len(long) == len(pairs):
            raise data.DataError(
                f"{source / name}: every pair is longer than {max_length} tokens; set reward_model.max_length"
            )
        pairs.select([row for row in range(len(pairs)) if row not in long]).to_parquet(out / f"{name}.parquet")
