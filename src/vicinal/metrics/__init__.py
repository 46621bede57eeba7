"""Metrics: pure functions of model outputs and targets, and tallies of them that add up over batches and processes."""

from vicinal.metrics.accuracy import TopK, accuracy
from vicinal.metrics.calibration import Calibration, calibration_error
from vicinal.metrics.efficientnet import efficientnet_lite0
from vicinal.metrics.extractor import Extractor
from vicinal.metrics.frechet import frechet_distance, gaussian_distance
from vicinal.metrics.inception import inception
from vicinal.metrics.manifold import PrecisionRecall, precision_recall
from vicinal.metrics.moments import Moments
from vicinal.metrics.tally import Metric, Tallies, across_processes, rows_across_processes

__all__ = [
    "Calibration",
    "Extractor",
    "Metric",
    "Moments",
    "PrecisionRecall",
    "Tallies",
    "TopK",
    "accuracy",
    "across_processes",
    "calibration_error",
    "efficientnet_lite0",
    "frechet_distance",
    "gaussian_distance",
    "inception",
    "precision_recall",
    "rows_across_processes",
]
