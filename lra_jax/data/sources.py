"""Where bytes come from: scikit-learn's digits inside its package, and TensorFlow Datasets without TensorFlow."""

import concurrent.futures
import glob
import gzip
import io
import os
import pathlib
import shutil
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lra_jax import errors

# TFDS's names of our splits; the second where the labels of the official test images are not public.
_TRAIN_TEST = {"train": "train", "test": "test"}
TRAIN_VALIDATION = {"train": "train", "test": "validation"}
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

  def arrays(self) -> list[np.ndarray]:
    """What two copies of a split must agree in."""
    return [array for array in self if array is not None]

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


def cifar10(data_dir: str | None = None, size: int | None = None) -> dict[str, Split]:
  """CIFAR-10 (Krizhevsky 2009): 50,000 and 10,000 RGB images of 32 × 32 px, through TensorFlow Datasets.

  Prepared data are read as they are; data not yet prepared are downloaded and prepared first.

  Args:
    data_dir: the TFDS folder; None or "" for $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    size: of the images in pixels, other than 32 by `pictures.resize_and_crop`.

  Returns:
    Splits "train" and "test".

  Raises:
    UserError: the data are not there and cannot be prepared, or cannot be read.
  """
  return _tfds(data_dir, _cifar("Cifar10"), _TRAIN_TEST, size=size)


def cifar10_grey(data_dir: str | None = None) -> dict[str, Split]:
  """CIFAR-10 in 256 grey levels, images (N, 32, 32, 1), as the Long Range Arena makes them; else as `cifar10`."""
  return {name: split._replace(inputs=grey(split.inputs)) for name, split in cifar10(data_dir).items()}


def cifar100(data_dir: str | None = None, labels: str = "fine", size: int | None = None) -> dict[str, Split]:
  """CIFAR-100 (Krizhevsky 2009): as `cifar10`, with 100 classes ("fine"), or their 20 superclasses ("coarse").

  Raises:
    ValueError: other labels.
    UserError: as of `cifar10`.
  """
  if labels not in ("fine", "coarse"):
    raise ValueError(f"labels={labels!r}, expected 'fine' or 'coarse'")
  key = {"fine": "label", "coarse": "coarse_label"}[labels]
  return _tfds(data_dir, _cifar("Cifar100"), _TRAIN_TEST, label=key, size=size)


def mnist(data_dir: str | None = None) -> dict[str, Split]:
  """MNIST (LeCun et al. 1998): 60,000 and 10,000 handwritten digits, images (N, 28, 28, 1); else as `cifar10`."""
  return _tfds(data_dir, _mnist("MNIST"), _TRAIN_TEST)


def fashion_mnist(data_dir: str | None = None) -> dict[str, Split]:
  """Fashion-MNIST (Xiao et al. 2017): pictures of clothes in the format and the numbers of `mnist`."""
  return _tfds(data_dir, _mnist("FashionMNIST"), _TRAIN_TEST)


def tiny_imagenet(data_dir: str | None = None, size: int = 64, max_corrupt: int = 0) -> dict[str, Split]:
  """Tiny ImageNet (Stanford CS231n, 2015): 200 classes, 100,000 and 10,000 images of 64 × 64 px, greyscale as RGB.

  Read from the original layout where `data_dir`, or tiny-imagenet-200 in it, has wnids.txt (`folders.tiny_imagenet`),
  else through TFDS, where the published archive is downloaded and prepared first. The official validation images are
  the test split: labels of the official test images are not public.

  Args:
    data_dir: as of `cifar10`, or a folder of the original layout.
    size: of the images in pixels, other than 64 by `pictures.resize_and_crop`.
    max_corrupt: how many images of the original layout may be skipped because they cannot be read.

  Returns:
    Splits "train" and "test", images (N, size, size, 3).

  Raises:
    UserError: as of `cifar10` and of `folders.tiny_imagenet`.
  """
  from lra_jax.data import folders

  path = tiny_imagenet_folder(data_dir)
  if path is not None:
    return folders.tiny_imagenet(path, size, max_corrupt=max_corrupt)
  return _tfds(data_dir, tiny_imagenet_builder, TRAIN_VALIDATION, size=size)


def tiny_imagenet_folder(data_dir: str | None) -> pathlib.Path | None:
  """The folder of the original layout: `data_dir` or tiny-imagenet-200 in it; None where neither has wnids.txt."""
  root = data_folder(data_dir)
  return next((path for path in (root, root / "tiny-imagenet-200") if os.path.isfile(path / "wnids.txt")), None)


def tiny_imagenet_names(data_dir: str | None = None) -> tuple[str, ...]:
  """Class names of Tiny ImageNet where `tiny_imagenet` finds it, maybe a part; prepares it and raises as that does."""
  from lra_jax.data import folders

  path = tiny_imagenet_folder(data_dir)
  if path is not None:
    return folders.list_tiny_imagenet(path).class_names
  builder, _ = open_tfds(data_dir, tiny_imagenet_builder)
  return tuple(name.partition(" ")[2] for name in builder.info.features["label"].names)  # behind the WordNet id


def imagenet2012_names(data_dir: str | None = None) -> tuple[str, ...]:
  """WordNet ids of ImageNet's classes in the order of the labels, as TFDS has them."""
  import tensorflow_datasets as tfds

  return tuple(tfds.builder("imagenet2012", data_dir=data_folder(data_dir)).info.features["label"].names)


def imagenette(data_dir: str | None = None, variant: str = "160px-v2", size: int = 160) -> dict[str, Split]:
  """Imagenette (Howard 2019), ten classes of ImageNet, 9,469 and 3,925 images in its second version.

  Args:
    data_dir: as of `cifar10`; here the data must have been prepared, for which TFDS needs TensorFlow.
    variant: TFDS's "160px-v2", "320px-v2" (shorter side) or "full-size-v2".
    size: of the images in pixels, by `pictures.resize_and_crop`.

  Returns:
    Splits "train" and "test", the latter the official validation split; images (N, size, size, 3).

  Raises:
    UserError: another variant, or the data are not there or cannot be read; it says how to prepare them.
  """
  return _tfds(data_dir, imagenette_builder(variant), TRAIN_VALIDATION, size=size)


def imagenette_builder(variant: str) -> Callable[[pathlib.Path], Any]:
  """Gives TFDS's builder of a folder; errors as of `imagenette`."""
  errors.check_known("variant of imagenette:", variant, ("160px-v2", "320px-v2", "full-size-v2"))
  return lambda data_dir: _prepared_by_user(f"imagenette/{variant}", data_dir)


def imagenet2012(data_dir: str | None = None, size: int = 224) -> dict[str, Split]:
  """ImageNet (ILSVRC 2012; Russakovsky et al. 2015), 1,281,167 and 50,000 images of 1,000 classes, in memory.

  All images of 224 px take 200 GB; this serves small ones, such as 32 px with 4 GB.

  Arguments, result and errors as of `imagenette`; TFDS prepares the data from two archives that the user downloads.
  """
  return _tfds(data_dir, imagenet2012_builder, TRAIN_VALIDATION, size=size)


def imagenet2012_builder(data_dir: pathlib.Path) -> Any:
  """TFDS's builder of that folder; errors as of `imagenet2012`."""
  return _prepared_by_user("imagenet2012", data_dir, _IMAGENET_ARCHIVES)


def grey(x_NHWC: np.ndarray) -> np.ndarray:
  """(…, 3) uint8 to (…, 1) uint8 luma (ITU-R BT.601), with the weights and the rounding of `tf.image.rgb_to_grayscale`.

  TensorFlow takes the weighted mean of x / 255 in float32, multiplies by 255.5 and cuts the fraction off.
  """
  luma = (x_NHWC.astype(np.float32) / np.float32(255)) @ np.array([0.2989, 0.5870, 0.1140], np.float32)
  return np.minimum(luma * np.float32(255.5), 255).astype(np.uint8)[..., None]


def data_folder(data_dir: str | None) -> pathlib.Path:
  """The folder of all data: as given; None or "" for $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
  return pathlib.Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def _cifar(name):
  """Builder of "Cifar10" or "Cifar100" from the TFDS folder."""
  import tensorflow_datasets as tfds

  original = getattr(tfds.image_classification, name)

  class Cifar(original, skip_registration=True):
    """TFDS's builder without TensorFlow, which its own needs for unpacking, opening files and PNG encoding."""

    name = original.name
    url_infos = original.url_infos  # size and checksum of the archive

    def _split_generators(self, dl_manager):
      info = self._cifar_info
      archive = dl_manager.download(info.url)
      with tarfile.open(archive) as tar:
        for key, file in zip(info.label_keys, info.label_files, strict=True):
          self.info.features[key].names = tar.extractfile(info.prefix + file).read().decode().split()
      return {
        "train": self._generate_examples("train_", (archive, info.train_files)),
        "test": self._generate_examples("test_", (archive, info.test_files)),
      }

    def _generate_examples(self, split_prefix, filepaths):
      archive, names = filepaths
      keys = self._cifar_info.label_keys
      index = 0
      with tarfile.open(archive) as tar:
        for name in names:
          content = tar.extractfile(self._cifar_info.prefix + name).read()
          for record in np.frombuffer(content, np.uint8).reshape(-1, len(keys) + 3072):
            image = record[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)  # red, green and blue planes
            labels = dict(zip(keys, record, strict=False))  # the first bytes
            yield index, labels | {"id": f"{split_prefix}{index:05d}", "image": _png(image)}
            index += 1

  return lambda data_dir: Cifar(data_dir=data_dir, file_format="array_record")


def _mnist(name):
  """Builder of "MNIST" or "FashionMNIST" from the TFDS folder."""
  import tensorflow_datasets as tfds

  original = getattr(tfds.image_classification, name)

  class Mnist(original, skip_registration=True):
    """TFDS's builder without TensorFlow, which its own needs for unpacking, opening files and PNG encoding."""

    name = original.name
    url_infos = original.url_infos

    def _split_generators(self, dl_manager):
      files = {"train": "train", "test": "t10k"}
      urls = {
        split: [f"{self.URL}{prefix}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
        for split, prefix in files.items()
      }
      return {split: self._generate_examples(*paths) for split, paths in dl_manager.download(urls).items()}

    def _generate_examples(self, images_path, labels_path):
      images, labels = _read_idx(images_path), _read_idx(labels_path)
      for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield index, {"image": _png(image), "label": label}

  return lambda data_dir: Mnist(data_dir=data_dir, file_format="array_record")


def _read_idx(path):
  """Array from a packed IDX file: 0, 0, 8 for uint8, the number of axes, their sizes in 32 bits, the values."""
  with gzip.open(path) as file:
    content = file.read()
  if content[:3] != b"\0\0\x08":
    raise ValueError(f"{os.path.basename(path)} is no IDX file of bytes")
  axes = content[3]
  return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(np.frombuffer(content, ">u4", axes, offset=4))


# Of the archive at Stanford, which publishes no checksum; this one is what those who downloaded it have recorded.
_TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_IMAGENET_BYTES = 248_100_043
_TINY_IMAGENET_SHA256 = "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821"


def tiny_imagenet_builder(data_dir: pathlib.Path) -> Any:
  """TFDS's builder of Tiny ImageNet, ours: TFDS has none."""
  import tensorflow_datasets as tfds

  from lra_jax.data import folders

  class TinyImagenet(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads the archive in place, so no path in it becomes a file; pictures stay the JPEG files that they are."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {  # noqa: RUF012 (TFDS's own attribute)
      _TINY_IMAGENET_URL: tfds.download.checksums.UrlInfo(
        tfds.core.utils.Size(_TINY_IMAGENET_BYTES), _TINY_IMAGENET_SHA256, "tiny-imagenet-200.zip"
      )
    }

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        description="Tiny ImageNet: 200 classes of ImageNet at 64 × 64 px, 500 images to train on and 50 to validate.",
        features=tfds.features.FeaturesDict(
          {
            "id": tfds.features.Text(),  # name of the file
            "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=200),
          }
        ),
        supervised_keys=("image", "label"),
        homepage="http://cs231n.stanford.edu",
      )

    def _split_generators(self, dl_manager):
      archive = dl_manager.download(_TINY_IMAGENET_URL)
      with zipfile.ZipFile(archive) as file:
        text = lambda name: file.read(f"tiny-imagenet-200/{name}").decode()
        wnids, names = folders.tiny_imagenet_classes(text("wnids.txt"), text("words.txt"), archive)
        labels = folders.tiny_imagenet_labels(text("val/val_annotations.txt"), wnids, archive)
        members = sorted(file.namelist())
      self.info.features["label"].names = [f"{wnid} {name}" for wnid, name in zip(wnids, names, strict=True)]
      numbers = {wnid: label for label, wnid in enumerate(wnids)}
      train = {}
      for member in members:
        match member.split("/"):
          case ["tiny-imagenet-200", "train", wnid, "images", name] if name and wnid in numbers:
            train[member] = numbers[wnid]
      validation = {f"tiny-imagenet-200/val/images/{name}": label for name, label in sorted(labels.items())}
      return {
        "train": self._generate_examples(archive, train),
        "validation": self._generate_examples(archive, validation),
      }

    def _generate_examples(self, archive, labels):
      with zipfile.ZipFile(archive) as file:
        for member, label in labels.items():
          name = os.path.basename(member)
          yield name, {"id": name, "image": io.BytesIO(file.read(member)), "label": label}

  return TinyImagenet(data_dir=data_dir, file_format="array_record")


_IMAGENET_ARCHIVES = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from https://image-net.org/download-images"


def _prepared_by_user(name, data_dir, archives=None):
  """Builder of a data set that TFDS can prepare with TensorFlow alone; where that is not done, it says how to."""
  import tensorflow_datasets as tfds

  builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
  if not builder.is_prepared():
    put = f"put {archives} into {data_dir}/downloads/manual, and " if archives else ""
    manual = f" --manual_dir={data_dir}/downloads/manual" if archives else ""
    raise errors.UserError(
      f"{name} in {data_dir}: not prepared there; set TFDS_DATA_DIR or --config.task.data_dir to a folder that has "
      f"it, or {put}run once, in an environment with `pip install tensorflow tensorflow-datasets array-record` "
      f"(TensorFlow prepares, training does not need it): `tfds build {name} --data_dir={data_dir}{manual} "
      f"--file_format=array_record`; {TRY_DIGITS}"
    )
  return builder


def _tfds(
  data_dir: str | None,
  make: Callable[[pathlib.Path], Any],  # a tfds.core.DatasetBuilder; its package is not imported before it is needed
  splits: dict[str, str],
  label: str = "label",
  size: int | None = None,
) -> dict[str, Split]:
  """Reads splits of a builder into memory or from the cache, preparing them first where they are not there.

  Args:
    data_dir: the TFDS folder, as of `cifar10`.
    make: gives the builder of that folder.
    splits: TFDS's names of ours.
    label: feature that is the label.
    size: of the images in pixels; None where all have one size.
  """
  from lra_jax.data import cache

  builder, where = open_tfds(data_dir, make)
  files = files_of(builder, where, splits)
  variant = f"{builder.version}-{label}" + (f"-{size}px" if size else "")
  entry = cache.entry(builder.info.full_name, variant, os.path.abspath(builder.data_path), files)
  return cache.load(entry, lambda: {ours: _read(builder, name, label, size, where) for ours, name in splits.items()})


def open_tfds(data_dir: str | None, make: Callable[[pathlib.Path], Any]) -> tuple[Any, str]:
  """A builder whose data are prepared, downloaded first where need be, and what errors call it: name and folder.

  Args:
    data_dir: as of `data_folder`.
    make: gives the builder (tfds.core.DatasetBuilder) of that folder.

  Raises:
    UserError: the data set cannot be opened or prepared. What was downloaded or prepared in part is removed.
  """
  root = data_folder(data_dir)
  try:
    builder = make(root)
  except errors.UserError:
    raise
  except Exception as error:  # such as: prepared in another format
    raise errors.UserError(
      f"{root}: the data set there cannot be opened ({errors.first_line(error)}); it must be prepared as array_record: "
      f"remove its folder, so that it is prepared anew; {TRY_DIGITS}"
    ) from error
  where = f"{builder.name} in {root}"
  if not builder.is_prepared():
    try:
      _prepare(builder, where)
    except errors.UserError:
      builder = make(root)
      if not builder.is_prepared():  # else another process was faster
        raise
  return builder, where


def files_of(builder: Any, where: str, splits: dict[str, str]) -> list[str]:
  """The files of some splits of a builder.

  Args:
    builder, where: of `open_tfds`.
    splits: TFDS's names of ours.

  Raises:
    UserError: a split is missing.
  """
  infos = builder.info.splits
  for split in splits.values():
    if split not in infos:
      raise errors.UserError(f"{where}: has no split {split!r}, only {', '.join(infos)}; prepare it anew and whole")
  return [os.fspath(file) for split in splits.values() for file in infos[split].filepaths]


def _prepare(builder, where):
  import tensorflow_datasets as tfds

  downloads = pathlib.Path(builder.data_dir_root, "downloads")
  manual = downloads / "manual"
  archives = f"put {' and '.join(builder.url_infos)} into {manual}"
  pattern = os.path.join(glob.escape(os.fspath(downloads)), builder.name, "**", "*.tmp.*")
  unfinished = lambda: set(glob.glob(pattern, recursive=True))
  before = unfinished()
  try:
    for url, info in builder.url_infos.items():
      path = manual / info.filename
      if not os.path.isfile(path):  # TFDS itself tries for minutes where there is no network
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30).close()
      elif (found := tfds.download.checksums.compute_url_info(path)) != info:
        raise errors.UserError(
          f"{path}: {found.size:,} bytes with SHA-256 {found.checksum}, expected {info.size:,} and {info.checksum}: "
          f"half-downloaded, damaged or another file; remove it, and {archives} again"
        )
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  except errors.UserError:
    raise
  except Exception as error:  # TFDS and what it calls raise dozens of types
    for path in unfinished() - before:
      shutil.rmtree(path, ignore_errors=True)
    raise errors.UserError(
      f"{where}: not prepared, and preparing it failed ({errors.first_line(error)}); run this once where there is "
      f"network, or {archives}, or set TFDS_DATA_DIR or --config.task.data_dir to a folder that has it; {TRY_DIGITS}"
    ) from error


_CHUNK = 64  # records that one thread takes at a time


def _read(builder, split, label, size, where):
  """A split whole, decoded in threads, in the order of TFDS."""
  import tensorflow_datasets as tfds
  from tensorflow_datasets.proto import tf_example_pb2

  from lra_jax.data import pictures

  channels = builder.info.features["image"].shape[-1]
  try:
    # TFDS's own reading of a record takes as long as decoding a picture of 32 px.
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    height, width = (size, size) if size else builder.info.features["image"].shape[:2]
    images = np.empty((len(source), height, width, channels), np.uint8)
    labels = np.empty(len(source), np.int32)

    def decode_chunk(start):
      records = source.__getitems__(list(range(start, min(start + _CHUNK, len(source)))))
      for index, record in enumerate(records, start):
        features = tf_example_pb2.Example.FromString(record).features.feature
        image = pictures.decode(features["image"].bytes_list.value[0], f"example {index}", channels)
        images[index] = pictures.resize_and_crop(image, size) if size else image
        labels[index] = features[label].int64_list.value[0]

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(decode_chunk, range(0, len(source), _CHUNK)))
  except MemoryError:
    raise
  except Exception as error:
    raise errors.UserError(
      f"{where}: split {split!r} cannot be read ({errors.first_line(error)}); remove the folder so that it is "
      f"prepared anew (as array_record); {TRY_DIGITS}"
    ) from error
  return Split(images, labels)


def _png(image):
  from PIL import Image

  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format="png")
  buffer.seek(0)
  return buffer
