"""ResNet-18 (He et al. 2016), with the CIFAR stem of kuangliu/pytorch-cifar or the ImageNet stem.

  python -m lra_jax.main --config configs/resnet.py:digits
  python -m lra_jax.main --config configs/resnet.py                                CIFAR-10; about 95 % is published
  python -m lra_jax.main --config configs/resnet.py:imagenet2012                   also :imagenette, :folder:PATH …
  python -m lra_jax.main --config configs/resnet.py:imagenette,recipe=patches      narrowed to 1.1 M, 30 epochs
  python -m lra_jax.main --config configs/resnet.py:pathfinder_image               Pathfinder's pictures as pictures

Recipe of kuangliu/pytorch-cifar: SGD 0.1 with momentum 0.9, decay 5e-4, cosine over 200 epochs, batch 128, crops
padded by 4, flip. Decay spares biases and norms here; there it does not. Large pictures get
`configs.common.imagenet_recipe`; `recipe=patches` is `configs.common.patches_recipe`.
"""

from configs import common

VARIANTS = {"18_cifar": "resnet18_cifar", "18": "resnet18", "digits": "resnet_digits"}
TASKS = (*common.IMAGE_TASKS, common.WHOLE)
PRESETS = {key: {"variant": "18"} for key in common.LARGE_IMAGE_TASKS if key != "tiny_imagenet"}


def get_config(argument: str | None = None):
  c, task, recipe = common.start(
    argument, TASKS, VARIANTS, digits="digits", per_task=PRESETS, recipes=("patches",), depths=tuple,
    widths=tuple, drop_path=float,
  )  # fmt: skip
  c.model.implementation = common.optional(str)  # of the convolutions; None for the best that can serve
  if recipe:
    common.patches_recipe(c)
    c.model.update(name="resnet18", widths=(20, 40, 80, 160))
  elif common.is_large(task):
    common.imagenet_recipe(c)
  elif not task.startswith("digits"):
    c.train.batch_size = 128
    c.train.epochs = 200.0
    c.augment.crop_pad = 0 if task == common.WHOLE else 4
    c.augment.flip = common.flips(task)
    c.augment.flip_vertical = task == common.WHOLE
    c.optim.name = "sgd"
    c.optim.learning_rate = 0.1
    c.optim.weight_decay = 5e-4
    c.optim.momentum = 0.9
    c.optim.nesterov = False
    c.optim.clip_norm = 0.0
    c.optim.schedule.final_rate = 0.0
  return c
