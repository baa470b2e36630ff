"""Estimate how long a sweep takes, and how much memory, from one measured batch of each task."""

import time
from collections.abc import Collection
from dataclasses import dataclass

import torch

from affectlens.effects.judging import JudgingJob, SweepContext
from affectlens.lens.failures import out_of_memory
from affectlens.lens.memory_use import peak
from affectlens.lens.scoring import label_logps
from affectlens.progress import duration


@dataclass(frozen=True)
class Estimate:
    """What a sweep will cost.

    `passes` counts batches through the model, `seconds` is an upper bound for one process (towers that no
    change reaches run once and are remembered), `memory` is the peak so far in bytes; 0 where no system tells
    it.
    """

    models: int
    passes: int
    seconds: float
    memory: int

    def __str__(self) -> str:
        memory = f", {self.memory / 1e9:.1f} GB of memory" if self.memory else ""
        passes = f"{self.passes:,} pass{'es' if self.passes != 1 else ''}"
        return f"{self.models:,} models, {passes}, at most {duration(self.seconds)} in one process{memory}"


def measured(context: SweepContext, jobs: Collection[JudgingJob]) -> Estimate | None:
    """Run one batch of each task, and return what all jobs cost; None where a batch is too large."""
    device = context.lens.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    passes, seconds = 0, 0.0
    for name, prepared in context.prepared.items():
        count = sum(name in job.tasks for job in jobs)
        if not count:
            continue
        largest = max(prepared.choices, key=lambda one: len(one.labels))
        start = time.perf_counter()
        try:
            label_logps(context.lens.model, largest)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            return None  # the sweep itself halves the batch until it fits
        took = time.perf_counter() - start
        passes += count * len(prepared.choices)
        seconds += count * took * len(prepared.order) / len(largest.labels)
    return Estimate(len(jobs), passes, seconds, peak(device))
