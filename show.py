"""Print prompts, their answers with rewards, and the chosen pair token by token.

    python show.py --model tiny/llama --data tiny --show 3

The number behind a token is its sampling probability in percent.
"""

import math
import random
import sys
from dataclasses import dataclass
from typing import Literal

from flags import TINY_MODEL, Count, OwnFunction, Positive, one_line_errors, parse_flags

import torch
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from data import load_prompts
from generate import Rollout, check_engine, decode, fit_context, load_generator, request_seed
from model import load_tokenizer
from rewards import Scorer
from run import checkpoint_path, rendering
from train_dpo import pick_pairs


@dataclass
class Config:
    model: str = HfArg(
        default=TINY_MODEL, help="A checkpoint or a run directory, as in evaluate.py; only one."
    )
    data: str = HfArg(default="tiny", help="Prompts of one task, as for the train scripts.")
    reward_model: str | None = HfArg(default=None, help="A checkpoint that scores chat.")
    reward: OwnFunction | None = HfArg(default=None, help="As in the train scripts.")
    reward_timeout: Positive = HfArg(default=10.0, help="As in the train scripts.")
    reward_memory: Positive = HfArg(default=8.0, help="As in the train scripts.")
    strict_paper_grading: bool = HfArg(default=False, help="As in the train scripts.")
    show: Count = HfArg(default=3, help="Number of prompts.")
    samples_per_prompt: Count = HfArg(default=8, help="G: responses to each prompt.")
    max_new_tokens: Count | None = HfArg(default=None, help="Default: what the context leaves, at most 2048.")
    temperature: Positive = HfArg(default=1.0, help="Sampling temperature.")
    system_block: bool | None = HfArg(default=None, help="As in evaluate.py.")
    seed: int = HfArg(default=0, help="Seed of the samples.")
    engine: Literal["vllm", "transformers"] = HfArg(default="vllm", help="As in the train scripts.")


def show_tokens(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> str:
    """One rollout as training sees it: the prompt (mask 0), dimmed, then each response token (mask 1)."""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    prompt = tokenizer.decode(rollout.prompt_ids)
    tokens = [tokenizer.decode([i]).replace("\n", "\\n") for i in rollout.response_ids]
    shares = [
        f"{token}{dim}⟨{100 * math.exp(logp):.0f}⟩{plain}"
        for token, logp in zip(tokens, rollout.logps, strict=True)
    ]
    return f"{dim}{prompt}{plain}{''.join(shares)}"


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        check_engine(config.engine)
        config.model = checkpoint_path(config.model)
        block, date = rendering(config.model, config.system_block, None)
        tokenizer = load_tokenizer(config.model, block, date)
        prompts = load_prompts(config.data, config.reward is not None)[: config.show]
        max_new_tokens, max_model_len = fit_context(config.model, tokenizer, prompts, config.max_new_tokens)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        scorer = Scorer.of(config, [prompts[0].task], device, date)
        prompts = scorer.usable(prompts)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        settings = {"system_block": block, "date": date}
        generator = load_generator(config.engine, config.model, dtype, device, max_model_len, **settings)
    seeds = [request_seed(config.seed, 0, prompt.id) for prompt in prompts]
    groups = generator.sample(
        prompts, config.samples_per_prompt, config.temperature, 1.0, max_new_tokens, seeds
    )
    generator.close()
    with scorer:
        for prompt, group in zip(prompts, groups, strict=True):
            texts = decode(tokenizer, group)
            rewards = scorer.score([prompt] * len(texts), texts)
            answer = f", answer {prompt.answer}" if prompt.answer else ""
            print(f"\n=== prompt {prompt.id}{answer}\n{prompt.messages[-1]['content']}\n")
            for text, reward, rollout in zip(texts, rewards, group, strict=True):
                print(f"[{reward:.3g}] {text}" + (" [cut]" if rollout.finish_reason == "length" else ""))
            how = "bestworst" if prompt.task == "chat" or config.reward else "random"
            for _, chosen, rejected in pick_pairs([rewards], how, random.Random(config.seed)):
                print(f"\nchosen:   {show_tokens(tokenizer, group[chosen])}")
                print(f"rejected: {show_tokens(tokenizer, group[rejected])}")


if __name__ == "__main__":
    main()
