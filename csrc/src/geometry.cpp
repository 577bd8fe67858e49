// SPDX-License-Identifier: Apache-2.0
#include "kvcached/geometry.h"

#include <algorithm>
#include <limits>
#include <string>

namespace kvc {
namespace {

// Block ids and page indices travel as 32-bit numbers; byte offsets must not overflow 64 bits.
constexpr int64_t kMaxIndex = std::numeric_limits<int32_t>::max();
constexpr int64_t kMaxBytes = int64_t{1} << 62;

void append(std::vector<PageRun>& runs, int64_t page) {
  if (!runs.empty() && runs.back().end == page) {
    ++runs.back().end;
  } else {
    runs.push_back({page, page + 1});
  }
}

}  // namespace

Status Geometry::validate() const {
  const auto invalid = [](std::string what) {
    return Status::error(Code::invalid_argument, std::move(what));
  };
  if (block_bytes <= 0 || page_bytes <= 0 || num_blocks <= 0 || segments <= 0) {
    return invalid("geometry: block_bytes, page_bytes, num_blocks and segments must be positive");
  }
  if (num_blocks > kMaxIndex) {
    return invalid("geometry: " + std::to_string(num_blocks) +
                   " blocks are too many; use larger blocks or a smaller arena");
  }
  // Rounding up to whole pages, and the product over segments, must fit as well.
  if (page_bytes > kMaxBytes / segments ||
      block_bytes > (kMaxBytes / segments - page_bytes) / num_blocks) {
    return invalid("geometry: the arena is larger than the address space; lower num_blocks");
  }
  if (pages_per_segment() > kMaxIndex) {
    return invalid("geometry: " + std::to_string(pages_per_segment()) +
                   " pages are too many; use larger pages");
  }
  return {};
}

PageMap::PageMap(const Geometry& geometry)
    : geometry_(geometry), count_(geometry.pages_per_segment(), 0) {}

uint32_t PageMap::touching(BlockRange blocks, int64_t page) const {
  const int64_t first = std::max(geometry_.first_block(page), blocks.begin);
  const int64_t last = std::min(geometry_.last_block(page), blocks.end - 1);
  return static_cast<uint32_t>(last - first + 1);
}

int64_t PageMap::add(BlockRange blocks, std::vector<PageRun>& fresh) {
  if (blocks.size() <= 0) return 0;
  int64_t pages = 0;
  const PageRun run = geometry_.pages_of(blocks);
  for (int64_t page = run.begin; page < run.end; ++page) {
    if (count_[page] == 0) {
      append(fresh, page);
      ++pages;
    }
    count_[page] += touching(blocks, page);
  }
  committed_pages_ += pages;
  return pages;
}

int64_t PageMap::remove(BlockRange blocks, std::vector<PageRun>& emptied) {
  if (blocks.size() <= 0) return 0;
  int64_t pages = 0;
  const PageRun run = geometry_.pages_of(blocks);
  for (int64_t page = run.begin; page < run.end; ++page) {
    count_[page] -= touching(blocks, page);
    if (count_[page] == 0) {
      append(emptied, page);
      ++pages;
    }
  }
  committed_pages_ -= pages;
  return pages;
}

int64_t PageMap::cost(std::span<const BlockRange> blocks) const {
  int64_t pages = 0;
  int64_t counted = 0;  // pages before this one have been looked at already
  for (const BlockRange& range : blocks) {
    if (range.size() <= 0) continue;
    const PageRun run = geometry_.pages_of(range);
    for (int64_t page = std::max(run.begin, counted); page < run.end; ++page) {
      pages += count_[page] == 0;
    }
    counted = run.end;
  }
  return pages;
}

}  // namespace kvc
