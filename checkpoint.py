"""A run's complete state on disk, so that it can be resumed exactly.

    runs/NAME/checkpoints/STEP/*.safetensors    each rank's part of the policy and of Adam's moments; of the
                                                reference, unless it stays the seed model; of the generator
                                                between two syncs
    runs/NAME/checkpoints/STEP/rollouts.jsonl   responses sampled ahead, not trained on yet
    runs/NAME/checkpoints/STEP/state.json       what was drawn and counted; written last

Between two syncs the generator holds older weights than the policy. If a resumed run gave it the policy's
weights, every resume would act as a sync. So a checkpoint has the generator's weights, too, and on resume the
generator gets them back by a verified sync. Every random draw depends only on the seed, the step and the
prompt. So there is no random state to save, and a run may resume with a different number of ranks.
"""

import json
import math
import os
import shutil
from pathlib import Path

from flags import TrainFlags

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from generate import Window
from ranks import broadcast_from_first, gather, meet, rank, world_size
from rewards import Scorer
from run import full_disk_ends_run, numbered, read_json, read_lines, write_lines
from sync import sync

FILE_BYTES = 2**30  # approximate size of a rank's part of a file


def blank_moments(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step. Fused, on a GPU, it wants the step there, too."""
    moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), device=parameter.device), **moments}


class Checkpoints:
    """The checkpoints of a run, the newest `config.keep` of them. All ranks call its methods together."""

    def __init__(
        self,
        config: TrainFlags,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        reference: nn.Module,
        window: Window,
        scorer: Scorer,
    ):
        self.config, self.directory = config, Path(config.run_dir) / "checkpoints"
        self.policy, self.optimizer, self.reference = policy, optimizer, reference
        self.window, self.generator, self.scorer = window, window.generator, scorer
        self.held = {}  # {name: weight} of the generator, if nothing else holds them

    def note_sync(self) -> None:
        """Keep this rank's part of the generator's new weights, on the host, in the generator's dtype.

        Skipped online, where every step syncs, and offline, where the generator stays the seed model. With
        --sync-when it does not stay that.
        """
        if 1 < self.config.sync_every < math.inf or self.config.sync_when < math.inf:
            dtype = self.generator.dtype
            self.held = {n: p.detach().to(dtype, copy=True).cpu() for n, p in self.policy.named_parameters()}

    @full_disk_ends_run()
    def save(self, step: int, counts: dict) -> None:
        """Atomically write a checkpoint that resumes at `step`. counts: anything that JSON can hold."""
        final, partial = self.directory / str(step), self.directory / f"{step}.partial"
        drawn, rollouts = self.window.state(step)
        if rank() == 0:
            for left in self.directory.glob("*.partial"):  # by saves that were killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        meet()
        tensors = self._tensors(moments=len(self.optimizer.state) > 0)
        if step % self.config.sync_every > 0:  # the next step does not sync
            tensors |= {f"generator.{name}": weight for name, weight in self.held.items()}
        # By default torch.distributed.checkpoint writes pickles, and loading one can execute code.
        writer = HuggingFaceStorageWriter(str(partial), in_files(tensors), save_distributed=True)
        dcp.save(tensors, storage_writer=writer)
        counts = {**counts, "scorer": self.scorer.counts()}
        written = set(gather(path.name for path in partial.iterdir()))  # as each rank sees the folder
        if rank() == 0:
            if unseen := written - {path.name for path in partial.iterdir()}:
                raise OSError(f"{partial}: other ranks wrote {len(unseen)} files that rank 0 does not see")
            write_lines(partial / "rollouts.jsonl", rollouts)
            state = {"step": step, "version": self.generator.version, **drawn, "counts": counts}
            state["files"] = {path.name: path.stat().st_size for path in partial.iterdir()}
            (partial / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")
            for path in (*partial.iterdir(), partial, self.directory.parent / "metrics.jsonl"):
                flush(path)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            flush(self.directory)
            earlier = [old for old in numbered(self.directory) if old <= step]  # later ones were cut
            for old in earlier[: -self.config.keep]:
                shutil.rmtree(self.directory / str(old))
        meet()

    def load(self) -> tuple[int, dict] | None:
        """Restore everything from the newest whole checkpoint: (step, counts), or None if there is none.

        ValueError in one line if the data is not the same.
        """
        path = broadcast_from_first(lambda: newest(self.directory))
        if path is None:
            if broadcast_from_first(lambda: numbered(self.directory.parent / "export")):
                raise ValueError(
                    f"--resume: no whole checkpoint in {self.directory}, and to begin again would delete the "
                    "run's exports; choose another --run-dir, or delete this one"
                )
            begins = "so the run begins at step 0"
            if broadcast_from_first(lambda: (self.directory.parent / "metrics.jsonl").exists()):
                begins += ", and what metrics.jsonl and rollouts/ have of it is dropped"
            print(f"checkpoint: --resume: none in {self.directory} yet, {begins}")
            return None
        state = read_json(path / "state.json")
        stored = HuggingFaceStorageReader(str(path))
        step, names = state["step"], set(stored.read_metadata().state_dict_metadata)
        print(f"checkpoint: going on from {path}, the generator with weights of step {state['version']}")
        if step % self.config.sync_every > 0:  # otherwise the next step syncs first
            self._restore_generator(stored, state["version"], names)
            if self.config.engine_sleep:  # that sync woke it, and it may not sample for the whole window
                self.generator.make_room()
        moments = any(name.startswith("adam.") for name in names)  # none before the first optimizer step
        if moments:
            for parameter in self.policy.parameters():
                self.optimizer.state[parameter] = blank_moments(parameter)
        dcp.load(self._tensors(moments), storage_reader=stored)
        if rank() == 0:
            self.scorer.set_counts(state["counts"]["scorer"])
        self.window.load_state(step, state, read_lines(path / "rollouts.jsonl"))
        return step, state["counts"]

    def remedy(self) -> str:
        """What to do if a resumed run would only fail again."""
        exports = self.directory.parent / "export"
        steps = broadcast_from_first(lambda: numbered(exports))
        if not steps:
            return "there is no export to go back to (--save-every)"
        return f"begin a new run from {exports / str(steps[-1])}, with a smaller --lr or --grad-clip"

    def _restore_generator(self, stored, version, names):
        """Load the generator's weights into the policy and sync; load() then loads the policy's own."""
        if any(name.startswith("generator.") for name in names):
            dtype = self.generator.dtype
            weights = {f"generator.{name}": p for name, p in self.policy.named_parameters()}
            old = {name: torch.empty_like(p, dtype=dtype) for name, p in weights.items()}
            dcp.load(old, storage_reader=stored)
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(old[name])
        sync(self.policy, self.generator, version)  # offline the policy is still the seed model here
        self.note_sync()

    def _tensors(self, moments):
        """The run's {name: tensor}, to save or to load into."""
        tensors = {}
        for name, parameter in self.policy.named_parameters():
            tensors[f"policy.{name}"] = parameter.detach()
            if moments:
                for key, value in self.optimizer.state[parameter].items():
                    tensors[f"adam.{name}.{key}"] = value
        if self.config.sync_ref_every < math.inf:  # else it is the seed model
            for name, parameter in self.reference.named_parameters():
                tensors[f"reference.{name}"] = parameter.detach()
        return tensors


def in_files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """{tensor's name: number of its file}. A file is assembled in memory, so its size is limited."""
    numbers, held = {}, 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + held // (FILE_BYTES * world_size())
        held += tensor.nbytes
    return numbers


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def newest(directory: Path) -> Path | None:
    """The newest whole checkpoint, or None. Prints the newer ones that are not whole."""
    for step in reversed(numbered(directory)):
        path = directory / str(step)
        try:
            files = read_json(path / "state.json")["files"]
            cut = [name for name, size in files.items() if (path / name).stat().st_size != size]
        except (OSError, ValueError, KeyError) as error:
            cut = [f"state.json ({type(error).__name__})"]
        if not cut:
            return path
        print(f"checkpoint: {path} is not whole ({', '.join(cut)}); taking the one before")
    return None
