"""The policy: a Hugging Face causal language model, with the log-probability of each token it is shown."""

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# The head's logits are made for this many (token, vocabulary entry) pairs at a time: 2**26 floats are 256 MB.
# At the peak, in backward with entropies, five tensors of that size are held (results/memory).
LOGITS_AT_ONCE = 2**26

TINY_MODEL = os.path.relpath(Path(__file__).parent / "tiny" / "llama")  # from wherever a script is started


def init_ranks():
    """Join torchrun's ranks, or stand alone under plain `python`. Returns (rank, world, device)."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "nccl" if on_gpu else "gloo"
    if dist.is_initialized():
        pass  # a notebook, or a test, that calls main() again
    elif "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() > 1:
        raise ValueError("torchrun --nproc-per-node: one process is supported for now; start with 1")
    return dist.get_rank(), dist.get_world_size(), device


def load_config(path):
    """The checkpoint's configuration. ValueError in one line if there is no usable model at `path`."""
    folder = Path(path)
    for needed in ("config.json", "tokenizer_config.json", "*.safetensors"):
        if folder.exists() and not any(folder.glob(needed)):
            raise ValueError(f"--model {path}: not a Hugging Face checkpoint (it has no {needed})")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        wrong = (
            "its config.json cannot be read" if folder.exists() else "no such folder, nor a model on the Hub"
        )
        raise ValueError(f"--model {path}: {wrong} ({str(error).splitlines()[0]})") from error
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        # token_logps multiplies hidden states by the output embedding and nothing else.
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ValueError(f"--model {path}: its config sets {field}, which token_logps does not apply")
    return config


def load_tokenizer(path):
    """The checkpoint's tokenizer. ValueError in one line if it cannot format a conversation."""
    load_config(path)  # says what is wrong with the path, if anything is
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise ValueError(f"--model {path}: no chat template; use an instruction-tuned checkpoint")
    return tokenizer


def load_policy(path, device):
    """The model with float32 master weights: an update of 1e-6 to a bfloat16 weight rounds to nothing.

    It stays in eval mode: with dropout it would not be the model that the generator samples from.
    """
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()


def frozen_copy(model):
    """The reference: the same weights in memory of its own, without gradients."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def copy_weights(source, target):
    """Overwrite the target's weights by the source's, in place."""
    for from_source, into_target in zip(source.parameters(), target.parameters(), strict=True):
        into_target.copy_(from_source)


def _head_logps(hidden, targets, weight, bias, temperature, with_entropy):
    """(N, D), (N,) -> (N,), (N,): log-prob of each target, entropy of the distribution that it is from."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float() / temperature  # (N, V)
    all_logps = logits.log_softmax(-1)  # (N, V)
    logps = all_logps.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    if not with_entropy:
        return logps, torch.zeros_like(logps)
    return logps, -(all_logps.exp() * all_logps).sum(-1)


def token_logps(model, input_ids, response_mask=None, temperature=1.0, with_entropy=False):
    """Log-prob of every response token under `model`, in nats.

    input_ids (B, T): prompt + response, right-padded. response_mask (B, T): 1 on response tokens; None means
    all.
    temperature: the logits are divided by it, as the generator did when it sampled.
    Returns logps (B, T); with_entropy=True returns (logps, entropies), both (B, T). Entry [b, t] belongs to
    token input_ids[b, t], given the tokens before it; it is 0 where the mask is 0, and in column 0, which
    nothing predicts.
    This is the one place in the project where predictions and tokens are shifted by one against each other.

    Padding needs no attention mask: attention is causal, so what stands to the right of a token cannot reach
    it.
    The prompt's logits are never made, and the response's are made a chunk at a time and again in backward,
    so peak memory does not grow with T x V.
    """
    hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
    if response_mask is None:
        response_mask = torch.ones_like(input_ids)
    wanted = response_mask.bool().clone()  # (B, T)
    wanted[:, 0] = False
    predictors, targets = hidden[:, :-1][wanted[:, 1:]], input_ids[wanted]  # (N, D), (N,)

    head = model.get_output_embeddings()
    chunk = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    pieces = [
        checkpoint(
            _head_logps, some_hidden, some_targets, head.weight, head.bias, temperature, with_entropy,
            use_reentrant=False,
        )
        for some_hidden, some_targets in zip(predictors.split(chunk), targets.split(chunk), strict=True)
    ]  # fmt: skip
    empty = hidden.new_zeros(input_ids.shape, dtype=torch.float32)  # (B, T)
    logps, entropies = (
        empty.masked_scatter(wanted, torch.cat(column)) for column in zip(*pieces, strict=True)
    )
    return (logps, entropies) if with_entropy else logps
