"""Exercise 5: IPO's loss in place of DPO's.

    .venv/bin/python docs/solutions/ipo.py --run-dir runs/ipo

It takes the flags of train_dpo.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, only docs/solutions/ is there

import flags  # noqa: E402, F401  (sets what torch reads when it is imported)

from torch import Tensor  # noqa: E402

import train_dpo  # noqa: E402


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> Tensor:
    """IPO's loss of each pair (Azar et al. 2023, arXiv 2310.12036, equation 17). All tensors (B,).

    (margin - 1 / (2 beta))^2: a margin beyond the target is pulled back, where DPO's loss still rewards more.
    """
    margin = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (margin - 1 / (2 * beta)).square()


if __name__ == "__main__":
    train_dpo.dpo_loss = ipo_loss
    train_dpo.main()
