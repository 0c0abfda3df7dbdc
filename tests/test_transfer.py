"""The copy to a server by NCCL: vLLM's own trainer and worker engines, on the CPU, over a double of NCCL."""

import json
import queue
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, torchrun, write_program

import serve
from generate import load_generator
from model import digests, full_weights, load_policy
from sync import SyncError, copy_and_prove, sync

CPU = torch.device("cpu")
URL = "http://127.0.0.1:1"  # nothing listens there
BUCKET = 40_000  # bytes: the models here go in several


class Nccl:
    """In place of vLLM's communicator: a broadcast goes through a queue, from rank 0 to rank 1's thread.

    group: vLLM's own, by which the two have really met. flip: one bit of the next bucket changes on the way.
    """

    wire, flip, buckets = queue.Queue(1), False, 0

    def __init__(self, group, device):
        self.group = group  # rank 0's holds the store that the other rank reads
        group.broadcast_obj("an id" if group.rank == 0 else None, src=0)

    def broadcast(self, tensor, src):
        if self.group.rank == src:
            sent = tensor.clone()
            sent[7] ^= Nccl.flip
            Nccl.flip, Nccl.buckets = False, Nccl.buckets + 1
            Nccl.wire.put(sent, timeout=20)
        else:
            tensor.copy_(Nccl.wire.get(timeout=20))

    def destroy(self):
        pass


class HangingNccl(Nccl):
    """NCCL that waits for a server that is gone."""

    aborted = False

    def broadcast(self, tensor, src):
        time.sleep(1000)

    def destroy(self):
        HangingNccl.aborted = True


def fake_gpu(patch, communicator):
    """Let vLLM's engines and _send_by_nccl run on the CPU, in buckets of BUCKET bytes."""
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor

    stream = SimpleNamespace(synchronize=lambda: None)
    patch.setattr(pynccl, "PyNcclCommunicator", communicator)
    patch.setattr(packed_tensor, "_get_streams", lambda device, count: (stream,) * count)
    patch.setattr(torch.cuda, "stream", nullcontext)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(torch.accelerator, "synchronize", lambda: None)
    patch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    smaller = partial(nccl_engine.NCCLTrainerInitInfo, packed_buffer_size_bytes=BUCKET)
    patch.setattr(nccl_engine, "NCCLTrainerInitInfo", smaller)
    patch.setattr(serve, "seen_from", lambda url: "127.0.0.1")


def servers_at(path, *urls):
    """A Servers for servers that nobody has started."""
    servers = serve.Servers.__new__(serve.Servers)
    servers.path, servers.dtype, servers.urls = path, torch.bfloat16, list(urls)
    servers.transfer, servers.processes, servers.token = None, [], None
    servers.ask = lambda *arguments, **named: serve.ask(*arguments, **named)  # as patched
    return servers


def answer(worker, url, what, body=None, method="POST", timeout=None):
    """What a server with this worker answers, through JSON as over HTTP."""
    body = json.loads(json.dumps(body or {}))
    if what == "get_world_size":
        return {"world_size": 1}
    try:
        if what == "collective_rpc":
            result = getattr(serve.Receiver, body["method"])(worker, **body["kwargs"])
            return json.loads(json.dumps({"results": [result]}))
        getattr(worker, what)(**body)  # its methods have the paths' names
    except Exception as error:
        raise serve.ServerError(f"{url}/{what} answers 500 {error!r}") from error


def send_by_nccl(patch, generator, path):
    """Let an engine of this process take its weights by NCCL, as from a trainer on a GPU; its Servers."""
    (worker,) = generator.llm.collective_rpc(lambda wrapper: wrapper.worker)
    from vllm.config import WeightTransferConfig  # after load_generator, which sets what vLLM's import reads
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

    worker.weight_transfer_engine = NCCLWeightTransferEngine(
        WeightTransferConfig("nccl"), worker.vllm_config, CPU, worker.model_runner.get_model()
    )
    fake_gpu(patch, Nccl)
    patch.setattr(serve, "LOOK_S", 0.2)
    patch.setattr(serve, "healthy", lambda url: True)
    patch.setattr(serve, "ask", partial(answer, worker))
    servers = servers_at(path, URL)

    def load_weights(weights):
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(torch.cuda, "is_available", lambda: True)
            return servers.load_weights(weights)

    generator.load_weights = load_weights
    return servers


@pytest.fixture(params=["llama", "qwen3"])
def pair(request, checkpoints, monkeypatch):
    """A policy, an engine in this process that takes its weights by NCCL, and the receipts of each copy."""
    path = checkpoints[request.param]
    generator = load_generator("vllm", path, torch.bfloat16, CPU, max_model_len=128)
    servers, receipts = send_by_nccl(monkeypatch, generator, path), []
    send = servers._send_by_nccl

    def note(weights):
        receipts.append(serve.in_background(send, weights).result(timeout=60))
        return receipts[-1]

    servers._send_by_nccl = note
    yield load_policy(path, CPU), generator, receipts
    servers.close()


def test_every_copy_by_nccl_arrives(pair):
    """A transfer that hangs, or that cuts the stream in the wrong places; a bit that flips on the way.

    Breaks: list state_dict() in Source; set the source's weights at the first transfer alone; in
    copy_and_prove, no comparison of digests.
    """
    policy, generator, receipts = pair
    sync(policy, generator, 0)
    held, before = [], Nccl.buckets
    for step in (1, 2):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
        sync(policy, generator, step)
        held.append(digests(policy, torch.bfloat16))
        (receipt,) = receipts[-1]
        assert receipt.arrived == held[-1] and receipt.missing == receipt.unequal == []
    assert held[0] != held[1] and Nccl.buckets - before > 6
    Nccl.flip = True
    with pytest.raises(SyncError, match=r"copy 3: of \d+ weights 1 arrived as other bytes: .*embed_tokens"):
        copy_and_prove(policy, generator, 1.0, "copy 3")
    copy_and_prove(policy, generator, 1.0, "copy 4")


def test_ranks_of_several_servers_follow_each_other(monkeypatch):
    """Two workers that take the same rank wait for ever. Break: sum(self.sizes[:1])."""
    asked = {}

    def ask(url, what, body=None, method="POST"):
        asked[url] = body
        return {"world_size": len(url)}

    client = serve.TransferClient(["abc", "de", "f"], ask)
    client.init_weight_transfer_engine({"world_size": 7})
    client.start_weight_update()  # waits for the answers
    assert asked == {"abc": None, "de": None, "f": None}
    client.init_weight_transfer_engine({"world_size": 7})
    client._answers()
    assert [asked[url]["init_info"]["rank_offset"] for url in ("abc", "de", "f")] == [1, 4, 6]


def failing_servers(patch, path, where, refuses):
    """A Servers whose one server, at the request `where`, refuses it; or else dies, without an answer."""

    def ask(url, what, body=None, method="POST", timeout=None):
        if what == where and refuses:
            raise serve.ServerError(f"{url}/{what} answers 500")
        if what == where:
            time.sleep(1000)
        # With 0 workers nobody waits for one at the start, only in the broadcast.
        return {"world_size": int(where == "init_weight_transfer_engine"), "results": []}

    fake_gpu(patch, HangingNccl)
    patch.setattr(serve, "LOOK_S", 0.2)
    patch.setattr(serve, "healthy", lambda url: refuses)
    patch.setattr(serve, "ask", ask)
    return servers_at(path, URL)


@pytest.mark.parametrize("where", ["init_weight_transfer_engine", "update_weights"])
@pytest.mark.parametrize("refuses, said", [(True, "answers 500"), (False, "has died")])
def test_a_server_that_fails_in_a_transfer_ends_it(checkpoints, monkeypatch, where, refuses, said):
    """A trainer that waits in NCCL for a server that is gone, or that has reported an error.

    Breaks: call trainer_init without _wait; no raise_refusals in _wait; no broken.shutdown().
    """
    path = checkpoints["llama"]
    servers = failing_servers(monkeypatch, path, where, refuses)
    monkeypatch.setattr(HangingNccl, "aborted", False)
    weights = full_weights(load_policy(path, CPU), torch.bfloat16)
    started = time.monotonic()
    with pytest.raises(serve.ServerError, match=said):
        serve.in_background(servers._send_by_nccl, weights).result(timeout=20)
    serve.in_background(servers.close).result(timeout=20)
    assert time.monotonic() - started < 10
    assert servers.transfer is None and HangingNccl.aborted == (where == "update_weights")


DYING = """
import atexit
sys.path.insert(0, "tests")
import pytest, torch
from model import full_weights, load_policy
from test_transfer import failing_servers

servers = failing_servers(pytest.MonkeyPatch(), "tiny/llama", "update_weights", refuses=False)
atexit.register(servers.close)
servers._send_by_nccl(full_weights(load_policy("tiny/llama"), torch.bfloat16))
"""


@pytest.mark.slow
def test_a_program_whose_server_died_in_a_transfer_ends(tmp_path):
    """An error that is shown, and a program that still waits at its exit, in a thread of vLLM's that asks the
    server. Break: wait for the answers in update_weights."""
    command = [sys.executable, write_program(tmp_path, DYING)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and f"serve.ServerError: {URL} has died" in done.stderr


SHARDED = """
sys.path.insert(0, "tests")
import pytest, torch
from generate import load_generator
from model import digests, load_policy, shard
from ranks import broadcast_from_first, init_ranks
from sync import SyncError, copy_and_prove, sync
from test_transfer import Nccl, send_by_nccl

rank, world, device = init_ranks()
path, bfloat16 = "tiny/qwen3", torch.bfloat16  # its embeddings are tied
generator = load_generator("vllm", path, bfloat16, device, max_model_len=128)
servers = send_by_nccl(pytest.MonkeyPatch(), generator, path)
generator.score = lambda ids, score=generator.score: broadcast_from_first(lambda: score(ids))
policy = shard(load_policy(path, device), device, bfloat16)
for step in range(3):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.05)
    gap = sync(policy, generator, step)
    print(f"step {step}: {Nccl.buckets > 0}, {gap < 0.1}", flush=True)
Nccl.flip = rank == 0
with pytest.raises(SyncError, match="1 arrived as other bytes"):
    copy_and_prove(policy, generator, 1.0, "flipped")
print("caught", flush=True)
servers.close()
"""


@pytest.mark.slow
def test_two_ranks_send_a_sharded_policy_by_nccl(tmp_path):
    """Ranks that gather weights in another order, or at other times, than rank 0 sends them; a digest of a
    rank's part that is compared with the whole. Break: no deque() in Servers.load_weights."""
    said = torchrun(2, write_program(tmp_path, SHARDED))
    assert said.split("\n")[-5:-1] == [*(f"step {step}: True, True" for step in range(3)), "caught"]
