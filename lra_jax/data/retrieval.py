"""Retrieval of the Long Range Arena (Tay et al. 2021, section 2.2.3): does one paper of the AAN cite the other?

The texts (ACL Anthology Network, Radev et al. 2013) are no longer offered for download; `load` reads the benchmark's
files where a user has them.
"""

import os
import pathlib

import numpy as np

from lra_jax import errors
from lra_jax.data import cache, sources, text
from lra_jax.data.sources import Split

CLASS_NAMES = ("unrelated", "related")
_FILES = {
  "train": "new_aan_pairs.train.tsv",
  "validation": "new_aan_pairs.eval.tsv",
  "test": "new_aan_pairs.test.tsv",
}
_COLUMNS = ("label", "id1", "id2", "text1", "text2")
_CHUNK = 4096  # pairs that become arrays at once


def load(data_dir: str | None, max_length: int = 4000) -> dict[str, Split]:
  """Pairs of papers by the bytes of their texts; complete, 147,086, 18,090 and 17,437 of them.

  Args:
    data_dir: has new_aan_pairs.train.tsv, new_aan_pairs.eval.tsv and new_aan_pairs.test.tsv, itself or in a folder
      "retrieval" or "tsv_data" (the name in the benchmark's archive); None or "" as of `sources.data_folder`.
    max_length: L, in bytes; the rest of a longer text is left out. The benchmark takes 4,000.

  Returns:
    "train", "validation" and "test" as of `read_tsv`.

  Raises:
    UserError: a file is missing, or as of `read_tsv`.
  """
  places = [sources.data_folder(data_dir) / name for name in ("retrieval", "tsv_data", "")]
  folder = next((place for place in places if any(os.path.exists(place / name) for name in _FILES.values())), places[0])
  missing = [name for name in _FILES.values() if not os.path.isfile(folder / name)]
  if missing:
    raise errors.UserError(
      f"{folder}: {', '.join(missing)} missing; Retrieval needs the three files {', '.join(_FILES.values())} of the "
      "Long Range Arena there, which are no longer offered for download: copy them from an older lra_release.gz "
      "(folder tsv_data) and set --config.task.data_dir to the folder above"
    )
  build = lambda: {split: read_tsv(folder / name, max_length) for split, name in _FILES.items()}
  files = [folder / name for name in _FILES.values()]
  return cache.load(cache.entry("retrieval", f"length{max_length}", str(folder.resolve()), files), build)


def read_tsv(path: str | pathlib.Path, max_length: int) -> Split:
  r"""Reads lines of label, id1, id2, text1, text2 with tabs between them, no header and no quoting.

  The columns and the labels written as numbers such as 1.0 are those of the benchmark's lra_benchmarks/matching/
  input_pipeline.py; bytes are taken as they stand in the file, as there: also where a text is written as a Python
  literal, b'…' with \n for a line's end.

  Args:
    path: the file.
    max_length: L.

  Returns:
    inputs (N, 2, L) uint16 ids as of `text.encode`, labels (N,) with 1 for related, lengths (N, 2).

  Raises:
    UserError: a line has another number of columns or another label than 0 or 1, or the file has no line.
  """
  inputs, labels, lengths = [], [], []
  pairs = []

  def encode():
    ids, counts = text.encode(pairs, max_length)
    inputs.append(ids.reshape(-1, 2, max_length))
    lengths.append(counts.reshape(-1, 2))
    pairs.clear()

  try:
    with open(path, "rb") as file:
      for number, line in enumerate(file, 1):
        columns = line.rstrip(b"\r\n").split(b"\t")
        if len(columns) != len(_COLUMNS):
          raise errors.UserError(
            f"{path}:{number}: {len(columns)} columns, expected {len(_COLUMNS)} ({', '.join(_COLUMNS)}) with tabs "
            "between them; the file may have been cut off, or be the release that has ids without texts"
          )
        label = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}.get(columns[0])
        if label is None:
          shown = columns[0][:20].decode(errors="replace")
          raise errors.UserError(f"{path}:{number}: label {shown!r}, expected 0 or 1; mend or remove the line")
        labels.append(label)
        pairs += [column[:max_length] for column in columns[3:]]
        if len(pairs) == 2 * _CHUNK:
          encode()
  except OSError as error:
    raise errors.UserError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
  if not labels:
    raise errors.UserError(f"{path}: empty, expected lines of {', '.join(_COLUMNS)}; copy the file again")
  if pairs:
    encode()
  return Split(np.concatenate(inputs), np.array(labels, np.int32), np.concatenate(lengths))
