"""The sheet of samples: what is drawn is what a model reads; the command as a user runs it."""

import dataclasses
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common
from lra_jax.data import augment, listops, show, sources, tasks, text
from lra_jax.data.sources import Split

ROOT = pathlib.Path(__file__).resolve().parents[2]


def data_folder() -> pathlib.Path:
  """Where real data may be; tests that need them are skipped elsewhere."""
  return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or ROOT.parent / "shared/data/tfds")


@pytest.mark.parametrize("name", ["digits", "digits_sequence", "digits_permuted", "digits_tokens"])
def test_images_come_back_from_every_view(name):
  images = sources.digits()["train"].inputs[:6]
  seen = np.asarray(augment.prepare(images, tasks.get(name)))
  np.testing.assert_array_equal(show.images_of(np.stack([seen, seen[::-1]]), tasks.get(name)), [images, images[::-1]])


def test_colour_sequences_come_back():
  images = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3)).astype(np.uint8)
  for name in ("cifar10", "cifar10_sequence", "cifar10_permuted"):
    seen = np.asarray(augment.prepare(images, tasks.get(name)))
    np.testing.assert_array_equal(show.images_of(seen[None], tasks.get(name))[0], images)


def test_draws_are_those_of_training():
  """Augmentation and mixing of the config: mixed images are labelled with the shares that their pixels have."""
  task = dataclasses.replace(tasks.get("digits"), class_names=tuple("ab"))
  flat = np.array([0, 200], np.uint8)[:, None, None, None] * np.ones((2, 8, 8, 1), np.uint8)
  examples = Split(flat, np.array([0, 1], np.int32))
  config = common.base("x", "digits")
  config.train.cutmix = 1.0
  images, targets = show.draws(task, examples, config, 5, seed=3)
  assert images.shape == (5, 2, 8, 8, 1) and images.dtype == np.uint8 and targets.shape == (5, 2, 2)
  np.testing.assert_allclose((images == 200).mean((2, 3, 4)), targets[..., 1], atol=1e-6)
  assert len({image.tobytes() for image in images}) == 5
  again, _ = show.draws(task, examples, config, 5, seed=3)
  np.testing.assert_array_equal(images, again)
  config.train.cutmix = 0.0
  images, targets = show.draws(task, examples, config, 2, seed=3)
  np.testing.assert_array_equal(images, [flat, flat])
  np.testing.assert_array_equal(targets, [np.eye(2)] * 2)


def test_labels():
  names = ("cat", "dog", "frog")
  assert show.label(np.array([0.0, 1.0, 0.0]), names) == "dog"
  assert show.label(np.array([0.003, 0.997, 0.0]), names) == "dog"
  assert show.label(np.array([0.3, 0.0, 0.7]), names) == "frog 0.70, cat 0.30"


def test_sheet_has_every_image_at_its_place():
  originals = np.random.RandomState(0).randint(0, 256, (2, 16, 8, 3)).astype(np.uint8)
  drawn = np.random.RandomState(1).randint(0, 256, (3, 2, 16, 8, 3)).astype(np.uint8)
  picture = show.sheet(originals, drawn, [["a" * 99] * 4, ["b"] * 4], "title")
  pixels = np.asarray(picture)
  factor = 112 // 8
  for i in range(2):
    for j, image in enumerate((originals[i], *drawn[:, i])):
      left, top = 8 + j * (8 * factor + 6), 36 + i * (16 * factor + 20)
      tile = pixels[top : top + 16 * factor, left : left + 8 * factor]
      np.testing.assert_array_equal(tile, image.repeat(factor, 0).repeat(factor, 1))
      below = pixels[top + 16 * factor :, left : left + 8 * factor][:18]
      assert (below < 128).any()  # its label
  assert (pixels[:, 8 + 8 * factor : 8 + 8 * factor + 6] > 250).mean() > 0.97  # labels are cut to their columns


def test_texts():
  lines = []
  task = tasks.get("text")
  ids, lengths = text.encode(["a good one — café".encode(), b"x" * 3000], 4096)
  show.print_texts(task, Split(ids, np.array([1, 0], np.int32), lengths), lines.append)
  assert lines[:3] == ["--- positive", "a good one — café", "--- negative"]
  assert lines[3] == "x" * 1000 + "… (3,000 characters)"

  lines.clear()
  pairs = Split(ids[None], np.array([1], np.int32), lengths[None])
  show.print_texts(tasks.get("retrieval"), pairs, lines.append)
  assert lines[1] == "a good one — café" and len(lines) == 3

  lines.clear()
  words = "[MAX 2 9 [MIN 4 7 ] 0 ]"
  tokens = np.array([[*(listops.TOKENS.index(word) for word in words.split()), 0, 0]], np.uint8)
  listops_task = tasks.get("listops")
  show.print_texts(listops_task, Split(tokens, np.array([9], np.int32)), lines.append)
  assert lines == ["--- 9", words]


def test_command_writes_a_sheet(python, tmp_path):
  out = tmp_path / "digits.png"
  arguments = f"digits_permuted --out {out} --examples 3 --draws 4 --config.augment.policy=trivial".split()
  process = python("lra_jax.data.show", *arguments)
  assert process.returncode == 0, process.stderr
  assert process.stdout == f"{out}: 3 training examples of digits_permuted, the original and 4 draws of each\n"
  with Image.open(out) as picture:
    assert picture.size == (16 + 5 * (112 + 6), 16 + 28 + 3 * (112 + 20))
    first = np.asarray(picture.convert("L"))[36 : 36 + 112 : 14, 8 : 8 + 112 : 14]
  assert first.tobytes() in {image.tobytes() for image in sources.digits()["train"].inputs}
  assert os.listdir(tmp_path) == ["digits.png"]


def test_command_takes_a_config(python, tmp_path):
  out = tmp_path / "sheet.png"
  config = ("--config", "configs/resnet.py", "--config.augment.flip_vertical")
  process = python("lra_jax.data.show", "digits", *config, "--out", out, "--draws", 1, "--examples", 1)
  assert process.returncode == 0 and out.exists(), process.stderr


def test_command_on_cifar10(python, tmp_path):
  if not (data_folder() / "cifar10").is_dir():
    pytest.skip(f"no CIFAR-10 in {data_folder()}")
  out = tmp_path / "sheet.png"
  env = {"TFDS_DATA_DIR": str(data_folder())}
  policy = "--config.augment.policy=rand-m9-mstd0.5-inc1"
  process = python("lra_jax.data.show", "cifar10", "--out", out, "--examples", 4, policy, env=env)
  assert process.returncode == 0, process.stderr
  with Image.open(out) as picture:
    assert picture.size == (16 + 9 * (128 + 6), 16 + 28 + 4 * (128 + 20)) and len(picture.getcolors(1 << 24)) > 1000


@pytest.mark.parametrize(
  "arguments,message",
  [
    ((), "no task given; as in `python -m lra_jax.data.show cifar10"),
    (("digit",), "'digit' does not exist; did you mean 'digits'"),
    (("digits", "--config", "configs/vit.py:cifar10"), "task digits: --config is for cifar10"),
    (("digits", "--config.augment.policy=triviall"), "did you mean 'trivial'"),
    (("digits", "--draws", "0"), "draws"),
    (("digits", "--out", "/no/such/folder/sheet.png", "--draws", "1"), "/no/such/folder/sheet.png: cannot be written"),
  ],
)
def test_mistakes_are_one_line(refused, arguments, message):
  assert message in refused("lra_jax.data.show", *arguments)


def test_drawing_needs_no_draws_of_its_own():
  """The policy's draws in a sheet are those of `augment.augment` under the same key."""
  config = common.base("x", "digits")
  config.augment.policy = "trivial"
  examples = sources.digits()["train"].take(np.arange(4))
  images, _ = show.draws(tasks.get("digits"), examples, config, 2, seed=0)
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 0)
  truth = augment.augment(key, examples.inputs, config.augment, tasks.get("digits"))
  task = tasks.get("digits")
  np.testing.assert_array_equal(images[1], jnp.round((truth * task.std[0] + task.mean[0]) * 255))
