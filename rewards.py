"""Score a response: Math-Verify says whether a math answer is right, a reward model how good any response is
(paper section 4).

`math_reward` is the reward itself, a pure function. `MathVerifier` applies it to what a model wrote, which
takes more care: a sampled `9^{9^{9^9}}`, or a text on which Math-Verify's regular expressions backtrack, runs
for hours inside C code. Math-Verify's own timeouts are SIGALRM handlers in Python, which cannot interrupt C
code (its issues 55 and 65), and a process pool does not get a stuck worker back. So each worker is a
subprocess of this very file that grades one item at a time; the parent kills and replaces the late ones.

    with MathVerifier(workers=2) as verifier:
        scores = verifier.score([(r"The final answer is $\\boxed{1/2}$. I hope it is correct.", "0.5")])

Deliberately simple: one thread, one item in flight per worker, POSIX only (a selector on pipes, signals).
"""

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from functools import cache, lru_cache
from pathlib import Path

from tqdm import tqdm

# Math-Verify's regular expressions take up to the cube of the length. Its end is what is kept of a response
# because the prompt asks for the answer last; 2048 tokens, the paper's limit, are about 7,000 characters.
MAX_CHARS = 8192
MEMORY_BYTES = 2 << 30  # address space of a worker, normally 0.1 GB; a runaway must not starve the trainer
START_S = 300.0  # importing sympy takes 1 s, but many ranks may start at once from a slow network disk
DEATHS_IN_A_ROW = 8  # one hostile response can kill a worker; so many in a row are a broken installation


@cache
def _targets():
    """What Math-Verify looks for (in a gold, in a response), as the paper sets it."""
    from math_verify import LatexExtractionConfig  # imports sympy: only a process that grades pays for it
    from math_verify.parser import NormalizationConfig

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns where its timeouts are off
    gold = NormalizationConfig(
        basic_latex=True, units=True, malformed_operators=True, nits=True, boxed="none", equations=False
    )
    return [LatexExtractionConfig(normalization_config=gold)], [LatexExtractionConfig(boxed_match_priority=0)]


@lru_cache(maxsize=4096)  # a gold comes back with every response of its group
def _parse_gold(gold):
    """Gold text -> what Math-Verify can make of it, [] if nothing. A bare gold is wrapped in $...$."""
    from math_verify import parse

    text = " ".join(gold.split())  # to LaTeX a line break is a space, to Math-Verify it would end the $...$
    return parse(text if text.startswith("$") else f"${text}$", _targets()[0], parsing_timeout=None)


def _grade(response, gold):
    """-> (reward, whether anything was extracted from the response)."""
    from math_verify import parse, verify

    prediction = parse(response[-MAX_CHARS:], _targets()[1], parsing_timeout=None)
    # Not symmetric, the gold comes first. float_rounding is the paper's "precision 6".
    right = verify(_parse_gold(gold), prediction, float_rounding=6, timeout_seconds=None)
    return float(right), bool(prediction)


def _usable(gold):
    """Whether a response that states the gold is right: a broken `\\frac{` "parses", but only as text."""
    return _grade(f"$\\boxed{{{gold}}}$", gold)[0] == 1.0


def math_reward(response: str, gold: str) -> float:
    """1.0 if the answer in `response` equals `gold`, else 0.0 (paper section 4).

    The answer must be in LaTeX (`$...$`, `\\[...\\]`, `\\boxed{...}`): "The answer is 8" in prose earns 0.0.
    Boxed answers come before others, later ones before earlier. With a gold that cannot be parsed every
    response earns 0.0; `MathVerifier.unparsable` finds such golds. There is no deadline here: for what a
    model wrote use `MathVerifier`.

    >>> math_reward(r"Half of it, so $\\boxed{\\frac{1}{2}}$", "0.5")
    1.0
    """
    return _grade(response, gold)[0]


def serve(timeout_s: float):
    """The worker: [function, text...] lines in, lines with the returned value out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent is gone: end without a traceback
    # The kernel's own action on SIGALRM ends the process, in C code too. The parent is quicker; this is for
    # a parent that was killed, so that a stuck worker does not run on for days.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":  # elsewhere RLIMIT_AS is refused or ignored
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        if hard == resource.RLIM_INFINITY or hard > MEMORY_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between the replies
    _grade("$1$", "1")  # imports, and compiles the regular expressions, before any deadline runs
    print(json.dumps("ready"), file=replies, flush=True)
    for line in sys.stdin:
        function, *texts = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s)
        reply = {"grade": _grade, "usable": _usable}[function](*texts)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(reply), file=replies, flush=True)


class _Worker:
    """The parent's end of one worker; `task` is "starting", "idle", or the number of the item it grades."""

    def __init__(self, timeout_s):
        # Enough to start this Python and nothing else: no token or key beside text that a model made. The
        # hash seed is fixed because sympy orders terms by hash, and one text must always score the same.
        kept = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        self.process = subprocess.Popen(
            # -P: this folder stays off the path, where data.py or model.py could hide a library's module
            [sys.executable, "-P", os.path.abspath(__file__), "--serve", str(timeout_s)],
            env=environment | {"PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for the run, which ends after its step; they end with it
        )
        self.timeout_s, self.task, self.deadline = timeout_s, "starting", time.monotonic() + START_S

    def send(self, number, task):
        self.process.stdin.write(json.dumps(task).encode() + b"\n")
        self.task, self.deadline = number, time.monotonic() + self.timeout_s

    def receive(self):
        """-> the reply, or None if the process has died. A reply is one short write, hence one read."""
        line = self.process.stdout.read(4096)
        self.task, self.deadline = "idle", float("inf")
        return json.loads(line) if line else None

    def stop(self):
        self.process.kill()
        self.process.wait()  # otherwise it stays a zombie
        self.process.stdin.close()
        self.process.stdout.close()


class MathVerifier:
    """`math_reward` in `workers` processes, with a deadline of `timeout_s` seconds for each item.

    Workers (70 MB each; by default this rank's share of the cores, at most 4) start in the background: it
    returns at once. Counters, over all calls: `timeouts`, items that hit the deadline; `restarts`, workers
    replaced after a timeout or a death of their own; `parse_failures`, responses from which nothing was
    extracted. `per_s`: responses a second that each worker scored in the last call.
    Not thread-safe. Raises ValueError for bad arguments, RuntimeError when workers cannot start.
    """

    def __init__(self, workers: int | None = None, timeout_s: float = 10.0):
        if workers is None:
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's
            workers = max(1, min(4, (os.cpu_count() or 1) // ranks_here))
        if workers < 1 or not timeout_s > 0:
            raise ValueError(f"MathVerifier: workers={workers} must be >= 1, timeout_s={timeout_s} > 0")
        self.timeout_s = timeout_s
        self.timeouts = self.restarts = self.parse_failures = self._deaths = 0
        self.per_s = 0.0
        self._selector = selectors.DefaultSelector()
        self._workers = []
        for _ in range(workers):
            self._start()

    def score(self, items: list[tuple[str, str]]) -> list[float]:
        """(response, gold) pairs -> `math_reward` of each, in order; 0.0 for an item that gets no reply."""
        scores, start = [0.0] * len(items), time.monotonic()
        for number, reply in self._run([("grade", response, gold) for response, gold in items]):
            if reply is not None:
                scores[number], extracted = reply
                self.parse_failures += not extracted
        if items:
            self.per_s = len(items) / (time.monotonic() - start) / len(self._workers)
        return scores

    def unparsable(self, golds: list[str]) -> list[int]:
        """Indices of the golds in which Math-Verify finds nothing; every response to them would score 0.0."""
        unique = list(dict.fromkeys(golds))  # a large set repeats its answers: half of them are small numbers
        replies = self._run([("usable", gold) for gold in unique])
        replies = tqdm(replies, desc="checking gold answers", total=len(unique), delay=3)
        bad = {unique[number] for number, usable in replies if not usable}
        return [index for index, gold in enumerate(golds) if gold in bad]

    def close(self):
        """Kill and reap the workers; they hold nothing worth saving."""
        for worker in list(self._workers):
            self._remove(worker)
        self._selector.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _start(self):
        worker = _Worker(self.timeout_s)
        self._workers.append(worker)
        self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def _remove(self, worker):
        self._selector.unregister(worker.process.stdout)
        self._workers.remove(worker)
        worker.stop()

    def _replace(self, worker):
        self.restarts += 1
        self._remove(worker)
        self._start()

    def _run(self, tasks):
        """Yield (number, reply) of each task as it finishes; reply None: its worker was late or died."""
        if not self._workers:
            raise ValueError("MathVerifier: closed, it cannot score")
        for number, (_, *texts) in enumerate(tasks):
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"MathVerifier: item {number} is not text: {str(texts)[-100:]}")
        for worker in [w for w in self._workers if isinstance(w.task, int)]:
            self._replace(worker)  # Ctrl-C left it busy; its reply would be taken for one of this call

        queue, left = deque(enumerate(tasks)), len(tasks)
        while left:
            for worker in [w for w in self._workers if w.task == "idle"][: len(queue)]:
                number, task = queue.popleft()
                try:
                    worker.send(number, task)
                except BrokenPipeError:  # it died while idle, which is not this task's fault
                    queue.appendleft((number, task))
                    self._replace(worker)
            patience = min(worker.deadline for worker in self._workers) - time.monotonic()
            readable = {key.data for key, _ in self._selector.select(max(0.0, patience))}
            for worker in list(self._workers):
                number, late = worker.task, time.monotonic() >= worker.deadline
                if worker not in readable and not late:
                    continue
                reply = worker.receive() if worker in readable else None
                if reply is None and number == "starting":
                    raise RuntimeError(
                        f"rewards: a grader worker died while starting or took over {START_S:.0f} s; what it "
                        "printed is above; `python -c 'import math_verify'` shows whether that is installed"
                    )
                if isinstance(number, int):
                    self._deaths = self._deaths + 1 if reply is None and worker in readable else 0
                if self._deaths > DEATHS_IN_A_ROW:
                    raise RuntimeError(
                        f"rewards: {self._deaths} grader workers in a row died, each on its own item: see "
                        "what they printed; a broken grader must not pass for wrong answers"
                    )
                if reply is None:
                    self.timeouts += worker not in readable
                    self._replace(worker)
                if isinstance(number, int):
                    left -= 1
                    yield number, reply


@cache
def _llama_with_v_head():
    """Athene-RM-8B's class, which transformers lacks: a Llama, and a linear head without bias."""
    import torch
    from transformers import LlamaModel, LlamaPreTrainedModel
    from transformers.modeling_outputs import SequenceClassifierOutput

    class LlamaWithVHead(LlamaPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.model = LlamaModel(config)
            self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
            self.post_init()

        def forward(self, input_ids, attention_mask):
            """Right-padded rows that end with the CLS token, (B, T), and their mask -> .logits (B, 1)."""
            hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, D)
            rows = torch.arange(len(hidden), device=hidden.device)
            at_cls = hidden[rows, attention_mask.sum(-1) - 1]  # (B, D)
            # In float32: bfloat16 has steps of 1/32 at a score of 5, which makes ties of different scores.
            logits = torch.nn.functional.linear(at_cls.float(), self.v_head.weight.float())
            return SequenceClassifierOutput(logits=logits)

    return LlamaWithVHead


def _load_reward_model(path, dtype):
    """A checkpoint of either form -> (model, tokenizer, id of the CLS token to append or None)."""
    from huggingface_hub import snapshot_download
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    files = ["*.json", "*.jinja", "*.model", "*.safetensors"]
    try:
        folder = path if os.path.isdir(path) else snapshot_download(str(path), allow_patterns=files)
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        names = set()
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                names.update(weights.keys())
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a checkpoint, in a folder or on the Hub ({reason})") from error
    if not names:
        raise ValueError(f"{path}: no *.safetensors: save the weights as such, other formats can run code")

    has_v_head, cls_id = "v_head.weight" in names and config.model_type == "llama", None
    if not has_v_head and config.num_labels != 1:
        found = f"{', '.join(config.architectures or [])} without v_head.weight, {config.num_labels} labels"
        remedy = "pass a Llama with a v_head, or a sequence classifier with num_labels 1"
        raise ValueError(f"{path}: not a reward model ({found}): {remedy}")
    if tokenizer.chat_template is None:
        raise ValueError(f"{path}: no chat template: add the one that it was trained with")
    if not has_v_head and config.get_text_config().pad_token_id is None:
        raise ValueError(f"{path}: no pad token, before which a row is read: set pad_token_id in its config")
    if has_v_head:
        cls_id = getattr(config, "CLS_ID", tokenizer.cls_token_id)
        if cls_id is None:
            raise ValueError(f"{path}: no CLS token: set CLS_ID in its config (in Athene-RM-8B it is 128003)")
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        if cls_id in tokenizer.apply_chat_template(probe, return_dict=False):
            raise ValueError(f"{path}: its chat template writes the CLS token, as we do: take it out there")

    kind = _llama_with_v_head() if has_v_head else AutoModelForSequenceClassification
    model, report = kind.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True,
        ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    wrong = {problem: sorted(map(str, found))[:3] for problem, found in report.items() if found}
    if wrong:  # transformers only warns, and scores with random numbers for what is missing
        raise ValueError(f"{path}: the weights are not those of its config: {wrong}: save the model again")
    return model.eval(), tokenizer, cls_id


class RewardModel:
    """A learned reward: the raw score, without a sigmoid, of a conversation that ends with a response.

    Two forms of checkpoint, told apart by the names of the weights. With `v_head.weight` it is the paper's,
    Athene-RM-8B: a Llama, and a linear head read at a CLS token that we append to the conversation (CLS_ID in
    config.json, else the tokenizer's). Without, it is any AutoModelForSequenceClassification with one label,
    read where transformers reads it: at the last token that is not padding.

    device: by default the GPU if there is one. In Python, "cuda:1" leaves the first to the trainer.
    dtype: by default bfloat16 on a GPU, float32 on a CPU. A v_head is float32 always; the head of another
    classifier is not, and bfloat16 makes ties of scores that differ by less than 1 %.
    max_length: of a conversation, in tokens, by default the model's limit. A response is cut to fit it;
    `truncated` counts those over all calls.
    Where there are several ranks it is sharded over them, and they score together.
    batch_tokens: of one forward, padding included; by default 16384 on a GPU, 2048 on a CPU, whose caches a
    larger one leaves (twice as slow).
    Raises ValueError, in one line, for a checkpoint or a conversation that cannot be scored.
    """

    def __init__(self, path, device=None, dtype=None, max_length=None, batch_tokens=None):
        import torch  # here, not above: the workers that grade start without it

        from model import shard

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        model, self.tokenizer, self.cls_id = _load_reward_model(path, dtype)
        self.model, self.truncated = shard(model, self.device, model.dtype), 0
        self.batch_tokens = batch_tokens or (16384 if self.device.type == "cuda" else 2048)
        config, limit = model.config.get_text_config(), self.tokenizer.model_max_length  # 1e30: none
        self.max_length = max_length or min(limit, getattr(config, "max_position_embeddings", limit))
        self.pad_id = config.pad_token_id or 0  # with a CLS token any id will do
        self.plain_cls = None
        if self.cls_id is not None:
            self.plain_cls = self.tokenizer.encode(
                self.tokenizer.decode([self.cls_id]), add_special_tokens=False, split_special_tokens=True
            )

    def has_room(self, messages):
        """Whether a response to these messages, the user's last, can be scored: one token of it must fit."""
        if sum(len(turn["content"].encode()) for turn in messages) < self.max_length - 100 * len(messages):
            return True  # a token is a byte or more, and a template writes less than 100 a turn
        ids = self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": "."}], return_dict=False
        )
        return len(ids) + (self.cls_id is not None) <= self.max_length

    def score(self, conversations: list[list[dict[str, str]]]) -> list[float]:
        """Lists of {"role", "content"}, the assistant's response last -> the score of each, in order."""
        import torch

        from ranks import same_number

        rows = [self._encode(number, messages) for number, messages in enumerate(conversations)]
        scores = [0.0] * len(rows)
        for batch in tqdm(same_number(self._batches(rows)), desc="reward model", delay=3, leave=False):
            longest = max((len(rows[index]) for index in batch), default=1)
            padded = [rows[index] + [self.pad_id] * (longest - len(rows[index])) for index in batch]
            real = [[1] * len(rows[index]) + [0] * (longest - len(rows[index])) for index in batch]
            input_ids = torch.tensor(padded or [[self.pad_id]], device=self.device)  # (B, T)
            attention_mask = torch.tensor(real or [[1]], device=self.device)  # (B, T)
            with torch.no_grad():  # of an empty batch, too: the ranks that share a sharded model count on it
                logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # (B, 1)
            for index, score in zip(batch, logits[: len(batch), 0].tolist(), strict=True):
                scores[index] = score
        return scores

    def _batches(self, rows):
        """Yield lists of indices into rows: of like lengths, and at most batch_tokens with padding."""
        batch = []
        for index in sorted(range(len(rows)), key=lambda index: len(rows[index])):
            if batch and (len(batch) + 1) * len(rows[index]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _encode(self, number, messages):
        """A conversation -> its token ids, at most max_length; the response is cut, and nothing else.

        So what the template writes after a response still ends the row: models are trained to be read there.
        """
        where = f"RewardModel: conversation {number}"
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: its last message is not the assistant's: end it with the response")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        # The template has written the BOS; add_special_tokens would write another.
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        response = messages[-1]["content"].strip()  # as many templates strip it
        start = text.rfind(response)
        stop = start + len(response) if start >= 0 else 0
        ids, in_response = [], []
        for token, (first, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            # Whoever writes the CLS token's name writes text. Refusing it, one sample would end a long run.
            plain = self.plain_cls if token == self.cls_id else [token]
            ids += plain
            in_response += [start <= first and end <= stop] * len(plain)

        over = len(ids) + (self.cls_id is not None) - self.max_length
        if over > 0:
            if over >= sum(in_response):
                fixed = len(ids) - sum(in_response)
                problem = f"{fixed} tokens beside the response, and max_length is {self.max_length}"
                raise ValueError(f"{where}: {problem}: raise that, or leave out prompts so long")
            cut = len(in_response) - in_response[::-1].index(True)
            del ids[cut - over : cut]
            self.truncated += 1
        if self.cls_id is not None:
            ids.append(self.cls_id)
            assert ids.count(self.cls_id) == 1, f"conversation {number}: {ids.count(self.cls_id)} CLS tokens"
        return ids


class Scorer:
    """The reward of each response by its own prompt's task: math is verified, chat scored by a reward model.

    ValueError in one line if there is chat and no reward model, or a reward model and no chat.
    """

    def __init__(self, tasks, reward_model=None, device=None):
        if "chat" in tasks and reward_model is None:
            raise ValueError(
                "--reward-model: chat needs a checkpoint that scores it (chat=tiny: tiny/reward)"
            )
        if "chat" not in tasks and reward_model is not None:
            raise ValueError(f"--reward-model {reward_model}: nothing to score, --data has no chat=...")
        self.model = RewardModel(reward_model, device) if "chat" in tasks else None
        self.verifier = MathVerifier() if "math" in tasks else None  # last: its workers want closing

    def usable(self, prompts, fate="are left out"):
        """The prompts without those that cannot be scored, counted and printed; `fate` as for `gradable`."""
        if prompts[0].task == "math":
            return gradable(prompts, self.verifier, fate)
        fitting = [prompt for prompt in prompts if self.model.has_room(prompt.messages)]
        if len(fitting) < len(prompts):
            found = (
                f"{len(prompts) - len(fitting)} of {len(prompts)} requests are too long for the reward model"
            )
            print(f"rewards: {found}; they are left out")
        if not fitting:
            raise ValueError("--reward-model: its context is too short for every request in --data")
        return fitting

    def score(self, prompts, responses: list[str]) -> list[float]:
        """The prompt of each response, and the response -> its reward, in order."""
        scores = [0.0] * len(responses)
        math = [i for i, prompt in enumerate(prompts) if prompt.task == "math"]
        chat = [i for i, prompt in enumerate(prompts) if prompt.task == "chat"]
        if math:
            verified = self.verifier.score([(responses[i], prompts[i].answer) for i in math])
            for i, score in zip(math, verified, strict=True):
                scores[i] = score
        if chat:
            turns = [[*prompts[i].messages, {"role": "assistant", "content": responses[i]}] for i in chat]
            for i, score in zip(chat, self.model.score(turns), strict=True):
                scores[i] = score
        return scores

    def counts(self):
        """What has gone wrong so far on all ranks, for the metrics; None where it cannot."""
        from ranks import total

        return {
            "parse_failures": int(total([self.verifier.parse_failures])) if self.verifier else None,
            "grader_restarts": int(total([self.verifier.restarts])) if self.verifier else None,
            "reward_truncated": int(total([self.model.truncated])) if self.model else None,
        }

    def graded_per_s(self):
        """Responses a second that a grader scored in the last step, the mean over the ranks; None if none."""
        from ranks import mean

        return mean([self.verifier.per_s]) if self.verifier else None

    def set_counts(self, counts):
        """Go on counting from what counts() said; called on one rank."""
        if self.verifier:
            self.verifier.parse_failures = counts["parse_failures"]
            self.verifier.restarts = counts["grader_restarts"]
        if self.model:
            self.model.truncated = counts["reward_truncated"]

    def close(self):
        if self.verifier:
            self.verifier.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def gradable(prompts, verifier, fate="are left out"):
    """The prompts without those whose gold answer Math-Verify cannot parse; prints how many and the first.

    prompts have `.answer` (data.Prompt). `fate` is what the line says becomes of the others.
    ValueError in one line if none is left.
    """
    from ranks import from_first  # here, for the workers that grade start without torch

    # One rank decides: a grader that dies or is late on another would leave it with other prompts.
    bad = set(from_first(lambda: verifier.unparsable([prompt.answer for prompt in prompts])))
    if bad:
        found = f"Math-Verify cannot parse {len(bad)} of {len(prompts)} gold answers"
        found += f", the first is {prompts[min(bad)].answer!r}"
        if len(bad) == len(prompts):
            raise ValueError(f"--data: {found}; write them as numbers or LaTeX")
        print(f"rewards: {found}; these problems {fate}")
    return [prompt for index, prompt in enumerate(prompts) if index not in bad]


def main():
    if len(sys.argv) != 3 or sys.argv[1] != "--serve":
        raise SystemExit("rewards.py: nothing to run; in Python, `from rewards import MathVerifier`")
    serve(float(sys.argv[2]))


if __name__ == "__main__":
    main()
