"""Decoded data sets on disk, so that the second start of a run need not decode them again.

An entry is a folder of .npy files that are mapped into memory, and of a file that says what they must be. It is written
beside its place and then renamed, so that it is there whole or not at all, also for another process. Its name holds a
fingerprint of the files it was made from: an entry never changes, and where those have changed it is not found.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable

import numpy as np

from lra_jax import errors
from lra_jax.data.sources import Split

_FORMAT = 2  # of the entries; another number where what is stored for the same source changes
_DAY = 24 * 60 * 60  # seconds; no entry takes as long to write


def root() -> pathlib.Path:
  """The folder of all entries: $LRA_JAX_CACHE, else $XDG_CACHE_HOME/lra_jax, else ~/.cache/lra_jax."""
  folder = os.environ.get("LRA_JAX_CACHE")
  if not folder:
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lra_jax")
  return pathlib.Path(folder).expanduser()


def digest(texts: Iterable[str]) -> str:
  """12 hexadecimal digits that change with these texts and their order."""
  joined = "\0".join(texts).encode(errors="surrogateescape")
  return hashlib.sha1(joined, usedforsecurity=False).hexdigest()[:12]


def fingerprint(files: Iterable[str | os.PathLike]) -> str:
  """12 hexadecimal digits that change with the paths, the sizes or the times of change (ns) of these files.

  A file that cannot be looked at counts as one of size −1.
  """
  texts = []
  for file in files:
    try:
      stat = os.stat(file)
      texts.append(f"{os.fspath(file)}\0{stat.st_size}\0{stat.st_mtime_ns}")
    except OSError:
      texts.append(f"{os.fspath(file)}\0-1")
  return digest(texts)


def entry(name: str, variant: str, source: str, files: Iterable[str | os.PathLike]) -> pathlib.Path:
  """The folder in which `write` puts what was decoded from these files, and where `read` finds it.

  Args:
    name: of the data set.
    variant: what else decides about the result: version, size of the pictures.
    source: where it was read from; two sources do not share an entry.
    files: of which it was read, in any fixed order.
  """
  kind = f"{_safe(name)}-{_safe(variant)}-{digest([name, variant, source])}"
  return root() / kind / f"{_FORMAT}-{fingerprint(files)}"


def read(entry: pathlib.Path) -> dict[str, Split] | None:
  """Splits as they were written, their arrays read-only and mapped into memory.

  None where there is no such entry, and, after one line of warning, where it is damaged.
  """
  try:
    return _read(entry)
  except Exception as error:  # NumPy's and JSON's parsers raise many types
    warn(f"{entry}: damaged ({errors.first_line(error)}); it is made anew")
    return None


def write(entry: pathlib.Path, splits: dict[str, Split]) -> None:
  """Stores splits, and removes what was made from other versions of the same files.

  A folder that cannot be written and a full disk cost one line of warning, and leave nothing half-written. Several
  processes may write the same entry at once.
  """
  try:
    _store(entry, splits)
  except (OSError, ValueError) as error:  # ValueError: a path with a null byte
    warn(
      f"{entry}: decoded data cannot be cached ({error}), the next start decodes them again; "
      "set LRA_JAX_CACHE to a folder that can be written and has room"
    )
  else:
    _sweep(entry)


def load(entry: pathlib.Path, build: Callable[[], dict[str, Split]]) -> dict[str, Split]:
  """What `read` finds, else the result of `build`, which is then written; raises what `build` raises."""
  splits = read(entry)
  if splits is None:
    splits = build()
    write(entry, splits)
  return splits


def warn(message: str) -> None:
  """Prints one line on standard error."""
  print(f"warning: {message}", file=sys.stderr, flush=True)


def _read(entry):
  if not os.path.isdir(entry):  # which says no as well where looking is forbidden
    return None
  splits = {}
  for split, arrays in json.loads((entry / "contents.json").read_text()).items():
    fields = dict.fromkeys(Split._fields)
    for field, (dtype, shape) in arrays.items():
      path = entry / f"{split}.{field}.npy"
      array = np.asarray(np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False))
      if array.dtype.str != dtype or list(array.shape) != shape:
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, expected {dtype} {shape}")
      fields[field] = array
    splits[split] = Split(**fields)
  return splits


def _store(entry, splits):
  entry.parent.mkdir(parents=True, exist_ok=True)
  temporary = entry.parent / f".writing-{uuid.uuid4().hex}"  # not of tempfile: others may read, as umask says
  aside = entry.parent / f".damaged-{uuid.uuid4().hex}"
  try:
    temporary.mkdir()
    contents = {}
    for split, arrays in splits.items():
      contents[split] = {}
      for field, array in arrays._asdict().items():
        if array is not None:
          _write(temporary / f"{split}.{field}.npy", np.ascontiguousarray(array))
          contents[split][field] = (array.dtype.str, array.shape)
    with open(temporary / "contents.json", "w") as file:
      json.dump(contents, file)
      _sync(file)
    try:
      os.replace(temporary, entry)
    except OSError:  # something is there: the same from another process, or a damaged entry
      if _whole(entry):
        return
      with contextlib.suppress(FileNotFoundError):  # another process took it away
        os.replace(entry, aside)
      try:
        os.replace(temporary, entry)
      except OSError:
        if not _whole(entry):
          raise
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
    _remove(aside)


def _whole(entry):
  with contextlib.suppress(Exception):
    return _read(entry) is not None
  return False


def _remove(path):
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
  else:
    path.unlink(missing_ok=True)


def _write(path, array):
  with open(path, "wb") as file:
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.reshape(-1).view(np.uint8).data)  # not np.save, which says nothing of a full disk
    _sync(file)


def _sync(file):
  """Before the renaming: after a power failure a file could else have its size, and zeros in it."""
  file.flush()
  os.fsync(file.fileno())


def _sweep(entry):
  """Removes entries made from files that have changed, and what killed processes left."""
  with contextlib.suppress(OSError):
    for path in entry.parent.iterdir():
      unfinished = path.name.startswith(".") and time.time() - path.stat().st_mtime < _DAY
      if path != entry and not unfinished:
        _remove(path)


def _safe(text):
  return "".join(c if c.isascii() and (c.isalnum() or c in "._") else "_" for c in text)[:60]
