"""Streamed images: the same numbers as resident ones, in the same order; what cannot be read; threads and errors."""

import collections
import io
import json
import multiprocessing
import pathlib
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
from commands import options
from PIL import Image

from lra_jax import errors, parallel
from lra_jax.data import folders, resident, sources, stream

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
COUNT = 23  # training pictures; the batches do not divide them


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
  """Nothing is read that another test or the user has cached."""
  monkeypatch.setenv("LRA_JAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_threads_left():
  """No stream leaves a thread or a process behind, however it ended."""
  yield
  ours = lambda: [t for t in threading.enumerate() if t.name.startswith(("lra_jax", "grain"))]
  deadline = time.monotonic() + 20  # grain's end with the piece that they are at
  while ours() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not ours() and not multiprocessing.active_children()


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
  """Pictures of noise, of any size and shape, in two classes."""
  root, random = tmp_path_factory.mktemp("pets"), np.random.RandomState(0)
  for split, count in (("train", COUNT), ("val", 7)):
    for number in range(count):
      path = root / split / ("cat", "dog")[number % 3 == 0] / f"{number:02d}.{('png', 'jpg')[number % 2]}"
      path.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(random.randint(0, 256, (*random.randint(6, 14, 2), 3)).astype(np.uint8)).save(path)
  return root


@pytest.fixture(scope="module")
def listing(pets):
  return folders.list_files(pets)


@pytest.fixture(scope="module")
def mesh():
  return parallel.make_mesh(1)


def numbered(count, broken=(), read=None, max_corrupt=0):
  """A split whose example i has record 100 + i, an image all of level i and label i % 5."""

  def read_number(number):
    if read is not None:
      read(number - 100)
    if number - 100 in broken:
      raise stream.pictures.PictureError(f"picture {number - 100} is damaged")
    return np.full((2, 2, 1), number - 100, np.uint8)

  labels = (np.arange(count) % 5).astype(np.int32)
  return stream.Streamed(read_number, "picture {}".format, labels, np.arange(count) + 100, (2, 2, 1), max_corrupt)


def levels(calls):
  """Which examples of `numbered` were given, (steps, B); their labels must be theirs."""
  calls = list(calls)
  found = np.concatenate([np.asarray(call.inputs)[..., 0, 0, 0] for call in calls]).astype(int)
  np.testing.assert_array_equal(np.concatenate([call.labels for call in calls]), found % 5)
  return found


@pytest.mark.parametrize("repeats, workers", [(1, 1), (2, 3)])
def test_training_gives_what_resident_data_give(listing, pets, mesh, repeats, workers):
  whole = folders.folder(pets, 8)["train"]
  split = stream.of_listing(listing, 8)["train"]
  assert split.nbytes == whole.inputs.nbytes
  with stream.TrainStream(split, mesh, 6, 2, 0, 12, 3, repeats, workers=workers) as calls:
    for call, given in enumerate(calls):
      indices = resident.train_indices(COUNT, 6, 2 * call, 2, 3, repeats)
      np.testing.assert_array_equal(given.inputs, whole.inputs[indices])
      np.testing.assert_array_equal(given.labels, whole.labels[indices])
      assert given.inputs.dtype == np.uint8 and given.labels.dtype == np.int32 and given.lengths is None
      assert given.inputs.sharding == parallel.sharded(mesh, 1)
  assert call == 5 and next(calls, "no more") == "no more"


def test_parts_of_a_split_are_those_of_the_resident_one(listing, pets, mesh):
  """As tasks.carve takes them."""
  some = np.array([3, 5, 4, 19])
  expected = folders.folder(pets, 8)["train"].take(some)
  (examples, mask), *rest = stream.EvalStream(stream.of_listing(listing, 8)["train"].take(some), mesh, 4)
  np.testing.assert_array_equal(examples.inputs, expected.inputs)
  np.testing.assert_array_equal(examples.labels, expected.labels)
  assert not rest and mask.tolist() == [1, 1, 1, 1]


def test_every_example_is_seen_once_an_epoch(mesh):
  seen = levels(stream.TrainStream(numbered(20), mesh, 5, 1, 0, 12, 0, workers=2)).reshape(3, 20)
  assert all(sorted(epoch) == list(range(20)) for epoch in seen)
  assert (seen[0] != seen[1]).any() and (seen[0] != np.arange(20)).any()
  halves = levels(stream.TrainStream(numbered(20), mesh, 4, 2, 0, 10, 0, 2, workers=2))
  assert (halves[:, :2] == halves[:, 2:]).all() and sorted(halves[:, :2].reshape(-1)) == list(range(20))


def test_a_repeated_picture_is_read_once(mesh):
  reads = collections.Counter()
  list(stream.TrainStream(numbered(20, read=lambda index: reads.update([index])), mesh, 8, 1, 0, 10, 0, 4, workers=1))
  assert reads == dict.fromkeys(range(20), 1)


@pytest.mark.parametrize("broken", [(), (2, 11)])
def test_resuming_gives_the_rest(mesh, broken):
  split = numbered(20, broken, max_corrupt=2)
  run = lambda first: levels(stream.TrainStream(split, mesh, 6, 2, first, 14, 1, workers=2))
  whole = run(0)
  for first in (2, 8, 12):
    np.testing.assert_array_equal(run(first), whole[first:])
  assert run(14 - 2).shape == (2, 6)


def test_evaluation_gives_every_example_once_in_order(mesh):
  given = list(stream.EvalStream(numbered(7), mesh, 3, workers=2))
  assert [mask.tolist() for _, mask in given] == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
  assert [x.inputs[:, 0, 0, 0].tolist() for x, _ in given] == [[0, 1, 2], [3, 4, 5], [6, 0, 0]]
  assert [x.labels.tolist() for x, _ in given] == [[0, 1, 2], [3, 4, 0], [1, 0, 0]]
  assert not list(stream.EvalStream(numbered(0), mesh, 3))


def test_a_damaged_picture_is_named_and_the_next_of_its_batch_stands_in(mesh, capfd):
  order = resident.train_indices(20, 6, 0, 4, 5)
  bad, beside = int(order[1, 5]), int(order[2, 1])  # the last of its batch, and one in the middle
  calls = stream.TrainStream(numbered(20, (bad, beside), max_corrupt=2), mesh, 6, 1, 0, 4, 5, workers=2)
  given = levels(calls)
  expected = order.copy()
  for row in expected:
    for place in np.flatnonzero(np.isin(row, (bad, beside))):
      row[place] = next(index for index in np.roll(row, -place) if index not in (bad, beside))
  np.testing.assert_array_equal(given, expected)
  assert expected[1, 5] == order[1, 0] and expected[2, 1] == order[2, 2]
  lines = capfd.readouterr().err.splitlines()
  assert lines[0] == (
    f"warning: picture {bad} is damaged; skipped in step 1, picture {order[1, 0] + 100} stands in its place"
  )
  assert len(lines) == np.isin(order, (bad, beside)).sum()
  assert calls.corrupt == {index: f"picture {index} is damaged" for index in (bad, beside)}


def test_more_damaged_pictures_than_allowed_end_the_run_in_their_turn(mesh, capfd):
  order = resident.train_indices(20, 5, 0, 4, 0).reshape(-1)
  broken = order[[2, 6, 13]].tolist()
  calls = stream.TrainStream(numbered(20, broken, max_corrupt=2), mesh, 5, 1, 0, 8, 0, workers=2)
  assert levels([next(calls), next(calls)]).shape == (2, 5)
  with pytest.raises(
    errors.UserError,
    match=rf"^3 of 20 pictures cannot be read, more than max_corrupt=2; the last: picture {broken[2]} is damaged$",
  ):
    next(calls)
  assert list(calls) == []
  assert len(capfd.readouterr().err.splitlines()) == 2


def test_a_damaged_picture_counts_once_however_often_it_comes(mesh):
  calls = stream.TrainStream(numbered(6, (4,), max_corrupt=1), mesh, 3, 1, 0, 10, 0, workers=1)
  assert 4 not in levels(calls) and list(calls.corrupt) == [4]


def test_a_batch_without_a_readable_picture_ends_the_run(mesh):
  calls = stream.TrainStream(numbered(4, range(4), max_corrupt=9), mesh, 2, 1, 0, 2, 0, workers=1)
  with pytest.raises(
    errors.UserError, match=r"^no picture of the batch of step 0 can be read; the first: picture \d is"
  ):
    next(calls)


def test_evaluation_leaves_damaged_pictures_out(mesh, capfd):
  calls = stream.EvalStream(numbered(5, (1,), max_corrupt=1), mesh, 3, workers=1)
  assert [mask.tolist() for _, mask in calls] == [[1, 0, 1], [1, 1, 0]] and list(calls.corrupt) == [1]
  assert capfd.readouterr().err == "warning: picture 1 is damaged; left out of the evaluation\n"
  with pytest.raises(
    errors.UserError, match=r"^1 of 5 pictures cannot be read, more than max_corrupt=0; the last: pic"
  ):
    list(stream.EvalStream(numbered(5, (1,)), mesh, 3, workers=1))


def test_files_that_cannot_be_read_are_named(listing, mesh, tmp_path):
  """By default the first one ends the run."""
  (tmp_path / "empty.png").touch()
  (tmp_path / "cut.jpg").write_bytes(pathlib.Path(listing.files["train"][1][0]).read_bytes()[:200])
  for name, reason in (
    ("empty.png", "file of zero bytes"),
    ("cut.jpg", "cannot be dec"),
    ("none.png", "cannot be rea"),
  ):
    files = [*listing.files["train"], (str(tmp_path / name), 1)]
    split = stream.of_listing(folders.Listing(listing.class_names, {"train": files}), 8)["train"]
    with pytest.raises(errors.UserError, match=f"max_corrupt=0; the last: {tmp_path / name}: {reason}") as caught:
      list(stream.TrainStream(split, mesh, 8, 1, 0, 3, 0, workers=2))
    assert "\n" not in str(caught.value)


def test_other_errors_reach_the_loop_as_they_are(mesh):
  for error in (errors.UserError("the disk is gone"), RuntimeError("a bug"), MemoryError("too little")):

    def read(index, error=error):
      if index == 7:
        raise error

    calls = stream.TrainStream(numbered(20, read=read, max_corrupt=9), mesh, 5, 1, 0, 4, 0, workers=2)
    with pytest.raises(type(error), match=str(error)):
      list(calls)
  with pytest.raises(errors.UserError, match=r"config\.augment\.repeats=3"):
    stream.TrainStream(numbered(20), mesh, 5, 1, 0, 4, 0, 3)
  with pytest.raises(ValueError, match="steps 0 to 5 are no multiple of 2 a call"):
    stream.TrainStream(numbered(20), mesh, 5, 2, 0, 5, 0)


def test_closing_stops_threads_wherever_they_are(mesh):
  stream.TrainStream(numbered(20), mesh, 5, 1, 0, 10**6, 0).close()  # at the start
  calls = stream.TrainStream(numbered(20), mesh, 5, 1, 0, 10**6, 0, workers=2, ahead=1)
  next(calls)
  while calls._ready.empty():  # it waits for room
    time.sleep(0.001)
  calls.close()
  calls.close()
  assert next(calls, None) is None
  with pytest.raises(KeyboardInterrupt), stream.EvalStream(numbered(10**4), mesh, 2) as calls:
    next(calls)
    raise KeyboardInterrupt


def test_memory_is_bounded(mesh):
  """Of a long run no more is read than two calls and two pieces for each thread, of a batch each."""
  reads, workers = [], 2
  with stream.TrainStream(numbered(20, read=reads.append), mesh, 10, 3, 0, 3000, 0, workers=workers, ahead=2) as calls:
    for taken in (1, 2):
      next(calls)
      before = -1
      while before < len(reads):
        before = len(reads)
        time.sleep(0.2)
      assert (2 + taken) * 30 <= len(reads) <= (2 + taken) * 30 + 2 * workers * 10


def test_the_time_that_the_loop_waits_is_measured(mesh):
  gate = threading.Event()
  with stream.TrainStream(numbered(20, read=lambda _: gate.wait()), mesh, 5, 1, 0, 100, 0, workers=2) as calls:
    threading.Timer(0.3, gate.set).start()
    next(calls)
    assert 0.25 < calls.waited_seconds < 60
    while calls._ready.empty():
      time.sleep(0.001)
    before = calls.waited_seconds
    next(calls)
    assert before <= calls.waited_seconds < before + 0.2  # it lay there


def test_what_fits_is_a_share_of_the_device_memory():
  gpu = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 900})
  assert stream.fits(400, gpu) and not stream.fits(401, gpu) and stream.fits(401, gpu, share=0.5)
  cpu = jax.devices()[0]
  lines = dict(line.split(":") for line in pathlib.Path("/proc/meminfo").read_text().splitlines())
  memory = int(lines["MemTotal"].split()[0]) * 1024
  assert stream.fits(memory - 2**20, cpu, share=1) and not stream.fits(memory + 2**20, cpu, share=1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """JPEGs of two sizes, prepared by TFDS in several files; opens them anew each time."""
  import tensorflow_datasets as tfds

  class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012 (TFDS's own attribute)

    def _info(self):
      features = {"image": tfds.features.Image(shape=(None, None, 3)), "label": tfds.features.ClassLabel(num_classes=9)}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._generate_examples(11), "validation": self._generate_examples(5)}

    def _generate_examples(self, count):
      random = np.random.RandomState(count)
      for number in range(count):
        buffer = io.BytesIO()
        pixels = random.randint(0, 256, (8, 8 + number % 2, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG")
        buffer.seek(0)
        yield number, {"image": buffer, "label": random.randint(9)}

  root = tmp_path_factory.mktemp("tfds")
  make = lambda folder: Pictures(data_dir=folder, file_format="array_record")
  sources.open_tfds(root, make)
  return root, make


SPLITS = {"train": "train", "test": "validation"}


@pytest.mark.filterwarnings("ignore")  # TFDS's own
def test_tfds_gives_what_resident_data_give(prepared, mesh, monkeypatch):
  root, make = prepared
  whole = sources._tfds(root, make, SPLITS, size=8)
  splits = stream.of_tfds(*sources.open_tfds(root, make), SPLITS, 8)
  for name, split in whole.items():
    np.testing.assert_array_equal(splits[name].labels, split.labels)
    (given, _), *_ = stream.EvalStream(splits[name], mesh, len(split.labels), workers=3)
    np.testing.assert_array_equal(given.inputs, split.inputs)
  assert splits["train"].where(3) == f"pictures in {root}: example 3 of split 'train'"

  def read_again(self, label):
    raise AssertionError("labels are cached")

  monkeypatch.setattr(stream._TfdsSplit, "labels", read_again)
  again = stream.of_tfds(*sources.open_tfds(root, make), SPLITS, 8)
  np.testing.assert_array_equal(again["train"].labels, whole["train"].labels)


@pytest.mark.filterwarnings("ignore")
def test_tfds_that_cannot_be_read_is_refused(prepared, mesh, tmp_path):
  root, make = prepared
  with pytest.raises(errors.UserError, match="has no split 'test', only"):
    stream.of_tfds(*sources.open_tfds(root, make), {"test": "test"}, 8)
  builder, where = sources.open_tfds(root, make)
  stream.of_tfds(builder, where, SPLITS, 8)
  splits = stream.of_tfds(builder, where, SPLITS, 8)  # labels come from the cache, no file is open yet
  file = pathlib.Path(builder.info.splits["train"].filepaths[0])
  content = file.read_bytes()
  try:
    file.write_bytes(content[: len(content) // 2])
    for attempt in (
      lambda: list(stream.EvalStream(splits["train"], mesh, 4)),
      lambda: stream.of_tfds(*sources.open_tfds(root, make), SPLITS, 8),
    ):
      with pytest.raises(errors.UserError, match=r": split 'train' cannot be read \(.*prepared anew") as caught:
        attempt()
      assert "\n" not in str(caught.value)
  finally:
    file.write_bytes(content)


PROCESS = """
import json, sys
import jax, numpy as np
jax.distributed.initialize("localhost:" + sys.argv[1], 2, int(sys.argv[2]))
sys.path.append("tests/data")
from lra_jax import parallel
from lra_jax.data import resident, stream
mesh = parallel.make_mesh(-1)
reads = []
def read(number):
  reads.append(number)
  if number == 3:
    raise stream.pictures.PictureError("three is damaged")
  return np.full((2, 2, 1), number, np.uint8)
split = stream.Streamed(read, str, np.arange(40, dtype=np.int32), np.arange(40), (2, 2, 1), 1)
given = []
for call in stream.TrainStream(split, mesh, 16, 2, 2, 8, 0, 2, workers=2):
  for x, y in zip(call.inputs.addressable_shards, call.labels.addressable_shards, strict=True):
    assert x.index[:2] == y.index and x.data.shape[1] == 2
    assert (x.data[..., 0, 0, 0] == y.data).all()
    given.append([y.index[1].start or 0, y.data.tolist()])
evaluated = [float(s.data.sum()) for _, m in stream.EvalStream(split.take(np.arange(4, 15)), mesh, 8)
  for s in m.addressable_shards]
print(json.dumps([len(reads), given, sum(evaluated)]))
"""


def test_processes_read_what_lies_on_their_devices(tmp_path):
  """Two processes of four devices: together the batches of one, each example read by those that need it."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
  running = [
    subprocess.Popen([sys.executable, "-c", PROCESS, str(port), str(rank)], **options(env=flags)) for rank in range(2)
  ]
  found = []
  for process in running:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    found.append(json.loads(out.splitlines()[-1]))
  order = resident.train_indices(40, 16, 2, 6, 0, 2)
  expected = order.copy()
  for row in expected:
    for place in np.flatnonzero(row == 3):
      row[place] = np.roll(row[:8], -place)[1]
  assert (expected != order).any()
  batches = np.full((3, 2, 16), -1)
  for rank, (_, given, _) in enumerate(found):
    for number, (start, values) in enumerate(given):
      assert start // 8 == rank
      batches[number // 4, :, start : start + 2] = values
  np.testing.assert_array_equal(batches.reshape(6, 16), expected)
  assert sum(evaluated for _, _, evaluated in found) == 11
  # Each rank has one of the two repeats whole: 6 steps of 8 examples; and of 11, the 8 and 3 of two batches.
  assert sum(reads for reads, _, _ in found) == 2 * 6 * 8 + 11 + 2 * (order[:, :8] == 3).sum()


@pytest.mark.skipif(not (SHARED / "imagenette-160").is_dir(), reason="no imagenette here")
def test_real_photographs(mesh):
  files = folders.list_files(SHARED / "imagenette-160").files["train"]
  split = stream.of_listing(folders.Listing((), {"train": files}), 96)["train"]
  with stream.TrainStream(split, mesh, 16, 2, 30, 34, 0, workers=2) as calls:
    call = next(calls)
  indices = resident.train_indices(len(files), 16, 30, 2, 0)
  expected, bad = folders.decode([files[index] for index in indices.reshape(-1)], 96)
  assert not bad
  np.testing.assert_array_equal(call.inputs.reshape(32, 96, 96, 3), expected.inputs)
  np.testing.assert_array_equal(call.labels.reshape(32), expected.labels)
