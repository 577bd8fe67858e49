// SPDX-License-Identifier: Apache-2.0
#include "kvcached/arena.h"

#include <algorithm>
#include <string>

namespace kvc {
namespace {

Status invalid(std::string what) { return Status::error(Code::invalid_argument, std::move(what)); }

}  // namespace

Status Arena::open(Backend& backend, PagePool& pool, const Geometry& geometry,
                   const ArenaOptions& options, std::unique_ptr<Arena>* arena) {
  if (Status status = geometry.validate(); !status.ok()) return status;
  const auto page_bytes = static_cast<std::size_t>(geometry.page_bytes);
  if (page_bytes != pool.page_bytes()) return invalid("arena: the pool has pages of another size");
  if (page_bytes % backend.granularity() != 0) {
    return invalid("arena: pages must be a multiple of " + std::to_string(backend.granularity()) +
                   " bytes on " + backend.device_key());
  }
  std::unique_ptr<Arena> opened(new Arena(backend, pool, geometry, options));
  Status status = backend.reserve(opened->reserved_bytes_, &opened->base_);
  if (!status.ok()) return status;
  constexpr BlockRange null_block{0, 1};
  status = opened->commit({&null_block, 1});
  if (status.ok()) *arena = std::move(opened);
  return status;
}

Arena::Arena(Backend& backend, PagePool& pool, const Geometry& geometry,
             const ArenaOptions& options)
    : backend_(backend),
      pool_(pool),
      options_(options),
      pages_per_segment_(geometry.pages_per_segment()),
      segment_stride_(static_cast<std::size_t>(pages_per_segment_ * geometry.page_bytes)),
      reserved_bytes_(segment_stride_ * static_cast<std::size_t>(geometry.segments)),
      pages_(geometry),
      committed_(static_cast<std::size_t>(geometry.num_blocks)),
      slots_(static_cast<std::size_t>(pages_per_segment_ * geometry.segments)) {}

Arena::~Arena() {
  // A second try for what the driver refused. Pages that are mapped even then stay counted as
  // held: the memory is gone until the process ends.
  if (!close().ok()) (void)close();
}

Status Arena::commit(std::span<const BlockRange> ranges, std::size_t* freed) {
  const Change change(*this);
  if (freed != nullptr) *freed = 0;
  retry_stuck();
  const std::size_t held = pool_.held_bytes();
  const std::int64_t pages = pages_.committed_pages();
  Status status = mark(ranges, true);
  if (!status.ok()) return status;
  std::vector<PageRun> fresh;
  for (const BlockRange& range : ranges) pages_.add(range, fresh);
  const std::vector<SlotRun> runs = slots_of(fresh);
  for (const SlotRun run : runs) {
    if (status = fill(run); !status.ok()) break;
  }
  if (status.ok()) {
    if (freed != nullptr) {
      const std::int64_t wanted = (pages_.committed_pages() - pages) * geometry().unit_bytes();
      *freed = static_cast<std::size_t>(wanted) - (pool_.held_bytes() - held);
    }
    return status;
  }

  std::vector<PageRun> emptied;
  for (const BlockRange& range : ranges) pages_.remove(range, emptied);
  (void)mark(ranges, false);
  for (const SlotRun run : runs) {
    (void)unmap(run);
    recycle_unmapped(run);
    note_stuck(run);
  }
  return status;
}

Status Arena::decommit(std::span<const BlockRange> ranges, std::size_t* freed) {
  const Change change(*this);
  if (freed != nullptr) *freed = 0;
  retry_stuck();
  const std::size_t held = pool_.held_bytes();
  for (const BlockRange& range : ranges) {
    if (range.begin == 0) return invalid("decommit: block 0 stays committed");
  }
  Status status = mark(ranges, false);
  if (!status.ok()) return status;
  std::vector<PageRun> emptied;
  for (const BlockRange& range : ranges) pages_.remove(range, emptied);
  const std::vector<SlotRun> runs = slots_of(emptied);
  for (const SlotRun run : runs) {
    if (status = unmap(run); !status.ok()) break;
  }
  if (status.ok()) {
    for (const SlotRun run : runs) recycle_unmapped(run);
    if (freed != nullptr) *freed = held - pool_.held_bytes();
    return status;
  }

  // The pages are still ours, content and all: put back those that were unmapped before.
  std::vector<PageRun> fresh;
  for (const BlockRange& range : ranges) pages_.add(range, fresh);
  (void)mark(ranges, true);
  for (const SlotRun run : runs) {
    if (Status again = remap(run); !again.ok()) {
      status.code = Code::lost;
      status.what += "; a page unmapped before that could not be mapped again (" + again.what +
                     "), so blocks on it fault until a later call repairs it";
    }
    note_stuck(run);
  }
  return status;
}

Status Arena::close() {
  const Change change(*this);
  if (base_ == 0) return {};
  closed_ = true;
  std::vector<PageRun> emptied;
  for (std::size_t block = 0; block < committed_.size(); ++block) {
    if (!committed_[block]) continue;
    const auto id = static_cast<std::int64_t>(block);
    pages_.remove({id, id + 1}, emptied);
    committed_[block] = false;
  }
  stuck_.clear();  // everything goes
  const SlotRun all{0, static_cast<std::int64_t>(slots_.size())};
  Status status = unmap(all);
  recycle_unmapped(all);
  note_stuck(all);
  if (!status.ok()) return status;
  status = backend_.release_range(base_, reserved_bytes_);
  if (status.ok()) base_ = 0;
  return status;
}

Status Arena::mark(std::span<const BlockRange> ranges, bool committed) {
  if (closed_) return invalid("the arena is closed");
  for (const BlockRange& range : ranges) {
    if (range.begin < 0 || range.begin >= range.end || range.end > geometry().num_blocks) {
      return invalid("blocks [" + std::to_string(range.begin) + ", " + std::to_string(range.end) +
                     ") are not a range of this arena, which has " +
                     std::to_string(geometry().num_blocks));
    }
  }
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    for (std::int64_t block = ranges[i].begin; block < ranges[i].end; ++block) {
      if (committed_[block] != committed) {
        committed_[block] = committed;
        continue;
      }
      for (std::size_t j = 0; j <= i; ++j) {
        const std::int64_t end = j == i ? block : ranges[j].end;
        for (std::int64_t done = ranges[j].begin; done < end; ++done) committed_[done] = !committed;
      }
      return invalid("block " + std::to_string(block) + " is " +
                     (committed ? "committed already" : "not committed") + ", or named twice");
    }
  }
  return {};
}

std::vector<Arena::SlotRun> Arena::slots_of(const std::vector<PageRun>& pages) const {
  std::vector<SlotRun> runs;
  runs.reserve(pages.size() * static_cast<std::size_t>(geometry().segments));
  for (std::int64_t segment = 0; segment < geometry().segments; ++segment) {
    const std::int64_t first = segment * pages_per_segment_;
    for (const PageRun& run : pages) runs.push_back({first + run.begin, first + run.end});
  }
  return runs;
}

Address Arena::address(std::int64_t slot) const {
  return base_ + static_cast<Address>(slot * geometry().page_bytes);
}

std::size_t Arena::bytes(SlotRun run) const {
  return static_cast<std::size_t>((run.end - run.begin) * geometry().page_bytes);
}

std::size_t Arena::committed_bytes() const {
  return static_cast<std::size_t>(committed_pages_.load() * geometry().unit_bytes());
}

std::size_t Arena::stuck_bytes() const {
  std::lock_guard lock(mutex_);
  const auto stuck = std::count_if(stuck_.begin(), stuck_.end(),
                                   [this](std::int64_t slot) { return !intact(slot); });
  return static_cast<std::size_t>(stuck * geometry().page_bytes);
}

bool Arena::is_committed(std::int64_t block) const {
  std::lock_guard lock(mutex_);
  return block >= 0 && block < geometry().num_blocks && committed_[block];
}

ArenaCalls Arena::calls() const {
  std::lock_guard lock(mutex_);
  return calls_;
}

}  // namespace kvc
