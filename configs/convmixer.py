"""ConvMixer (Trockman & Kolter 2022).

  python -m lra_jax.main --config configs/convmixer.py:digits
  python -m lra_jax.main --config configs/convmixer.py                             CIFAR-10; 256/8, kernel 5, patch 2
  python -m lra_jax.main --config configs/convmixer.py --config.model.kernel_size=9 --config.model.patch_size=1

Recipe of locuslab/convmixer-cifar10 (over 94 % in 100 epochs): AdamW with rate 0.05 in a triangle (0 to its peak at
2/5, a twentieth of it at 4/5, 0 at the end), decay 0.005, batch 512, clipping at 1, random resized crop of scale 0.75
to 1, flip, random erasing 0.2. Its RandAugment and colour jitter are missing here.
"""

from configs import common

VARIANTS = {name: f"convmixer_{name}" for name in ("256_8", "256_12", "768_32", "1024_20", "1536_20", "digits")}


def get_config(argument: str | None = None):
  fields = dict(patch_size=int, width=int, depth=int, kernel_size=int, activation=str, drop_path=float)
  c, task = common.start(argument, common.IMAGE_TASKS, VARIANTS, digits="digits", **fields)
  c.model.implementation = common.optional(str)  # of the depthwise convolution; None for the best that can serve
  if task == "cifar10":
    c.train.batch_size = 512
    c.train.epochs = 100.0
    c.augment.crop_scale = (0.75, 1.0)
    c.augment.crop_ratio = (1.0, 1.0)
    c.augment.flip = True
    c.augment.erase_probability = 0.2
    c.optim.learning_rate = 0.05
    c.optim.weight_decay = 0.005
    c.optim.schedule.name = "linear"
    c.optim.schedule.shares = (0.0, 0.4, 0.8, 1.0)
    c.optim.schedule.factors = (0.0, 1.0, 0.05, 0.0)
  return c
