"""Logistic regression on frozen features, by scikit-learn, its regularisation chosen on a held-out share.

Features are standardised by the training images' mean and deviation. Of the training images, a fifth of each
class chooses `C`; the classifier is then fitted to all of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from poa.errors import InputError, optional_package
from poa.evaluate.knn import class_token
from poa.evaluate.protocol import Labelled, Protocol

# C, the inverse of the weight of the L2 penalty: these are tried, and further decades while the best is the
# first or the last.
STRENGTHS = [1e-3, 1e-2, 0.1, 1.0, 10.0]
LEAST, MOST = 1e-7, 1e5
HELD_OUT = 0.2
MOST_ITERATIONS = 300


def logistic_accuracy(train: Labelled, queries: Labelled, seed: int) -> dict[str, float]:
    """`{"accuracy": 0..1, "C": the chosen one}` of queries by logistic regression; both have features `[N,
    C]` and labels. The seed chooses held-out images.

    Raises InputError: fewer than two classes, or no scikit-learn.
    """
    linear = optional_package("sklearn.linear_model", "evaluate")
    selection = optional_package("sklearn.model_selection", "evaluate")
    x, y = train.features.numpy(), train.labels.numpy()
    if len(np.unique(y)) < 2:
        raise InputError(f"logistic: expected images of two classes or more, got {len(np.unique(y))}")
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, asked = (x - mean) / deviation, (queries.features.numpy() - mean) / deviation

    def fitted(c: float, x: np.ndarray, y: np.ndarray) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fits that end before they converge
            return linear.LogisticRegression(C=c, max_iter=MOST_ITERATIONS).fit(x, y)

    best = STRENGTHS[len(STRENGTHS) // 2]
    counts = np.bincount(y)
    if counts[counts > 0].min() > 1 and round(HELD_OUT * len(y)) >= (counts > 0).sum():
        fits, asks, known, truth = selection.train_test_split(
            x, y, test_size=HELD_OUT, random_state=seed % 2**32, stratify=y
        )
        best = _best(lambda c: fitted(c, fits, known).score(asks, truth))
    accuracy = fitted(best, x, y).score(asked, queries.labels.numpy())
    return {"accuracy": float(accuracy), "C": best}


def _best(score: Callable[[float], float]) -> float:
    """The strength of the highest score."""
    scores = {c: score(c) for c in STRENGTHS}
    while True:
        best = max(scores, key=lambda c: scores[c])
        further = {min(scores): best / 10, max(scores): best * 10}.get(best, 0.0)
        if not LEAST <= further <= MOST:
            return best
        further = float(f"{further:.0e}")  # 0.0001, not 0.00010000000000000002
        scores[further] = score(further)


LOGISTIC = Protocol(
    "logistic",
    "also fit logistic regressions (scikit-learn)",
    class_token,
    lambda train, queries, device, seed: logistic_accuracy(train, queries, seed),
    lambda score: {"logistic": score["accuracy"]},
    "logistic",
    {
        "protocol": "logistic regression of standardised class tokens, C chosen on a held-out share",
        "C": STRENGTHS,
        "C_range": [LEAST, MOST],
        "held_out": HELD_OUT,
        "iterations": MOST_ITERATIONS,
    },
    needs="sklearn",
)
