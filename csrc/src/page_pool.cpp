// SPDX-License-Identifier: Apache-2.0
#include "kvcached/page_pool.h"

#include <limits>
#include <utility>

namespace kvc {

PagePool::PagePool(Backend& backend, std::size_t page_bytes, std::size_t max_ready_bytes,
                   OnChange on_change)
    : backend_(backend),
      page_bytes_(page_bytes),
      max_ready_(page_bytes > 0 ? max_ready_bytes / page_bytes : 0),
      on_change_(std::move(on_change)) {}

PagePool::~PagePool() {
  std::size_t freed = 0;
  constexpr auto everything = std::numeric_limits<std::size_t>::max();
  // A second try for what the backend refused; beyond that only the driver can clean up.
  if (!trim(everything, &freed).ok()) (void)trim(everything, &freed);
}

void PagePool::change(std::int64_t delta) {
  held_bytes_ += static_cast<std::size_t>(delta);  // wraps around for a fall, as unsigned may
  if (on_change_) on_change_(delta);
}

Status PagePool::acquire(Page* page, bool* recycled) {
  {
    std::lock_guard lock(mutex_);
    if (!ready_.empty()) {
      *page = ready_.back().page;
      ready_.pop_back();
      *recycled = true;
      return {};
    }
  }
  const auto bytes = static_cast<std::int64_t>(page_bytes_);
  change(bytes);
  Status status = backend_.create(page_bytes_, page);
  if (!status.ok()) {
    change(-bytes);
    return status;
  }
  ++creates_;
  *recycled = false;
  return {};
}

void PagePool::recycle(Page page) {
  {
    std::lock_guard lock(mutex_);
    ready_.push_back({page, Clock::now()});
  }
  std::size_t freed = 0;
  (void)shrink([this](const Ready&) { return ready_.size() > max_ready_; }, &freed);
}

Status PagePool::trim(std::size_t bytes, std::size_t* freed) {
  *freed = 0;
  return shrink([bytes, freed](const Ready&) { return *freed < bytes; }, freed);
}

Status PagePool::trim_idle(std::chrono::nanoseconds older_than, std::size_t* freed) {
  *freed = 0;
  const auto now = Clock::now();
  return shrink([&](const Ready& oldest) { return now - oldest.since > older_than; }, freed);
}

template <typename More>
Status PagePool::shrink(More more, std::size_t* freed) {
  for (;;) {
    Ready victim;
    {
      std::lock_guard lock(mutex_);
      if (ready_.empty() || !more(ready_.front())) return {};
      victim = ready_.front();
      ready_.pop_front();
    }
    // Without the lock: a commit on another thread need not wait for the driver to free.
    if (Status status = backend_.destroy(victim.page); !status.ok()) {
      std::lock_guard lock(mutex_);
      ready_.push_front(victim);
      return status;
    }
    ++destroys_;
    change(-static_cast<std::int64_t>(page_bytes_));
    *freed += page_bytes_;
  }
}

std::size_t PagePool::ready_bytes() const {
  std::lock_guard lock(mutex_);
  return ready_.size() * page_bytes_;
}

}  // namespace kvc
