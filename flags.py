"""Flags: their types, those that both train scripts share, and their parsing.

A script's flags are the fields of a dataclass, its `Config`; `transformers.HfArgumentParser` reads them.
"""

import argparse
import hashlib
import io
import math
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

# Libraries read these variables once, when they are imported. So every program imports flags before them
# (pyproject.toml sorts it there); the servers and measurements that a run starts inherit the variables.
if "OMP_WAIT_POLICY" not in os.environ:
    # Rounds that a waiting OpenMP thread spins before it sleeps, by default some 300,000. Beside other
    # programs such a thread burns the CPU time that the thread it waits for needs (results/busy).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if not sys.stderr.isatty():  # a file: no progress bars, except the run's own (life.py)
    os.environ.setdefault("TQDM_DISABLE", "1")

from transformers import HfArgumentParser  # noqa: E402
from transformers.hf_argparser import HfArg  # noqa: E402

TINY_MODEL = os.path.relpath(Path(__file__).parent / "tiny" / "llama")  # from wherever a script is started
Value = TypeVar("Value")


def number(text: str | float, accepts: Callable[[float], bool], meaning: str) -> float:
    """A flag's text as a float that `accepts` allows; otherwise an error that argparse prints."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not accepts(value):
        raise ArgumentTypeError(f"takes {meaning}; got {text!r}")
    return value


class Every(float):
    """A flag's type: the steps between two events, a whole number from 1 up, or inf."""

    def __new__(cls, text: str | float):
        meaning = "a whole number of steps from 1 up, or inf"
        return super().__new__(cls, number(text, lambda v: v >= 1 and v % 1 == 0 or v == math.inf, meaning))


class Threshold(float):
    """A flag's type: a number from 0 up, or inf, which nothing passes."""

    def __new__(cls, text: str | float):
        return super().__new__(cls, number(text, lambda v: v >= 0, "a number from 0 up, or inf"))


class Count(int):
    """A flag's type: a whole number from 1 up."""

    def __new__(cls, text: str | float):
        return super().__new__(cls, number(text, lambda v: v >= 1 and v % 1 == 0, "a whole number from 1 up"))


class Limits(str):
    """A flag's type: a whole number from 1 up for every task, or one for each: math=2048,chat=1024."""

    def __new__(cls, text: str):
        tasks = [part.rpartition("=")[0] for part in text.split(",")]
        if not set(tasks) <= {"math", "chat", ""} or len(set(tasks)) < len(tasks):
            raise ArgumentTypeError(f"takes a number, or math=NUMBER,chat=NUMBER; got {text!r}")
        for part in text.split(","):
            Count(part.rpartition("=")[2])
        return super().__new__(cls, text)

    def of(self, task: str) -> int:
        """The number for a task; ValueError in one line if none is given."""
        given = dict(part.rpartition("=")[::2] for part in self.split(","))
        if task not in given and "" not in given:
            raise ValueError(f"--max-new-tokens {self}: none for {task}; write {self},{task}=...")
        return int(float(given.get(task, given.get(""))))


class OwnFunction(str):
    """A flag's type: FILE.py:NAME, a function in a file that exists."""

    def __new__(cls, text: str):
        text = expand(text)
        file, _, name = text.rpartition(":")
        if not (file.endswith(".py") and name.isidentifier()):
            raise ArgumentTypeError(f"takes FILE.py:NAME, a function in a file; got {text!r}")
        if not os.path.isfile(file):
            raise ArgumentTypeError(f"no such file: {file}")
        return super().__new__(cls, text)

    def content(self) -> str:
        """A hash of the file."""
        return hashlib.sha256(Path(self.rpartition(":")[0]).read_bytes()).hexdigest()


class Positive(float):
    """A flag's type: a finite number above 0."""

    def __new__(cls, text: str | float):
        return super().__new__(cls, number(text, lambda v: 0 < v < math.inf, "a number above 0"))


class Coefficient(float):
    """A flag's type: a finite number from 0 up, which multiplies a term of the loss."""

    def __new__(cls, text: str | float):
        return super().__new__(cls, number(text, lambda v: 0 <= v < math.inf, "a number from 0 up"))


class Share(float):
    """A flag's type: a number above 0 and at most 1."""

    def __new__(cls, text: str | float):
        return super().__new__(cls, number(text, lambda v: 0 < v <= 1, "a number above 0 and at most 1"))


class EngineMemory(str):
    """A flag's type: the share of a GPU that an engine takes, 0.4, or the size of its KV cache, 2GiB.

    share: the first, or None. cache: the second in bytes, or None.
    """

    def __new__(cls, text: str | float):
        meaning = "a share of the GPU up to 1, as 0.4, or the size of the KV cache, as 2GiB"
        self = super().__new__(cls, text)
        if self.endswith("GiB"):
            size = number(self.removesuffix("GiB"), lambda v: 0 < v < math.inf, meaning)
            self.share, self.cache = None, int(size * 2**30)
        else:
            self.share, self.cache = number(text, lambda v: 0 < v <= 1, meaning), None
        return self


class OutFile(str):
    """A flag's type: a file to write. One that cannot be written is refused before the work, not after it."""

    folder = False

    def __new__(cls, text: str):
        if problem := why_not(expand(text), cls.folder):
            raise ArgumentTypeError(f"{expand(text)}: {problem}")
        return super().__new__(cls, expand(text))


class OutFolder(OutFile):
    """A flag's type: a folder to write in, which need not exist."""

    folder = True


def why_not(path: str | Path, folder: bool) -> str | None:
    """Why a file cannot be written there, or in a folder there; None if it can."""
    path = Path(os.path.abspath(path))
    if not folder and path.is_dir():
        return "is a folder; name a file in it"
    above = next(part for part in (path, *path.parents) if os.path.exists(part) and (folder or part != path))
    if not above.is_dir():
        return "is a file" if above == path else f"cannot be written: {above} is a file"
    if not os.access(above, os.W_OK):  # a file is written beside its place, then renamed
        return f"no permission to write in {above}"
    return None


def expand(text: str) -> str:
    """A path, or TASK=PATH, with ~ expanded, because a shell does not expand it in --run-dir=~/x."""
    task, path = re.fullmatch(r"([^/~]*=)?(.*)", text, re.DOTALL).groups()
    return (task or "") + os.path.expanduser(path)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help with the docstring's own lines, and every flag's default."""


def parse_flags(config_class: type[Value], args: list[str] | None = None) -> Value:
    """Parse the command line into a dataclass. A wrong flag ends the program with one line and exit status 2.

    --help begins with the docstring of the script that defines the dataclass. Every ~ is expanded.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal must not end a finished measurement
        sys.stdout.reconfigure(errors="backslashreplace")
    about = (sys.modules[config_class.__module__].__doc__ or "").replace("%", "%%")
    name = program().replace("%", "%%")
    parser = HfArgumentParser(
        config_class, prog=name, description=about, formatter_class=Help, allow_abbrev=False
    )
    parser.error = lambda message: exit_with(f"{message} (see --help)")
    config, unknown = parser.parse_args_into_dataclasses(
        args, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unknown flag: {' '.join(unknown)}")
    for name, value in vars(config).items():
        if type(value) is str:
            setattr(config, name, expand(value))
        elif isinstance(value, list):
            setattr(config, name, [expand(text) if type(text) is str else text for text in value])
    return config


def program() -> str:
    """The name of the running program: a script's file name, or `python -m judge`."""
    # Under pdb the spec is None, or pdb's own.
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.origin == os.path.abspath(sys.argv[0]):
        return f"python -m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name


def exit_with(message: Any) -> NoReturn:
    """End the program with one line on stderr that begins with its name, and status 2."""
    print(f"{program()}: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Wrap checks of user input: a ValueError or OSError ends the program with one line, status 2.

    An OSError's text names the file that cannot be read or written.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        exit_with(error)


@dataclass
class TrainFlags:
    """The flags that train_dpo.py and train_grpo.py share, with the same defaults.

    Each script's Config adds its own, and run_dir, sync_ref_every, lr and adam_eps, whose defaults differ.
    """

    model: str = HfArg(default=TINY_MODEL, help="A Hugging Face checkpoint: a folder, or a name on the Hub.")
    data: list[str] = HfArg(
        default_factory=lambda: ["tiny"],
        help="Prompts: tiny, a .jsonl, .json, .csv or .parquet file, or a Hub name. Several in one run, with "
        "their shares of a step: math=tiny:2 chat=tiny:1.",
    )
    reward_model: str | None = HfArg(
        default=None, help="A checkpoint that scores chat; answers to math are verified, whatever it is."
    )
    reward: OwnFunction | None = HfArg(
        default=None,
        help="FILE.py:NAME, your function that scores math instead of Math-Verify; see docs/own_reward.md.",
    )
    reward_timeout: Positive = HfArg(
        default=10.0, help="Seconds that --reward may take for a response; for a batch, if it scores batches."
    )
    reward_memory: Positive = HfArg(
        default=8.0, help="GiB of address space of each process that calls --reward; CUDA takes hundreds."
    )
    strict_paper_grading: bool = HfArg(
        default=False,
        help="Grade mathematics with Math-Verify alone, as in the paper. By default golds and answers are "
        "first written as people mean them (grader/as_meant.py).",
    )
    resume: bool = HfArg(default=False, help="Go on with the run in --run-dir from its newest checkpoint.")
    seed: int = HfArg(default=0, help="Seed of the prompts' order, of the samples and of DPO's pairs.")
    steps: Count = HfArg(default=100, help="Optimizer steps.")
    sync_every: Every = HfArg(
        default=Every(1),
        help="The dial: steps between two copies of the policy's weights into the generator; or inf.",
    )
    sync_when: Threshold = HfArg(
        default=Threshold("inf"),
        help="Sync as well after a step whose drift (a metric, in nats a token) passes this; with --ahead 1.",
    )
    prove_every: Every = HfArg(
        default=Every(100),
        help="Syncs between two rehearsals of the copy, where the engine keeps repacked weights (sync.py).",
    )
    prompts_per_step: Count = HfArg(default=32, help="P: prompts in a step, over all ranks.")
    samples_per_prompt: Count = HfArg(default=8, help="G: responses to each prompt.")
    max_new_tokens: Limits = HfArg(
        default=Limits("64"), help="A response is cut after so many tokens; by task: math=2048,chat=1024."
    )
    system_block: bool = HfArg(
        default=True,
        help="False: prompts begin at the user's header, as in the paper, without the block that a chat "
        "template puts before it; Llama 3.1's holds the date.",
    )
    date: str | None = HfArg(
        default=None,
        help="The day that a chat template prints as today's. Default: of the run's start; a resumed run and "
        "its evaluations keep it.",
    )
    temperature: Positive = HfArg(default=1.0, help="Of sampling, and of every log-prob in training.")
    dtype: Literal["float32", "bfloat16"] | None = HfArg(
        default=None,
        help="Of the forwards, here and in the generator; master weights are float32 always. "
        "Default: bfloat16 on a GPU, float32 on a CPU.",
    )
    grad_clip: Positive = HfArg(default=1.0, help="Largest norm of the gradient.")
    micro_batch_tokens: Count | None = HfArg(
        default=None,
        help="Tokens in one forward and backward, padding included. Default: 16384 on a GPU, 2048 on a CPU.",
    )
    activation_checkpointing: bool = HfArg(
        default=False, help="Compute activations again in backward: less memory, a quarter more arithmetic."
    )
    attention: Literal["sdpa", "varlen"] | None = HfArg(
        default=None,
        help="varlen packs rows without padding. Default: varlen on a GPU in bfloat16, if torch has it.",
    )
    compile: bool | None = HfArg(
        default=None,
        help="Compile the layers: half a minute at the start, faster steps. Default: on a GPU.",
    )
    engine: Literal["vllm", "transformers"] = HfArg(
        default="vllm", help="transformers is slow, and for where vLLM does not install."
    )
    engine_memory: EngineMemory = HfArg(
        default=EngineMemory("0.4"),
        help="Share of the trainer's GPU that the engine may take; or, as 2GiB, the size of its KV cache, "
        "for runs that start on one GPU together, because each would count the others' memory as its own. "
        "Not on a CPU, where the cache has 1 GiB.",
    )
    engine_sleep: bool = HfArg(
        default=False, help="Free the engine's GPU memory while nothing is sampled; waking takes time."
    )
    generator_devices: list[str] = HfArg(
        default_factory=list,
        help="Generate on these GPUs of this machine instead, one vLLM server each: 6 7; or cpu.",
    )
    generator_url: list[str] = HfArg(
        default_factory=list, help="Generate on vLLM servers that run already: python serve.py starts one."
    )
    generator_token_file: str | None = HfArg(
        default=None,
        help="A file with the token of --generator-url's servers; or set the variable GENERATOR_TOKEN.",
    )
    ahead: Count = HfArg(default=10, help="Sample up to so many steps ahead, never past the next sync.")
    save_every: Every = HfArg(
        default=Every("inf"),
        help="Every so many steps, write a checkpoint to resume from, and an export to use; an export at the "
        "end, too.",
    )
    keep: Count = HfArg(
        default=2, help="Checkpoints to keep, the newest. Each is three to five times the float32 weights."
    )
    eval_every: Every = HfArg(
        default=Every("inf"),
        help="Every so many steps, and at the end, export a checkpoint and measure it on held-out prompts; "
        "best/ names the best one.",
    )
    report_to: Literal["none", "wandb", "trackio", "tensorboard"] = HfArg(
        default="none", help="Send each step's metrics there, too. The package is to be installed by hand."
    )

    def generator_settings(self) -> dict[str, Any]:
        """Where and how the generator runs, as generate.load_generator takes it."""
        return {
            "memory": self.engine_memory,
            "sleeps": self.engine_sleep,
            "can_sleep": self.eval_every < math.inf,
            "devices": self.generator_devices,
            "urls": self.generator_url,
            "system_block": self.system_block,
            "date": self.date,
            "token_file": self.generator_token_file,
        }
