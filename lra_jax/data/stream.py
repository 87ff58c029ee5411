"""Images that do not fit into memory: read and decoded by threads while the devices work.

Examples come in the order of `resident.train_indices`, a function of seed and step: the step number, which every
checkpoint has, is the whole position in the stream, so a resumed run gets exactly the batches that it would have got.

Threads, not processes: Pillow decodes without holding Python's lock, and processes take seconds to start and copy what
they decode (on two cores no faster, JPEG of 160 px).
"""

import contextlib
import dataclasses
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np

from lra_jax import errors, parallel
from lra_jax.data import cache, folders, pictures, resident, sources

_CHUNK = 64  # records that one thread takes at a time where only labels are read
_PIECE = 16  # images that one thread takes at a time: grain's own work for what it hands on is 0.08 ms


@dataclasses.dataclass(frozen=True)
class Streamed:
  """Images of one split, not yet read.

  Attributes:
    read: gives the image (any H, any W, C) uint8 of a record, by its number; called in threads. Raises
      `pictures.PictureError` where this one cannot be read, and another UserError where none can.
    name: where a record is, by its number, for messages.
    labels: (N,) int32 in 0 … S − 1.
    records: (N,), the number of each example's record.
    shape: (H, W, C) of the images as they are handed out; H = W.
    max_corrupt: pictures that may be skipped because they cannot be read, each counted once by each reader.
  """

  read: Callable[[int], np.ndarray]
  name: Callable[[int], str]
  labels: np.ndarray
  records: np.ndarray
  shape: tuple[int, int, int]
  max_corrupt: int = 0

  def arrays(self) -> list[np.ndarray]:
    """What two copies of a split must agree in: all but the images themselves."""
    return [self.labels, self.records]

  def take(self, indices: np.ndarray) -> "Streamed":
    """The examples of those indices."""
    return dataclasses.replace(self, labels=self.labels[indices], records=self.records[indices])

  @property
  def nbytes(self) -> int:
    """Of all images when decoded."""
    return len(self.labels) * int(np.prod(self.shape))

  def image(self, index: int) -> np.ndarray:
    """Example number `index`, (H, W, C) uint8, by `pictures.resize_and_crop`; raises as `read` does."""
    return pictures.resize_and_crop(self.read(int(self.records[index])), self.shape[0])

  def where(self, index: int) -> str:
    """Where example number `index` is."""
    return self.name(int(self.records[index]))


def of_listing(listing: folders.Listing, size: int, channels: int = 3) -> dict[str, Streamed]:
  """The pictures of folders.

  Args:
    listing: of `folders.list_files` or `folders.list_tiny_imagenet`.
    size: of the squares in pixels.
    channels: C, 3 or 1.

  Returns:
    Splits as `folders.load` names them, its examples in its order.
  """

  def split(files):
    paths = [path for path, _ in files]
    labels = np.array([label for _, label in files], np.int32)
    read = lambda number: pictures.read(paths[number], channels)
    return Streamed(read, paths.__getitem__, labels, np.arange(len(paths)), (size, size, channels))

  return {name: split(files) for name, files in listing.files.items()}


def of_tfds(builder: Any, where: str, splits: dict[str, str], size: int, label: str = "label") -> dict[str, Streamed]:
  """Images of TensorFlow Datasets, prepared as array_record.

  Labels are needed before the images, to carve splits by class. They lie beside these, so the first start reads all
  files once, without decoding; labels are cached as decoded images are.

  Args:
    builder: tfds.core.DatasetBuilder, and
    where: its name and folder for messages; both as of `sources.open_tfds`.
    splits: TFDS's names of ours.
    size: of the squares in pixels.
    label: feature that is the label.

  Returns:
    Splits of our names, in the order of TFDS.

  Raises:
    UserError: a split is missing or cannot be read.
  """
  files = sources.files_of(builder, where, splits)
  opened = {ours: _TfdsSplit(builder, where, split) for ours, split in splits.items()}
  entry = cache.entry(
    builder.info.full_name, f"{builder.version}-{label}-alone", os.path.abspath(builder.data_path), files
  )

  def build():
    labels = {ours: split.labels(label) for ours, split in opened.items()}
    return {ours: sources.Split(np.zeros((len(found), 0), np.uint8), found) for ours, found in labels.items()}

  shape = size, size, builder.info.features["image"].shape[-1]
  return {
    ours: Streamed(opened[ours].read, opened[ours].name, np.asarray(found.labels), np.arange(len(found.labels)), shape)
    for ours, found in cache.load(entry, build).items()
  }


class _TfdsSplit:
  """Records of one split by number, images in them as they are stored."""

  def __init__(self, builder, where, split):
    import tensorflow_datasets as tfds

    self._where, self._split = where, split
    self._channels = builder.info.features["image"].shape[-1]
    with self._readable():
      self._source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

  def name(self, number):
    return f"{self._where}: example {number} of split {self._split!r}"

  def read(self, number):
    with self._readable():
      example = self._whole(self._source[number], number)
    return pictures.decode(example["image"], self.name(number), self._channels)

  def labels(self, label):
    count = len(self._source)
    labels = np.empty(count, np.int32)

    def read_chunk(start):
      chunk = list(range(start, min(start + _CHUNK, count)))
      labels[chunk] = [self._whole(*it)[label] for it in zip(self._source.__getitems__(chunk), chunk, strict=True)]

    with self._readable(), futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(read_chunk, range(0, count, _CHUNK)))
    return labels

  def _whole(self, example, number):
    if not example["image"]:  # array_record reads empty records from a file that was cut off
      raise ValueError(f"record {number} is empty")
    return example

  @contextlib.contextmanager
  def _readable(self):
    try:
      yield
    except MemoryError:
      raise
    except Exception as error:  # array_record and TFDS raise many types
      raise errors.UserError(
        f"{self._where}: split {self._split!r} cannot be read ({errors.first_line(error)}); remove the folder so that "
        "it is prepared anew (as array_record)"
      ) from error


def fits(bytes_needed: int, device: jax.Device, share: float = 0.4) -> bool:
  """Whether that much takes at most `share` of a device's memory; of the machine's, where a device has none."""
  stats = device.memory_stats()
  limit = stats["bytes_limit"] if stats else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return bytes_needed <= share * limit


class _Stream:
  """Calls' worth of examples in order, prepared ahead by threads of its own.

  Iterate over it; after the last call, an error or `close` it has no threads. A context manager closes it.

  Attributes:
    waited_seconds: how long `next` waited for examples, the first ones included.
    corrupt: (index of the example: what is wrong with it) of those met so far, in this process.
  """

  def __init__(self, split, mesh, batch_size, repeats, steps, calls, axis, workers, ahead):
    import grain

    self.waited_seconds = 0.0
    self.corrupt: dict[int, str] = {}
    self._split = split
    self._sharding, self._axis = parallel.sharded(mesh, axis), axis
    self._batch_size, self._steps, self._calls = batch_size, steps, calls
    # Rows of the batch that lie on this process's devices, and for every example that is read which these are.
    shape = (steps, batch_size)[1 - axis :]
    owned = self._sharding.addressable_devices_indices_map(shape).values()
    self._rows = np.unique(np.concatenate([np.arange(batch_size)[index[axis]] for index in owned]))
    self._distinct = batch_size // repeats
    place_R = self._rows % self._distinct
    places = [(int(place), np.flatnonzero(place_R == place)) for place in np.unique(place_R)]
    self._pieces = [places[start : start + _PIECE] for start in range(0, len(places), _PIECE)]  # of a step
    workers = workers or os.cpu_count()
    self._reading = iter(
      grain.MapDataset.range(calls * steps * len(self._pieces))
      .map(self._load)
      .to_iter_dataset(grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers))
    )
    self._closed = threading.Event()
    self._room = threading.Semaphore(ahead)
    self._ready = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._run, name="lra_jax-stream", daemon=True)
    self._thread.start()

  def __iter__(self) -> Iterator:
    return self

  def __next__(self):
    if self._closed.is_set():
      raise StopIteration
    start = time.perf_counter()
    item = self._ready.get()
    self.waited_seconds += time.perf_counter() - start
    if isinstance(item, BaseException):
      self.close()
      raise item
    self._room.release()
    return item

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def close(self) -> None:
    """Stops reading and forgets what is ready; a second time does nothing."""
    self._closed.set()
    self._room.release()
    self._thread.join()
    self._reading.close()  # its threads end with the piece that they are at
    self._ready = queue.SimpleQueue()  # what lay there takes device memory

  def _run(self):
    try:
      for call in range(self._calls):
        self._room.acquire()
        item = self._prepare(call)
        if self._closed.is_set():
          return
        self._ready.put(item)
      self._ready.put(StopIteration())
    except BaseException as error:
      self._ready.put(error)

  def _prepare(self, call):
    """Examples of a call on the devices, and (M, B) which of them there are; None where the stream was closed."""
    images = np.zeros((self._steps, len(self._rows), *self._split.shape), np.uint8)
    labels = np.zeros((self._steps, self._batch_size), np.int32)
    mask = np.zeros((self._steps, self._batch_size), np.float32)
    for offset, piece in itertools.product(range(self._steps), self._pieces):
      if self._closed.is_set():
        return None
      for (place, slots), (index, image, error) in zip(piece, next(self._reading), strict=True):
        if error is not None:
          self._count(index, error)
          index, image = self._instead(call * self._steps + offset, place, error)
        if image is not None:
          images[offset, slots] = image
          labels[offset, self._rows[slots]] = self._split.labels[index]
          mask[offset, self._rows[slots]] = 1
    if self._axis == 0:
      images, labels, mask = images[0], labels[0], mask[0]

    def rows_of(index):
      start, stop, _ = index[self._axis].indices(self._batch_size)
      first = np.searchsorted(self._rows, start)  # this process has all rows of its devices
      return images[(slice(None),) * self._axis + (slice(first, first + stop - start),)]

    def put(shape, part):
      return jax.make_array_from_callback(shape, self._sharding, part)

    inputs = put((*labels.shape, *self._split.shape), rows_of)
    examples = resident.Resident(inputs, put(labels.shape, labels.__getitem__))
    return jax.block_until_ready(self._result(examples, put(mask.shape, mask.__getitem__)))

  def _load(self, number):
    """Of each place of a piece (index, image, None), (index, None, error), or (None, None, None) where it is filling.

    Pieces are numbered through all steps. Runs in threads.
    """
    step, piece = divmod(number, len(self._pieces))
    return [self._load_one(self._index(step, place)) for place, _ in self._pieces[piece]]

  def _load_one(self, index):
    try:
      return index, None if index is None else self._split.image(index), None
    except pictures.PictureError as error:
      return index, None, error

  def _count(self, index, error):
    self.corrupt[index] = str(error)
    if len(self.corrupt) > self._split.max_corrupt:
      raise errors.UserError(
        f"{len(self.corrupt)} of {len(self._split.labels)} pictures cannot be read, more than max_corrupt="
        f"{self._split.max_corrupt}; the last: {error}"
      )


class TrainStream(_Stream):
  """What training steps read, one `resident.Resident` with axes (M, B, …) for each call of M steps.

  In the place of a picture that cannot be read stands the next one of its batch that can, so that a batch keeps its
  size; both are named on standard error. That depends on the batch alone: a run that is resumed does the same.
  """

  def __init__(
    self,
    split: Streamed,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    steps_per_call: int,
    first_step: int,
    stop_step: int,
    seed: int,
    repeats: int = 1,
    *,
    workers: int | None = None,
    ahead: int = 2,
  ):
    """Starts to read.

    Args:
      split: the training examples.
      mesh: of the run; a batch is split over its devices, and a process reads only what lies on its own.
      batch_size: B, a multiple of the devices.
      steps_per_call: M.
      first_step: of the first call, counted from 0.
      stop_step: behind the last call.
      seed: of the run.
      repeats: as of `resident.train_indices`; a repeated picture is read once.
      workers: threads that read and decode; None for as many as there are cores.
      ahead: calls that are ready, or in preparation, besides those handed out. With them and the one that
        is trained on, M · (ahead + 1) batches take memory.

    Raises:
      UserError: as of `resident.train_indices`. The iterator raises it where too many pictures, or all of a batch,
        cannot be read, when the call that holds the last of them is asked for.
    """
    resident.train_indices(len(split.labels), batch_size, first_step, 1, seed, repeats)  # refuses wrong repeats
    calls, rest = divmod(stop_step - first_step, steps_per_call)
    if rest or calls < 0:
      raise ValueError(f"steps {first_step} to {stop_step} are no multiple of {steps_per_call} a call")
    self._first_step, self._seed = first_step, seed
    super().__init__(split, mesh, batch_size, repeats, steps_per_call, calls, 1, workers, ahead)

  def _index(self, step, place):
    position = (self._first_step + step) * self._distinct + place
    return int(resident.train_indices(len(self._split.labels), 1, position, 1, self._seed)[0, 0])

  def _instead(self, step, place, error):
    for other in range(1, self._distinct):
      index = self._index(step, (place + other) % self._distinct)
      try:
        image = self._split.image(index)
      except pictures.PictureError:
        continue  # named and counted in its own turn
      cache.warn(f"{error}; skipped in step {self._first_step + step}, {self._split.where(index)} stands in its place")
      return index, image
    raise errors.UserError(f"no picture of the batch of step {self._first_step + step} can be read; the first: {error}")

  def _result(self, examples, mask):
    del mask
    return examples


class EvalStream(_Stream):
  """Every example once, in order: (`resident.Resident` with axes (B, …), mask (B,) float32) for each batch.

  The mask is 0 where the last batch is filled up, with zeros, and where a picture cannot be read, which is named on
  standard error; `corrupt` has these.
  """

  def __init__(
    self,
    split: Streamed,
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *,
    workers: int | None = None,
    ahead: int = 2,
  ):
    """Starts to read; arguments and errors as of `TrainStream`, B a multiple of the devices."""
    calls = -(-len(split.labels) // batch_size)
    super().__init__(split, mesh, batch_size, 1, 1, calls, 0, workers, ahead)

  def _index(self, step, place):
    index = step * self._batch_size + place
    return index if index < len(self._split.labels) else None

  def _instead(self, step, place, error):
    del step, place
    cache.warn(f"{error}; left out of the evaluation")
    return None, None

  def _result(self, examples, mask):
    return examples, mask
