"""The registry, its options, and whole runs on texts, pairs and folders."""

import json

import numpy as np
import pytest
from commands import result_of
from PIL import Image

from lra_jax import errors
from lra_jax.data import listops, tasks, text
from lra_jax.data.sources import Split

# Classes and lengths as published: CIFAR (Krizhevsky 2009), Tiny ImageNet (CS231n), Long Range Arena (Tay et al. 2021).
PUBLISHED = {
  "cifar10": (10, (32, 32, 3), None), "cifar100": (100, (32, 32, 3), None), "cifar100_coarse": (20, (32, 32, 3), None),
  "mnist": (10, (28, 28, 1), None), "mnist_permuted": (10, (784, 1), None), "fashion_mnist": (10, (28, 28, 1), None),
  "imagenet2012": (1000, (224, 224, 3), None), "imagenette": (10, (160, 160, 3), None),
  "tiny_imagenet": (200, (64, 64, 3), None), "cifar10_sequence": (10, (1024, 3), None),
  "lra_image": (10, (1024,), 256), "lra_image_real": (10, (1024, 1), None), "pathfinder": (2, (1024,), 256),
  "path_x": (2, (16384,), 256), "path_x_real": (2, (16384, 1), None), "listops": (10, (2000,), 16),
  "text": (2, (4096,), 257), "retrieval": (2, (2, 4000), 257),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_and_classes_are_the_published_ones(name):
  task = tasks.get(name)
  assert (len(set(task.class_names)), task.input_shape, task.vocab_size) == PUBLISHED[name]


def test_every_entry_fits_together():
  for name, task in tasks.REGISTRY.items():
    assert task.name == name and len(task.class_names) == len(set(task.class_names))
    if task.image_shape is not None:
      assert len(task.mean) == len(task.std) == task.image_shape[2] and task.token_shape is None
    else:
      assert task.view == "tokens" and task.encode and task.decode and task.token_shape
    assert (task.vocab_size is not None) == (task.view == "tokens")


def settings(name, **options):
  return dict(name=name, data_dir="") | options


def test_options_change_shapes():
  assert tasks.of(settings("text", length=1000)).input_shape == (1000,)
  assert tasks.of(settings("retrieval", length=64)).input_shape == (2, 64)
  assert tasks.of(settings("cifar100", image_size=64)).input_shape == (64, 64, 3)
  assert tasks.of(settings("cifar10")).input_shape == (32, 32, 3)


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    (dict(name="listops", length=500), "config.task.length=500: task listops has no such choice"),
    (dict(name="text", length=-1), "config.task.length=-1: expected a number above 0"),
    (dict(name="digits", image_size=16), "config.task.image_size=16: task digits has no such choice"),
    (dict(name="digits", contour_length=6), "config.task.contour_length=6: task digits has no such choice"),
    (dict(name="lra_image", quirks=("mask_zero",)), "did you mean 'mask_zeros'"),
    (dict(name="text", quirks=("mask_zeros",)), "task text has drop_remainder, test_for_validation only"),
    (dict(name="path_y"), "did you mean 'path_x'"),
    (dict(name="folder:/nowhere"), "/nowhere/train: does not exist"),
  ],
)
def test_options_that_a_task_lacks_are_refused(options, expected):
  with pytest.raises(errors.UserError) as refusal:
    tasks.of(settings(**options))
  assert expected in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["pathfinder", "pathfinder_real", "pathfinder_image", "path_x", "path_x_real"])
def test_the_difficulty_of_pathfinder_reaches_its_source(name):
  task = tasks.of(settings(name, contour_length=10))
  with pytest.raises(errors.UserError, match=r"contour_length 10; expected .* 6 \(easy\), 9 or 14 \(hard\)$"):
    tasks.load(task)


def test_a_label_that_is_no_class_is_named():
  bad = Split(np.zeros((20, 8, 8, 1), np.uint8), np.arange(20, dtype=np.int32) % 11)
  task = tasks.Task("t", (8, 8, 1), tuple("0123456789"), (0.5,), (0.5,), lambda data_dir: {"train": bad, "test": bad})
  with pytest.raises(errors.UserError, match="example 10 of split 'train' has label 10, expected 0 to 9"):
    tasks.load(task)


def test_shuffled_vocabulary_is_a_renaming_by_seed():
  split = listops.generate(30, 0, max_length=60, min_length=5)
  task = tasks.of(settings("listops", quirks=("shuffled_vocabulary",)))
  task = tasks.dataclasses.replace(task, load=lambda data_dir: dict.fromkeys(("train", "validation", "test"), split))
  one, again, two = (tasks.load(task, seed=seed)["test"].inputs for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, again)
  assert (one != two).any() and ((one == 0) == (split.inputs == 0)).all()
  renamed = {old: set(one[split.inputs == old]) for old in np.unique(split.inputs)}
  assert all(len(new) == 1 for new in renamed.values()) and len(set.union(*renamed.values())) == len(renamed)


@pytest.fixture(scope="module")
def listops_files(tmp_path_factory):
  """A folder with listops/*.tsv of 60, 20 and 20 short expressions, as the benchmark writes them."""
  folder = tmp_path_factory.mktemp("data")
  (folder / "listops").mkdir()
  for seed, (name, count) in enumerate((("train", 60), ("val", 20), ("test", 20))):
    split = listops.generate(count, seed, min_length=5, max_length=40)
    lines = [f"{listops.decode(tokens)}\t{label}" for tokens, label in zip(split.inputs, split.labels, strict=True)]
    (folder / f"listops/basic_{name}.tsv").write_text("\n".join(["Source\tTarget", *lines]) + "\n")
  return folder


SMALL = (
  "--config.train.steps=2",
  "--config.train.batch_size=8",
  "--config.eval.every_epochs=10.0",
  "--config.optim.schedule.name=constant",
  "--config.optim.schedule.warmup_epochs=0.0",
)


def test_listops_from_files_to_predictions(listops_files, python, tmp_path):
  workdir = tmp_path / "run"
  options = (
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.states=16",
    "--config.model.ssm_blocks=1",
  )
  arguments = ("--workdir", workdir, f"--config.task.data_dir={listops_files}", *SMALL, *options)
  process = python("lra_jax.main", "--config=configs/s5.py:listops", *arguments)
  assert process.returncode == 0, process.stderr
  assert "60 train, 20 validation, 20 test examples" in process.stdout
  result = result_of(workdir)
  assert result["task"] == "listops" and result["steps"] == 2
  mistakes = (workdir / "mistakes.txt").read_text()
  assert "of 20 wrong" in mistakes and mistakes.count("--- true") == round(20 * (1 - result["test_accuracy"]))
  assert json.loads((workdir / "class_names.json").read_text()) == list("0123456789")
  (tmp_path / "a.txt").write_text("( ( [MAX 3 ) 4 ) ]\n")
  (tmp_path / "b.txt").write_text("[MAX 3 4 ]")
  process = python("lra_jax.predict", "--workdir", workdir, tmp_path / "a.txt", tmp_path / "b.txt", "--top=10")
  first, second = process.stdout.strip().splitlines()
  assert first.partition(": ")[2] == second.partition(": ")[2] and first.count("%") == 10
  (tmp_path / "c.txt").write_text("[MAX 3 4")
  process = python("lra_jax.predict", "--workdir", workdir, tmp_path / "c.txt")
  assert process.returncode == 2 and "c.txt: it is not an expression" in process.stderr


def test_buckets_of_length_change_nothing_but_the_order(listops_files, tmp_path):
  """Padding is worth nothing to an LRU: losses of the same batches are those without buckets."""
  import jax

  from configs import lru
  from lra_jax import parallel, step
  from lra_jax.data import batches, feed, resident

  config = lru.get_config("listops")
  config.task.data_dir = str(listops_files)
  config.train.length_buckets = (16, 24)
  config.model.width, config.model.depth, config.model.states, config.model.dropout = 8, 1, 8, 0.0
  task = tasks.of(config.task)
  splits = {name: split._replace(inputs=split.inputs[:, :40]) for name, split in tasks.load(
    task, data_dir=str(listops_files)).items()}  # fmt: skip
  task = tasks.dataclasses.replace(task, token_shape=(40,), load=lambda data_dir: splits)
  assert batches.buckets(config, task) == (16, 24, 40)
  mesh = parallel.make_mesh(1)
  schedule = lambda step: 1e-3
  graphdef, state, optimizer = step.init_state(config, task, schedule)
  train_feed = feed.ResidentFeed(config, task, splits["train"], 5, 1, mesh)
  seen = set()
  for first in range(0, 12, 4):
    length, indices = train_feed(first)
    losses = []
    for cut in (length, None):
      call = step.make_train_call(config, task, graphdef, optimizer, schedule, 1, mesh, cut)
      losses.append(call(jax.tree.map(jax.numpy.copy, state), train_feed.data, indices)[1]["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)
    seen.add(length)
  assert len(seen) > 1
  call = step.make_eval_call(config, task, graphdef, mesh)
  weights = {name: state[name] for name in ("params", "model_state")}
  test = resident.put(splits["test"], mesh)
  whole, cut = (step.evaluate(call, weights, test, 8, mesh, False, bounds) for bounds in ((), (16, 24, 40)))
  assert whole[0] == pytest.approx(cut[0], rel=1e-5)
  np.testing.assert_array_equal(whole[1], cut[1])
  np.testing.assert_allclose(whole[2], cut[2], rtol=1e-5)
  assert len(step.evaluate(call, weights, test, 8, mesh, True, (16, 24, 40))[1]) == 16  # the rest of 20 is left out
  for name, value, expected in (("fnet_small", (16,), "the padding counts"), ("lru", (24, 16), "expected ascending")):
    config.model.name, config.train.length_buckets = name, value
    with pytest.raises(errors.UserError, match=expected):
      batches.buckets(config, task)


def test_own_pictures_from_a_folder_to_predictions(python, tmp_path):
  random = np.random.RandomState(0)
  for split, count in (("train", 20), ("val", 4)):
    for label, name in enumerate(("dark", "light")):
      (tmp_path / "data" / split / name).mkdir(parents=True)
      for i in range(count):
        pixels = random.randint(128 * label, 128 * label + 128, (10, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
  workdir = tmp_path / "run"
  arguments = ("--workdir", workdir, *SMALL, "--config.task.image_size=8", "--config.model.patch_size=2")
  small = ("--config.model.width=8", "--config.model.depth=1", "--config.model.kernel_size=3",
           "--config.model.dtype=float32", "--config.augment.policy=")  # fmt: skip
  config = f"--config=configs/convmixer.py:folder:{tmp_path / 'data'}"
  process = python("lra_jax.main", config, *arguments, *small)
  assert process.returncode == 0, process.stderr
  assert "36 train, 4 validation, 8 test examples" in process.stdout
  assert (workdir / "mistakes.png").read_bytes().startswith(b"\x89PNG")
  streamed = tmp_path / "streamed"
  process = python("lra_jax.main", config, "--workdir", streamed, *arguments[2:], *small, "--config.task.input=stream")
  assert process.returncode == 0 and "examples streamed" in process.stdout, process.stderr
  ours, theirs = (result_of(folder) for folder in (streamed, workdir))
  assert ours["params_sha256"] == theirs["params_sha256"] and ours["test_loss"] == pytest.approx(theirs["test_loss"])
  process = python("lra_jax.evaluate", "--workdir", streamed)
  assert json.loads(process.stdout)["loss"] == pytest.approx(ours["test_loss"]), process.stderr
  (tmp_path / "data").rename(tmp_path / "moved")  # a trained model does not need its pictures
  picture = tmp_path / "moved/val/dark/0.png"
  process = python("lra_jax.predict", "--workdir", workdir, picture)
  assert process.returncode == 0 and "dark" in process.stdout and "light" in process.stdout, process.stderr


def test_text_is_encoded_as_training_reads_it(tmp_path):
  from lra_jax import predict

  (tmp_path / "a").write_bytes(b"ab\xff")
  (tmp_path / "b").write_bytes(b"c")
  task = tasks.of(settings("retrieval", length=2))
  tokens, lengths = predict.read_texts([str(tmp_path / "a"), str(tmp_path / "b")], task)
  np.testing.assert_array_equal(tokens, [[[98, 99], [100, 0]]])
  np.testing.assert_array_equal(lengths, [[2, 1]])
  assert task.decode(tokens[0, 0]) == "ab" and task.class_names == ("unrelated", "related")
  with pytest.raises(errors.UserError, match="give an even number"):
    predict.read_texts([str(tmp_path / "a")], task)
  assert task.vocab_size == text.VOCAB_SIZE
