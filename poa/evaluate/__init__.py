"""Accuracy of subnets: features once, then k-NN."""

from poa.evaluate.knn import knn_accuracy
from poa.evaluate.sweep import (
    REPORTED_K,
    Origin,
    Report,
    evaluate_subnets,
    evaluation_file,
    knn_of_pixels,
    knn_of_subnets,
)

__all__ = [
    "REPORTED_K",
    "Origin",
    "Report",
    "evaluate_subnets",
    "evaluation_file",
    "knn_accuracy",
    "knn_of_pixels",
    "knn_of_subnets",
]
