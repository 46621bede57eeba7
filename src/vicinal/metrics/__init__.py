"""Metrics: pure functions of model outputs and targets, and tallies of them that add up over batches and processes."""

from vicinal.metrics.accuracy import TopK, accuracy
from vicinal.metrics.calibration import Calibration, calibration_error
from vicinal.metrics.frechet import frechet_distance, gaussian_distance
from vicinal.metrics.manifold import PrecisionRecall, precision_recall
from vicinal.metrics.moments import Moments
from vicinal.metrics.tally import Metric, Tallies, across_processes, rows_across_processes

__all__ = [
    "Calibration",
    "Metric",
    "Moments",
    "PrecisionRecall",
    "Tallies",
    "TopK",
    "accuracy",
    "across_processes",
    "calibration_error",
    "frechet_distance",
    "gaussian_distance",
    "precision_recall",
    "rows_across_processes",
]
