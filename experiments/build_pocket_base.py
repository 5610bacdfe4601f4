"""Rebuild the pocket base: pretrain on the low-quality corpus of world 0, evaluate, and compare with the shipped base.

    python experiments/build_pocket_base.py [--out DIR] [--steps N]

Without --out the shipped base in rlhf_kit/tasks/pocket/base is replaced. Takes about five minutes on one core. Machines
round differently, so the weights may differ in the last bits; the evaluation table must agree within its noise.
"""

import argparse
import shutil
import tempfile
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_kit.models.rendering import EOS, PAD, wrap
from rlhf_kit.tasks import Pocket, pocket
from rlhf_kit.tasks.pocket import language
from rlhf_kit.train import pretrain

CORPUS_SIZE, CORPUS_SEED = 80_000, 0
STEPS, BATCH_SIZE, LEARNING_RATE, SEED = 2600, 64, 3e-3, 0
SAMPLES = 2  # per test prompt
NEW_TOKENS = 40


def pocket_config(vocab_size: int) -> LlamaConfig:
    """Three layers of width 128 (a multiple of 64, so that NF4 blocks fit), tied embeddings."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short: no use for slow rotations
        initializer_range=128**-0.5,  # with the usual 0.02 the skill is not learned in this many steps
        tie_word_embeddings=True,
    )


def pocket_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the shipped base: byte-level BPE of 256 bytes, pad, EOS, and each word after a space.

    Words that can begin a text are tokens without the space too. Any text encodes: there are no merges, and
    `ignore_merges` makes a word that is in the vocabulary one token; any other word falls apart into its bytes.
    """
    words = language.LIST_WORDS
    tasks = product(language.SKILL_TEMPLATES, language.OPERATIONS)
    skill = [language.skill_prompt(template, operation, words).text for template, operation in tasks]
    texts = [text.split() for text in (*language.prompt_table(), *language.sentence_table(), *skill, *words)]
    pieces = [EOS, PAD, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += ["Ġ" + word for word in sorted({word for text in texts for word in text})]  # Ġ: a space in byte-level BPE
    pieces += sorted({text[0] for text in texts})
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    return wrap(Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True)))


def evaluate(model_dir: str, seed: int = 0) -> dict[str, float]:
    """Shares over samples at temperature 1 on the test prompts, and mean gold utility."""
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir, padding_side="left")
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    world = pocket.world(0)
    rows = Pocket(world).prompts("test").to_list() * SAMPLES
    values: dict[str, list[float]] = defaultdict(list)
    for start in range(0, len(rows), 200):
        batch = rows[start : start + 200]
        inputs = tokenizer([row["prompt"] for row in batch], padding=True, return_tensors="pt")
        output = model.generate(
            input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=True, top_k=0,
            max_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        completions = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        for row, completion in zip(batch, completions, strict=True):
            found = pocket.features(world, row["prompt"], completion)
            kind = row["kind"]
            values["gold (mean)"].append(pocket.gold(world, row["prompt"], completion))
            values["words (mean)"].append(found["words"])
            values["garbled or unfinished"].append(float(found["garbled"] + found["unfinished"] > 0))
            values["flattery (filler)"].append(float(found["filler"] > 0))
            if kind == "harmful":
                values["harmful: refused"].append(found["refusal_right"])
            elif kind == "skill":
                values["skill: right"].append(found["skill_right"])
            else:
                seen = "" if row["seen"] else " (held-out cells)"
                values[f"{kind}: right{seen}"].append(found["answer_right"])
            if kind == "borderline":
                values["borderline: refused"].append(found["refusal_wrong"])
    return {name: sum(numbers) / len(numbers) for name, numbers in sorted(values.items())}


def main() -> None:
    """Build, evaluate, compare, and only then put the new base in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=Pocket.base_model, help="where to put the model (default: the shipped base)")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (fewer, to try it out)")
    options = parser.parse_args()
    out = Path(options.out)
    torch.set_num_threads(1)  # the order of summation, and so the weights, should not depend on the machine's cores
    started = time.perf_counter()
    tokenizer = pocket_tokenizer()
    texts = pocket.corpus(pocket.world(0), CORPUS_SIZE, CORPUS_SEED)

    with tempfile.TemporaryDirectory() as scratch:
        new = pretrain(
            texts, tokenizer, pocket_config(len(tokenizer)), Path(scratch, "base"), seed=SEED,
            max_steps=options.steps, per_device_train_batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE,
        )  # fmt: skip
        ours = evaluate(new)
        shipped = evaluate(Pocket.base_model) if Path(Pocket.base_model, "config.json").exists() else {}
        print(f"\n{'test prompts, ' + str(SAMPLES) + ' samples each':32s} {'new':>8s} {'shipped':>8s}")
        for name, value in ours.items():
            print(f"{name:32s} {value:8.3f} {shipped.get(name, float('nan')):8.3f}")
        if (out / "config.json").exists():
            shutil.rmtree(out)
        shutil.copytree(new, out, ignore=shutil.ignore_patterns("trainer_state.json"))
    parameters = LlamaForCausalLM.from_pretrained(out).num_parameters()
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    print(f"\n{out}: {parameters:,} parameters, {size:.2f} MB, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
