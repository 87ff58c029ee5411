"""ConvMixer (Trockman & Kolter 2022).

  python -m lra_jax.main --config configs/convmixer.py:digits
  python -m lra_jax.main --config configs/convmixer.py                             CIFAR-10; 256/8, kernel 5, patch 2
  python -m lra_jax.main --config configs/convmixer.py --config.model.kernel_size=9 --config.model.patch_size=1
  python -m lra_jax.main --config configs/convmixer.py:imagenet2012                768/32; 256/12 for :imagenette …
  python -m lra_jax.main --config configs/convmixer.py:imagenette,recipe=patches   256/12, 30 epochs of one-cycle
  python -m lra_jax.main --config configs/convmixer.py:pathfinder_image            Pathfinder's pictures as pictures

Recipe of locuslab/convmixer-cifar10 (over 94 % in 100 epochs): AdamW with rate 0.05 in a triangle (0 to its peak at
2/5, a twentieth of it at 4/5, 0 at the end), decay 0.005, batch 512, clipping at 1, random resized crop of scale 0.75
to 1, flip, random erasing 0.2. Its RandAugment and colour jitter are left out here. Large pictures get
`configs.common.imagenet_recipe`. `recipe=patches` (`configs.common.patches_recipe`) is there for ViT and ResNet too:

  python -m lra_jax.sweep --out runs/patches --task imagenette,recipe=patches \\
      configs/convmixer.py configs/vit.py configs/resnet.py
"""

from configs import common

VARIANTS = {name: f"convmixer_{name}" for name in ("256_8", "256_12", "768_32", "1024_20", "1536_20", "digits")}
PRESETS = {
  **{key: {"variant": "256_12"} for key in common.LARGE_IMAGE_TASKS},
  "tiny_imagenet": {"variant": "256_12", "patch_size": 4},
  "imagenet2012": {"variant": "768_32"},
}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, kernel_size=int, activation=str, drop_path=float)
  c, task, recipe = common.start(
    argument, (*common.IMAGE_TASKS, common.WHOLE), VARIANTS, digits="digits", per_task=PRESETS, recipes=("patches",),
    **fields,
  )  # fmt: skip
  c.model.implementation = common.optional(str)  # of the depthwise convolution; None for the best that can serve
  if recipe:
    common.patches_recipe(c)
    c.model.update(width=256, depth=12, kernel_size=7, patch_size=7)
  elif common.is_large(task):
    common.imagenet_recipe(c)
  elif not task.startswith("digits"):
    c.train.batch_size = 512
    c.train.epochs = 100.0
    c.augment.flip = common.flips(task)
    c.augment.flip_vertical = task == common.WHOLE
    if task != common.WHOLE:
      c.augment.crop_scale = (0.75, 1.0)
      c.augment.crop_ratio = (1.0, 1.0)
      c.augment.erase_probability = 0.2
    c.optim.learning_rate = 0.05
    c.optim.weight_decay = 0.005
    c.optim.schedule.name = "linear"
    c.optim.schedule.shares = (0.0, 0.4, 0.8, 1.0)
    c.optim.schedule.factors = (0.0, 1.0, 0.05, 0.0)
  return c
