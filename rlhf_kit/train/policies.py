"""Every method that trains a policy: pretraining and SFT; DPO and KTO; RLOO, GRPO and best-of-n fine-tuning."""

import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Trainer, TrainingArguments

from rlhf_kit import data, models, sampling
from rlhf_kit.models import Model, ModelPath
from rlhf_kit.models.rendering import wrap
from rlhf_kit.ppo import PPOConfig
from rlhf_kit.rewards import ARGUMENTS, Reward, RewardModel, checked
from rlhf_kit.train.common import Training, fit, new_directory

PRETRAINING: dict[str, Any] = {"learning_rate": 3e-3, "adam_beta2": 0.98, "weight_decay": 0.01}
PRETRAINING |= {"lr_scheduler_type": "cosine", "warmup_steps": 0.05}  # a share of the steps
# PPO's defaults under TRL's names, so that only the methods differ; a batch is 16 prompts, 4 completions of each.
SAME = ["per_device_train_batch_size", "max_completion_length", "temperature", "learning_rate", "adam_epsilon"]
LIKE_PPO: dict[str, Any] = {name: getattr(PPOConfig, name) for name in [*SAME, "logging_steps"]}
LIKE_PPO |= {"beta": PPOConfig.kl_coef, "epsilon": PPOConfig.clip_range, "num_generations": 4, "disable_dropout": True}
ON_POLICY = {"RLOO": (trl.RLOOTrainer, trl.RLOOConfig), "GRPO": (trl.GRPOTrainer, trl.GRPOConfig)}


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 258 to `vocab_size` entries, with the kit's special tokens and chat template."""
    return wrap(Tokenizer(BPE())).train_new_from_iterator(texts, vocab_size, show_progress=False)


def pretrain(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, config: LlamaConfig, out: ModelPath, **options: Any
) -> str:
    """Train a small Llama from random weights by cross-entropy (nats per token), so that RLHF runs on a CPU.

    EOS follows every text. A text longer than `config.max_position_embeddings` goes on in a further row. The vocabulary
    and the special tokens of `config` become the tokenizer's. Options: see `help(rk.train)` (TrainingArguments).
    """
    if not any(texts):
        raise ValueError("pretrain: there is nothing to learn from; give texts that are not empty")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config.update({"vocab_size": len(tokenizer), "bos_token_id": None, **special})
    with new_directory(out) as folder, tempfile.TemporaryDirectory() as start:
        torch.manual_seed(options.get("seed", 0))
        model = transformers.LlamaForCausalLM(config)
        model.generation_config = transformers.GenerationConfig(**special, do_sample=True)
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
        training = Training("pretraining", TrainingArguments, start, folder, **(PRETRAINING | options))
        ended, limit = [f"{text}{tokenizer.eos_token}" for text in texts], config.max_position_embeddings
        pieces = tokenizer(ended, truncation=True, max_length=limit, return_overflowing_tokens=True)["input_ids"]
        rows = [ids for ids in pieces if len(ids) > 1]  # one token alone predicts nothing
        dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
        collator = transformers.DataCollatorForSeq2Seq(training.tokenizer)  # pads labels with -100: not in the loss
        fit(training.trainer(Trainer, dataset, data_collator=collator), folder)
    return str(out)


def sft(model: ModelPath, dataset: Dataset, out: ModelPath, **options: Any) -> str:
    """Fine-tune on `prompt, completion`: cross-entropy on completions only. Options: see `help(rk.train)`."""
    with new_directory(out) as folder:
        training = Training("SFT", trl.SFTConfig, model, folder, **options)
        rows = training.ready(dataset, "prompt", "completion")
        fit(training.trainer(trl.SFTTrainer, rows), folder)
    return str(out)


def dpo(model: ModelPath, dataset: Dataset, out: ModelPath, **options: Any) -> str:
    """Direct preference optimisation (Rafailov et al. 2023, 2305.18290, eq. 7) against a frozen copy of `model`.

    Learns from `prompt, chosen, rejected`. Options: see `help(rk.train)`.
    """
    with new_directory(out) as folder:
        training = Training("DPO", trl.DPOConfig, model, folder, **options)
        rows = training.ready(dataset, "prompt", "chosen", "rejected")
        fit(training.trainer(trl.DPOTrainer, rows), folder)
    return str(out)


def kto(model: ModelPath, dataset: Dataset, out: ModelPath, **options: Any) -> str:
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024, 2402.01306, section 4.1) against a frozen copy of `model`.

    Learns from single completions that are wanted or not (`prompt, completion, label`; `label` is a bool). The seed
    shuffles the rows once, because a batch's KL is estimated from its own completions under each other's prompts.
    ValueError if the labels are not of both kinds. Options: see `help(rk.train)`.
    """
    with new_directory(out) as folder:
        training = Training("KTO", trl.KTOConfig, model, folder, **options)
        rows = training.ready(dataset, "prompt", "completion", "label")
        if set(rows["label"]) != {True, False}:
            raise ValueError("kto: the column `label` must hold both True (wanted) and False (not wanted)")
        fit(training.trainer(trl.KTOTrainer, rows.shuffle(seed=training.args.seed)), folder)
    return str(out)


def rloo(model: ModelPath, reward: Reward | ModelPath, prompts: Dataset, out: ModelPath, **options: Any) -> str:
    """REINFORCE whose baseline is the mean reward of the prompt's other completions (RLOO, 2402.14740).

    Maximises PPO's objective E[r - missing_eos_penalty * unfinished - beta * log(pi / pi_ref)] by the clipped ratio of
    whole completions; pi_ref is `model`. The penalty is taken off the logged `reward`, but not off
    `rewards/score/mean`; `kl` is a mean over tokens. Options: see `help(rk.train)`, and `missing_eos_penalty` (1 by
    default); `per_device_train_batch_size` counts completions, `max_steps` counts optimizer steps.
    ValueError if the prompts are too few or too long, ModelError if `model` counts positions from its padding.
    """
    return _on_policy("RLOO", model, reward, prompts, out, **options)


def grpo(model: ModelPath, reward: Reward | ModelPath, prompts: Dataset, out: ModelPath, **options: Any) -> str:
    """Group-relative policy optimisation (2402.03300, eq. 3): advantages are rewards whitened within each prompt.

    As `rloo`, also in its options, but beta weighs a KL in the loss of each token (k3 estimator), and rewards are
    divided by their spread within a prompt: the same number means more or less than in PPO. The loss is a mean over the
    batch's tokens (TRL's `loss_type="dapo"`; `"grpo"` is the paper's mean of each completion's mean).
    """
    return _on_policy("GRPO", model, reward, prompts, out, **options)


def _on_policy(
    method: str, model: ModelPath, reward: Reward | ModelPath, prompts: Dataset, out: ModelPath, **options: Any
) -> str:
    with new_directory(out) as folder:
        trainer_class, config_class = ON_POLICY[method]
        weights = [1.0, -options.pop("missing_eos_penalty", 1.0)]
        training = Training(method, config_class, model, folder, **(LIKE_PPO | {"reward_weights": weights} | options))
        args, tokenizer = training.args, training.tokenizer
        rows = data.ready(prompts, tokenizer, ["prompt"], models.max_length(model))
        names = {name: f"column {name}" for name in rows.column_names if name != "prompt"}
        prompts = rows.rename_columns(names)  # under names that TRL does not take for its own
        longest = max(map(len, models.encode(tokenizer, prompts["prompt"][:])))
        if len(prompts) < (needed := args.generation_batch_size // args.num_generations):
            raise ValueError(
                f"{method}: {len(prompts)} prompts are fewer than the {needed} of one batch "
                "(per_device_train_batch_size / num_generations); lower the first, raise the second, or give more"
            )
        learned = reward if callable(reward) else RewardModel(reward)

        # TRL passes more than a reward function of this kit takes, and reads NaN as "not applicable".
        def score(prompts: list[Any], completions: list[Any], **given: Any) -> list[float]:
            known = {name: given[column] for name, column in names.items() if name not in ARGUMENTS}
            return checked(learned(prompts, completions, **known), len(prompts)).tolist()

        def unfinished(completion_ids: list[list[int]], **given: Any) -> list[float]:
            return [float(ids[-1] not in stops) for ids in completion_ids]

        trainer = training.trainer(trainer_class, prompts, reward_funcs=[score, unfinished])
        stops = models.stop_ids(trainer.model, tokenizer)
        trainer.model.generation_config.eos_token_id = stops  # what is saved must know where to stop
        if args.disable_dropout:
            models.switch_off_dropout(trainer.model)  # TRL's own leaves out attention
        models.check_positions(trainer.model, longest, args.max_completion_length)
        _refuse_absolute_positions(model, trainer.model.eval(), tokenizer)
        fit(trainer, folder)
    return str(out)


@torch.no_grad()
def _refuse_absolute_positions(path: ModelPath, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """ModelError if padding changes the next token's logits: TRL pads prompts on the left and gives no positions."""
    row = list(range(4))
    ids, mask = (each.to(model.device) for each in models.padded([row, 2 * row], "left", tokenizer.pad_token_id))
    alone, shifted = model(input_ids=ids[:1, 4:]).logits[0, -1], model(input_ids=ids, attention_mask=mask).logits[0, -1]
    if (alone - shifted).abs().max() > 0.1 * alone.std():
        raise models.ModelError(
            f"{path}: counts positions from the start of the padding (as GPT-2 does), so TRL's RLOO and GRPO would "
            "train on misread prompts; use a model with rotary positions, or PPOTrainer"
        )


def rejection_sampling(
    model: ModelPath,
    reward: Reward | ModelPath,
    prompts: Dataset,
    out: ModelPath,
    n: int = 8,
    temperature: float = 1.0,
    max_completion_length: int = models.MAX_COMPLETION_LENGTH,
    **options: Any,
) -> str:
    """Fine-tune on the best of `n` own completions of each prompt (2307.09288, section 3.2.3; RAFT, 2304.06767).

    Only completions that ended are chosen, because SFT teaches an end. They are in samples.parquet beside the weights,
    with their `reward`. A prompt without one is left out with a warning; ValueError if all are. Options: see
    `help(rk.train)`.
    """
    with new_directory(out) as folder:
        training = Training("rejection sampling", trl.SFTConfig, model, folder, **options)
        how = {"seed": training.args.seed, **training.loading}
        samples = sampling.sample(model, prompts, n, temperature, max_completion_length, **how)
        ended = samples[samples["finished"]].reset_index(drop=True)
        if missing := len(prompts) - ended["prompt_id"].nunique():
            problem = f"of {missing} of {len(prompts)} prompts no completion ended in {max_completion_length} tokens"
            if ended.empty:
                raise ValueError(f"rejection_sampling: {problem}; raise max_completion_length")
            warnings.warn(f"rejection_sampling: {problem}; these prompts are left out", stacklevel=2)
        scored = sampling.add_rewards(ended, {"reward": reward if callable(reward) else RewardModel(reward)})
        checked(scored["reward"].tolist(), len(scored))
        chosen = sampling.best_of_n(scored, "reward")
        dataset = Dataset.from_dict({name: chosen[name].tolist() for name in ("prompt", "completion")})
        fit(training.trainer(trl.SFTTrainer, training.ready(dataset, "prompt", "completion")), folder)
        chosen.to_parquet(folder / "samples.parquet")
    return str(out)
