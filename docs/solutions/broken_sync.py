"""Exercise 3: GRPO with a sync that may have a bug. Try it before you read the code, the answer.

    .venv/bin/python docs/solutions/broken_sync.py A off --run-dir runs/a

The first argument names the bug: A, B, C or D. The second says whether sync() proves the copy (on), or copies
and believes that it worked (off). The others are flags of train_grpo.py.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, only docs/solutions/ is there

import flags  # noqa: E402, F401  (sets what torch reads when it is imported)

from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

import life  # noqa: E402
import train_grpo  # noqa: E402
from generate import Generator, load_generator  # noqa: E402
from model import digest, full_weights  # noqa: E402
from serve import Receipt  # noqa: E402
from sync import canary_gap  # noqa: E402

Weights = Iterable[tuple[str, Tensor]]
Load = Callable[[Weights], list[Receipt]]


def keeps_nothing(load: Load) -> Load:
    """A: the engine confirms every byte and keeps its old weights. Training is offline."""
    return lambda weights: [Receipt({name: digest(weight).item() for name, weight in weights}, [], [], [])]


def loses_the_head(load: Load) -> Load:
    """B: the output head never arrives; all other weights do."""
    return lambda weights: load([pair for pair in weights if pair[0] != "lm_head.weight"])


def is_one_late(load: Load) -> Load:
    """C: each sync delivers the weights of the sync before. Training is one step off-policy."""
    last_two = deque(maxlen=2)

    def load_late(weights: Weights) -> list[Receipt]:
        last_two.append([(name, weight.clone()) for name, weight in weights])
        return load(last_two[0])  # at the first sync there is only one

    return load_late


BUGS = {"A": keeps_nothing, "B": loses_the_head, "C": is_one_late, "D": lambda load: load}  # D has none


def believing_sync(policy: PreTrainedModel, generator: Generator, step: int, prove_every: float) -> float:
    """sync() without its proofs. The canary is measured, and nobody judges it."""
    generator.load_weights(full_weights(policy, generator.dtype))
    generator.reset_prefix_cache()
    generator.stamp(step)
    return canary_gap(policy, generator)


def main(copy: str, proofs: str, *rest: str) -> None:
    def load_broken(*args, **settings):
        generator = load_generator(*args, **settings)
        generator.load_weights = BUGS[copy](generator.load_weights)
        return generator

    life.load_generator = load_broken
    if proofs == "off":
        train_grpo.sync = believing_sync
    train_grpo.main(list(rest))


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in BUGS or sys.argv[2] not in ("off", "on"):
        sys.exit("usage: broken_sync.py A|B|C|D off|on [flags of train_grpo.py]")
    main(*sys.argv[1:])
