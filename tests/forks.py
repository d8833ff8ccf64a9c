"""Runs the command in forked copies of this process, which need no imports, as ranks or to be killed."""

import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from hf_hyla.cli import main


def skip_unless_copies_can_train() -> None:
    """Where torch is built for CUDA, a copy of a process that has compiled something has no gradients any more."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            torch.ones(1, requires_grad=True).sum().backward()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        pytest.skip("copies of this process cannot train, since torch has compiled in it: run this file by itself")


def in_children(folder: Path, arguments: list[str], processes: int = 1, prepare=None) -> list[tuple[int, str]]:
    """`hyla` with these arguments on this number of ranks, each of which first calls `prepare(rank)`; see `on_ranks`."""

    def command(rank):
        if prepare:
            prepare(rank)
        return main(arguments)

    return on_ranks(folder, command, processes)


def on_ranks(folder: Path, function, processes: int) -> list[tuple[int, str]]:
    """
    Calls `function(rank)` in `folder`, in so many copies of this process; for each its exit code, which is what the function
    returns, or minus the signal that ended it, and what it wrote to its error stream.
    """
    skip_unless_copies_can_train()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if child := os.fork():
            children.append(child)
            continue
        code = 99
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # by which pytest-timeout ends tests
        try:
            for stream, name in ((1, f"out{rank}.txt"), (2, f"err{rank}.txt")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
            os.chdir(folder)
            if processes > 1:
                os.environ["OMP_NUM_THREADS"] = "1"  # or accelerate would set as many as there are cores
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            for state in (PartialState, AcceleratorState, GradientState):
                state._reset_state()
            code = function(rank)
        except SystemExit as leaving:
            code = leaving.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return [(code, (folder / f"err{rank}.txt").read_text()) for rank, code in enumerate(codes)]


class ForkedCommand:
    """Stands in for `subprocess.Popen` of `python -m hf_hyla`, without importing everything again."""

    def __init__(self, command, env, stdout, stderr, start_new_session):
        assert command[:3] == [sys.executable, "-m", "hf_hyla"]
        skip_unless_copies_can_train()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            try:
                if start_new_session:
                    os.setsid()
                os.dup2(stdout.fileno(), 1)
                os.dup2(stderr.fileno(), 2)
                sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
                os.environ.update(env)
                code = main(command[3:])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)
