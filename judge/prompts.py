"""The two styles of judging: what the judge is asked, with which settings, how its reply is read.

"alpaca_eval" is the annotator weighted_alpaca_eval_gpt4_turbo of alpaca_eval 0.6.6, "arena_hard" the judge of
arena-hard-auto v0.1. The four prompts are theirs word for word (Apache-2.0); only the fields are renamed.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # openai comes with vLLM and takes a second to import
    from openai.types.chat.chat_completion import Choice

ALPACA_EVAL_SYSTEM = """\
You are a highly efficient assistant, who evaluates and selects the best large language model (LLMs) based \
on the quality of their responses to a given instruction. This process will be used to create a leaderboard\
 reflecting the most accurate and human-preferred answers."""

ALPACA_EVAL_PROMPT = """\
I require a leaderboard for various large language models. I'll provide you with prompts given to these \
models and their corresponding outputs. Your task is to assess these responses, and select the model that \
produces the best output from a human perspective.

## Instruction

{
    "instruction": \"""{prompt}\""",
}

## Model Outputs

Here are the unordered outputs from the models. Each output is associated with a specific model, identified\
 by a unique model identifier.

{
    {
        "model_identifier": "m",
        "output": \"""{first}\"""
    },
    {
        "model_identifier": "M",
        "output": \"""{second}\"""
    }
}

## Task

Evaluate the models based on the quality and relevance of their outputs, and select the model that \
generated the best output. Answer by providing the model identifier of the best model. We will use your \
output as the name of the best model, so make sure your output only contains one of the following model \
identifiers and nothing else (no quotes, no spaces, no new lines, ...): m or M.

## Best Model Identifier"""

ARENA_HARD_SYSTEM = """\
Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to\
 the user prompt displayed below. You will be given assistant A's answer and assistant B's answer. Your job\
 is to evaluate which assistant's answer is better.

Begin your evaluation by generating your own answer to the prompt. You must provide your answers before \
judging any answers.

When evaluating the assistants' answers, compare both assistants' answers with your answer. You must \
identify and correct any mistakes or inaccurate information.

Then consider if the assistant's answers are helpful, relevant, and concise. Helpful means the answer \
correctly responds to the prompt or follows the instructions. Note when user prompt has any ambiguity or \
more than one interpretation, it is more helpful and appropriate to ask for clarifications or more \
information from the user than providing an answer based on assumptions. Relevant means all parts of the \
response closely connect or are appropriate to what is being asked. Concise means the response is clear and\
 not verbose or excessive.

Then consider the creativity and novelty of the assistant's answers when needed. Finally, identify any \
missing important information in the assistants' answers that would be beneficial to include when \
responding to the user prompt.

After providing your explanation, you must output only one of the following choices as your final verdict \
with a label:

1. Assistant A is significantly better: [[A>>B]]
2. Assistant A is slightly better: [[A>B]]
3. Tie, relatively the same: [[A=B]]
4. Assistant B is slightly better: [[B>A]]
5. Assistant B is significantly better: [[B>>A]]

Example output: "My final verdict is tie: [[A=B]]"."""

ARENA_HARD_PROMPT = """\
<|User Prompt|>
{prompt}

<|The Start of Assistant A's Answer|>
{first}
<|The End of Assistant A's Answer|>

<|The Start of Assistant B's Answer|>
{second}
<|The End of Assistant B's Answer|>"""

LABELS = {  # label: (winner, how often the verdict counts), A being the first answer (show_result.py)
    "A>>B": ("model_a", 3),
    "A>B": ("model_a", 1),
    "A=B": ("tie", 1),
    "B>A": ("model_b", 1),
    "B>>A": ("model_b", 3),
}
LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")  # judge_config.yaml's regex_pattern


def final_text(choice: "Choice") -> str:
    """Return the reply's text after its reasoning, <think>...</think>; "" if there is none."""
    text = choice.message.content if isinstance(choice.message.content, str) else ""
    text = re.split("</think(?:ing)?>", text)[-1].strip()
    return "" if text.startswith("<think") else text


def alternatives(choice: "Choice") -> list:
    """The tokens listed for the first token, with their log-probs; [] from endpoints that list none."""
    first = choice.logprobs.content[:1] if choice.logprobs and choice.logprobs.content else []
    return [token for one in first for token in getattr(one, "top_logprobs", None) or []]


def read_preference(choice: "Choice", quotable: bool = False) -> float | None:
    """Return the first answer's share, 0 to 1, of the probability that the first token gives to "m" or "M".

    None if neither name is among the listed tokens (alpaca_eval's logprob_parser). A reply without a list
    counts by its letter: 1.0 for "m", 0.0 for "M", None for any other text. So a quotation never counts.
    """
    listed = alternatives(choice)
    if not listed:
        return {"m": 1.0, "M": 0.0}.get(final_text(choice))
    listed = [t for t in listed if t.logprob is not None]  # JSON has no minus infinity
    first, second = (sum(np.exp(t.logprob) for t in listed if t.token.strip() == name) for name in "mM")
    return float(first / (first + second)) if first + second > 0 else None


def read_label(choice: "Choice", quotable: bool = False) -> str | None:
    """Return the reply's label, one of LABELS; None if it has none, or several that differ.

    Arena-Hard's get_score does the same, but asks the judge to go on when it finds none. Here reasoning in
    <think> is not read, a reply that was cut off has no verdict, and if the request or an answer contains a
    label (`quotable`), only the reply's last line counts.
    """
    text = "" if getattr(choice, "finish_reason", None) == "length" else final_text(choice)
    if quotable:
        text = text.rstrip("`*\n ").rpartition("\n")[2]
    labels = set(LABEL.findall(text))
    return labels.pop() if len(labels) == 1 and labels <= set(LABELS) else None


class Style(NamedTuple):
    system: str  # the system message; "" for none
    prompt: str  # the user message, with the fields {prompt}, {first} and {second}
    request: dict  # the other arguments of the chat completion
    # (the reply, whether it may quote a label of an answer) -> the verdict on the first; None if unreadable
    read: Callable[["Choice", bool], float | str | None]


ONE_TOKEN = {"max_tokens": 1, "temperature": 1, "logprobs": True, "top_logprobs": 5}
STYLES = {
    "alpaca_eval": Style(ALPACA_EVAL_SYSTEM, ALPACA_EVAL_PROMPT, ONE_TOKEN, read_preference),
    "arena_hard": Style(  # the request is judge_config.yaml's
        ARENA_HARD_SYSTEM, ARENA_HARD_PROMPT, {"max_tokens": 4096, "temperature": 0}, read_label
    ),
}
