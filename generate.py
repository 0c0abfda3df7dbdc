"""Turn prompts into rollouts: vLLM samples, or plain transformers where vLLM does not install.

    python generate.py --model tiny/llama --data tiny --show 3

prints prompts, their answers with rewards, and the chosen pair token by token.
"""

import hashlib
import importlib.util
import logging
import math
import os
import random
import sys
import threading
import time
import warnings
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tqdm import tqdm
from transformers.hf_argparser import HfArg

from data import load_prompts
from model import TINY_MODEL, load_config, load_policy, load_tokenizer, token_logps
from ranks import rank
from run import Count, Positive, one_line_errors, parse_flags

MOST_MASKED = 1024  # ids of a request, in vLLM 0.32's model runner for GPUs
LEAST_MODEL_LEN = 128  # the canary of sync.py must fit, however short prompts and responses are


@dataclass
class Rollout:
    """One sampled response.

    logps: log-prob (nats) of each response token under the weights and at the temperature that sampled it.
    finish_reason: "stop" if the last response id is a stop token that the model sampled, "length" if it was
    cut.
    version: the step whose weights sampled it; None if no sync came before (evaluation).
    """

    prompt_id: str
    prompt_ids: list[int]
    response_ids: list[int]
    logps: list[float]
    finish_reason: str
    version: int | None


def request_seed(seed, step, prompt_id):
    """The seed of a prompt's samples in one step of a run, whatever is sampled before it or beside it."""
    digest = hashlib.sha256(f"{seed}/{step}/{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:7], "big")  # the engine's seeds are signed 64-bit, and sample i adds i


def encode_prompts(tokenizer, prompts):
    """Each prompt's conversation through the chat template, once, as ids that end where a response begins."""
    encoded = []
    for prompt in tqdm(prompts, desc="encoding prompts", delay=3, leave=False):
        ids = tokenizer.apply_chat_template(
            prompt.messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
            raise ValueError(
                f"prompt {prompt.id}: the chat template and the tokenizer both add the BOS token"
            )
        encoded.append(ids)
    return encoded


def fit_context(path, tokenizer, prompts, max_new_tokens=None, at_most=2048):
    """Tokens for a response, and for the longest prompt with it: (max_new_tokens, max_model_len).

    max_new_tokens=None takes what the model's context leaves after the longest prompt, up to at_most.
    ValueError in one line if the context cannot hold both.
    """
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts)]
    longest, context = max(lengths), load_config(path).get_text_config().max_position_embeddings
    left = context - longest
    if left < 1:
        text = prompts[lengths.index(longest)].messages[-1]["content"][:60]
        raise ValueError(f"--data: a prompt has {longest} tokens, {path} a context of {context}: {text!r}...")
    tokens = min(left, at_most) if max_new_tokens is None else max_new_tokens
    if not 1 <= tokens <= left:
        raise ValueError(
            f"--max-new-tokens {tokens}: the longest prompt has {longest} tokens, after which the context of "
            f"{path} has room for {left}"
        )
    return tokens, longest + tokens


def fit_tasks(path, tokenizer, sources, limits):
    """The longest context that any of some lists of prompts, one task each, needs under its run.Limits."""
    return max(fit_context(path, tokenizer, prompts, limits.of(prompts[0].task))[1] for prompts in sources)


class Busy:
    """Seconds in which at least one of some overlapping calls, from any thread, was under way."""

    def __init__(self):
        self.lock, self.calls, self.started, self.ended = threading.Lock(), 0, 0.0, 0.0

    def __enter__(self):
        with self.lock:
            if self.calls == 0:
                self.ended, self.started = self.seconds(), time.perf_counter()
            self.calls += 1

    def __exit__(self, *exception):
        with self.lock:
            self.ended, self.calls = self.seconds(), self.calls - 1
            self.started = time.perf_counter()

    def seconds(self):
        """All so far."""
        return self.ended + (time.perf_counter() - self.started if self.calls else 0.0)


class Generator:
    """What the loop knows of a sampler.

    `version` is the step whose weights it holds, which only sync() sets; None before the first sync.
    `elsewhere`: it has processors of its own, and samples while the trainer trains. `most_masked`: so many
    ids it can be told never to sample, on a GPU.
    """

    elsewhere, most_masked = False, math.inf

    def __init__(self, path, dtype):
        self.path, self.dtype = path, dtype
        self.tokenizer = load_tokenizer(path)
        self.version, self.busy = None, Busy()
        # A vocabulary is often padded to a round size. What no text can contain shall not be sampled.
        self.vocabulary = load_config(path).get_text_config().vocab_size
        padding = set(range(self.vocabulary)) - set(self.tokenizer.get_vocab().values())
        self.never = dict.fromkeys(sorted(padding), -100.0)  # added to their logits
        if torch.cuda.is_available() and len(self.never) > self.most_masked:
            found = f"{len(self.never)} ids of its vocabulary are no token's; vLLM masks {self.most_masked}"
            raise ValueError(f"--model {path}: {found} at most; cut its embedding to the tokenizer's size")

    def sample(self, prompts, n, temperature, top_p, max_tokens, seeds, turn=0):
        """n rollouts a prompt: list (P) of lists (n); sample i of prompt p has the seed seeds[p] + i.

        max_tokens: a number for all prompts, or a list (P). turn: of calls from several threads, that of the
        lowest comes first.
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

    def _complete(self, prompt_ids, n, temperature, top_p, limits, seeds, turn):
        """For each prompt, n triples (response_ids, logps, finish_reason)."""
        raise NotImplementedError

    def score(self, ids):
        """Log-prob (nats, temperature 1) of each id but the first, by each engine: lists of lists (T - 1)."""
        raise NotImplementedError

    def load_weights(self, weights):
        """Take (name, tensor) pairs. Returns the names that took a value, and all the names there are."""
        raise NotImplementedError

    def reset_prefix_cache(self):
        """Forget all cached keys and values. True if that was done."""
        raise NotImplementedError

    def stamp(self, step):
        """Name the weights that it holds: every rollout from now on carries this version."""
        self.version = step

    def close(self):
        """Free the model's memory."""
        raise NotImplementedError


def engine_settings(path, dtype, max_model_len, gpu_memory):
    """What a vLLM engine is started with, in this process or as a server (serve.py)."""
    settings = {
        "model": str(path),
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_model_len,
        "logprobs_mode": "processed_logprobs",  # after temperature and top-p: what a token was drawn from
        "distributed_executor_backend": "uni",  # no further process for the model
        "use_tqdm_on_load": False,
    }
    if torch.cuda.is_available():
        return {**settings, "gpu_memory_utilization": gpu_memory}
    # A seeded request whose prompt is cut into chunks crashes on the CPU ("CPU Generator does not use
    # offset"), so prompts go in whole. The cache holds 256 sequences of a small model; more wait their turn.
    return {
        **settings,
        "enforce_eager": True,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(8192, max_model_len),
        "kv_cache_memory_bytes": 2**30,
        # The n samples of a prompt share it in the prefix cache, in whole blocks. The default here is 128.
        "block_size": 32,
    }


class VLLMGenerator(Generator):
    """A vLLM engine in this process, on the trainer's device, so that weights go straight into it.

    sleeps: on a GPU, leave its memory to the trainer while nothing is sampled.
    """

    most_masked = MOST_MASKED

    def __init__(self, path, dtype, max_model_len, gpu_memory, sleeps=False):
        super().__init__(path, dtype)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vllm is imported
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        # The engine would pin this process's threads, the trainer's among them, to cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")  # of vLLM about itself
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it warns where there is no GPU
        import vllm

        self.vllm, self.sleeps, self.asleep = vllm, sleeps, False
        on_gpu = torch.cuda.is_available()
        print(f"generate: vLLM {vllm.__version__} on the {'GPU' if on_gpu else 'CPU'}, in this process")
        if not on_gpu:
            # Nothing big is compiled on the CPU, but small functions of the engine would be, for 20 s, by a
            # C++ compiler.
            torch._dynamo.config.disable = True
        settings = engine_settings(path, dtype, max_model_len, gpu_memory)
        self.llm = vllm.LLM(**settings, enable_sleep_mode=sleeps)

    def _wake(self):
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False

    def _complete(self, prompt_ids, n, temperature, top_p, limits, seeds, turn):
        self._wake()
        params = [
            self.vllm.SamplingParams(
                n=n, temperature=temperature, top_p=top_p, max_tokens=limit, seed=seed,
                logprobs=0, flat_logprobs=True, detokenize=False, logit_bias=self.never or None,
            )
            for limit, seed in zip(limits, seeds, strict=True)
        ]  # fmt: skip
        requests = [{"prompt_token_ids": ids} for ids in prompt_ids]
        # vLLM divides by the seconds that a bar has run, which are 0 of one that ranks.mute() disabled.
        bar = partial(tqdm, delay=3, leave=False) if rank() == 0 else False
        outputs = self.llm.generate(requests, params, use_tqdm=bar)
        if self.sleeps:
            # Level 1 keeps the weights, in host memory. Level 2 drops them, and an engine that sampled
            # without a sync since would write nonsense, without an error.
            self.llm.sleep(level=1)
            self.asleep = True
        return [
            [(list(o.token_ids), _sampled_logps(o), o.finish_reason) for o in output.outputs]
            for output in outputs
        ]

    def score(self, ids):
        self._wake()
        params = self.vllm.SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return [[output.prompt_logprobs[t][ids[t]].logprob for t in range(1, len(ids))]]

    def load_weights(self, weights):
        self._wake()  # a sleeping engine would put back on waking what it went to sleep with
        return self.llm.collective_rpc(load_in_worker, args=(weights, None))[0]

    def reset_prefix_cache(self):
        return self.llm.reset_prefix_cache()

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()  # ends torch.distributed's default group, too, if in here
        del self.llm


def _sampled_logps(output):
    """The sampled token's log-prob stands first at each position."""
    return [output.logprobs.logprobs[start] for start in output.logprobs.start_indices]


def load_in_worker(worker, weights, folder):
    """Reload the engine's weights, from pairs or from a folder; runs where the model is.

    Returns the names of the engine's own (fused) weights that took a value, and all there are.
    """
    model = worker.model_runner.get_model()
    expected = {name for name, _ in model.named_parameters()}
    loaded = set()
    load_weights = model.load_weights

    def recording(pairs):
        names = load_weights(pairs)
        loaded.update(names)
        return names

    # reload_weights only warns of a weight that got no value; the proof must know.
    model.load_weights = recording
    worker.reload_weights(weights_iterator=weights, weights_path=folder)
    del model.load_weights
    repack_tied_head(model)
    return loaded, expected


def repack_tied_head(model):
    """On the CPU, let an output head that is tied to the embedding see the new weights.

    vLLM 0.32 packs the head for its matrix kernel when it loads a model. A reload brings new values to the
    embedding's tensor, but a tied head is not a weight of its own, so its packed copy stays at the old ones.
    Nothing reports it.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


class TransformersGenerator(Generator):
    """Sampling by hand with a transformers model: slow, and short enough to be checked by eye."""

    def __init__(self, path, dtype, device):
        super().__init__(path, dtype)
        print(f"generate: transformers on {device} (slow; --engine vllm where it installs)")
        self.model = load_policy(path, device).to(dtype).eval()
        stop = self.model.generation_config.eos_token_id
        self.stop_ids = set(stop if isinstance(stop, list) else [stop])

    @torch.no_grad()
    def _complete(self, prompt_ids, n, temperature, top_p, limits, seeds, turn):
        # One prompt at a time: its n samples have the same length, so nothing is padded on the left.
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
    def score(self, ids):
        return token_logps(self.model, torch.tensor([ids], device=self.model.device))[:, 1:].tolist()

    @torch.no_grad()
    def load_weights(self, weights):
        parameters, loaded = dict(self.model.named_parameters()), set()
        for name, weight in weights:
            parameters[name].copy_(weight)
            loaded.add(name)
        return loaded, set(parameters)

    def reset_prefix_cache(self):
        return True  # it keeps none from one call to the next

    def close(self):
        del self.model


def keep_top_p(logits, top_p):
    """Set to -inf all but the smallest set of tokens whose probability reaches top_p: (n, V) -> (n, V)."""
    if top_p >= 1:
        return logits
    ordered, order = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # probability of all tokens that come first
    return logits.masked_fill((before >= top_p).scatter(-1, order, before >= top_p), -torch.inf)


def in_background(function, *arguments):
    """A future of function(*arguments), which runs in a thread that cannot keep the program from ending."""
    future = Future()

    def run():
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # for whoever asks for the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def finished(result):
    """A future that has this result."""
    future = Future()
    future.set_result(result)
    return future


def sample_ahead(generator, batches, steps, config):
    """Sample the batches of several steps. Returns a future a step: [(prompt, [rollout] * G)] * P.

    A generator with processors of its own is given each step at once and goes on while the trainer trains.
    Any other samples all in one call, here and now: larger batches, and one long tail instead of several.
    Each prompt of a step has a seed of its own, so the tokens are the same however many steps go together.
    """

    def sample(asked, turn=0):
        groups = generator.sample(
            [prompt for _, prompt in asked],
            n=config.samples_per_prompt,
            temperature=config.temperature,
            top_p=1.0,  # a truncated distribution would not be the one whose log-probs we train on
            max_tokens=[config.max_new_tokens.of(prompt.task) for _, prompt in asked],
            seeds=[request_seed(config.seed, step, prompt.id) for step, prompt in asked],
            turn=turn,
        )
        return [(prompt, group) for (_, prompt), group in zip(asked, groups, strict=True)]

    asked = [[(step, prompt) for prompt in next(batches)] for step in steps]
    if generator.elsewhere:
        turns = zip(steps, asked, strict=True)
        return [in_background(sample, batch, step) for step, batch in turns]
    sampled = iter(sample([pair for batch in asked for pair in batch]))
    return [finished([next(sampled) for _ in batch]) for batch in asked]


def check_engine(engine, sleeps=False, devices=(), urls=()):
    """ValueError in one line if the flags of a script name no generator that can be had here."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("--engine vllm: vLLM is not installed here; use --engine transformers")
    if devices and urls:
        raise ValueError("--generator-devices, --generator-url: servers to start or to use: not both")
    flag = "--generator-devices" if devices else "--generator-url"
    if (devices or urls) and engine != "vllm":
        raise ValueError(f"{flag}: these are vLLM servers; leave out --engine {engine}")
    if (devices or urls) and sleeps:
        raise ValueError(f"--engine-sleep: with {flag} there is no engine on the trainer's GPU")
    if devices and os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        raise ValueError(
            "--generator-devices: of one machine only; on others start serve.py: --generator-url"
        )
    if "cpu" in devices and torch.cuda.is_available():
        raise ValueError("--generator-devices cpu: the trainer has a GPU here; name other GPUs")
    mine = os.environ.get("CUDA_VISIBLE_DEVICES")  # after ranks.see_one_gpu
    if mine and mine in devices:
        raise ValueError(f"--generator-devices: a rank trains on {mine}; start fewer ranks, or name another")


def load_generator(
    engine, path, dtype, device, max_model_len, memory=0.4, sleeps=False, devices=(), urls=()
):  # fmt: skip
    """The generator that the flags name; dtype is a torch dtype.

    memory: share of the GPU that an engine in this process may take. sleeps: as for VLLMGenerator.
    devices, urls: where vLLM servers are started, or run already (serve.py).
    """
    if engine == "transformers":
        return TransformersGenerator(path, dtype, device)
    context = load_config(path).get_text_config().max_position_embeddings
    max_model_len = min(max(max_model_len, LEAST_MODEL_LEN), context)
    if devices or urls:
        from serve import ServedGenerator  # here, because serve.py imports this file

        return ServedGenerator(path, dtype, max_model_len, devices, urls)
    return VLLMGenerator(path, dtype, max_model_len, memory, sleeps)


@dataclass
class Config:
    model: str = HfArg(default=TINY_MODEL, help="A Hugging Face checkpoint: a folder, or a name on the Hub.")
    data: str = HfArg(default="tiny", help="Prompts of one task, as for the train scripts.")
    reward_model: str | None = HfArg(default=None, help="A checkpoint that scores chat.")
    show: Count = HfArg(default=3, help="So many prompts.")
    samples_per_prompt: Count = HfArg(default=8, help="G: responses to each prompt.")
    max_new_tokens: Count | None = HfArg(default=None, help="Default: what the context leaves, at most 2048.")
    temperature: Positive = HfArg(default=1.0, help="Sampling temperature.")
    seed: int = HfArg(default=0, help="Seed of the samples.")
    engine: Literal["vllm", "transformers"] = HfArg(default="vllm", help="As in the train scripts.")


def show_tokens(tokenizer, rollout):
    """One rollout as training sees it: the prompt (mask 0), dimmed, then each response token (mask 1).

    Behind each token stands the probability, in percent, that it was sampled with.
    """
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    prompt = tokenizer.decode(rollout.prompt_ids)
    tokens = [tokenizer.decode([i]).replace("\n", "\\n") for i in rollout.response_ids]
    shares = [
        f"{token}{dim}⟨{100 * math.exp(logp):.0f}⟩{plain}"
        for token, logp in zip(tokens, rollout.logps, strict=True)
    ]
    return f"{dim}{prompt}{plain}{''.join(shares)}"


def main(args=None):
    from rewards import Scorer
    from train_dpo import pick_pairs  # imported here because train_dpo imports this file

    config = parse_flags(Config, args)
    with one_line_errors():
        check_engine(config.engine)
        tokenizer = load_tokenizer(config.model)
        prompts = load_prompts(config.data)[: config.show]
        max_new_tokens, max_model_len = fit_context(config.model, tokenizer, prompts, config.max_new_tokens)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        scorer = Scorer([prompts[0].task], config.reward_model, device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = load_generator(config.engine, config.model, dtype, device, max_model_len)
    seeds = [request_seed(config.seed, 0, prompt.id) for prompt in prompts]
    groups = generator.sample(
        prompts, config.samples_per_prompt, config.temperature, 1.0, max_new_tokens, seeds
    )
    generator.close()
    with scorer:
        for prompt, group in zip(prompts, groups, strict=True):
            texts = [tokenizer.decode(r.response_ids, skip_special_tokens=True) for r in group]
            rewards = scorer.score([prompt] * len(texts), texts)
            answer = f", answer {prompt.answer}" if prompt.answer else ""
            print(f"\n=== prompt {prompt.id}{answer}\n{prompt.messages[-1]['content']}\n")
            for text, reward, rollout in zip(texts, rewards, group, strict=True):
                print(f"[{reward:.3g}] {text}" + (" [cut]" if rollout.finish_reason == "length" else ""))
            how = "bestworst" if prompt.task == "chat" else "random"
            for _, chosen, rejected in pick_pairs([rewards], how, random.Random(config.seed)):
                print(f"\nchosen:   {show_tokens(tokenizer, group[chosen])}")
                print(f"rejected: {show_tokens(tokenizer, group[rejected])}")


if __name__ == "__main__":
    main()
