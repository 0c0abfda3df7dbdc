"""Grade answers in killable worker processes, with Math-Verify (paper section 4) or a user's function.

    math_reward(response, gold)     the reward: a pure function without a deadline (grade.py)
    MathVerifier                    applies it to what a model wrote, with a deadline (workers.py)
    OwnReward                       the same for --reward FILE.py:NAME (own.py; call.py is its worker's side)
    as_meant, boxed_as_meant        write golds and answers as people mean them, before both (as_meant.py)

    with MathVerifier(workers=2) as verifier:
        scores = verifier.score([(r"The final answer is $\\boxed{1/2}$. I hope it is correct.", "0.5")])

What a model writes can hang the grader. A sampled `9^{9^{9^9}}`, or a text on which Math-Verify's regular
expressions backtrack, runs for hours inside C code. Math-Verify's own timeouts are SIGALRM handlers in
Python, which cannot interrupt C code (its issues 55 and 65), and a process pool never gets a stuck worker
back. So each worker is a subprocess that grades one item at a time; the parent kills and replaces late ones.
"""

from grader.grade import math_reward
from grader.own import OwnReward
from grader.workers import MathVerifier

__all__ = ["MathVerifier", "OwnReward", "math_reward"]
