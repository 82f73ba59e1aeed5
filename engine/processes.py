"""The processes of a run: their device, how they start, how they agree, and the signals that stop them."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist


def rank() -> int:
    """The number of this process; the first, 0, writes and prints."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1))


def own_device() -> torch.device:
    """The GPU of this process, or the CPU of a machine without one; ValueError if there are too few GPUs.

    On a Mac, Apple's GPU (mps) serves a run of one process: gloo, which joins several, has only CPU tensors there.
    float32 means float32 from here on: by default, torch convolves on a GPU with the 10 bits of TF32.
    """
    torch.backends.cudnn.allow_tf32 = False
    if not torch.cuda.is_available():
        mps = torch.backends.mps.is_available() and torch.__version__ >= (2, 14) and world_size() == 1
        return torch.device("mps" if mps else "cpu")
    if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise ValueError(f"more processes than GPUs: set --nproc_per_node to {torch.cuda.device_count()} at most")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def connect(device: torch.device) -> None:
    """Starts the process group, if the run has several processes.

    Processes that torchrun starts again may find the addresses of the dead ones in its store and wait for them (pytorch
    issue 135712): each start gets its own names. Several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 instead.
    """
    if world_size() > 1:
        store, *_ = next(dist.rendezvous("env://"))
        if int(os.environ.get("GROUP_WORLD_SIZE", 1)) == 1:
            store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # gloo beside nccl, so that what `from_all` sends, on the CPU, never waits for a GPU.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size())


def from_all(own: list) -> list:
    """The entries of all processes' lists, without repeats. While all are empty this costs a single number."""
    lists = [own]
    if dist.is_initialized():
        dist.all_reduce(count := torch.tensor(len(own)))
        if count:
            lists = [[]] * dist.get_world_size()
            dist.all_gather_object(lists, own)
    return list(dict.fromkeys(chain(*lists)))


def check_same_everywhere(values: dict[str, object]) -> None:
    """Raises ValueError if the processes differ in one of these values: they would learn different things."""
    names = [name for name, _ in from_all([(name, str(value)) for name, value in values.items()])]
    different = sorted({name for name in names if names.count(name) > 1})  # equal entries have been merged
    if different:
        remedy = "give all machines the same command and data, and an --output-dir that they share"
        raise ValueError(f"the processes differ in {', '.join(different)}; {remedy}")


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """Collects the names of the signals that ask for an end: SIGTERM and SIGUSR1 of schedulers, SIGINT of Ctrl-C.

    A signal that comes 5 seconds after the first ends the process at once. A sooner one is torchrun's, which passes on
    what the scheduler or the keyboard has sent to every process already.
    """
    received, patience = [], math.inf

    def receive(number: int, _: object) -> None:
        nonlocal patience
        if time.monotonic() > patience:
            raise KeyboardInterrupt
        patience = min(patience, time.monotonic() + 5)
        received.append(signal.Signals(number).name)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
