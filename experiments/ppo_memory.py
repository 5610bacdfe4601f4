"""How much memory does each stage take, up to PPO with four roles in 4 bits, and does the estimate say so beforehand?

    python experiments/ppo_memory.py --shape llama-3.1-8b --scratch /tmp/shapes     # a GPU of 24 GB; 16 GB of disk
    python experiments/ppo_memory.py --shape pocket --scratch /tmp/shapes           # seconds, on a CPU

The shapes are those of real models; the weights are random, which says everything about memory and nothing else. SFT,
reward model, DPO and PPO run two steps through the kit's own functions; the peak is torch's own count, and `load_gib`
that of loading the base alone: where it is as high as the peak, the stage itself took less. An estimate within 25% of
the measurement counts as right on a CPU, within 10% on a GPU. Written before the run.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf_kit import PPOConfig, PPOTrainer, memory, models, plots, runs, train
from rlhf_kit.files import replacing
from rlhf_kit.notebook import set_threads
from rlhf_kit.progress import quiet

# On a CPU the trace sees this thread's allocations only, and transformers would load weights in others.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
OUT = Path("results/ppo-memory")
# Each stage starts from the models of those before it.
STAGES = {"sft": [], "reward_model": ["sft"], "dpo": ["sft"], "ppo": ["sft", "reward_model"]}
EOS, PAD = "<eos>", "<pad>"
PAIRS = 32  # twice as many rows fill one batch of the reward model that scores them


def llama(hidden: int, layers: int, heads: int, kv: int, wide: int, vocab: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=wide,
        vocab_size=vocab,
        max_position_embeddings=32768,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
        **more,
    )


# Qwen2.5 in Llama's classes, with one bias a layer more than it has: for a directory of type qwen2 transformers takes
# Qwen's own tokenizer whatever lies there, and the random one below could not be used.
QWEN = {"attention_bias": True, "tie_word_embeddings": True}
SHAPES = {
    "pocket": llama(128, 3, 4, 4, 256, 504, tie_word_embeddings=True),
    "llama-30m": llama(512, 8, 8, 2, 1536, 4096, tie_word_embeddings=True),
    "qwen2.5-0.5b": llama(896, 24, 14, 2, 4864, 151936, **QWEN),
    "qwen2.5-1.5b": llama(1536, 28, 12, 2, 8960, 151936, **QWEN),
    "qwen2.5-7b": llama(3584, 28, 28, 4, 18944, 152064, attention_bias=True),
    "llama-3.1-8b": llama(4096, 32, 32, 8, 14336, 128256),
}
LENGTHS = {"pocket": (24, 16), "llama-30m": (96, 16)}  # tokens of prompt and completion; elsewhere 512 and 512


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--mode", choices=("4bit", "lora", "full"), default="4bit")
    parser.add_argument("--prompt", type=int, help="tokens (default: 512, fewer for small shapes)")
    parser.add_argument("--completion", type=int, help="tokens (default: 512, fewer for small shapes)")
    parser.add_argument("--rollout", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep every layer's activations")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--scratch", type=Path, required=True, help="where the random base is written, once")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    prompt, completion = LENGTHS.get(options.shape, (512, 512))
    options.prompt, options.completion = options.prompt or prompt, options.completion or completion
    quiet()
    set_threads(options.threads)
    base = write_base(SHAPES[options.shape], options.scratch / options.shape)
    asked = {*options.stages, *(before for stage in options.stages for before in STAGES[stage])}
    made: dict[str, Path] = {}
    for stage in (stage for stage in STAGES if stage in asked):
        made[stage] = measured_run(options, base, stage, made)
    table = pd.concat(map(pd.read_csv, sorted(options.out.glob("runs/*/metrics.csv"))), ignore_index=True)
    runs.write_summary(options.out, table)
    for (shape, mode), part in table.groupby(["shape", "mode"], sort=False):
        runs.save_figure(options.out, f"{shape}-{mode}", figure(part))
    print(table[["shape", "mode", "stage", "estimate_gib", "measured_gib", "ratio", "load_gib"]].round(3).to_string())
    return table


def write_base(config: LlamaConfig, out: Path) -> str:
    """Random bf16 weights and a tokenizer of as many words, written once."""
    if out.is_dir():
        return str(out)
    words = {EOS: 0, PAD: 1, **{f"w{i}": i for i in range(2, config.vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    torch.manual_seed(0)
    with models.device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with replacing(out) as temporary:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD).save_pretrained(temporary)
        model.save_pretrained(temporary, max_shard_size="2GB")
    return str(out)


@contextmanager
def measure() -> Iterator[SimpleNamespace]:
    """Measure the peak of torch's allocator in a block, which is `gib` of what this yields when the block has ended.

    On a GPU of all that torch holds, on a CPU of what the block adds in this thread, where a file mapped into memory
    counts as a whole. A CPU's allocations are traced one by one, so keep the block short.
    """
    measured = SimpleNamespace(gib=float("nan"))
    if models.device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield measured
        measured.gib = torch.cuda.max_memory_allocated() / memory.GIB
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        yield measured
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    measured.gib = max(accumulate(changes), default=0) / memory.GIB


def measured_run(options: argparse.Namespace, base: str, stage: str, made: dict[str, Path]) -> Path:
    """Run one stage, unless it was measured before; returns the model it made."""
    on_gpu = models.device().type == "cuda"
    names = ("shape", "mode", "prompt", "completion", "rollout", "micro_batch", "no_checkpointing")
    settings = {name: getattr(options, name) for name in names} | {"stage": stage}
    settings["device"] = torch.cuda.get_device_name() if on_gpu else runs.device()

    def function(directory: Path) -> None:
        with measure() as loading:
            base_alone = models.load_causal(base, load_in_4bit=options.mode == "4bit")
        del base_alone
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated() / memory.GIB if on_gpu else 0.0
        started = time.perf_counter()
        with measure() as measured:
            run(options, base, stage, directory / "model", made)
        seconds = time.perf_counter() - started
        estimate = memory.estimate(
            SHAPES[options.shape],
            stage,
            lora=None if options.mode == "full" else {"r": 16},
            load_in_4bit=options.mode == "4bit",
            prompt_length=options.prompt,
            max_completion_length=options.completion,
            rollout=options.rollout,
            micro_batch_size=options.micro_batch,
            activation_checkpointing=not options.no_checkpointing,
        )
        row = {"measured_gib": measured.gib, "estimate_gib": estimate.peak, "ratio": estimate.peak / measured.gib}
        row |= {"load_gib": loading.gib, "held_before_gib": held, "seconds": seconds, "phase": estimate.peak_phase}
        row |= {f"estimate {part}": gib for part, gib in estimate.parts.items()}
        pd.DataFrame([settings | row | runs.versions()]).to_csv(directory / "metrics.csv", index=False)

    name = f"{options.shape}-{options.mode}-{stage}-{'gpu' if on_gpu else 'cpu'}-{options.prompt}-{options.completion}"
    name += "-no-checkpointing" * options.no_checkpointing
    print(f"{name}: at work", flush=True)
    return runs.make(options.out, name, settings, {}, function, fresh=options.fresh).directory / "model"


def run(options: argparse.Namespace, base: str, stage: str, out: Path, made: dict[str, Path]) -> None:
    """Two steps of a stage."""
    steps: dict[str, Any] = {"max_steps": 2, "activation_checkpointing": not options.no_checkpointing}
    length = options.prompt + options.completion
    trl = {**steps, "per_device_train_batch_size": options.micro_batch, "max_length": length}
    prompts = [text(options, row, options.prompt) for row in range(PAIRS)]
    answers = [text(options, row + 1000, options.completion - 1) for row in range(PAIRS)]
    others = [text(options, row + 2000, options.completion - 1) for row in range(PAIRS)]
    pairs = Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": others})
    if stage == "sft":
        adapter = None if options.mode == "full" else models.lora_config({"r": 16})
        demonstrations = Dataset.from_dict({"prompt": prompts, "completion": answers})
        train.sft(base, demonstrations, out=out, lora=adapter, load_in_4bit=options.mode == "4bit", **trl)
    elif stage == "ppo":
        args = PPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=options.rollout,
            micro_batch_size=options.micro_batch,
            max_completion_length=options.completion,
            ppo_epochs=1,
            **steps,
        )
        rollouts = Dataset.from_dict({"prompt": prompts})
        PPOTrainer(made["sft"], made["reward_model"], args, rollouts, callbacks=[]).train()
    else:
        {"reward_model": train.reward_model, "dpo": train.dpo}[stage](made["sft"], pairs, out=out, **trl)


def text(options: argparse.Namespace, row: int, tokens: int) -> str:
    """So many words of the random tokenizer, closed by a space so that they do not run into what follows."""
    words = SHAPES[options.shape].vocab_size
    generator = torch.Generator().manual_seed(row)
    return " ".join(f"w{i}" for i in torch.randint(2, words, (tokens,), generator=generator).tolist()) + " "


def figure(table: pd.DataFrame) -> Any:
    """The estimate's parts at the peak, stacked, and the measured peak as a mark."""
    plots.style()
    table = table.set_index("stage")
    parts = table[[column for column in table if column.startswith("estimate ") and table[column].max() > 0]]
    axes = parts.rename(columns=lambda column: column.removeprefix("estimate ")).plot.bar(
        stacked=True, figsize=(9, 5), rot=0, colormap="tab20"
    )
    axes.scatter(range(len(table)), table["measured_gib"], color="black", marker="D", zorder=3, label="measured peak")
    axes.set_title(f"{table['shape'].iloc[0]}, {table['mode'].iloc[0]}: {table['device'].iloc[0]}")
    axes.set(xlabel="", ylabel="GiB")
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
    axes.figure.tight_layout()
    plt.close(axes.figure)
    return axes.figure


if __name__ == "__main__":
    main()
