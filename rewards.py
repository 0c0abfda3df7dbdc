"""Score a response by its task's reward (paper section 4): math by Math-Verify, chat by a reward model.

With --reward, the user's own function scores math instead.

    with Scorer(["math", "chat"], reward_model="tiny/reward") as scorer:
        scores = scorer.score(prompts, responses)

The graders (`math_reward`, `MathVerifier`, `OwnReward`) are in grader/ and can be imported from here, too.
"""

import math
import os
from collections.abc import Collection, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from flags import one_line_errors

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaPreTrainedModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from batch import micro_batches
from data import Prompt, cached
from grader import MathVerifier, OwnReward, as_meant, grade, math_reward
from model import check_files, check_finite, one_line, set_date, shard
from ranks import all_mean, all_sum, broadcast_from_first, gather, pad_to_same_count, rank, world_size

__all__ = ["MathVerifier", "OwnReward", "RewardModel", "Scorer", "gradable", "math_reward"]

Conversation = list[dict[str, str]]  # turns of {"role": ..., "content": ...}


class LlamaWithVHead(LlamaPreTrainedModel):
    """The model class of Athene-RM-8B, which transformers lacks: a Llama with a linear head without bias."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Score right-padded rows (B, T), each ending with the CLS token; .logits is (B, 1)."""
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state  # (B, T, D)
        each_row = torch.arange(len(hidden), device=hidden.device)  # (B,)
        at_cls = hidden[each_row, attention_mask.sum(-1) - 1]  # (B, D)
        # In float32: bfloat16 has steps of 1/32 at a score of 5, so different scores would become ties.
        return SequenceClassifierOutput(logits=F.linear(at_cls.float(), self.v_head.weight.float()))


def _load_reward_model(
    path: str | Path, dtype: str | torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, int | None]:
    """Load a checkpoint of either form: (model, tokenizer, id of the CLS token to append or None)."""
    files = ["*.json", "*.jinja", "*.model", "*.safetensors"]
    with one_line(f"{path}: not a checkpoint, in a folder or on the Hub"):
        folder = path if os.path.isdir(path) else snapshot_download(str(path), allow_patterns=files)
        check_files(Path(folder))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        names = set()
        for file in Path(folder).glob("*.safetensors"):
            with safe_open(file, "pt") as weights:
                names.update(weights.keys())
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

    model_class = LlamaWithVHead if has_v_head else AutoModelForSequenceClassification
    model, report = model_class.from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False,
        ignore_mismatched_sizes=True, output_loading_info=True,
    )  # fmt: skip
    wrong = {problem: sorted(map(str, keys))[:3] for problem, keys in report.items() if keys}
    if wrong:  # transformers only warns, and scores with random numbers where weights are missing
        raise ValueError(f"{path}: the weights are not those of its config: {wrong}: save the model again")
    with one_line(str(path)):
        check_finite(model)
    return model.eval(), tokenizer, cls_id


class RewardModel:
    """A learned reward: the raw score, without a sigmoid, of a conversation that ends with a response.

    It loads two forms of checkpoint and tells them apart by the names of the weights. One has a
    `v_head.weight`, as the paper's Athene-RM-8B: a Llama with a linear head, read at a CLS token that we
    append to the conversation (CLS_ID in config.json, else the tokenizer's). The other is any
    AutoModelForSequenceClassification with one label. transformers reads it at the last token that is not
    padding.

    device: default: the GPU if there is one. In Python, "cuda:1" leaves the first GPU to the trainer.
    dtype: default: bfloat16 on a GPU, float32 on a CPU. A v_head always computes in float32. The head of
        another classifier computes in `dtype`: in bfloat16, scores that differ by less than 1 % become ties.
    max_length: tokens in the longest conversation; default: the model's limit. A longer one has its response
        cut to fit; `truncated` counts these cuts over all calls.
    batch_tokens: tokens in one forward, padding included; default: 16384 on a GPU, 2048 on a CPU. A larger
        batch does not fit a CPU's caches and takes twice as long.

    With several ranks the model is sharded over them, and all ranks call `score` together.
    date: the day that its chat template prints, as for model.load_tokenizer.
    Raises ValueError, in one line, for a checkpoint or a conversation that cannot be scored.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        date: str | None = None,
    ):
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        model, self.tokenizer, self.cls_id = _load_reward_model(path, dtype)
        set_date(self.tokenizer, date)
        self.path = path
        self.model, self.truncated = shard(model, self.device, model.dtype), 0
        self.batch_tokens = batch_tokens or (16384 if self.device.type == "cuda" else 2048)
        config, limit = model.config.get_text_config(), self.tokenizer.model_max_length  # 1e30: no limit
        self.max_length = max_length or min(limit, getattr(config, "max_position_embeddings", limit))
        self.pad_id = config.pad_token_id or 0  # with a CLS token any id will do
        self.plain_cls = None
        if self.cls_id is not None:
            self.plain_cls = self.tokenizer.encode(
                self.tokenizer.decode([self.cls_id]), add_special_tokens=False, split_special_tokens=True
            )

    def has_room(self, messages: Conversation) -> bool:
        """Whether a response to these messages (the last is the user's) can be scored: one token must fit."""
        if sum(len(turn["content"].encode()) for turn in messages) < self.max_length - 100 * len(messages):
            return True  # a token has at least one byte, and a template adds fewer than 100 tokens to a turn
        ids = self.tokenizer.apply_chat_template(
            [*messages, {"role": "assistant", "content": "."}], return_dict=False
        )
        return len(ids) + (self.cls_id is not None) <= self.max_length

    def score(self, conversations: list[Conversation]) -> list[float]:
        """The score of each conversation, in order. The last message of each is the assistant's response."""
        rows = [self._encode(number, messages) for number, messages in enumerate(conversations)]
        scores = [0.0] * len(rows)
        lengths = [len(row) for row in rows]
        batches = micro_batches([[index] for index in range(len(rows))], lengths, self.batch_tokens)
        for batch in tqdm(pad_to_same_count(batches), desc="reward model", delay=3, leave=False):
            longest = max((lengths[index] for index in batch), default=1)
            padded = [rows[index] + [self.pad_id] * (longest - lengths[index]) for index in batch]
            real = [[1] * lengths[index] + [0] * (longest - lengths[index]) for index in batch]
            # An empty batch becomes a dummy forward: FSDP needs the same number of forwards on every rank.
            input_ids = torch.tensor(padded or [[self.pad_id]], device=self.device)  # (B, T)
            attention_mask = torch.tensor(real or [[1]], device=self.device)  # (B, T)
            with torch.no_grad():
                logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # (B, 1)
            for index, score in zip(batch, logits[: len(batch), 0].tolist(), strict=True):
                if not math.isfinite(score):
                    end = conversations[index][-1]["content"][-100:]
                    raise ValueError(f"{self.path}: scores conversation {index} by {score}; it ends {end!r}")
                scores[index] = score
        return scores

    def _encode(self, number: int, messages: Conversation) -> list[int]:
        """The token ids of conversation `number`, at most max_length of them.

        Only the response is cut. The template's text after it still ends the row, because models are trained
        to be read there.
        """
        where = f"RewardModel: conversation {number}"
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: its last message is not the assistant's: end it with the response")
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        # The template has written the BOS; add_special_tokens would write a second one.
        tokens = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        response = messages[-1]["content"].strip()  # many templates strip it
        start = text.rfind(response)
        stop = start + len(response)
        if start < 0:  # the template rewrites it: take all between the prompt and the end of the turn
            short = [*messages[:-1], messages[-1] | {"content": "."}]
            short = self.tokenizer.apply_chat_template(short, tokenize=False)
            start, stop = short.rindex("."), len(text) - (len(short) - short.rindex(".") - 1)
        ids, in_response = [], []
        for token, (first, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            # A message may contain the CLS token's text; encode it as plain text. If it were an error, one
            # sample could end a long run.
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
    """The reward of each response by its prompt's task: math is verified, chat is scored by a reward model.

    tasks: the tasks of all prompts that it will score, "math" or "chat".
    reward_model: the checkpoint that scores chat. device, which is also the trainer's, and date: as for
        RewardModel. strict: grade mathematics with Math-Verify alone, as in the paper.
    own: the user's function, which scores math instead of Math-Verify; it is closed with the scorer.
    Raises ValueError, in one line, if there is chat and no reward model, or a reward model and no chat.
    """

    def __init__(
        self,
        tasks: Collection[str],
        reward_model: str | None = None,
        device: str | torch.device | None = None,
        own: OwnReward | None = None,
        strict: bool = False,
        date: str | None = None,
    ):
        if "chat" in tasks and reward_model is None:
            raise ValueError(
                "--reward-model: chat needs a checkpoint that scores it (chat=tiny: tiny/reward)"
            )
        if "chat" not in tasks and reward_model is not None:
            raise ValueError(f"--reward-model {reward_model}: nothing to score, --data has no chat=...")
        if "math" not in tasks and own is not None:
            raise ValueError(f"{own.flag}: nothing to score, --data has no math")
        self.model = RewardModel(reward_model, device, date=date) if "chat" in tasks else None
        # A trainer on a CPU uses all cores: grading beside it costs more than it saves (51 s instead of 42
        # for learning and scoring in `make demo`, on two cores).
        self.ahead = torch.device(device or "cpu").type == "cuda"
        self.own = own
        # Last: if the reward model cannot be loaded, no workers are left to close.
        self.verifier = own or (MathVerifier(strict=strict) if "math" in tasks else None)

    @classmethod
    def of(
        cls,
        config: Any,
        tasks: Collection[str],
        device: str | torch.device | None = None,
        date: str | None = None,
    ) -> "Scorer":
        """The scorer that a script's flags ask for."""
        own = OwnReward.of(config)
        try:
            return cls(tasks, config.reward_model, device, own, config.strict_paper_grading, date)
        except BaseException:
            if own:
                own.close()
            raise

    def usable(self, prompts: list[Prompt], fate: str = "are left out") -> list[Prompt]:
        """The prompts of one task whose responses can be scored; prints how many cannot.

        `fate` is for mathematics alone, see `gradable`. ValueError in one line if no prompt is left.
        """
        if prompts[0].task == "math" and self.own:
            self.own.check(prompts)
            return prompts
        if prompts[0].task == "math":
            return gradable(prompts, self.verifier, fate)
        fitting = [prompt for prompt in prompts if self.model.has_room(prompt.messages)]
        if long := len(prompts) - len(fitting):
            found = f"{long} of {len(prompts)} requests are too long for the reward model"
            print(f"rewards: {found}; they are left out")
        if not fitting:
            raise ValueError("--reward-model: its context is too short for every request in --data")
        return fitting

    def begin(self, prompts: list[Prompt], responses: Iterable[str]) -> None:
        """Start grading math in the background, before score() asks for it, if the trainer is on a GPU.

        Chat waits for score(), which all ranks call together.
        """
        if not self.ahead:
            return
        items = [(r, self._key(p)) for p, r in zip(prompts, responses, strict=True) if p.task == "math"]
        if items:
            self.verifier.begin(items)

    def _key(self, prompt):
        """What a response to math is scored against."""
        return prompt if self.own else prompt.answer

    def score(self, prompts: list[Prompt], responses: list[str]) -> list[float]:
        """The reward of each response, in order; prompts[i] is the prompt of responses[i].

        NaN marks a response that the user's function dropped. If that function or the reward model fails, the
        program ends in one line.
        """
        scores = [0.0] * len(responses)
        problems = [i for i, prompt in enumerate(prompts) if prompt.task == "math"]
        requests = [i for i, prompt in enumerate(prompts) if prompt.task == "chat"]
        turns = [[*prompts[i].messages, {"role": "assistant", "content": responses[i]}] for i in requests]
        with one_line_errors():
            answers = [(responses[i], self._key(prompts[i])) for i in problems]
            verified = self.verifier.score(answers) if problems else []
            judged = self.model.score(turns) if requests else []
        for i, score in zip(problems + requests, verified + judged, strict=True):
            scores[i] = score
        return scores

    def counts(self) -> dict[str, int | None]:
        """For the metrics: what went wrong so far, summed over all ranks; None for a task not in the run."""
        return {
            key: int(all_sum([getattr(counter, name)])) if counter else None
            for key, (counter, name) in self._counters().items()
        }

    def _counters(self):
        """{metric: (what counts it, or None; its attribute)}"""
        return {
            "parse_failures": (None if self.own else self.verifier, "parse_failures"),
            "grader_restarts": (self.verifier, "restarts"),
            "reward_dropped": (self.own, "dropped"),
            "reward_truncated": (self.model, "truncated"),
        }

    def graded_per_s(self) -> float | None:
        """Responses per second of one worker in the last call, averaged over the ranks; None without math."""
        return all_mean([self.verifier.per_s]) if self.verifier else None

    def set_counts(self, counts: dict[str, int | None]) -> None:
        """Continue from what counts() returned. Call it on one rank only: counts() adds up the ranks."""
        for key, (counter, name) in self._counters().items():
            if counter:
                setattr(counter, name, counts[key])

    def close(self) -> None:
        """Kill the grader's workers."""
        if self.verifier:
            self.verifier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def gradable(prompts: list[Prompt], verifier: MathVerifier, fate: str = "are left out") -> list[Prompt]:
    """The prompts whose gold answer Math-Verify can parse; prints how many it cannot, and the first of them.

    `fate` ends the printed line: it says what happens to the others. ValueError in one line if none is left.
    All ranks call it; each checks a share.
    """
    me, ranks = rank(), world_size()
    golds = [prompt.answer for prompt in prompts[me::ranks]]
    mine = cached("bad-golds", golds, lambda: grader_content(verifier), lambda: verifier.unparsable(golds))
    indices = gather(me + i * ranks for i in mine)
    bad = set(broadcast_from_first(lambda: indices))  # all ranks leave out the same
    if bad:
        found = f"Math-Verify cannot parse {len(bad)} of {len(prompts)} gold answers"
        found += f", the first is {prompts[min(bad)].answer!r}"
        if len(bad) == len(prompts):
            raise ValueError(f"--data: {found}; write them as numbers or LaTeX")
        print(f"rewards: {found}; these problems {fate}")
    return [prompt for index, prompt in enumerate(prompts) if index not in bad]


def grader_content(verifier: MathVerifier) -> list:
    """Everything besides the golds that decides which of them Math-Verify can parse."""
    packages = ["math-verify", "latex2sympy2-extended", "sympy"]
    code = [Path(module.__file__).read_text(encoding="utf-8") for module in (grade, as_meant)]
    return [*map(version, packages), *code, verifier.timeout_s, verifier.strict]
