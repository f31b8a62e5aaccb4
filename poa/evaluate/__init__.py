"""Accuracy of subnets: features once, then the protocols."""

from poa.evaluate.knn import REPORTED_K, knn_accuracy
from poa.evaluate.scores import Report, accuracies, number_format, reported
from poa.evaluate.suite import PROTOCOLS
from poa.evaluate.sweep import Origin, evaluate_subnets, evaluation_file, knn_of_subnets

__all__ = [
    "PROTOCOLS",
    "REPORTED_K",
    "Origin",
    "Report",
    "accuracies",
    "evaluate_subnets",
    "evaluation_file",
    "knn_accuracy",
    "knn_of_subnets",
    "number_format",
    "reported",
]
