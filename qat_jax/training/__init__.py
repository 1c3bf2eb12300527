"""Training: state, step, schedule, loop, checkpoint and sharding.

Small functions that a main composes. The room knows nothing of quantisation: it trains any
`flax.nnx.Module` that maps images to logits.
"""
