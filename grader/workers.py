"""The parent's end of the grader: it starts workers, sends them items, and kills those that are late.

Deliberately simple: one thread, one item in flight per worker, POSIX only (a selector on pipes, signals).
"""

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
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
        """The reply, or None if the process has died. A reply is one short write, so one read gets it all."""
        line = self.process.stdout.read(4096)
        self.state, self.deadline = "idle", float("inf")
        return json.loads(line) if line else None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()  # otherwise it stays a zombie
        self.process.stdin.close()
        self.process.stdout.close()


class MathVerifier:
    """`math_reward` in `workers` processes, with a deadline of `timeout_s` seconds for each item.

    The default is one worker per core of this rank's share, at most 4; a worker takes 70 MB. Workers start in
    the background, so the constructor returns at once. Not thread-safe. Counters over all calls:
        timeouts        items that hit the deadline
        restarts        workers replaced, after a timeout or because they died
        parse_failures  responses from which nothing was extracted
    `per_s` is the number of responses per second that each worker scored in the last call.
    Raises ValueError for bad arguments, RuntimeError when workers cannot start or die one after another.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 10.0):
        if workers is None:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
            workers = max(1, min(4, (os.cpu_count() or 1) // ranks_here))
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"MathVerifier: workers={workers} must be >= 1, timeout_s={timeout_s} > 0")
        self.timeout_s = timeout_s
        self.timeouts = self.restarts = self.parse_failures = self._deaths = 0
        self.per_s = 0.0
        self._selector = selectors.DefaultSelector()
        self._workers = []
        for _ in range(workers):
            self._start()

    def score(self, items: list[tuple[str, str]]) -> list[float]:
        """`math_reward` of each (response, gold) pair, in order; 0.0 where the worker was late or died."""
        scores, start = [0.0] * len(items), time.monotonic()
        for number, reply in self._run([("grade", response, gold) for response, gold in items]):
            if reply is not None:
                scores[number], extracted = reply
                self.parse_failures += not extracted
        if items:
            self.per_s = len(items) / (time.monotonic() - start) / len(self._workers)
        return scores

    def unparsable(self, golds: list[str]) -> list[int]:
        """Indices of the golds that Math-Verify cannot parse. Every response to them would score 0.0."""
        unique = list(dict.fromkeys(golds))  # a large data set repeats golds: half of them are small numbers
        replies = self._run([("usable", gold) for gold in unique])
        replies = tqdm(replies, desc="checking gold answers", total=len(unique), delay=3)
        bad = {unique[number] for number, usable in replies if not usable}
        return [index for index, gold in enumerate(golds) if gold in bad]

    def close(self) -> None:
        """Kill and reap the workers; they hold nothing worth saving."""
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
        self.restarts += 1
        self._remove(worker)
        self._start()

    def _run(self, requests: list[Request]) -> Iterator[tuple[int, Any]]:
        """Yield (number, reply) of each request as it ends; reply is None if the worker was late or died."""
        if not self._workers:
            raise ValueError("MathVerifier: closed, it cannot score")
        for number, (_, *texts) in enumerate(requests):
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"MathVerifier: item {number} is not text: {str(texts)[-100:]}")
        # Ctrl-C can leave a worker busy; its reply would be taken for the reply to an item of this call.
        for worker in [w for w in self._workers if isinstance(w.state, int)]:
            self._replace(worker)

        queue, left = deque(enumerate(requests)), len(requests)
        while left:
            for worker in [w for w in self._workers if w.state == "idle"][: len(queue)]:
                number, request = queue.popleft()
                try:
                    worker.send(number, request)
                except BrokenPipeError:  # the worker died while idle: this item is not to blame, so it waits
                    queue.appendleft((number, request))
                    self._replace(worker)
            patience = min(worker.deadline for worker in self._workers) - time.monotonic()
            readable = {key.data for key, _ in self._selector.select(max(0.0, patience))}
            for worker in list(self._workers):
                state, late = worker.state, time.monotonic() >= worker.deadline
                if worker not in readable and not late:
                    continue
                reply = worker.receive() if worker in readable else None
                if reply is None and state == "starting":
                    raise RuntimeError(
                        f"grader: a worker died while starting or took over {START_S:.0f} s; what it "
                        "printed is above; `python -c 'import math_verify'` shows whether that is installed"
                    )
                if isinstance(state, int):
                    self._deaths = self._deaths + 1 if reply is None and worker in readable else 0
                if self._deaths > DEATHS_IN_A_ROW:
                    raise RuntimeError(
                        f"grader: {self._deaths} workers in a row died, each on its own item: see "
                        "what they printed; a broken grader must not pass for wrong answers"
                    )
                if reply is None:
                    self.timeouts += worker not in readable
                    self._replace(worker)
                if isinstance(state, int):
                    left -= 1
                    yield state, reply
