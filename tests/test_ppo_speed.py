"""experiments/ppo_speed.py: every second is accounted for, and the verdicts follow from the numbers."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from rlhf_kit import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import ppo_speed  # noqa: E402

PARTS = ["generate", "forward", "backward", "optimizer step", ppo_speed.OURS]


def table(ours: float, growth: float, one_pass: float) -> pd.DataFrame:
    shares = [{"table": "shares", "mode": "full", "rollouts": 8, "length": 16, "seconds": 2.0, ppo_speed.OURS: ours}]
    points = [(n, 16, n**growth) for n in (16, 64)] + [(32, n, float(n)) for n in (8, 64)]
    rows = [{"table": "growth", "rollouts": n, "length": k, "seconds": s, "peak_gib": s} for n, k, s in points]
    passes = [
        {"table": "one pass", "mode": mode, "seconds": s, "apart": 0.0}
        for mode, s in (("one pass", one_pass), ("two passes", 1.0))
    ]
    return pd.DataFrame([*shares, *rows, *passes])


def test_verdicts_on_hand_numbers() -> None:
    good = ppo_speed.verdicts(table(ours=0.3, growth=1.0, one_pass=0.8))
    assert good[0].startswith("full: 15.0% of 2.00 s") and good[1].startswith("seconds against rollouts: exponent 1.00")
    assert all(line.endswith(": met") for line in good[:5]) and "(worth its code)" in good[5]
    bad = ppo_speed.verdicts(table(ours=0.31, growth=1.2, one_pass=1.0))
    assert [line.endswith("not met") for line in bad[:5]] == [True, True, True, False, False]
    assert "(not worth its code)" in bad[5]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "LoRA"])
def test_each_roles_forward_pass_is_counted_as_one(mode: str, tmp_path: Path) -> None:
    """A known delay in every decoder adds to "forward", and not to the kit's own code."""
    base, delay = ppo_speed.random_base(tmp_path / "base"), 0.02
    trainer = ppo_speed.make(base, tmp_path, {"mode": mode, "rollouts": 2, "length": 2}, 1)
    decoders = {models.decoder(module) for module, _ in trainer.roles.parts.values()}
    calls = []
    watch = ppo_speed.Stopwatch(trainer)

    def slower(*_: object) -> None:
        calls.append(watch.depth)
        time.sleep(delay)

    for decoder in decoders:
        decoder.register_forward_pre_hook(slower)
    trainer.train()
    watch.stop()
    outside_generate = sum(depth == 1 for depth in calls)
    [update] = watch.updates
    assert outside_generate >= 3 + 2 * 4 * 2  # three roles scored, two optimised in each of eight steps
    assert update["forward"] >= delay * outside_generate
    assert update[ppo_speed.OURS] < delay * outside_generate / 2


@pytest.mark.slow
def test_the_parts_sum_to_an_updates_seconds_and_one_pass_computes_what_two_do(tmp_path: Path) -> None:
    base = ppo_speed.random_base(tmp_path / "base")
    found = ppo_speed.timed(base, tmp_path, {"mode": "full", "rollouts": 2, "length": 4}, 1)
    assert all(found[part] > 0 for part in PARTS)
    assert sum(found[part] for part in PARTS) == pytest.approx(found["seconds"], rel=1e-6)
    assert found["peak_gib"] > 0.001
    passes = ppo_speed.one_pass(base, 1)
    assert [row["mode"] for row in passes] == ["two passes", "one pass"] and passes[0]["apart"] < 1e-5
