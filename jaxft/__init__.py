"""jaxft: fine-tune GPT-2 in JAX, and get a Hugging Face model back."""

__version__ = "0.1.0"
