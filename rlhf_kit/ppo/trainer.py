"""Proximal policy optimisation for language models, readable from top to bottom.

The objective (InstructGPT, Ouyang et al. 2022, 2203.02155, eq. 2):  E[r(x, y) - kl_coef * log(pi(y|x) / pi_ref(y|x))]
plus ptx_coef * E[log pi(demonstration)], maximised by PPO (Schulman et al. 2017, 1707.06347). One update is:

1. roll out: the policy samples a completion of each prompt of a batch at `temperature`;
2. score: log-probs under policy and reference, values, and the reward of each whole completion;
3. estimate advantages: the KL on each token, the score on the last token, GAE, whitening;
4. optimise: `ppo_epochs` passes over the batch in `num_minibatches` optimizer steps each.

One step of `transformers.Trainer` is one update, so a checkpoint lies between two rollouts and resuming is exact.
"""

import hashlib
import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from rlhf_kit import data, files, memory, models
from rlhf_kit.models import ModelPath, Roles, Tokens
from rlhf_kit.ppo import maths
from rlhf_kit.ppo.alarms import Alarms, repetition
from rlhf_kit.ppo.config import PPOConfig
from rlhf_kit.progress import ProgressCallback
from rlhf_kit.rewards import ARGUMENTS, Ensemble, Reward, RewardModel, checked

STATE = "ppo_state.json"
# How the names of settings begin that may change when a run goes on: what it writes, evaluation, memory.
FREE = (
    *("output_dir", "log", "save_", "eval_", "per_device_eval", "report_to", "run_name", "project", "trackio_", "hub_"),
    *("push_to_hub", "disable_tqdm", "load_best", "metric_for", "greater_is", "ignore_data", "dataloader_num", "ddp_"),
    *("max_memory_gib", "micro_batch_size", "gradient_checkpointing", "activation_checkpointing"),
)
Rows = list[dict[str, Any]]  # of a dataset
Minibatches = list[list[Tensor]]  # each is a list of micro-batches of row numbers
Metrics = dict[str, float]


class Trajectory(NamedTuple):
    """A batch of B completions of up to C tokens; every (B, C) tensor is 0 where `tokens.completion_mask` is 0."""

    tokens: Tokens
    logprobs: Tensor  # (B, C), nats
    reference_logprobs: Tensor  # (B, C), nats
    values: Tensor  # (B, C)
    scores: Tensor  # (B,), rewards less the missing-EOS penalty
    advantages: Tensor  # (B, C)
    returns: Tensor  # (B, C)

    def rows(self, index: Tensor, where: torch.device) -> "Trajectory":
        """The given rows on a device, without the columns that are padding in all of them."""
        tokens = self.tokens.rows(index)
        width = tokens.completion_mask.shape[1]
        rest = (t[index] if t.dim() == 1 else t[index, :width] for t in self[1:])
        return Trajectory(tokens.to(where), *(t.to(where) for t in rest))


class PPOTrainer(Trainer):
    """PPO on a `prompt` column (text or chat) with any reward function or reward model.

    model: the SFT model's directory or hub id; reward: a function, a reward model's directory, or a list of these (an
    ensemble); ref_model: the reference (default: `model`); value_model: where the values start (default: the reward
    model with the policy's base and tokenizer, else the policy with a zero head); ptx_dataset: `prompt, completion`
    rows for `ptx_coef`. With adapters the base is loaded once, for all roles and the reward models over it.
    """

    control: Any  # Trainer's

    def __init__(
        self,
        model: ModelPath,
        reward: Reward | ModelPath | Sequence[Reward | ModelPath],
        args: PPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        ref_model: ModelPath | None = None,
        value_model: ModelPath | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        ptx_dataset: Dataset | None = None,
    ) -> None:
        models.check_one_device(args)
        if (args.ptx_coef > 0) != (ptx_dataset is not None):
            raise ValueError("ptx_coef and ptx_dataset go together: give both or neither")
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=args.output_dir).close()  # OSError now, not after the work
        set_seed(args.seed)  # new adapters are drawn before Trainer sets the seed
        tokenizer = processing_class or models.load_tokenizer(model)
        self.longest = (models.max_length(model) or 10**9) - args.max_completion_length  # of a prompt
        train_dataset = self.prompts(train_dataset, tokenizer, "train_dataset")
        if eval_dataset is not None:
            eval_dataset = self.prompts(eval_dataset, tokenizer)
        if ptx_dataset is not None:
            ptx_dataset = data.ready(ptx_dataset, tokenizer, ["prompt", "completion"], source="ptx_dataset")
        self.roles, self.reward = load_models(model, reward, args, ref_model, value_model, tokenizer, train_dataset)
        self.policy = self.roles.use("policy")
        self.stop_ids = models.stop_ids(self.policy, tokenizer)
        self.policy.generation_config.eos_token_id = self.stop_ids  # saved with the policy
        self.policy.generation_config.validate(strict=True)  # ValueError now, not when it is saved
        members = self.reward.members if isinstance(self.reward, Ensemble) else [self.reward]
        heads = [_hash([r.head.tolist(), r.shift, r.scale]) if isinstance(r, RewardModel) else "" for r in members]
        names = [head or getattr(r, "__qualname__", type(r).__name__) for head, r in zip(heads, members, strict=True)]
        rows = {"train_dataset": _hash(train_dataset[:]), "ptx_dataset": _hash(ptx_dataset and ptx_dataset[:])}
        self.inputs = {"model": str(model), "ref_model": str(ref_model or model), "reward": names, **rows}
        self.kl_coef = args.kl_coef
        self.ptx_dataset: Any = ptx_dataset
        self.samples = pd.DataFrame()  # the last rollouts: prompt, completion, reward, kl, n_tokens, finished
        self._metrics: list[Metrics] = []  # of each update since the last log
        callbacks = [ProgressCallback("PPO", every=1)] if callbacks is None else callbacks
        super().__init__(
            model=self.roles,
            args=args,
            data_collator=lambda rows: {"rows": rows},
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[*callbacks, Alarms(lambda: self.samples)],
        )
        self.remove_callback(PrinterCallback)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("PPO divides prompts among processes, not weights: use DDP instead of FSDP or DeepSpeed")

    def prompts(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, source: str = "eval_dataset") -> Dataset:
        """`data.ready`; DataError also for a prompt that is empty, and for one that leaves no room to complete it."""
        if not isinstance(dataset, Dataset):
            raise data.DataError(f"{source}: is a {type(dataset).__name__}; give one datasets.Dataset with `prompt`")
        dataset = data.ready(dataset, tokenizer, ["prompt"], source=source)
        empty = {fault.row for fault in data.find_faults(dataset, ["prompt"], source) if fault.kind == "empty text"}
        for row, length in enumerate(map(len, models.encode(tokenizer, dataset["prompt"][:]))):
            if row in empty or length > self.longest:
                what = "empty" if row in empty else f"of {length} tokens, and {self.longest} leave room to complete it"
                raise data.DataError(f"{source}, row {row} (counting from 0): the prompt is {what}; drop such rows")
        return dataset

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One update (steps 1 to 4 above); Trainer makes the optimizer step of its last minibatch, logs and saves."""
        args, rows, started = self.args, inputs["rows"], time.perf_counter()
        self.roles.eval()
        tokens = self.rollout(rows)
        minibatches = self.partition(tokens)
        trajectory, metrics = self.make_trajectory(rows, tokens, minibatches)
        rolled_out = time.perf_counter()
        self.roles.train()
        loss, optimisation = self.optimise(trajectory, minibatches)
        if (target := args.adaptive_kl_target) is not None:
            completions = len(rows) * args.world_size
            self.kl_coef = maths.adapt_kl_coef(self.kl_coef, metrics["kl"], target, completions, args.kl_horizon)
        times = {"seconds_rollout": rolled_out - started, "seconds_optimise": time.perf_counter() - rolled_out}
        self._metrics.append({**metrics, **optimisation, **times})
        return loss.to(args.device)

    # 1. Roll out ---------------------------------------------------------------------------------------------------
    def rollout(self, rows: Rows) -> Tokens:
        """A completion from the policy for the prompt of each row: Tokens (B, P + C) on the CPU."""
        args, tokenizer, policy = self.args, self.processing_class, self.roles.use("policy")
        prompts = models.encode(tokenizer, [row["prompt"] for row in rows])
        with self.accelerator.autocast():
            tokens = models.generate(policy, tokenizer, prompts, args.max_completion_length, args.temperature)
        return tokens.to(torch.device("cpu"))

    def partition(self, tokens: Tokens) -> Minibatches:
        """The minibatches of one epoch."""
        return maths.partition(tokens.attention_mask.sum(1), self.args.num_minibatches, self.args.micro_batch_size)

    # 2. Score, 3. estimate advantages ------------------------------------------------------------------------------
    @torch.no_grad()
    def make_trajectory(self, rows: Rows, tokens: Tokens, minibatches: Minibatches) -> tuple[Trajectory, Metrics]:
        """What the loss needs to know of the completions, and the metrics of the rollout.

        The log-probs are computed in the micro-batches of the first epoch, so that its first ratios are exactly 1.
        """
        args, mask = self.args, tokens.completion_mask
        logprobs, reference_logprobs, entropy, values = (torch.zeros(mask.shape) for _ in range(4))
        for index in chain.from_iterable(minibatches):
            micro = tokens.rows(index).to(self.policy.device)
            width = micro.completion_mask.shape[1]
            parts = (*self.logprobs("policy", micro, True), self.logprobs("reference", micro)[0], self.values(micro))
            for out, part in zip((logprobs, entropy, reference_logprobs, values), parts, strict=True):
                out[index, :width] = part.float().cpu()

        found, kl = self.rewards(rows, tokens), (logprobs - reference_logprobs) * mask
        rewards = torch.tensor(found["reward"], dtype=torch.float32)
        unfinished = ~models.finished(tokens, self.stop_ids)
        scores = rewards - args.missing_eos_penalty * unfinished
        per_token = maths.token_rewards(scores, logprobs, reference_logprobs, mask, self.kl_coef)
        advantages, returns = maths.gae(per_token, values, mask, args.gamma, args.gae_lambda)
        written = {"kl": kl.sum(1).tolist(), "n_tokens": mask.sum(1).tolist(), "finished": (~unfinished).tolist()}
        self.samples = found.assign(**written, repetition=found["completion"].map(repetition))
        metrics = {
            "reward": rewards.mean(),
            "kl": kl.sum(1).mean(),
            "objective": per_token.sum(1).mean(),
            "entropy": self._summed(entropy.sum()) / self._summed(mask.sum()),
            "completion_length": mask.sum(1).float().mean(),
            "unfinished": unfinished.float().mean(),
            "explained_variance": maths.explained_variance(values, returns, mask, self._summed),
            "repetition": torch.tensor((self.samples["repetition"] > 0.5).mean()),
        }
        if "disagreement" in found:
            metrics["disagreement"] = torch.tensor(found["disagreement"].mean())
        advantages = maths.whiten(advantages, mask, self._summed)
        trajectory = Trajectory(tokens, logprobs, reference_logprobs, values, scores, advantages, returns)
        means = self._summed(torch.stack(list(metrics.values()))) / args.world_size
        return trajectory, dict(zip(metrics, means.tolist(), strict=True)) | {"kl_coef": self.kl_coef}

    def rewards(self, rows: Rows, tokens: Tokens) -> pd.DataFrame:
        """`prompt, completion, reward` of each row, and an ensemble's `disagreement`: its standard deviation."""
        prompts = [row["prompt"] for row in rows]
        texts = models.decode_completions(self.processing_class, tokens)
        found = pd.DataFrame({"prompt": prompts, "completion": texts})
        completions = list(map(models.as_completion, prompts, texts))
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ARGUMENTS}
        if isinstance(self.reward, Ensemble):
            each = self.reward.each(prompts, completions, **columns)
            rewards = self.reward.combined(each).tolist()
            found["disagreement"] = each.std(0).tolist()
        else:
            rewards = self.reward(prompts, completions, **columns)
        return found.assign(reward=checked(rewards, len(rows)).tolist())

    def logprobs(self, role: str, tokens: Tokens, with_entropy: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probs of the completions under a role and, if asked, entropies, in nats: (B, C) each."""
        with self.accelerator.autocast():  # Trainer does this only for a model that it calls itself
            return models.completion_logprobs(self.roles.use(role), tokens, self.args.temperature, with_entropy)

    def values(self, tokens: Tokens) -> Tensor:
        """V(x, y_<t) (B, C)."""
        with self.accelerator.autocast():
            return self.roles.values(tokens)

    # 4. Optimise ---------------------------------------------------------------------------------------------------
    def optimise(self, trajectory: Trajectory, minibatches: Minibatches) -> tuple[Tensor, Metrics]:
        """All epochs over one trajectory: the mean loss (scalar) and metrics; the last gradient is not applied."""
        history: list[Tensor] = []
        later = (minibatch for _ in range(self.args.ppo_epochs - 1) for minibatch in self.partition(trajectory.tokens))
        for minibatch in chain(minibatches, later):
            if history:
                if self.args.max_grad_norm > 0:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            history.append(self.accumulate_gradient(trajectory, minibatch))
            self._refuse_nan(history[-1][0])
            if self.args.early_stop_kl is not None and history[-1][3] > self.args.early_stop_kl:
                # The policy has moved far enough: drop this gradient, without which the optimizer changes nothing.
                self.model.zero_grad(set_to_none=True)
                break
        mean = torch.stack(history).mean(0)
        names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction")
        metrics = dict(zip(names, mean[1:5].tolist(), strict=True))
        return mean[0], metrics | {"first_ratio_deviation": history[0][5].item(), "minibatches": float(len(history))}

    def accumulate_gradient(self, trajectory: Trajectory, minibatch: list[Tensor]) -> Tensor:
        """Gradient of one minibatch: a mean over its tokens, whatever the micro-batches and processes.

        Returns loss, policy loss, value loss, approximate KL, clip fraction (token means) and max |ratio - 1|: (6,).
        """
        args = self.args
        n_tokens = self._summed(trajectory.tokens.completion_mask[torch.cat(minibatch)].sum()).item()
        totals = torch.zeros(6)
        for index in minibatch:
            t = trajectory.rows(index, self.policy.device)
            mask = t.tokens.completion_mask
            # Run backward before the role changes: with adapters, switching first would lose the policy's gradient.
            logprobs, entropy = self.logprobs("policy", t.tokens, with_entropy=args.entropy_coef > 0)
            log_ratio = (logprobs - t.logprobs) * mask
            ratio = log_ratio.exp()
            surrogate = (maths.policy_loss(ratio, t.advantages, args.clip_range) * mask).sum() / n_tokens
            loss = surrogate - args.entropy_coef * entropy.sum() / n_tokens
            self.accelerator.backward(loss)
            errors = maths.value_loss(self.values(t.tokens), t.values, t.returns, args.value_clip_range)
            squared = (errors * mask).sum() / n_tokens
            self.accelerator.backward(args.vf_coef * squared)
            with torch.no_grad():
                k3 = (log_ratio.expm1() - log_ratio).sum() / n_tokens  # r - 1 - log r, exact near r = 1
                clipped = (((ratio - 1).abs() > args.clip_range) * mask).sum() / n_tokens
                loss = loss + args.vf_coef * squared
                totals[:5] += torch.stack([loss, surrogate, squared, k3, clipped]).float().cpu()
                totals[5] = max(totals[5], (ratio - 1).abs().max().cpu())
        if args.ptx_coef > 0:
            totals[0] += args.ptx_coef * self.accumulate_ptx_gradient(sum(map(len, minibatch)))
        if args.world_size > 1:  # one reduction, not one for each tensor
            gradients = [parameter.grad for parameter in self.roles.learning if parameter.grad is not None]
            vector_to_parameters(self._summed(parameters_to_vector(gradients)), gradients)
        totals[:5] = self._summed(totals[:5])
        totals[5] = self.accelerator.gather(totals[5:].to(args.device)).max()
        return totals

    def accumulate_ptx_gradient(self, n: int) -> float:
        """Gradient of ptx_coef times the mean token NLL of `n` demonstrations (2203.02155, eq. 2); returns the NLL."""
        rows = self.ptx_dataset[torch.randint(len(self.ptx_dataset), (n,)).tolist()]
        tokens = models.encode_pairs(self.processing_class, rows["prompt"], rows["completion"])
        n_tokens, total = self._summed(tokens.completion_mask.sum()).item(), 0.0
        for index in torch.arange(n).split(self.args.micro_batch_size):
            micro = tokens.rows(index).to(self.policy.device)
            with self.accelerator.autocast():
                logprobs, _ = models.completion_logprobs(self.roles.use("policy"), micro)
            nll = -logprobs.sum() / n_tokens
            self.accelerator.backward(self.args.ptx_coef * nll)
            total += nll.item()
        return total

    def _summed(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        return self.accelerator.reduce(tensor.to(self.args.device), "sum").to(tensor.device)

    # What Trainer calls --------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer.train from the seed, whatever was drawn before; ValueError for a torn checkpoint or another run's."""
        checkpoint = self.checkpoint(resume_from_checkpoint) if resume_from_checkpoint else None
        set_seed(self.args.seed + self.args.process_index)  # processes must not sample the same tokens
        return super().train(checkpoint, *args, **kwargs)

    def checkpoint(self, asked: str | Path | bool) -> str:
        """The checkpoint that is asked for, or for True the newest whole one."""
        there = sorted(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
        for folder in there if asked is True else [Path(str(asked))]:
            run, torn = state_of(folder)
            if torn and asked is True:
                warnings.warn(f"{folder} is passed over: {torn}", stacklevel=3)
                continue
            if not torn and (differing := "; ".join(files.differences(run, self.run()))):
                torn = f"it belongs to another run ({differing}); undo that, or begin anew in another output_dir"
            if torn:
                raise ValueError(f"{folder} cannot be resumed from: {torn}")
            return str(folder)
        raise ValueError(f"{self.args.output_dir}: no whole checkpoint is there to resume from; train from the start")

    def run(self) -> dict[str, Any]:
        """What this run began with, as JSON: a run that goes on from its checkpoint began alike."""
        free = (*FREE, "max_steps", "num_train_epochs") if self.args.lr_scheduler_type.startswith("constant") else FREE
        settings = {name: value for name, value in self.args.to_dict().items() if not name.startswith(free)}
        began = {"processes": self.args.world_size, **self.inputs, **settings}
        return dict(json.loads(json.dumps(began, default=str)))

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Metrics:
        """Means over the evaluation prompts, with the same random numbers each time; ValueError without prompts."""
        dataset = self.eval_dataset if eval_dataset is None else self.prompts(eval_dataset, self.processing_class)
        if dataset is None:
            raise ValueError("evaluate: there is no eval_dataset; give one here or to the trainer")
        totals: Metrics = defaultdict(float)
        was_training, samples = self.roles.training, self.samples
        self.roles.eval()
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            for batch in dataset.iter(self.args.per_device_eval_batch_size):
                rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
                micro_batches = list(torch.arange(len(rows)).split(self.args.micro_batch_size))
                _, metrics = self.make_trajectory(rows, self.rollout(rows), [micro_batches])
                # Entropy is a mean over tokens, so it is weighted by length here and divided by the mean length below.
                metrics["entropy"] *= metrics["completion_length"]
                for name in ("reward", "kl", "objective", "entropy", "completion_length", "unfinished"):
                    totals[f"{metric_key_prefix}_{name}"] += metrics[name] * len(rows) / len(dataset)
        totals[f"{metric_key_prefix}_entropy"] /= totals[f"{metric_key_prefix}_completion_length"]
        self.roles.train(was_training)
        self.samples = samples  # of the last update, which the alarms show
        self.log(dict(totals))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, totals)
        return dict(totals)

    def log(self, logs: Metrics, start_time: float | None = None) -> None:
        """Trainer.log with the means of PPO's metrics since the last log."""
        if "loss" in logs:
            logs |= {name: sum(row[name] for row in self._metrics) / len(self._metrics) for name in self._metrics[0]}
            self._metrics.clear()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write policy and tokenizer to `output_dir`, the value model to `value`; ModelError if they read otherwise."""
        out = Path(output_dir or self.args.output_dir)
        if not self.args.should_save:
            return
        out.mkdir(parents=True, exist_ok=True)
        (out / STATE).write_text(json.dumps({"kl_coef": self.kl_coef}) + "\n")
        self.roles.save(out)
        self.policy.generation_config.save_pretrained(out)
        self.processing_class.save_pretrained(out)
        if _internal_call:  # in a checkpoint
            return
        trained, texts = [p.detach().clone() for p in self.roles.learning], self.train_dataset["prompt"][:8]
        with torch.random.fork_rng():
            self.roles.load(out)
        same = [torch.equal(read, before) for read, before in zip(self.roles.learning, trained, strict=True)]
        for parameter, before in zip(self.roles.learning, trained, strict=True):
            parameter.data.copy_(before)
        ids = [models.encode(each, texts) for each in (models.load_tokenizer(out), self.processing_class)]
        if not all(same) or ids[0] != ids[1]:
            raise models.ModelError(f"{out}: weights or tokens read again are not those that were trained; save anew")

    # Trainer has no public methods that write a whole checkpoint or read weights from one. Its own version of the last
    # two does not know the roles and would load nothing.
    def _save_checkpoint(self, *args: Any) -> None:
        """STATE is written last, with the size of each file, and older checkpoints are deleted only then."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(*args)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save and not self.args.save_only_model:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            sizes = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*.*") if p.name != STATE}
            state = {"kl_coef": self.kl_coef, "run": self.run(), "files": sizes}
            (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.roles.load(resume_from_checkpoint)
        self.kl_coef = json.loads((Path(resume_from_checkpoint) / STATE).read_text())["kl_coef"]

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _refuse_nan(self, loss: Tensor) -> None:
        """Raise FloatingPointError before a gradient that is not finite is applied, so that checkpoints stay good."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.roles.learning if p.grad is not None])
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            saved = get_last_checkpoint(self.args.output_dir)
            last = f"the last good checkpoint is {saved}" if saved else "no checkpoint was saved (save_strategy)"
            found = f"a loss of {loss.item()} with a gradient of norm {norm.item()}; it was not applied"
            raise FloatingPointError(f"PPO: update {self.state.global_step + 1} has {found}, and {last}")


def state_of(checkpoint: Path) -> tuple[dict[str, Any], str]:
    """What the run of a checkpoint began with, and where it is not whole, the file that is missing or broken off."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        broken = [name for name, size in state["files"].items() if (checkpoint / name).stat().st_size != size]
        return state["run"], f"{broken[0]} has lost its end" if broken else ""
    except (OSError, ValueError, KeyError) as error:
        return {}, f"save_only_model, or a save that was broken off: {STATE} or a file it lists is not whole ({error})"


def _hash(content: Any) -> str:
    """A hash of content; what is not JSON counts by its type."""
    return hashlib.sha256(json.dumps(content, default=lambda cell: type(cell).__name__).encode()).hexdigest()[:12]


def load_models(
    model: ModelPath,
    reward: Reward | ModelPath | Sequence[Reward | ModelPath],
    args: PPOConfig,
    ref_model: ModelPath | None,
    value_model: ModelPath | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
) -> tuple[Roles, Reward]:
    """The roles of a run and its reward; reward adapters over the policy's base join the roles.

    Raises ValueError, before any weights are loaded, where the run is estimated to need too much memory.
    """
    loading = {name: getattr(args, name) for name in models.LOADING}
    given: Any = reward.members if isinstance(reward, Ensemble) else reward
    given = given if isinstance(given, list | tuple) else [given]
    members = {f"reward_{i}": each if callable(each) else RewardModel(each) for i, each in enumerate(given)}
    learned = {role: each for role, each in members.items() if isinstance(each, RewardModel)}
    adapters, stored = args.lora is not None or models.is_adapter(model), models.stored_as(model, **loading)
    fitting = {  # those on the policy's base or, in full fine-tuning, on weights of their own
        role: each
        for role, each in learned.items()
        if models.is_adapter(each.path) == adapters and (not adapters or models.same_base(each.path, model))
    }
    first = fitting.get("reward_0")
    if value_model is None and first and first.tokenizer.get_vocab() == tokenizer.get_vocab():
        value_model = first.path
    joining = {role: each.path for role, each in fitting.items() if adapters and each.stored == stored}
    if args.max_memory_gib is not None or models.device().type != "cpu":
        same = ("load_in_4bit", "dtype", "lora", "max_completion_length", "micro_batch_size", "optim")
        settings: dict[str, Any] = {name: getattr(args, name) for name in (*same, "activation_checkpointing")}
        settings["prompt_length"] = max(map(len, models.encode(tokenizer, prompts["prompt"][:])))
        settings |= {"rollout": args.per_device_train_batch_size, "ensemble": len(learned)}
        settings["reward_model"] = next((each.path for role, each in learned.items() if role not in joining), None)
        fits, _, sentence = memory.advise(model, "ppo", args.max_memory_gib or memory.device_memory(), **settings)
        if not fits:
            raise ValueError(f"PPO on {model}: {sentence}\n(PPOConfig's max_memory_gib sets another limit)")
    roles = models.load_roles(model, ref_model, value_model, args.lora, joining, **loading)
    rewards = [each.on(roles, role) if role in joining else each for role, each in members.items()]
    if len(rewards) == 1:
        return roles, rewards[0]
    return roles, Ensemble(rewards, reward.combine if isinstance(reward, Ensemble) else "mean")
