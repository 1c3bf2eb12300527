"""Quantisation-aware training and post-training quantisation in JAX."""
