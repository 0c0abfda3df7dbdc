"""The statistics of pairwise comparisons, as pure functions: win rates, length control, Elo ratings.

A preference is a number in [1, 2]; 2 means that the model wins against the baseline. A battle is a mapping
{"question_id", "model_a", "model_b", "winner"} whose winner is "model_a", "model_b" or "tie". A tie is half a
win for each side.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Battle = Mapping[str, str]

# alpaca_eval's published weights of tanh(length) and of difficulty, averaged over two models: the baseline
# told to be verbose and told to be concise (weights/weighted_alpaca_eval_gpt4_turbo/length_controlled_v1).
GAMED_WEIGHTS = np.array([-1.6130, 0.7585])
PENALTIES = 1 / np.logspace(-4, 4, 10)  # of scikit-learn's LogisticRegressionCV, which alpaca_eval uses
FOLDS = 5
ELO = 400 / np.log(10)  # Elo points in a nat of log-odds
PRIOR = 0.01  # precision of a model's log-odds: a standard deviation of 10 nats, or 1737 Elo points
WINS = {"model_a": 1.0, "tie": 0.5, "tie (bothbad)": 0.5, "model_b": 0.0}


def sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * x))


def fit_logistic(
    features: Floats,
    shares: Floats,
    weights: Floats,
    l1: float = 0.0,
    l2: float = 0.0,
    start: Floats | None = None,
) -> Floats:
    """Fit a logistic regression to shares of wins: features (N, K), shares and weights (N,) -> b (K,).

    b minimises  sum_i weights_i logloss(shares_i, sigmoid(features_i b)) + l1 |b|_1 + l2/2 |b|_2^2.  The
    method is Newton's, from `start` (K,) or zero; a step that raises the loss is halved.
    """

    def loss(b):
        x = features @ b
        return weights @ (np.logaddexp(0, x) - shares * x) + l1 * abs(b).sum() + l2 / 2 * b @ b

    b = np.zeros(features.shape[1]) if start is None else start
    for _ in range(100):
        predicted = sigmoid(features @ b)
        gradient = features.T @ (weights * (predicted - shares)) + l2 * b
        curvature = (features.T * (weights * predicted * (1 - predicted))) @ features
        curvature += (l2 + 1e-9) * np.eye(len(b))
        step = _l1_step(b, gradient, curvature, l1) if l1 else -np.linalg.solve(curvature, gradient)
        while loss(b + step) > loss(b) and abs(step).max() > 1e-9:
            step = step / 2
        b = b + step
        if abs(step).max() < 1e-7:
            break
    return b


def _l1_step(b, gradient, curvature, l1):
    """Return the step to the minimum of the quadratic model plus l1 |.|_1, by coordinate descent."""
    new = b.copy()
    for _ in range(100):
        before = new.copy()
        for j in range(len(b)):
            pull = curvature[j, j] * new[j] - gradient[j] - curvature[j] @ (new - b)
            new[j] = np.sign(pull) * max(abs(pull) - l1, 0) / curvature[j, j]
        if abs(new - before).max() < 1e-10:
            break
    return new - b


def winrate(preferences: ArrayLike) -> tuple[float, float]:
    """Return (win rate, standard error) in percent from preferences (N,), as alpaca_eval's winrate.py does.

    ValueError for fewer than two preferences, or one outside [1, 2].

    >>> winrate([1.0, 2.0, 2.0, 1.5])[0]
    62.5
    """
    shares = np.asarray(preferences, float) - 1
    if shares.ndim != 1 or len(shares) < 2 or not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError("a win rate needs two or more preferences from 1 to 2")
    return 100 * shares.mean().item(), 100 * shares.std(ddof=1).item() / len(shares) ** 0.5


def length_controlled_winrate(
    preferences: ArrayLike,
    model_lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    difficulties: ArrayLike | None = None,
    regularize: float = 0.2,
) -> tuple[float, float]:
    """Return (win rate, standard error) in percent as if both answers to a question were equally long.

    All arrays are (N,). Lengths are in characters. Difficulties are on AlpacaEval's scale; None leaves their
    term out. ValueError for fewer than 10 rows, or if all differences in length are the same but not 0.

    The recipe is alpaca_eval's `length_controlled_v1` (Dubois et al. 2024, arXiv 2404.04475; glm_winrate.py).
    A logistic regression predicts the preference from tanh((baseline's length - model's) / their standard
    deviation), the difficulty and a constant. Its L1 penalty is chosen by cross-validation in 5 folds. The
    win rate is the mean prediction with the length term at zero. A model could game this fit by cutting short
    the answers that lose. Against that, alpaca_eval adds its judgments of the baseline told to be verbose and
    told to be concise. They enter as rows without the constant, with weight `regularize` in total.

    This function differs in the rows that it adds, because those judgments (df_gamed.csv) and the
    difficulties are only on the Hugging Face Hub. It adds every row a second time, with weight `regularize`
    and without the constant. The share of wins of an added row is what the published weights of those two
    models predict from the row's length and difficulty. `regularize=0` leaves them out, like
    `length_controlled_noreg`.

    With difficulties estimated from published results, the rates of the leaderboard's 28 models are 0.45
    points off on average and 1.7 at most (claude-2); the rank correlation is 0.998. gpt4_gamed, whose answers
    are cut short on purpose, gets 12.3; published is 12.2. Without the added rows the mean error is 1.7, and
    gpt4_gamed gets 27.4. All models are fitted with the same settings. To reproduce the leaderboard, pass the
    k-th difficulty with the k-th judgment, even after a missing judgment, as it does. Matching them by
    instruction puts the 5 models with missing judgments up to 2.5 points off.

    The standard error comes from the delta method, over the drawing of instructions. alpaca_eval reports the
    spread of the predictions alone, which ignores the error of the fit and is 0 without difficulties.
    """
    winrate(preferences)  # raises ValueError for bad preferences
    shares = np.asarray(preferences, float) - 1
    gaps = np.asarray(baseline_lengths, float) - np.asarray(model_lengths, float)
    hard = np.zeros_like(shares) if difficulties is None else np.asarray(difficulties, float)
    if not shares.shape == gaps.shape == hard.shape or len(shares) < 2 * FOLDS:
        raise ValueError(f"length control needs {2 * FOLDS} or more rows, each with both lengths")
    if not np.isfinite([gaps, hard]).all() or (np.ptp(gaps) == 0 and gaps[0] != 0):
        raise ValueError("length control needs finite lengths, and differences that are not all the same")
    length = np.tanh(gaps / (gaps.std(ddof=1) or 1.0))
    one, zero = np.ones_like(shares), np.zeros_like(shares)

    rows, equal = np.stack([length, hard, one], 1), np.stack([zero, hard, one], 1)  # (N, 3)
    gamed = np.stack([length, hard, zero], 1)  # (N, 3)
    features = np.concatenate([rows, gamed])  # (2N, 3)
    targets = np.concatenate([shares, sigmoid(gamed[:, :2] @ GAMED_WEIGHTS)])  # (2N,)
    weights = np.concatenate([one, np.full_like(one, regularize)])  # (2N,)
    b = _fit_cross_validated(features, targets, weights, np.tile(np.arange(len(shares)) % FOLDS, 2))  # (3,)

    predicted, fitted = sigmoid(equal @ b), sigmoid(features @ b)  # (N,), (2N,)
    curvature = (features.T * (weights * fitted * (1 - fitted))) @ features  # (3, 3)
    through_fit = np.linalg.pinv(curvature) @ equal.T @ (predicted * (1 - predicted))  # (3,)
    influence = predicted + rows @ through_fit * (shares - fitted[: len(shares)])  # (N,)
    return 100 * predicted.mean().item(), 100 * influence.std(ddof=1).item() / len(shares) ** 0.5


def _fit_cross_validated(features, shares, weights, folds):
    """Run fit_logistic on all rows, with the L1 penalty that best predicts left-out folds; folds (N,)."""
    losses = np.zeros(len(PENALTIES))
    for fold in range(FOLDS):
        out, b = folds == fold, None
        for i, penalty in enumerate(PENALTIES):
            b = fit_logistic(features[~out], shares[~out], weights[~out], l1=penalty, start=b)
            x = features[out] @ b
            losses[i] += np.mean(weights[out] * (np.logaddexp(0, x) - shares[out] * x))
    return fit_logistic(features, shares, weights, l1=PENALTIES[losses.argmin()])


class Battles:
    """Battles as arrays: models, K names; a and b (N,), indices into them; shares (N,), 1 where a won.

    ValueError for an unknown winner, or if no chain of battles connects two of the models.
    """

    def __init__(self, battles: Sequence[Battle]):
        self.models = list(dict.fromkeys(name for x in battles for name in (x["model_a"], x["model_b"])))
        numbers = {model: i for i, model in enumerate(self.models)}
        self.a = np.array([numbers[battle["model_a"]] for battle in battles], int)
        self.b = np.array([numbers[battle["model_b"]] for battle in battles], int)
        if unknown := {battle["winner"] for battle in battles} - set(WINS):
            raise ValueError(f"a battle's winner is {', '.join(WINS)}; not {unknown.pop()!r}")
        self.shares = np.array([WINS[battle["winner"]] for battle in battles])
        reached = np.arange(len(self.models)) == 0
        for _ in self.models:
            reached[self.a[reached[self.b]]] = True
            reached[self.b[reached[self.a]]] = True
        if len(self.models) < 2 or not reached.all():
            raise ValueError(f"ratings need battles that connect all models: {', '.join(self.models)}")

    def strengths(self, times: NDArray) -> Floats:
        """Fit Bradley-Terry log-odds (K,) in nats, of mean 0; times (N,): how often each battle counts."""
        k = len(self.models)
        cells = np.concatenate([self.a * k + self.b, self.b * k + self.a])
        wins = np.bincount(cells, np.concatenate([times * self.shares, times * (1 - self.shares)]), k * k)
        wins = wins.reshape(k, k)  # [i, j]: how often i beat j; a tie is half a win
        i, j = np.nonzero(np.triu(wins + wins.T, 1))
        played = wins[i, j] + wins[j, i]
        return fit_logistic(np.eye(k)[i] - np.eye(k)[j], wins[i, j] / played, played, l2=PRIOR)

    def bootstrap(self, groups: ArrayLike, rounds: int, seed: int) -> Floats:
        """Return strengths() of each bootstrap round, (rounds, K).

        groups (N,) names each battle's group. A round draws groups with replacement.
        """
        group = np.unique(groups, return_inverse=True)[1]
        n, rng = group.max() + 1, np.random.default_rng(seed)
        return np.array([self.strengths(rng.multinomial(n, np.full(n, 1 / n))[group]) for _ in range(rounds)])


def arena_hard_score(
    battles: Sequence[Battle],
    baseline: str = "gpt-4-0314",
    by: Literal["question", "battle"] = "question",
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float, float]]:
    """Return Arena-Hard's {model: (score, low, high)} in percent, with a 95% bootstrap interval.

    The score is the share of battles against the baseline that a Bradley-Terry fit predicts the model to win;
    the baseline's own is 50. Arena-Hard lists a strong verdict as three battles (Li et al. 2024, arXiv
    2406.11939; arena-hard-auto v0.1: show_result.py, utils_math.py). ValueError for an absent baseline, and
    as for Battles.

    The bootstrap draws questions, because the battles of one question are not independent: it has two orders,
    and three battles for each strong verdict. The leaderboard draws battles instead, as `by="battle"` does;
    for gpt-4-0613 that makes the interval 1.6 times narrower.
    """
    fit = Battles(battles)
    if baseline not in fit.models:
        raise ValueError(f"no battle has the baseline {baseline}; there are {', '.join(fit.models)}")
    base = fit.models.index(baseline)
    groups = {"question": [battle["question_id"] for battle in battles], "battle": range(len(battles))}[by]
    strengths, draws = fit.strengths(np.ones(len(battles))), fit.bootstrap(groups, rounds, seed)
    scores = 100 * sigmoid(strengths - strengths[base])
    low, high = np.percentile(100 * sigmoid(draws - draws[:, [base]]), [2.5, 97.5], axis=0).tolist()
    return {m: (s, low[i], high[i]) for i, (m, s) in enumerate(zip(fit.models, scores.tolist(), strict=True))}


def bradley_terry(battles: Sequence[Battle]) -> dict[str, float]:
    """Return Bradley-Terry ratings {model: rating} on the Elo scale.

    Their mean is 1000; 400 points more are odds of 10 to 1. ValueError as for Battles.

    Each rating has a Gaussian prior around the mean, with a standard deviation of 1737 points. The prior
    moves a rating by far less than its error. It also keeps the rating of a model that won, or lost, every
    battle finite: read such a rating as "never lost" or "never won", and no more.

    >>> wins = ["model_a"] * 1000 + ["model_b"] * 100
    >>> ten_to_one = [{"model_a": "x", "model_b": "y", "winner": w} for w in wins]
    >>> ratings = bradley_terry(ten_to_one)
    >>> round(ratings["x"] - ratings["y"])
    400
    """
    fit = Battles(battles)
    return dict(zip(fit.models, (1000 + ELO * fit.strengths(np.ones(len(battles)))).tolist(), strict=True))


def bradley_terry_intervals(
    battles: Sequence[Battle], rounds: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """Return bradley_terry() with a 95% bootstrap interval, {model: (rating, low, high)}.

    The bootstrap draws questions, so all battles on one question stay together: both orders, and all pairs of
    models. The interval of a model that won, or lost, every battle means as little as its rating.
    """
    fit = Battles(battles)
    draws = 1000 + ELO * fit.bootstrap([battle["question_id"] for battle in battles], rounds, seed)
    low, high = np.percentile(draws, [2.5, 97.5], axis=0).tolist()
    return {m: (r, low[i], high[i]) for i, (m, r) in enumerate(bradley_terry(battles).items())}
