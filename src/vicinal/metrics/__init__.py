"""Metrics: pure functions of model outputs and targets, and tallies of them that add up over batches and processes."""

from vicinal.metrics.accuracy import TopK, accuracy
from vicinal.metrics.calibration import Calibration, calibration_error
from vicinal.metrics.tally import Metric, Tallies, across_processes

__all__ = ["Calibration", "Metric", "Tallies", "TopK", "accuracy", "across_processes", "calibration_error"]
