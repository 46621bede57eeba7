"""Data sets, per-sample augmentation and the stream of batches; this room knows no model."""

from vicinal.data.batch import Batch
from vicinal.data.dataset import DataMissing, Dataset, Info, Source
from vicinal.data.sources import SOURCES, Digits, FashionMnist, ImageFolders, Shards
from vicinal.data.stream import Share, Stream

__all__ = [
    "SOURCES",
    "Batch",
    "DataMissing",
    "Dataset",
    "Digits",
    "FashionMnist",
    "ImageFolders",
    "Info",
    "Shards",
    "Share",
    "Source",
    "Stream",
]
