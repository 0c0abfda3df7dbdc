"""Generation on a vLLM server beside the trainer: a real one, on the CPU, started once for this file."""

import asyncio
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import wait_for_step

import serve
import train_dpo
import train_grpo
from generate import Busy, ServedGenerator, Window, check_engine, finished, load_generator
from model import load_policy
from ranks import without_torchrun
from run import read_metrics
from sync import SyncError, sync

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PATH = str(ROOT / "tiny/qwen3")  # tied: an output head of its own is what a reload leaves behind
TRAIN = f"--model {PATH} --data tiny@validation --prompts-per-step 8 --samples-per-prompt 8 --steps 7"
TRAIN += " --max-new-tokens 40 --lr 1e-4 --sync-every 3 --ahead 2"


@pytest.fixture(scope="module")
def server():
    """A server with room for 128 tokens; the generator that started it."""
    generator = ServedGenerator(PATH, torch.float32, 128, ["cpu"], [])
    yield generator
    generator.close()


@pytest.fixture
def policy():
    """Weights that no checkpoint holds."""
    model = load_policy(PATH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def test_a_server_samples_what_an_own_engine_does(server, policy, prompts):
    """Other seeds, weights or settings than those of the engine that the loop is tested with.

    Breaks: no "seed" in sampling; leave repack_tied_head out of load_in_worker (the sync fails); 1.0 for
    temperature.
    """
    own = load_generator("vllm", PATH, torch.float32, CPU, 128)
    groups = []
    for generator in (server, own):
        sync(policy, generator, 5)
        groups.append(generator.sample(prompts, 4, 0.7, 1.0, [20, 30], [3, 2**52]))
    own.close()
    for served, ours in zip(*groups, strict=True):
        assert [r.response_ids for r in served] == [r.response_ids for r in ours]
        assert [r.finish_reason for r in served] == [r.finish_reason for r in ours]
        assert all(r.version == 5 for r in served) and len({tuple(r.response_ids) for r in served}) > 1
        for one, other in zip(served, ours, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-5)


@pytest.mark.parametrize("script", [train_dpo, pytest.param(train_grpo, marks=pytest.mark.slow)])
def test_a_run_is_the_same_on_a_server(server, script, tmp_path):
    """Steps sampled past a sync, or twice, since they are sampled during training. A token on disk.

    Breaks: config.ahead alone for `end`; range(step, end) for the steps to sample; before Run() in Life, put
    the token into config.generator_token_file; no rstrip("/") of a URL.
    """
    rows, token = {}, tmp_path / "token"
    token.write_text(f"{server.token}\n")
    served = f"--generator-url {server.urls[0]}/ --generator-token-file {token}"
    for name, flags in (("own", ""), ("served", served)):
        script.main(f"{TRAIN} --run-dir {tmp_path / name} {flags}".split())
        rows[name] = read_metrics(tmp_path / name)
    for one, other in zip(rows["own"], rows["served"], strict=True):
        for key, value in one.items():
            expected = value if value is None else pytest.approx(value, rel=1e-3, abs=1e-5)
            assert key.endswith("_s") or other[key] == expected, key
    assert [row["staleness"] for row in rows["served"]] == [0, 1, 2, 0, 1, 2, 0]
    assert server.token not in (tmp_path / "served" / "config.json").read_text()
    for row in rows["own"]:  # one device: whoever generates does not train
        assert row["generate_s"] == pytest.approx(row["trainer_idle_s"], abs=0.1)
    for row in (*rows["own"], *rows["served"]):
        assert row["generate_s"] + row["generator_idle_s"] == pytest.approx(row["step_s"], abs=0.1)
        assert row["trainer_idle_s"] + row["train_s"] + row["score_s"] + row["sync_s"] < row["step_s"] + 0.01


def test_requests_pass_no_proxy(monkeypatch):
    """A server on this machine that is not found, because requests asks the cluster's proxy for it. Break: no
    trust_env = False."""
    listener = http.server.HTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    )  # which answers 501
    threading.Thread(target=listener.handle_request, daemon=True).start()
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with listener, pytest.raises(serve.ServerError, match="answers 501"):
        serve.ask(f"http://127.0.0.1:{listener.server_port}", "health", method="GET", timeout=10)


def test_a_server_masks_what_no_text_contains(server, policy, prompts, monkeypatch):
    """As test_generate has it for an own engine; here any ids stand for the padding. Break: no logit_bias."""
    sync(policy, server, 0)

    def sampled():
        groups = server.sample(prompts, 4, 1.0, 1.0, 20, [1, 2])
        return {token for group in groups for rollout in group for token in rollout.response_ids}

    common = sampled()
    monkeypatch.setattr(server, "never", dict.fromkeys(common, -100.0))
    assert common and not common & sampled()


def test_weights_that_do_not_arrive_are_caught(server, policy, monkeypatch):
    """Online training that is offline, one machine further away. Break: no digests in a server's receipt."""
    sync(policy, server, 0)
    old = dict(next(serve.buckets(policy.state_dict().items(), 2**30)))
    stale = {name: weight.clone() for name, weight in old.items()}
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    monkeypatch.setattr(serve, "buckets", lambda weights, size: [{n: stale[n] for n, _ in weights}])
    with pytest.raises(SyncError, match=r"of (\d+) weights \1 arrived as other bytes"):
        sync(policy, server, 1)
    monkeypatch.setattr(serve, "buckets", lambda weights, size: [dict(list(weights)[1:])])
    with pytest.raises(SyncError, match="1 did not arrive: model.embed_tokens.weight$"):
        sync(policy, server, 1)


def test_a_server_says_which_weights_sampled(server, policy, prompts):
    """A server that somebody else's run gives weights to. Break: no comparison of versions."""
    sync(policy, server, 4)
    server.ask(server.urls[0], "update_weight_version", {"new_version": "77"})
    with pytest.raises(serve.ServerError, match="weights of step {'77'}, not of 4"):
        server.sample(prompts, 2, 1.0, 1.0, 4, [1, 2])
    server.stamp(4)
    assert server.sample(prompts, 2, 1.0, 1.0, 4, [1, 2])[0][0].version == 4


def test_every_bucket_arrives():
    """The last weights of a model left in the last bucket. Break: no `if some`."""
    weights = [(str(i), torch.full((3,), float(i))) for i in range(7)]
    found = list(serve.buckets(weights, 24))
    assert [list(some) for some in found] == [["0", "1"], ["2", "3"], ["4", "5"], ["6"]]
    together = {name: weight for some in found for name, weight in some.items()}
    assert all(torch.equal(together[name], weight) for name, weight in weights)


def test_source_lists_what_follows(policy):
    """Names, shapes or an order that vLLM would cut the stream by, and that the weights do not have. Break:
    list state_dict(), where a tied head comes twice."""
    source = serve.Source(PATH, torch.bfloat16)
    source.weights = policy.named_parameters()
    entries = [(entry.name, entry.shape) for entry in source.metadata()]
    assert entries == [(name, tuple(weight.shape)) for name, weight in source]


class Stranger(http.server.BaseHTTPRequestHandler):
    """A server that is not vLLM; under /raw, one whose flags are others; under /raw/locked, with a token."""

    def do_GET(self):  # noqa: N802
        if "/locked" in self.path and self.headers["Authorization"] != "Bearer right":
            return self.send_error(401)
        model = {"logprobs_mode": "raw_logprobs", "dtype": "torch.float32", "max_model_len": 4096}
        body = json.dumps({"vllm_config": {"model_config": model}}).encode()
        self.send_response(200 if self.path.startswith("/raw") else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def stranger():
    """Its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}"
        listener.shutdown()


def test_servers_that_cannot_be_used(server, stranger, tmp_path, capsys, monkeypatch):
    """A traceback, or log-probs of another distribution. Breaks: no except in _check; no comparison there."""
    monkeypatch.setenv(serve.TOKEN, server.token)
    for url, room, problem in (
        (f"http://127.0.0.1:{serve.free_port()}", 40, "does not answer"),
        (stranger, 40, "answers 404"),
        (f"{stranger}/raw", 40, "its logprobs_mode is raw_logprobs, not processed_logprobs"),
        (server.urls[0], 200, "a context of 128 tokens"),
    ):
        with pytest.raises(SystemExit) as stop:
            flags = TRAIN.replace("--max-new-tokens 40", f"--max-new-tokens {room}")
            train_dpo.main(f"{flags} --run-dir {tmp_path / 'run'} --generator-url {url}".split())
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and f"--generator-url {url}: " in message and problem in message
        assert "start it by python serve.py" in message and not (tmp_path / "run").exists()


def test_a_wrong_token_is_one_line(stranger, tmp_path, capsys, monkeypatch):
    """A remedy that starts another server; a token that is not sent, or that one of ~/.netrc replaces.

    Breaks: no except TokenError in _check; no "token_file" in generator_settings; headers= for auth= in ask.
    """
    (tmp_path / "netrc").write_text("default login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv(serve.TOKEN, raising=False)
    url = f"{stranger}/raw/locked"
    for token, problem in (
        ("wrong", "wants the token that it was started with"),
        ("right", "its logprobs_mode"),
    ):
        (tmp_path / token).write_text(token)
        with pytest.raises(SystemExit) as stop:
            flags = f"--generator-url {url} --generator-token-file {tmp_path / token}"
            train_dpo.main(f"{TRAIN} --run-dir {tmp_path / 'run'} {flags}".split())
        lines = capsys.readouterr().err.strip().splitlines()
        assert stop.value.code == 2 and f"--generator-url {url}: {problem}" in lines[-1]
        told = [name in lines[-1] for name in (serve.TOKEN, "--generator-token-file", "start it by")]
        assert told == ([True, True, False] if token == "wrong" else [False, False, True])
    monkeypatch.setenv(serve.TOKEN, "right")
    with pytest.raises(ValueError, match="its logprobs_mode"):
        serve.Servers(PATH, torch.float32, 40, [], [url])


def answer_of(scope, *headers):
    """What Guard sends, and whether the app was called."""
    sent, called = [], []

    async def app(scope, receive, send):
        called.append(True)

    async def send(message):
        sent.append(message)

    scope = {"method": "GET", "headers": list(headers), **scope}
    asyncio.run(serve.Guard(app)(scope, None, send))
    return sent, bool(called)


@pytest.mark.parametrize(
    "scope",
    [
        *({"type": "http", "path": path} for path in ("/v1/models", "/health/../v1", "//health", "/health/")),
        *({"type": "http", "path": "/collective_rpc", "method": method} for method in ("POST", "OPTIONS")),
        {"type": "http", "path": "/health", "method": "POST"},
        {"type": "websocket", "path": "/v1/realtime"},
        {"type": "websocket", "path": "/health"},
    ],
    ids=lambda scope: "-".join(scope.values()),
)
def test_what_a_server_guards(scope, monkeypatch):
    """Anybody's code on the server, through a path, a method or a socket that takes no token.

    Breaks: startswith("/health"), or strip("/"), for the comparison of paths; none of the type; none of the
    method; guard "http" alone; `in` for compare_digest.
    """
    monkeypatch.setenv(serve.TOKEN, "right")
    for given in (None, b"", b"Bearer ", b"Bearer wrong", b"Bearer righ", b"Bearer rightly", b"right"):
        sent, called = answer_of(scope, *([(b"authorization", given)] if given is not None else []))
        assert not called
        if scope["type"] == "websocket":
            assert [message["type"] for message in sent] == ["websocket.close"]
        else:
            assert [message.get("status") for message in sent] == [401, None]
            assert sent[1]["body"].count(b"\n") == 1 and json.loads(sent[1]["body"])["error"]
    assert answer_of(scope, (b"host", b"x"), (b"authorization", b"Bearer right")) == ([], True)


def test_what_a_server_does_not_guard(monkeypatch):
    """A server that never becomes healthy, or never starts. Breaks: no `or health`; no "lifespan"."""
    monkeypatch.setenv(serve.TOKEN, "right")
    assert answer_of({"type": "http", "path": "/health"}) == ([], True)
    assert answer_of({"type": "lifespan"}) == ([], True)


def test_a_running_server_is_guarded(server):
    """A guard that vLLM does not call, and a token that `ps` shows. Break: no "middleware" in command()."""
    (url,), token = server.urls, server.token
    for path, method in (("server_info?config_format=json", "GET"), ("collective_rpc", "POST")):
        with pytest.raises(serve.TokenError, match="401"):
            serve.ask(url, path, method=method)
    assert serve.healthy(url) and len(token) > 40
    process = psutil.Process(server.processes[0].pid)
    assert not [p for p in (process, *process.children(recursive=True)) if token in " ".join(p.cmdline())]


def test_a_server_makes_its_token(tmp_path, monkeypatch, capsys):
    """A token that other users read, from its file, the log or `ps`; or a second that locks the trainer out.

    Breaks: no opener; print the token; no `if not file.exists()`; no TOKEN in main's env.
    """
    started, file = [], tmp_path / "new" / "token"
    monkeypatch.delenv(serve.TOKEN, raising=False)
    monkeypatch.setattr(os, "execvpe", lambda program, line, env: started.append((line, env)))
    for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):  # the last with a file that is there
        serve.main(["--host", host, "--token-file", str(file)])
    token, said = file.read_text().strip(), capsys.readouterr().out
    assert file.stat().st_mode & 0o777 == 0o600 and len(token) > 40
    assert token not in said and said.count(f"--generator-token-file {file}\n") == 4
    assert all(env[serve.TOKEN] == token and token not in " ".join(line) for line, env in started)
    monkeypatch.setenv(serve.TOKEN, "given")  # goes first
    serve.main(["--host", "0.0.0.0", "--token-file", str(file)])
    assert started[-1][1][serve.TOKEN] == "given" and len(started) == 5


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (("vllm", False, ["0"], ["http://x"]), "not both"),
        (("transformers", False, ["0"], []), "--generator-devices: these are vLLM servers"),
        (("vllm", True, [], ["http://x"]), "--engine-sleep: with --generator-url"),
        (("vllm", False, ["1", "2"], []), "a rank trains on 2"),
        (("vllm", False, ["1"], []), "on one machine only"),
    ],
)
def test_flags_that_do_not_fit(arguments, problem, monkeypatch):
    """A flag that is silently ignored, a GPU with two owners, or another machine's address.

    Breaks: drop each check.
    """
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "4" if "one machine" in problem else "2")
    with pytest.raises(ValueError, match=problem):
        check_engine(*arguments)


def test_busy_counts_overlapping_calls_once(monkeypatch):
    """Two requests at a time counted as twice the time. Break: add each call's own seconds."""
    clock = [10.0]
    monkeypatch.setattr("generate.time.perf_counter", lambda: clock[0])
    busy = Busy()
    with busy:
        clock[0] += 1
        with busy:
            clock[0] += 2
            assert busy.seconds() == 3
        clock[0] += 4
    clock[0] += 8  # nothing is under way
    assert busy.seconds() == 7
    with busy:
        clock[0] += 16
    assert busy.seconds() == 23


def test_the_lowest_turn_goes_first():
    """The first step of a window waits behind the last, and the trainer with it. Break: no `(turn,` in the
    ticket."""
    slots, order, threads = serve.Slots(1), [], []

    def request(turn):
        with slots.taken(turn):
            order.append(turn)

    with slots.taken(0):
        for turn in (3, 1, 2, 1):
            threads.append(threading.Thread(target=request, args=(turn,)))
            threads[-1].start()
        while len(slots.waiting) < 4:
            time.sleep(0.01)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == [1, 1, 2, 3]


def test_a_dead_server_does_not_keep_the_others_from_being_closed():
    """An engine that keeps its GPU after the run. Break: no suppress(ServerError)."""
    servers = serve.Servers.__new__(serve.Servers)
    ended = []
    servers.ask = serve.ask
    servers.transfer = SimpleNamespace(shutdown=lambda: ended.append("transfer"))
    servers.urls = [f"http://127.0.0.1:{serve.free_port()}"]
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    servers.processes = [process]
    servers.close()
    assert process.poll() is not None and ended == ["transfer"]
    servers.close()  # as at the exit of a program that has closed it


def test_an_error_in_the_background_reaches_the_loop():
    """A thread that dies, and a trainer that waits for it for ever. Break: no except in in_background."""

    class Failing:
        separate, version = True, 0

        def sample(self, *arguments, **keywords):
            raise serve.ServerError("gone")

    window = Window(Failing(), iter([[]]), None, train_dpo.Config())
    with pytest.raises(serve.ServerError, match="gone"):
        window.take(0)


def test_a_dead_server_does_not_cost_the_checkpoint():
    """Steps since the last save, lost because a step sampled ahead failed with its server. Break: Future.done
    for `whole` in Window.state."""
    batches = SimpleNamespace(state_dict=list)
    window = Window(SimpleNamespace(), batches, None, train_dpo.Config())
    failed = serve.in_background(lambda: 1 / 0)
    while not failed.done():
        time.sleep(0.01)
    window.sampled.extend([finished([]), failed, finished([])])
    assert window.state(0) == ({"ahead": 1, "batches": []}, [])


def test_a_dead_server_ends_the_wait(server, policy, prompts, monkeypatch):
    """Hours of waiting for a server that is gone. Break: no except in ask(), and no _wait.

    The last test here: the server does not survive it.
    """
    monkeypatch.setattr(serve, "LOOK_S", 1)
    sync(policy, server, 0)
    (process,) = server.processes
    threading.Timer(0.3, os.kill, (process.pid, signal.SIGKILL)).start()
    started = time.monotonic()
    with pytest.raises(serve.ServerError, match=f"{server.urls[0]} (does not answer|has died)"):
        for seed in range(1000):
            server.sample(prompts * 20, 8, 1.0, 1.0, 80, [seed] * 40)
    assert time.monotonic() - started < 30


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["train_dpo.py", "api_server"])
def test_who_is_killed_takes_the_others_along(victim, tmp_path):
    """A server, or the engine of one, that holds memory after its run. Breaks: no
    end_with_parent() in serve.main; no
    atexit in Servers."""
    command = f"train_dpo.py {TRAIN} --steps 1000 --run-dir {tmp_path / 'run'} --generator-devices cpu"
    # An engine in this process, of an earlier test, sets some of torchrun's variables.
    env = without_torchrun()
    trainer = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, env=env)
    wait_for_step(trainer, tmp_path / "run")
    run = psutil.Process(trainer.pid)
    all_of_it = [run, *run.children(recursive=True)]
    (killed,) = [process for process in all_of_it if victim in " ".join(process.cmdline())]
    killed.kill()
    trainer.wait(timeout=60)
    assert len(all_of_it) > 4 and psutil.wait_procs(all_of_it, timeout=60)[1] == []
