// SPDX-License-Identifier: Apache-2.0
#include "kvcached/block_allocator.h"

#include <algorithm>
#include <string>
#include <utility>

namespace kvc {
namespace {

Status invalid(std::string what) { return Status::error(Code::invalid_argument, std::move(what)); }

Status not_negative(int64_t value, const char* name) {
  if (value >= 0) return {};
  return invalid(std::string(name) + " must not be negative, not " + std::to_string(value));
}

// No page can be home to more blocks than this.
int64_t max_homed(const Geometry& g) {
  return std::min(g.num_blocks, (g.page_bytes - 1) / g.block_bytes + 1);
}

void append(std::vector<BlockRange>& ranges, int64_t block) {
  if (!ranges.empty() && ranges.back().end == block) {
    ++ranges.back().end;
  } else {
    ranges.push_back({block, block + 1});
  }
}

// Sorts blocks and writes them as ranges.
std::vector<BlockRange> to_ranges(std::vector<int64_t> blocks) {
  std::sort(blocks.begin(), blocks.end());
  std::vector<BlockRange> ranges;
  for (const int64_t block : blocks) append(ranges, block);
  return ranges;
}

}  // namespace

int64_t Growth::num_blocks() const {
  int64_t total = 0;
  for (const BlockRange& range : ranges) total += range.size();
  return total;
}

Status BlockAllocator::create(int64_t num_blocks, std::vector<Geometry> geometries,
                              std::unique_ptr<BlockAllocator>& out) {
  if (geometries.empty()) return invalid("block allocator: give at least one geometry");
  for (const Geometry& g : geometries) {
    if (Status status = g.validate(); !status.ok()) return status;
    if (g.num_blocks != num_blocks) {
      return invalid("block allocator: a geometry has " + std::to_string(g.num_blocks) +
                     " blocks, the allocator " + std::to_string(num_blocks) +
                     "; all ranks must have the same number");
    }
    if (g.block_bytes * g.segments > geometries[0].block_bytes * geometries[0].segments) {
      return invalid("block allocator: put the geometry with the largest blocks first");
    }
  }
  out.reset(new BlockAllocator(num_blocks, geometries));
  return {};
}

BlockAllocator::BlockAllocator(int64_t num_blocks, const std::vector<Geometry>& geometries)
    : maps_(geometries.begin(), geometries.end()),
      state_(num_blocks, State::uncommitted),
      pages_(geometries[0].pages_per_segment()),
      clean_(num_blocks, geometries[0].pages_per_segment()),
      buckets_(geometries[0].pages_per_segment(), max_homed(geometries[0]) + 1),
      used_buckets_(max_homed(geometries[0]) + 1),
      uncommitted_(num_blocks),
      parked_(geometries[0].pages_per_segment()) {
  for (int64_t block = 0; block < num_blocks; ++block) uncommitted_.set(block);
  std::vector<int64_t> page_delta(maps_.size(), 0);
  commit({0, 1}, page_delta);
  std::vector<int32_t> null_block;
  (void)allocate(1, null_block);
}

// -- growing and shrinking ------------------------------------------------------------------------

// Whether all pages of an uncommitted block are committed, given that a plan commits the pages up
// to `reach`. Only the first and the last page of a block can be shared with others, so this ends
// after two pages for any block that is uncommitted.
bool BlockAllocator::costs_nothing(int64_t block, int64_t reach) const {
  const int64_t last = geometry().last_page(block);
  for (int64_t page = std::max(geometry().first_page(block), reach + 1); page <= last; ++page) {
    if (!maps_[0].committed(page)) return false;
  }
  return true;
}

// Blocks that cost nothing are either the lowest uncommitted ones (the rest of the null block's
// page, before the first grow) or right behind a block this plan took: every grow takes them all,
// undo restores what was before a grow, and shrink leaves none. So one walk up finds them.
std::vector<BlockRange> BlockAllocator::plan(int64_t n) const {
  std::vector<BlockRange> ranges;
  int64_t taken = 0;
  int64_t reach = -1;  // the last page that the blocks taken so far commit
  for (int64_t block = uncommitted_.first(); block != BitTree::kNone;
       block = uncommitted_.next(block + 1)) {
    if (!costs_nothing(block, reach)) {
      if (taken >= n) break;
      reach = geometry().last_page(block);
    }
    append(ranges, block);
    ++taken;
  }
  return ranges;
}

Status BlockAllocator::grow(int64_t n, Growth& out) {
  if (Status status = not_negative(n, "grow: n"); !status.ok()) return status;
  out = Growth{plan(n), std::vector<int64_t>(maps_.size(), 0), ++last_serial_, undoable_};
  undoable_ = out.serial;
  for (const BlockRange& range : out.ranges) commit(range, out.page_delta);
  return {};
}

Status BlockAllocator::cost(int64_t n, std::vector<int64_t>& page_delta) const {
  if (Status status = not_negative(n, "cost: n"); !status.ok()) return status;
  const std::vector<BlockRange> ranges = plan(n);
  page_delta.clear();
  for (const PageMap& map : maps_) page_delta.push_back(map.cost(ranges));
  return {};
}

Status BlockAllocator::undo(const Growth& growth, Growth& out) {
  if (growth.serial == 0 || growth.serial != undoable_) {
    return invalid("undo: not the latest growth; undo later growths first, or use shrink");
  }
  for (const BlockRange& range : growth.ranges) {
    for (int64_t block = range.begin; block < range.end; ++block) {
      if (block >= num_blocks() || state_[block] != State::fresh) {
        return invalid("undo: block " + std::to_string(block) +
                       " was allocated since; free what was allocated and use shrink");
      }
    }
  }
  out = Growth{growth.ranges, std::vector<int64_t>(maps_.size(), 0)};
  for (const BlockRange& range : growth.ranges) decommit(range, out.page_delta);
  undoable_ = growth.previous;
  return {};
}

Status BlockAllocator::shrink(int64_t max_bytes, Growth& out) {
  if (Status status = not_negative(max_bytes, "shrink: max_bytes"); !status.ok()) return status;
  const int64_t unit = geometry().unit_bytes();
  const int64_t target = max_bytes / unit + (max_bytes % unit != 0);
  out = Growth{{}, std::vector<int64_t>(maps_.size(), 0)};
  std::vector<int64_t> blocks;
  while (-out.page_delta[0] < target && parked_.size() > 0) {
    const int64_t page = parked_.last();
    for (int64_t block = geometry().first_block(page); block <= geometry().last_block(page);
         ++block) {
      if (state_[block] == State::uncommitted) continue;
      decommit({block, block + 1}, out.page_delta);
      blocks.push_back(block);
    }
  }
  if (!blocks.empty()) undoable_ = 0;
  out.ranges = to_ranges(std::move(blocks));
  return {};
}

void BlockAllocator::commit(BlockRange blocks, std::vector<int64_t>& page_delta) {
  for (size_t g = maps_.size(); g-- > 0;) {
    scratch_.clear();
    page_delta[g] += maps_[g].add(blocks, scratch_);
  }
  // scratch_ now has the primary geometry's new pages.
  for (const PageRun& run : scratch_) {
    for (int64_t page = run.begin; page < run.end; ++page) parked_.set(page);
  }
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    uncommitted_.clear(block);
    state_[block] = State::fresh;
    const int32_t page = home(block);
    const bool first = clean_.empty(page);
    clean_.push_back(page, static_cast<int32_t>(block));
    if (first) enter_bucket(page, false);
  }
  num_clean_ += blocks.size();
}

void BlockAllocator::decommit(BlockRange blocks, std::vector<int64_t>& page_delta) {
  for (int64_t block = blocks.begin; block < blocks.end; ++block) {
    const int32_t page = home(block);
    clean_.remove(page, static_cast<int32_t>(block));
    if (clean_.empty(page)) leave_bucket(page);
    state_[block] = State::uncommitted;
    uncommitted_.set(block);
  }
  num_clean_ -= blocks.size();
  for (size_t g = maps_.size(); g-- > 0;) {
    scratch_.clear();
    page_delta[g] -= maps_[g].remove(blocks, scratch_);
  }
  for (const PageRun& run : scratch_) {
    for (int64_t page = run.begin; page < run.end; ++page) parked_.clear(page);
  }
}

// -- handing out ----------------------------------------------------------------------------------

Status BlockAllocator::can_allocate(int64_t n) const {
  if (Status status = not_negative(n, "allocate: n"); !status.ok()) return status;
  if (n <= num_clean_) return {};
  return invalid("allocate: " + std::to_string(n) + " blocks asked for, " +
                 std::to_string(num_clean_) + " are clean; grow first");
}

Status BlockAllocator::allocate(int64_t n, std::vector<int32_t>& blocks) {
  if (Status status = can_allocate(n); !status.ok()) return status;
  blocks.reserve(blocks.size() + n);
  // A page that is being filled stays the fullest, so take from it as much as it has.
  while (n > 0) n -= take_from(buckets_.head(used_buckets_.last()), n, blocks);
  return {};
}

Status BlockAllocator::allocate_beside(int64_t n, int64_t beside, std::vector<int32_t>& blocks) {
  if (Status status = can_allocate(n); !status.ok()) return status;
  if (beside < 0 || beside >= num_blocks()) {
    return invalid("allocate: there is no block " + std::to_string(beside) + " to be beside");
  }
  blocks.reserve(blocks.size() + n);
  if (n > 0 && beside != 0 && !clean_.empty(home(beside))) {
    n -= take_from(home(beside), n, blocks);
  }
  while (n > 0) {
    const int64_t bucket = buckets_.empty(0) ? used_buckets_.last() : 0;
    n -= take_from(buckets_.head(bucket), n, blocks);
  }
  return {};
}

int64_t BlockAllocator::clean_beside(int64_t block) const {
  int64_t count = 0;
  const int32_t page = home(block);
  for (int32_t i = clean_.head(page); i != IndexLists::kNone; i = clean_.next(i)) ++count;
  return count;
}

// Up to n, one at least, of a page's clean blocks, of which there is one at least; how many.
int64_t BlockAllocator::take_from(int32_t page, int64_t n, std::vector<int32_t>& blocks) {
  leave_bucket(page);
  int64_t taken = 0;
  for (; taken < n && !clean_.empty(page); ++taken) {
    const int32_t block = clean_.head(page);
    clean_.remove(page, block);
    make_live(block);
    ++pages_[page].live_homed;
    blocks.push_back(block);
  }
  if (!clean_.empty(page)) enter_bucket(page, true);
  return taken;
}

Status BlockAllocator::free(std::span<const int32_t> blocks) {
  // Marking while checking finds a block that is named twice.
  for (size_t i = 0; i < blocks.size(); ++i) {
    const int64_t block = blocks[i];
    const bool known = block > 0 && block < num_blocks();
    if (known && state_[block] == State::live) {
      state_[block] = State::freed;
      continue;
    }
    while (i-- > 0) state_[blocks[i]] = State::live;
    const std::string name = "free: block " + std::to_string(block);
    if (block == 0) return invalid(name + " is the null block, which is never freed");
    if (!known) return invalid(name + " does not exist; nothing was freed");
    return invalid(name + " is not live or is named twice; nothing was freed");
  }
  for (size_t i = blocks.size(); i-- > 0;) make_free(blocks[i]);
  return {};
}

Status BlockAllocator::emptied_by(std::span<const int32_t> candidates, int64_t pages,
                                  std::vector<int32_t>& out) const {
  if (Status status = not_negative(pages, "emptied_by: pages"); !status.ok()) return status;
  std::vector<int32_t> seen(pages_.size(), 0);  // candidates that touch a page
  int64_t emptied = 0;
  size_t used = 0;
  for (; used < candidates.size() && emptied < pages; ++used) {
    const int64_t block = candidates[used];
    if (block <= 0 || block >= num_blocks() || state_[block] != State::live) {
      return invalid("emptied_by: block " + std::to_string(block) + " is not live");
    }
    for (int64_t page = home(block); page <= geometry().last_page(block); ++page) {
      if (++seen[page] == pages_[page].live) ++emptied;
    }
  }
  for (const int32_t block : candidates.first(used)) {
    for (int64_t page = home(block); page <= geometry().last_page(block); ++page) {
      if (seen[page] != pages_[page].live) continue;
      out.push_back(block);
      break;
    }
  }
  return {};
}

void BlockAllocator::make_live(int32_t block) {
  state_[block] = State::live;
  --num_clean_;
  const int64_t last = geometry().last_page(block);
  for (int64_t page = home(block); page <= last; ++page) {
    if (pages_[page].live++ == 0) parked_.clear(page);
  }
}

void BlockAllocator::make_free(int32_t block) {
  state_[block] = State::freed;
  ++num_clean_;
  const int32_t first = home(block);
  const int64_t last = geometry().last_page(block);
  for (int64_t page = first; page <= last; ++page) {
    if (--pages_[page].live == 0) parked_.set(page);
  }
  if (!clean_.empty(first)) leave_bucket(first);
  --pages_[first].live_homed;
  clean_.push_front(first, block);
  enter_bucket(first, true);
}

void BlockAllocator::enter_bucket(int32_t page, bool at_front) {
  const int32_t bucket = pages_[page].live_homed;
  if (at_front) {
    buckets_.push_front(bucket, page);
  } else {
    buckets_.push_back(bucket, page);
  }
  used_buckets_.set(bucket);
}

void BlockAllocator::leave_bucket(int32_t page) {
  const int32_t bucket = pages_[page].live_homed;
  buckets_.remove(bucket, page);
  if (buckets_.empty(bucket)) used_buckets_.clear(bucket);
}

std::vector<int32_t> BlockAllocator::live_blocks() const {
  std::vector<int32_t> blocks;
  blocks.reserve(static_cast<std::size_t>(num_live() - 1));
  for (std::size_t i = 1; i < state_.size(); ++i) {
    if (state_[i] == State::live) blocks.push_back(static_cast<int32_t>(i));
  }
  return blocks;
}

std::vector<int32_t> BlockAllocator::free_order() const {
  std::vector<int32_t> order;
  order.reserve(num_clean_);
  for (int64_t bucket = pages_.empty() ? -1 : max_homed(geometry()); bucket >= 0; --bucket) {
    for (int32_t page = buckets_.head(bucket); page != IndexLists::kNone;
         page = buckets_.next(page)) {
      for (int32_t block = clean_.head(page); block != IndexLists::kNone;
           block = clean_.next(block)) {
        order.push_back(block);
      }
    }
  }
  return order;
}

}  // namespace kvc
