"""gMLP (Liu et al. 2021).

  python -m lra_jax.main --config configs/gmlp.py:digits
  python -m lra_jax.main --config configs/gmlp.py                                  CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/gmlp.py:cifar10,variant=ti16 --config.model.patch_size=4

The paper trains on ImageNet with DeiT's recipe; for CIFAR-10 `configs.common.small_image_recipe` is ours.
"""

from configs import common

TASKS = (*common.IMAGE_TASKS, *common.SEQUENCE_TASKS, *common.TEXT_TASKS)
VARIANTS = {name: f"gmlp_{name}" for name in ("tiny32", "ti16", "s16", "b16", "digits")}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, drop_path=float)
  c, task = common.start(argument, TASKS, VARIANTS, digits="digits", **fields)
  if not task.startswith("digits"):
    common.small_image_recipe(c)
  return c
