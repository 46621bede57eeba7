"""Metrics: pure functions of model outputs and targets, and tallies of them that add up over batches and processes."""

from vicinal.metrics.accuracy import TopK, accuracy
from vicinal.metrics.calibration import Calibration, calibration_error
from vicinal.metrics.efficientnet import efficientnet_lite0
from vicinal.metrics.extractor import Extractor
from vicinal.metrics.frechet import frechet_distance, gaussian_distance
from vicinal.metrics.inception import inception
from vicinal.metrics.manifold import PrecisionRecall, precision_recall
from vicinal.metrics.moments import Moments
from vicinal.metrics.overlap import MeanIoU
from vicinal.metrics.panoptic import PanopticQuality
from vicinal.metrics.precision import AveragePrecision, Detections
from vicinal.metrics.scenes import Instances, Segments
from vicinal.metrics.tally import Metric, Tallies, across_processes, rows_across_processes

__all__ = [
    "AveragePrecision",
    "Calibration",
    "Detections",
    "Extractor",
    "Instances",
    "MeanIoU",
    "Metric",
    "Moments",
    "PanopticQuality",
    "PrecisionRecall",
    "Segments",
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
