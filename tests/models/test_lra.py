"""The Long Range Arena: every sequence model's config of every task: sizes, budgets, and the gradient of a batch.

docs/lra.md has the table of sizes; after a change that is meant: `UPDATE_GOLDEN=1 pytest tests/models/test_lra.py`.
"""

import dataclasses
import functools
import os

import jax
import numpy as np
import optax
import pytest
from commands import ROOT
from flax import nnx

from configs import common
from lra_jax import config as config_lib
from lra_jax import models, optim, parallel, runs
from lra_jax.data import batches, resident, tasks

MODELS = ("lra_transformer", "nystromformer", "fnet", "s5", "lru", "vit", "pit", "mlp_mixer", "gmlp", "trellisnet",
          "lipschitz_rnn")  # fmt: skip
# Larger than the benchmark's rule allows, at most 10 % above its Transformer. All others must be within it.
FREE_FOR_ALL = {
  "nystromformer": {"pathfinder", "path_x"},
  "fnet": {"pathfinder"},
  "s5": {"lra_image", "pathfinder", "path_x"},
  "lru": {"pathfinder"},
  "vit": {"pathfinder", "path_x"},
  "pit": {"text", "retrieval", "lra_image", "pathfinder", "path_x"},
  "mlp_mixer": {"pathfinder", "path_x"},
  "gmlp": {"text", "retrieval", "lra_image", "pathfinder", "path_x"},
}
MARK = "*"
TABLE = ROOT / "docs/lra.md"


def load(model, task):
  return config_lib.load(str(ROOT / f"configs/{model}.py"), task)


@functools.cache
def count(model, task):
  config = load(model, task)
  found = nnx.eval_shape(lambda: runs.create_model(config, tasks.of(config.task)))
  return models.count_params(found)


def test_the_transformer_has_the_benchmarks_parameters():
  """By hand from its sizes: embeddings, class token, positions, blocks, norm, and a head with a hidden layer.

  Retrieval's head there has two hidden layers and no differences and products: 263,426 parameters, here 263,682; and no
  class token, here 128 parameters.
  """
  dense = lambda i, o: i * o + o

  def total(vocabulary, width, depth, qkv, hidden, classes, *, cls, positions=0, pair=False):
    block = 4 * width * qkv + dense(width, hidden) + dense(hidden, width) + 4 * width
    head = dense((4 if pair else 1) * width, hidden) + dense(hidden, classes)
    return (vocabulary + cls + positions) * width + depth * block + 2 * width + head

  assert count("lra_transformer", "listops") == total(16, 512, 4, 512, 1024, 10, cls=1)
  assert count("lra_transformer", "text") == total(257, 256, 4, 256, 1024, 2, cls=1)
  assert count("lra_transformer", "retrieval") == total(257, 128, 4, 128, 512, 2, cls=1, pair=True)
  assert count("lra_transformer", "lra_image") == total(256, 128, 1, 64, 128, 10, cls=1, positions=1025)
  assert count("lra_transformer", "pathfinder") == total(256, 32, 4, 16, 32, 2, cls=0)
  assert count("lra_transformer", "path_x") == total(256, 32, 1, 16, 32, 2, cls=0, positions=16_384)


@pytest.mark.parametrize("model", MODELS)
def test_sizes_are_within_the_rule_or_declared(model):
  for task in common.LRA:
    within = count(model, task) <= 1.1 * count("lra_transformer", task)
    assert within == (task not in FREE_FOR_ALL.get(model, ())), (task, count(model, task))


def test_the_table_of_sizes_is_as_written():
  rows = ["| config | " + " | ".join(common.LRA) + " |", "|---" * (1 + len(common.LRA)) + "|"]
  for model in MODELS:
    marks = {task: MARK if task in FREE_FOR_ALL.get(model, ()) else "" for task in common.LRA}
    rows.append("| ".join([f"| {model} "] + [f"{count(model, task):,}{marks[task]} " for task in common.LRA]) + "|")
  before, _, rest = TABLE.read_text().partition("| config | ")
  after = rest[rest.index("\n\n") :]
  text = before + "\n".join(rows) + after
  if os.environ.get("UPDATE_GOLDEN"):
    TABLE.write_text(text)
  assert TABLE.read_text() == text


@pytest.mark.parametrize("model", MODELS)
def test_budgets_are_the_benchmarks(model):
  """Steps and batch of base_*_config.py; of Nyströmformer and S5 what their own code has."""
  own = {"nystromformer": {"pathfinder": (256, 62_400), "retrieval": (32, 30_000)}}.get(model, {})
  for task, budget in {
    "listops": (32, 5_000), "text": (32, 20_000), "retrieval": (32, 5_000), "lra_image": (256, 35_000),
    "pathfinder": (512, 62_400), "path_x": (64, 500_000), "pathfinder_real": (512, 62_400),
  }.items():  # fmt: skip
    config = load(model, task)
    if model == "s5":
      epochs = {"listops": 40, "text": 35, "retrieval": 20, "lra_image": 250, "path_x": 75}
      assert config.train.epochs == epochs.get(task, 200) and config.train.steps == 0
    else:
      expected = own.get(task.removesuffix("_real"), budget)
      assert (config.train.batch_size, config.train.steps) == expected, task
    assert not (config.train.mixup or config.train.cutmix or config.augment.flip or config.augment.crop_pad)
    plan_epochs = common.LRA[common.lra(task)].examples / config.train.batch_size
    optim.make_schedule(config.optim, config.train.steps or round(config.train.epochs * plan_epochs), plan_epochs)


def test_the_transformers_schedules():
  """0.05 · min(1, t / w) / √max(t, w) on texts, half a cosine on pixels; warm-up of so many steps."""
  for task, steps, warmup in (("listops", 5000, 1000), ("text", 20_000, 8000), ("retrieval", 5000, 8000)):
    config = load("lra_transformer", task)
    schedule = optim.make_schedule(config.optim, steps, common.LRA[task].examples / 32)
    for t in (0, 10, 999, 4000, steps - 1):
      assert schedule(t) == pytest.approx(0.05 * min(1, t / warmup) / max(t, warmup) ** 0.5, rel=1e-4), (task, t)
  schedule = optim.make_schedule(load("lra_transformer", "pathfinder").optim, 62_400, 160_000 / 512)
  truth = [1e-3 * 100 / 312, 1e-3, 1e-3 * (1 + np.cos(np.pi * (31_000 - 312) / (62_400 - 312))) / 2]
  np.testing.assert_allclose([schedule(t) for t in (100, 312, 31_000)], truth, rtol=1e-4)


TINY = {  # one block of a few channels
  "lra_transformer": dict(width=8, depth=1, heads=2, qkv_features=8, mlp_hidden=8),
  "nystromformer": dict(width=8, depth=1, heads=2, mlp_hidden=8, landmarks=4, skip_kernel=3),
  "fnet": dict(width=8, depth=1, mlp_hidden=8),
  "s5": dict(width=8, depth=1, states=8, ssm_blocks=2),
  "lru": dict(width=8, depth=1, states=8),
  "vit": dict(width=8, depth=1, heads=2),
  "pit": dict(width=8, depth=1, heads=2),
  "mlp_mixer": dict(width=8, depth=1, token_hidden=8, channel_hidden=8),
  "gmlp": dict(width=8, depth=1),
  "trellisnet": dict(hidden=8, outputs=8, dilations=(1, 2)),
  "lipschitz_rnn": dict(width=8),
}
SHAPES = {"listops": (16,), "pathfinder": (4, 4, 1), "text": (16,), "retrieval": (2, 16)}


# All on pairs of texts, which have all there is: masks, an encoder, a shared head; and on one of the others.
CASES = [(model, task) for i, model in enumerate(MODELS) for task in ("retrieval", tuple(SHAPES)[i % 3])]


@pytest.mark.parametrize("model,task_name", CASES)
def test_gradients_on_short_forms(model, task_name):
  """Loss and gradient of a batch as training sees it are finite, and the gradient is not zero."""
  config = load(model, task_name)
  config.model.update(TINY[model])
  shape, random = SHAPES[task_name], np.random.RandomState(0)
  task = tasks.of(config.task)
  field = "image_shape" if task.token_shape is None else "token_shape"
  task = dataclasses.replace(task, **{field: shape})
  inputs = random.randint(1, task.vocab_size, (4, *shape)).astype(task.stored_dtype)
  lengths = None
  if task.token_shape is not None:  # of different lengths, padded with 0
    lengths = random.randint(3, 17, (4, *shape[:-1])).astype(np.int32)
    inputs = np.where(np.arange(16) < lengths[..., None], inputs, 0).astype(task.stored_dtype)
  examples = resident.Resident(inputs, np.arange(4, dtype=np.int32) % 2, lengths)

  found = nnx.eval_shape(lambda: runs.create_model(config, task))
  graphdef, params, rest = nnx.split(found, nnx.Param, ...)
  # Not as the model starts, which would be compiled draw by draw.
  params = jax.tree.map(lambda a: random.uniform(-0.3, 0.3, a.shape).astype(a.dtype), nnx.to_pure_dict(params))
  rest = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), nnx.to_pure_dict(rest))

  @jax.jit
  @jax.value_and_grad
  def loss(params, rest):
    key = jax.random.key(0)
    (x, options), targets_BS = batches.training(config, task, examples, key, key, parallel.make_mesh(1))
    logits_BS = nnx.merge(graphdef, params, rest)(x, **options, train=True, rngs=nnx.Rngs(dropout=key))
    return optax.softmax_cross_entropy(logits_BS, targets_BS).mean()

  value, gradient = loss(params, rest)
  assert 0 < value < 20
  norms = np.array([np.linalg.norm(leaf) for leaf in jax.tree.leaves(gradient)])
  assert np.isfinite(norms).all() and (norms > 0).mean() > 0.8, norms
