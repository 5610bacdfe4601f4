"""experiments/ppo_speed.py at its quickest: every second is accounted for, and the verdicts follow from the numbers."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from rlhf_kit import models

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import ppo_speed  # noqa: E402


def test_the_exponent_of_a_power_law() -> None:
    x = pd.Series([1.0, 2.0, 4.0, 8.0])
    assert ppo_speed.exponent(x, 3 * x) == pytest.approx(1)
    assert ppo_speed.exponent(x, x**2) == pytest.approx(2)


def table(ours: float, growth: float, one_pass: float) -> pd.DataFrame:
    shares = [{"table": "shares", "mode": "full", "rollouts": 8, "length": 16, "seconds": 2.0, ppo_speed.OURS: ours}]
    rows = [(n, 16, n**growth) for n in (16, 64)] + [(32, n, float(n)) for n in (8, 64)]
    points = [
        {"table": "growth", "rollouts": n, "length": length, "seconds": s, "peak_gib": s} for n, length, s in rows
    ]
    passes = [
        {"table": "one pass", "mode": mode, "seconds": s, "apart": 0.0}
        for mode, s in (("one pass", one_pass), ("two passes", 1.0))
    ]
    return pd.DataFrame([*shares, *points, *passes])


def test_verdicts_on_hand_numbers() -> None:
    good = ppo_speed.verdicts(table(ours=0.3, growth=1.0, one_pass=0.8))
    assert good[0].startswith("full: 15.0% of 2.00 s") and good[0].endswith(": met")
    assert all(line.endswith(": met") for line in good[:5]) and "(worth its code)" in good[5]
    bad = ppo_speed.verdicts(table(ours=0.31, growth=1.2, one_pass=1.0))
    assert [line.endswith("not met") for line in bad[:5]] == [True, True, True, False, False]
    assert "(not worth its code)" in bad[5]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "LoRA"])
def test_each_roles_forward_pass_is_counted_as_one(mode: str, tmp_path: Path) -> None:
    """Made slower by a known time, every decoder adds it to "forward", and not to the kit's own code."""
    base = ppo_speed.random_base(tmp_path / "base")
    trainer = ppo_speed.make(base, tmp_path, {"mode": mode, "rollouts": 4, "length": 2}, 2)
    decoders = {models.decoder(module) for module, _ in trainer.roles.parts.values()}
    calls = []
    watch = ppo_speed.Stopwatch(trainer)

    def slower(*_: object) -> None:
        calls.append(watch.depth)
        time.sleep(0.1)

    for decoder in decoders:
        decoder.register_forward_pre_hook(slower)
    trainer.train()
    watch.stop()
    outside_generate = sum(depth == 1 for depth in calls) / 2  # in each of the two updates
    first = watch.updates[0]
    assert first["forward"] >= 0.1 * outside_generate - 0.05
    assert outside_generate >= 3 + 2 * 4 * 2  # three roles scored, two optimised in each of eight steps
    assert first[ppo_speed.OURS] < 0.1 * outside_generate / 2


@pytest.mark.slow
def test_the_quick_run_accounts_for_every_second(tmp_path: Path) -> None:
    found = ppo_speed.main(["--quick", "--out", str(tmp_path), "--threads", "1"])
    parts = ["generate", "forward", "backward", "optimizer step", ppo_speed.OURS]
    timed = found[found["table"] != "one pass"]
    assert (timed[parts] > 0).all(axis=None)
    assert timed[parts].sum(axis=1).to_numpy() == pytest.approx(timed["seconds"].to_numpy(), rel=1e-6)
    assert (timed["peak_gib"] > 0.001).all() and found["torch"].notna().all()
    assert found.loc[found["table"] == "one pass", "apart"].max() < 1e-5  # the mixed pass is the same computation
    assert (tmp_path / "summary.csv").is_file() and (tmp_path / "figures" / "growth.png").stat().st_size > 10_000
