"""Models train with the interpreted GPU kernels as they do with XLA: the same losses, step after step."""

import jax
import numpy as np
import pytest

from kernels import dispatch
from lra_jax import config as config_lib
from lra_jax import parallel, step
from lra_jax.data import resident, sources, tasks

SIDE, CLASSES = 4, 4
# Steps, how far a loss may be off, the batch, the learning rate, the model. Interpreted, a kernel takes some 50 ms of
# processor time for each block and step in time, so there are few of both; and it is traced and compiled for 5 to 15 s.
# Nyström attention has four kernels and two for its inverse, and takes 5 to 10 s a step.
MODELS = {
  "fnet": (50, 2e-3, 1, 3e-3, dict(width=64, depth=1, mlp_hidden=16)),
  "nystromformer": (4, 2e-3, 2, 3e-3, dict(width=8, depth=1, heads=1, landmarks=2, patch_size=2)),
  "sequencer2d": (50, 1e-5, 1, 3e-2, dict(depths=(1,), patch_sizes=(2,), embed_dims=(8,), hidden_sizes=(4,))),
  "vanilla_sequencer": (50, 1e-5, 1, 3e-2, dict(depths=(1,), patch_sizes=(2,), embed_dims=(8,), hidden_sizes=(4,))),
  "lipschitz_rnn": (50, 1e-4, 8, 3e-3, dict(width=64, patch_size=2)),
  "s5": (50, 1e-5, 2, 3e-3, dict(width=8, states=8, ssm_blocks=1, depth=1, patch_size=2)),
  "lru": (50, 1e-5, 2, 3e-3, dict(width=8, states=8, depth=1, patch_size=2)),
}

FEW = 8  # Steps that every run of the tests takes.


def losses(family, implementation, steps, batch, learning_rate, fields):
  config = config_lib.load(f"configs/{family}.py", "digits")
  config.train.batch_size = batch
  for name, value in (fields | {"implementation": implementation}).items():
    config.model[name] = value
  rng = np.random.RandomState(0)
  labels = np.arange(2 * max(batch, CLASSES), dtype=np.int32) % CLASSES
  images = rng.randint(0, 100, (len(labels), SIDE, SIDE, 1)) + 30 * labels.reshape(-1, 1, 1, 1)
  task = tasks.Task("tiny", (SIDE, SIDE, 1), tuple("abcd"), (0.5,), (0.25,), dict)
  schedule = lambda step: learning_rate
  mesh = parallel.make_mesh(1)
  graphdef, state, optimizer = step.init_state(config, task, schedule)
  state = jax.device_put(state, parallel.replicated(mesh))  # as the call returns it, or the second call compiles anew
  call = step.make_train_call(config, task, graphdef, optimizer, schedule, 1, mesh)
  data = resident.put(sources.Split(images.astype(np.uint8), labels), mesh)
  result = []
  for row in resident.train_indices(len(labels), batch, 0, steps, seed=0):
    state, values = call(state, data, row[None])
    result.append(float(jax.device_get(values["loss"][0])))
  return np.array(result)


@pytest.mark.timeout(900, method="thread")
@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["few", "all"])
@pytest.mark.parametrize("family", MODELS)
def test_training_follows_xla(family, few, interpreter, monkeypatch):
  # A quarter of a chunk is then one step and not eight, most of them past the end.
  monkeypatch.setattr("kernels.linear_recurrence.mosaic._UNROLLED", 1)
  steps, bound, *model = MODELS[family]
  steps = min(steps, FEW) if few else steps
  with dispatch.recording() as choices:
    ours = losses(family, "mosaic", steps, *model)
  assert any("mosaic" in implementations for implementations in choices.values())
  assert len(ours) == steps
  np.testing.assert_allclose(ours, losses(family, None, steps, *model), rtol=bound)
