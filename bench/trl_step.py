"""Time a GRPO step of train_grpo.py beside a step of TRL's GRPOTrainer: the same prompts, machine and run.

    bench/trl_step.sh        # ten minutes on 2 cores

Each round is a run of train_grpo.py through its command line, and then a training run of TRL, in its own
environment, for each dtype in TRL_WEIGHTS. So the sides alternate, and other load on the machine hits all of
them. A side's first step is a warm-up and is reported separately.

Our times are from the run's metrics.jsonl. TRL's are from on_step_begin to on_step_end, and nothing is
logged, saved or evaluated in between. Both count the response tokens that are trained, including the stop
token. Rewards come from the answer: ours by Math-Verify in its own processes, TRL's by a regular expression,
which costs nothing. Both sample and learn at temperature 1, and both have a reference (--kl-coef, beta).

TRL's settings that are not its defaults: no gradient checkpointing (it would cost one more forward), 16
responses in a micro-batch, the dataset in its order, and loss_type, scale_rewards, beta and
use_bias_correction_kl such that the loss is ours. It samples with transformers, its default.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `python bench/trl_step.py` puts only bench/ there

from flags import (  # noqa: E402
    Coefficient,
    Count,
    OutFile,  # noqa: E402
    Positive,
    one_line_errors,
    parse_flags,
)

from run import read_lines, read_metrics, surroundings, write_json, write_lines  # noqa: E402

# How TRL holds the weights that it trains. float32 is its default, and what we do: the forwards are bfloat16
# by autocast. With bfloat16 there are no weights to cast, but small updates round to nothing.
TRL_WEIGHTS = ("float32",)  # as from_pretrained loads it; bfloat16 weights were no faster


@dataclass
class Config:
    model: str = HfArg(default="models/smollm2", help="A checkpoint; tiny/smollm2.py makes this one.")
    data: str = HfArg(default="models/one_digit.jsonl", help="Problems with answers; made with the model.")
    rounds: Count = HfArg(default=1, help="Runs of each side, in turn.")
    steps: Count = HfArg(default=3, help="Steps of a run, the first of which warms it up.")
    prompts_per_step: Count = HfArg(default=8, help="P.")
    samples_per_prompt: Count = HfArg(default=8, help="G.")
    max_new_tokens: Count = HfArg(default=48, help="A response is cut after so many tokens.")
    lr: Positive = HfArg(default=1e-6, help="Learning rate.")
    kl_coef: Coefficient = HfArg(default=0.001, help="Times the KL divergence to the reference: TRL's beta.")
    dtype: Literal["float32", "bfloat16"] = HfArg(default="bfloat16", help="Of the forwards of both.")
    threads: Count = HfArg(default=os.cpu_count(), help="OMP_NUM_THREADS of both.")
    trl_python: str = HfArg(default="bench/.venv/trl/bin/python", help="The Python that has TRL.")
    trl_micro_batch: Count = HfArg(default=16, help="Responses in one forward and backward of TRL.")
    out: OutFile = HfArg(default="results/trl_step/numbers.json", help="Where the numbers are written.")
    # How this file calls itself in TRL's environment:
    side: Literal["both", "trl"] = HfArg(default="both", help="trl: TRL's alone, as both calls it.")
    rows: str | None = HfArg(default=None, help="With --side trl: the prompts, one a line, in order.")
    weights: Literal["float32", "bfloat16"] = HfArg(default="float32", help="With --side trl: as it says.")


# --- Ours ---


def run_ours(config: Config, seed: int, folder: str) -> list[dict]:
    """One dictionary per step: seconds in all and by phase, responses and their tokens."""
    flags = {
        "--model": config.model, "--data": config.data, "--run-dir": f"{folder}/run", "--seed": seed,
        "--steps": config.steps, "--sync-every": 1, "--prompts-per-step": config.prompts_per_step,
        "--samples-per-prompt": config.samples_per_prompt, "--max-new-tokens": config.max_new_tokens,
        "--lr": config.lr, "--kl-coef": config.kl_coef, "--dtype": config.dtype,
    }  # fmt: skip
    words = [str(word) for pair in flags.items() for word in pair]
    call([sys.executable, "train_grpo.py", *words], config, folder)
    return [
        {
            "step_s": row["step_s"],
            "generate_s": row["sync_s"] + row["generate_s"],
            "train_s": row["train_s"],
            "responses": config.prompts_per_step * config.samples_per_prompt,
            "tokens": row["tokens"],
        }
        for row in read_metrics(f"{folder}/run")
    ]


def prompts_of_run(config: Config, seed: int) -> list[dict]:
    """The prompts of a run of train_grpo.py, in its order: one dictionary each."""
    from data import MixedIterator, load_sources  # here, because TRL's environment lacks its imports

    steps = MixedIterator(load_sources([config.data]), config.prompts_per_step, seed)
    return [{"prompt": p.messages, "answer": p.answer} for _ in range(config.steps) for p in next(steps)]


# --- TRL's: imported inside, because only its own environment has it ---


def boxed(text: str) -> str | None:
    """The answer in a response's last box; None if it has no box.

    >>> boxed(r"so it is \\boxed{ 12 }.")
    '12'
    """
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return found[-1].strip() if found else None


def reward(completions: list[list[dict]], answer: list[str], **_: Any) -> list[float]:
    """1 for the right answer in a box, else 0: a list, one number a response."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(boxed(text) == gold) for text, gold in zip(texts, answer, strict=True)]


def run_trl(config: Config) -> list[dict]:
    """The same as run_ours, of TRL's GRPOTrainer on the rows of config.rows."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    responses = config.prompts_per_step * config.samples_per_prompt
    steps, on_gpu = [], torch.cuda.is_available()

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            steps.append({"start": time.perf_counter()})

        def on_step_end(self, *_, **__):
            step = steps[-1]
            step["step_s"] = time.perf_counter() - step.pop("start")
            step["train_s"] = step["step_s"] - step["generate_s"]  # with the reference's forward, as ours

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            result = super()._generate(*args, **kwargs)
            steps[-1]["generate_s"] = time.perf_counter() - start
            return result

        def _generate_and_score_completions(self, *args, **kwargs):
            result = super()._generate_and_score_completions(*args, **kwargs)
            steps[-1]["responses"], _ = result["completion_mask"].shape
            steps[-1]["tokens"] = int(result["completion_mask"].sum())
            return result

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            # On a GPU: vLLM in the trainer's process, and the loss of a policy that sampled itself, as ours.
            use_cpu=not on_gpu,
            use_vllm=on_gpu,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.4,
            vllm_max_model_length=512,
            vllm_importance_sampling_correction=False,
            bf16=config.dtype == "bfloat16",
            model_init_kwargs={"dtype": config.weights},
            gradient_checkpointing=False,
            max_steps=config.steps,
            per_device_train_batch_size=config.trl_micro_batch,
            gradient_accumulation_steps=responses // config.trl_micro_batch,
            num_generations=config.samples_per_prompt,
            max_completion_length=config.max_new_tokens,
            temperature=1.0,
            shuffle_dataset=False,
            learning_rate=config.lr,
            lr_scheduler_type="constant",
            beta=config.kl_coef,
            use_bias_correction_kl=False,
            loss_type="dr_grpo",
            scale_rewards="none",
        )
        trainer = Timed(
            config.model, reward, args=arguments, train_dataset=Dataset.from_list(read_lines(config.rows))
        )
        trainer.add_callback(Watch())
        trainer.train()
    return steps


# --- Both, side by side ---


def call(command: list[str], config: Config, folder: str) -> None:
    """Run a command to its end; RuntimeError with the end of its log if it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
    with open(f"{folder}/log", "w+", encoding="utf-8") as log:
        if subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}\n{log.read()[-2000:]}")


def summarise(runs: list[list[dict]]) -> dict[str, float]:
    """A side's runs, each a list of steps, as one dictionary: medians over all steps but each run's first.

    Seconds per 1000 tokens are of all these steps together, since responses differ in length.

    >>> summary = summarise([[{"step_s": 9.0, "tokens": 10}, {"step_s": 2.0, "tokens": 1000}]])
    >>> summary["step_s"], summary["s_per_1000_tokens"], summary["first_step_s"]
    (2.0, 2.0, 9.0)
    """
    later = [step for run in runs for step in run[1:]]
    tokens, seconds = (sum(step[key] for step in later) for key in ("tokens", "step_s"))
    return {
        **{key: median(step[key] for step in later) for key in later[0]},
        "first_step_s": median(run[0]["step_s"] for run in runs),
        "tokens_per_s": tokens / seconds,
        "s_per_1000_tokens": 1000 * seconds / tokens,
        "steps": len(later),
    }


def ours_takes(sides: dict[str, dict], name: str) -> dict[str, float]:
    """Our seconds over those of a side, a step and a trained token."""
    ours, side = next(iter(sides.values())), sides[name]
    return {
        "a step": ours["step_s"] / side["step_s"],
        "a token": ours["s_per_1000_tokens"] / side["s_per_1000_tokens"],
    }


def as_markdown(sides: dict[str, dict]) -> str:
    """{name: summary} as a table, ours first."""
    lines = [
        "| | seconds a step | of these generating | response tokens a step | tokens/s | ours takes, a token "
        "| first step |",
        "|" + "---|" * 7,
    ]
    for name, side in sides.items():
        cells = (
            name,
            f"{side['step_s']:.1f}",
            f"{side['generate_s']:.1f}",
            f"{side['tokens']:.0f}",
            f"{side['tokens_per_s']:.0f}",
            f"{ours_takes(sides, name)['a token']:.2f}",
            f"{side['first_step_s']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    if config.side == "trl":
        record = {"trl": version("trl"), "threads": torch.get_num_threads(), "steps": run_trl(config)}
        Path(config.out).write_text(json.dumps(record), encoding="utf-8")
        return
    with one_line_errors():
        responses = config.prompts_per_step * config.samples_per_prompt
        if responses % config.trl_micro_batch:
            raise ValueError(f"--trl-micro-batch {config.trl_micro_batch}: does not divide {responses}")
        if config.steps < 2:
            raise ValueError("--steps 1: takes at least 2, because the first counts apart")
        if not Path(config.trl_python).exists():
            raise ValueError(f"--trl-python {config.trl_python}: not there; bench/trl_step.sh installs it")
        if not (ROOT / config.model).exists() or not (ROOT / config.data).exists():
            remedy = f"python tiny/smollm2.py --out {config.model} --problems {config.data}"
            raise ValueError(f"--model {config.model} --data {config.data}: not there; make them by {remedy}")
    ours, theirs, record = [], {weights: [] for weights in TRL_WEIGHTS}, {}
    for seed in range(config.rounds):
        with tempfile.TemporaryDirectory() as folder:
            rows, out = f"{folder}/rows.jsonl", f"{folder}/trl.json"
            print(f"trl_step: round {seed}, ours", flush=True)
            ours.append(run_ours(config, seed, folder))
            write_lines(rows, prompts_of_run(config, seed))
            for weights, runs in theirs.items():
                print(f"trl_step: round {seed}, TRL with {weights} weights", flush=True)
                flags = {**asdict(config), "side": "trl", "rows": rows, "weights": weights, "out": out}
                words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
                call([config.trl_python, "bench/trl_step.py", *words], config, folder)
                record = json.loads(Path(out).read_text(encoding="utf-8"))
                runs.append(record["steps"])
    everything = [step for runs in (ours, *theirs.values()) for run in runs for step in run]
    assert {step["responses"] for step in everything} == {responses}, "the sides trained on different batches"
    sides = {"train_grpo.py": summarise(ours)}
    sides |= {f"TRL, {weights} weights": summarise(runs) for weights, runs in theirs.items()}
    print(as_markdown(sides))
    written = {
        "command": " ".join(sys.argv),
        "flags": asdict(config),
        **surroundings(),
        "trl": {"version": record["trl"], "threads": record["threads"]},
        "sides": sides,
        "ours_takes": {name: ours_takes(sides, name) for name in sides},
        "runs": {"train_grpo.py": ours, "trl": theirs},
    }
    write_json(config.out, written)


if __name__ == "__main__":
    main()
