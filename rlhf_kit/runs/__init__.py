"""Runs on disk: made once, whole or not at all, with what they were made from beside them.

`layout` is the only file that knows the layout of results/; `provenance` says what a run was made from.
"""

from rlhf_kit.runs.layout import (
    Run,
    RunError,
    append_metrics,
    keep_metrics,
    load_metrics,
    load_run,
    load_runs,
    load_samples,
    make,
    replacing,
    save_figure,
    write_samples,
    write_summary,
)
from rlhf_kit.runs.provenance import name_of, sha256_of

__all__ = [
    "Run",
    "RunError",
    "append_metrics",
    "keep_metrics",
    "load_metrics",
    "load_run",
    "load_runs",
    "load_samples",
    "name_of",
    "replacing",
    "save_figure",
    "sha256_of",
    "make",
    "write_samples",
    "write_summary",
]
