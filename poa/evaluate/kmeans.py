"""Clusters of k-means, as many as there are classes, against the classes; by scikit-learn and SciPy.

NMI, ARI, FMI   normalised mutual information, adjusted Rand index, Fowlkes-Mallows index
accuracy        of the best assignment of clusters to classes (Hungarian algorithm)
"""

from __future__ import annotations

import warnings

import numpy as np
import torch.nn.functional as F

from poa.errors import optional_package
from poa.evaluate.knn import class_token
from poa.evaluate.protocol import Labelled, Protocol

STARTS = 5  # of k-means, the best of which counts


def cluster_scores(clusters: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Agreement of clusters int `[N]` with labels int `[N]`, by name: nmi, ari, fmi, accuracy."""
    metrics = optional_package("sklearn.metrics", "evaluate")
    optimize = optional_package("scipy.optimize", "evaluate")
    table = metrics.cluster.contingency_matrix(labels, clusters)
    rows, columns = optimize.linear_sum_assignment(table, maximize=True)
    return {
        "nmi": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "ari": float(metrics.adjusted_rand_score(labels, clusters)),
        "fmi": float(metrics.fowlkes_mallows_score(labels, clusters)),
        "accuracy": float(table[rows, columns].sum() / len(labels)),
    }


def kmeans_scores(queries: Labelled, seed: int) -> dict[str, float]:
    """`cluster_scores` of k-means on unit class tokens; the seed is that of its starts."""
    cluster = optional_package("sklearn.cluster", "evaluate")
    classes = len(queries.labels.unique())
    means = cluster.KMeans(classes, n_init=STARTS, random_state=seed % 2**32)
    x = F.normalize(queries.features.float(), dim=1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that are the same
        return cluster_scores(means.fit_predict(x), queries.labels.numpy())


KMEANS = Protocol(
    "kmeans",
    "also cluster the held-out images by k-means and compare with their classes (scikit-learn)",
    class_token,
    lambda train, queries, device, seed: kmeans_scores(queries, seed),
    lambda score: {
        "NMI": score["nmi"],
        "ARI": score["ari"],
        "FMI": score["fmi"],
        "clusters": score["accuracy"],
    },
    "NMI",
    {"protocol": "k-means of unit class tokens, as many clusters as classes", "starts": STARTS},
    learns=False,
    needs="sklearn",
)
