"""Pictures in folders: one's own, by class, and Tiny ImageNet in its original layout.

Listing and decoding are apart: what streams takes a `Listing` and decodes as it goes.
"""

import concurrent.futures
import os
import pathlib
from typing import NamedTuple

import numpy as np

from lra_jax import errors
from lra_jax.data import cache, pictures
from lra_jax.data.sources import Split

EXTENSIONS = (".jpeg", ".jpg", ".png", ".webp")
_CHUNK = 64  # pictures that one thread takes at a time


class Listing(NamedTuple):
  """Pictures of a data set, not yet read.

  Attributes:
    class_names: of the S classes, in the order of the labels.
    files: of "train", "test" and perhaps "validation": (path, label in 0 … S − 1), by class, then by name.
  """

  class_names: tuple[str, ...]
  files: dict[str, list[tuple[str, int]]]


def list_files(path: str | os.PathLike) -> Listing:
  """Lists a folder of train/<class>/*, val/<class>/* and test/<class>/*; train and one of the others must be there.

  With both, val is the validation split and test the test split; with one of them, it is the test split. Classes are
  the folders' names in the order of their characters. Pictures are files ending in .jpeg, .jpg, .png or .webp in
  capitals or not; other files, and what begins with a dot, are not looked at.

  Raises:
    UserError: a folder is missing, cannot be read, or has no pictures; a class is not in every split.
  """
  path = pathlib.Path(path).expanduser()
  _check_folder(path, "train/<class>/* and val/<class>/*")
  if os.path.isfile(path / "wnids.txt"):
    raise errors.UserError(f"{path}: this is the layout of Tiny ImageNet (wnids.txt); take the task tiny_imagenet")
  held_out = [name for name in ("val", "test") if os.path.isdir(path / name)]
  for name in ["train", *([] if held_out else ["val"])]:
    _check_folder(path / name, "one folder for each class")
  folders = {name: _names(path / name, os.DirEntry.is_dir) for name in ("train", *held_out)}
  classes = folders["train"]
  if not classes:
    raise errors.UserError(f"{path / 'train'}: no class folders; expected train/<class>/* with JPEG, PNG or WebP files")
  for name in held_out:
    for there, missing in (("train", name), (name, "train")):
      lone = sorted(set(folders[there]) - set(folders[missing]))
      if lone:
        raise errors.UserError(
          f"{path / there / lone[0]}: class of {there} that {missing} lacks ({len(lone)} such); every class needs a "
          f"folder of pictures in both: add {path / missing / lone[0]} or remove this one"
        )
  renamed = {"val": "validation" if "test" in held_out else "test"}
  files = {renamed.get(name, name): _list_classes(path / name, classes) for name in folders}
  return Listing(tuple(classes), files)


def class_names(path: str | os.PathLike) -> tuple[str, ...]:
  """Class names of the folder that `list_files` describes, without looking at its pictures.

  Raises:
    UserError: train is missing, cannot be read, or has no folders.
  """
  train = pathlib.Path(path).expanduser() / "train"
  _check_folder(train, "one folder for each class")
  names = _names(train, os.DirEntry.is_dir)
  if not names:
    raise errors.UserError(f"{train}: no class folders; expected train/<class>/* with JPEG, PNG or WebP files")
  return tuple(names)


def list_tiny_imagenet(path: str | os.PathLike) -> Listing:
  """Lists Tiny ImageNet (Stanford CS231n, 2015) as its archive is laid out; any subset of its 200 classes will do.

  wnids.txt names the classes in the order of the labels, words.txt their words, of which the first is the class name.
  The official validation pictures are the test split, as the labels of the official test pictures are not public.

  Args:
    path: the folder with wnids.txt, words.txt, train/<wnid>/images/* and val/images/* with val/val_annotations.txt.

  Raises:
    UserError: a file or folder is missing, cannot be read, or names a class or a picture that is not there; a class has
      no pictures to train on.
  """
  path = pathlib.Path(path).expanduser()
  _check_folder(path, "wnids.txt, words.txt, train and val of tiny-imagenet-200.zip")
  annotations = path / "val" / "val_annotations.txt"
  wnids, class_names = tiny_imagenet_classes(_text(path / "wnids.txt"), _text(path / "words.txt"), path)
  train = []
  for label, wnid in enumerate(wnids):
    folder = path / "train" / wnid / "images"
    _check_folder(folder, "its pictures, of a class of wnids.txt")
    found = _pictures(folder)
    if not found:
      raise errors.UserError(f"{folder}: no pictures of a class of wnids.txt; unpack tiny-imagenet-200.zip anew")
    train += [(str(folder / name), label) for name in found]
  folder = path / "val" / "images"
  _check_folder(folder, "the pictures of val_annotations.txt")
  labels = tiny_imagenet_labels(_text(annotations), wnids, annotations)
  lone = sorted(set(labels) ^ set(_pictures(folder)))
  if lone:
    lacks = f"is named in {annotations} and missing" if lone[0] in labels else f"is not named in {annotations}"
    raise errors.UserError(f"{folder / lone[0]}: {lacks} ({len(lone)} such); unpack tiny-imagenet-200.zip anew")
  test = [(str(folder / name), label) for name, label in sorted(labels.items(), key=lambda item: (item[1], item[0]))]
  return Listing(class_names, {"train": train, "test": test})


def tiny_imagenet_classes(
  wnids_txt: str, words_txt: str, where: str | os.PathLike
) -> tuple[list[str], tuple[str, ...]]:
  """WordNet ids and names of the classes, in the order of the labels, from the text of both files.

  Raises:
    UserError: no class, one named twice, or one without a word; the line starts with `where`.
  """
  wnids = wnids_txt.split()
  words = dict(line.split("\t", 1) for line in words_txt.splitlines() if "\t" in line)
  if not wnids or len(set(wnids)) < len(wnids):
    raise errors.UserError(f"{where}: wnids.txt names {'a class twice' if wnids else 'no class'}; unpack it anew")
  for wnid in wnids:
    if not wnid.isalnum():  # it becomes part of paths
      raise errors.UserError(f"{where}: wnids.txt names {wnid!r}, expected ids such as n01443537; unpack it anew")
    if not words.get(wnid, "").split(",")[0].strip():
      raise errors.UserError(f"{where}: words.txt has no line for {wnid} of wnids.txt; unpack it anew")
  return wnids, tuple(words[wnid].split(",")[0].strip() for wnid in wnids)


def tiny_imagenet_labels(annotations: str, wnids: list[str], where: str | os.PathLike) -> dict[str, int]:
  """Labels of the validation pictures by file name, from the text of val_annotations.txt.

  Raises:
    UserError: a line without file name and class, or with a class that wnids.txt lacks; it starts with `where`.
  """
  numbers = {wnid: label for label, wnid in enumerate(wnids)}
  labels = {}
  for number, line in enumerate(annotations.splitlines(), 1):
    name, _, rest = line.partition("\t")
    wnid = rest.partition("\t")[0]
    if wnid not in numbers or name != os.path.basename(name) or not name:
      raise errors.UserError(
        f"{where}, line {number}: {line[:80]!r}, expected a file name, a tab and a class of wnids.txt; unpack it anew"
      )
    labels[name] = numbers[wnid]
  return labels


def folder(path: str | os.PathLike, size: int, *, channels: int = 3, max_corrupt: int = 0) -> dict[str, Split]:
  """One's own pictures, of any size, from the folder that `list_files` describes, resized and cropped to squares.

  Args:
    path: the folder.
    size: of the squares in pixels; see `pictures.resize_and_crop`.
    channels: C, 3 or 1.
    max_corrupt: how many pictures of all splits together may be skipped because they cannot be read.

  Returns:
    Splits of (N, size, size, C), with the names that `list_files` gives them.

  Raises:
    UserError: the folder is not as expected, or more than `max_corrupt` pictures cannot be read.
  """
  return load(list_files(path), "folder", path, size, channels=channels, max_corrupt=max_corrupt)


def tiny_imagenet(path: str | os.PathLike, size: int = 64, *, max_corrupt: int = 0) -> dict[str, Split]:
  """Tiny ImageNet from its original layout, as `list_tiny_imagenet` says, greyscale files as RGB.

  Arguments, result and errors as of `folder`; splits "train" and "test".
  """
  return load(list_tiny_imagenet(path), "tiny_imagenet", path, size, max_corrupt=max_corrupt)


def load(
  listing: Listing, name: str, source: str | os.PathLike, size: int, *, channels: int = 3, max_corrupt: int = 0
) -> dict[str, Split]:
  """Decodes all pictures in threads, or takes them from the cache, where they are put if all could be read.

  A picture that cannot be read is named on standard error and left out.

  Args:
    listing: the pictures.
    name: of the data set, for the cache.
    source: the folder, for the cache.
    size: of the squares in pixels.
    channels: C, 3 or 1.
    max_corrupt: how many pictures of all splits together may be left out.

  Raises:
    UserError: more are.
  """
  everything = [path for files in listing.files.values() for path, _ in files]
  # The labels follow from the paths, but for the order of the classes.
  variant = "-".join([f"{size}px", f"{channels}c", cache.digest([*listing.class_names, *listing.files])])
  entry = cache.entry(name, variant, os.path.abspath(os.path.expanduser(source)), everything)
  splits = cache.read(entry)
  if splits is not None:
    return splits
  splits, corrupt = {}, []
  for split, files in listing.files.items():
    splits[split], more = decode(files, size, channels)
    corrupt += more
  for error in corrupt:
    cache.warn(f"{error}; skipped" if len(corrupt) <= max_corrupt else str(error))
  if len(corrupt) > max_corrupt:
    raise errors.UserError(
      f"{len(corrupt)} of {len(everything)} pictures cannot be read, more than max_corrupt={max_corrupt}; "
      f"the first: {corrupt[0]}"
    )
  for split, files in listing.files.items():
    if not len(splits[split].labels):
      raise errors.UserError(f"{os.path.dirname(files[0][0])}: no picture of split {split!r} can be read")
  if corrupt:  # an entry would hide them: the next start must name and count them again
    cache.warn(f"{source}: decoded pictures are not cached while some are skipped; remove or replace those files")
  else:
    cache.write(entry, splits)
  return splits


def decode(files: list[tuple[str, int]], size: int, channels: int = 3) -> tuple[Split, list[pictures.PictureError]]:
  """Reads and decodes pictures in as many threads as there are cores; Pillow decodes without holding Python's lock.

  Args:
    files: (path, label).
    size: of the squares in pixels.
    channels: C, 3 or 1.

  Returns:
    The pictures that could be read, (N, size, size, C), in the order of `files`, and an error for each other one.
  """
  images = np.empty((len(files), size, size, channels), np.uint8)

  def decode_chunk(start):
    failed = {}
    for index in range(start, min(start + _CHUNK, len(files))):
      try:
        images[index] = pictures.resize_and_crop(pictures.read(files[index][0], channels), size)
      except pictures.PictureError as error:
        failed[index] = error
    return failed

  failed = {}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for part in pool.map(decode_chunk, range(0, len(files), _CHUNK)):
      failed |= part
  labels = np.array([label for _, label in files], np.int32)
  split = Split(images, labels)
  if failed:
    split = split.take(np.setdiff1d(np.arange(len(files)), list(failed)))
  return split, list(failed.values())


def _list_classes(folder, classes):
  files = []
  for label, name in enumerate(classes):
    found = _pictures(folder / name)
    if not found:
      raise errors.UserError(
        f"{folder / name}: class folder without pictures ({', '.join(EXTENSIONS)}); add some, or remove the class "
        "from every split"
      )
    files += [(str(folder / name / file), label) for file in found]
  return files


def _pictures(folder):
  return [name for name in _names(folder, lambda entry: not entry.is_dir()) if name.lower().endswith(EXTENSIONS)]


def _names(folder, wanted):
  """Sorted names in a folder. A dot begins what systems put there: .DS_Store, and ._a.jpg beside a.jpg."""
  try:
    with os.scandir(folder) as entries:
      return sorted(entry.name for entry in entries if not entry.name.startswith(".") and wanted(entry))
  except OSError as error:
    raise errors.UserError(f"{folder}: cannot be read ({error.strerror}); make it readable") from error


def _check_folder(path, holds):
  try:
    os.scandir(path).close()
  except OSError as error:
    if isinstance(error, FileNotFoundError):
      what = "does not exist"
    else:
      what = "is a file" if isinstance(error, NotADirectoryError) else f"cannot be read ({error.strerror})"
    raise errors.UserError(f"{path}: {what}; expected a folder with {holds}") from error


def _text(path):
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError) as error:
    raise errors.UserError(
      f"{path}: cannot be read ({errors.first_line(error)}); it belongs to tiny-imagenet-200.zip: unpack that anew"
    ) from error
