"""Exercise 4: GRPO with the leave-one-out baseline of RLOO in place of the group's mean.

    .venv/bin/python docs/solutions/rloo.py --run-dir runs/rloo

It takes the flags of train_grpo.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, only docs/solutions/ is there

import flags  # noqa: E402, F401  (sets what torch reads when it is imported)

from torch import Tensor  # noqa: E402

import train_grpo  # noqa: E402


def rloo_advantages(rewards: Tensor, scale: str = "none") -> Tensor:
    """Each reward less the mean of the others in its group: rewards (P, G) -> advantages (P, G).

    Ahmadian et al. 2024, arXiv 2402.14740, RLOO. The baseline of an answer does not depend on that answer.
    scale: only "none"; rewards must be finite (no dropped responses).

    >>> import torch
    >>> rloo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if scale != "none":
        raise ValueError(f"--advantage-scale {scale}: RLOO does not divide by a deviation")
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)  # (P, G)
    return rewards - others


if __name__ == "__main__":
    train_grpo.group_advantages = rloo_advantages
    train_grpo.main()
