"""The peak memory of token_logps, counted by torch's own profiler: exact, and the same on every machine."""

import json

import pytest
import torch
from torch.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM

import model as model_file
from model import token_logps

V, D, CHUNK = 4096, 16, 64  # vocabulary, hidden size, tokens whose logits are made at a time
LOGITS = CHUNK * V * 4  # bytes of a chunk's logits


def peak_bytes(model, length, dtype, folder):
    """The most that a forward and backward over (1, length) tokens holds at once, above what was there."""
    ids = torch.arange(length)[None] % V
    with profile(profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logps, entropies = token_logps(model, ids, with_entropy=True)
        (logps + entropies).sum().backward()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return max(e["args"]["Total Allocated"] for e in events if e["name"] == "[memory]")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_does_not_grow_with_the_number_of_tokens(monkeypatch, tmp_path, dtype):
    """Memory that runs out on long responses: logits, or copies of the head's weight, kept for every chunk.

    Break: call _head_logps without checkpoint; or hand it head.weight.clone(); or, for the last line,
    LOGITS_AT_ONCE = 2**27.
    """
    default = model_file.LOGITS_AT_ONCE["cpu"]
    monkeypatch.setitem(model_file.LOGITS_AT_ONCE, "cpu", CHUNK * V)
    shape = {"hidden_size": D, "intermediate_size": 1, "num_hidden_layers": 0, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, **shape))  # nothing but an embedding and a head
    peak_bytes(model, 2, dtype, tmp_path)  # makes the gradients
    short, long = (peak_bytes(model, 1 + CHUNK * chunks, dtype, tmp_path) for chunks in (4, 16))
    assert long - short < LOGITS  # 12 chunks more cost less than the logits of one
    assert long / LOGITS * default * 4 < 2e9  # bytes: the promise, with chunks of the default size
