"""Vision Transformer (Dosovitskiy et al. 2021; plain form: Beyer et al. 2022).

  python -m lra_jax.main --config configs/vit.py:digits
  python -m lra_jax.main --config configs/vit.py                                        CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/vit.py:cifar10,variant=ti16 --config.model.patch_size=4

The ImageNet recipe of big_vision's plain ViT-S/16 (Adam 1e-3 at batch 1024, decay 1e-4, 10,000 steps warm-up, clipping
at 1, mean pooling and fixed positions) does not fit data as small as CIFAR-10; `configs.common.small_image_recipe` is
ours.
"""

from configs import common

TASKS = (*common.IMAGE_TASKS, *common.SEQUENCE_TASKS, *common.TEXT_TASKS)
VARIANTS = {name: f"vit_{name}" for name in ("tiny32", "ti16", "s16", "s32", "b16", "digits")}


def get_config(argument: str | None = None):
  return build(argument, VARIANTS)


def build(argument, variants):
  """The config of a ViT or of a PiT."""
  fields = dict(patch_size=int, width=int, depth=int, heads=int, pool=str, position=str)
  rates = dict(dropout=float, attention_dropout=float, drop_path=float)
  c, task = common.start(argument, TASKS, variants, digits="digits", **fields, **rates)
  if task.startswith("digits"):
    common.attention_digits_recipe(c)
  else:
    common.small_image_recipe(c)
    c.model.drop_path = 0.1
  return c
