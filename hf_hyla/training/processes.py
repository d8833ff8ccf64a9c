"""Processes of a run: how they were launched, how they share a batch, and their memory."""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env


Result = TypeVar("Result")

# Bytes of the heap for which huge pages are asked: more than a step of the paper's models takes, and less than glibc keeps.
_RESERVED = 7 * 2**28
# Environment variables of accelerate's launcher, and what each asks for.
_SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}


def check_launch() -> None:
    """
    Checks how this process was launched. Call it before anything creates accelerate's state.

    Raises:
        ValueError: if the launcher asks for sharding and there is no accelerator, where accelerate would silently train
            unsharded.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    asked = [name for variable, name in _SHARDED.items() if parse_flag_from_env(variable)]
    if asked and on_cpu:
        raise ValueError(
            f"{asked[0]} needs an accelerator, and there is none here: launch with recipes/accelerate/ddp_cpu.yaml."
        )
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Otherwise every process would train alone, into the same folder.
        os.environ["ACCELERATE_USE_CPU"] = "true"


@functools.cache
def keep_freed_memory() -> None:
    """
    Makes glibc, if that is the C library, keep the memory that a training step frees for the next step, in huge pages.

    By default, glibc returns most of this memory to the system and asks for it again, page by page, in every step. Blocks above
    32 MiB are returned as before. Huge pages save most address look-ups, which take a tenth of a step.
    """
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    largest = 32 * 2**20  # the largest mmap_threshold that glibc accepts
    with contextlib.suppress(AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, largest)
        libc.mallopt(trim_threshold, 2**31 - 1)
        _ask_for_huge_pages(libc, largest)


def _ask_for_huge_pages(libc: ctypes.CDLL, largest: int) -> None:
    """Reserves the heap that training will use, without touching it, and asks the system to back it by huge pages."""
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.free.argtypes = (ctypes.c_void_p,)
    libc.sbrk.argtypes = (ctypes.c_ssize_t,)
    blocks = [libc.malloc(largest - 2**16) for _ in range(_RESERVED // largest)]
    end, huge_page, use_huge_pages = libc.sbrk(0), 2**21, 14
    first = min((block for block in blocks if block), default=end)
    for block in blocks:
        libc.free(block)
    start = -(-first // huge_page) * huge_page
    if start < end:
        libc.madvise(start, end - start, use_huge_pages)


def check_devices(num_devices: int) -> None:
    """
    Raises:
        ValueError: if this process would drive several devices.
    """
    if num_devices > 1:
        raise ValueError(
            f"This process sees {num_devices} devices, but each process of a run takes one: start it by accelerate launch (see "
            "recipes/accelerate), or set CUDA_VISIBLE_DEVICES=0."
        )


def share_of_batch(batch_size: int, num_processes: int) -> int:
    """
    The number of samples of a recipe's batch that each process computes. An update is then the same for any number of processes.

    Raises:
        ValueError: if the processes cannot share the batch evenly.
    """
    if batch_size % num_processes:
        raise ValueError(
            f"{num_processes} processes cannot share batches of {batch_size} samples evenly: choose a number of processes "
            "that divides trainer.train_batch_size."
        )
    return batch_size // num_processes


def on_main(function: Callable[[], Result]) -> Result:
    """Calls `function` on the main process, and returns its result, or raises its error, on every process."""
    processes = PartialState()
    result: Result | None = None
    error: Exception | None = None
    if processes.is_main_process:
        try:
            result = function()
        except (ValueError, OSError) as raised:
            error = raised
    if processes.num_processes > 1:
        result, error = broadcast_object_list([result, error])
    if error:
        raise error
    return result  # type: ignore[return-value]
