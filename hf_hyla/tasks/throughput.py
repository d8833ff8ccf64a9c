"""How fast a task makes batches, on the core it runs on."""

import statistics
import time
from typing import Any

import numpy as np

from .base import Task


def data_throughput(task: Task, batch_size: int = 128, seconds: float = 1.0) -> dict[str, Any]:
    """
    Samples per second of drawing and collating training batches, as a data loader without workers does.

    Args:
        task: whose samples.
        batch_size: samples of a batch.
        seconds: how long to measure each of the two orders.

    Returns:
        `sequential` and `shuffled`, samples per second of the median batch, of consecutive samples and of samples from
        anywhere in the training split; `batch_size` and `batches`, the number of batches timed in each order.
    """
    dataset = task.dataset("train")
    rng = np.random.default_rng(0)
    orders = {
        "sequential": lambda batch: range(batch * batch_size, (batch + 1) * batch_size),
        "shuffled": lambda batch: rng.integers(0, len(dataset), batch_size).tolist(),
    }
    times: dict[str, list[float]] = {name: [] for name in orders}
    # In turn, so that a machine that grows slower or faster does so for both.
    while sum(map(sum, times.values())) < 2 * seconds:
        for name, indices_of in orders.items():
            indices = list(indices_of(len(times[name]) % (len(dataset) // batch_size)))
            started = time.perf_counter()
            task.collate(dataset.__getitems__(indices))
            times[name].append(time.perf_counter() - started)
    rates = {name: batch_size / statistics.median(measured) for name, measured in times.items()}
    return {"batch_size": batch_size, "batches": len(times["sequential"]), **rates}
