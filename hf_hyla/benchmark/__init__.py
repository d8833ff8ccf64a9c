"""
`hyla bench`: time and memory of attention, training steps, answers and data, with every implementation in one run.

Every implementation is first checked against the definition in float64. If one disagrees, only the speed of the others is
reported. Workloads that are compared take turns. A machine that slows down or speeds up then does so for all of them.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..typed_yaml import one_of
from .against import compare_with
from .attention import FLASH_SHAPE, Shape, measure_attention
from .inference import measure_inference
from .meter import Meter
from .steps import measure_data, measure_steps


PARTS = ("attention", "inference", "sraven", "logic", "data")
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
SHAPES = (Shape(128, 36, 16, 4), Shape(1, 1024, 8, 16))


def benchmark(
    parts: tuple[str, ...] = PARTS,
    *,
    threads: int | None = None,
    repeats: int | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    shapes: tuple[Shape, ...] = SHAPES,
    overrides: dict[str, str] | None = None,
    batch_size: int = 128,
    say: Callable[[str], None] = lambda line: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """
    Measures on the accelerator torch sees, or on the CPU.

    Args:
        parts: the parts to measure, some of `PARTS`.
        threads: threads of the CPU; by default torch's number, and for inference one and two in turn.
        repeats: measurements of each workload; by default as many as fit into ten seconds, 5 to 100.
        lengths: lengths of the attention curves, at batch 1 with 8 heads of width 16.
        shapes: other shapes of attention to measure.
        overrides: overrides of the recipes whose steps are measured, as `load_recipe` takes them.
        batch_size: samples of a training step, and of a batch of data.
        say: called with a line about what is measured next.
        save: called with the result so far, after every shape of attention, training step and task's data.

    Returns:
        A dict that JSON can hold:
        - `rows`: the measurements, see below;
        - `skipped`: what was not measured, and why;
        - `failed`: what disagrees with the definition or cannot be run, and therefore has no rows;
        - `seed`, `threads`, `repeats`, `environment`, `hardware` and `schema_version`.

        A row has
        - `part` and `work`, the workload; for attention also `shape`, its sizes;
        - `subject`: the implementation or model that was timed;
        - `seconds` (the median), `quartiles` (`None` for data) and `repeats`;
        - `peak_bytes`: memory beyond what was in use before; `None` where that cannot be known;
        - `ratios`: the median divided by the medians of other subjects;
        - `samples_per_second`, for inference and data.

        Two subjects of a training step show how fast it could be. "matrix products" are the products of its linear layers
        alone, each with its own shape and by the machine's fastest path. "at the rate of 1024" is the time of the products of all
        tokens, if they ran at the rate of torch's product of two 1024 × 1024 matrices. Their rows have `flop`, and the first has
        `implementations`, the number of products by the name of their fastest path.

    Raises:
        ValueError: if an argument is out of range.
    """
    for part in parts:
        one_of("parts", part, PARTS)
    least = {"threads": threads, "repeats": repeats, "lengths": min(lengths, default=1), "batch_size": batch_size}
    for name, value in least.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    meter = Meter(device, repeats, say)
    with _num_threads(threads or torch.get_num_threads()):
        result = meter.result()
        # The shape for GPUs comes first and the long curve last, since time on a GPU may run out.
        flash = [FLASH_SHAPE] if device.type == "cuda" else []
        curve = [Shape(1, length, 8, 16) for length in lengths]
        measurements: dict[str, list[Callable[[], None]]] = {
            "attention": [
                partial(measure_attention, meter, shape) for shape in dict.fromkeys([*flash, *shapes, *curve])
            ],
            "inference": [
                partial(measure_inference, meter, task, count, overrides)
                for task in ("sraven", "logic")
                for count in ([threads] if threads else (1, 2) if device.type == "cpu" else (torch.get_num_threads(),))
            ],
            "sraven": [partial(measure_steps, meter, "sraven", batch_size, overrides)],
            "logic": [partial(measure_steps, meter, "logic", batch_size, overrides)],
            "data": [partial(measure_data, meter, task, batch_size, overrides) for task in ("sraven", "logic")],
        }
        for measure in itertools.chain.from_iterable(measurements[part] for part in parts):
            measure()
            save(result)
        return result


@contextlib.contextmanager
def _num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_table(result: dict[str, Any]) -> str:
    """The result of `benchmark` as text, with a block for each workload."""
    lines = []
    for title, rows in itertools.groupby(result["rows"], key=lambda row: (row["part"], row["work"], row.get("shape"))):
        lines += ["", ", ".join(filter(None, title))]
        for row in rows:
            spread = (
                "" if row["quartiles"] is None else "{:.2f} to {:.2f}".format(*(1e3 * q for q in row["quartiles"]))
            )
            peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.1f} MiB"
            ratios = [f"{ratio:.3f} x {other}" for other, ratio in row["ratios"].items() if other != row["subject"]]
            if "samples_per_second" in row:
                ratios.append(f"{row['samples_per_second']:,.0f} samples/s")
            lines.append(
                f"  {row['subject']:<18}{1e3 * row['seconds']:>10.2f} ms {spread:>20}{peak:>15}  {', '.join(ratios)}"
            )
    threads = f"{result['threads']} threads, {result['hardware']['accelerator'] or 'no accelerator'}"
    lines += ["", *result["skipped"], f"Medians, quartiles and peak extra memory; {threads}."]
    return "\n".join(lines[1:])


__all__ = ["LENGTHS", "PARTS", "SHAPES", "Shape", "as_table", "benchmark", "compare_with"]
