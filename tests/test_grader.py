"""Traps of grading: settings, argument order, hanging expressions, dying workers, leaked secrets."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import grader
import rewards
from grader import MathVerifier, grade, math_reward, program, workers

CASES = Path(__file__).parents[2] / "shared/data/math_grading/cases.jsonl"
HANGS = {  # each one survives a Python SIGALRM handler, because the time goes into one call of C code
    "power tower (Math-Verify issue 65)": (r"$\boxed{5^{5^{5^{5^5}}}}$", "5"),
    "factorial": (r"$\boxed{99999999999!}$", "5"),
    "nested parentheses": (r"$\boxed{" + "(" * 300 + "1" + ")" * 300 + "}$", "5"),
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def verifier():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_secret")
        shared = MathVerifier(workers=2, timeout_s=20.0)
    with shared:
        yield shared


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        (r"The final answer is $\boxed{\frac{1}{2}}$. I hope it is correct.", "0.5", 1.0),
        (r"The final answer is $\boxed{\frac{1}{3}}$. I hope it is correct.", "0.5", 0.0),
        (r"$2 + 3 = 5$, then $\boxed{5}$, which is more than $4$.", "5", 1.0),  # boxed comes first
        (r"So $\boxed{5}$; the final answer is $x + y$ in general.", "5", 1.0),  # even before this phrase
        (r"I first thought $\boxed{4}$, but it is $\boxed{5}$.", "5", 1.0),  # of two boxes the last
        (r"I first thought $\boxed{5}$, but it is $\boxed{4}$.", "5", 0.0),
        (r"$\boxed{5 \text{ cm}}$", "5", 1.0),  # units
        (r"$\boxed{5}$", r"5 \text{ miles}", 1.0),
        (r"$\boxed{1,234}$", "1234", 1.0),
        (r"$\boxed{0.333333}$", r"\frac{1}{3}", 1.0),  # six decimals are enough
        (r"$\boxed{0.3333}$", r"\frac{1}{3}", 0.0),
        (r"$\boxed{x + y}$", "y+x", 1.0),
        (r"$\boxed{2(m^2+n^2)<5mn}$", "\n2\\left(m^{2}+n^{2}\\right)\n<5 m n\n", 1.0),  # as in NuminaMath
        (r"$\boxed{42}$", r"$42$", 1.0),  # a gold with its own delimiters
        (r"$\boxed{42}$", "", 0.0),  # nothing can equal a gold that is not there
        ("The answer is 8", "8", 0.0),  # prose: the paper extracts LaTeX only
        ("I do not know.", "8", 0.0),
        ("", "8", 0.0),
        (r"\boxed{", "8", 0.0),  # cut off by the token limit
    ],
)
def test_reward(response, gold, reward):
    """Bug: other settings than the paper's. Break: drop `boxed_match_priority=0`, the $, or `split`."""
    assert math_reward(response, gold) == reward


def test_gold_is_the_first_argument():
    """Bug: `verify(pred, gold)` takes an inequality for an interval. Break: swap the two."""
    assert math_reward(r"$\boxed{(1,2)}$", "1<x<2") == 1.0
    assert math_reward(r"$\boxed{1<x<2}$", "(1,2)") == 0.0


def test_the_end_of_a_long_response_is_graded():
    """Bug: a cap that keeps the head loses every long answer. Break: `response[:MAX_CHARS]`."""
    padding = "Let us see. " * grade.MAX_CHARS
    assert math_reward(padding + r"The final answer is $\boxed{5}$.", "5") == 1.0
    assert math_reward(r"The final answer is $\boxed{5}$." + padding, "5") == 0.0


# What Math-Verify with the paper's settings decides unlike the label of the public graders' test suites.
DIFFERENT = {
    ("5", "3+2"): "no LaTeX in the response; the label is of a grader that also reads plain expressions",
    ("2^3", "The answer is 8"): "no LaTeX in the response",
    ("3", "x = 3"): "no LaTeX in the response",
    ("2", r"$17 \bmod 5 = 2$"): "latex2sympy does not parse \\bmod, so the last side is not split off",
}


@pytest.mark.skipif(not CASES.exists(), reason="shared/data/math_grading is not here")
def test_public_cases(verifier):
    """Bug: a library upgrade or a changed setting moves rewards unseen. Break: `units=False`."""
    cases = [case for case in map(json.loads, CASES.read_text().splitlines()) if not case.get("config")]
    items = [(c["pred"] if c["form"] == "text" else f"${c['pred']}$", c["gold"]) for c in cases]
    scores = verifier.score(items)
    graded = zip(cases, scores, strict=True)
    different = {(case["gold"], case["pred"]) for case, score in graded if score != case["expected"]}
    assert len(cases) == 145 and different == set(DIFFERENT)


def test_pool_equals_function_in_order(verifier):
    """Bug: replies stored as they arrive, so a slow item shifts the rest. Break: append instead of index."""
    slow = (r"$\boxed{\sin^2(x) + \cos^2(x)}$", "1")
    items = [(rf"$\boxed{{{n}}}$", str(n - n % 3)) for n in range(40)]
    items[0] = items[7] = slow
    expected = [math_reward(*item) for item in items]
    assert sorted(set(expected)) == [0.0, 1.0]
    assert verifier.score(items) == expected
    assert verifier.score([]) == []


def test_parse_failures_are_counted(verifier):
    """Bug: a policy that drops the answer format looks merely wrong. Break: count `not score`."""
    before = verifier.parse_failures
    verifier.score([("no answer", "1"), (r"$\boxed{2}$", "1"), ("", "1")])
    assert verifier.parse_failures - before == 2


def test_speed_is_that_of_each_worker(verifier):
    """A speed that grows with the number of workers, or none. Break: no `/ len(self._workers)`."""
    start = time.monotonic()
    verifier.score([(rf"$\boxed{{{n}}}$", "1") for n in range(40)])
    assert verifier.per_s == pytest.approx(20 / (time.monotonic() - start), rel=0.2)
    before = verifier.per_s
    assert verifier.score([]) == [] and verifier.per_s == before


def test_what_was_begun_is_graded_once_and_counted_when_scored(verifier, monkeypatch):
    """A step whose responses are graded twice, or that counts the failures of a step ahead; another step's
    scores. Breaks: no begin() in score; count in _work; the first of _begun, whatever its items."""
    calls, run = [], verifier._run
    monkeypatch.setattr(verifier, "_run", lambda requests: calls.append(len(requests)) or run(requests))
    first = [(r"$\boxed{5}$", "5"), ("no answer", "5")]
    second = [("none here", "6"), ("nor here", "6"), (r"$\boxed{6}$", "6")]
    before = verifier.parse_failures
    verifier.begin(first)
    verifier.begin(second)
    assert verifier.score([(r"$\boxed{7}$", "7")]) == [1.0]  # which was not begun
    assert verifier.parse_failures == before and calls == [2, 3, 1]
    assert verifier.score(second) == [0.0, 0.0, 1.0] and verifier.parse_failures == before + 2
    assert verifier.score(first) == [1.0, 0.0] and verifier.parse_failures == before + 3
    assert verifier.score(first) == [1.0, 0.0] and calls == [2, 3, 1, 2]  # the second time it was not begun


def test_closing_does_not_wait_for_what_was_begun():
    """A run that ends at a signal, and then grades a window first. Break: no `_closing` in _run."""
    verifier = MathVerifier(workers=1, timeout_s=30.0)
    verifier.score([("$1$", "1")])
    verifier.begin([("$1$", "1")] * 20000)
    start = time.monotonic()
    verifier.close()
    assert time.monotonic() - start < 5


def test_unparsable_golds(verifier):
    """Bug: problems that no response can solve stay in the data. Break: return numbers of unique golds."""
    golds = ["1", "1", "", r"\frac{1}{2}", "x=1", "$5", "\n7\n", "", r"\frac{"]
    assert verifier.unparsable(golds) == [2, 7, 8]


def test_a_grader_that_always_crashes_stops_the_run(monkeypatch):
    """Bug: a broken installation scores every response 0.0, which looks like a bad policy.

    Break: drop the raise.
    """
    monkeypatch.setattr(workers, "START_S", 30.0)
    with MathVerifier(workers=1) as broken, pytest.raises(RuntimeError, match="in a row died"):
        list(broken._run([("no such function", "1")] * 50))


def test_workers_that_die_before_they_get_a_request_stop_the_run(monkeypatch, tmp_path):
    """Bug: a worker that dies whenever it is idle is replaced for ever. Break: no _count_death() at send."""
    (tmp_path / "light.py").write_text("def functions(): return {}\n")
    monkeypatch.setattr(grade, "__file__", str(tmp_path / "light.py"))
    monkeypatch.setattr(workers, "IN_A_ROW", 2)

    def send(worker, *request):
        raise BrokenPipeError

    monkeypatch.setattr(workers._Worker, "send", send)
    with MathVerifier(workers=1) as broken, pytest.raises(RuntimeError, match="4 workers in a row died: see"):
        broken._submit([("grade",)]).result(timeout=60)


def test_items_must_be_text(verifier):
    """Bug: a chat prompt's missing gold scores 0.0 for ever. Break: drop the check in `_run`."""
    with pytest.raises(ValueError, match="item 1 is not text"):
        verifier.score([("$1$", "1"), ("$1$", None)])


@pytest.mark.parametrize("workers, timeout_s", [(0, 1.0), (1, 0.0)])
def test_bad_arguments(workers, timeout_s):
    """Bug: a pool of no workers waits for ever. Break: drop the check in `__init__`."""
    with pytest.raises(ValueError, match="must be"):
        MathVerifier(workers, timeout_s)


def test_workers_for_the_cores_that_are_ours(monkeypatch):
    """Bug: 16 workers on the two cores of a job on a large machine. Breaks: os.cpu_count() alone; no
    LOCAL_WORLD_SIZE."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(60, 64)), raising=False)
    assert workers.cores() == 4
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers.cores() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.cores() == 1


def test_hanging_items_are_killed():
    """Bug: one expression stops the training (Math-Verify issue 65). Break: ignore `deadline` in `_run`."""
    good, bad = (r"$\boxed{5}$", "5"), list(HANGS.values())
    with MathVerifier(workers=2, timeout_s=1.0) as verifier:
        verifier.score([good, good])  # both have started
        start = time.monotonic()
        assert verifier.score([*bad, good, good]) == [0.0] * len(bad) + [1.0, 1.0]
        assert time.monotonic() - start < 15  # two rounds of 1 s, and the start of two workers
        assert (verifier.timeouts, verifier.restarts) == (len(bad), len(bad))
        assert verifier.score([good] * 10) == [1.0] * 10
        assert verifier.unparsable(["1", "(" * 300 + "1" + ")" * 300]) == [1]  # a gold can hang too


def test_dead_workers_are_replaced():
    """Bug: a crashed worker stops the training, or costs others their reward. Break: no `_replace` on EOF."""
    good = (r"$\boxed{5}$", "5")
    with MathVerifier(workers=1, timeout_s=30.0) as verifier:
        assert verifier.score([good]) == [1.0]
        os.kill(verifier._workers[0].process.pid, signal.SIGKILL)  # while idle: no item is to blame
        time.sleep(0.2)
        assert verifier.score([good, good]) == [1.0, 1.0] and verifier.restarts == 1
        killer = threading.Timer(0.5, os.kill, (verifier._workers[0].process.pid, signal.SIGSEGV))
        killer.start()  # while busy: that item scores 0.0
        assert verifier.score([good, HANGS["factorial"], good]) == [1.0, 0.0, 1.0]
        assert (verifier.restarts, verifier.timeouts) == (2, 0)
        killer.join()


def test_a_worker_may_be_replaced_while_others_ask(monkeypatch):
    """Bug: with one worker, begin() in the middle of a replacement finds none ("closed"), and the speed is
    divided by 0. Breaks: `not self._workers` in _submit, and remove the old one before _start() in _replace.
    """
    good = (r"$\boxed{5}$", "5")
    with MathVerifier(workers=1, timeout_s=30.0) as verifier:
        assert verifier.score([good]) == [1.0]
        start, seen = verifier._start, []

        def replacement():
            seen.append((len(verifier._workers), verifier._submit([])))
            return start()

        monkeypatch.setattr(verifier, "_start", replacement)
        os.kill(verifier._workers[0].process.pid, signal.SIGKILL)
        time.sleep(0.2)
        assert verifier.score([good]) == [1.0]
        ((count, future),) = seen
        assert count == len(verifier._workers) == 1 and future.result(timeout=30)[0] == []


def test_interrupted_call_leaves_no_reply_behind():
    """Bug: after Ctrl-C the next call takes old replies for its own. Break: drop the loop before `queue`."""
    with MathVerifier(workers=1, timeout_s=30.0) as verifier:
        assert verifier.score([("$1$", "1")]) == [1.0]
        replies = verifier._run([("grade", "$1$", "1")] * 3)
        next(replies)
        verifier._workers[0].send(1, ("grade", "$1$", "1"))  # on its way when the caller gives up
        assert verifier.score([("$2$", "1"), ("$3$", "1")]) == [0.0, 0.0]


def test_worker_that_cannot_start_is_an_error(monkeypatch):
    """Bug: without math-verify every response scores 0.0 silently. Break: `_replace` a starting worker."""
    monkeypatch.setattr(grade, "__file__", "missing.py")
    monkeypatch.setattr(MathVerifier, "_replace", lambda *_: pytest.fail("starts workers without end"))
    with MathVerifier(workers=1) as verifier, pytest.raises(RuntimeError, match="died while starting"):
        verifier.score([("$1$", "1")])


def test_orphan_ends_by_itself():
    """Bug: the trainer is killed and its stuck worker burns a core for days. Break: drop the `setitimer`."""
    command = [sys.executable, program.__file__, "0.2", str(workers.MEMORY_BYTES), grade.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert json.loads(worker.stdout.readline()) == "ready"
        worker.stdin.write(json.dumps(("grade", *HANGS["factorial"])).encode() + b"\n")
        worker.stdin.flush()
        try:
            assert worker.wait(timeout=10) == -signal.SIGALRM
        finally:
            worker.kill()


@linux
def test_workers_hold_no_secrets(verifier):
    """Bug: tokens of the trainer's environment sit beside model output. Break: `env=os.environ`."""
    verifier.score([("$1$", "1")])  # has started, and so has its environment
    environment = Path(f"/proc/{verifier._workers[0].process.pid}/environ").read_text()
    assert "hf_secret" not in environment and "PYTHONHASHSEED=0" in environment
    allowed = {"PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "PYTHONHASHSEED"}
    assert {entry.split("=")[0] for entry in environment.split("\0") if entry} <= allowed


@linux
def test_memory_is_capped(verifier):
    """Bug: an expression takes all memory and the kernel kills the trainer. Break: drop the `setrlimit`."""
    verifier.score([("$1$", "1")] * 40)  # each worker has started
    for worker in verifier._workers:
        limits = Path(f"/proc/{worker.process.pid}/limits").read_text().splitlines()
        soft = next(line.split()[3] for line in limits if line.startswith("Max address space"))
        assert soft != "unlimited" and int(soft) <= workers.MEMORY_BYTES


def test_close_leaves_no_process():
    """Bug: killed but never reaped workers pile up as zombies. Break: drop `wait` in `stop`."""
    with MathVerifier(workers=2) as verifier:
        pids = [worker.process.pid for worker in verifier._workers]
        verifier.score([("$1$", "1")])
    for pid in pids:
        with pytest.raises(ProcessLookupError):  # a zombie would still take the signal
            os.kill(pid, 0)
    with pytest.raises(ValueError, match="closed"):
        verifier.score([("$1$", "1")])


def test_import_is_light():
    """Bug: every rank waits for sympy, or needs torch, to import this. Break: import math_verify on top."""
    code = "import sys, grader; assert not {'sympy', 'torch', 'math_verify'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(grader.__file__).parents[1], check=True)


def test_public_names():
    """Bug: programs that import the grader from rewards fail. Break: import only MathVerifier there."""
    assert (rewards.math_reward, rewards.MathVerifier) == (grader.math_reward, grader.MathVerifier)
