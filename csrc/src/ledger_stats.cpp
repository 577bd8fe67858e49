// SPDX-License-Identifier: Apache-2.0
// What members count, time, and wait for, without the critical section.
#include <algorithm>
#include <mutex>

#include "kvcached/ledger.h"
#include "ledger_bell.h"
#include "ledger_file.h"

namespace kvc {

using namespace ledger;

Status Member::count(Counter counter, uint64_t n) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  file_->slot(index_).counters[static_cast<int>(counter)].fetch_add(n);
  return {};
}

Status Member::time(Timed kind, double seconds) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  const double took = seconds > 0 ? std::min(seconds, 1e6) : 0;  // 0 for what is no number, too
  int bucket = 0;
  while (bucket < kBuckets - 1 && took > Histogram::bound(bucket)) ++bucket;
  auto& histogram = file_->slot(index_).times[static_cast<int>(kind)];
  histogram.sum_ns.fetch_add(static_cast<uint64_t>(took * 1e9));
  histogram.counts[bucket].fetch_add(1);
  return {};
}

Status Member::bell(uint32_t& out) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  out = file_->slot(index_).bell.load();
  return {};
}

Status Member::wait_bell(uint32_t seen, int64_t timeout_ms, uint32_t& out) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  std::atomic<uint32_t>& bell = file_->slot(index_).bell;
  constexpr int64_t kLongest = 86'400'000;
  const int64_t deadline =
      monotonic_ns() + std::clamp<int64_t>(timeout_ms, 0, kLongest) * 1'000'000;
  while ((out = bell.load()) == seen && monotonic_ns() < deadline) {
    wait.begin();
    wait_for_ring(bell, seen, deadline);
    // leave() says so first and rings then, and waits for us to let go of the slot.
    if (Status status = check_usable(); !status.ok()) return status;
  }
  return {};
}

}  // namespace kvc
