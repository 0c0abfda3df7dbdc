"""A run's life: it begins or resumes, saves, exports, measures or stops after a step, and closes."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from flags import TrainFlags, one_line_errors, program

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import evaluate
import plan
from checkpoint import Checkpoints
from data import MixedIterator, Prompt, load_held_out, load_sources, split_spec
from generate import Window, check_engine, fit_tasks, load_generator
from metrics import of_run
from model import choose_attention, full_weights, generation_file, load_config, load_tokenizer
from ranks import (
    all_max,
    all_sum,
    broadcast_from_first,
    init_ranks,
    meet,
    rank,
    without_torchrun,
    world_size,
)
from rewards import Scorer
from run import (
    Run,
    check_run_dir,
    check_same_run,
    check_tracker,
    full_disk_ends_run,
    point_to_best,
    read_json,
    run_date,
)

VALIDATION_SAMPLES = 4  # per held-out prompt, when --eval-every chooses the best checkpoint


def prepare(config: TrainFlags) -> torch.device:
    """Join the ranks, fill in the flags whose default depends on the device, and check what needs no model.

    ValueError in one line if a directory is in use, a run is resumed with other flags, or flags conflict.
    """
    _, _, device = init_ranks()
    on_gpu = device.type == "cuda"
    config.dtype = config.dtype or ("bfloat16" if on_gpu else "float32")
    config.micro_batch_tokens = config.micro_batch_tokens or (16384 if on_gpu else 2048)
    if rank() == 0:
        check_run_dir(config)
    # The date stays that of the start, however long the run takes and whenever it is resumed.
    config.date = broadcast_from_first(
        lambda: config.date or run_date(config.run_dir) or time.strftime("%Y-%m-%d")
    )
    if rank() == 0:
        check_same_run(config)
        check_tracker(config.report_to)  # rank 0 alone sends
    if getattr(load_config(config.model), "quantization_config", None):
        raise ValueError(f"--model {config.model}: is quantized; train the model that it was made of")
    check_shared(Path(config.run_dir))
    check_engine(config.engine, **config.generator_settings())
    if config.sync_when < math.inf and config.sync_every == 1:
        raise ValueError(f"--sync-when {config.sync_when:g}: every step syncs; give --sync-every 2 up to inf")
    if config.sync_when < math.inf and config.ahead > 1:
        raise ValueError(f"--sync-when {config.sync_when:g}: needs --ahead 1, or responses outlive the sync")
    config.attention = choose_attention(config.attention, device, config.dtype)
    if config.compile and not on_gpu and config.engine == "vllm":
        raise ValueError("--compile True: on a CPU vLLM switches torch's compiler off; leave the flag out")
    if config.compile is None:
        config.compile = on_gpu
    if on_gpu:
        print(plan.verdict(config, world_size(), torch.cuda.mem_get_info()[1] / plan.GB))
    return device


class Loaded(NamedTuple):
    """What a run starts with, but for the policy and the reference."""

    tokenizer: PreTrainedTokenizerBase
    held_out: dict[str, list[Prompt]]  # {spec: prompts} to measure on; empty without --eval-every
    scorer: Scorer
    window: Window  # of the prompts' batches; it has the generator


def load(config: TrainFlags, tasks: list[str], device: torch.device) -> Loaded:
    """Load everything but the policy and the reference; tasks: of config.data.

    ValueError in one line for prompts or models that cannot be used.
    """
    tokenizer = load_tokenizer(config.model, config.system_block, config.date)
    own_reward = config.reward is not None  # then problems need no gold
    sources = load_sources(config.data, own_reward)  # [(prompts of one task, weight)]
    held_out = load_held_out(config.data, sources, own_reward) if config.eval_every < math.inf else {}
    to_fit = [prompts for prompts, _ in sources] + list(held_out.values())
    max_model_len = fit_tasks(config.model, tokenizer, to_fit, config.max_new_tokens)
    scorer = Scorer.of(config, tasks, device, config.date)
    sources = [(scorer.usable(prompts), weight) for prompts, weight in sources]
    batches = MixedIterator(sources, config.prompts_per_step, config.seed, rank(), world_size())
    dtype, settings = getattr(torch, config.dtype), config.generator_settings()
    generator = load_generator(config.engine, config.model, dtype, device, max_model_len, **settings)
    return Loaded(tokenizer, held_out, scorer, Window(generator, batches, scorer, config))


def check_shared(directory: Path) -> None:
    """ValueError in one line if not all ranks see what rank 0 writes in a run's directory. All ranks call it.

    Each rank writes its part of a checkpoint there: on separate disks the run could not be resumed.
    """
    if world_size() == 1:
        return
    mark = directory / "seen-by-all-ranks"
    if rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        mark.touch()
    meet()
    blind = all_sum([not mark.exists()])
    if rank() == 0:
        mark.unlink()
    if blind:
        found = f"{blind:.0f} of {world_size()} ranks do not see what rank 0 writes there"
        raise ValueError(f"--run-dir {directory}: {found}; name a folder that all machines share")


class Life:
    """The life of a run. All ranks call its methods together."""

    def __init__(
        self,
        config: TrainFlags,
        held_out: dict[str, list[Prompt]],
        scorer: Scorer,
        window: Window,
        policy: PreTrainedModel,
        reference: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
    ):
        """Start the run, or with --resume restore everything from its newest checkpoint.

        held_out: {spec: prompts} to measure on, from data.load_held_out. A wrong directory or checkpoint ends
        the program in one line.
        """
        self.config, self.held_out, self.policy = config, held_out, policy
        self.scorer, self.generator = scorer, window.generator
        # Over all steps so far; a checkpoint keeps them.
        self.counts = {"tokens": 0, "seconds": 0.0, "skipped": 0, "skipped_in_a_row": 0, "drift": 0.0}
        self.checkpoints = Checkpoints(config, policy, optimizer, reference, window, scorer)
        self.start = 0
        with one_line_errors():
            if config.resume:
                self.start, self.counts = self.checkpoints.load() or (self.start, self.counts)
            if self.start >= config.steps:
                done = f"has its {self.start} steps; --steps {2 * self.start} would go on"
                print(f"{program()}: the run in {config.run_dir} {done}")
            self.run = Run(config, rank(), self.start)
        self.save_rollouts = self.run.save_rollouts

    def steps(self) -> Iterator[int]:
        """The steps to take, under a progress bar; from now on SIGTERM and Ctrl-C ask the run to stop.

        When the loop ends, even by an error, the earlier signal handlers are restored.
        """
        self.stop = Stop()
        try:
            if self.start:  # the killed run may not have exported, or measured, this step
                self.publish(self.start)
            shown = {"initial": self.start, "total": self.config.steps, "disable": rank() > 0}
            if not sys.stderr.isatty():
                shown["mininterval"] = 60  # in a file: one line a minute
            self.bar = tqdm(range(self.start, self.config.steps), "training", **shown)
            yield from self.bar
        finally:
            self.stop.close()

    @property
    def drift(self) -> float:
        """How far the policy was from the sampler at the last step that learned, in nats a token."""
        return self.counts.get("drift", 0.0)  # a checkpoint of older code has none

    def note_sync(self) -> None:
        """Remember the weights that the generator holds now: a checkpoint inside the window needs them."""
        self.checkpoints.note_sync()
        self.counts["drift"] = 0.0  # a step without a pair measures none

    def note_gradient(self, grad_norm: float | None) -> bool:
        """Count a gradient that is not finite; None means no gradient. True if the optimizer should step."""
        if grad_norm is None:
            return False
        finite = math.isfinite(grad_norm)  # on all ranks, or on none
        self.counts["skipped"] += not finite
        self.counts["skipped_in_a_row"] = 0 if finite else self.counts["skipped_in_a_row"] + 1
        return finite

    def log(self, metrics: dict[str, Any]) -> None:
        """Write a step's metrics and those over all steps so far; show three of them in the progress bar."""
        self.counts["tokens"] += metrics["tokens"]
        self.counts["seconds"] += metrics["step_s"]
        if metrics["drift"] is not None:
            self.counts["drift"] = metrics["drift"]
        self.run.log({**metrics, **of_run(self.counts, self.scorer)})
        shown = {key: metrics[key] for key in ("reward", "staleness", "loss")}
        self.bar.set_postfix(shown, refresh=False)

    def after(self, step: int) -> bool:
        """Save, export and measure, if due after a step. True if a signal asked the run to stop.

        FloatingPointError after several steps in a row whose gradients were not finite.
        """
        if self.counts["skipped_in_a_row"] >= 3:
            raise FloatingPointError(
                f"step {step}: the third gradient in a row that is not finite; {self.checkpoints.remedy()}"
            )
        done = step + 1
        due = done % self.config.save_every == 0
        if due:
            self.checkpoints.save(done, self.counts)
        if not self.stop.requested():  # otherwise the resumed run does it
            self.publish(done)
        if not self.stop.requested():
            return False
        if not due:
            self.checkpoints.save(done, self.counts)
        print(f"{program()}: stopped after {done} steps; the same command with --resume goes on")
        return True

    def publish(self, done: int) -> None:
        """After `done` steps, export the policy and measure the export, if that is due and not done yet."""
        config, last = self.config, done == self.config.steps
        measured = self.held_out and (done % config.eval_every == 0 or last)
        if measured or done % config.save_every == 0 or last:
            checkpoint = export(self.policy, self.generator.tokenizer, self.run.directory, done)
            self.run.write_card(done)
            if measured:
                self.generator.make_room()
                if rank() == 0:
                    validate(checkpoint, list(self.held_out), config)
                meet()  # the next sync would give up on rank 0 after half an hour
                self.run.write_card(done)  # with what was measured

    def close(self) -> None:
        """Close the run's files, the scorer and the generator, and leave the ranks."""
        self.run.close()
        self.scorer.close()
        self.generator.close()
        if dist.is_initialized():
            dist.destroy_process_group()


class Stop:
    """SIGTERM or Ctrl-C ends a run after the current step; a second one ends it at once."""

    def __init__(self):
        self.signal, self.when = None, 0.0
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number, frame):
        if self.signal is None:
            self.signal, self.when = signal.Signals(number).name, time.monotonic()
            os.write(2, f"\n{self.signal}: ending after this step; once more to end at once\n".encode())
        elif time.monotonic() - self.when > 1:  # a terminal and torchrun may both pass one Ctrl-C on
            os._exit(128 + number)

    def requested(self) -> bool:
        """Whether any rank was asked to stop."""
        return all_max([self.signal is not None]) == 1

    def close(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


@full_disk_ends_run()
def export(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, step: int) -> Path:
    """Write the policy atomically as a Hugging Face checkpoint, a run's export/STEP. One that exists is kept.

    All ranks call this, to gather a sharded policy. Rank 0 holds it whole, in float32.
    """
    final = directory / "export" / str(step)
    if broadcast_from_first(final.is_dir):
        return final
    buffers = dict(policy.named_buffers())
    weights = {name: buffers[name] for name in policy.state_dict() if name in buffers}
    for name, weight in full_weights(policy):
        if rank() == 0:
            weights[name] = weight.cpu()
    if rank() > 0:
        return final
    partial = final.with_name(f"{step}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    policy.save_pretrained(partial, state_dict=weights)
    # Copy the seed model's file unchanged, if it has one: transformers refuses to save many published ones.
    (partial / "generation_config.json").unlink()
    if text := generation_file(policy.name_or_path):
        (partial / "generation_config.json").write_text(text, encoding="utf-8")
    tokenizer.save_pretrained(partial)
    for file in partial.glob("*.safetensors"):  # otherwise only their owner may read them
        shutil.copymode(partial / "config.json", file)
    partial.rename(final)
    return final


@full_disk_ends_run()
def validate(checkpoint: Path, specs: list[str], config: TrainFlags) -> None:
    """Measure a run's export on held-out prompts, and point best/TASK at the run's best export so far.

    A separate process loads the export, because a training run's generator holds older weights. The best has
    the highest accuracy on problems (with --reward the highest reward), and the highest length-normalized
    reward on requests. specs: of data.load_held_out. A measurement that exists is not repeated. If one fails,
    for example on a full GPU, the run goes on: a line says so, and validation/STEP/missing.txt gives the
    command to repeat it. Rank 0 alone calls this.
    """
    directory, step = checkpoint.parents[1], checkpoint.name
    missing = directory / "validation" / step / "missing.txt"
    missing.unlink(missing_ok=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # memory that the trainer only reserves counts as used for other processes
    tasks = [split_spec(spec)[0] for spec in specs]
    for number, (task, spec) in enumerate(zip(tasks, specs, strict=True)):
        flags = {
            "model": checkpoint, "data": spec, "n": VALIDATION_SAMPLES, "engine": config.engine,
            "dtype": config.dtype, "max-new-tokens": config.max_new_tokens.of(task),
            "system-block": config.system_block, "date": config.date,
            "strict-paper-grading": config.strict_paper_grading,
            "out": directory / "validation" / step / f"{task}-{number}.json",
        }  # fmt: skip
        if flags["out"].exists():
            continue
        if task == "chat":
            flags["reward-model"] = config.reward_model
        elif config.reward:
            flags |= {"reward": config.reward, "reward-timeout": config.reward_timeout}
            flags |= {"reward-memory": config.reward_memory}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        command = [sys.executable, evaluate.__file__, *words]
        # In a new session, so that Ctrl-C reaches only the run, which stops after this measurement.
        apart = {"start_new_session": True, "env": without_torchrun(), "stdout": subprocess.DEVNULL}
        if subprocess.run([*command, "--attached", "True"], **apart).returncode:
            print(f"--eval-every: {checkpoint} could not be measured on {spec}, see above; the run goes on")
            missing.parent.mkdir(parents=True, exist_ok=True)
            with missing.open("a", encoding="utf-8") as file:
                file.write(f"{shlex.join(['python', 'evaluate.py', *words])}\n")
    for task in set(tasks):
        best = best_step(directory / "validation", task, config.reward is not None)
        if best:
            point_to_best(directory, task, best)


def best_step(folder: Path, task: str, own_reward: bool = False) -> str | None:
    """The step with the best mean over a task's held-out sets; folder: a run's validation/. None if none."""
    found = {step.name: [*map(read_json, step.glob(f"{task}-*.json"))] for step in folder.iterdir()}
    most = max(map(len, found.values()))
    if most == 0:
        return None
    found = {step: several for step, several in found.items() if len(several) == most}  # measured in full
    key = {"math": "reward" if own_reward else "accuracy", "chat": "length_normalized_reward"}[task]
    if task == "chat" and min(one["reward"] for several in found.values() for one in several) <= 0:
        print("--eval-every: rewards are not all positive, so best/chat is chosen by reward, not over length")
        key = "reward"
    found = {step: several for step, several in found.items() if all(one[key] is not None for one in several)}
    return max(found, key=lambda step: fmean(one[key] for one in found[step]), default=None)
