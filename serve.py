"""vLLM servers on their own devices or machines: start them, sample from them, send them weights.

    torchrun --nproc-per-node 6 train_dpo.py --prompts-per-step 48 --generator-devices 6 7  # on this machine

    python serve.py --model meta-llama/Llama-3.1-8B-Instruct --host 0.0.0.0 --token-file token
    torchrun train_dpo.py --model meta-llama/Llama-3.1-8B-Instruct \
        --generator-url http://HOST:8000 --generator-token-file token    # on another machine, with that file

A server is vLLM's own, with the flags that let it receive weights: on GPUs over NCCL, by vLLM's
weight-transfer API; on a CPU through files in memory, so there it must run on the trainer's machine. An open
port would run anyone's code: vLLM's development paths call any method, and the weight transfer unpickles. So
every path but /health requires a token, which the server and its trainers read from GENERATOR_TOKEN or a
file. HTTP does not encrypt the token: over a network that you do not trust, use `ssh -L`.
"""

import atexit
import hmac
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from flags import TINY_MODEL, Count, EngineMemory, Share, one_line_errors, parse_flags

import requests
import torch
from torch import Tensor, nn
from transformers.hf_argparser import HfArg

from model import as_numbers, digest, load_config, meta_model
from ranks import broadcast_from_first, end_with_parent, rank, without_torchrun

SERVER = "vllm.entrypoints.launchers.api_server.entry"  # what `vllm serve` runs
START_S = 1800  # a large model takes minutes to load
CONTROL_S = 600  # timeout of a request that is not a prompt
LOOK_S = 10  # seconds between two health checks while waiting for a response
REQUESTS = 256  # open at a time, each with the n samples of a prompt; a process may have 1024 files open
BUCKET_BYTES = 2**29  # per file, on a CPU; this process holds a second copy of that much
LOOPBACK = ("127.0.0.1", "localhost", "::1")  # hosts that other machines cannot reach
TOKEN = "GENERATOR_TOKEN"  # a variable, since a command line shows the token to everyone on the machine
TOKEN_FILE = "~/.cache/semi-online/token"


class ServerError(RuntimeError):
    """A server does not answer, or gives a wrong answer."""


class TokenError(ServerError):
    """A server rejects the token."""


@dataclass
class Receipt:
    """The weights that an engine received in a sync, compared with the weights that it holds.

    arrived: {name: model.digest} of every tensor, where the engine's own load_weights received it.
    missing: the engine's own weights that got no value.
    unequal: its own weights whose bytes differ from what arrived; a fused one stacks several, row-wise.
    unseen: its own weights that cannot be compared, because the engine repacks or shards them.
    """

    arrived: dict[str, int]
    missing: list[str]
    unequal: list[str]
    unseen: list[str]


def engine_settings(
    path: str, dtype: torch.dtype, max_model_len: int, gpu_memory: str | float
) -> dict[str, Any]:
    """The settings of a vLLM engine, in process or as a server; gpu_memory: see EngineMemory."""
    settings = {
        "model": str(path),
        "trust_remote_code": False,
        "generation_config": "vllm",  # ignore the checkpoint's file: model.stop_ids says what ends a response
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_model_len,
        "logprobs_mode": "processed_logprobs",  # after temperature and top-p, as sampled
        "distributed_executor_backend": "uni",  # no extra process for the model
        "use_tqdm_on_load": False,
    }
    if torch.cuda.is_available():
        # Every step with as many sequences as vLLM runs at a time is then one CUDA graph. With vLLM's default
        # of 512, steps in which prompts join took 1.6 times as long (results/bench_gpu).
        graphs = {"compilation_config": {"max_cudagraph_capture_size": 1024}}
        memory = EngineMemory(gpu_memory)
        taken = {"gpu_memory_utilization": memory.share}
        if memory.cache:  # vLLM then sizes nothing, but still checks that this share of the GPU is free
            taken = {"kv_cache_memory_bytes": memory.cache, "gpu_memory_utilization": 0.01}
        return {**settings, **graphs, **taken}
    # On the CPU a seeded request whose prompt is split into chunks crashes ("CPU Generator does not use
    # offset"), so prompts are not split. The cache holds 256 sequences of a small model; others wait.
    return {
        **settings,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_model_len),
        "kv_cache_memory_bytes": 2**30,
        # The n samples of a prompt share it in the prefix cache, in whole blocks. The default here is 128.
        "block_size": 32,
    }


class Servers:
    """vLLM servers: one started on each of `devices`, or those that run already at `urls`.

    Every rank deals its prompts to all servers in turn. Only rank 0 starts them and sends them the weights.
    token_file: holds the token of all `urls`, unless GENERATOR_TOKEN does. ValueError in one line if it holds
    none, or if a server is not available or was started with other settings than serve.py's.
    """

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        max_model_len: int,
        devices: list[str],
        urls: list[str],
        token_file: str | None = None,
    ):
        self.path, self.dtype = path, dtype
        self.processes, self.transfer, self.slots = [], None, Slots(REQUESTS)
        self.token = broadcast_from_first(
            lambda: secrets.token_urlsafe() if devices else read_token("--generator-token-file", token_file)
        )
        self.ask = partial(ask, token=self.token)
        self.urls = broadcast_from_first(
            lambda: self._start(devices, max_model_len) if devices else [url.rstrip("/") for url in urls]
        )
        for url in self.urls:
            self._check(url, max_model_len)
        print(f"serve: generating on {', '.join(self.urls)}")

    def _start(self, devices, max_model_len):
        """Start a server on each device and wait until all answer. Returns their addresses."""
        flags = self._flags(max_model_len)
        print(f"serve: starting vLLM on {', '.join(devices)}")
        urls = []
        atexit.register(self.close)  # also when an error ends the run
        for device in devices:
            port = free_port()
            env = without_torchrun() | {TOKEN: self.token}  # otherwise vLLM would think that it is a rank
            if device != "cpu":
                env["CUDA_VISIBLE_DEVICES"] = device
            command = [sys.executable, __file__, "--attached", "True", "--port", str(port), *flags]
            self.processes.append(subprocess.Popen(command, env=env, start_new_session=True))
            urls.append(f"http://127.0.0.1:{port}")
        deadline = time.monotonic() + START_S
        for device, url, process in zip(devices, urls, self.processes, strict=True):
            while not healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    self.close()
                    raise ValueError(f"--generator-devices {device}: its server did not start; see above")
                time.sleep(0.5)
        return urls

    def _flags(self, max_model_len):
        """The flags of serve.py that start a server for this run."""
        dtype = str(self.dtype).removeprefix("torch.")
        return ["--model", str(self.path), "--dtype", dtype, "--max-model-len", str(max_model_len)]

    def _check(self, url, max_model_len):
        remedy = f"start it by python serve.py {' '.join(self._flags(max_model_len))}"
        try:
            info = self.ask(url, "server_info?config_format=json", method="GET")
            found = info["vllm_config"]["model_config"]
        except TokenError as error:
            raise ValueError(f"--generator-url {error}") from error
        except (ServerError, KeyError) as error:
            what = f"no server that takes weights ({error})"
            raise ValueError(f"--generator-url {url}: {what}; {remedy}") from error
        for name, value in (("logprobs_mode", "processed_logprobs"), ("dtype", str(self.dtype))):
            if found[name] != value:
                raise ValueError(f"--generator-url {url}: its {name} is {found[name]}, not {value}; {remedy}")
        if found["max_model_len"] < max_model_len:
            has = f"a context of {found['max_model_len']} tokens, and {max_model_len} are needed"
            raise ValueError(f"--generator-url {url}: it has {has}; {remedy}")

    def complete(
        self, prompt_ids: list[list[int]], sampling: dict[str, Any], limits: list[int], seeds: list[int],
        turn: int, version: int | None,
    ) -> list[list[tuple]]:  # fmt: skip
        """For each prompt, n triples (response_ids, logps, finish_reason).

        sampling: vLLM's sampling parameters that all prompts share. limits, seeds: one per prompt. Requests
        with the lowest turn go first. version: the step whose weights must have sampled; None for any.
        ServerError if other weights sampled, or a server does not answer.
        """
        common = {**sampling, "logprobs": 0, "detokenize": False}
        futures = []
        for index, (ids, limit, seed) in enumerate(zip(prompt_ids, limits, seeds, strict=True)):
            url = self.urls[(rank() + index) % len(self.urls)]
            request = {**common, "max_tokens": limit, "seed": seed}
            futures.append(in_background(self._complete_one, url, ids, request, turn, version))
        return [self._wait(future) for future in futures]

    def _complete_one(self, url, ids, sampling, turn, version):
        with self.slots.taken(turn):
            choices = self._generate(url, ids, sampling, turn)["choices"]
        # The server labels every token with the weights that sampled it; name_weights() sets the label.
        versions = {span["version"] for choice in choices for span in choice["weight_versions"]}
        if version is not None and versions != {str(version)}:
            raise ServerError(f"{url} sampled with weights of step {versions}, not of {version}")
        return [
            (c["token_ids"], [token["logprob"] for token in c["logprobs"]["content"]], c["finish_reason"])
            for c in choices
        ]

    def _wait(self, future, client=None):
        """Wait for a future's result. ServerError if a server dies or refuses what `client` asks."""
        while not wait([future], timeout=LOOK_S).done:
            if client is not None:
                client.raise_refusals()
            for url in self.urls:
                if not healthy(url):
                    raise ServerError(f"{url} has died")
        return future.result()

    def _generate(self, url, ids, sampling, turn=0):
        """vLLM's endpoint for tokens in, tokens out; requests with the lowest turn come first.

        A request may wait long for its turn, so it has no timeout; _wait checks the servers instead.
        """
        request = {"token_ids": ids, "sampling_params": sampling, "priority": turn}
        return self.ask(url, "inference/v1/generate", request, timeout=None)

    def score(self, ids: list[int]) -> list[list[float]]:
        """Log-prob (nats, temperature 1) of each id but the first, by each server: (servers, T - 1)."""
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0, "detokenize": False}
        requested = [in_background(self._generate, url, ids, sampling) for url in self.urls]
        found = [self._wait(future)["prompt_logprobs"] for future in requested]
        return [[logps[t][str(ids[t])]["logprob"] for t in range(1, len(ids))] for logps in found]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[Receipt]:
        """Send (name, tensor) pairs to all servers. Returns a receipt from each engine."""
        receipts = None
        if rank() > 0:
            deque(weights, maxlen=0)  # all ranks iterate, because they gather a sharded weight together
        elif torch.cuda.is_available():
            receipts = self._send_by_nccl(weights)
        else:
            receipts = self._send_by_files(weights)
        return broadcast_from_first(lambda: receipts)  # no rank goes on before the servers have them

    def _ask_engines(self, method, **arguments):
        """Call a method of Receiver on every worker of every server. Returns their results."""
        request = {"method": method, "kwargs": arguments}
        return [result for url in self.urls for result in self.ask(url, "collective_rpc", request)["results"]]

    def _send_by_nccl(self, weights):
        """Broadcast from this GPU to all servers' GPUs, in buckets, by vLLM's weight-transfer API."""
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerInitInfo,
            NCCLTrainerWeightTransferEngine,
        )

        if self.transfer is None:
            source, client = Source(self.path, self.dtype), TransferClient(self.urls, self.ask)
            for url in self.urls:  # a trainer that died may have left its group there
                self.ask(url, "shutdown_weight_transfer_engine")
            remote = [url for url in self.urls if urlsplit(url).hostname not in LOOPBACK]
            address = seen_from((remote or self.urls)[0])  # one that all servers can reach
            group = NCCLTrainerInitInfo(address, free_port(), 1 + sum(client.sizes), rank=0)
            init = partial(NCCLTrainerWeightTransferEngine.trainer_init, client=client, source=source)
            self.transfer = self._wait(in_background(init, group), client)
        self.transfer.source.weights = weights
        self._ask_engines("record_weights")
        torch.cuda.synchronize()  # the transfer's own streams do not wait for the optimizer's
        try:
            self._wait(in_background(self.transfer.send_weights), self.transfer.client)
        except Exception:
            broken, self.transfer = self.transfer, None
            broken.shutdown()  # aborts the broadcast, which may wait for a dead server; takes 5 s at most
            raise
        return [Receipt(**found) for found in self._ask_engines("receipt")]

    def _send_by_files(self, weights):
        """Write files in memory, which every server reads."""
        from safetensors.torch import save_file

        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            for number, some in enumerate(buckets(weights, BUCKET_BYTES)):
                save_file(some, f"{folder}/{number}.safetensors")
            return [Receipt(**found) for found in self._ask_engines("load_folder", folder=folder)]

    def reset_prefix_cache(self) -> bool:
        """Drop all cached keys and values. True if all servers did."""
        return broadcast_from_first(
            lambda: all(self.ask(url, "reset_prefix_cache")["success"] for url in self.urls)
        )

    def name_weights(self, step: int) -> None:
        """Tell the servers to label every token from now on with this step."""
        name = {"new_version": str(step)}
        broadcast_from_first(lambda: [self.ask(url, "update_weight_version", name) for url in self.urls])

    def close(self) -> None:
        """End the transfer and the servers that were started here."""
        atexit.unregister(self.close)
        transfer, self.transfer = self.transfer, None
        processes, self.processes = self.processes, []
        if transfer is not None:
            for url in self.urls:
                with suppress(ServerError):  # a server that died may be why the run ends
                    self.ask(url, "shutdown_weight_transfer_engine", timeout=LOOK_S)
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + 60  # for all of them
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0, deadline - time.monotonic()))
            with suppress(ProcessLookupError):  # the engine of a killed server may live on
                os.killpg(process.pid, signal.SIGKILL)
        if transfer is not None:
            transfer.shutdown()


def in_background(function: Callable, *arguments) -> Future:
    """Run function(*arguments) in a daemon thread. Returns its future."""
    future = Future()

    def run():
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # raised again by future.result()
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


class Slots:
    """Admits at most `number` threads at a time; the waiting thread with the lowest turn is next."""

    def __init__(self, number: int):
        self.number, self.waiting, self.tickets, self.free = number, [], count(), threading.Condition()

    @contextmanager
    def taken(self, turn: int) -> Iterator[None]:
        with self.free:
            heappush(self.waiting, ticket := (turn, next(self.tickets)))
            self.free.wait_for(lambda: self.number > 0 and self.waiting[0] == ticket)
            heappop(self.waiting)
            self.number -= 1
            self.free.notify_all()
        try:
            yield
        finally:
            with self.free:
                self.number += 1
                self.free.notify_all()


def read_token(flag: str, file: str | Path | None) -> str | None:
    """The token in GENERATOR_TOKEN or else in the file that a flag names; None if there is neither.

    ValueError in one line if the file cannot be read or does not hold a token.
    """
    token, source = os.environ.get(TOKEN), TOKEN
    if not token:
        if file is None:
            return None
        source = f"{flag} {file}"
        try:
            token = Path(file).read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            raise ValueError(f"{source}: {error.strerror}") from error
    if not re.fullmatch("[!-~]+", token):  # what a header can carry
        raise ValueError(f"{source}: holds no token, which is one word in ASCII")
    return token


def request(method: str, url: str, token: str | None = None, **settings: Any) -> requests.Response:
    """Send a request past the environment's proxies, and past ~/.netrc, which could replace the token.

    The environment's own certificates count.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with requests.Session() as session:
        session.trust_env, session.verify = False, os.environ.get("REQUESTS_CA_BUNDLE") or True
        return session.request(method, url, headers=headers, **settings)


def ask(
    url: str,
    what: str,
    body: dict | None = None,
    method: str = "POST",
    timeout: float | None = CONTROL_S,
    token: str | None = None,
) -> Any:
    """A server's JSON answer. ServerError in one line if there is none; TokenError if it is a 401."""
    try:
        answer = request(method, f"{url}/{what}", token, json=body, timeout=timeout)
    except requests.RequestException as error:
        raise ServerError(f"{url} does not answer: {type(error).__name__}") from error
    if answer.status_code == 401:
        remedy = f"set {TOKEN}, or else --generator-token-file"
        raise TokenError(f"{url}: wants the token that it was started with (401); {remedy}")
    if not answer.ok:
        raise ServerError(f"{url}/{what} answers {answer.status_code} {answer.text[:200]!r}")
    try:
        return answer.json() if answer.content else None
    except requests.JSONDecodeError as error:
        raise ServerError(f"{url}/{what} answers {answer.text[:200]!r}, which is not JSON") from error


def healthy(url: str) -> bool:
    """Whether a server answers and its engine is alive; it tells anyone, without a token."""
    try:
        return request("GET", f"{url}/health", timeout=3 * LOOK_S).ok
    except requests.RequestException:
        return False


def buckets(weights: Iterable[tuple[str, Tensor]], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield (name, tensor) pairs as dictionaries of contiguous tensors on the CPU, `size` bytes in each."""
    some, held = {}, 0
    for name, weight in weights:
        some[name], held = weight.cpu().contiguous(), held + weight.nbytes
        if held >= size:
            yield some
            some, held = {}, 0
    if some:
        yield some


Entry = namedtuple("Entry", "name dtype shape")


class Source:
    """Weights as vLLM's transfer wants them: names and shapes first, then (name, tensor), one at a time."""

    def __init__(self, path: str, dtype: torch.dtype):
        model = meta_model(load_config(path))
        self.entries = [Entry(name, dtype, tuple(p.shape)) for name, p in model.named_parameters()]
        self.weights = ()

    def metadata(self) -> list[Entry]:
        return self.entries

    def __iter__(self):
        return iter(self.weights)


class TransferClient:
    """Present several servers to vLLM's transfer as one; each is asked, by `ask`, in its own daemon thread.

    A server answers two of these requests only after an NCCL call with the trainer. vLLM waits for them in a
    thread that Python joins at exit, so the program would not end if a server never answered. Therefore they
    return at once here, and the next call waits for the answers.
    """

    def __init__(self, urls: list[str], ask: Callable):
        self.urls, self.ask, self.requests = urls, ask, []  # the futures of the last requests
        self.sizes = [ask(url, "get_world_size", method="GET")["world_size"] for url in urls]

    def _ask(self, what, bodies):
        each = zip(self.urls, bodies, strict=True)
        self.requests = [in_background(self.ask, url, what, body) for url, body in each]

    def _answers(self):
        for request in self.requests:
            request.result()

    def raise_refusals(self) -> None:
        """ServerError if a server has answered the last request with an error."""
        for request in self.requests:
            if request.done():
                request.result()

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        starts = [1 + sum(self.sizes[:i]) for i in range(len(self.urls))]  # rank 0 of the group sends
        bodies = [{"init_info": {**init_info, "rank_offset": start}} for start in starts]
        self._ask("init_weight_transfer_engine", bodies)  # does not wait

    def start_weight_update(self) -> None:
        self._answers()
        self._ask("start_weight_update", [None] * len(self.urls))
        self._answers()

    def update_weights(self, update_info: dict) -> None:
        self._ask("update_weights", [{"update_info": update_info}] * len(self.urls))  # does not wait

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._answers()
        self._ask("finish_weight_update", [None] * len(self.urls))
        self._answers()


class Recorder:
    """Wraps a vLLM model's load_weights and records what it receives. Runs in the worker."""

    def __init__(self, model: nn.Module):
        self.model, self.load_weights = model, model.load_weights
        self.arrived, self.loaded = {}, set()  # {name: (digest, dtype, shape)}; the engine's own names
        model.load_weights = self

    def __call__(self, pairs: Iterable[tuple[str, Tensor]]) -> set[str]:
        names = self.load_weights(self._noted(pairs))
        self.loaded.update(names)
        return names

    def _noted(self, pairs):
        for name, weight in pairs:
            self.arrived[name] = digest(weight), weight.dtype, weight.shape
            yield name, weight

    def receipt(self) -> Receipt:
        """Restore load_weights, and compare what arrived with the engine's own weights."""
        del self.model.load_weights
        own, unseen = dict(self.model.named_parameters()), repack_tied_head(self.model)
        held, came = {}, {}  # {(the engine's name, number of the part): digest}
        for name, weight in own.items():
            parts = [self.arrived.get(part, (None, None, None)) for part in self._parts(name)]
            rows = [shape[0] if shape else 0 for _, _, shape in parts]
            padding = len(weight) - sum(rows) if weight.dim() else -1  # rows of the vocabulary
            kinds = {(dtype, shape and shape[1:]) for _, dtype, shape in parts}
            if kinds != {(weight.dtype, weight.shape[1:])} or padding < 0:
                unseen.append(name)
                continue
            for number, some in enumerate(weight.split([*rows, padding])[: len(parts)]):
                held[name, number], came[name, number] = digest(some), parts[number][0]
        held, came = as_numbers(held), as_numbers(came)
        return Receipt(
            arrived=as_numbers({name: sum for name, (sum, _, _) in self.arrived.items()}),
            missing=sorted(own.keys() - self.loaded),
            unequal=sorted({name for name, number in held if held[name, number] != came[name, number]}),
            unseen=unseen,
        )

    def _parts(self, name):
        """The names of the weights that one of the engine's own weights stacks, row-wise."""
        for fused, parts in getattr(self.model, "packed_modules_mapping", {}).items():
            if f".{fused}." in name:
                return [name.replace(f".{fused}.", f".{part}.") for part in parts]
        return [name]


def load_in_worker(
    worker: Any, pairs: Iterable[tuple[str, Tensor]] | None, folder: str | Path | None
) -> Receipt:
    """Reload a vLLM engine's weights, from (name, tensor) pairs or from a folder; runs in its worker."""
    recorder = Recorder(worker.model_runner.get_model())  # reload_weights only warns of a missing weight
    worker.reload_weights(weights_iterator=pairs, weights_path=folder)
    return recorder.receipt()


def repack_tied_head(model: nn.Module) -> list[str]:
    """On the CPU, repack an output head tied to the embedding, with the new weights. Returns its name.

    vLLM 0.32 packs the head for its matrix kernel when it loads a model. A reload updates the embedding's
    tensor, but a tied head is not a separate weight, so its packed copy silently keeps the old values.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    if torch.cuda.is_available():
        return []  # it is not packed there
    heads = {name: module for name, module in model.named_modules() if isinstance(module, ParallelLMHead)}
    for head in heads.values():
        head.quant_method.process_weights_after_loading(head)
    return list(heads)


class Receiver:
    """A worker extension: adds methods to those of vLLM's worker."""

    def load_folder(self, folder: str) -> dict[str, Any]:
        """Load the weights from files. Returns a Receipt, as a dictionary."""
        return asdict(load_in_worker(self, None, folder))

    def record_weights(self) -> None:
        """Record what arrives by NCCL from now on."""
        self.recorder = Recorder(self.model_runner.get_model())

    def receipt(self) -> dict[str, Any]:
        """What arrived since record_weights: a Receipt, as a dictionary."""
        return asdict(self.recorder.receipt())


class Guard:
    """ASGI middleware: every request but GET /health needs the token of GENERATOR_TOKEN. Runs in the server.

    vLLM's own --api-key guards four path prefixes, but not the paths that take weights.
    """

    def __init__(self, app: Callable):
        self.app, self.wanted = app, f"Bearer {os.environ[TOKEN]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Pass a request on. Without the token, close a websocket and answer anything else with a 401."""
        # Compare the whole path that the router takes, so that //health and /health/../v1 need the token.
        health = (scope["type"], scope.get("method"), scope.get("path")) == ("http", "GET", "/health")
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or health or hmac.compare_digest(given, self.wanted):
            await self.app(scope, receive, send)  # lifespan is the server's own start and end
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # 1008: policy violation
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            body = b'{"error": "this server wants its bearer token: see serve.py --help"}\n'
            await send({"type": "http.response.body", "body": body})


def seen_from(url: str) -> str:
    """This machine's address as the machine behind `url` sees it."""
    there = urlsplit(url)
    with socket.create_connection((there.hostname, there.port or 80)) as connection:
        return connection.getsockname()[0]


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


@dataclass
class Config:
    model: str = HfArg(default=TINY_MODEL, help="The checkpoint that is trained.")
    host: str = HfArg(
        default="127.0.0.1",
        help="Address to listen on; 0.0.0.0 for trainers on other machines, who then need a token of yours.",
    )
    port: Count = HfArg(default=8000, help="Port to listen on.")
    token_file: str | None = HfArg(
        default=None,
        help=f"Holds the token that trainers must send, unless the variable {TOKEN} does. "
        f"Default: {TOKEN_FILE}, made if it is not there.",
    )
    dtype: Literal["float32", "bfloat16"] | None = HfArg(default=None, help="As in the train scripts.")
    max_model_len: Count | None = HfArg(
        default=None, help="Tokens of the longest prompt and response. Default: the model's context."
    )
    memory: Share = HfArg(default=0.9, help="Share of the GPU's memory.")
    tensor_parallel: Count = HfArg(default=1, help="GPUs that hold one copy of the model together.")
    attached: bool = HfArg(default=False, help="End when the process that started this one ends.")


def command(config: Config) -> list[str]:
    """The command line of vLLM's server."""
    dtype = getattr(torch, config.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    context = load_config(config.model).get_text_config().max_position_embeddings
    settings = engine_settings(config.model, dtype, config.max_model_len or context, config.memory)
    settings |= {"host": config.host, "port": config.port, "uvicorn_log_level": "warning"}
    settings |= {"enable_scale_out": True, "scheduling_policy": "priority"}  # for _generate()
    settings |= {"worker_extension_cls": "serve.Receiver", "middleware": "serve.Guard"}
    if torch.cuda.is_available():
        settings |= {"weight_transfer_config": '{"backend": "nccl"}'}
    if config.tensor_parallel > 1:
        settings |= {"tensor_parallel_size": config.tensor_parallel, "distributed_executor_backend": "mp"}
    flags = []
    for name, value in settings.items():
        name = name.replace("_", "-")
        if isinstance(value, dict):
            value = json.dumps(value)
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return [sys.executable, "-m", SERVER, *flags]


def server_token(config: Config) -> str:
    """The token that trainers must send. If none is given and only this machine is served, make one.

    ValueError in one line if a token must be given and is not, or if its file does not hold one.
    """
    file = Path(config.token_file or TOKEN_FILE).expanduser()
    if os.environ.get(TOKEN):
        return read_token("--token-file", file)
    if config.host not in LOOPBACK and not (config.token_file and file.exists()):
        make = "(umask 077; openssl rand -hex 32 > token)"
        raise ValueError(
            f"--host {config.host}: whoever reaches the server runs code on it: make a token by {make}, "
            f"start by --token-file token (or {TOKEN}), and give the file to the trainers, too"
        )
    if not file.exists():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "x", encoding="utf-8", opener=partial(os.open, mode=0o600)) as private:
                private.write(secrets.token_urlsafe() + "\n")
        except OSError as error:
            raise ValueError(f"--token-file {file}: {error.strerror}") from error
    # Flush, because execvpe() replaces this process.
    print(f"serve: trainers need its token: --generator-token-file {file}", flush=True)
    return read_token("--token-file", file)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        line, token = command(config), server_token(config)
    if config.attached:
        end_with_parent()
    here = str(Path(__file__).resolve().parent)
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    env = {
        **quiet,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the user pins threads (taskset), not vLLM
        **os.environ,
        TOKEN: token,
        "VLLM_SERVER_DEV_MODE": "1",  # the paths that take weights and reset the cache
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),  # for serve.*
    }
    os.execvpe(line[0], line, env)  # this process becomes the server


if __name__ == "__main__":
    main()
