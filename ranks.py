"""The ranks of a run, the processes that torchrun starts: how they meet, and what they count together.

Every rank samples, scores and learns from its own slice of a step's prompts. So whatever is divided by the
whole step, and whatever is reported of it, is added up over the ranks first. These functions are collectives:
all ranks call them, in the same order.
"""

import os
import sys
from datetime import timedelta
from functools import cache, partialmethod

import torch
import torch.distributed as dist
from tqdm import tqdm

# While one rank generates its last long response, or measures a checkpoint, the others wait in a collective.
# The death of a rank does not wait for this: torchrun ends the others at once.
PATIENCE = timedelta(hours=2)


def init_ranks():
    """Join torchrun's ranks, or stand alone under plain `python`. Returns (rank, world, device)."""
    if not dist.is_initialized():
        see_one_gpu(int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    on_gpu = torch.cuda.is_available()
    _gloo.cache_clear()  # it may be that of a run before, in the same process
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if dist.is_initialized():
        pass  # a notebook, or a test, that calls main() again
    elif "RANK" in os.environ:
        dist.init_process_group(backend, timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if on_gpu:
        torch.cuda.set_device(0)  # the one that is seen; else torch takes the LOCAL_RANK-th
    if dist.get_world_size() > 1:
        _gloo()  # all ranks make it together, so here, where all are
    if dist.get_rank() > 0:
        mute()
    return dist.get_rank(), dist.get_world_size(), torch.device("cuda:0" if on_gpu else "cpu")


def see_one_gpu(local, ranks_here):
    """Hide all GPUs but this rank's, because an engine takes the first that it sees.

    Must come before CUDA is initialised. ValueError if the machine has fewer GPUs than ranks.
    """
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen is None:
        seen = ",".join(map(str, range(torch.cuda.device_count())))
    gpus = seen.split(",") if seen else []
    if not gpus:
        return  # a run on the CPU
    if len(gpus) < ranks_here:
        raise ValueError(f"torchrun --nproc-per-node {ranks_here}: there are {len(gpus)} GPUs here")
    os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local]


def mute():
    """Leave it to rank 0 to show what a run says and how far it is. Errors, on stderr, are shown by all."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def rank():
    """This process's number among the ranks; 0 where none were started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of ranks; 1 where none were started."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _reduce(numbers, operation):
    """Each of some numbers, reduced over all ranks."""
    tensor = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so by gloo, whatever gradients go by
    if world_size() > 1:
        dist.all_reduce(tensor, operation)
    return tensor.tolist()


def total(values):
    """The sum of all ranks' values."""
    return _reduce([sum(values)], dist.ReduceOp.SUM)[0]


def mean(values):
    """The mean of all ranks' values; None where no rank has any."""
    values = list(values)
    added, count = _reduce([sum(values), len(values)], dist.ReduceOp.SUM)
    return added / count if count else None


def largest(values):
    """The largest of all ranks' values; None where no rank has any."""
    (value,) = _reduce([max(values, default=-torch.inf)], dist.ReduceOp.MAX)
    return None if value == -torch.inf else value


def from_first(compute):
    """What compute() gives on rank 0, on every rank: for a decision that could fall otherwise on another."""
    if world_size() == 1:
        return compute()
    box = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def same_number(batches):
    """A list of batches as long as the longest of any rank: [] stands for one that this rank has not.

    A sharded model's weights are gathered from all ranks at every forward, so a rank that did one less would
    leave the others waiting for it. What an empty batch computes must weigh nothing.
    """
    batches = list(batches)
    return batches + [[]] * int(largest([len(batches)]) - len(batches))


def meet():
    """Wait until all ranks are here."""
    total([0])


def meet_within(seconds):
    """Wait until all ranks are here. RuntimeError names those that do not come within so many seconds."""
    if world_size() > 1:
        # Over gloo, which alone can tell who is missing.
        dist.monitored_barrier(_gloo(), timedelta(seconds=seconds), wait_all_ranks=True)


@cache
def _gloo():
    return dist.new_group(backend="gloo")


def gather(rows):
    """All ranks' rows as one list, on rank 0; an empty one on the others."""
    rows = list(rows)
    if world_size() == 1:
        return rows
    boxes = [None] * world_size() if dist.get_rank() == 0 else None
    dist.gather_object(rows, boxes)
    return [row for box in boxes or [] for row in box]
