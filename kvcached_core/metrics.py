# SPDX-License-Identifier: Apache-2.0
"""The series an engine adds to its own metrics endpoint."""

from __future__ import annotations

GAUGES = {
    "capacity_bytes": "Bytes of the ledgers this engine is a member of.",
    "available_bytes": "Bytes any member of these ledgers could lease now.",
    "leased_bytes": "Bytes the ledgers have promised to this engine.",
    "committed_bytes": "Bytes of physical memory behind this engine's KV cache.",
    "parked_bytes": "Committed bytes with no live block on them, reusable at once.",
    "cached_bytes": "Bytes of unreferenced prefix-cache blocks.",
    "committed_pages": "Page indices committed since start, over all ranks' shapes.",
    "decommitted_pages": "Page indices decommitted since start, likewise.",
    "reclaim_steps": "Steps since start in which other members' demand was answered.",
    "shortages": "Allocations since start that were put off for want of memory.",
}
"""Name (after ``vllm:kvcached_``) to help text; keys of ``ElasticScheduler.stats``."""
