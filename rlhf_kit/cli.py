"""The command line: `rlhf-kit demo`, `memory`, `rate` and `report`; a mistake ends in one sentence and exit code 2."""

import argparse
import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 1 a fault of the kit, 2 what the person can mend, 130 interrupted."""
    options = _parser().parse_args(arguments)
    from torch import OutOfMemoryError

    from rlhf_kit.progress import quiet

    quiet()
    try:
        options.run(options)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last finished stage", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, MemoryError, OutOfMemoryError) as error:
        if options.traceback:
            raise
        print(f"rlhf-kit: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Exception:  # what a person can mend is made one of the errors above where it arises
        traceback.print_exc()
        print("rlhf-kit: this is a fault of rlhf-kit: please report it with the lines above", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlhf-kit", description="Understand and compare RLHF on one machine.")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was noticed")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="SFT, reward model, PPO and DPO, start to end, with figures and a table")
    demo.add_argument("--preset", help="pocket (default), quick or, with --data, data")
    demo.add_argument("--data", metavar="FILE", help="your own preferences: .jsonl[.gz], .csv, .parquet or a hub id")
    demo.add_argument("--base-model", metavar="DIR|HUB_ID", help="the model to start from (default: the preset's own)")
    demo.add_argument("--out", type=Path, help="results folder (default: results/demo, or results/demo-PRESET)")
    demo.add_argument("--seed", type=_number(0), default=0)
    demo.add_argument("--set", action="append", default=[], metavar="STAGE.SETTING=VALUE", help="e.g. ppo.kl_coef=0.2")
    demo.add_argument("--fresh", action="store_true", help="make every stage again instead of keeping finished ones")
    demo.add_argument("--threads", type=_number(1), help="of the CPU (default: OMP_NUM_THREADS or 2; 1 if it is busy)")
    demo.set_defaults(run=_demo)
    memory = commands.add_parser("memory", help="the GPU memory that a stage will need, part by part, before it starts")
    memory.add_argument("model", metavar="MODEL", help="a model directory (its config.json is enough) or a hub id")
    memory.add_argument("--stage", default="ppo", choices=("sft", "reward_model", "dpo", "ppo"))
    memory.add_argument("--gpu", type=_number(0.1, 10**6, float), metavar="GIB", help="it has (default: this one's)")
    trained = memory.add_mutually_exclusive_group()
    trained.add_argument("--full", action="store_true", help="train all weights, not an adapter")
    trained.add_argument("--lora", type=_number(1), metavar="R", default=16, help="rank of the adapters (default: 16)")
    either: Any = {"action": argparse.BooleanOptionalAction}
    memory.add_argument("--4bit", **either, dest="load_in_4bit", help="the base in NF4 (default with LoRA)")
    memory.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the base with LoRA (on a GPU: bfloat16)")
    for option, name, default, unit in (
        ("--prompt", "prompt_length", 512, "tokens"),
        ("--completion", "max_completion_length", 512, "tokens"),
        ("--rollout", "rollout", 8, "completions at once, in PPO"),
        ("--micro-batch", "micro_batch_size", 1, "rows, or pairs of them, in a forward pass"),
        ("--ensemble", "ensemble", 1, "reward models"),
    ):
        meaning = f"{unit} (default: {default})"
        memory.add_argument(option, dest=name, type=int, default=default, metavar="N", help=meaning)
    memory.add_argument("--reward-model", metavar="MODEL", help="the reward models' base, where it is another one")
    adam: Any = {"action": "store_const", "const": "paged_adamw_8bit", "default": "adamw_torch_fused"}
    memory.add_argument("--8bit-adam", **adam, dest="optim", help=f'optim="{adam["const"]}"')
    kept: Any = {"default": True, "help": "of activations (default); --no keeps them all"}
    memory.add_argument("--checkpointing", **either, **kept, dest="activation_checkpointing")
    memory.set_defaults(run=_memory)
    report = commands.add_parser("report", help="a store of judgments as one HTML page: raters, agreement, biases")
    report.add_argument("store", metavar="STORE", type=Path, help="the file that judgments are kept in")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    report.add_argument("--force", action="store_true", help="overwrite the page if it is there")
    report.set_defaults(run=_report)
    rate = commands.add_parser("rate", help="a page on this machine where a person judges completions, by key or mouse")
    rate.add_argument("file", metavar="FILE", help="prompt, completions (or samples): .jsonl[.gz], .csv, .parquet")
    rate.add_argument("--rater", required=True, metavar="NAME", help="who judges; each judgment is kept by that name")
    rate.add_argument("--store", type=Path, default=Path("judgments.db"), help="made if not there (judgments.db)")
    rate.add_argument("--question", default="rank", choices=("rank", "good/bad", "1-7"))
    rate.add_argument("--k", type=_number(2, 9), default=2, help="samples of a prompt to rank at a time (default: 2)")
    rate.add_argument("--port", type=_number(0, 65535), default=0, help="of 127.0.0.1 (default: a free one)")
    rate.add_argument("--seed", type=_number(0), default=0, help="draws the order in which completions are shown")
    rate.add_argument("--repeats", type=_number(0), default=0, help="how many items come again, in reverse order")
    rate.set_defaults(run=_rate)
    return parser


def _number(least: float, most: float = 10**9, kind: type = int) -> Callable[[str], Any]:
    """The type of an option: a number from `least` to `most`."""

    def number(text: str) -> Any:
        if least <= kind(text) <= most:  # NaN is not
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: give a number from {least} to {most}")

    return number


def _demo(options: argparse.Namespace) -> None:
    from rlhf_kit import models, outputs, presets
    from rlhf_kit.notebook import results, set_threads
    from rlhf_kit.pipeline import Pipeline
    from rlhf_kit.progress import clock

    started = time.monotonic()
    preset = presets.preset(options.preset, options.seed, options.data, options.base_model)
    for assignment in options.set:
        preset = preset.override(assignment)
    if options.base_model is not None:
        models.load_tokenizer(options.base_model)  # a wrong model is said now, not minutes later
    out = options.out or results("demo" if preset.name == "pocket" else f"demo-{preset.name}")
    if options.threads is None and "OMP_NUM_THREADS" not in os.environ:
        options.threads = min(2, os.cpu_count() or 1)
    set_threads(options.threads)
    pipeline = Pipeline(preset, out, options.fresh)
    pipeline.scores()
    print(f"\n{outputs.write(pipeline)}")
    print(f"\nin all {clock(time.monotonic() - started)}; everything lies under {out}/:")
    for path in sorted([*out.glob("*.csv"), *out.glob("*.md"), *out.glob("figures/*.png")]):
        print(f"  {path}")


def _memory(options: argparse.Namespace) -> None:
    from rlhf_kit import memory, models

    if options.full and options.load_in_4bit:
        raise ValueError("--full does not go with --4bit: 4-bit weights cannot be trained; leave one out")
    adapter = models.is_adapter(options.model)
    if options.full and adapter:
        raise ValueError(f"--full does not go with {options.model}: it is an adapter, and is trained on as it is")
    if options.load_in_4bit is None and not adapter:  # an adapter's directory remembers
        options.load_in_4bit = not options.full
    others = ("traceback", "run", "model", "stage", "gpu", "full")  # the rest are settings of `memory.estimate`
    settings = {name: value for name, value in vars(options).items() if name not in others}
    settings["lora"] = None if options.full or adapter else {"r": options.lora}
    settings["on_gpu"] = options.gpu is not None or models.device().type == "cuda"
    gib = memory.device_memory() if options.gpu is None else options.gpu
    _, estimate, sentence = memory.advise(options.model, options.stage, gib, **settings)
    print(f"{estimate.table()}\n\n{sentence}")


def _report(options: argparse.Namespace) -> None:
    from rlhf_kit import files
    from rlhf_kit.feedback import Store, reporting

    store, out = Store(options.store, read_only=True), options.out
    if out.exists() and (not options.force or out.is_dir() or out.samefile(options.store)):
        raise ValueError(f"{out}: is there already; name another with --out; --force overwrites a page, not the store")
    page = reporting.page(store, f"rlhf-kit report {options.store}")
    with files.replacing(out) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    print(f"the report lies in {options.out}")


def _rate(options: argparse.Namespace) -> None:
    from rlhf_kit import feedback, rating

    items = rating.read(options.file, options.question, options.k)
    store = feedback.Store(options.store)
    session = rating.Session(store, items, options.rater, options.question, options.seed, "browser", options.repeats)
    with rating.Page(session, options.port) as page:
        again = f", {options.repeats} of them twice," if options.repeats else ""
        print(f"{options.rater} judges {len(items)} items{again} of {options.file} at\n\n  {page.address}\n")
        print("Ctrl-C ends; the same command goes on where it stopped.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            page.serve_forever()
    state, count = session.state(), len(store.judgments())
    print(f"\n{options.rater} has judged {state['judged']} of {state['total']}; in {options.store}: {count} that count")


if __name__ == "__main__":
    sys.exit(main())
