"""The whole flow as stages: each is made once, by name, and handed over as a path; asking for one makes what it needs.

    base -> sft -> preferences -> reward_model -> ppo, dpo -> scores

Where the task has preferences of its own, these come before sft, whose demonstrations are their chosen completions.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from datasets import Dataset
from transformers import LlamaConfig

from rlhf_kit import data, evaluate, feedback, models, rewards, runs, sampling, stats, train
from rlhf_kit.ppo import PPOConfig, PPOTrainer
from rlhf_kit.presets import Preset, Settings
from rlhf_kit.progress import LossCallback, ProgressCallback, clock
from rlhf_kit.runs import Run

Inputs = Mapping[str, str | Path]  # of a stage, by name: files, directories and hub ids
HELD_OUT_RATER_SEED = 1_000_003  # the held-out pairs are judged by another draw of the same rater
SCORED = {"final": 2, "checkpoint": 1}  # completions of each test prompt; for a point along a curve one will do


@dataclass
class Pipeline:
    """The stages of one preset in one results folder; a finished stage is kept where config and inputs are the same."""

    preset: Preset
    out: Path
    fresh: bool = False
    runs: dict[str, Run] = field(default_factory=dict)

    def base(self) -> str:
        """The base model's directory or hub id; where there is none, one pretrained on the task's own preferences."""
        if self.preset.base_model is not None:
            return self.preset.base_model
        shape, settings = self.preset.base_shape, self.preset.pretrain

        def make(out: Path) -> None:
            print("  no base model given: a small one is pretrained on this text; its English is poor")
            rows = self.preset.task.preferences("train")
            if not isinstance(rows["prompt"][0], str):
                raise data.DataError("the data are chats, and need a model that knows them: name one with --base-model")
            texts = [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]
            tokenizer = train.train_tokenizer(texts, shape["vocab_size"])
            config = LlamaConfig(**shape | {"vocab_size": len(tokenizer)})
            train.pretrain(texts, tokenizer, config, out / "model", seed=self.preset.seed, **settings)

        return str(self._stage("base", {"shape": shape, **settings}, self._source(), make) / "model")

    def sft(self) -> str:
        """The model fine-tuned on the task's demonstrations."""
        base = self.base()
        config = {"n_demonstrations": self.preset.n_demonstrations, **self.preset.sft}

        def make(out: Path) -> None:
            train.sft(base, self.demonstrations(), out / "model", **self._training(out, "SFT", self.preset.sft))

        return str(self._stage("sft", config, {"base": base, **self._source()}, make) / "model")

    def demonstrations(self) -> Dataset:
        """What SFT learns from: `prompt, completion`."""
        rows = self.preset.task.demonstrations(self.preset.n_demonstrations, self.preset.seed)
        return self._ready(rows, ("prompt", "completion"), "demonstrations", self.preset.sft["max_length"])

    def preferences(self) -> Path:
        """Preferences as train.parquet and test.parquet: a rater's of the SFT model's samples, or the task's own."""
        task, seed, n = self.preset.task, self.preset.seed, self.preset.samples_per_prompt
        if task.rater(seed) is None:
            longest = self.preset.reward_model["max_length"]

            def keep(out: Path) -> None:
                for split in ("train", "test"):
                    pairs = self._ready(task.preferences(split), data.PREFERENCE, f"{split} pairs", longest)
                    pairs.to_parquet(out / f"{split}.parquet")

            return self._stage("preferences", {"max_length": longest}, {"base": self.base(), **self._source()}, keep)
        sft = self.sft()
        config = {"n_prompts": self.preset.n_preference_prompts, "samples_per_prompt": n, **self.preset.sampling}

        def judge(out: Path) -> None:
            for name, split, count, rater_seed in (
                ("train", "preference", self.preset.n_preference_prompts, seed),
                ("test", "test", None, seed + HELD_OUT_RATER_SEED),
            ):
                prompts, rater = task.prompts(split, count, seed), task.rater(rater_seed)
                assert rater is not None  # it was there a moment ago
                print(f"  {n} samples for each of {len(prompts)} {split} prompts, judged in pairs by {rater.name}")
                samples = sampling.sample(sft, prompts, n=n, seed=seed, **self.preset.sampling)
                feedback.collect(samples, rater, rater_seed).to_parquet(out / f"{name}.parquet")

        return self._stage("preferences", config, {"sft": sft, **self._source()}, judge)

    def reward_model(self) -> str:
        """The reward model, which starts from the SFT model."""
        return self._trained_on_preferences("reward_model", train.reward_model, "reward model")

    def ppo(self) -> str:
        """The policy optimised against the reward model."""
        sft, reward = self.sft(), self.reward_model()
        settings = {**self.preset.sampling, **self.preset.ppo}

        def make(out: Path) -> None:
            args = self._ppo_config(out / "checkpoints")
            trainer = PPOTrainer(sft, reward, args, self.prompts("train"), callbacks=_callbacks("PPO", out))
            trainer.train()
            trainer.save_model(str(out / "model"))

        config = {"n_prompts": self.preset.n_train_prompts, **settings}
        return str(self._stage("ppo", config, {"sft": sft, "reward_model": reward, **self._source()}, make) / "model")

    def _ppo_config(self, out: Path) -> PPOConfig:
        return PPOConfig(output_dir=str(out), seed=self.preset.seed, **{**self.preset.sampling, **self.preset.ppo})

    def dpo(self) -> str:
        """The policy optimised on the preferences directly."""
        return self._trained_on_preferences("dpo", train.dpo, "DPO")

    def _trained_on_preferences(self, name: str, method: Callable[..., object], label: str) -> str:
        sft, pairs, settings = self.sft(), self.preferences() / "train.parquet", getattr(self.preset, name)

        def make(out: Path) -> None:
            method(sft, data.load(pairs), out / "model", **self._training(out, label, settings))

        return str(self._stage(name, settings, {"sft": sft, "preferences": pairs}, make) / "model")

    def prompts(self, split: str) -> Dataset:
        """Prompts to learn on ("train") or to evaluate on ("test")."""
        count = self.preset.n_train_prompts if split == "train" else self.preset.n_test_prompts
        rows = self.preset.task.prompts(split, count, self.preset.seed)
        room = (models.max_length(self.base()) or sys.maxsize) - self.preset.sampling["max_completion_length"]
        longest = min(room, self.preset.reward_model["max_length"])
        return self._ready(rows, ("prompt",), f"{split} prompts", longest)

    def rewards(self) -> dict[str, rewards.Reward]:
        """The learned reward as `proxy` and, where the task knows the truth, `gold`."""
        proxy, gold = rewards.RewardModel(self.reward_model()), self.preset.task.gold
        return {"proxy": proxy} if gold is None else {"proxy": proxy, "gold": gold}

    def scores(self) -> pd.DataFrame:
        """Every model on the same test prompts: a row per (model, step, prompt, sample), `final` or a checkpoint."""
        # What PPO would refuse is refused before the first stage.
        self._ppo_config(self.out), self.prompts("train"), self.prompts("test")
        sft = self.sft()
        final = {"base": self.base(), "SFT": sft, "PPO": self.ppo(), "DPO": self.dpo()}
        sizes = {"n_prompts": self.preset.n_test_prompts, "best_of": self.preset.best_of, "scored": SCORED}

        def make(out: Path) -> None:
            prompts, found, seed = self.prompts("test"), self.rewards(), self.preset.seed
            parts = []
            for method, model in final.items():
                for step, directory in _checkpoints(model):
                    at = f" at step {step}" if step else ""
                    print(f"  {method}{at}: completions of {len(prompts)} prompts", flush=True)
                    last = directory == Path(model)
                    how = {"n": SCORED["final" if last else "checkpoint"], "seed": seed, **self.preset.sampling}
                    scored = evaluate.score({method: directory}, prompts, found, sft, **how)
                    parts.append(scored.assign(step=step, n=None, final=last))
            most = self.preset.best_of
            how = {"n": most, "seed": seed + 1, **self.preset.sampling}
            scored = evaluate.score({"best-of-n": sft}, prompts, found, **how)
            for n in [2**k for k in range(most.bit_length()) if 2**k < most] + [most]:
                best = sampling.best_of_n(scored, "proxy", n)
                parts.append(best.assign(kl=stats.best_of_n_kl(n), step=None, n=n, final=n == most))
            pd.concat(parts, ignore_index=True).to_parquet(out / "samples.parquet", index=False)

        inputs = {**final, "reward_model": self.reward_model(), **self._source()}
        return pd.read_parquet(self._stage("scores", sizes | self.preset.sampling, inputs, make) / "samples.parquet")

    def _stage(self, name: str, config: Settings, inputs: Inputs, make: Callable[[Path], None]) -> Path:
        """The directory of a finished run of this name, made now if need be; in one process each is asked for once."""
        if name not in self.runs:
            started = time.monotonic()

            def say_and_make(out: Path) -> None:
                print(f"{name}: at work{self._left(name)}", flush=True)
                make(out)

            files = {key: path for key, path in inputs.items() if Path(path).exists()}
            ids = {key: str(path) for key, path in inputs.items() if key not in files}  # of the hub: part of the config
            config = {"stage": name, "preset": self.preset.name, "seed": self.preset.seed, **ids, **config}
            run = runs.make(self.out, name, config, files, say_and_make, fresh=self.fresh)
            done = "done before, kept" if run.reused else f"done in {clock(time.monotonic() - started)}"
            print(f"{name}: {done}", flush=True)
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

    def _source(self) -> dict[str, str | Path]:
        """The file or hub id that the task reads, as an input of a stage."""
        return {} if self.preset.task.source is None else {"source": self.preset.task.source}

    def _ready(self, rows: Dataset, columns: tuple[str, ...], what: str, max_length: int) -> Dataset:
        """The rows that a stage can use (`data.ready`), of no more tokens than `max_length` and than the base takes."""
        base = self.base()
        longest = min(max_length, models.max_length(base) or sys.maxsize)
        return data.ready(rows, models.load_tokenizer(base), columns, longest, what)

    def _training(self, out: Path, label: str, settings: Settings) -> Settings:
        return {"seed": self.preset.seed, "callbacks": _callbacks(label, out), **settings}


def _callbacks(label: str, run: Path) -> list[LossCallback]:
    """Progress, and each log as a row of metrics.csv."""
    log = LossCallback()
    log.on_loss = lambda state, logs: runs.append_metrics(run, {"update": state.global_step, **logs})
    return [ProgressCallback(label), log]


def _checkpoints(model: str) -> list[tuple[int, Path]]:
    """(step, directory) of the checkpoints of a run in order; the model stands for the last, or alone at step 0."""
    run = Path(model).parent
    found = [*run.glob("model/checkpoint-*"), *run.glob("checkpoints/checkpoint-*")]
    steps = sorted((int(path.name.split("-")[1]), path) for path in found)
    return [*steps[:-1], (steps[-1][0] if steps else 0, Path(model))]
