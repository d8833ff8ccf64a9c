"""The reference's learning-rate curve."""

import math


# The share of the learning rate that the reference's schedule ends with.
REFERENCE_FLOOR = 0.1


def check_schedule(warmup_steps: float, max_steps: int) -> None:
    """
    Raises:
        ValueError: unless warm-up and cosine fit into the run.
    """
    if max_steps <= 2 * warmup_steps:
        raise ValueError(
            f"max_steps must be larger than twice warmup_steps, got {max_steps} and {warmup_steps:g}: the learning rate rises "
            f"for warmup_steps, and reaches its floor that long before the end. Set warmup_steps to {max(0, max_steps - 1) // 2} "
            f"or less, or max_steps to {2 * warmup_steps + 1:g} or more; `hyla train RECIPE --quick` fits both."
        )


def reference_schedule(step: int, warmup_steps: int, max_steps: int, floor: float = REFERENCE_FLOOR) -> float:
    """
    Factor of the learning rate in update `step`, counted from 0: linear from 0 to 1 over the warm-up, then a cosine to
    `floor` at `max_steps - warmup_steps`, then `floor`. The first update moves nothing.
    """
    if step < warmup_steps:
        return step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / (max_steps - 2 * warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
