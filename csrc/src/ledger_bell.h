// SPDX-License-Identifier: Apache-2.0
// Wakes the processes of a member: a word in its slot that counts, and a futex on it.
#pragma once

#include <atomic>
#include <cstdint>

namespace kvc::ledger {

void ring(std::atomic<uint32_t>& bell);
// Returns once the bell is not `seen`, at the deadline (of the monotonic clock), or for no reason.
void wait_for_ring(std::atomic<uint32_t>& bell, uint32_t seen, int64_t deadline_ns);

}  // namespace kvc::ledger
