"""LipschitzRNN (Erichson et al. 2021): a continuous-time recurrence with a bounded spectrum.

  python -m lra_jax.main --config configs/lipschitz_rnn.py:digits
  python -m lra_jax.main --config configs/lipschitz_rnn.py                       sequential CIFAR-10; 64.2 is published
  python -m lra_jax.main --config configs/lipschitz_rnn.py --config.model.method=midpoint
  python -m lra_jax.main --config configs/lipschitz_rnn.py:mnist_permuted,variant=128      96.3; :mnist_sequence 99.4
  python -m lra_jax.main --config configs/lipschitz_rnn.py:listops               and the rest of the Long Range Arena

The official repository gives commands for pixel MNIST alone: 128 units, Adam 3e-3, times 0.1 at epoch 90 of 100, batch
128, no clipping. They are taken here with 256 units, which have the number of parameters in the paper's CIFAR-10
table, and with the crops and flips that its CIFAR-10 loader has. Clipping at 1 is ours.

The Long Range Arena is ours: `configs.common.lra_recipe` without decay, a time that falls with the length, so that a
sequence takes as long as 1,024 pixels do, and widths within the benchmark's rule (docs/lra.md).
"""

from configs import common

TASKS = common.tasks_with("cifar10_sequence")
VARIANTS = {"256": "lipschitz_rnn_256", "128": "lipschitz_rnn", "digits": "lipschitz_rnn_digits"}
SIZES = {
  "listops": dict(width=512, epsilon=0.015),
  "text": dict(width=512, epsilon=0.0075),
  "retrieval": dict(width=256, epsilon=0.0075),
  "pathfinder": dict(width=64),
  "path_x": dict(epsilon=0.002),
}


def get_config(argument: str | None = None):
  c, task, _ = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=SIZES, width=int, epsilon=float, patch_size=int, dropout=float
  )
  common.as_pixels(c)
  c.model.beta = 0.75
  c.model.gamma = 0.001
  c.model.method = "euler"  # or "midpoint", "rk4"
  c.model.gated = False
  c.model.init_std = 0.1  # of B and C, times 1 / units
  c.model.unroll = 1  # steps in one iteration of the loop
  c.model.implementation = common.optional(str)  # of the recurrence; None for the best that can serve
  if task.startswith("digits"):
    common.recurrent_digits_recipe(c)
    c.train.epochs = 150.0
  elif common.lra(task):
    common.lra_recipe(c, task)
    c.optim.weight_decay = 0.0
  else:
    c.train.batch_size = 128
    c.train.epochs = 100.0
    c.optim.name = "adam"
    c.optim.learning_rate = 3e-3
    c.optim.weight_decay = 0.0
    c.optim.schedule.name = "piecewise"
    c.optim.schedule.boundaries_epochs = (90.0,)
    c.optim.schedule.factor = 0.1
  if task.startswith("cifar") and task != "cifar10_permuted":
    c.augment.crop_pad = 4
    c.augment.flip = True
  return c
