"""Metrics: pure functions of model outputs and targets, and tallies of them that add up over batches and processes."""

from vicinal.metrics.accuracy import TopK, accuracy
from vicinal.metrics.calibration import Calibration, calibration_error
from vicinal.metrics.overlap import MeanIoU
from vicinal.metrics.panoptic import PanopticQuality
from vicinal.metrics.precision import AveragePrecision, Detections
from vicinal.metrics.scenes import Instances, Segments
from vicinal.metrics.tally import Metric, Tallies, across_processes

__all__ = [
    "AveragePrecision",
    "Calibration",
    "Detections",
    "Instances",
    "MeanIoU",
    "Metric",
    "PanopticQuality",
    "Segments",
    "Tallies",
    "TopK",
    "accuracy",
    "across_processes",
    "calibration_error",
]
