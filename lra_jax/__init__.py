"""lra_jax: recurrent, Fourier, attention, MLP and convolutional models on the same image and long-sequence tasks."""

__version__ = "0.1.0"
