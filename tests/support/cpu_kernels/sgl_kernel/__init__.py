# SPDX-License-Identifier: Apache-2.0
"""Names of kernels that SGLang imports on a CPU for every recurrent model, though none is called.

No release of `sgl_kernel` has them but as a build of one's own. What is called nevertheless fails.
"""

import torch

_NAMES = ("fused_gdn_gating_cpu", "fused_sigmoid_gating_delta_rule_update_cpu")

library = torch.library.Library("sgl_kernel", "DEF")
for _name in _NAMES:
    library.define(f"{_name}(Tensor x) -> Tensor")
