"""How many training samples per second a task draws on one core."""

import random
import statistics
import time
from typing import Any

from ..tasks import Task
from .meter import SEED


def data_throughput(task: Task, batch_size: int = 128, seconds: float = 1.0) -> dict[str, Any]:
    """
    Samples per second when training batches are drawn and collated, as a data loader without workers does it.

    Args:
        task: the task to measure.
        batch_size: samples per batch.
        seconds: time to spend on each of the two orders.

    Returns:
        `sequential` and `shuffled`, the samples per second of the median batch: consecutive samples, and samples from
        anywhere in the training split; `batch_size`; and `batches`, the number of batches timed in each order.
    """
    dataset = task.dataset("train")
    shuffled = random.Random(SEED)
    orders = {
        "sequential": lambda batch: range(batch * batch_size, (batch + 1) * batch_size),
        "shuffled": lambda batch: shuffled.choices(range(len(dataset)), k=batch_size),
    }
    times: dict[str, list[float]] = {name: [] for name in orders}
    # The orders take turns, so that a change in the machine's speed affects both alike.
    while sum(map(sum, times.values())) < 2 * seconds:
        for name, indices_of in orders.items():
            indices = list(indices_of(len(times[name]) % (len(dataset) // batch_size)))
            started = time.perf_counter()
            task.collate(dataset.__getitems__(indices))
            times[name].append(time.perf_counter() - started)
    rates = {name: batch_size / statistics.median(measured) for name, measured in times.items()}
    return {"batch_size": batch_size, "batches": len(times["sequential"]), **rates}
