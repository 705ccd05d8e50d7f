"""These tests run kernels through Triton's interpreter, which is chosen when Triton is first imported: they need a
process of their own with TRITON_INTERPRET=1, which scripts/test starts. Elsewhere they are not collected.

The interpreter multiplies tiles with NumPy, whose BLAS gives a row other bits in another place of a tile on some
processors. Here a product is a chain over k, ascending, from zero, as a tensor core's: elementwise, so a row's bits are
its own.
"""

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self: Any, a: Any, b: Any, d: Any, *precision: Any) -> Any:
        x, y = (operand.data.astype(d.data.dtype) for operand in (a, b))
        total = np.zeros_like(d.data)
        for k in range(x.shape[-1]):
            total += x[..., :, k, None] * y[..., k, None, :]
        return TensorHandle(total + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot  # type: ignore[method-assign]
