"""What code really took: the memory of a device, and the peak that torch's allocator saw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from rlhf_kit import models

GIB = 2**30


@dataclass
class Measured:
    """Peak of a block in GiB, known when it ends: on a GPU of all that torch held, on a CPU of what the block added."""

    gib: float = float("nan")


def device_memory(device: torch.device | str | None = None) -> float:
    """GiB of a GPU, or of the machine's RAM where `device` is a CPU (default: the GPU where there is one)."""
    where = torch.device(device) if device is not None else models.device()
    if where.type == "cuda":
        return torch.cuda.get_device_properties(where).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


@contextmanager
def measure(device: torch.device | str | None = None) -> Iterator[Measured]:
    """Measure the peak of torch's allocator in a block; on a CPU each allocation is traced, so keep it short.

    What torch does not allocate is not seen: the CUDA context, files mapped into memory; nor, on a CPU, other threads.
    """
    where = torch.device(device) if device is not None else models.device()
    measured = Measured()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        yield measured
        measured.gib = torch.cuda.max_memory_allocated(where) / GIB
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        yield measured
    results = trace.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    total = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        total += change
        peak = max(peak, total)
    measured.gib = peak / GIB
