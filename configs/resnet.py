"""ResNet-18 (He et al. 2016), with the CIFAR stem of kuangliu/pytorch-cifar or the ImageNet stem.

  python -m lra_jax.main --config configs/resnet.py:digits
  python -m lra_jax.main --config configs/resnet.py                                CIFAR-10; about 95 % is published

Recipe of kuangliu/pytorch-cifar: SGD 0.1 with momentum 0.9, decay 5e-4, cosine over 200 epochs, batch 128, crops
padded by 4, flip. Decay spares biases and norms here; there it does not.
"""

from configs import common

VARIANTS = {"18_cifar": "resnet18_cifar", "18": "resnet18", "digits": "resnet_digits"}


def get_config(argument: str | None = None):
  c, task = common.start(
    argument, common.IMAGE_TASKS, VARIANTS, digits="digits", depths=tuple, widths=tuple, drop_path=float
  )
  c.model.implementation = common.optional(str)  # of the convolutions; None for the best that can serve
  if task == "cifar10":
    c.train.batch_size = 128
    c.train.epochs = 200.0
    c.augment.crop_pad = 4
    c.augment.flip = True
    c.optim.name = "sgd"
    c.optim.learning_rate = 0.1
    c.optim.weight_decay = 5e-4
    c.optim.momentum = 0.9
    c.optim.nesterov = False
    c.optim.clip_norm = 0.0
    c.optim.schedule.final_rate = 0.0
  return c
