"""Pixel Transformer (Nguyen et al. 2024, arXiv 2406.09415): a Vision Transformer whose tokens are single pixels.

Positions are learned from a random start, so nothing tells the model that pixels lie in a plane. Widths and depths are
those of ViT-Ti, S and B. Not to be taken for the Pooling-based Vision Transformer, which has the same short name.
"""

from lra_jax.models import vit

PIT = {
  **{f"pit_{size}": dict(patch_size=1, **sizes) for size, sizes in vit.SIZES.items()},
  # Ours, for 8 px. Positions as large as the tokens are learned from in a tenth of the steps.
  "pit_digits": dict(patch_size=1, width=64, depth=2, heads=4, pool="mean", position_std=0.5),
}
