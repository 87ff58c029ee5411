"""FNet (Lee-Thorp et al. 2021): Fourier transforms in place of attention.

  python -m lra_jax.main --config configs/fnet.py:digits
  python -m lra_jax.main --config configs/fnet.py                                  LRA Image; 38.67 is published for
  FNet python -m lra_jax.main --config configs/fnet.py:cifar10 --config.model.patch_size=4

FNet's recipe for the Long Range Arena is not published; this one is ours.
"""

from configs import common

TASKS = common.tasks_with("lra_image")
VARIANTS = {name: f"fnet_{name}" for name in ("small", "base", "large", "digits")}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, mlp_hidden=int, pool=str, dropout=float)
  c, task = common.start(argument, TASKS, VARIANTS, digits="digits", **fields)
  if task.startswith("digits"):
    c.train.epochs = 100.0
    c.train.cutmix = 0.0
  elif task == "cifar10":
    common.small_image_recipe(c)
    c.model.patch_size = 4
  else:
    c.train.batch_size = 128
    c.train.epochs = 100.0
    c.augment.flip = task == "lra_image"  # the label does not depend on left and right
    c.optim.learning_rate = 1e-3
    c.optim.weight_decay = 0.05
    c.optim.schedule.warmup_epochs = 2.0
  return c
