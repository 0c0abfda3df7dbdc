"""The ranks of a run (the processes that torchrun starts): how they join and what they compute together.

Every rank samples, scores and learns from its own slice of a step's prompts. So a step's divisors and its
reported numbers are first summed over the ranks. The functions from all_sum() on are collectives: all ranks
call them, in the same order.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache, partialmethod
from itertools import takewhile
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

# The variables that torchrun sets: a process that is no rank must not inherit them.
TORCHRUNS = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
# While one rank generates its last long response or measures a checkpoint, the others wait in a collective.
# If a rank dies, they do not wait that long: torchrun ends them at once.
PATIENCE = timedelta(hours=2)
Value = TypeVar("Value")


def launch(ranks: int) -> list[str]:
    """The arguments between `python` and a script that start it with this many ranks on this machine."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]


def init_ranks() -> tuple[int, int, torch.device]:
    """Join torchrun's ranks, or be the only rank under plain `python`. Returns (rank, world size, device)."""
    if not dist.is_initialized():
        see_one_gpu(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    on_gpu = torch.cuda.is_available()
    _gloo.cache_clear()  # it may be the group of an earlier run in the same process
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if dist.is_initialized():
        pass  # a notebook or a test has called main() before
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if on_gpu:
        torch.cuda.set_device(0)  # the only visible one; by default torch would take the LOCAL_RANK-th
        # vLLM sets these two in a process that holds an engine. Set them on all ranks, and with servers, too,
        # so that all compute alike.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.set_float32_matmul_precision("highest")
    if dist.get_world_size() > 1:
        _gloo()  # creating a group is a collective, so all ranks do it here
    if dist.get_rank() > 0:
        mute()
    return dist.get_rank(), dist.get_world_size(), torch.device("cuda:0" if on_gpu else "cpu")


def see_one_gpu(local: int, ranks_on_machine: int) -> None:
    """Hide all GPUs but this rank's, because an engine takes the first that it sees.

    Must come before CUDA is initialised. ValueError if the machine has fewer GPUs than ranks.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        seen = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = list(takewhile(lambda gpu: gpu not in ("", "-1"), seen.split(",")))  # CUDA stops there, too
    if not gpus:
        return  # a run on the CPU
    if len(gpus) < ranks_on_machine:
        remedy = "start as many ranks, or none on GPUs (CUDA_VISIBLE_DEVICES=)"
        raise ValueError(f"torchrun --nproc-per-node {ranks_on_machine}: {len(gpus)} GPUs here; {remedy}")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]


def without_torchrun() -> dict[str, str]:
    """The environment for a child process that is no rank: without what torchrun set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(TORCHRUNS)}


def end_with_parent() -> None:
    """On Linux, let this process end when the one that started it does, even if that one is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG


def mute() -> None:
    """Silence stdout and progress bars on all ranks but 0. All ranks show their errors, on stderr."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def rank() -> int:
    """This process's rank; 0 if no ranks were started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 if none were started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _reduce(numbers: list[float], operation) -> list[float]:
    """Reduce each number over all ranks."""
    tensor = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so gloo reduces it
    if world_size() > 1:
        dist.all_reduce(tensor, operation)
    return tensor.tolist()


def all_sum(values: Iterable[float]) -> float:
    """The sum of all ranks' values."""
    return _reduce([sum(values)], dist.ReduceOp.SUM)[0]


def all_mean(values: Iterable[float]) -> float | None:
    """The mean of all ranks' values; None if no rank has any."""
    values = list(values)
    added, count = _reduce([sum(values), len(values)], dist.ReduceOp.SUM)
    return added / count if count else None


def all_max(values: Iterable[float]) -> float | None:
    """The largest of all ranks' values; None if no rank has any."""
    (value,) = _reduce([max(values, default=-torch.inf)], dist.ReduceOp.MAX)
    return None if value == -torch.inf else value


def broadcast_from_first(compute: Callable[[], Value]) -> Value:
    """Run compute() on rank 0 and broadcast the result, so that all ranks decide alike."""
    if world_size() == 1:
        return compute()
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def pad_to_same_count(batches: Iterable[list[Value]]) -> list[list[Value]]:
    """Append empty batches until every rank has as many as the rank with the most.

    FSDP gathers a sharded model's weights from all ranks at every forward, so a rank that ran one forward
    fewer would leave the others waiting. The loss and the metrics of an empty batch must come to 0.
    """
    batches = list(batches)
    return batches + [[]] * int(all_max([len(batches)]) - len(batches))


def meet() -> None:
    """Wait until all ranks are here."""
    all_sum([0])


def meet_within(seconds: float) -> None:
    """Wait until all ranks are here. RuntimeError names the ranks that do not come within `seconds`."""
    if world_size() > 1:
        # Over gloo: NCCL cannot tell which ranks are missing.
        dist.monitored_barrier(_gloo(), timedelta(seconds=seconds), wait_all_ranks=True)


@cache
def _gloo():
    return dist.new_group(backend="gloo")


def gather(rows: Iterable[Value]) -> list[Value]:
    """All ranks' rows as one list on rank 0; an empty list on the others."""
    rows = list(rows)
    if world_size() == 1:
        return rows
    boxes = [None] * world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, boxes)
    return [row for box in boxes or [] for row in box]
