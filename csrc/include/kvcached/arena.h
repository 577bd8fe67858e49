// SPDX-License-Identifier: Apache-2.0
// A reserved range of addresses that holds blocks, backed by physical pages where they live.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "kvcached/geometry.h"
#include "kvcached/page_pool.h"
#include "kvcached/vmm.h"

namespace kvc {

struct ArenaOptions {
  // Zero recycled pages, for when they may come from blocks of another type.
  bool zero_recycled = false;
};

// How often the driver was called.
struct ArenaCalls {
  std::uint64_t map = 0;
  std::uint64_t set_access = 0;
  std::uint64_t unmap = 0;
  std::uint64_t zero = 0;
};

// Thread-safe. commit and decommit are all-or-nothing: one that fails leaves blocks, contents and
// physical bytes as they were. Should the driver refuse while that is being put right, the pages
// concerned are remembered as stuck, counted as held, and every later call, close and destruction
// try again.
//
// Block 0 is committed from the start and stays so: engines point unused table entries at it.
class Arena {
 public:
  static Status open(Backend& backend, PagePool& pool, const Geometry& geometry,
                     const ArenaOptions& options, std::unique_ptr<Arena>* arena);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Ranges must be disjoint and hold no committed block (commit), or only committed ones
  // (decommit); otherwise the call is invalid and changes nothing.
  //
  // `freed`, if given, is set to the bytes promised for these blocks that are not held any more: on
  // decommit what went back to the device, on commit what ready pages spared. It is zero if the
  // call fails, and exact while this arena is the only user of its pool.
  Status commit(std::span<const BlockRange> ranges, std::size_t* freed = nullptr);
  Status decommit(std::span<const BlockRange> ranges, std::size_t* freed = nullptr);

  // Gives everything up. May be called again if it failed; nothing else works after it.
  Status close();

  const Geometry& geometry() const { return pages_.geometry(); }
  Backend& backend() const { return backend_; }
  Address base() const { return base_; }
  std::size_t segment_stride() const { return segment_stride_; }
  std::size_t reserved_bytes() const { return reserved_bytes_; }
  std::size_t committed_bytes() const;  // after the last call that is done; waits for none
  std::size_t stuck_bytes() const;
  bool is_committed(std::int64_t block) const;
  ArenaCalls calls() const;

 private:
  // Where one page goes: index page + segment * pages_per_segment, so that pages that are
  // neighbours in memory are neighbours here.
  struct Slot {
    Page page;
    bool mapped = false;      // the page is mapped here
    bool accessible = false;  // and set_access was done
  };
  struct SlotRun {
    std::int64_t begin = 0;
    std::int64_t end = 0;
  };

  Arena(Backend& backend, PagePool& pool, const Geometry& geometry, const ArenaOptions& options);

  // Marks the blocks; one that is marked so already makes the call invalid, with nothing marked.
  Status mark(std::span<const BlockRange> ranges, bool committed);
  std::vector<SlotRun> slots_of(const std::vector<PageRun>& pages) const;
  Address address(std::int64_t slot) const;
  std::size_t bytes(SlotRun run) const;
  // Whether a slot is as the blocks on its page want it.
  bool intact(std::int64_t slot) const;

  // Each of these leaves the slots saying what is true, whether it succeeds or not.
  Status fill(SlotRun run);
  Status zero(SlotRun run, const std::vector<bool>& recycled);
  Status map(std::int64_t slot);
  Status remap(SlotRun run);
  Status grant_access(SlotRun run);
  Status unmap(SlotRun run);
  void recycle_unmapped(SlotRun run);
  void note_stuck(SlotRun run);
  void retry_stuck();

  Backend& backend_;
  PagePool& pool_;
  const ArenaOptions options_;
  const std::int64_t pages_per_segment_;
  const std::size_t segment_stride_;
  const std::size_t reserved_bytes_;
  Address base_ = 0;

  // The lock, and at its end the count for those who do not take it.
  class Change {
   public:
    explicit Change(Arena& arena) : arena_(arena), lock_(arena.mutex_) {}
    ~Change() { arena_.committed_pages_ = arena_.pages_.committed_pages(); }
    Change(const Change&) = delete;
    Change& operator=(const Change&) = delete;

   private:
    Arena& arena_;
    std::lock_guard<std::mutex> lock_;
  };

  mutable std::mutex mutex_;
  PageMap pages_;
  std::atomic<std::int64_t> committed_pages_{0};  // of pages_, for readers without the lock
  std::vector<bool> committed_;                   // by block
  std::vector<Slot> slots_;
  std::vector<std::int64_t> stuck_;  // slots that may not be intact
  bool closed_ = false;
  ArenaCalls calls_;
};

}  // namespace kvc
