"""The policy, a Hugging Face causal language model: load, shard, and compute per-token log-probs."""

import ctypes
import hashlib
import inspect
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import Any

from flags import TrainFlags, one_line_errors

import tokenizers
import torch
import torch.distributed as dist
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from data import is_lfs_pointer
from ranks import rank, world_size
from run import read_json, read_text

try:  # torch's attention kernel for packed rows: GPU only, and not in every release
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

# The head's logits are computed for this many (token, vocabulary entry) pairs at a time: 2**26 floats are 256
# MB. At the peak, in backward with entropies, five tensors of that size are held (results/memory).
LOGITS_AT_ONCE = {"cpu": 2**26, "cuda": 2**28}  # by the type of the device


def load_config(path: str) -> PreTrainedConfig:
    """The checkpoint's configuration. ValueError in one line if there is no usable model at `path`."""
    folder = Path(path)
    for needed in ("config.json", "tokenizer_config.json", "*.safetensors"):
        if folder.exists() and not any(folder.glob(needed)):
            raise ValueError(f"--model {path}: not a Hugging Face checkpoint (it has no {needed})")
    absent = "" if folder.exists() else ": no such folder, and from the Hub"
    with one_line(f"--model {path}{absent}"):
        check_files(folder)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        # token_logps multiplies hidden states by the output embedding and nothing else.
        if getattr(config.get_text_config(), field, None) not in (None, 1, 1.0):
            raise ValueError(f"--model {path}: its config sets {field}, which token_logps does not apply")
    if not getattr(config.get_text_config(), "max_position_embeddings", None):
        raise ValueError(f"--model {path}: its config has no max_position_embeddings; use another model")
    return config


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """Turn any error while a checkpoint loads into a ValueError in one line that begins with `what`.

    transformers raises many types, and tokenizers raises a bare Exception for a broken tokenizer.json.
    """
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:300] or "no reason given"
        if "custom code" in said:
            said = "it wants code of its own to run (auto_map), which nothing here does; use another"
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{said}") from error


def check_files(folder: Path) -> None:
    """ValueError names a checkpoint file that is truncated, or that the index lists but is missing."""
    for file in folder.glob("*"):
        if file.is_file() and is_lfs_pointer(file):
            raise ValueError(f"{file.name} is Git LFS's pointer to the file; run git lfs pull in that folder")
    for file in [*folder.glob("*config.json"), *folder.glob("*.index.json")]:
        for name in set(read_json(file).get("weight_map", {}).values()):
            if not (folder / name).is_file():
                raise ValueError(f"{file.name} names {name}, which is not there; download it again")
    for file in folder.glob("*.safetensors"):
        with one_line(f"{file.name} is cut, or damaged; download it again"):
            safe_open(file, "pt")  # reads its header, and compares that with the file's size


def check_finite(model: nn.Module) -> None:
    """ValueError if a weight holds NaN or infinity."""
    bad = [name for name, p in model.named_parameters() if not p.sum(dtype=torch.float32).isfinite()]
    if bad:
        raise ValueError(f"{len(bad)} weights hold NaN or infinity, the first is {bad[0]}")


def generation_file(path: str) -> str | None:
    """The text of a checkpoint's generation_config.json, or None if it has none."""
    file = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    return file and read_text(file)


def stop_ids(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: those that generation_config.json lists, and the tokenizer's EOS.

    Without that file config.json's ids are used, as in transformers and vLLM. ValueError if there is none.
    """
    text, config = generation_file(path), load_config(path).get_text_config()
    listed = json.loads(text).get("eos_token_id") if text else getattr(config, "eos_token_id", None)
    ids = {*(listed if isinstance(listed, list) else [listed]), tokenizer.eos_token_id}
    ids = sorted(number for number in ids if isinstance(number, int) and number < config.vocab_size)
    if not ids:
        remedy = "set eos_token_id in its generation_config.json"
        raise ValueError(f"--model {path}: no stop token, so no response would ever end; {remedy}")
    return ids


def head_dim(text: PreTrainedConfig) -> int:
    """The size of an attention head, from a text model's config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def meta_model(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a transformers config on torch's meta device: shapes without numbers."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)


def load_tokenizer(path: str, system_block: bool = True, date: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. ValueError in one line if it cannot format a conversation.

    system_block: whether prompts keep the text that the chat template puts before the first turn.
    date: the day that the template prints, as in 2026-11-26; by default today's.
    """
    load_config(path)  # raises if the path is no usable model
    with one_line(f"--model {path}: its tokenizer (tokenizer.json) cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise ValueError(f"--model {path}: no chat template; use an instruction-tuned checkpoint")
    tokenizer.system_block = system_block
    set_date(tokenizer, date)
    return tokenizer


def set_date(tokenizer: PreTrainedTokenizerBase, date: str | None) -> None:
    """Make the chat template print this day, as in 2026-11-26, as today's; None: the actual date."""
    try:
        day = datetime.fromisoformat(date or f"{datetime.now():%Y-%m-%d}")
    except ValueError as error:
        raise ValueError(f"--date {date}: {error}; write it as in 2026-11-26") from None
    tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, strftime_now=day.strftime)
    tokenizer.date = f"{day:%Y-%m-%d}"


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints the day."""
    return "strftime_now" in str(tokenizer.chat_template)


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Everything besides its text that a conversation's ids depend on: equal lists mean equal ids."""
    system_block = str(getattr(tokenizer, "system_block", True))
    content = [transformers.__version__, tokenizers.__version__, system_block]
    content += [tokenizer.date] if prints_date(tokenizer) else []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)  # with the chat template
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            content += [file.name, hashlib.sha256(file.read_bytes()).hexdigest()]
    return content


def load_policy(
    path: str, device: torch.device | str = "cpu", attention: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a model with float32 master weights: an update of 1e-6 to a bfloat16 weight rounds to nothing.

    It stays in eval mode: with dropout it would differ from the model that the generator samples from.
    attention: transformers' name for the kernel; with "varlen" token_logps computes no padding.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
    with one_line(f"--model {path}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attention, trust_remote_code=False,
            generation_config=GenerationConfig(),  # not the checkpoint's: see stop_ids() and life.export()
            output_loading_info=True,
        )  # fmt: skip
        if missing := sorted(report["missing_keys"]):  # transformers only warns, and takes random numbers
            raise ValueError(f"{len(missing)} weights are in no file, the first is {missing[0]}")
        check_finite(model)
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())  # gpt-oss's
    if attention == "varlen" and (sinks or not attends_only(model)):
        kernel = "eager" if sinks else "sdpa"  # sdpa lacks sinks, too
        print(f"model: {path}: the varlen kernel cannot compute its layers: {kernel}, with padding")
        model.set_attn_implementation(kernel)
    return model.to(device).eval()


def load_sharded(config: TrainFlags, device: torch.device, trained: bool = True) -> PreTrainedModel:
    """Load --model, frozen if not `trained`. Each rank loads it whole on its host, and keeps its shard."""
    dtype = getattr(torch, config.dtype)
    # A frozen model needs no master weights: it is held in the dtype that FSDP casts the policy to.
    held = torch.float32 if trained or device.type == "cpu" else dtype
    with one_line_errors():
        model = load_policy(config.model, attention=config.attention, dtype=held).requires_grad_(trained)
    if trained and config.activation_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        for block in blocks_of(model):  # all blocks share one compiled function, for rows of any length
            block.compile(dynamic=True)
    return shard(model, device, dtype)


def keep_freed_memory() -> None:
    """Make glibc reuse the memory of freed tensors; by default it returns large blocks to Linux.

    Getting such blocks again, page by page and zeroed, took a quarter of a training step
    (results/train_flops). torch has its own allocator only for GPUs.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself, however large
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never trimmed


def choose_attention(attention: str | None, device: torch.device, dtype: str) -> str:
    """--attention's kernel, or the best one available here. ValueError in one line if it is unavailable."""
    missing = "a GPU" if device.type != "cuda" else "--dtype bfloat16" if dtype != "bfloat16" else None
    if missing is None and varlen_attn is None:
        missing = "a torch that has torch.nn.attention.varlen"
    if attention == "varlen" and missing:
        raise ValueError(f"--attention varlen: needs {missing}; leave the flag out")
    return attention or ("sdpa" if missing else "varlen")


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of a transformer: the units of sharding and of activation checkpointing."""
    wanted = set(model._no_split_modules)  # names; fully_shard() makes a subclass of a block's class
    return [m for m in model.modules() if wanted & {kind.__name__ for kind in type(m).__mro__}]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Let every block keep only its input for backward, and recompute the rest there (Chen et al. 2016).

    It costs a quarter more arithmetic: one forward on top of the cost of four (the policy's forward, its
    backward, which costs two, and the reference's forward). Transformers' gradient_checkpointing_enable()
    works in training mode only, and this policy stays in eval mode.
    """
    for block in blocks_of(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def shard(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Move a model to `device`; shard it by FSDP2 if there are several ranks, or `dtype` is not its own.

    Each rank then keeps a part of every weight, of its gradient and of its optimizer state. A block's weights
    are gathered for its forward and for its backward, in `dtype`, and dropped after each. Gradients are
    summed over the ranks, not averaged: each loss is already divided by the whole step's count.

    With bfloat16 forwards the residual stream is bfloat16, too, as in the generator. On a GPU one rank also
    uses FSDP2, so that it computes what several do. On a CPU one rank uses autocast, with a float32 residual
    stream.
    """
    if world_size() == 1 and (device.type == "cpu" or model.dtype == dtype):
        return model.to(device)
    mesh = init_device_mesh(device.type, (world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in [*blocks_of(model), model]:
        # fully_shard moves the weights to the device, too. By default the weights outside the blocks would
        # stay gathered after a forward, and parameters() would return these copies, which a sync must not
        # touch.
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo can only sum
    model.sharded_token_logps = MethodType(_token_logps, model)
    register_fsdp_forward_method(model, "sharded_token_logps")  # gathers around it, as around forward()
    return model


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context of forwards in `dtype` over float32 weights. On a GPU it does nothing: FSDP casts there."""
    return torch.autocast("cpu", torch.bfloat16, enabled=device.type == "cpu" and dtype == torch.bfloat16)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor as it is. Without autograd."""
    with torch.no_grad():
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all ranks, a collective; any other tensor as it is."""
    if world_size() == 1:
        return local(tensor)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_weights(policy: nn.Module, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) for every parameter, one at a time, so that a second model never exists.

    A tied output head is not listed twice: it is the embedding. A sharded tensor is cast before it is
    gathered, which halves the traffic in bfloat16. Gathering is a collective: all ranks iterate in step.
    """
    for name, parameter in policy.named_parameters():
        if world_size() == 1:
            yield name, local(parameter).to(dtype)
        else:
            yield name, whole(parameter.detach().to(dtype))


def digest(weight: Tensor, first_row: int = 0) -> Tensor:
    """An exact checksum of a tensor's bytes, an int64 tensor () on its device.

    The sum modulo 2**64 of its words of 8 bytes (fewer, if a row does not divide into 8), each times an odd
    number chosen by its position. One flipped bit always changes it; several, or swapped words, are missed
    with a chance below 2**-30. Digests of parts, each with its `first_row`, add up to that of the whole.
    """
    row_bytes = weight.element_size() * math.prod(weight.shape[1:])
    size = next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)
    flat = weight.reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # a view of words must be aligned
    words = flat.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size])
    multipliers, place, sums = odd_numbers(weight.device), first_row * row_bytes // size, []
    while len(words) or not sums:
        chunk, within = divmod(place, len(multipliers))
        some = words[: len(multipliers) - within].long()
        some = some ^ (some >> 32)  # a product carries upwards only: without this, two flipped signs cancel
        added = (some * multipliers[within : within + len(some)]).sum()
        sums.append(added * (2 * chunk + 1) if chunk else added)
        words, place = words[len(some) :], place + len(some)
    return sum(sums[1:], sums[0])


@cache
def odd_numbers(device: torch.device, count: int = 2**22) -> Tensor:
    """Odd numbers that look random, (count,) int64: multiples of the golden ratio's bits, modulo 2**64."""
    return torch.arange(count, device=device) * -0x61C8864680B583EB | 1


def as_numbers(digests: dict[Any, Tensor]) -> dict[Any, int]:
    """Fetch all digests from the device at once."""
    sums = torch.stack(list(digests.values())).tolist() if digests else []
    return dict(zip(digests, sums, strict=True))


def digests(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """{name: digest} of every parameter in `dtype`, as full_weights() yields it, but without gathering."""
    found = {}
    for name, parameter in model.named_parameters():
        # FSDP splits rows as torch.chunk does. With one rank, or without FSDP, this rank has them all.
        sharded = hasattr(parameter, "to_local") and world_size() > 1
        first_row = -(-parameter.shape[0] // world_size()) * rank() if sharded else 0
        found[name] = digest(local(parameter).to(dtype), first_row)
    if world_size() > 1 and hasattr(model, "sharded_token_logps"):
        added = torch.stack(list(found.values()))
        dist.all_reduce(added)
        found = dict(zip(found, added, strict=True))
    return as_numbers(found)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale all gradients to a norm of at most `max_norm`. Returns the norm before, finite or not."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return whole(norm).item()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Overwrite the target's weights by the source's, in place."""
    for from_source, into_target in zip(source.parameters(), target.parameters(), strict=True):
        local(into_target).copy_(local(from_source))  # the same rows; one of the two may be unsharded


def _head_logps(hidden, targets, weight, bias, temperature, with_entropy, entropy_grad=True):
    """(N, D), (N,) -> (N,), (N,): log-prob of each target, and entropy of its distribution."""
    logits = nn.functional.linear(hidden, weight, bias).float() / temperature  # (N, V)
    all_logps = logits.log_softmax(-1)  # (N, V)
    logps = all_logps.gather(-1, targets[:, None]).squeeze(-1)  # (N,)
    if not with_entropy:
        return logps, torch.zeros_like(logps)
    with torch.set_grad_enabled(entropy_grad and torch.is_grad_enabled()):
        return logps, -(all_logps.exp() * all_logps).sum(-1)


def token_logps(
    model: PreTrainedModel,
    input_ids: Tensor,
    response_mask: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_grad: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of every response token under `model`, in nats.

    input_ids (B, T): prompt + response, right-padded. response_mask (B, T): 1 on response tokens; None means
    all.
    temperature: the logits are divided by it, as the generator did when it sampled.
    Returns logps (B, T); with_entropy=True returns (logps, entropies), both (B, T); entropy_grad=False skips
    the gradient of entropies that only a metric needs. Entry [b, t] belongs to token input_ids[b, t], given
    the tokens before it; it is 0 where the mask is 0, and in column 0, which nothing predicts.
    This is the only place in the project that shifts predictions and tokens by one against each other.

    Padding needs no attention mask: attention is causal, so no token sees the padding to its right. Logits
    are computed for response tokens only, in chunks, and again in backward, so peak memory does not grow
    with T x V. With a sharded model this is a collective: all ranks call it, in the same order.
    """
    if hasattr(model, "sharded_token_logps"):
        # Decoder and head are called by hand below, so FSDP's hooks on forward() would not run.
        return model.sharded_token_logps(input_ids, response_mask, temperature, with_entropy, entropy_grad)
    return _token_logps(model, input_ids, response_mask, temperature, with_entropy, entropy_grad)


# --- How rows are laid out for the decoder: padded, packed, or with shared prompts ---


def hidden_states(model: PreTrainedModel, input_ids: Tensor, response_mask: Tensor) -> Tensor:
    """The decoder's last hidden states, (B, T, D), by the cheapest layout of the rows that the model allows.

    In every layout a token sees the earlier tokens of its own row and nothing else.
    """
    if packs(model):
        return packed_hidden(model.get_decoder(), input_ids, response_mask)
    hidden = shared_hidden(model, input_ids, response_mask)
    if hidden is None:
        hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def packs(model: PreTrainedModel) -> bool:
    """Whether rows are packed, without padding, for an attention kernel that keeps them apart."""
    return model.config._attn_implementation == "varlen"


def packed_hidden(decoder: nn.Module, input_ids: Tensor, response_mask: Tensor) -> Tensor:
    """The decoder's last hidden states, (B, T, D), not computed after a row's last response token.

    All rows are packed into one of N tokens; positions restart at 0 for each. The kernel is told where rows
    begin, so no token sees another row's.
    """
    B, T = input_ids.shape
    places = torch.arange(T, device=input_ids.device).expand(B, T)
    lengths = T - response_mask.int().flip(1).argmax(1)  # (B,), a row of padding is kept whole
    real = places < lengths[:, None]  # (B, T)
    starts = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()  # (B + 1,), the last is N
    hidden = decoder(
        input_ids=input_ids[real][None],
        position_ids=places[real][None],
        use_cache=False,
        cu_seq_lens_q=starts,  # transformers' names; it hands them on to packed_attention
        max_length_q=T,
    ).last_hidden_state  # (1, N, D)
    return hidden.new_zeros(B, T, hidden.shape[-1]).index_put((real,), hidden[0])


# Newer releases of torch want to be told that several query heads share a key.
GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn or len).parameters else {}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each of the packed rows, as transformers calls it: "varlen".

    query (1, heads, N, D), key and value alike; cu_seq_lens_q (B + 1,): where rows start. -> (1, N, heads, D)
    """
    for name in ("s_aux", "softcap"):  # the kernel has neither; load_policy turns to sdpa before
        assert others.get(name) is None, f"this model's attention needs {name}: --attention sdpa"
    packed = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, heads, D) each
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)  # of queries and of keys
    window = (sliding_window - 1 if sliding_window else -1, 0)  # how many tokens back, and ahead
    return varlen_attn(*packed, *lengths, scale=scaling, window_size=window, **GROUPED)[None], None


AttentionInterface.register("varlen", packed_attention)


def attends_only(model: PreTrainedModel) -> bool:
    """Whether a model's layers mix tokens by attention alone, so that its mask decides what a token sees.

    Recurrent layers (Mamba's, linear attention, convolutions) would carry one response into the next.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    return not model._is_stateful and set(kinds) <= {"full_attention", "sliding_attention"}


def sharing_pays(model: PreTrainedModel, rows: tuple[int, float], shared: int, longest: int) -> bool:
    """Whether `shared` tokens, in rows of `longest`, cost less than `rows` = (B, T) do, padding included.

    In a shared row attention computes all pairs of tokens, because no fast kernel supports its mask; in an
    ordinary row it computes the causal half. Costs are multiply-adds, in the blocks.
    """
    text = model.config.get_text_config()
    if packs(model) or model.device.type == "cuda":
        return False  # packed rows share nothing, and no fast GPU kernel takes the mask
    if not attends_only(model) or (getattr(text, "sliding_window", None) or math.inf) < rows[1]:
        return False  # other layers ignore the mask, and the mask ignores a window
    width = text.num_hidden_layers * text.num_attention_heads * head_dim(text)
    weights = sum(parameter.numel() for block in blocks_of(model) for parameter in block.parameters())
    B, T = rows
    return shared * (weights + 2 * width * longest) < B * T * (weights + width * T)


def shared_hidden(model: PreTrainedModel, input_ids: Tensor, response_mask: Tensor) -> Tensor | None:
    """The decoder's last hidden states, (B, T, D), with the prompt of neighbouring rows computed once.

    Rows with the same prompt become one: the prompt, then their responses one after the other. Each token
    keeps its position, and a mask lets it see only its prompt and its own response. None if no prompt repeats
    or nothing is saved.
    """
    B, T = input_ids.shape
    places = torch.arange(T, device=input_ids.device).expand(B, T)
    response = response_mask.int()  # (B, T): argmax finds the first of the largest
    starts, ends = response.argmax(1, keepdim=True), T - response.flip(1).argmax(1, keepdim=True)  # (B, 1)
    alike = (input_ids[1:] == input_ids[:-1]) | (places[1:] >= starts[1:])  # (B - 1, T)
    repeats = alike.all(1) & (starts[1:] == starts[:-1]).squeeze(1) & (starts[1:] > 0).squeeze(1)
    leads = torch.cat([repeats.new_ones(1), ~repeats])  # (B,): begins a shared row
    group = leads.cumsum(0) - 1  # (B,)
    kept = (places < ends) & (leads[:, None] | (places >= starts))  # (B, T)
    order = kept.flatten().cumsum(0).view(B, T)  # kept tokens up to each, over all rows
    column = order - order[leads, 0][group][:, None]  # (B, T): where in its shared row a kept token goes
    R, L = int(group[-1]) + 1, int(column[kept].max()) + 1
    if not repeats.any() or not sharing_pays(model, (B, T), R * L, L):
        return None
    column = torch.where(kept, column, torch.where(places < starts, places, 0))  # prompts lie at the front
    row = group[:, None].expand(B, T)

    def laid_out(values, fill):
        return values.new_full((R, L), fill).index_put((row[kept], column[kept]), values[kept])

    part = torch.where(places < starts, 0, torch.arange(1, B + 1, device=places.device)[:, None])  # (B, T)
    part = laid_out(part, -1)  # (R, L): 0 in the prompt, then a number for each response, -1 for padding
    sees = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)  # (R, L, L)
    hidden = model.get_decoder()(
        input_ids=laid_out(input_ids, 0),
        position_ids=laid_out(places, 0),
        attention_mask=sees.tril()[:, None],  # (R, 1, L, L)
        use_cache=False,
    ).last_hidden_state  # (R, L, D)
    return hidden[row, column]


def _token_logps(model, input_ids, response_mask, temperature, with_entropy, entropy_grad):
    if response_mask is None:
        response_mask = torch.ones_like(input_ids)
    hidden = hidden_states(model, input_ids, response_mask)  # (B, T, D)
    wanted = response_mask.bool().clone()  # (B, T)
    wanted[:, 0] = False
    predictors, targets = hidden[:, :-1][wanted[:, 1:]], input_ids[wanted]  # (N, D), (N,)

    head = model.get_output_embeddings()
    chunk = max(1, LOGITS_AT_ONCE[hidden.device.type] // head.weight.shape[0])
    pieces = [
        checkpoint(
            _head_logps, some_hidden, some_targets, head.weight, head.bias, temperature, with_entropy,
            entropy_grad, use_reentrant=False,
        )
        for some_hidden, some_targets in zip(predictors.split(chunk), targets.split(chunk), strict=True)
    ]  # fmt: skip
    empty = hidden.new_zeros(input_ids.shape, dtype=torch.float32)  # (B, T)
    logps, entropies = (
        empty.masked_scatter(wanted, torch.cat(column)) for column in zip(*pieces, strict=True)
    )
    return (logps, entropies) if with_entropy else logps
