"""Where bytes come from: scikit-learn's digits inside its package, and TensorFlow Datasets without TensorFlow."""

import io
import os
import pathlib
import tarfile
import urllib.request
from typing import NamedTuple

import numpy as np

from lra_jax import errors

TRY_DIGITS = "meanwhile `--config configs/sequencer2d.py:digits` trains on data that needs no download"


class Split(NamedTuple):
  """Examples of one split.

  Attributes:
    inputs: (N, H, W, C) uint8 images; or (N, L) uint8 or uint16 tokens, filled up with 0, which is no token; or
      (N, 2, L), pairs of such sequences.
    labels: (N,) int32 in 0 … S − 1.
    lengths: (N,), of pairs (N, 2), int32: how many tokens are real; None where all are.
  """

  inputs: np.ndarray
  labels: np.ndarray
  lengths: np.ndarray | None = None

  def take(self, indices: np.ndarray) -> "Split":
    """The examples of those indices."""
    return Split(*(None if array is None else array[indices] for array in self))


def digits(data_dir: str | None = None) -> dict[str, Split]:
  """1,797 handwritten digits scanned at 8 × 8 px (UCI optdigits), as scikit-learn ships them; no download.

  The 17 grey levels 0 … 16 become 0 … 255. There is no official test split of these; every fifth example of every
  class, in the order of the file, is taken for it, for all seeds alike.

  Args:
    data_dir: not used; the data are inside scikit-learn.

  Returns:
    Splits "train" and "test", images (N, 8, 8, 1).
  """
  del data_dir
  from sklearn import datasets  # half a second, needed by this task alone

  images, labels = datasets.load_digits(return_X_y=True)
  images = np.round(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  is_test = np.zeros(len(labels), bool)
  for label in range(10):
    is_test[np.flatnonzero(labels == label)[::5]] = True
  labels = labels.astype(np.int32)
  return {"train": Split(images[~is_test], labels[~is_test]), "test": Split(images[is_test], labels[is_test])}


def cifar10(data_dir: str | None = None) -> dict[str, Split]:
  """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 RGB images of 32 × 32 px, through TensorFlow Datasets.

  Prepared data are read as they are; data not yet prepared are downloaded and prepared first.

  Args:
    data_dir: the TFDS folder; None or "" for $TFDS_DATA_DIR, else ~/tensorflow_datasets.

  Returns:
    Splits "train" and "test".

  Raises:
    UserError: the data are not there and cannot be prepared, or cannot be read.
  """
  return _tfds(_cifar10_builder(_tfds_dir(data_dir)), ("train", "test"))


def cifar10_grey(data_dir: str | None = None) -> dict[str, Split]:
  """CIFAR-10 in 256 grey levels, images (N, 32, 32, 1), as the Long Range Arena makes them; else as `cifar10`."""
  return {name: split._replace(inputs=grey(split.inputs)) for name, split in cifar10(data_dir).items()}


def grey(x_NHWC: np.ndarray) -> np.ndarray:
  """(…, 3) uint8 to (…, 1) uint8 luma (ITU-R BT.601), with the weights and the rounding of `tf.image.rgb_to_grayscale`.

  TensorFlow takes the weighted mean of x / 255 in float32, multiplies by 255.5 and cuts the fraction off.
  """
  luma = (x_NHWC.astype(np.float32) / np.float32(255)) @ np.array([0.2989, 0.5870, 0.1140], np.float32)
  return np.minimum(luma * np.float32(255.5), 255).astype(np.uint8)[..., None]


def _tfds_dir(data_dir):
  default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return pathlib.Path(data_dir or default).expanduser()


def _cifar10_builder(data_dir):
  import tensorflow_datasets as tfds

  class Cifar10(tfds.image_classification.Cifar10, skip_registration=True):
    """TFDS's builder without TensorFlow, which its own needs for unpacking, opening files and PNG encoding."""

    url_infos = tfds.image_classification.Cifar10.url_infos  # size and checksum of the archive

    def _split_generators(self, dl_manager):
      info = self._cifar_info
      archive = dl_manager.download(info.url)
      with tarfile.open(archive) as tar:
        names = tar.extractfile(info.prefix + info.label_files[0]).read().decode().split()
      self.info.features["label"].names = names
      return {
        "train": self._generate_examples("train_", (archive, info.prefix, info.train_files)),
        "test": self._generate_examples("test_", (archive, info.prefix, info.test_files)),
      }

    def _generate_examples(self, split_prefix, filepaths):
      archive, prefix, names = filepaths
      index = 0
      with tarfile.open(archive) as tar:
        for name in names:
          content = tar.extractfile(prefix + name).read()
          for record in np.frombuffer(content, np.uint8).reshape(-1, 1 + 3072):  # label, then red, green, blue planes
            image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
            yield index, {"id": f"{split_prefix}{index:05d}", "label": record[0], "image": _png(image)}
            index += 1

  return Cifar10(data_dir=data_dir, file_format="array_record")


def _tfds(builder, splits):
  """Reads splits of a builder into memory, preparing them first where they are not there."""
  import tensorflow_datasets as tfds

  where = f"{builder.name} in {builder.data_dir}"
  if not builder.is_prepared():
    try:
      for url in builder.url_infos:  # TFDS itself tries for minutes where there is no network
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30).close()
      builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:  # TFDS and what it calls raise dozens of types
      raise errors.UserError(
        f"{where}: not prepared, and preparing it failed ({errors.first_line(error)}); run this once where there is "
        f"network, or set TFDS_DATA_DIR or --config.task.data_dir to a folder that has it; {TRY_DIGITS}"
      ) from error
  result = {}
  for split in splits:
    try:
      source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
      examples = source.__getitems__(list(range(len(source))))
      inputs = np.stack([_decode(example["image"]) for example in examples])
      labels = np.array([example["label"] for example in examples], np.int32)
    except Exception as error:
      raise errors.UserError(
        f"{where}: split {split!r} cannot be read ({errors.first_line(error)}); remove the folder so that it is "
        f"prepared anew (as array_record); {TRY_DIGITS}"
      ) from error
    result[split] = Split(inputs, labels)
  return result


def _png(image):
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="png")
  buffer.seek(0)
  return buffer


def _decode(encoded):
  from PIL import Image

  return np.asarray(Image.open(io.BytesIO(encoded)))
