"""The parent's end of the grader: it starts workers, sends them items, and kills those that are late.

Deliberately simple: one thread at a time, one item in flight per worker, POSIX only (a selector on pipes,
signals).
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal, Self

from tqdm import tqdm

from grader import grade

START_S = 300.0  # importing sympy takes 1 s, but many ranks may start at once from a slow network disk
DEATHS_IN_A_ROW = 8  # one hostile response can kill a worker; more in a row mean a broken installation

Request = tuple[str, ...]  # (function, text...): the name of one of grade.FUNCTIONS, then its arguments


class _Worker:
    """One worker process. `state` is "starting", "idle", or the number of the item that it grades."""

    def __init__(self, timeout_s: float):
        # Pass only what Python needs to start: no token or key beside text that a model wrote. The hash seed
        # is fixed because sympy orders terms by hash, and one text must always get one score.
        kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.process = subprocess.Popen(
            # -P keeps the script's folder off the path, where a file of ours could hide a library's module
            [sys.executable, "-P", os.path.abspath(grade.__file__), "--serve", str(timeout_s)],
            env=environment | {"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C reaches the run alone: it finishes its step, then ends these
        )
        self.timeout_s, self.deadline = timeout_s, time.monotonic() + START_S
        self.state: Literal["starting", "idle"] | int = "starting"

    def send(self, number: int, request: Request) -> None:
        """Start item `number`. BrokenPipeError if the process has died."""
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.state, self.deadline = number, time.monotonic() + self.timeout_s

    def receive(self) -> Any:
        """The reply, or "died". A reply is one short write, so one read gets it all."""
        line = self.process.stdout.read(4096)
        self.state, self.deadline = "idle", float("inf")
        return json.loads(line) if line else "died"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()  # otherwise it stays a zombie
        self.process.stdin.close()
        self.process.stdout.close()


class MathVerifier:
    """`math_reward` in `workers` processes, with a deadline of `timeout_s` seconds for each item.

    The default is one worker per core of this rank's share, at most 16; a worker takes 70 MB. Workers start
    in the background, so the constructor returns at once. `begin` grades in the background what a later
    `score` will ask for; apart from that it is not thread-safe. Counters over all calls of `score`:
        timeouts        items that hit the deadline
        restarts        items that a worker did not survive, by a timeout or because it died
        parse_failures  responses from which nothing was extracted
    `per_s` is the number of responses per second that each worker scored in the last call.
    Raises ValueError for bad arguments, RuntimeError when workers cannot start or die one after another.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 10.0):
        if workers is None:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
            workers = max(1, min(16, (os.cpu_count() or 1) // ranks_here))
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"MathVerifier: workers={workers} must be >= 1, timeout_s={timeout_s} > 0")
        self.timeout_s = timeout_s
        self.timeouts = self.restarts = self.parse_failures = self._deaths = 0
        self.per_s = 0.0
        self._selector = selectors.DefaultSelector()
        self._workers = []
        for _ in range(workers):
            self._start()
        self._closing = False
        self._begun, self._jobs = [], SimpleQueue()  # [(items, future)]; (items, future), or None at the end
        self._thread = Thread(target=self._work, daemon=True)  # an error that ends the program ends it, too
        self._thread.start()

    def begin(self, items: list[tuple[str, str]]) -> None:
        """Grade these in the background; score() of the same list then waits for what is left of them."""
        self._begun.append((items, self._submit("grade", items)))

    def score(self, items: list[tuple[str, str]]) -> list[float]:
        """`math_reward` of each (response, gold) pair, in order; 0.0 where the worker was late or died."""
        begun = next((entry for entry in self._begun if entry[0] == items), None)
        if begun:
            self._begun.remove(begun)
        replies, seconds = (begun[1] if begun else self._submit("grade", items)).result()
        # Counted here, not where they happen: a step counts its own failures, however early it was graded.
        self.timeouts += replies.count("late")
        self.restarts += replies.count("late") + replies.count("died")
        graded = [(0.0, True) if reply in ("late", "died") else reply for reply in replies]
        self.parse_failures += sum(not extracted for _, extracted in graded)
        if items:
            self.per_s = len(items) / seconds / len(self._workers)
        return [reward for reward, _ in graded]

    def unparsable(self, golds: list[str]) -> list[int]:
        """Indices of the golds that Math-Verify cannot parse. Every response to them would score 0.0.

        One that a worker does not survive is tried twice: the result is kept (rewards.gradable), and the
        machine may just have been busy.
        """
        unique = list(dict.fromkeys(golds))  # a large data set repeats golds: half of them are small numbers
        replies, _ = self._submit("usable", [(gold,) for gold in unique]).result()
        bad = {gold for gold, reply in zip(unique, replies, strict=True) if reply is False}
        again = [gold for gold, reply in zip(unique, replies, strict=True) if not isinstance(reply, bool)]
        replies, _ = self._submit("usable", [(gold,) for gold in again]).result()
        bad |= {gold for gold, reply in zip(again, replies, strict=True) if reply is not True}
        return [index for index, gold in enumerate(golds) if gold in bad]

    def _submit(self, function, items):
        """A future of (replies, seconds): a reply to each item, or "late" or "died"."""
        for number, texts in enumerate(items):
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"MathVerifier: item {number} is not text: {str(texts)[-100:]}")
        if not self._workers:
            raise ValueError("MathVerifier: closed, it cannot score")
        future = Future()
        self._jobs.put(([(function, *texts) for texts in items], future))
        return future

    def _work(self):
        """The thread that alone talks to the workers: one list of requests after the other."""
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
        for worker in list(self._workers):
            self._remove(worker)
        self._selector.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self):
        worker = _Worker(self.timeout_s)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _remove(self, worker):
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        worker.stop()

    def _replace(self, worker):
        self._remove(worker)
        self._start()

    def _run(self, requests: list[Request]) -> Iterator[tuple[int, Any]]:
        """Yield (number, reply) of each request as it ends; "late" or "died" where the worker was or did."""
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
                    self._replace(worker)
            patience = min(worker.deadline for worker in self._workers) - time.monotonic()
            readable = {key.data for key, _ in self._selector.select(max(0.0, patience))}
            for worker in list(self._workers):
                state, late = worker.state, time.monotonic() >= worker.deadline
                if worker not in readable and not late:
                    continue
                reply = worker.receive() if worker in readable else "late"
                if reply in ("late", "died") and state == "starting":
                    raise RuntimeError(
                        f"grader: a worker died while starting or took over {START_S:.0f} s; what it "
                        "printed is above; `python -c 'import math_verify'` shows whether that is installed"
                    )
                if isinstance(state, int):
                    self._deaths = self._deaths + 1 if reply == "died" else 0
                if self._deaths > DEATHS_IN_A_ROW:
                    raise RuntimeError(
                        f"grader: {self._deaths} workers in a row died, each on its own item: see "
                        "what they printed; a broken grader must not pass for wrong answers"
                    )
                if reply in ("late", "died"):
                    self._replace(worker)
                if isinstance(state, int):
                    left -= 1
                    yield state, reply
