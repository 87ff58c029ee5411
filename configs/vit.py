"""Vision Transformer (Dosovitskiy et al. 2021; plain form: Beyer et al. 2022).

  python -m lra_jax.main --config configs/vit.py:digits
  python -m lra_jax.main --config configs/vit.py                                        CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/vit.py:cifar10,variant=ti16 --config.model.patch_size=4
  python -m lra_jax.main --config configs/vit.py:imagenet2012                           S/16; also :imagenette …
  python -m lra_jax.main --config configs/vit.py:imagenette,recipe=patches              6 layers, 8 heads, 1.3 M
  python -m lra_jax.main --config configs/vit.py:listops                                and the rest of the LRA

The ImageNet recipe of big_vision's plain ViT-S/16 (Adam 1e-3 at batch 1024, decay 1e-4, 10,000 steps warm-up, clipping
at 1, mean pooling and fixed positions) does not fit data as small as CIFAR-10; all pictures get
`configs.common.image_recipe`. The Long Range Arena has `configs.common.lra_recipe` with sizes of ours (docs/lra.md);
attention of all 16,384 pixels of Path-X to all needs memory: every block is computed twice (`--config.model.remat`),
and a batch of 64 worked off one by one (`--config.train.accumulate`; on several devices in fewer parts).
"""

from configs import common

TASKS = (*common.IMAGE_TASKS, *common.SEQUENCE_TASKS, *common.TEXT_TASKS)
VARIANTS = {name: f"vit_{name}" for name in ("tiny32", "ti16", "s16", "s32", "b16", "digits")}
SIZES = {
  **{key: {"variant": "s16"} for key in common.LARGE_IMAGE_TASKS},
  "tiny_imagenet": {"variant": "ti16", "patch_size": 8},
  "retrieval": dict(width=96, depth=5),
  "lra_image": dict(width=64, depth=3, heads=4),
}


def get_config(argument: str | None = None):
  return build(argument, VARIANTS, SIZES, ("patches",))


def build(argument, variants, sizes, recipes=()):
  """The config of a ViT or of a PiT."""
  fields = dict(patch_size=int, width=int, depth=int, heads=int, pool=str, position=str)
  rates = dict(dropout=float, attention_dropout=float, drop_path=float)
  c, task, recipe = common.start(
    argument, TASKS, variants, digits="digits", per_task=sizes, recipes=recipes, **fields, **rates
  )
  if recipe:
    common.patches_recipe(c)
    c.model.update(patch_size=16, width=128, depth=6, heads=8)
  elif task.startswith("digits"):
    common.attention_digits_recipe(c)
  elif common.lra(task):
    common.lra_recipe(c, task)
    if common.lra(task) == "path_x":
      c.model.remat = True
      c.train.accumulate = 64
      c.eval.batch_size = 2
  else:
    common.image_recipe(c)
    c.model.drop_path = 0.1
  return c
