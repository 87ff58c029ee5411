"""Trains a model: `python -m lra_jax.main --config configs/sequencer2d.py[:task,option=value] [--workdir DIR]`.

The same command again resumes the run. Any field is overridden by `--config.optim.learning_rate=1e-3`; the fields are
in configs/common.py. `lra_jax.evaluate` and `lra_jax.predict` use what it leaves in the workdir.
"""

import sys

from absl import flags

from lra_jax import config, errors, xla_flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<model>-<task>-<hash of the config>.")


def main() -> None:
  """Parses the flags and trains."""
  settings = config.parse_command_line(sys.argv)
  xla_flags.apply(settings.deterministic, (settings.parallel.data, settings.parallel.fsdp) != (1, 1))
  from lra_jax import processes, train  # JAX and the rest take seconds; a wrong flag should not

  with processes.started():
    train.train_and_evaluate(settings, _WORKDIR.value)


if __name__ == "__main__":
  errors.exit_on_user_error(main)
