"""bfloat16: after some training steps on digits its logits are those of float32 within 2 %, and it trains by itself."""

import jax
import numpy as np
import pytest
from flax import nnx

from lra_jax import config as config_lib
from lra_jax import models, parallel, runs, step
from lra_jax.data import augment, resident, tasks

DIGITS = [name for name in models.names() if name.endswith("_digits")]
STEPS = {name: 40 for name in DIGITS} | {"vanilla_sequencer_digits": 100}  # its loss begins to fall after 40


def settings(name, **fields):
  family = {"resnet_digits": "resnet"}.get(name, name.removesuffix("_digits"))
  config = config_lib.load(f"configs/{family}.py", "digits")
  assert config.model.name == name
  config.train.batch_size = 32
  for field, value in fields.items():
    config.model[field] = value
  return config


def start(config, steps):
  task = tasks.get("digits")
  schedule = lambda step: config.optim.learning_rate
  graphdef, state, optimizer = step.init_state(config, task, schedule)
  mesh = parallel.make_mesh(1)
  state = jax.device_put(state, parallel.replicated(mesh))  # as the call returns it, or the second call compiles anew
  call = step.make_train_call(config, task, graphdef, optimizer, schedule, 1, mesh)
  data = resident.put(tasks.load(task)["train"], mesh)
  indices = resident.train_indices(len(data.labels), 32, 0, steps, seed=0)
  losses = []
  for row in indices:
    state, values = call(state, data, row[None])
    losses.append(float(values["loss"][0]))
  return state, losses, data, task


@pytest.mark.parametrize("name", DIGITS)
def test_bfloat16_logits_are_float32s_within_2_percent_after_training(name):
  config = settings(name)
  state, losses, data, task = start(config, STEPS[name])
  assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.02, losses
  x = augment.prepare(data.inputs[:128], task)
  logits = {}
  for dtype in ("float32", "bfloat16"):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda dtype=dtype: runs.create_model(settings(name, dtype=dtype), task)))
    model = jax.jit(lambda p, r, graphdef=graphdef: nnx.merge(graphdef, p, r)(x))
    logits[dtype] = np.asarray(model(state["params"], state["model_state"]), np.float64)
  error = np.linalg.norm(logits["bfloat16"] - logits["float32"]) / np.linalg.norm(logits["float32"])
  assert 0 < error < 0.02, error  # 0 would mean that nothing ran in bfloat16


@pytest.mark.parametrize("name", DIGITS)
def test_bfloat16_trains(name):
  """A few steps of one block: finite, and parameters and statistics stay float32."""
  one_block = {"depth": 1} if "depth" in models.fields(name) else {}
  state, losses, _, _ = start(settings(name, dtype="bfloat16", **one_block), 6)
  assert np.isfinite(losses).all()
  for leaf in jax.tree.leaves((state["params"], state["model_state"])):
    assert leaf.dtype == np.float32
