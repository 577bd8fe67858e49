// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "kvcached/bit_tree.h"
#include "kvcached/geometry.h"

namespace kvc {
namespace {

constexpr int64_t kMiB = 1 << 20;

// Every (block, page) size class: equal, many blocks per page, pages smaller than blocks, and each
// with and without straddling.
const std::vector<Geometry> kGeometries = {
    {8, 8, 40, 1},   {1, 8, 100, 1},  {3, 8, 100, 2},  {7, 64, 300, 1},
    {9, 8, 50, 1},   {16, 4, 30, 3},  {5, 2, 60, 1},   {100, 3, 12, 1},
    {64, 65, 70, 1}, {65, 64, 70, 1}, {1, 1000, 7, 1}, {2359296, 2097152, 100, 1},
};

TEST_CASE("blocks touch the pages that their bytes lie on") {
  for (const Geometry& g : kGeometries) {
    CAPTURE(g.block_bytes);
    CAPTURE(g.page_bytes);
    REQUIRE(g.validate().ok());
    for (int64_t page = 0; page < g.pages_per_segment(); ++page) {
      for (int64_t block = 0; block < g.num_blocks; ++block) {
        const bool overlap = block * g.block_bytes < (page + 1) * g.page_bytes &&
                             page * g.page_bytes < (block + 1) * g.block_bytes;
        const bool by_block = g.first_page(block) <= page && page <= g.last_page(block);
        const bool by_page = g.first_block(page) <= block && block <= g.last_block(page);
        REQUIRE(by_block == overlap);
        REQUIRE(by_page == overlap);
      }
    }
    CHECK(g.pages_per_segment() * g.page_bytes >= g.num_blocks * g.block_bytes);
    CHECK((g.pages_per_segment() - 1) * g.page_bytes < g.num_blocks * g.block_bytes);
    CHECK(g.unit_bytes() == g.page_bytes * g.segments);
  }
}

TEST_CASE("a geometry that cannot be is refused") {
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  const std::vector<Geometry> bad = {
      {0, 8, 1, 1},
      {8, 0, 1, 1},
      {8, 8, 0, 1},
      {8, 8, 1, 0},
      {-8, 8, 1, 1},
      {kHuge, 8, 2, 1},
      {8, kHuge, 2, 1},
      {8, 8, kHuge, 1},
      {kMiB, kMiB, 1 << 20, kHuge},
      {kHuge / 4, 1, 4, 1},
      {1 << 20, 1, 1 << 20, 1},  // too many pages
  };
  for (const Geometry& g : bad) {
    CAPTURE(g.block_bytes);
    CAPTURE(g.page_bytes);
    const Status status = g.validate();
    CHECK(status.code == Code::invalid_argument);
    CHECK_FALSE(status.what.empty());
  }
  CHECK(Geometry{2 * kMiB, 2 * kMiB, 1 << 20, 1}.validate().ok());
}

std::set<int64_t> flat(const std::vector<PageRun>& runs) {
  std::set<int64_t> pages;
  int64_t end = -1;
  for (const PageRun& run : runs) {
    REQUIRE(run.begin < run.end);
    REQUIRE(run.begin != end);  // neighbours are one run
    end = run.end;
    for (int64_t page = run.begin; page < run.end; ++page) REQUIRE(pages.insert(page).second);
  }
  return pages;
}

TEST_CASE("a page map reports exactly the pages that change") {
  std::mt19937 random(1);
  for (const Geometry& g : kGeometries) {
    CAPTURE(g.block_bytes);
    CAPTURE(g.page_bytes);
    PageMap map(g);
    std::set<int64_t> committed;  // blocks
    const auto pages = [&] {
      std::set<int64_t> out;
      for (const int64_t block : committed) {
        for (int64_t page = g.first_page(block); page <= g.last_page(block); ++page) {
          out.insert(page);
        }
      }
      return out;
    };
    for (int step = 0; step < 300; ++step) {
      // A run of blocks that are all in the map, or all not.
      const int64_t begin = static_cast<int64_t>(random() % g.num_blocks);
      const bool add = committed.count(begin) == 0;
      int64_t end = begin + 1;
      const int64_t limit = begin + 1 + static_cast<int64_t>(random() % 9);
      while (end < std::min(limit, g.num_blocks) && (committed.count(end) == 0) == add) ++end;
      const std::set<int64_t> before = pages();
      const BlockRange range{begin, end};
      const int64_t cost = map.cost(std::vector{range});
      for (int64_t block = begin; block < end; ++block) {
        if (add) {
          committed.insert(block);
        } else {
          committed.erase(block);
        }
      }
      const std::set<int64_t> after = pages();
      std::set<int64_t> expected;
      std::set_symmetric_difference(before.begin(), before.end(), after.begin(), after.end(),
                                    std::inserter(expected, expected.end()));
      std::vector<PageRun> runs;
      const int64_t changed = add ? map.add(range, runs) : map.remove(range, runs);
      REQUIRE(flat(runs) == expected);
      REQUIRE(changed == static_cast<int64_t>(expected.size()));
      if (add) REQUIRE(cost == changed);
      REQUIRE(map.committed_pages() == static_cast<int64_t>(after.size()));
      for (int64_t page = 0; page < g.pages_per_segment(); ++page) {
        REQUIRE(map.committed(page) == (after.count(page) == 1));
      }
    }
  }
}

TEST_CASE("the cost of several ranges counts a shared page once") {
  PageMap map({3, 8, 100, 1});
  CHECK(map.cost(std::vector<BlockRange>{{0, 1}, {1, 2}, {4, 5}}) == 2);
  CHECK(map.cost({}) == 0);
  CHECK(map.cost(std::vector<BlockRange>{{5, 5}}) == 0);
}

TEST_CASE("a bit tree is a sorted set") {
  std::mt19937 random(2);
  for (const int64_t size : {1, 63, 64, 65, 4096, 4097, 300000}) {
    BitTree tree(size);
    std::set<int64_t> model;
    for (int step = 0; step < 2000; ++step) {
      const int64_t i = static_cast<int64_t>(random() % size);
      if (random() % 2 == 0) {
        tree.set(i);
        model.insert(i);
      } else {
        tree.clear(i);
        model.erase(i);
      }
      REQUIRE(tree.size() == static_cast<int64_t>(model.size()));
      REQUIRE(tree.first() == (model.empty() ? BitTree::kNone : *model.begin()));
      REQUIRE(tree.last() == (model.empty() ? BitTree::kNone : *model.rbegin()));
      const int64_t from = static_cast<int64_t>(random() % (size + 1));
      const auto next = model.lower_bound(from);
      REQUIRE(tree.next(from) == (next == model.end() ? BitTree::kNone : *next));
      REQUIRE(tree.test(i) == (model.count(i) == 1));
    }
  }
}

}  // namespace
}  // namespace kvc
