// SPDX-License-Identifier: Apache-2.0
// Which blocks have memory, and which of those the engine gets next. The scheduler's side of the
// arena: it decides, the workers carry out. Pure bookkeeping, no driver, single-threaded.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kvcached/bit_tree.h"
#include "kvcached/geometry.h"
#include "kvcached/index_lists.h"
#include "kvcached/status.h"

namespace kvc {

// Blocks that changed between committed and uncommitted, ascending, and what that did to the
// committed page indices of every geometry: positive after grow, negative after undo and shrink.
struct Growth {
  std::vector<BlockRange> ranges;
  std::vector<int64_t> page_delta;
  uint64_t serial = 0;    // of the grow that made it, for undo
  uint64_t previous = 0;  // the grow that undo may take back after this one

  int64_t num_blocks() const;
};

// A block is uncommitted, clean (committed and free) or live. Block 0 is the engine's null block:
// committed and live from the start, never freed.
//
// Ranks of one engine may have blocks of different sizes. geometries[0] has the largest and
// steers every choice; the others are only counted.
class BlockAllocator {
 public:
  static Status create(int64_t num_blocks, std::vector<Geometry> geometries,
                       std::unique_ptr<BlockAllocator>& out);

  // Commits uncommitted blocks until n more are clean, or none is left: first those that lie
  // wholly on committed pages and so cost nothing (all of them, even beyond n), then the lowest
  // ids, each followed by whatever fits on the pages it opened.
  Status grow(int64_t n, Growth& out);
  // What grow(n) would add to the committed pages of every geometry.
  Status cost(int64_t n, std::vector<int64_t>& page_delta) const;
  // Takes back a grow that could not be paid for, as if it had not been. Growths are undone latest
  // first; refused once any of their blocks was allocated, or after a shrink.
  Status undo(const Growth& growth, Growth& out);
  // Decommits what lies on parked pages, highest page first, until max_bytes of primary pages are
  // free or no page is parked. A block that spans several pages frees them together, so the last
  // one may bring more than was asked for.
  Status shrink(int64_t max_bytes, Growth& out);

  // Appends n clean blocks to `blocks`, or fails and appends none. The page with most live blocks
  // first, so that the others drain; among equals the one used last, pages never used at the end.
  Status allocate(int64_t n, std::vector<int32_t>& blocks);
  // The same, but each block on the page of the one before it, the first on that of `beside`
  // (0 for none), or else on a page with no live block: what one request takes lies together, and
  // its pages are empty when it ends, whatever goes on beside it. Without such a page as allocate.
  Status allocate_beside(int64_t n, int64_t beside, std::vector<int32_t>& blocks);
  // All or nothing. Among blocks of equally full pages, blocks[0] is the first to be reused.
  Status free(std::span<const int32_t> blocks);

  // Which of `candidates`, live blocks in the order they should go, to free so that `pages` primary
  // pages have no live block, or as many as there can be. A page is emptied whole or left alone,
  // and those whose last block stands earliest in `candidates` go first.
  Status emptied_by(std::span<const int32_t> candidates, int64_t pages,
                    std::vector<int32_t>& out) const;

  int64_t num_blocks() const { return static_cast<int64_t>(state_.size()); }
  int64_t num_live() const { return num_blocks() - num_clean_ - uncommitted_.size(); }
  int64_t num_clean() const { return num_clean_; }
  int64_t num_uncommitted() const { return uncommitted_.size(); }
  // Committed primary pages that no live block touches.
  int64_t parked_pages() const { return parked_.size(); }

  const std::vector<PageMap>& maps() const { return maps_; }
  const Geometry& geometry() const { return maps_[0].geometry(); }
  // Clean blocks on the page that is home to a block: what allocate_beside takes first.
  int64_t clean_beside(int64_t block) const;
  // Live blocks that touch a primary page.
  int64_t live_on_page(int64_t page) const { return pages_[page].live; }
  // Every live block but the null block, ascending. O(blocks).
  std::vector<int32_t> live_blocks() const;
  // Every clean block, in the order allocate would hand them out. For debugging: O(clean blocks).
  std::vector<int32_t> free_order() const;

 private:
  enum class State : uint8_t { uncommitted, fresh, freed, live };  // fresh, freed: clean

  // A block's home is its first primary page. Blocks are kept by home, so that a change of how
  // full a page is moves one list and not each of its blocks.
  struct HomePage {
    int32_t live_homed = 0;  // how full: live blocks whose home this is
    int32_t live = 0;        // live blocks that touch the page
  };

  BlockAllocator(int64_t num_blocks, const std::vector<Geometry>& geometries);

  int32_t home(int64_t block) const { return static_cast<int32_t>(geometry().first_page(block)); }
  std::vector<BlockRange> plan(int64_t n) const;
  bool costs_nothing(int64_t block, int64_t reach) const;
  void commit(BlockRange blocks, std::vector<int64_t>& page_delta);
  void decommit(BlockRange blocks, std::vector<int64_t>& page_delta);
  Status can_allocate(int64_t n) const;
  int64_t take_from(int32_t page, int64_t n, std::vector<int32_t>& blocks);
  void make_live(int32_t block);
  void make_free(int32_t block);
  void enter_bucket(int32_t page, bool at_front);
  void leave_bucket(int32_t page);

  std::vector<PageMap> maps_;    // committed blocks per page, for every geometry
  std::vector<State> state_;     // of every block
  std::vector<HomePage> pages_;  // of the primary geometry
  IndexLists clean_;             // nodes: blocks; one list per home page
  IndexLists buckets_;           // nodes: pages with clean blocks; one list per live_homed
  BitTree used_buckets_;         // the buckets that are not empty
  BitTree uncommitted_;          // blocks
  BitTree parked_;               // primary pages
  int64_t num_clean_ = 0;
  uint64_t last_serial_ = 0;      // of the latest grow
  uint64_t undoable_ = 0;         // the grow that undo accepts, 0 for none
  std::vector<PageRun> scratch_;  // kept to spare allocations
};

}  // namespace kvc
