"""The parent's side of the workers: it starts them, sends them requests, and kills those that are late.

Deliberately simple: one thread at a time, one item in flight per worker, POSIX only (a selector on pipes,
signals).
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, Self

from tqdm import tqdm

from grader import grade, program

START_S = 300.0  # importing sympy takes 1 s, but many ranks may start at once from a slow network disk
IN_A_ROW = 8  # one hostile response can kill a worker; more in a row mean a broken installation
MEMORY_BYTES = 2 << 30  # a worker's address space, normally 0.1 GB: a runaway must not starve the trainer

Request = tuple  # (function, argument...): a name that the worker's functions() has, then JSON values


class _Worker:
    """One worker process. `state` is "starting", "idle", or the number of the item that it grades.

    words: the program's arguments after SECONDS.
    """

    def __init__(self, timeout_s: float, words: list[str], environment: dict[str, str]):
        self.process = subprocess.Popen(
            # -P keeps the script's folder off the path, where a file of ours could hide a library's module
            [sys.executable, "-P", os.path.abspath(program.__file__), str(timeout_s), *words],
            # The hash seed is fixed because sympy orders terms by hash: one text must always get one score.
            env=environment | {"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C reaches only the run, which finishes its step, then ends these
        )
        self.timeout_s, self.deadline = timeout_s, time.monotonic() + START_S
        self.state: Literal["starting", "idle"] | int = "starting"

    def send(self, number: int, request: Request) -> None:
        """Start item `number`. BrokenPipeError if the process has died."""
        left = json.dumps(request).encode() + b"\n"
        while left:  # a signal can cut a write short
            left = left[self.process.stdin.write(left) :]
        self.state, self.deadline = number, time.monotonic() + self.timeout_s

    def receive(self) -> Any:
        """The reply, or "died"."""
        line = self.process.stdout.readline()
        self.state, self.deadline = "idle", float("inf")
        return json.loads(line) if line.endswith(b"\n") else "died"

    def stop(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: the group has ended already
            os.killpg(self.process.pid, signal.SIGKILL)  # with all that it started in its session
        self.process.wait()  # otherwise it stays a zombie
        self.process.stdin.close()
        self.process.stdout.close()


class Workers:
    """Processes that answer requests with the functions of one file, with a deadline for each.

    Workers start in the background, so the constructor returns at once. `begin` starts grading in the
    background; apart from that the class is not thread-safe. Counters over all items asked for:
        timeouts    those that hit the deadline
        restarts    those that a worker did not survive, by a timeout or because it died
    `per_s` is the number of items per second that each worker graded in the last call.
    """

    broken = "a worker died while starting or took over {:.0f} s; what it printed is above"

    def __init__(self, workers: int, timeout_s: float, words: list[str], environment: dict[str, str]):
        self.timeout_s, self._words, self._environment = timeout_s, words, environment
        self.timeouts = self.restarts = self._deaths = 0
        self.per_s = 0.0
        self._selector = selectors.DefaultSelector()
        self._closing = False
        self._workers = [self._start() for _ in range(workers)]
        self._begun, self._jobs = [], SimpleQueue()  # [(items, future)]; (requests, future), or None to end
        self._thread = Thread(target=self._work, daemon=True)  # daemon: it ends with the program
        self._thread.start()

    def _requests(self, items: list) -> list[Request]:
        """The requests to the workers about these."""
        raise NotImplementedError

    def begin(self, items: list) -> None:
        """Grade these in the background; score() of the same list then waits for the rest."""
        self._begun.append((items, self._submit(self._requests(items))))

    def _graded(self, items: list) -> list[Any]:
        """The reply to each request about these, begun or not; "late" or "died" if the worker was or did."""
        begun = next((entry for entry in self._begun if entry[0] == items), None)
        if begun:
            self._begun.remove(begun)
        replies, seconds = (begun[1] if begun else self._submit(self._requests(items))).result()
        # Counted here, not where they happen: a step counts its own failures, however early it was graded.
        self.timeouts += replies.count("late")
        self.restarts += replies.count("late") + replies.count("died")
        if items:
            self.per_s = len(items) / seconds / len(self._workers)
        return replies

    def _submit(self, requests: list[Request]) -> Future:
        """A future of (replies, seconds): a reply to each request, or "late" or "died"."""
        if self._closing:
            raise ValueError(f"{type(self).__name__}: closed, it cannot score")
        future = Future()
        self._jobs.put((requests, future))
        return future

    def _work(self):
        """The only thread that talks to the workers: one list of requests after the other."""
        while job := self._jobs.get():
            requests, future = job
            start, replies = time.monotonic(), [None] * len(requests)
            try:
                for number, reply in tqdm(
                    self._run(requests), "grading", len(requests), delay=3, leave=False
                ):
                    replies[number] = reply
                future.set_result((replies, time.monotonic() - start))
            except Exception as error:  # raised again where the result is asked for
                future.set_exception(error)

    def close(self) -> None:
        """Kill and reap the workers; they hold nothing worth saving."""
        self._closing = True
        self._jobs.put(None)
        self._thread.join()
        while self._workers:
            self._stop(self._workers.pop())
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> _Worker:
        worker = _Worker(self.timeout_s, self._words, self._environment)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return worker

    def _stop(self, worker):
        self._selector.unregister(worker.process.stdout)
        worker.stop()

    def _replace(self, worker):
        # In one step, because another thread may count the workers: there are always as many.
        self._workers[self._workers.index(worker)] = self._start()
        self._stop(worker)

    def _count_death(self, allowed):
        """RuntimeError for more deaths than allowed without an item graded in between."""
        self._deaths += 1
        if self._deaths > allowed:
            raise RuntimeError(
                f"grader: {self._deaths} workers in a row died: see what they printed; a broken grader must "
                "not pass for wrong answers"
            )

    def _run(self, requests: list[Request]) -> Iterator[tuple[int, Any]]:
        """Yield (number, reply) of each request as it ends; "late" or "died" if the worker was or did."""
        # Ctrl-C can leave a worker busy; its reply would be taken for the reply to an item of this call.
        for worker in [w for w in self._workers if isinstance(w.state, int)]:
            self._replace(worker)

        queue, left = deque(enumerate(requests)), len(requests)
        while left and not self._closing:
            for worker in [w for w in self._workers if w.state == "idle"][: len(queue)]:
                number, request = queue.popleft()
                try:
                    worker.send(number, request)
                except BrokenPipeError:  # the worker died while idle: this item is not to blame, so it waits
                    queue.appendleft((number, request))
                    self.restarts += 1
                    self._count_death(IN_A_ROW + len(self._workers))  # all may have died at once
                    self._replace(worker)
            patience = min(worker.deadline for worker in self._workers) - time.monotonic()
            readable = {key.data for key, _ in self._selector.select(max(0.0, patience))}
            for worker in list(self._workers):
                state, late = worker.state, time.monotonic() >= worker.deadline
                if worker not in readable and not late:
                    continue
                reply = worker.receive() if worker in readable else "late"
                if reply in ("late", "died") and state == "starting":
                    raise RuntimeError(self.broken.format(START_S))
                if reply == "died":
                    self._count_death(IN_A_ROW)
                elif isinstance(state, int):
                    self._deaths = 0
                if reply in ("late", "died"):
                    self._replace(worker)
                if isinstance(state, int):
                    left -= 1
                    yield state, reply


def cores() -> int:
    """Workers that keep this rank's share of the cores busy, at most 16.

    Of the cores, those that this process may use: a container or a job may have a few of a large machine's.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
    known = hasattr(os, "sched_getaffinity")  # macOS and Windows lack it
    usable = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min(16, usable // ranks_here))


class MathVerifier(Workers):
    """`math_reward` in `workers` processes, with a deadline of `timeout_s` seconds for each item.

    The default is one worker per core of this rank's share, at most 16; a worker takes 70 MB. strict: grade
    with Math-Verify alone, as in the paper; see `math_reward`. Besides the counters of Workers:
        parse_failures  responses from which nothing was extracted
    Raises ValueError for bad arguments, RuntimeError when workers cannot start or die one after another.
    """

    broken = f"grader: {Workers.broken}; `python -c 'import math_verify'` shows whether that is installed"

    def __init__(self, workers: int | None = None, timeout_s: float = 10.0, strict: bool = False):
        workers = cores() if workers is None else workers
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"MathVerifier: workers={workers} must be >= 1, timeout_s={timeout_s} > 0")
        self.strict, self.parse_failures = strict, 0
        # Pass only what Python needs to start: workers read a model's text, so they get no token or key.
        kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        super().__init__(
            workers, timeout_s, [str(MEMORY_BYTES), os.path.abspath(grade.__file__)], environment
        )

    def begin(self, items: list[tuple[str, str]]) -> None:
        super().begin(list(dict.fromkeys(self._pairs(items))))

    def score(self, items: list[tuple[str, str]]) -> list[float]:
        """`math_reward` of each (response, gold) pair, in order; 0.0 where the worker was late or died."""
        items = self._pairs(items)
        distinct = list(dict.fromkeys(items))  # a group repeats itself: the same text is graded once
        graded = dict(zip(distinct, self._graded(distinct), strict=True))
        replies = [(0.0, True) if graded[item] in ("late", "died") else graded[item] for item in items]
        self.parse_failures += sum(not extracted for _, extracted in replies)
        return [reward for reward, _ in replies]

    def unparsable(self, golds: list[str]) -> list[int]:
        """Indices of the golds that Math-Verify cannot parse. Every response to them would score 0.0.

        A gold that a worker does not survive is tried twice: the result is cached (rewards.gradable), and the
        machine may just have been busy.
        """
        unique = list(dict.fromkeys(golds))  # a large data set repeats golds: half of them are small numbers
        replies, _ = self._submit([("usable", gold, self.strict) for gold in unique]).result()
        bad = {gold for gold, reply in zip(unique, replies, strict=True) if reply is False}
        again = [gold for gold, reply in zip(unique, replies, strict=True) if not isinstance(reply, bool)]
        replies, _ = self._submit([("usable", gold, self.strict) for gold in again]).result()
        bad |= {gold for gold, reply in zip(again, replies, strict=True) if reply is not True}
        return [index for index, gold in enumerate(golds) if gold in bad]

    def _pairs(self, items):
        for number, texts in enumerate(items):
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"MathVerifier: item {number} is not text: {str(texts)[-100:]}")
        return [tuple(texts) for texts in items]

    def _requests(self, items):
        return [("grade", *texts, self.strict) for texts in items]
