"""TrellisNet (Bai, Kolter & Koltun 2019): a causal convolution with its weights tied over eleven levels.

  python -m lra_jax.main --config configs/trellisnet.py:digits
  python -m lra_jax.main --config configs/trellisnet.py                  sequential CIFAR-10; the paper reports 73.42
  python -m lra_jax.main --config configs/trellisnet.py:cifar10_permuted

Recipe of the official seq_mnist_cifar.py: Adam 4e-3, divided by 10 after epochs 50, 75 and 90, batch 64, clipping at
0.5, no augmentation, dropout rates of the preset. The paper's own sizes for CIFAR-10 (about 8 million parameters:
hidden=990) we could not read. A validation split is carved out here; the official script has none.
"""

from configs import common

TASKS = common.tasks_with("cifar10_sequence")
VARIANTS = {"base": "trellisnet", "digits": "trellisnet_digits"}


def get_config(argument: str | None = None):
  rates = dict(dropout_input=float, dropout_hidden=float, dropout_output=float, dropout_weight=float)
  c, task = common.start(
    argument, TASKS, VARIANTS, digits="digits", hidden=int, dilations=tuple, outputs=int, kernel_size=int, **rates
  )
  c.model.weight_norm = True
  c.model.embed_features = 16  # of integer tokens
  if task.startswith("digits"):
    common.recurrent_digits_recipe(c)
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
