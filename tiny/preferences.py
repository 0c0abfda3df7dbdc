"""Train a reward model on pairs of conversations of which people chose one: a small real one, for a laptop.

    python tiny/preferences.py --model models/smollm2 --data Anthropic/hh-rlhf --out models/smollm2_reward

The first layers of a chat model, with a new head that gives one number (a sequence classifier with one
label), learn by the loss of Bradley and Terry: -log sigmoid(score of the chosen - score of the rejected one).
What comes out is for rewards.RewardModel, which also measures it on pairs held out, where chance gets half.

Only the last request and its answer are kept of a conversation, as the paper's chat prompts are first turns.
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import datasets
import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script, only tiny/ is there

from flags import (  # noqa: E402
    Count,
    OutFolder,
    Positive,
    one_line_errors,
    parse_flags,
)

from model import load_config, load_tokenizer  # noqa: E402
from rewards import RewardModel  # noqa: E402


@dataclass
class Config:
    model: str = HfArg(default="models/smollm2", help="The chat model to start from: a folder or a Hub name.")
    data: str = HfArg(
        default="Anthropic/hh-rlhf", help='A .jsonl(.gz) file, or a Hub name, of rows {"chosen", "rejected"}.'
    )
    out: OutFolder = HfArg(default="models/smollm2_reward", help="Folder for the reward model.")
    layers: Count = HfArg(default=6, help="How many of the model's layers to keep.")
    pairs: Count = HfArg(default=600, help="Pairs to train on, once each.")
    held_out: Count = HfArg(default=300, help="Pairs to measure it on.")
    batch: Count = HfArg(default=16, help="Pairs in a step.")
    lr: Positive = HfArg(default=5e-5, help="Learning rate at the start; it falls to 0.")
    max_characters: Count = HfArg(default=1000, help="Longer conversations are left out.")
    seed: int = HfArg(default=0, help="Seed of the pairs' order, and of the head.")


def last_turns(dialogue: str) -> list[dict[str, str]]:
    """The last request of a dialogue in hh-rlhf's form, and its answer, as messages; [] if it has none such.

    >>> last_turns("\\n\\nHuman: Hi\\n\\nAssistant: Hello.\\n\\nHuman: Why?\\n\\nAssistant: I was asked.")
    [{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'I was asked.'}]
    """
    turns = re.split(r"\n\n(Human|Assistant): ?", dialogue)[1:]
    if turns[-4::2] != ["Human", "Assistant"]:
        return []  # some end with two turns of one side
    return [
        {"role": "user", "content": turns[-3].strip()},
        {"role": "assistant", "content": turns[-1].strip()},
    ]


def load_pairs(config: Config) -> list[tuple[list, list]]:
    """(chosen, rejected) conversations, shuffled: those to train on, then those held out."""
    files = {"data_files": config.data} if Path(config.data).exists() else {}
    try:
        rows = datasets.load_dataset("json" if files else config.data, split="train", **files)
        pairs = [(last_turns(row["chosen"]), last_turns(row["rejected"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--data {config.data}: {str(error).splitlines()[0]}") from error
    usable = [
        pair
        for pair in pairs
        if pair[0] != pair[1]
        and all(turns and all(turn["content"] for turn in turns) for turns in pair)
        and all(sum(len(turn["content"]) for turn in turns) <= config.max_characters for turns in pair)
    ]
    print(f"preferences: {len(usable)} of {len(pairs)} pairs are usable")
    wanted = config.pairs + config.held_out
    if len(usable) < wanted:
        raise ValueError(f"--data {config.data}: {wanted} pairs wanted; lower --pairs or --held-out")
    random.Random(config.seed).shuffle(usable)
    return usable[:wanted]


def train(config: Config, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[list, list]]) -> None:
    """One pass over the pairs; the model and its tokenizer are written to config.out."""
    torch.manual_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        num_labels=1,
        num_hidden_layers=config.layers,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    pad = model.config.pad_token_id = tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    steps = len(pairs) // config.batch
    progress = tqdm(range(steps), desc="reward model")
    for step in progress:
        optimizer.param_groups[0]["lr"] = config.lr * (1 - step / steps)
        batch = pairs[step * config.batch :][: config.batch]
        chosen_then_rejected = [pair[0] for pair in batch] + [pair[1] for pair in batch]
        rows = [tokenizer.apply_chat_template(turns, return_dict=False) for turns in chosen_then_rejected]
        longest = max(map(len, rows))
        input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])  # (2 * batch, T)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])  # (2 * batch, T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = model(input_ids=input_ids, attention_mask=mask).logits[:, 0].float()  # (2 * batch,)
        margins = scores[: len(batch)] - scores[len(batch) :]  # (batch,)
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}", right=f"{(margins > 0).float().mean().item():.2f}")
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)


def pairwise_accuracy(reward_model: RewardModel, pairs: list[tuple[list, list]]) -> float:
    """Share of the pairs whose chosen conversation has the higher score."""
    scores = reward_model.score([turns for pair in pairs for turns in pair])
    return fmean(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True))


def main(args: list[str] | None = None) -> None:
    config = parse_flags(Config, args)
    with one_line_errors():
        tokenizer, depth = load_tokenizer(config.model), load_config(config.model).num_hidden_layers
        if config.layers > depth:
            raise ValueError(f"--layers {config.layers}: {config.model} has {depth}")
        if config.pairs < config.batch:
            raise ValueError(f"--pairs {config.pairs}: less than one --batch of {config.batch}")
        pairs = load_pairs(config)
    train(config, tokenizer, pairs[: config.pairs])
    held_out = pairs[config.pairs :]
    right = pairwise_accuracy(RewardModel(config.out), held_out)
    longer = fmean(len(chosen[1]["content"]) > len(rejected[1]["content"]) for chosen, rejected in held_out)
    print(
        f"{config.out}: {100 * right:.1f} % of {len(held_out)} pairs held out; "
        f"always taking the longer answer: {100 * longer:.1f} %"
    )


if __name__ == "__main__":
    main()
