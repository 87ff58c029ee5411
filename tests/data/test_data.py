"""Splits, order of the data, CIFAR-10 prepared from a real archive over HTTP."""

import functools
import io
import os
import pathlib
import tarfile

import jax
import machine
import numpy as np
import pytest

from configs import common
from lra_jax import errors
from lra_jax.data import augment, resident, sources, tasks


@pytest.fixture(scope="module", autouse=True)
def empty_cache(tmp_path_factory):
  """Nothing is read that the user has cached; the tests of real data share one."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LRA_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield


def test_digits_are_scikit_learns_split_in_two():
  from sklearn import datasets

  images, labels = datasets.load_digits(return_X_y=True)
  splits = sources.digits()
  ours = np.concatenate([splits["train"].inputs, splits["test"].inputs]).reshape(len(labels), 64)
  levels = np.round(ours / (255 / 16)).astype(int)
  np.testing.assert_allclose(ours, levels * (255 / 16), atol=0.5)
  key = lambda rows: sorted(map(bytes, rows.astype(np.uint8)))
  assert key(levels) == key(images)
  assert np.bincount(splits["test"].labels).min() >= 35
  task = tasks.get("digits")
  pixels = splits["train"].inputs / 255
  assert pixels.mean() == pytest.approx(task.mean[0], abs=1e-4) and pixels.std() == pytest.approx(task.std[0], abs=1e-4)


def test_validation_is_carved_by_seed_and_class():
  load = functools.partial(tasks.load, tasks.get("digits"))
  splits = load(validation_fraction=0.2, split_seed=0)
  whole = sources.digits()
  rows = lambda split: [
    image.tobytes() + bytes([label]) for image, label in zip(split.inputs, split.labels, strict=True)
  ]
  assert sorted(rows(splits["train"]) + rows(splits["validation"])) == sorted(rows(whole["train"]))
  assert rows(splits["test"]) == rows(whole["test"])
  share = np.bincount(splits["validation"].labels) / np.bincount(whole["train"].labels)
  np.testing.assert_allclose(share, 0.2, atol=0.005)
  again, other = load(validation_fraction=0.2, split_seed=0), load(validation_fraction=0.2, split_seed=1)
  assert rows(again["validation"]) == rows(splits["validation"]) != rows(other["validation"])
  with pytest.raises(errors.UserError, match="leaves 1433 for training and 0 for validation"):
    load(validation_fraction=0.0, split_seed=0)


def test_views_are_the_same_pixels():
  """Image, raster sequence, permuted sequence and tokens of the same digits, by NumPy."""
  images = sources.digits()["train"].inputs[:5]
  see = lambda name: np.asarray(augment.prepare(images, tasks.get(name)))
  pixels = images.reshape(5, 64, 1)
  np.testing.assert_array_equal(see("digits_tokens"), pixels[..., 0])
  assert see("digits_tokens").dtype == np.int32
  normal = (pixels / 255 - 0.3055) / 0.3761
  np.testing.assert_allclose(see("digits").reshape(5, 64, 1), normal, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(see("digits_sequence"), normal, rtol=1e-4, atol=1e-5)
  order = tasks.get("digits_permuted").permutation
  assert sorted(order) == list(range(64)) and order.tolist() != sorted(order)
  np.testing.assert_allclose(see("digits_permuted"), normal[:, order], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(order[:6], [45, 29, 43, 61, 34, 33])  # fixed for ever: results depend on it
  rgb = np.random.RandomState(0).randint(0, 256, (2, 32, 32, 3)).astype(np.uint8)
  sequence = np.asarray(augment.prepare(rgb, tasks.get("cifar10_sequence")))
  task = tasks.get("cifar10_sequence")
  np.testing.assert_allclose(sequence[1, 33], (rgb[1, 1, 1] / 255 - task.mean) / task.std, rtol=1e-4)


def test_augmented_tokens_stay_tokens():
  config = common.base("x", "lra_image").augment
  config.crop_pad, config.flip, config.erase_probability, config.erase_mode = 1, True, 0.5, "constant"
  task = tasks.get("digits_tokens")
  images = sources.digits()["train"].inputs[:64]
  tokens = np.asarray(augment.view(augment.augment(jax.random.key(0), images, config, task), task))
  assert tokens.dtype == np.int32 and set(np.unique(tokens)) <= set(np.unique(images)) | {0}
  config.crop_scale = (0.3, 1.0)  # bicubic: values between and beyond
  tokens = np.asarray(augment.view(augment.augment(jax.random.key(0), images, config, task), task))
  assert tokens.min() == 0 and tokens.max() == 255 and len(np.unique(tokens)) > 50
  config.erase_mode = "pixel"
  with pytest.raises(errors.UserError, match=r"integer tokens \(digits_tokens\) cannot hold; take 'constant'"):
    augment.augment(jax.random.key(0), images, config, task)


def test_grey_is_tensorflows():
  """tf.image.rgb_to_grayscale of uint8: x / 255 by 0.2989, 0.5870, 0.1140, then × 255.5, fraction cut off."""
  rgb = np.random.RandomState(0).randint(0, 256, (500, 3)).astype(np.uint8)
  exact = (rgb.astype(np.float64) / 255) @ [0.2989, 0.5870, 0.1140] * 255.5
  ours = sources.grey(rgb)[:, 0]
  clear = np.abs(exact - np.round(exact)) > 1e-3  # float32 may fall on either side of a whole number
  np.testing.assert_array_equal(ours[clear], np.floor(exact[clear]))
  assert sources.grey(np.full((1, 3), 255, np.uint8)) == 255 and sources.grey(np.zeros((1, 3), np.uint8)) == 0


def test_every_example_once_an_epoch_also_across_batches():
  stream = resident.train_indices(examples=103, batch_size=10, first_step=0, steps=31, seed=3).ravel()
  for epoch in range(3):
    assert sorted(stream[epoch * 103 : (epoch + 1) * 103]) == list(range(103))
  assert list(stream[:103]) != list(stream[103:206])


def test_order_is_a_function_of_seed_and_step():
  whole = resident.train_indices(97, 8, 0, 40, seed=5)
  pieces = [resident.train_indices(97, 8, first, 5, seed=5) for first in range(0, 40, 5)]
  np.testing.assert_array_equal(np.concatenate(pieces), whole)
  assert (resident.train_indices(97, 8, 0, 40, seed=6) != whole).any()
  # Recorded: a change here silently changes every published run.
  assert resident.train_indices(10, 5, 0, 2, seed=0).tolist() == RECORDED


RECORDED = [[3, 7, 6, 4, 1], [0, 2, 8, 5, 9]]


def test_evaluation_counts_every_example_once():
  indices, mask = resident.eval_batches(23, 8)
  assert indices.shape == mask.shape == (3, 8)
  assert indices[mask == 1].tolist() == list(range(23)) and mask.sum() == 23


@pytest.fixture(scope="module")
def cifar_archive():
  """An archive in CIFAR-10's format: 5 × 40 training and 20 test images of noise, ten class names."""
  random = np.random.RandomState(0)
  records = {f"data_batch_{i}.bin": _records(random, 40) for i in range(1, 6)} | {
    "test_batch.bin": _records(random, 20)
  }
  names = "\n".join(tasks.get("cifar10").class_names) + "\n\n"
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
    for name, content in {"batches.meta.txt": names.encode(), **{k: v.tobytes() for k, v in records.items()}}.items():
      info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return records, buffer.getvalue()


def _records(random, count):
  records = random.randint(0, 256, (count, 3073)).astype(np.uint8)
  records[:, 0] %= 10
  return records


@pytest.fixture
def cifar_server(cifar_archive, monkeypatch):
  """Serves the archive on localhost, and points TFDS's builder and checksum there. Yields the records."""
  import tensorflow_datasets as tfds

  records, content = cifar_archive
  files = {"cifar-10-binary.tar.gz": content}
  with machine.serve(files) as address:
    original = tfds.image_classification.Cifar10
    published = original._cifar_info.fget
    url = address + "cifar-10-binary.tar.gz"
    monkeypatch.setattr(original, "_cifar_info", property(lambda self: published(self)._replace(url=url)))
    monkeypatch.setattr(original, "url_infos", machine.url_infos(files, address))
    yield records


@pytest.mark.filterwarnings("ignore")  # TFDS's own
def test_cifar10_is_downloaded_prepared_and_read_without_tensorflow(cifar_server, tmp_path):
  import sys

  splits = sources.cifar10(str(tmp_path))
  assert "tensorflow" not in sys.modules
  truth = {"train": np.concatenate([cifar_server[f"data_batch_{i}.bin"] for i in range(1, 6)])}
  truth["test"] = cifar_server["test_batch.bin"]
  for name, records in truth.items():
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    found = {image.tobytes(): label for image, label in zip(splits[name].inputs, splits[name].labels, strict=True)}
    assert found == {image.tobytes(): label for image, label in zip(images, records[:, 0], strict=True)}
  again = sources.cifar10(str(tmp_path))  # now from the prepared files
  np.testing.assert_array_equal(again["train"].inputs, splits["train"].inputs)


@pytest.mark.filterwarnings("ignore")
def test_truncated_cifar10_is_named(cifar_server, tmp_path):
  sources.cifar10(str(tmp_path))
  (file,) = tmp_path.glob("cifar10/*/cifar10-train.array_record*")
  os.truncate(file, file.stat().st_size // 2)
  with pytest.raises(errors.UserError, match=r"split 'train' cannot be read.*remove the folder"):
    sources.cifar10(str(tmp_path))


REAL = pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="CIFAR-10 is not on this machine")
@pytest.mark.filterwarnings("ignore")
def test_real_cifar10():
  """Sizes, classes and pixel statistics as published."""
  splits = sources.cifar10(str(REAL))
  assert splits["train"].inputs.shape == (50_000, 32, 32, 3) and splits["test"].inputs.shape == (10_000, 32, 32, 3)
  assert np.bincount(splits["train"].labels).tolist() == [5000] * 10
  assert np.bincount(splits["test"].labels).tolist() == [1000] * 10
  task = tasks.get("cifar10")
  pixels = splits["train"].inputs.reshape(-1, 3)
  np.testing.assert_allclose(pixels.mean(0, dtype=np.float64) / 255, task.mean, atol=1e-4)
  np.testing.assert_allclose(pixels.std(0, dtype=np.float64) / 255, task.std, atol=1e-4)


@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="CIFAR-10 is not on this machine")
@pytest.mark.filterwarnings("ignore")
def test_real_lra_image():
  """The benchmark's split is by position, 45,000 / 5,000 / 10,000, and its grey statistics are those that S4 states."""
  splits = tasks.load(tasks.get("lra_image"), data_dir=str(REAL), validation_fraction=0.1, split_seed=3)
  assert [len(splits[name].labels) for name in ("train", "validation", "test")] == [45_000, 5_000, 10_000]
  colour = sources.cifar10(str(REAL))
  np.testing.assert_array_equal(splits["validation"].labels, colour["train"].labels[45_000:])
  np.testing.assert_array_equal(splits["train"].inputs[7], sources.grey(colour["train"].inputs[7]))
  pixels = np.concatenate([splits["train"].inputs, splits["validation"].inputs]) / 255
  task = tasks.get("lra_image_real")
  assert pixels.mean() == pytest.approx(task.mean[0], abs=1e-4) and pixels.std() == pytest.approx(task.std[0], abs=1e-4)
  assert pixels.mean() == pytest.approx(122.6 / 255, abs=2e-3) and pixels.std() == pytest.approx(61 / 255, abs=2e-3)


def test_bucketed_calls_are_alike_in_length_and_lose_nothing():
  random = np.random.RandomState(0)
  lengths, batch_size, steps = random.randint(1, 101, 480).astype(np.int32), 5, 3
  bounds = (10, 50, 100)
  bucket = resident.bucket_of(lengths, bounds)
  np.testing.assert_array_equal(bucket, [sum(n > b for b in bounds) for n in lengths])
  np.testing.assert_array_equal(resident.bucket_of(np.stack([lengths, lengths[::-1]], 1), bounds),
                                np.maximum(bucket, bucket[::-1]))  # fmt: skip
  calls = [resident.bucketed_indices(bucket, batch_size, step, steps, seed=4) for step in range(0, 96, steps)]
  for indices, top in calls:
    assert indices.shape == (steps, batch_size) and bucket[indices].max() == top
  seen = np.concatenate([indices.reshape(-1) for indices, _ in calls])
  np.testing.assert_array_equal(np.sort(seen), np.arange(480))  # 32 calls of 15 are two windows and one epoch
  assert sum(top == 0 for _, top in calls) >= 2  # a tenth of all is short
  plain = resident.train_indices(480, batch_size, 0, 96, seed=4)
  assert not (np.stack([i for i, _ in calls]).reshape(96, 5) == plain).all()
  again, _ = resident.bucketed_indices(bucket, batch_size, 93, steps, seed=4)
  np.testing.assert_array_equal(again, calls[-1][0])
