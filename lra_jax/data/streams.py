"""Sources whose images need not fit into memory: as the functions of the same names in `sources` and `folders`.

Each finds the images and their labels, and gives `stream.Streamed` splits, which read them when they are needed.
"""

import dataclasses
import os

from lra_jax.data import folders, sources, stream
from lra_jax.data.stream import Streamed


def folder(path: str | os.PathLike, size: int, max_corrupt: int = 0) -> dict[str, Streamed]:
  """As `folders.folder`."""
  return _allow(stream.of_listing(folders.list_files(path), size), max_corrupt)


def tiny_imagenet(data_dir: str | None = None, size: int = 64, max_corrupt: int = 0) -> dict[str, Streamed]:
  """As `sources.tiny_imagenet`."""
  path = sources.tiny_imagenet_folder(data_dir)
  if path is not None:
    return _allow(stream.of_listing(folders.list_tiny_imagenet(path), size), max_corrupt)
  return stream.of_tfds(*sources.open_tfds(data_dir, sources.tiny_imagenet_builder), sources.TRAIN_VALIDATION, size)


def imagenette(data_dir: str | None = None, variant: str = "160px-v2", size: int = 160) -> dict[str, Streamed]:
  """As `sources.imagenette`."""
  return stream.of_tfds(
    *sources.open_tfds(data_dir, sources.imagenette_builder(variant)), sources.TRAIN_VALIDATION, size
  )


def imagenet2012(data_dir: str | None = None, size: int = 224) -> dict[str, Streamed]:
  """As `sources.imagenet2012`."""
  return stream.of_tfds(*sources.open_tfds(data_dir, sources.imagenet2012_builder), sources.TRAIN_VALIDATION, size)


def _allow(splits, max_corrupt):
  return {name: dataclasses.replace(split, max_corrupt=max_corrupt) for name, split in splits.items()}
