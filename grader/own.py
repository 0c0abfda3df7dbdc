"""The reward of a user's function, `--reward FILE.py:NAME`, in worker processes that can be killed."""

import json
import math
import os
import sys
from collections.abc import Iterator
from itertools import chain
from typing import Any

from grader import call
from grader.workers import IN_A_ROW, Request, Workers, cores

BATCH = 256  # responses per call of a batch function, or a few more to keep a prompt's together

Items = list[tuple[str, Any]]  # (response, its data.Prompt); data.py imports this package


class Failed(Exception):
    """(number, reply): the request and the reply that end the run."""


class OwnReward(Workers):
    """A user's function, of either shape that call.py knows, with a deadline of `timeout_s` seconds a call.

    A function of one response has as many workers as MathVerifier. A batch function has one worker, and gets
    about BATCH responses per call. A late response scores 0. A late batch is dropped, like a response for
    which the function returns None: NaN, counted in `dropped`. Any other failure is a ValueError in one line
    that names the function, the response and the remedy: a broken reward must not pass for bad answers.
    """

    def __init__(self, reward: str, timeout_s: float = 10.0, memory_gib: float = 8.0):
        file, _, name = reward.rpartition(":")
        self.flag, self.memory_gib, self.dropped, self._late = f"--reward {reward}", memory_gib, 0, 0
        self.broken = f"{Workers.broken}; raise --reward-memory {memory_gib:g} if that was too little"
        words = [str(int(memory_gib * 2**30)), os.path.abspath(call.__file__), os.path.abspath(file), name]
        super().__init__(1, timeout_s, words, os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})
        try:
            ((self.shape,), _) = self._submit([("shape",)]).result()
            if self.shape == "late":
                raise Failed(0, {"error": f"took over {timeout_s:g} s to say what it takes"})
        except (Failed, RuntimeError) as error:
            self.close()
            raise self._error(error) from None
        self._workers += [self._start() for _ in range(0 if self.shape["batch"] else cores() - 1)]

    @classmethod
    def of(cls, config: Any) -> "OwnReward | None":
        """The function that a script's flags name, if any."""
        return cls(config.reward, config.reward_timeout, config.reward_memory) if config.reward else None

    def check(self, prompts: list[Any]) -> None:
        """ValueError in one line if the function needs a column that no row has, or JSON cannot hold one."""
        columns = set(chain.from_iterable(prompt.row for prompt in prompts))
        missing = set(self.shape["needs"]) - columns - {"prompts", "completions"}
        if self.shape["batch"] and missing:
            has = ", ".join(sorted(columns)) or "none"
            raise ValueError(f"{self.flag}: needs {', '.join(sorted(missing))}; --data has the columns {has}")
        for prompt in prompts:
            try:
                json.dumps(prompt.row)
            except TypeError as error:
                problem = f"prompt {prompt.id} has a column that is not JSON ({error}): drop it"
                raise ValueError(f"{self.flag}: {problem}") from None

    def score(self, items: Items) -> list[float]:
        """The reward of each (response, prompt), in order; NaN where it is dropped."""
        parts, scores = self._parts(items), []
        try:
            replies = self._graded(items)
        except (Failed, RuntimeError) as error:
            raise self._error(error, parts) from None
        for part, reply in zip(parts, replies, strict=True):
            if reply == "late":
                fate = "the batch is dropped" if self.shape["batch"] else "it scores 0"
                said = f"rewards: {self.flag}: over {self.timeout_s:g} s for {about(part)}; {fate}"
                print(said, file=sys.stderr)  # no rank mutes stderr
                reply = [None] * len(part) if self.shape["batch"] else [0.0]
            scores += [math.nan if score is None else score for score in reply]
        self.dropped += sum(map(math.isnan, scores))
        return scores

    def _parts(self, items: Items) -> list[Items]:
        """The items of each call."""
        if not self.shape["batch"]:
            return [[item] for item in items]
        parts, before = [], None
        for response, prompt in items:
            if not parts or (len(parts[-1]) >= BATCH and prompt is not before):
                parts.append([])
            parts[-1].append((response, prompt))
            before = prompt
        return parts

    def _requests(self, items):
        known = batch_of if self.shape["batch"] else one_of
        return [("score", known(part)) for part in self._parts(items)]

    def _run(self, requests: list[Request]) -> Iterator[tuple[int, Any]]:
        for number, reply in super()._run(requests):
            self._late = self._late + 1 if reply == "late" else 0
            if self._late > IN_A_ROW:
                reply = {"error": f"took over {self.timeout_s:g} s {self._late} times in a row"}
            elif reply == "died":
                reply = {"error": "killed its worker, by its memory or a crash"}
            if isinstance(reply, dict) and "error" in reply:
                raise Failed(number, reply)
            yield number, reply

    def _error(self, error: Failed | RuntimeError, parts: list[Items] | None = None) -> ValueError:
        """The one line that ends the run; a traceback of the user's code is printed before it."""
        if isinstance(error, RuntimeError):
            return ValueError(f"{self.flag}: {error}")
        number, reply = error.args
        print(reply.get("traceback", ""), end="", file=sys.stderr, flush=True)
        said, remedy = reply["error"], ", see above" if "traceback" in reply else ""
        if "memory" in said.lower():
            remedy += f"; raise --reward-memory {self.memory_gib:g}, or let it take less"
        if said.startswith("took over"):
            remedy += f"; raise --reward-timeout {self.timeout_s:g}, or make it faster"
        asked = f", for {about(parts[number], reply.get('at'))}" if parts else ""
        return ValueError(f"{self.flag}: {said}{asked}{remedy}")


def about(part: Items, at: int | None = None) -> str:
    """Describe a call, or its response `at`, for a message."""
    response, prompt = part[at or 0]
    begins = f"{len(part)} responses, the first" if at is None and len(part) > 1 else "the response"
    return f"{begins} {response[:60]!r} to prompt {prompt.id}"


def truth(prompt: Any) -> Any:
    """verl's ground truth: from its data, else the gold answer, else the row's solution or answer."""
    row = prompt.row
    if isinstance(row.get("reward_model"), dict) and "ground_truth" in row["reward_model"]:
        return row["reward_model"]["ground_truth"]
    return prompt.answer if prompt.answer is not None else row.get("solution", row.get("answer"))


def one_of(part: Items) -> dict[str, Any]:
    """The arguments of verl's shape, for one response."""
    ((response, prompt),) = part
    others = {name: value for name, value in prompt.row.items() if name != "data_source"}
    return {
        "data_source": prompt.row.get("data_source"),
        "solution_str": response,
        "ground_truth": truth(prompt),
        "extra_info": prompt.row.get("extra_info") or others,
    }


def batch_of(part: Items) -> dict[str, Any]:
    """The arguments of TRL's shape: messages if a row's `prompt` is messages, else text; and the columns."""
    prompts, completions = [], []
    for response, prompt in part:
        messages = isinstance(prompt.row.get("prompt"), list)
        prompts.append(prompt.messages if messages else prompt.messages[-1]["content"])
        completions.append([{"role": "assistant", "content": response}] if messages else response)
    names = dict.fromkeys(chain.from_iterable(prompt.row for _, prompt in part))
    columns = {name: [prompt.row.get(name) for _, prompt in part] for name in names if name != "prompt"}
    return columns | {"prompts": prompts, "completions": completions}
