"""Turn prompts into rollouts, with vLLM or, where that cannot be installed, with plain transformers."""

import ctypes
import gc
import hashlib
import importlib.util
import logging
import math
import os
import sys
import threading
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, takewhile
from typing import Any

from flags import Limits, TrainFlags

import torch
from jinja2 import TemplateError
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from data import MixedIterator, Prompt, cached
from model import (
    as_numbers,
    digest,
    digests,
    load_config,
    load_policy,
    load_tokenizer,
    set_date,
    stop_ids,
    token_logps,
    tokenizer_content,
)
from ranks import all_max, gather, rank, world_size
from rewards import Scorer
from serve import Receipt, Servers, engine_settings, in_background, load_in_worker

MOST_MASKED = 1024  # ids that a request can mask, in vLLM 0.32's model runner for GPUs
ENCODED_AT_ONCE = 1000  # prompts per call: a tokenizer holds some 20 KB for each until the call returns
LEAST_MODEL_LEN = 128  # sync.py's canary must fit, even if prompts and responses are short


@dataclass
class Rollout:
    """One sampled response.

    logps: log-prob (nats) of each response token under the weights and at the temperature that sampled it.
    finish_reason: "stop" if the last response id is a stop token that the model sampled, "length" if the
    response was cut.
    version: the step whose weights sampled it; None if no sync came before (evaluation).
    """

    prompt_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    logps: list[float]
    finish_reason: str
    version: int | None

    @property
    def ids(self) -> list[int]:
        """The prompt and the response."""
        return self.prompt_ids + self.response_ids


def request_seed(seed: int, step: int | str, prompt_id: str) -> int:
    """The seed of a prompt's samples in one step of a run. It does not depend on what else is sampled."""
    digest = hashlib.sha256(f"{seed}/{step}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big")  # the engine's seeds are signed 64-bit, and sample i adds i


EARLIER = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> list[list[int]]:
    """Render each prompt's conversation with the chat template, as ids that end where a response begins.

    With --system-block False they begin at the user's header: the prompt is rendered after a dummy exchange
    (EARLIER), and that exchange is cut off again, together with the system block before it.
    """
    return list(encode_each(tokenizer, prompts))


def encode_each(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> Iterator[list[int]]:
    """encode_prompts() as an iterator: the ids of all prompts of a large data set would fill the memory."""
    render = partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
    earlier = [] if getattr(tokenizer, "system_block", True) else EARLIER
    before = render(earlier) if earlier else []
    with tqdm(total=len(prompts), desc="encoding prompts", delay=3, leave=False) as bar:
        for start in range(0, len(prompts), ENCODED_AT_ONCE):
            some = prompts[start : start + ENCODED_AT_ONCE]
            try:
                encoded = render([[*earlier, *p.messages] for p in some], add_generation_prompt=True)
            except TemplateError as error:  # many templates have no system role
                remedy = "leave such turns out of the data, or take another model"
                raise ValueError(
                    f"--data: the chat template refuses a prompt's turns ({error}); {remedy}"
                ) from error
            for prompt, ids in zip(some, encoded, strict=True):
                if ids[: len(before)] != before:
                    raise ValueError("--system-block False: the chat template renders no turn by itself")
                ids = ids[len(before) :]
                if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
                    raise ValueError(
                        f"prompt {prompt.id}: the chat template and the tokenizer both add the BOS token"
                    )
                yield ids
            bar.update(len(some))


def longest_prompt(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> tuple[int, int]:
    """(tokens, index) of the longest prompt; of several, the first.

    All ranks call it together; each encodes a share.
    """
    first, ranks = rank(), world_size()
    mine = prompts[first::ranks]
    lengths = cached(
        "prompt-lengths",
        [prompt.messages for prompt in mine],
        lambda: tokenizer_content(tokenizer),
        lambda: [len(ids) for ids in encode_each(tokenizer, mine)],
    )
    longest = all_max(lengths)
    places = [first + i * ranks for i, length in enumerate(lengths) if length == longest]
    return int(longest), -int(all_max([-place for place in places]))


def decode(tokenizer: PreTrainedTokenizerBase, rollouts: list[Rollout]) -> list[str]:
    """The text of each response, without special tokens."""
    return tokenizer.batch_decode([r.response_ids for r in rollouts], skip_special_tokens=True)


def fit_context(
    path: str, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], max_new_tokens: int | None = None
) -> tuple[int, int]:
    """Tokens for a response, and for the longest prompt plus a response: (max_new_tokens, max_model_len).

    max_new_tokens=None takes what the model's context leaves after the longest prompt, up to 2048.
    ValueError in one line if the context cannot hold both. All ranks call it together.
    """
    longest, index = longest_prompt(tokenizer, prompts)
    context = load_config(path).get_text_config().max_position_embeddings
    left = context - longest
    if left < 1:
        text = prompts[index].messages[-1]["content"][:60]
        raise ValueError(f"--data: a prompt has {longest} tokens, {path} a context of {context}: {text!r}...")
    tokens = min(left, 2048) if max_new_tokens is None else max_new_tokens  # the paper's, on mathematics
    if not 1 <= tokens <= left:
        raise ValueError(
            f"--max-new-tokens {tokens}: the longest prompt has {longest} tokens, after which the context of "
            f"{path} has room for {left}"
        )
    return tokens, longest + tokens


def fit_tasks(
    path: str, tokenizer: PreTrainedTokenizerBase, prompt_lists: Iterable[list[Prompt]], limits: Limits
) -> int:
    """The longest context that any list of prompts, each of one task, needs. limits: --max-new-tokens."""
    return max(
        fit_context(path, tokenizer, prompts, limits.of(prompts[0].task))[1] for prompts in prompt_lists
    )


class Busy:
    """Counts the seconds during which at least one call, from any thread, is running."""

    def __init__(self):
        self.lock, self.calls, self.total, self.since = threading.RLock(), 0, 0.0, 0.0

    def _count(self, change):
        with self.lock:
            self.total, self.since = self.seconds(), time.perf_counter()
            self.calls += change

    def __enter__(self):
        self._count(1)

    def __exit__(self, *exception):
        self._count(-1)

    def seconds(self) -> float:
        """The total so far."""
        with self.lock:
            return self.total + (time.perf_counter() - self.since if self.calls else 0.0)


class Generator:
    """The sampler as the training loop sees it.

    `version`: the step whose weights it holds; None before the first sync. Only sync() sets it.
    `separate`: it has its own devices, so sampling overlaps with training; otherwise the two are colocated
    and take turns. `most_masked`: how many ids a request can exclude from sampling, on a GPU.
    """

    separate, most_masked = False, math.inf

    def __init__(self, path: str, dtype: torch.dtype):
        self.dtype = dtype
        self.tokenizer = load_tokenizer(path)
        self.stop_ids = stop_ids(path, self.tokenizer)  # the same in every engine
        self.version, self.busy = None, Busy()
        # sync.py sets these: whether the engine repacks weights, the gap that a copy may leave, and a count.
        self.repacks, self.tolerance, self.since_rehearsal = False, 0.0, 0
        self.sync_is_next = False  # Window sets this: nothing more is sampled before the next sync
        # A vocabulary is often padded to a round size. Never sample the ids of its padding.
        self.vocabulary = load_config(path).get_text_config().vocab_size
        padding = set(range(self.vocabulary)) - set(self.tokenizer.get_vocab().values())
        self.never = dict.fromkeys(sorted(padding), -100.0)  # vLLM adds this to their logits
        if torch.cuda.is_available() and len(self.never) > self.most_masked:
            found = f"{len(self.never)} ids of its vocabulary are no token's; vLLM masks {self.most_masked}"
            raise ValueError(f"--model {path}: {found} at most; cut its embedding to the tokenizer's size")

    def sample(
        self,
        prompts: list[Prompt],
        n: int,
        temperature: float,
        top_p: float,
        max_tokens: int | list[int],
        seeds: list[int],
        turn: int = 0,
    ) -> list[list[Rollout]]:
        """n rollouts per prompt: list (P) of lists (n); sample i of prompt p has the seed seeds[p] + i.

        max_tokens: a number for all prompts, or a list (P). turn: among calls from several threads, the one
        with the lowest turn comes first.
        """
        prompt_ids = encode_prompts(self.tokenizer, prompts)
        limits = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
        with self.busy:
            completions = self._complete(prompt_ids, n, temperature, top_p, limits, seeds, turn)
        for prompt, group in zip(prompts, completions, strict=True):
            self._check_group(prompt, group, n)
        return [
            [Rollout(prompt.id, ids, *completion, version=self.version) for completion in group]
            for prompt, ids, group in zip(prompts, prompt_ids, completions, strict=True)
        ]

    def _check_group(self, prompt, group, n):
        """RuntimeError unless an engine returned n responses of known tokens, with a log-prob for each."""
        if len(group) != n:
            raise RuntimeError(f"prompt {prompt.id}: the engine returned {len(group)} responses, not {n}")
        for ids, logps, _ in group:
            if not ids or len(logps) != len(ids):
                found = f"{len(ids)} tokens and {len(logps)} log-probs"
                raise RuntimeError(f"prompt {prompt.id}: the engine returned a response of {found}")
            if not 0 <= min(ids) <= max(ids) < self.vocabulary:
                outside = f"ids from {min(ids)} to {max(ids)}, of a vocabulary of {self.vocabulary}"
                raise RuntimeError(f"prompt {prompt.id}: the engine returned {outside}")
            if not math.isfinite(sum(logps)):
                raise RuntimeError(f"prompt {prompt.id}: the engine returned a log-prob that is not finite")

    def _complete(self, prompt_ids, n, temperature, top_p, limits, seeds, turn):
        """For each prompt, n triples (response_ids, logps, finish_reason)."""
        raise NotImplementedError

    def score(self, ids: list[int]) -> list[list[float]]:
        """Log-prob (nats, temperature 1) of each id but the first, by each engine: (engines, T - 1)."""
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[Receipt]:
        """Load (name, tensor) pairs. Returns what arrived at each engine."""
        raise NotImplementedError

    def reset_prefix_cache(self) -> bool:
        """Drop all cached keys and values. True if that worked."""
        raise NotImplementedError

    def stamp(self, step: int) -> None:
        """Set the version that every rollout from now on carries."""
        self.version = step

    def make_room(self) -> None:
        """Free device memory for another process until the next call, as far as that is possible."""

    def close(self) -> None:
        """Free the model's memory."""
        raise NotImplementedError


class VLLMGenerator(Generator):
    """A vLLM engine in this process, on the trainer's device, so that weights go straight into it.

    sleeps: on a GPU, free its memory for the trainer after every call; can_sleep: when make_room() asks.
    """

    most_masked = MOST_MASKED

    def __init__(
        self,
        path: str,
        dtype: torch.dtype,
        max_model_len: int,
        gpu_memory: str | float,
        sleeps: bool = False,
        can_sleep: bool = False,
    ):
        super().__init__(path, dtype)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # Otherwise the engine pins this process's threads, including the trainer's, to cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # vLLM's own
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it warns where there is no GPU
        import vllm

        self.vllm, self.sleeps, self.asleep = vllm, sleeps, 0  # asleep: vLLM's sleep level; 0: awake
        on_gpu = torch.cuda.is_available()
        print(f"generate: vLLM {vllm.__version__} on the {'GPU' if on_gpu else 'CPU'}, in this process")
        if not on_gpu:
            # The model is not compiled on the CPU, but a C++ compiler would spend 20 s on small functions.
            torch._dynamo.config.disable = True
        release_memory()  # of an engine left over after an error
        settings = engine_settings(path, dtype, max_model_len, gpu_memory)
        if on_gpu and world_size() > 1:
            # Autotuning gathers over vLLM's world, which in this process is our ranks: the engines would
            # wait for each other.
            settings["enable_flashinfer_autotune"] = False
        self.can_sleep = sleeps or (can_sleep and on_gpu)
        self.llm = vllm.LLM(**settings, enable_sleep_mode=self.can_sleep)

    def _wake(self, for_weights=False):
        if self.asleep == 2 and not for_weights:
            raise RuntimeError("generate: the engine has dropped its weights, and no sync has come since")
        if self.asleep:
            self.llm.wake_up()
            self.asleep = 0

    def _complete(self, prompt_ids, n, temperature, top_p, limits, seeds, turn):
        self._wake()
        params = [
            self.vllm.SamplingParams(
                n=n, temperature=temperature, top_p=top_p, max_tokens=limit, seed=seed,
                logprobs=0, flat_logprobs=True, detokenize=False, logit_bias=self.never or None,
                stop_token_ids=self.stop_ids,
            )
            for limit, seed in zip(limits, seeds, strict=True)
        ]  # fmt: skip
        requests = [{"prompt_token_ids": ids} for ids in prompt_ids]
        # vLLM divides by the bar's elapsed seconds, which are 0 for a disabled bar.
        bar = partial(tqdm, delay=3, leave=False) if rank() == 0 and sys.stderr.isatty() else False
        outputs = self.llm.generate(requests, params, use_tqdm=bar)
        if self.sleeps:
            self.make_room()
        return [
            [(list(o.token_ids), _sampled_logps(o), o.finish_reason) for o in output.outputs]
            for output in outputs
        ]

    def make_room(self) -> None:
        if self.can_sleep and not self.asleep:
            # Level 1 copies the weights to host memory. Level 2 drops them, so a sync must come before the
            # engine samples again, or it samples nonsense. A rehearsal needs the old weights, too.
            self.asleep = 2 if self.sync_is_next and not self.repacks else 1
            self.llm.sleep(level=self.asleep)

    def score(self, ids: list[int]) -> list[list[float]]:
        self._wake()
        params = self.vllm.SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return [[output.prompt_logprobs[t][ids[t]].logprob for t in range(1, len(ids))]]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[Receipt]:
        self._wake(for_weights=True)  # first: waking restores the weights that the engine went to sleep with
        return self.llm.collective_rpc(load_in_worker, args=(weights, None))

    def reset_prefix_cache(self) -> bool:
        return self.llm.reset_prefix_cache()

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()  # in this process it ends torch.distributed's group, too
        del self.llm
        release_memory()


def _sampled_logps(output):
    """The sampled tokens' log-probs: vLLM lists the sampled token first at each position."""
    return [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]


def release_memory() -> None:
    """Free what only reference cycles hold, such as a closed engine, and return the memory to Linux."""
    gc.collect()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim:
        malloc_trim(0)


class ServedGenerator(Servers, Generator):
    """vLLM servers on separate devices or machines."""

    separate, most_masked = True, MOST_MASKED

    def __init__(self, path: str, dtype: torch.dtype, *servers: Any):
        """servers: the other arguments of serve.Servers."""
        Generator.__init__(self, path, dtype)
        Servers.__init__(self, path, dtype, *servers)

    def _complete(self, prompt_ids, n, temperature, top_p, limits, seeds, turn):
        sampling = {"n": n, "temperature": temperature, "top_p": top_p, "stop_token_ids": self.stop_ids}
        sampling["logit_bias"] = self.never or None
        return self.complete(prompt_ids, sampling, limits, seeds, turn, self.version)

    def stamp(self, step: int) -> None:
        super().stamp(step)
        self.name_weights(step)


class TransformersGenerator(Generator):
    """Samples with a plain transformers model: slow, but short enough to check by eye."""

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device):
        super().__init__(path, dtype)
        print(f"generate: transformers on {device} (slow; --engine vllm where it installs)")
        self.model = load_policy(path, device, dtype=dtype)

    @torch.no_grad()
    def _complete(self, prompt_ids, n, temperature, top_p, limits, seeds, turn):
        # One prompt at a time: its n samples have the same length, so no left padding is needed.
        groups = []
        bar = tqdm(prompt_ids, desc="sampling", delay=3, leave=False)
        for ids, limit, seed in zip(bar, limits, seeds, strict=True):
            draws = [torch.Generator().manual_seed(seed + i) for i in range(n)]
            groups.append(self._complete_one(ids, draws, temperature, top_p, limit))
        return groups

    def _complete_one(self, ids, draws, temperature, top_p, max_tokens):
        n, cache = len(draws), None
        next_ids = torch.tensor([ids] * n, device=self.model.device)  # (n, T), then (n, 1)
        tokens, logps = [[] for _ in draws], [[] for _ in draws]
        unfinished = set(range(n))
        for _ in range(max_tokens):
            output = self.model(next_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            logits = output.logits[:, -1].float().cpu()  # (n, V)
            logits[:, list(self.never)] = -torch.inf
            logits /= temperature
            log_probs = keep_top_p(logits, top_p).log_softmax(-1)  # (n, V)
            picked = [torch.multinomial(log_probs[i].exp(), 1, generator=draws[i]).item() for i in range(n)]
            for i in sorted(unfinished):
                tokens[i].append(picked[i])
                logps[i].append(log_probs[i, picked[i]].item())
                if tokens[i][-1] in self.stop_ids:
                    unfinished.discard(i)
            if not unfinished:
                break
            next_ids = torch.tensor(picked, device=self.model.device)[:, None]  # (n, 1)
        return [(tokens[i], logps[i], "length" if i in unfinished else "stop") for i in range(n)]

    @torch.no_grad()
    def score(self, ids: list[int]) -> list[list[float]]:
        return token_logps(self.model, torch.tensor([ids], device=self.model.device))[:, 1:].tolist()

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> list[Receipt]:
        parameters, arrived = dict(self.model.named_parameters()), {}
        for name, weight in weights:
            parameters[name].copy_(weight)
            arrived[name] = digest(weight)
        arrived, held = as_numbers(arrived), digests(self.model, self.dtype)
        unequal = [name for name in arrived if held[name] != arrived[name]]
        return [Receipt(arrived, sorted(parameters.keys() - arrived), unequal, unseen=[])]

    def reset_prefix_cache(self) -> bool:
        return True  # no cache outlives a call

    def close(self) -> None:
        del self.model


def keep_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches top_p, others -inf: (n, V) -> (n, V)."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # probability of all likelier tokens
    return logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)


def check_engine(
    engine: str,
    sleeps: bool = False,
    devices: list[str] | tuple = (),
    urls: list[str] | tuple = (),
    token_file: str | None = None,
    **_: Any,
) -> None:
    """ValueError in one line if settings (load_generator's) name a generator that is not available here."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("--engine vllm: vLLM is not installed here; use --engine transformers")
    if devices and urls:
        raise ValueError("--generator-devices starts servers, --generator-url uses running ones: not both")
    if token_file and not urls:
        raise ValueError(
            f"--generator-token-file {token_file}: is for running servers: give --generator-url, too"
        )
    gpus = [device for device in devices if device != "cpu"]
    if len(set(gpus)) < len(gpus) or any("," in gpu for gpu in gpus):
        raise ValueError(
            f"--generator-devices {' '.join(devices)}: name each GPU once, separated by spaces: 6 7"
        )
    flag = "--generator-devices" if devices else "--generator-url"
    if (devices or urls) and engine != "vllm":
        raise ValueError(f"{flag}: these are vLLM servers; leave out --engine {engine}")
    if (devices or urls) and sleeps:
        raise ValueError(f"--engine-sleep: with {flag} there is no engine on the trainer's GPU")
    if sleeps and (engine != "vllm" or not torch.cuda.is_available()):
        raise ValueError("--engine-sleep: is for a vLLM engine on the trainer's GPU; leave it out")
    here = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun sets both; vLLM or a cluster may set only WORLD_SIZE
    if devices and here and os.environ.get("WORLD_SIZE") != here:
        raise ValueError(
            "--generator-devices: starts servers on one machine only; leave it out, start serve.py on each "
            "machine, and give --generator-url"
        )
    if "cpu" in devices and torch.cuda.is_available():
        raise ValueError("--generator-devices cpu: the trainer has a GPU here; name other GPUs")
    mine = os.environ.get("CUDA_VISIBLE_DEVICES")  # after ranks.see_one_gpu
    if mine and mine in devices:
        raise ValueError(f"--generator-devices: a rank trains on {mine}; start fewer ranks, or name another")


def load_generator(
    engine: str,
    path: str,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    *,
    memory: str | float = 0.4,
    sleeps: bool = False,
    can_sleep: bool = False,
    devices: list[str] | tuple = (),
    urls: list[str] | tuple = (),
    system_block: bool = True,
    date: str | None = None,
    token_file: str | None = None,
) -> Generator:
    """The generator that the flags name.

    memory: as flags.EngineMemory, of an engine in this process. sleeps, can_sleep: as for VLLMGenerator.
    system_block, date: as for model.load_tokenizer.
    devices: where to start vLLM servers. urls: servers that already run (serve.py). token_file: holds their
    token, unless the variable GENERATOR_TOKEN does.
    """
    context = load_config(path).get_text_config().max_position_embeddings
    max_model_len = min(max(max_model_len, LEAST_MODEL_LEN), context)
    if engine == "transformers":
        generator = TransformersGenerator(path, dtype, device)
    elif devices or urls:
        generator = ServedGenerator(path, dtype, max_model_len, list(devices), list(urls), token_file)
    else:
        generator = VLLMGenerator(path, dtype, max_model_len, memory, sleeps, can_sleep)
    generator.tokenizer.system_block = system_block
    set_date(generator.tokenizer, date)
    return generator


class Window:
    """The batches of the coming steps, sampled ahead: until the next sync the generator is frozen.

    A colocated generator samples them all in one call, when the first is taken: larger batches, and one long
    tail instead of several. A separate generator gets each step as soon as it may sample it, and its sampling
    overlaps with training. Every prompt of a step has its own seed, so the tokens do not depend on how many
    steps are sampled together. Responses sampled ahead are also graded ahead, in the scorer's processes.
    """

    def __init__(self, generator: Generator, batches: MixedIterator, scorer: Scorer, config: TrainFlags):
        self.generator, self.batches, self.scorer, self.config = generator, batches, scorer, config
        self.sampled: deque[Future] = deque()  # of the coming steps, never past the next sync

    def take(self, step: int) -> list[tuple[Prompt, list[Rollout]]]:
        """This rank's batch of a step: [(prompt, [rollout] * G)] * P."""
        config = self.config
        if not self.sampled or self.generator.separate:
            until_sync = config.sync_every - step % config.sync_every
            end = step + int(min(config.ahead, until_sync, config.steps - step))
            self.generator.sync_is_next = end == step + until_sync
            self._sample(range(step + len(self.sampled), end))
        batch = self.sampled.popleft().result()
        (version,) = {rollout.version for _, group in batch for rollout in group}
        assert step - version < config.sync_every, f"step {step}: weights {step - version} steps old"
        return batch

    def _sample(self, steps):
        """Append a future for each step's batch."""
        drawn = [(step, next(self.batches)) for step in steps]
        if self.generator.separate:
            self.sampled.extend(in_background(self._sample_alone, *one) for one in drawn)
        elif drawn:
            self.sampled.extend(map(finished, self._sample_now(drawn)))

    def _sample_alone(self, step, prompts):
        return self._sample_now([(step, prompts)], turn=step)[0]

    def _sample_now(self, drawn, turn=0):
        """[(step, prompts)] -> each step's batch, [(prompt, [rollout] * G)] * P, whose grading has begun."""
        config, requests = self.config, [(step, prompt) for step, prompts in drawn for prompt in prompts]
        groups = self.generator.sample(
            [prompt for _, prompt in requests],
            n=config.samples_per_prompt,
            temperature=config.temperature,
            top_p=1.0,  # a truncated distribution would not be the one whose log-probs we train on
            max_tokens=[config.max_new_tokens.of(prompt.task) for _, prompt in requests],
            seeds=[request_seed(config.seed, step, prompt.id) for step, prompt in requests],
            turn=turn,
        )
        sampled = iter(groups)
        batches = [[(prompt, next(sampled)) for prompt in prompts] for _, prompts in drawn]
        for batch in batches:
            self._grade(batch)
        return batches

    def _grade(self, batch):
        """Begin to grade a step's responses. Texts are decoded only if the scorer takes them."""
        rollouts = (rollout for _, group in batch for rollout in group)
        texts = (decode(self.generator.tokenizer, [rollout])[0] for rollout in rollouts)
        self.scorer.begin([prompt for prompt, group in batch for _ in group], texts)

    def state(self, step: int) -> tuple[dict[str, Any], list[dict]]:
        """For a checkpoint before `step`: what was drawn, and on rank 0 the groups sampled ahead, as rows."""

        # Steps that a separate generator has not finished on all ranks, or could not because a server died,
        # are sampled again with the same seeds.
        def whole(future):
            return future.done() and future.exception() is None

        done = -int(all_max([-len(list(takewhile(whole, self.sampled)))]))
        ahead = [future.result() for future in islice(self.sampled, done)]
        rows = gather(
            {"step": step + i, "prompt_id": prompt.id, "rollouts": [asdict(rollout) for rollout in group]}
            for i, batch in enumerate(ahead)
            for prompt, group in batch
        )
        return {"ahead": done, "batches": self.batches.state_dict()}, rows

    def load_state(self, step: int, state: dict[str, Any], rows: list[dict]) -> None:
        """Continue with `step` from what state() returned. The number of ranks may have changed."""
        self.batches.load_state_dict([{**part, "step": step} for part in state["batches"]])
        groups = defaultdict(dict)
        for row in rows:
            groups[row["step"]][row["prompt_id"]] = [Rollout(**rollout) for rollout in row["rollouts"]]
        self.sampled = deque(
            finished([(prompt, groups[number][prompt.id]) for prompt in next(self.batches)])
            for number in range(step, step + state["ahead"])
        )
        for batch in self.sampled:
            self._grade(batch.result())


def finished(result: Any) -> Future:
    """A future that already has its result."""
    future = Future()
    future.set_result(result)
    return future
