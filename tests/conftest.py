"""Doubles that the tests share: tiny random models of two families with a byte tokenizer, made in a
moment."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from bench import kills
from data import Prompt

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
SHAPE = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 259, "initializer_range": 0.2,
}  # fmt: skip


def byte_tokenizer():
    """256 bytes and 4 markers: any text is a sequence of ids below 260."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    fast.add_special_tokens({"additional_special_tokens": ["<user>", "<bot>"]})
    fast.chat_template = TEMPLATE
    return fast


def make_checkpoint(folder, family, **changes):
    """A random model, sharp enough that two of them disagree: untied Llama, or tied Qwen3 with q/k norm."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {**SHAPE, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape |= changes
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=True))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def torchrun(ranks, *command):
    """Run a Python program on so many ranks; what it printed."""
    launch = [sys.executable, *kills.torchrun(ranks)]
    done = subprocess.run([*launch, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


class Grader:
    """yes is right. The real one takes a second to start."""

    parse_failures = restarts = per_s = 0

    def score(self, items):
        return [float("yes" in response) for response, _ in items]

    def unparsable(self, golds):
        return []

    def close(self):
        pass


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{"llama": path, "qwen3": path}"""
    return {name: make_checkpoint(tmp_path_factory.mktemp(name), name) for name in ("llama", "qwen3")}


@pytest.fixture
def prompts():
    """Two short prompts."""
    return [
        Prompt(id=f"p{i}", task="math", messages=[{"role": "user", "content": text}], answer="4")
        for i, text in enumerate(["What is 2 + 2?", "And 1 + 3, in words?"])
    ]
