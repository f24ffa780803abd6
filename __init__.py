"""unimoe: multimodal Mixture-of-Experts models of your own, native to Hugging Face transformers."""

__version__ = "0.1.0"
