"""Where examples come from: sources, splits, augmentation."""

from attar.data.arrays import ArraySplit
from attar.data.base import Batch, Data, Split
from attar.data.config import DataConfig
from attar.data.load import load_data
from attar.data.loaders import LoaderSplit, from_loaders
from attar.data.parts import Examples, Parts, Source, sources

__all__ = [
    "ArraySplit",
    "Batch",
    "Data",
    "DataConfig",
    "Examples",
    "LoaderSplit",
    "Parts",
    "Source",
    "Split",
    "from_loaders",
    "load_data",
    "sources",
]
