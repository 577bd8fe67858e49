// SPDX-License-Identifier: Apache-2.0
#include "ledger_bell.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

#include "ledger_format.h"

namespace kvc::ledger {

// The shared kind of futex throughout: it is found by file and offset, so processes that map the
// file at other addresses, in other containers too, meet on it.
void ring(std::atomic<uint32_t>& bell) {
  bell.fetch_add(1);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void wait_for_ring(std::atomic<uint32_t>& bell, uint32_t seen, int64_t deadline_ns) {
  const int64_t left = deadline_ns - monotonic_ns();
  if (left <= 0) return;
  timespec timeout = {};
  timeout.tv_sec = left / 1'000'000'000;
  timeout.tv_nsec = left % 1'000'000'000;
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

}  // namespace kvc::ledger
