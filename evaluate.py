"""Measure a checkpoint: the accuracy of its answers to problems, or the reward of its answers to requests.

    python evaluate.py --model runs/dpo --data tiny@test --n 50
    python evaluate.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data math500.jsonl --n 50 --out seed.json
    python evaluate.py --model runs/chat --data chat=tiny@test --reward-model tiny/reward --n 1 --answers F
    python evaluate.py --model runs/dpo --data rows.jsonl@test --reward mine.py:score
    python evaluate.py --model runs/dpo/export/* --out 'runs/dpo/eval/{}.json'

Several checkpoints of one architecture and tokenizer share an engine: the weights of each are loaded into it.
Sampling follows the paper (section 6): N = 50 samples per prompt at temperature 0.6 and top-p 0.9.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from flags import (
    Count,
    EngineMemory,
    OutFile,
    OwnFunction,
    Positive,
    Share,
    exit_with,
    one_line_errors,
    parse_flags,
    why_not,
)

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from data import Prompt, load_prompts, split_spec
from generate import Generator, Rollout, check_engine, decode, fit_context, load_generator, request_seed
from grader.as_meant import BOX, FORMULA, boxed_as_meant
from grader.grade import MAX_CHARS
from model import (
    as_numbers,
    digest,
    load_config,
    load_tokenizer,
    meta_model,
    prints_date,
    set_date,
    stop_ids,
    tokenizer_content,
)
from ranks import end_with_parent
from rewards import Scorer
from run import checkpoint_path, read_json, rendering, write_json, write_lines
from sync import prove_copy

# Fields of a checkpoint's config that name its files, not its model; the engine has its own dtype.
HARMLESS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "_from_model_config"}


@dataclass
class Config:
    model: list[str] = HfArg(
        help="A checkpoint: a folder or a name on the Hub; or a run directory: its newest export. "
        "Several are measured one after the other."
    )
    data: str = HfArg(default="tiny@test", help="Prompts of one task, as for the train scripts.")
    reward_model: str | None = HfArg(default=None, help="A checkpoint that scores chat.")
    reward: OwnFunction | None = HfArg(
        default=None, help="FILE.py:NAME scores math; its mean is then the result, not an accuracy."
    )
    reward_timeout: Positive = HfArg(default=10.0, help="As in the train scripts.")
    reward_memory: Positive = HfArg(default=8.0, help="As in the train scripts.")
    strict_paper_grading: bool = HfArg(default=False, help="As in the train scripts.")
    n: Count = HfArg(default=50, help="N: samples per prompt.")
    greedy: bool = HfArg(
        default=False, help="Also answer each problem once by the likeliest tokens: greedy_accuracy."
    )
    limit: Count | None = HfArg(default=None, help="Use only the first LIMIT prompts.")
    answers: OutFile | None = HfArg(
        default=None,
        help="File for all responses, JSON lines; the judge takes it if --n is 1. Needs no reward model. "
        "For several models as --out.",
    )
    out: OutFile | None = HfArg(
        default=None,
        help="JSON file to write. Default for a run directory: its eval/STEP.json. For several models it has "
        "a {}, which stands for the last part of each model's path.",
    )
    temperature: Positive = HfArg(default=0.6, help="Sampling temperature.")
    top_p: Share = HfArg(default=0.9, help="Nucleus sampling: the likeliest tokens up to this probability.")
    max_new_tokens: Count | None = HfArg(
        default=None, help="Default: what the model's context leaves, at most 2048."
    )
    system_block: bool | None = HfArg(
        default=None, help="As in the train scripts. Default: of the run that made the checkpoint, or True."
    )
    date: str | None = HfArg(
        default=None,
        help="As in the train scripts. Default: of the run that made the checkpoint, or today's.",
    )
    engine_memory: EngineMemory | None = HfArg(
        default=None, help="As in the train scripts. Default: 0.85 of what is free."
    )
    seed: int = HfArg(default=0, help="Seed of the samples.")
    attached: bool = HfArg(default=False, help="End when the process that started this one ends.")
    engine: Literal["vllm", "transformers"] = HfArg(
        default="vllm", help="vllm; or transformers, slow, where vLLM does not install."
    )
    dtype: Literal["float32", "bfloat16"] | None = HfArg(
        default=None, help="Default: bfloat16 on a GPU, float32 on a CPU."
    )


def over_runs(scores: list[list[float]]) -> tuple[float | None, float | None, float | None]:
    """Mean, standard error and standard deviation over N runs: scores (prompts, N) -> three numbers.

    Run j answers every prompt with its sample j. standard_deviation: between the N runs; standard_error: of
    their mean, standard_deviation / sqrt(N); both None for N = 1. NaN marks a dropped response: it is not
    counted, nor is a run of NaN alone. If nothing is left, all three are None.
    (The brackets in the paper's tables are as wide as a single run's standard deviation: docs/metrics.md.)
    """
    n = len(scores[0])
    runs = [[row[j] for row in scores if not math.isnan(row[j])] for j in range(n)]
    runs = [fmean(run) for run in runs if run]
    if not runs:
        return None, None, None
    deviation = stdev(runs) if len(runs) > 1 else None
    return fmean(runs), deviation / len(runs) ** 0.5 if len(runs) > 1 else None, deviation


def summarize(scores: list[list[float]]) -> dict[str, Any]:
    """Accuracy over N samples of each problem: scores (problems, N) of 0.0 or 1.0 -> a dictionary.

    pass_at_n: share of problems that at least one of the N samples gets right; pass_at_k: the same for k < N
    samples, {k: share} for powers of 2. right: how many samples of each problem are right, to compare two
    models problem by problem.

    >>> summarize([[1.0, 0.0], [1.0, 1.0]])["accuracy"]
    0.75
    """
    accuracy, error, deviation = over_runs(scores)
    n, right = len(scores[0]), [int(sum(row)) for row in scores]
    return {
        "accuracy": accuracy,
        "standard_error": error,
        "standard_deviation": deviation,
        "pass_at_n": pass_at_k(right, n, n),
        "pass_at_k": {str(2**i): pass_at_k(right, n, 2**i) for i in range(1, n.bit_length()) if 2**i < n},
        "problems": len(scores),
        "n": n,
        "right": right,
    }


def pass_at_k(right: list[int], n: int, k: int) -> float:
    """The expected share of problems that at least one of k samples gets right, from n samples each.

    1 - C(n - right, k) / C(n, k), unbiased (Chen et al. 2021, arXiv 2107.03374, equation 1); right: how many
    of each problem's n samples are right.

    >>> pass_at_k([0, 1, 4], n=4, k=2)
    0.5
    """
    return fmean(1 - math.comb(n - count, k) / math.comb(n, k) for count in right)


def final_answer(response: str) -> str:
    r"""What a response answers, as text: its last box's content, else its last formula's; "" without either.

    As meant (grader/as_meant.py), and after the last equals sign: 2 + 3 = 5 and 5 are the same answer.

    >>> final_answer(r"so $\boxed{2 + 3 = 5}$"), final_answer("It is $5$."), final_answer("It is 5.")
    ('5', '5', '')
    """
    response = response[-MAX_CHARS:]  # as it is graded
    meant = boxed_as_meant(response)
    if BOX.search(response):
        content = meant.removeprefix(r"$\boxed{").removesuffix("}$")
    else:
        formulas = list(FORMULA.finditer(meant))  # three groups each: opening, content, closing
        content = formulas[-1][formulas[-1].lastindex - 1] if formulas else ""
    return content.rpartition("=")[2].strip()


def majority(responses: list[list[str]], scores: list[list[float]]) -> float:
    """Share of problems whose most common answer is right: (problems, N) each.

    A response without an answer (final_answer) has no vote. Among equally common ones the first
    sampled counts.
    """
    right = []
    for texts, row in zip(responses, scores, strict=True):
        answers = [final_answer(text) for text in texts]
        votes = Counter(answer for answer in answers if answer)
        right.append(row[answers.index(votes.most_common(1)[0][0])] if votes else 0.0)
    return fmean(right)


def summarize_rewards(scores: list[list[float]], lengths: list[list[int]]) -> dict[str, Any]:
    """Rewards of N samples of each prompt: scores and lengths (tokens), (prompts, N) each -> a dictionary.

    length_normalized_reward: mean reward over mean length, by which the paper chooses checkpoints (section
    6). It is meaningful only if rewards are positive.
    """
    reward, error, deviation = over_runs(scores)
    return {
        "reward": reward,
        "standard_error": error,
        "standard_deviation": deviation,
        "length_normalized_reward": reward and reward / fmean(length for row in lengths for length in row),
        "problems": len(scores),
        "n": len(scores[0]),
    }


def prepare(config: Config) -> tuple[list[tuple[str, Any, int, int]], list[Prompt], Scorer | None]:
    """Check all user input before any work: ValueErrors in one line.

    Returns, for each model, (the checkpoint's path, its tokenizer, fit_context()'s two numbers); the prompts;
    their scorer (None for answers to requests that are only written to a file).
    """
    check_engine(config.engine)
    both = [[file and file.absolute() for file in files_of(config, flag)] for flag in ("out", "answers")]
    paths, tokenizers = [checkpoint_path(model) for model in config.model], []
    for model, path in zip(config.model, paths, strict=True):
        if not config.out and model != path and (problem := why_not(Path(model) / "eval", folder=True)):
            raise ValueError(f"--model {model}: its folder eval: {problem}; name a file with --out")
        block, date = rendering(path, config.system_block, config.date)
        tokenizer = load_tokenizer(path, block, date)
        tokenizers.append(tokenizer)
        if prints_date(tokenizer) and not date:
            print(f"evaluate: {path}: its chat template prints the date, today's {tokenizer.date} (--date)")
    prompts = load_prompts(config.data, config.reward is not None)[: config.limit]
    models = [
        (path, tokenizer, *fit_context(path, tokenizer, prompts, config.max_new_tokens))
        for path, tokenizer in zip(paths, tokenizers, strict=True)
    ]
    if config.greedy and (prompts[0].task == "chat" or config.reward):
        raise ValueError("--greedy: is for problems that are graded right or wrong")
    if any(out and out == answers for out, answers in zip(*both, strict=True)):
        raise ValueError(f"--answers {config.answers}: is also --out; name two files")
    if prompts[0].task == "chat" and config.answers and not (config.reward_model or config.reward):
        return models, prompts, None  # for the judge alone
    for model, (path, _, tokens, _) in zip(config.model, models, strict=True):
        check_earlier(config, model, path, prompts, tokens)
    scorer = Scorer.of(config, [prompts[0].task], date=tokenizers[0].date)
    if prompts[0].task == "math":
        scorer.usable(prompts, fate="count as wrong")  # a benchmark keeps all its problems
    else:
        prompts = scorer.usable(prompts)
    return models, prompts, scorer


def in_run(config: Config, model: str, path: str, task: str) -> Path | None:
    """Where a run directory, `model`, keeps this measurement of its export `path`; None for other models."""
    kind = ".reward" if config.reward else ".chat" if task == "chat" else ""
    return Path(model) / "eval" / f"{Path(path).name}{kind}.json" if model != path else None


def check_earlier(config: Config, model: str, path: str, prompts: list[Prompt], max_new_tokens: int) -> None:
    """ValueError in one line if a run directory already keeps a measurement that was made otherwise."""
    kept = in_run(config, model, path, prompts[0].task)
    earlier = read_json(kept) if kept and kept.exists() and not config.out else {}
    now = {name: getattr(config, name) for name in ("data", "n", "temperature", "top_p", "seed")}
    for name, value in {**now, "max_new_tokens": max_new_tokens, "problems": len(prompts)}.items():
        if earlier.get(name, value) != value:
            what = "--limit" if name == "problems" else f"--{name.replace('_', '-')}"
            found = f"{value} now, {earlier[name]} in {kept}"
            raise ValueError(f"{what}: {found}; name another file with --out, or delete that one")


def files_of(config: Config, flag: str) -> list[Path | None]:
    """The file that --out or --answers names for each model. ValueError in one line if one is unusable."""
    pattern = getattr(config, flag)
    if not pattern:
        return [None] * len(config.model)
    files = [Path(pattern.replace("{}", Path(model).absolute().name)) for model in config.model]
    for file in files:
        if problem := why_not(file, folder=False):
            raise ValueError(f"--{flag} {file}: {problem}")
        if files.count(file) > 1:
            remedy = "write {} where the last parts of the models' paths go; these must differ"
            raise ValueError(f"--{flag} {pattern}: several models would write {file}; {remedy}")
    return files


def accuracy(model: str, data: str, n: int = 50, **settings) -> dict[str, Any]:
    """Sample n answers to each prompt and score them: a summary, with the settings and the seconds.

    model: a checkpoint's or a run's directory, or a Hub name. data: a spec for load_prompts; problems give
    summarize()'s dictionary, requests, and problems with a reward, summarize_rewards()'s. settings: the other
    fields of Config. ValueError in one line for a model or data that cannot be used.
    """
    config = Config(model=[model], data=data, n=n, **settings)
    ((summary, _),) = measure(prepare(config), config)
    return summary


def weight_files(path: str) -> list[Path]:
    """A checkpoint's weights, under the names that transformers gives them."""
    pattern = "model*.safetensors"
    folder = path if Path(path).is_dir() else snapshot_download(path, allow_patterns=pattern)
    return sorted(Path(folder).glob(pattern))


def engine_kind(path: str, tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> list | None:
    """Everything but the weights that an engine is started with: checkpoints of equal kinds can share one.

    None if the weights cannot be loaded one by one: they are quantized, or the file's tensors are not the
    model's (for example where experts are fused).
    """
    config, in_files = load_config(path), []
    for file in weight_files(path):
        with safe_open(file, "pt") as weights:
            in_files += weights.keys()
    model = meta_model(config)
    own, state = dict(model.named_parameters()), model.state_dict()  # which has a tied head twice
    buffers = dict(model.named_buffers()).keys() & state.keys()
    whole = own.keys() <= set(in_files) <= state.keys() and len(set(in_files)) == len(in_files)
    if not whole or buffers or getattr(config, "quantization_config", None):
        return None
    fields = {key: value for key, value in config.to_dict().items() if key not in HARMLESS}
    return [fields, stop_ids(path, tokenizer), tokenizer_content(tokenizer), max_model_len]


def replace_weights(generator: Generator, path: str, device: torch.device) -> None:
    """Load a checkpoint of the same engine_kind() into an engine. SyncError unless it arrived exactly."""
    own, sent = dict(meta_model(load_config(path)).named_parameters()), {}  # has a tied head once

    def weights() -> Iterator[tuple[str, Tensor]]:
        for file in weight_files(path):
            with safe_open(file, "pt") as held:
                for name in sorted(own.keys() & held.keys()):
                    weight = held.get_tensor(name).to(device, generator.dtype)
                    sent[name] = digest(weight)
                    yield name, weight

    receipts = generator.load_weights(weights())
    prove_copy(as_numbers(sent), receipts, generator, f"{path}: loading it into the engine")


def measure(prepared: tuple, config: Config) -> Iterator[tuple[dict[str, Any], list[dict]]]:
    """Sample and score what prepare() returned. Yields each model's summary, and all its answers as rows."""
    models, prompts, scorer = prepared
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    seeds = [request_seed(config.seed, "evaluate", prompt.id) for prompt in prompts]
    kinds = [None, None]  # of each model, then None: the last model's engine is not kept
    if len(models) > 1:
        kinds = [engine_kind(path, tokenizer, length) for path, tokenizer, _, length in models] + [None]
    generator = None
    with scorer or nullcontext():
        for number, (path, tokenizer, max_new_tokens, max_model_len) in enumerate(models):
            start = time.perf_counter()
            if generator:
                replace_weights(generator, path, device)
            else:
                if number:
                    print(f"evaluate: the engine of the model before cannot hold {path}: starting another")
                with one_line_errors():
                    generator = load_generator(
                        config.engine, path, dtype, device, max_model_len,
                        memory=config.engine_memory or free_share(device),
                        system_block=tokenizer.system_block, date=tokenizer.date,
                    )  # fmt: skip
            groups = generator.sample(
                prompts, config.n, config.temperature, config.top_p, max_new_tokens, seeds
            )
            greedy = []
            if config.greedy:  # so small a top-p leaves one token
                greedy = generator.sample(prompts, 1, 1.0, 1e-6, max_new_tokens, seeds)
            if kinds[number] is None or kinds[number] != kinds[number + 1]:
                generator.close()
                generator = None
            summary, rows = score(path, tokenizer, prompts, groups, scorer, config)
            if greedy:
                answers = decode(tokenizer, [rollout for (rollout,) in greedy])
                summary["greedy_accuracy"] = fmean(scorer.score(prompts, answers))
            settings = {name: getattr(config, name) for name in ("temperature", "top_p", "seed")}
            settings |= {"max_new_tokens": max_new_tokens, "seconds": time.perf_counter() - start}
            yield summary | settings, rows


def free_share(device: torch.device) -> float:
    """85 % of the memory of a GPU that is free, as a share of all of it: a reward model may hold some."""
    free, total = torch.cuda.mem_get_info() if device.type == "cuda" else (1, 1)
    return 0.85 * free / total


def score(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    groups: list[list[Rollout]],
    scorer: Scorer | None,
    config: Config,
) -> tuple[dict[str, Any], list[dict]]:
    """Score one model's rollouts: the summary, and all answers as rows."""
    n = config.n
    repeated = [prompt for prompt in prompts for _ in range(n)]  # one per response
    rollouts = [rollout for group in groups for rollout in group]
    responses = decode(tokenizer, rollouts)
    lengths = [len(r.response_ids) for r in rollouts]

    def by_prompt(values):
        return [values[i : i + n] for i in range(0, len(values), n)]

    scores, summary = [None] * len(responses), {"problems": len(prompts), "n": n}
    if scorer:
        scorer.set_counts(dict.fromkeys(scorer.counts(), 0))  # count what goes wrong with this model alone
        if scorer.model:
            set_date(scorer.model.tokenizer, tokenizer.date)  # the previous model may have had another
        scores = scorer.score(repeated, responses)
        if prompts[0].task == "math" and not config.reward:
            summary = summarize(by_prompt(scores))
            summary["majority"] = majority(by_prompt(responses), by_prompt(scores))
        else:
            summary = summarize_rewards(by_prompt(scores), by_prompt(lengths))
        if config.reward and {*scores} <= {0.0, 1.0}:
            summary["pass_at_n"] = fmean(map(max, by_prompt(scores)))
        summary |= scorer.counts()
    summary = {
        "model": str(path),
        "data": config.data,
        **summary,
        "length": fmean(lengths),
        "truncated_frac": fmean(r.finish_reason == "length" for r in rollouts),
    }
    rows = [
        {
            "id": prompt.id,
            "prompt": prompt.messages[-1]["content"],
            "response": response,
            "length": len(response),  # characters, as judge/ wants
            "reward": None if score is None or math.isnan(score) else score,
        }
        for prompt, response, score in zip(repeated, responses, scores, strict=True)
    ]
    return summary, rows


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    if config.attached:
        end_with_parent()
    with one_line_errors():
        prepared = prepare(config)
    files = zip(config.model, files_of(config, "out"), files_of(config, "answers"), strict=True)
    for (model, out, answers), (result, rows) in zip(files, measure(prepared, config), strict=True):
        if result.keys() & {"accuracy", "reward"}:  # answers for a judge alone are in --answers
            out = out or in_run(config, model, result["model"], split_spec(config.data)[0])
        print_result(result, answers)
        try:
            if out:
                write_json(out, result)
            if answers:
                write_lines(answers, rows)
        except OSError as error:  # a full disk, for example
            exit_with(f"{error.filename or out or answers}: {error.strerror}; measured: {json.dumps(result)}")


def print_result(result: dict[str, Any], answers: Path | None) -> None:
    """Print a summary in one line."""
    error = result.get("standard_error")
    if "accuracy" in result:
        number = f"accuracy {100 * result['accuracy']:.1f}{f' ± {100 * error:.2f}' if error else ''} %"
    elif result.get("reward", 0) is None:
        number = "every response was dropped"
    elif "reward" in result:
        number = f"reward {result['reward']:.3f}{f' ± {error:.3f}' if error else ''}"
    else:
        number = f"answers in {answers}, not scored"
    print(
        f"{result['model']} on {result['data']}: {number} "
        f"(mean and standard error of {result['n']} runs over {result['problems']} prompts; "
        f"{result['length']:.0f} tokens a response, {100 * result['truncated_frac']:.1f} % cut)"
    )


if __name__ == "__main__":
    main()
