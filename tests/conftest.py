"""What the tests share: tiny random models with a byte tokenizer, doubles of the engine and the grader, and
runs in processes of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["SEMI_ONLINE_CACHE"] = "off"  # a test must not read what an earlier one computed

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data import Prompt
from generate import Rollout, TransformersGenerator, encode_prompts
from model import token_logps
from ranks import launch
from run import read_metrics

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = (
    "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)
SHAPE = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 259, "initializer_range": 0.2,
}  # fmt: skip


LONG = ("test_resume.py", "test_dial.py", "test_serve.py")  # files that take minutes


def pytest_collection_modifyitems(items):
    """Begin with the long files: of two processes neither is left alone with one at the end."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


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
    words = [sys.executable, *launch(ranks), *command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def write_program(folder, text):
    """Write a program that finds our modules, though it is in another folder; its path."""
    path = folder / "program.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{text}")
    return path


def wait_for_step(run, directory):
    """Wait until a run, started in the background, has taken a step."""
    metrics = directory / "metrics.jsonl"
    while not metrics.exists() or "\n" not in metrics.read_text():
        assert run.poll() is None, "the run ended before its first step"
        time.sleep(0.02)


def computed(directory):
    """What a run has computed: its metrics without the clock's, and its last weights."""
    rows = read_metrics(directory, clock=False)
    return rows, load_file(directory / "export" / str(len(rows)) / "model.safetensors")


class Grader:
    """yes is right. The real one takes a second to start."""

    parse_failures = restarts = per_s = 0

    def __init__(self, strict):
        pass

    def begin(self, items):
        pass

    def score(self, items):
        return [float("yes" in response) for response, _ in items]

    def unparsable(self, golds):
        return []

    def close(self):
        pass


class Scripted(TransformersGenerator):
    """An engine that answers prompts as it was told: texts = {prompt id: [response] * G}.

    noise: how far its log-probs are off the model's, as those of older weights are. It keeps the limits that
    it was given, {prompt id: tokens}, and the groups that it returned, [[rollout] * G] * P.
    """

    def __init__(self, path, dtype, device, texts, noise):
        super().__init__(path, dtype, device)
        self.texts, self.noise, self.limits, self.groups = texts, noise, None, None

    @torch.no_grad()
    def sample(self, prompts, n, temperature, top_p, max_tokens, seeds, turn=0):
        self.limits = {prompt.id: limit for prompt, limit in zip(prompts, max_tokens, strict=True)}
        self.groups = []
        for prompt, start, seed in zip(prompts, encode_prompts(self.tokenizer, prompts), seeds, strict=True):
            self.groups.append([])
            draw = torch.Generator().manual_seed(seed)
            for text in self.texts[prompt.id]:
                ids = [*self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id]
                logps = token_logps(self.model, torch.tensor([start + ids]), temperature=temperature)
                logps = logps[0, len(start) :] + self.noise * torch.randn(len(ids), generator=draw)
                self.groups[-1].append(Rollout(prompt.id, start, ids, logps.tolist(), "stop", self.version))
        return self.groups


@pytest.fixture
def scripted(monkeypatch):
    """Give the train scripts these sources, and an engine that answers their prompts with `texts`."""

    def call(sources, texts, noise=0.0):
        engines = []  # the one that a script loads comes here

        def load_generator(engine, path, dtype, device, *rest, **settings):
            engines.append(Scripted(path, dtype, device, texts, noise))
            return engines[0]

        monkeypatch.setattr("life.load_sources", lambda specs, own: sources)
        monkeypatch.setattr("life.load_generator", load_generator)
        return engines

    return call


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
