"""Evaluates a trained model: `python -m lra_jax.evaluate --workdir W [--split test] [--step best]`; prints JSON."""

import json
import sys

from absl import flags

from lra_jax import errors

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_SPLIT = flags.DEFINE_string("split", "test", "train, validation or test.")
_STEP = flags.DEFINE_string("step", "best", "Checkpoint: best (by validation), newest, or a step.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder of the data, where it is not that of the training.")


def main() -> None:
  """Parses the flags, evaluates and prints."""
  errors.parse_flags(sys.argv, required=("workdir",))
  from flax import nnx

  from lra_jax import parallel, runs, step
  from lra_jax.data import batches, feed

  parallel.keep_freed_memory()
  trained = runs.load(_WORKDIR.value, _STEP.value)
  settings = runs.data_settings(trained.config) | ({"data_dir": _DATA_DIR.value} if _DATA_DIR.value else {})
  errors.check_known("--split", _SPLIT.value, ("train", "validation", "test"))
  mesh = parallel.make_mesh(-1)
  splits = feed.load(trained.config, trained.task, mesh, **settings)
  graphdef, params, rest = nnx.split(trained.model, nnx.Param, ...)
  weights = {"params": nnx.to_pure_dict(params), "model_state": nnx.to_pure_dict(rest)}
  weights = parallel.put(weights, parallel.replicated(mesh))
  call = step.make_eval_call(trained.config, trained.task, graphdef, mesh)
  data = feed.held_out(splits[_SPLIT.value], mesh)
  drop_remainder = "drop_remainder" in trained.task.quirks
  values, predictions, _ = step.evaluate(
    call,
    weights,
    data,
    trained.config.eval.batch_size,
    mesh,
    drop_remainder,
    batches.buckets(trained.config, trained.task),
  )
  head = {"model": trained.config.model.name, "task": trained.task.name, "split": _SPLIT.value, "step": trained.step}
  print(json.dumps(head | {"examples": int((predictions >= 0).sum())} | values))


if __name__ == "__main__":
  errors.exit_on_user_error(main)
