"""Training: state, step, schedule, loop, checkpoint and sharding.

Small functions that a main composes. The room knows nothing of quantisation: it trains any
`flax.nnx.Module` whose loss an `Objective` knows.
"""

import importlib.util

if importlib.util.find_spec("tensorboardX") is None:
    raise ModuleNotFoundError(
        "training needs tensorboardX and others: pip install 'qat_jax[experiments]'"
    )
