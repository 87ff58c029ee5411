"""gMLP (Liu et al. 2021).

  python -m lra_jax.main --config configs/gmlp.py:digits
  python -m lra_jax.main --config configs/gmlp.py                                  CIFAR-10, our preset for 32 px
  python -m lra_jax.main --config configs/gmlp.py:cifar10,variant=ti16 --config.model.patch_size=4
  python -m lra_jax.main --config configs/gmlp.py:cifar100,recipe=keras            the Keras example; about 51 there
  python -m lra_jax.main --config configs/gmlp.py:imagenette                       also :tiny_imagenet, :folder:PATH …
  python -m lra_jax.main --config configs/gmlp.py:listops                          and the rest of the Long Range Arena

The paper trains on ImageNet with DeiT's recipe; here all pictures get `configs.common.image_recipe`, and the Long Range
Arena `configs.common.lra_recipe` with sizes of ours (docs/lra.md). A block has a weight for every pair of tokens: on
Path-X 268 million, 4.3 GB with the optimizer's state. gMLP has no dropout; the Keras example's 0.2 is left out.
"""

from configs import common

TASKS = (*common.IMAGE_TASKS, *common.SEQUENCE_TASKS, *common.TEXT_TASKS)
VARIANTS = {name: f"gmlp_{name}" for name in ("tiny32", "ti16", "s16", "b16", "digits")}
SIZES = {
  **{key: {"variant": "s16"} for key in common.LARGE_IMAGE_TASKS},
  "tiny_imagenet": {"patch_size": 8},
  "listops": dict(depth=2),
  "text": dict(depth=2),
  "retrieval": dict(depth=2),
  "lra_image": dict(depth=4),
  "pathfinder": dict(depth=4),
  "path_x": dict(width=32, depth=1),
}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, mlp_ratio=float, drop_path=float)
  c, task, recipe = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=SIZES, recipes=("keras",), **fields
  )
  if recipe:
    common.keras_recipe(c)
    c.model.mlp_ratio = 2.0
  elif common.lra(task):
    common.lra_recipe(c, task)
  elif not task.startswith("digits"):
    common.image_recipe(c)
  return c
