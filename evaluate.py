"""Measure a checkpoint: the accuracy of its answers to problems, or the reward of its answers to requests.

    python evaluate.py --model runs/dpo --data tiny@test --n 50
    python evaluate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data math500.jsonl --n 50 --out seed.json
    python evaluate.py --model runs/chat --data chat=tiny@test --reward-model tiny/reward --n 1 --answers F

Sampling follows the paper (section 6): N = 50 samples per prompt at temperature 0.6 and top-p 0.9.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import torch
from transformers.hf_argparser import HfArg

from data import Prompt, load_prompts
from flags import Count, Positive, Share, one_line_errors, parse_flags
from generate import check_engine, fit_context, load_generator, request_seed
from model import load_tokenizer
from rewards import Scorer
from run import checkpoint_path, write_json, write_lines

LONGEST_RESPONSE = 2048  # the paper's limit on mathematics


@dataclass
class Config:
    model: str = HfArg(
        help="A checkpoint: a folder or a name on the Hub; or a run directory: its newest export."
    )
    data: str = HfArg(default="tiny@test", help="Prompts of one task, as for the train scripts.")
    reward_model: str | None = HfArg(default=None, help="A checkpoint that scores chat.")
    n: Count = HfArg(default=50, help="N: samples per prompt.")
    limit: Count | None = HfArg(default=None, help="Only the first so many prompts.")
    answers: str | None = HfArg(
        default=None,
        help="File for all responses, JSON lines; the judge takes it if --n is 1. Needs no reward model.",
    )
    out: str | None = HfArg(
        default=None, help="JSON file to write. Default for a run directory: its eval/STEP.json."
    )
    temperature: Positive = HfArg(default=0.6, help="Sampling temperature.")
    top_p: Share = HfArg(default=0.9, help="Nucleus sampling: the likeliest tokens up to this probability.")
    max_new_tokens: Count | None = HfArg(
        default=None, help="Default: what the model's context leaves, at most 2048."
    )
    system_block: bool = HfArg(default=True, help="As in the train scripts.")
    seed: int = HfArg(default=0, help="Seed of the samples.")
    engine: Literal["vllm", "transformers"] = HfArg(
        default="vllm", help="vllm; or transformers, slow, where vLLM does not install."
    )
    dtype: Literal["float32", "bfloat16"] | None = HfArg(
        default=None, help="Default: bfloat16 on a GPU, float32 on a CPU."
    )


def over_runs(scores: list[list[float]]) -> tuple[float, float | None, float | None]:
    """Mean, standard error and standard deviation over N runs: scores (prompts, N) -> three numbers.

    Run j answers every prompt with its sample j. standard_deviation: between the N runs; standard_error: of
    their mean, standard_deviation / sqrt(N); both None for N = 1.
    (The brackets in the paper's tables are as wide as a single run's standard deviation: see README.)
    """
    n = len(scores[0])
    runs = [fmean(row[j] for row in scores) for j in range(n)]
    deviation = stdev(runs) if n > 1 else None
    return fmean(runs), deviation / n**0.5 if n > 1 else None, deviation


def summarize(scores: list[list[float]]) -> dict[str, Any]:
    """Accuracy over N samples of each problem: scores (problems, N) of 0.0 or 1.0 -> a dictionary.

    pass_at_n: share of problems that at least one of the N samples gets right.

    >>> summarize([[1.0, 0.0], [1.0, 1.0]])["accuracy"]
    0.75
    """
    accuracy, error, deviation = over_runs(scores)
    return {
        "accuracy": accuracy,
        "standard_error": error,
        "standard_deviation": deviation,
        "pass_at_n": fmean(max(row) for row in scores),
        "problems": len(scores),
        "n": len(scores[0]),
    }


def summarize_rewards(scores: list[list[float]], lengths: list[list[int]]) -> dict[str, Any]:
    """Rewards of N samples of each prompt: scores and lengths (tokens), (prompts, N) each -> a dictionary.

    length_normalized_reward: mean reward over mean length, by which the paper chooses checkpoints (section
    6). It means something only where rewards are positive.
    """
    reward, error, deviation = over_runs(scores)
    return {
        "reward": reward,
        "standard_error": error,
        "standard_deviation": deviation,
        "length_normalized_reward": reward / fmean(length for row in lengths for length in row),
        "problems": len(scores),
        "n": len(scores[0]),
    }


def prepare(config: Config) -> tuple[str, Any, list[Prompt], Scorer | None, int, int]:
    """Check all that the user gave before any work: ValueErrors in one line.

    Returns the checkpoint's path, its tokenizer, the prompts, their scorer (None for answers to requests that
    are only written to a file), and fit_context()'s two numbers.
    """
    check_engine(config.engine)
    for flag, file in (("--out", config.out), ("--answers", config.answers)):
        if file and Path(file).is_dir():
            raise ValueError(f"{flag} {file}: is a folder; name a file in it")
    path = checkpoint_path(config.model)
    tokenizer = load_tokenizer(path, config.system_block)
    prompts = load_prompts(config.data)[: config.limit]
    tokens, max_model_len = fit_context(path, tokenizer, prompts, config.max_new_tokens, LONGEST_RESPONSE)
    if prompts[0].task == "chat" and config.answers and not config.reward_model:
        return path, tokenizer, prompts, None, tokens, max_model_len  # for the judge alone
    scorer = Scorer([prompts[0].task], config.reward_model)
    if prompts[0].task == "math":
        scorer.usable(prompts, fate="count as wrong")  # a benchmark keeps all its problems
    else:
        prompts = scorer.usable(prompts)
    return path, tokenizer, prompts, scorer, tokens, max_model_len


def accuracy(model: str, data: str, n: int = 50, **settings) -> dict[str, Any]:
    """Sample n answers to each prompt and score them: a summary, and what it took to get it.

    model: a checkpoint's or a run's directory, or a Hub name. data: a spec for load_prompts; problems give
    summarize()'s dictionary, requests summarize_rewards()'s. settings: the other fields of Config.
    ValueError in one line for a model or data that cannot be used.
    """
    config = Config(model=model, data=data, n=n, **settings)
    return measure(prepare(config), config)[0]


def measure(prepared: tuple, config: Config) -> tuple[dict[str, Any], list[dict]]:
    """Sample and score what prepare() returned: the summary, and all answers as rows."""
    path, tokenizer, prompts, scorer, max_new_tokens, max_model_len = prepared
    n, start = config.n, time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    gpu_memory = 0.85
    if device.type == "cuda":  # a share is of all memory, some of which a reward model or a trainer may hold
        free, total = torch.cuda.mem_get_info()
        gpu_memory *= free / total
    with one_line_errors():
        settings = {"memory": gpu_memory, "system_block": config.system_block}
        generator = load_generator(config.engine, path, dtype, device, max_model_len, **settings)
    seeds = [request_seed(config.seed, "evaluate", prompt.id) for prompt in prompts]
    groups = generator.sample(prompts, n, config.temperature, config.top_p, max_new_tokens, seeds)
    generator.close()
    repeated = [prompt for prompt in prompts for _ in range(n)]  # one a response
    rollouts = [rollout for group in groups for rollout in group]
    responses = tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)
    lengths = [len(r.response_ids) for r in rollouts]

    def by_prompt(values):
        return [values[i : i + n] for i in range(0, len(values), n)]

    scores, summary = [None] * len(responses), {"problems": len(prompts), "n": n}
    if scorer:
        with scorer:
            scores = scorer.score(repeated, responses)
        if prompts[0].task == "math":
            summary = summarize(by_prompt(scores)) | scorer.counts()
        else:
            summary = summarize_rewards(by_prompt(scores), by_prompt(lengths)) | scorer.counts()
    summary = {
        "model": str(path),
        "data": config.data,
        **summary,
        "length": fmean(lengths),
        "truncated_frac": fmean(r.finish_reason == "length" for r in rollouts),
        "temperature": config.temperature,
        "top_p": config.top_p,
        "max_new_tokens": max_new_tokens,
        "seed": config.seed,
        "seconds": time.perf_counter() - start,
    }
    rows = [
        {
            "id": prompt.id,
            "prompt": prompt.messages[-1]["content"],
            "response": response,
            "length": len(response),  # characters, as judge/ wants
            "reward": score,
        }
        for prompt, response, score in zip(repeated, responses, scores, strict=True)
    ]
    return summary, rows


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        prepared = prepare(config)
    result, rows = measure(prepared, config)
    out = config.out
    if out is None and (Path(config.model) / "export").is_dir():
        name = Path(result["model"]).name + ("" if "accuracy" in result else ".chat")
        out = Path(config.model) / "eval" / f"{name}.json"
    if out:
        write_json(out, result)
    if config.answers:
        write_lines(config.answers, rows)
    error = result.get("standard_error")
    if "accuracy" in result:
        number = f"accuracy {100 * result['accuracy']:.1f}{f' ± {100 * error:.2f}' if error else ''} %"
    elif "reward" in result:
        number = f"reward {result['reward']:.3f}{f' ± {error:.3f}' if error else ''}"
    else:
        number = f"answers in {config.answers}, not scored"
    print(
        f"{result['model']} on {result['data']}: {number} "
        f"(mean and standard error of {result['n']} runs over {result['problems']} prompts; "
        f"{result['length']:.0f} tokens a response, {100 * result['truncated_frac']:.1f} % cut)"
    )


if __name__ == "__main__":
    main()
