// SPDX-License-Identifier: Apache-2.0
// Where arenas get their pages: new ones from the backend, or recycled ones kept ready.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

#include "kvcached/vmm.h"

namespace kvc {

// All pages of a pool have one size. Thread-safe.
//
// A page that the backend refuses to destroy stays ready, above the limit if need be: it can still
// be used, is still counted, and is tried again by every later recycle or trim and at the end.
class PagePool {
 public:
  // Told of every change to held_bytes(): a rise before the backend is asked, a fall after it has
  // complied, so that an account kept from it never shows less than is held.
  using OnChange = std::function<void(std::int64_t delta)>;

  PagePool(Backend& backend, std::size_t page_bytes, std::size_t max_ready_bytes,
           OnChange on_change = {});
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;
  ~PagePool();

  // `recycled` tells a page with old content from a new one, which reads as zero.
  Status acquire(Page* page, bool* recycled);
  void recycle(Page page);

  // Destroys ready pages, the longest idle first, until `bytes` are freed or none is left.
  Status trim(std::size_t bytes, std::size_t* freed);
  // Destroys those that have been ready for longer.
  Status trim_idle(std::chrono::nanoseconds older_than, std::size_t* freed);

  std::size_t page_bytes() const { return page_bytes_; }
  std::size_t ready_bytes() const;
  // Of all pages that exist, ready or handed out.
  std::size_t held_bytes() const { return held_bytes_; }
  std::uint64_t creates() const { return creates_; }
  std::uint64_t destroys() const { return destroys_; }

 private:
  using Clock = std::chrono::steady_clock;
  struct Ready {
    Page page;
    Clock::time_point since;
  };

  void change(std::int64_t delta);
  // Destroys from the idle end for as long as `more(oldest)` says so.
  template <typename More>
  Status shrink(More more, std::size_t* freed);

  Backend& backend_;
  const std::size_t page_bytes_;
  const std::size_t max_ready_;  // in pages
  const OnChange on_change_;
  std::atomic<std::size_t> held_bytes_{0};
  std::atomic<std::uint64_t> creates_{0};
  std::atomic<std::uint64_t> destroys_{0};

  mutable std::mutex mutex_;
  std::deque<Ready> ready_;  // longest idle at the front, taken from the back
};

}  // namespace kvc
