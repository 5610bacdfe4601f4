"""How much memory does each stage take, up to PPO with four roles in 4 bits, and does the estimate say so beforehand?

    python experiments/ppo_memory.py --shape llama-3.1-8b --scratch /tmp/shapes     # a GPU of 24 GB; 16 GB of disk
    python experiments/ppo_memory.py --shape tiny --scratch /tmp/shapes             # seconds, on a CPU

The shapes are those of real models; the weights are random, which says everything about memory and nothing else. SFT,
reward model, DPO and PPO run two steps through the kit's own functions; the peak is torch's own count, and `load_gib`
that of loading the base alone: where it is as high as the peak, the stage itself took less. An estimate within 10% of
the measurement counts as right. Written before the run.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from rlhf_kit import PPOConfig, PPOTrainer, files, memory, models, plots, runs, train
from rlhf_kit.notebook import set_threads
from rlhf_kit.progress import quiet

# On a CPU the trace sees this thread's allocations only, and transformers would load weights in others.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
OUT = Path("results/ppo-memory")
STAGES = ("sft", "reward_model", "dpo", "ppo")
EOS, PAD = "<eos>", "<pad>"
SHARD_GIB = 2.0
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
        **more,
    )


# Qwen2.5 in Llama's classes, with one bias a layer more than it has: for a directory of type qwen2 transformers takes
# Qwen's own tokenizer whatever lies there, and the random one below could not be used.
BIAS = {"attention_bias": True}
SHAPES: dict[str, LlamaConfig] = {
    "tiny": llama(128, 3, 4, 4, 256, 512),
    "qwen2.5-0.5b": llama(896, 24, 14, 2, 4864, 151936, tie_word_embeddings=True, **BIAS),
    "qwen2.5-1.5b": llama(1536, 28, 12, 2, 8960, 151936, tie_word_embeddings=True, **BIAS),
    "qwen2.5-7b": llama(3584, 28, 28, 4, 18944, 152064, **BIAS),
    "llama-3.1-8b": llama(4096, 32, 32, 8, 14336, 128256),
}


def main(arguments: list[str] | None = None) -> pd.DataFrame:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    parser.add_argument("--mode", choices=("4bit", "lora", "full"), default="4bit")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the shape has")
    parser.add_argument("--prompt", type=int, help="tokens (default: 512, tiny: 24)")
    parser.add_argument("--completion", type=int, help="tokens (default: 512, tiny: 16)")
    parser.add_argument("--rollout", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=1)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--scratch", type=Path, required=True, help="where the random base is written, once")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    small = options.shape == "tiny"
    options.prompt = options.prompt or (24 if small else 512)
    options.completion = options.completion or (16 if small else 512)
    quiet()
    set_threads(options.threads)
    config = SHAPES[options.shape]
    if options.layers is not None:
        config = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": options.layers})
    base = write_base(config, options.scratch / f"{options.shape}-{config.num_hidden_layers}")
    # Reward model and DPO start from the SFT model, PPO from that and the reward model: what is asked for needs them.
    needed = {"dpo": {"sft"}, "ppo": {"sft", "reward_model"}, "reward_model": {"sft"}, "sft": set()}
    asked = set(options.stages).union(*(needed[stage] for stage in options.stages))
    made: dict[str, Path] = {}
    for stage in (stage for stage in STAGES if stage in asked):
        made[stage] = measured_run(options, config, base, stage, made)
    finished = sorted((options.out / "runs").glob("[!.]*/run.json"))
    configs = [json.loads(file.read_text())["config"] for file in finished]
    rows = [
        pd.read_csv(file.with_name("metrics.csv")).assign(**config)
        for file, config in zip(finished, configs, strict=True)
    ]
    table = pd.concat(rows, ignore_index=True)
    runs.write_summary(options.out, table)
    for (shape, layers, mode), part in table.groupby(["shape", "layers", "mode"], sort=False):
        runs.save_figure(options.out, f"{shape}-{layers}-layers-{mode}", figure(part))
    print(
        table[["shape", "layers", "mode", "stage", "estimate_gib", "measured_gib", "ratio", "load_gib"]]
        .round(3)
        .to_string()
    )
    return table


def write_base(config: LlamaConfig, out: Path) -> str:
    """Random bf16 weights in shards, drawn shard by shard so that the whole model is never in memory; written once."""
    if (out / "model.safetensors.index.json").is_file():
        return str(out)
    out.mkdir(parents=True, exist_ok=True)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = 0, 1, None
    words = {EOS: 0, PAD: 1, **{f"w{i}": i for i in range(2, config.vocab_size)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken(PAD, special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD).save_pretrained(out)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    torch.manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    for name, shape in shapes.items():
        is_scale = name.endswith("norm.weight")
        shard[name] = torch.ones(shape.shape) if is_scale else torch.randn(shape.shape, dtype=torch.bfloat16) * 0.02
        shard[name] = shard[name].bfloat16()
        if name == list(shapes)[-1] or sum(t.nbytes for t in shard.values()) > SHARD_GIB * 2**30:
            file = f"model-{len(set(index.values())):05d}.safetensors"
            save_file(shard, out / file, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, file)
            shard = {}
    size = {"total_size": sum(2 * shape.numel() for shape in shapes.values())}
    with files.replacing(out / "model.safetensors.index.json") as temporary:  # last: it says that all is there
        temporary.write_text(json.dumps({"metadata": size, "weight_map": index}))
    return str(out)


def measured_run(
    options: argparse.Namespace, config: LlamaConfig, base: str, stage: str, made: dict[str, Path]
) -> Path:
    """Run one stage, unless it was measured before; returns the model it made."""
    on_gpu = models.device().type == "cuda"
    settings = {
        "shape": options.shape,
        "layers": config.num_hidden_layers,
        "mode": options.mode,
        "stage": stage,
        "prompt": options.prompt,
        "completion": options.completion,
        "rollout": options.rollout,
        "micro_batch": options.micro_batch,
        "device": torch.cuda.get_device_name() if on_gpu else runs.device(),
    }

    def function(directory: Path) -> None:
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        with memory.measure() as loading:
            base_alone = models.load_causal(base, load_in_4bit=options.mode == "4bit")
        del base_alone
        gc.collect()
        before = torch.cuda.memory_allocated() / 2**30 if on_gpu else 0.0
        started = time.perf_counter()
        with memory.measure() as measured:
            shared = run(options, base, stage, directory / "model", made)
        seconds = time.perf_counter() - started
        estimate = memory.estimate(
            config,
            stage,
            lora=None if options.mode == "full" else models.lora(),
            load_in_4bit=options.mode == "4bit",
            prompt_length=options.prompt,
            max_completion_length=options.completion,
            rollout=options.rollout,
            micro_batch_size=options.micro_batch,
            reward_model=None if shared else deepcopy(config),
        )
        row = {"measured_gib": measured.gib, "estimate_gib": estimate.peak, "ratio": estimate.peak / measured.gib}
        row |= {
            "load_gib": loading.gib,
            "held_before_gib": before,
            "seconds": seconds,
            "peak_phase": estimate.peak_phase,
        }
        row |= {f"estimate {part}": gib for part, gib in estimate.parts.items()}
        versions = runs.versions() | {"bitsandbytes": __import__("bitsandbytes").__version__}
        runs.append_metrics(directory, {"shared_reward_base": str(shared), **row, **versions})

    device = "gpu" if on_gpu else "cpu"
    lengths = f"{options.prompt}-{options.completion}"
    name = f"{options.shape}-{config.num_hidden_layers}-{options.mode}-{stage}-{device}-{lengths}"
    print(f"{name}: at work", flush=True)
    return runs.make(options.out, name, settings, {}, function, fresh=options.fresh).directory / "model"


def run(options: argparse.Namespace, base: str, stage: str, out: Path, made: dict[str, Path]) -> bool:
    """Two steps of a stage; whether its reward model stands on the policy's base."""
    shape: dict[str, Any] = {"max_steps": 2, "gradient_checkpointing": True}
    trl = {
        **shape,
        "per_device_train_batch_size": options.micro_batch,
        "max_length": options.prompt + options.completion,
    }
    start = {"model": base, "lora": None, "load_in_4bit": None}
    if options.mode != "full":
        start |= {"lora": models.lora(), "load_in_4bit": options.mode == "4bit"}
    prompts = [text(options, row, options.prompt) for row in range(PAIRS)]
    answers = [text(options, row + 1000, options.completion - 1) for row in range(PAIRS)]
    others = [text(options, row + 2000, options.completion - 1) for row in range(PAIRS)]
    if stage == "sft":
        train.sft(dataset=Dataset.from_dict({"prompt": prompts, "completion": answers}), out=out, **start, **trl)
        return True
    pairs = Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": others})
    if stage != "ppo":
        {"reward_model": train.reward_model, "dpo": train.dpo}[stage](made["sft"], pairs, out=out, **trl)
        return True
    args = PPOConfig(
        output_dir=str(out),
        per_device_train_batch_size=options.rollout,
        micro_batch_size=options.micro_batch,
        max_completion_length=options.completion,
        ppo_epochs=1,
        **shape,
    )
    trainer = PPOTrainer(made["sft"], made["reward_model"], args, Dataset.from_dict({"prompt": prompts}), callbacks=[])
    trainer.train()
    return options.mode == "full" or any(role.startswith("reward") for role in trainer.roles.parts)


def text(options: argparse.Namespace, row: int, tokens: int) -> str:
    """So many words of the random tokenizer, closed by a space so that they do not run into what follows."""
    words = SHAPES[options.shape].vocab_size
    generator = torch.Generator().manual_seed(row)
    return " ".join(f"w{i}" for i in torch.randint(2, words, (tokens,), generator=generator).tolist()) + " "


def figure(table: pd.DataFrame) -> Any:
    """The estimate's parts at the peak, stacked, and the measured peak as a mark."""
    plots.style()
    parts = [column for column in table if column.startswith("estimate ") and table[column].max() > 0]
    chart, axes = plt.subplots(figsize=(9, 5))
    bottom = pd.Series(0.0, index=table.index)
    for part, colour in zip(parts, plt.get_cmap("tab20").colors, strict=False):  # type: ignore[attr-defined]
        axes.bar(table["stage"], table[part], bottom=bottom, color=colour, label=part.removeprefix("estimate "))
        bottom += table[part]
    axes.scatter(table["stage"], table["measured_gib"], color="black", marker="D", zorder=3, label="measured peak")
    first = table.iloc[0]
    axes.set_title(f"{first['shape']}, {first['layers']} layers, {first['mode']}: {first['device']}")
    axes.set_ylabel("GiB")
    axes.legend(bbox_to_anchor=(1.01, 1), loc="upper left")
    chart.tight_layout()
    plt.close(chart)
    return chart


if __name__ == "__main__":
    main()
