"""Text of the Long Range Arena (Tay et al. 2021, section 2.2.2): IMDb reviews (Maas et al. 2011) as bytes.

Read through TensorFlow Datasets, and prepared, where that has not been done, without TensorFlow.
"""

import pathlib
import re
import tarfile
from collections.abc import Sequence

import numpy as np

from lra_jax import errors
from lra_jax.data import cache, sources
from lra_jax.data.sources import Split

VOCAB_SIZE = 257  # 256 bytes, and 0 for padding
CLASS_NAMES = ("negative", "positive")


def load(data_dir: str | None = None, max_length: int = 4096, validation: str | None = None) -> dict[str, Split]:
  """IMDb reviews by the bytes of their text, 25,000 to train on and 25,000 to test.

  Args:
    data_dir: the TFDS folder; None or "" for $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    max_length: L, in bytes; longer reviews lose their end. The benchmark takes 1,000 to 4,096.
    validation: None leaves it to the caller to carve one from the training examples, as `tasks.load` does by class and
      seed; "test" gives the test split under that name as well, as the benchmark does, whose choices are then made on
      test data.

  Returns:
    "train", "test" and, where asked for, "validation": inputs (N, L) uint16 ids as of `encode`, labels (N,) with 1 for
    positive, lengths (N,).

  Raises:
    UserError: the data are not there and cannot be prepared, or cannot be read.
  """
  if validation not in (None, "test"):
    raise errors.UserError(f"validation={validation!r} of text: expected None, to carve it, or 'test'")
  builder, where = sources.open_tfds(data_dir, _builder)
  files = sorted(pathlib.Path(builder.data_path).glob("*array_record*"))
  entry = cache.entry("text", f"length{max_length}", str(builder.data_path), files)
  splits = cache.load(entry, lambda: _read(builder, max_length, where))
  return splits | {"validation": splits["test"]} if validation else splits


def _read(builder, max_length, where):
  splits = {}
  for name in ("train", "test"):
    try:
      source = builder.as_data_source(name)
      examples = source.__getitems__(list(range(len(source))))
      inputs, lengths = encode([example["text"] for example in examples], max_length)
      labels = np.array([example["label"] for example in examples], np.int32)
    except MemoryError:
      raise
    except Exception as error:
      raise errors.UserError(
        f"{where}: split {name!r} cannot be read ({errors.first_line(error)}); remove the folder so that it is "
        "prepared anew (as array_record)"
      ) from error
    if not np.isin(labels, (0, 1)).all():
      raise errors.UserError(
        f"{where}: split {name!r} has the label {labels[~np.isin(labels, (0, 1))][0]}, expected 0 or 1; remove the "
        "folder so that it is prepared anew"
      )
    splits[name] = Split(inputs, labels, lengths)
  return splits


def encode(texts: Sequence[bytes], max_length: int) -> tuple[np.ndarray, np.ndarray]:
  """Bytes to tokens: byte b is b + 1, as in the benchmark's ByteTextEncoder; 0 fills up.

  Nothing is decoded: bytes that are no UTF-8 are tokens like all others, and a character cut in two at the end stays
  so. An empty text becomes one blank, so that no sequence is without a token.

  Args:
    texts: N of them.
    max_length: L; bytes after these are cut off.

  Returns:
    (N, L) uint16 in 0 … 256, and the numbers of tokens (N,) int32 in 1 … L.
  """
  ids = np.zeros((len(texts), max_length), np.uint16)
  lengths = np.zeros(len(texts), np.int32)
  for row, text in enumerate(texts):
    data = np.frombuffer(text[:max_length] or b" ", np.uint8)
    ids[row, : len(data)] = data
    ids[row, : len(data)] += 1
    lengths[row] = len(data)
  return ids, lengths


def decode(tokens: np.ndarray) -> str:
  """The text of (L,) tokens up to the first padding; bytes that are no UTF-8 show as �."""
  return bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode(errors="replace")


def _builder(data_dir):
  import tensorflow_datasets as tfds

  original = tfds.builder_cls("imdb_reviews")

  class ImdbReviews(original, skip_registration=True):
    """TFDS's builder without TensorFlow, which its own needs for opening the archive; same keys, so same order."""

    pkg_dir_path = original.pkg_dir_path
    url_infos = original.url_infos  # size and checksum of the archive

    def _split_generators(self, dl_manager):
      (url,) = self.url_infos
      archive = dl_manager.download(url)
      return {
        "train": self._generate_examples(archive, "train/(neg|pos)"),
        "test": self._generate_examples(archive, "test/(neg|pos)"),
        "unsupervised": self._generate_examples(archive, "train/(unsup)"),
      }

    def _generate_examples(self, archive, folder):
      pattern = re.compile(rf"aclImdb/{folder}/[^/]+\.txt")
      with tarfile.open(archive) as tar:  # read in place: no member becomes a file
        for member in tar:
          match = pattern.fullmatch(member.name)
          if match and member.isfile():
            label = -1 if match[1] == "unsup" else match[1]
            yield member.name, {"text": tar.extractfile(member).read().strip(), "label": label}

  return ImdbReviews(data_dir=data_dir, file_format="array_record")
