// SPDX-License-Identifier: Apache-2.0
// How blocks lie on pages, and which pages a set of committed blocks keeps committed.
//
// The scheduler (BlockAllocator) and every worker (Arena) turn the same block ids into pages with
// this one file, so they cannot disagree about what a commit or a decommit costs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvcached/status.h"

namespace kvc {

// Half-open [begin, end) of block ids.
struct BlockRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const BlockRange&) const = default;
};

// Half-open [begin, end) of page indices.
struct PageRun {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const PageRun&) const = default;
};

// Blocks of one size laid end to end over pages of another. A block may share a page with others,
// straddle a boundary, or span many pages. With several segments (one per layer, say) every
// segment has this same layout, and a page index stands for one page in each of them.
struct Geometry {
  int64_t block_bytes = 0;  // of one block within one segment
  int64_t page_bytes = 0;
  int64_t num_blocks = 0;
  int64_t segments = 1;

  // Everything below may be called only once this is ok.
  Status validate() const;

  int64_t pages_per_segment() const { return last_page(num_blocks - 1) + 1; }
  // What committing one page index takes from the device.
  int64_t unit_bytes() const { return page_bytes * segments; }

  int64_t first_page(int64_t block) const { return block * block_bytes / page_bytes; }
  int64_t last_page(int64_t block) const { return ((block + 1) * block_bytes - 1) / page_bytes; }
  int64_t first_block(int64_t page) const { return page * page_bytes / block_bytes; }
  int64_t last_block(int64_t page) const {
    const int64_t block = ((page + 1) * page_bytes - 1) / block_bytes;
    return block < num_blocks ? block : num_blocks - 1;
  }
  // The pages of a non-empty range, as one run: a range of blocks is contiguous in memory.
  PageRun pages_of(BlockRange blocks) const {
    return {first_page(blocks.begin), last_page(blocks.end - 1) + 1};
  }

  bool operator==(const Geometry&) const = default;
};

// Counts, per page index, the committed blocks that touch it. Not thread-safe. The caller adds
// only blocks that are not in it and removes only blocks that are.
class PageMap {
 public:
  explicit PageMap(const Geometry& geometry);

  // Appends to `fresh` the runs of pages that had no block before, and returns how many pages.
  int64_t add(BlockRange blocks, std::vector<PageRun>& fresh);
  // Appends to `emptied` the runs of pages that have no block any more; returns how many pages.
  int64_t remove(BlockRange blocks, std::vector<PageRun>& emptied);
  // How many pages adding these ascending, disjoint ranges would make fresh.
  int64_t cost(std::span<const BlockRange> blocks) const;

  const Geometry& geometry() const { return geometry_; }
  bool committed(int64_t page) const { return count_[page] != 0; }
  int64_t count(int64_t page) const { return count_[page]; }
  int64_t committed_pages() const { return committed_pages_; }

 private:
  // How many blocks of the range touch the page.
  uint32_t touching(BlockRange blocks, int64_t page) const;

  Geometry geometry_;
  std::vector<uint32_t> count_;
  int64_t committed_pages_ = 0;
};

}  // namespace kvc
