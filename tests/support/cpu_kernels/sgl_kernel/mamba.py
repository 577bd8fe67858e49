# SPDX-License-Identifier: Apache-2.0
"""As the package: there to be imported."""

from typing import Any


def _missing(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("a kernel for CPUs that are not there")


causal_conv1d_fn_cpu = causal_conv1d_update_cpu = chunk_gated_delta_rule_cpu = _missing
