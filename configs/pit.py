"""Pixel Transformer (Nguyen et al. 2024): a Vision Transformer on single pixels.

  python -m lra_jax.main --config configs/pit.py:digits
  python -m lra_jax.main --config configs/pit.py --config.model.dtype=bfloat16 --config.model.remat     CIFAR-10
  python -m lra_jax.main --config configs/pit.py:tiny_imagenet            at 32 × 32 pixels; also :imagenette …
  python -m lra_jax.main --config configs/pit.py:listops                  and the rest of the Long Range Arena

The paper's recipe for CIFAR-100 (85.1 with Ti) we could not read; all recipes are ours, those of configs/vit.py. Large
pictures are brought to 32 × 32 pixels, as the paper trains on small ones: 1,024 tokens.
"""

from configs import common, vit

VARIANTS = {name: f"pit_{name}" for name in ("ti", "s", "b", "digits")}


def get_config(argument: str | None = None):
  c = vit.build(argument, VARIANTS, {})
  common.as_pixels(c)
  if c.task.name.startswith("digits"):
    c.augment.crop_pad = 0  # shifts by whole tokens are too much for so few examples: 75 % with them
    c.optim.learning_rate = 1.5e-3
    c.optim.b2 = 0.98
  return c
