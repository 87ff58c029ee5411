"""TrellisNet (Bai, Kolter & Koltun 2019): a causal convolution with its weights tied over eleven levels.

  python -m lra_jax.main --config configs/trellisnet.py:digits
  python -m lra_jax.main --config configs/trellisnet.py                  sequential CIFAR-10; the paper reports 73.42
  python -m lra_jax.main --config configs/trellisnet.py:cifar10_permuted also :mnist_sequence, :mnist_permuted (98.13)
  python -m lra_jax.main --config configs/trellisnet.py:listops          and the rest of the Long Range Arena

Recipe of the official seq_mnist_cifar.py: Adam 4e-3, divided by 10 after epochs 50, 75 and 90, batch 64, clipping at
0.5, no augmentation, dropout rates of the preset. The paper's own sizes for CIFAR-10 (about 8 million parameters:
hidden=990) we could not read. A validation split is carved out here; the official script has none.

The Long Range Arena is ours: `configs.common.lra_recipe`, as many levels as its sequences need to be seen whole, and
widths within the benchmark's rule (docs/lra.md).
"""

from configs import common

TASKS = common.tasks_with("cifar10_sequence")
VARIANTS = {"base": "trellisnet", "digits": "trellisnet_digits"}


def _levels(steps):
  """Dilations 1, 1, 2, 4 … of which the last step depends on so many steps before it."""
  return (1, *(2**i for i in range((steps - 1).bit_length())))


SIZES = {
  "listops": dict(hidden=480, outputs=64, dilations=_levels(2_000)),
  "text": dict(hidden=240, outputs=64, dilations=_levels(4_096)),
  "retrieval": dict(hidden=240, outputs=64, dilations=_levels(4_000)),
  "pathfinder": dict(hidden=36, dilations=_levels(1_024)),
  "path_x": dict(hidden=120, outputs=64, dilations=_levels(16_384)),
}


def get_config(argument: str | None = None):
  rates = dict(dropout_input=float, dropout_hidden=float, dropout_output=float, dropout_weight=float)
  c, task, _ = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=SIZES, hidden=int, dilations=tuple, outputs=int,
    kernel_size=int, **rates,
  )  # fmt: skip
  c.model.weight_norm = True
  c.model.embed_features = 16  # of integer tokens
  common.as_pixels(c)
  if task.startswith("digits"):
    common.recurrent_digits_recipe(c)
  elif common.lra(task):
    common.lra_recipe(c, task, learning_rate=2e-3)
    c.optim.clip_norm = 0.5
  else:
    c.train.batch_size = 64
    c.train.epochs = 200.0
    c.optim.name = "adam"
    c.optim.learning_rate = 4e-3
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 0.5
    c.optim.schedule.name = "piecewise"
    c.optim.schedule.boundaries_epochs = (50.0, 75.0, 90.0)
    c.optim.schedule.factor = 0.1
  return c
