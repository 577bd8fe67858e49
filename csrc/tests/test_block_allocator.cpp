// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>

#include <chrono>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "allocator_model.h"
#include "kvcached/block_allocator.h"

namespace kvc {
namespace {

std::unique_ptr<BlockAllocator> make(const std::vector<Geometry>& geometries) {
  std::unique_ptr<BlockAllocator> out;
  const Status status = BlockAllocator::create(geometries[0].num_blocks, geometries, out);
  REQUIRE_MESSAGE(status.ok(), status.what);
  return out;
}

Growth grow(BlockAllocator& a, int64_t n) {
  Growth out;
  REQUIRE(a.grow(n, out).ok());
  return out;
}

Growth shrink(BlockAllocator& a, int64_t bytes) {
  Growth out;
  REQUIRE(a.shrink(bytes, out).ok());
  return out;
}

std::vector<int32_t> allocate(BlockAllocator& a, int64_t n) {
  std::vector<int32_t> out;
  REQUIRE(a.allocate(n, out).ok());
  return out;
}

std::set<int64_t> flat(const Growth& growth) {
  std::set<int64_t> blocks;
  int64_t end = -1;
  for (const BlockRange& range : growth.ranges) {
    REQUIRE(range.begin < range.end);
    REQUIRE(range.begin > end);  // ascending, and neighbours are one range
    end = range.end;
    for (int64_t block = range.begin; block < range.end; ++block) blocks.insert(block);
  }
  CHECK(growth.num_blocks() == static_cast<int64_t>(blocks.size()));
  return blocks;
}

void check_same(const BlockAllocator& a, const AllocatorModel& model) {
  REQUIRE(a.free_order() == model.order());
  REQUIRE(a.num_live() == static_cast<int64_t>(model.live.size()));
  REQUIRE(a.num_clean() == static_cast<int64_t>(model.committed.size() - model.live.size()));
  REQUIRE(a.num_uncommitted() == a.num_blocks() - static_cast<int64_t>(model.committed.size()));
  REQUIRE(a.parked_pages() == static_cast<int64_t>(model.parked().size()));
  const std::vector<int64_t> pages = model.committed_pages();
  for (size_t g = 0; g < pages.size(); ++g) REQUIRE(a.maps()[g].committed_pages() == pages[g]);
}

std::vector<int64_t> difference(const std::vector<int64_t>& after,
                                const std::vector<int64_t>& before) {
  std::vector<int64_t> out(after);
  for (size_t i = 0; i < out.size(); ++i) out[i] -= before[i];
  return out;
}

void run_against_model(const std::vector<Geometry>& geometries, unsigned seed, int steps) {
  auto a = make(geometries);
  AllocatorModel model(geometries);
  std::mt19937 random(seed);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  for (int step = 0; step < steps; ++step) {
    const std::vector<int64_t> before = model.committed_pages();
    switch (below(7)) {
      case 0: {
        const int64_t n = below(12);
        std::vector<int64_t> cost;
        REQUIRE(a->cost(n, cost).ok());
        const Growth growth = grow(*a, n);
        REQUIRE(flat(growth) == model.grow(n));
        REQUIRE(growth.page_delta == difference(model.committed_pages(), before));
        REQUIRE(growth.page_delta == cost);
        break;
      }
      case 1: {  // several growths, undone one by one, are as if they had not been
        std::vector<Growth> growths;
        const std::vector<int32_t> order = a->free_order();
        for (int64_t i = below(4); i >= 0; --i) growths.push_back(grow(*a, below(12)));
        while (!growths.empty()) {
          Growth undone;
          REQUIRE(a->undo(growths.back(), undone).ok());
          REQUIRE(undone.ranges == growths.back().ranges);
          for (size_t g = 0; g < geometries.size(); ++g) {
            REQUIRE(undone.page_delta[g] == -growths.back().page_delta[g]);
          }
          growths.pop_back();
        }
        REQUIRE(a->free_order() == order);
        break;
      }
      case 2: {
        const int64_t n = below(std::min<int64_t>(a->num_clean(), 10) + 1);
        std::vector<int32_t> expected;
        for (int64_t i = 0; i < n; ++i) expected.push_back(model.allocate());
        REQUIRE(allocate(*a, n) == expected);
        break;
      }
      case 3: {
        const int64_t n = below(std::min<int64_t>(a->num_clean(), 10) + 1);
        const std::vector<int32_t> live(model.live.begin(), model.live.end());
        int64_t beside = live[below(static_cast<int64_t>(live.size()))];
        std::vector<int32_t> found;
        REQUIRE(a->clean_beside(beside) ==
                static_cast<int64_t>(model.clean[a->geometry().first_page(beside)].size()));
        REQUIRE(a->allocate_beside(n, beside, found).ok());
        std::vector<int32_t> expected;
        for (int64_t i = 0; i < n; ++i) {
          beside = model.allocate_beside(beside);
          expected.push_back(static_cast<int32_t>(beside));
        }
        REQUIRE(found == expected);
        break;
      }
      case 4:
      case 5: {
        std::vector<int32_t> victims(model.live.begin(), model.live.end());
        victims.erase(victims.begin());  // the null block
        std::shuffle(victims.begin(), victims.end(), random);
        victims.resize(below(std::min<int64_t>(static_cast<int64_t>(victims.size()), 8) + 1));
        REQUIRE(a->free(victims).ok());
        for (auto block = victims.rbegin(); block != victims.rend(); ++block) model.free(*block);
        break;
      }
      default: {
        const int64_t bytes = below(4 * geometries[0].unit_bytes());
        const Growth shrunk = shrink(*a, bytes);
        REQUIRE(flat(shrunk) == model.shrink(bytes));
        REQUIRE(shrunk.page_delta == difference(model.committed_pages(), before));
      }
    }
    check_same(*a, model);
  }
}

TEST_CASE("the allocator does what the model does, for every geometry") {
  const std::vector<std::vector<Geometry>> cases = {
      {{8, 8, 40, 1}},                  // one block per page
      {{1, 8, 70, 1}},                  // many per page
      {{3, 8, 60, 2}, {2, 8, 60, 2}},   // straddling; a rank with smaller blocks
      {{1, 40, 70, 1}},                 // very many per page
      {{9, 8, 40, 1}, {7, 16, 40, 1}},  // 2.25 MiB blocks on 2 MiB pages
      {{16, 4, 30, 1}},                 // several pages per block
      {{10, 4, 30, 3}, {5, 4, 30, 1}},  // several, straddling
      {{11, 4, 30, 1}},
      {{4, 6, 40, 1}},
      {{1, 1000, 30, 1}},  // everything on one page
      {{5, 5, 1, 1}},      // only the null block
  };
  for (const auto& geometries : cases) {
    CAPTURE(geometries[0].block_bytes);
    CAPTURE(geometries[0].page_bytes);
    for (unsigned seed = 0; seed < 4; ++seed) run_against_model(geometries, seed, 300);
  }
}

TEST_CASE("with one block per page the order is a stack of frees, then fresh ids ascending") {
  auto a = make({{8, 8, 20, 1}});
  grow(*a, 6);
  CHECK(a->free_order() == std::vector<int32_t>{1, 2, 3, 4, 5, 6});
  const auto blocks = allocate(*a, 4);
  REQUIRE(a->free(std::vector<int32_t>{3, 1}).ok());
  grow(*a, 2);
  CHECK(a->free_order() == std::vector<int32_t>{3, 1, 5, 6, 7, 8});
}

TEST_CASE("the fullest page is filled first, so that others drain") {
  auto a = make({{1, 4, 16, 1}});
  grow(*a, 15);
  allocate(*a, 15);
  REQUIRE(a->free(std::vector<int32_t>{4, 5, 6, 8}).ok());  // page 1 has one live, page 2 three
  CHECK(allocate(*a, 2) == std::vector<int32_t>{8, 4});
}

TEST_CASE("what is taken beside a block lies on its page, and else alone") {
  auto a = make({{1, 4, 20, 1}});
  grow(*a, 19);
  std::vector<int32_t> first;
  REQUIRE(a->allocate_beside(2, 0, first).ok());
  CHECK(first == std::vector<int32_t>{4, 5});  // not beside the null block
  std::vector<int32_t> second;
  REQUIRE(a->allocate_beside(1, 0, second).ok());
  CHECK(second == std::vector<int32_t>{8});
  REQUIRE(a->allocate_beside(3, first.back(), first).ok());
  CHECK(first == std::vector<int32_t>{4, 5, 6, 7, 12});
  REQUIRE(a->free(first).ok());
  CHECK(a->live_on_page(1) == 0);
  // Where no page is empty, the fullest.
  allocate(*a, 15);
  std::vector<int32_t> last;
  REQUIRE(a->allocate_beside(1, 0, last).ok());
  CHECK(a->num_clean() == 2);
  CHECK(a->allocate_beside(3, 0, last).code == Code::invalid_argument);
  CHECK(a->allocate_beside(1, 20, last).code == Code::invalid_argument);
  CHECK(a->allocate_beside(1, -1, last).code == Code::invalid_argument);
  CHECK(last.size() == 1);
}

TEST_CASE("growing sweeps in whatever costs nothing") {
  auto a = make({{3, 8, 100, 1}});
  CHECK(flat(grow(*a, 0)) == std::set<int64_t>{1});  // shares page 0 with the null block
  const Growth growth = grow(*a, 1);                 // 2 lies on pages 0 and 1, 3 and 4 on page 1
  CHECK(flat(growth) == std::set<int64_t>{2, 3, 4});
  CHECK(growth.page_delta == std::vector<int64_t>{1});
  CHECK(flat(grow(*a, 1000)).size() == 95);
  CHECK(grow(*a, 5).ranges.empty());
}

TEST_CASE("undo is refused once it would not be exact") {
  auto a = make({{8, 8, 20, 1}});
  Growth out;
  const Growth first = grow(*a, 3);
  const Growth second = grow(*a, 2);
  CHECK(a->undo(first, out).code == Code::invalid_argument);  // not the latest
  REQUIRE(a->undo(second, out).ok());
  CHECK(a->undo(second, out).code == Code::invalid_argument);  // twice
  const auto blocks = allocate(*a, 1);
  CHECK(a->undo(first, out).code == Code::invalid_argument);  // live
  REQUIRE(a->free(blocks).ok());
  CHECK(a->undo(first, out).code == Code::invalid_argument);  // used since
  CHECK(a->num_clean() == 3);

  const Growth third = grow(*a, 2);
  shrink(*a, 8);
  CHECK(a->undo(third, out).code == Code::invalid_argument);
  CHECK(a->undo(Growth{{{5, 500}}, {495}, 0, 0}, out).code == Code::invalid_argument);
}

TEST_CASE("undo is refused after a shrink, even of other blocks") {
  auto a = make({{8, 8, 20, 1}});
  grow(*a, 10);
  allocate(*a, 10);
  REQUIRE(a->free(std::vector<int32_t>{2}).ok());
  shrink(*a, 8);
  const Growth growth = grow(*a, 1);
  CHECK(flat(growth) == std::set<int64_t>{2});
  REQUIRE(a->free(std::vector<int32_t>{9}).ok());
  CHECK(flat(shrink(*a, 8)) == std::set<int64_t>{9});
  Growth out;
  CHECK(a->undo(growth, out).code == Code::invalid_argument);
}

TEST_CASE("shrink takes parked pages from the top and never splits a block") {
  auto a = make({{8, 2, 10, 1}});  // a block is four pages
  grow(*a, 5);
  const Growth shrunk = shrink(*a, 1);
  CHECK(flat(shrunk) == std::set<int64_t>{5});
  CHECK(shrunk.page_delta == std::vector<int64_t>{-4});
  CHECK(shrink(*a, 0).ranges.empty());
  allocate(*a, 4);
  CHECK(a->parked_pages() == 0);
  CHECK(shrink(*a, 1000).ranges.empty());
}

TEST_CASE("a call that is wrong changes nothing") {
  auto a = make({{3, 8, 30, 1}});
  AllocatorModel model({{3, 8, 30, 1}});
  model.grow(5);
  grow(*a, 5);
  for (int i = 0; i < 3; ++i) model.allocate();
  const auto live = allocate(*a, 3);
  std::vector<int32_t> none;
  CHECK(a->allocate(100, none).code == Code::invalid_argument);
  CHECK(none.empty());
  CHECK(a->allocate(-1, none).code == Code::invalid_argument);
  const int32_t clean = a->free_order().front();
  for (const std::vector<int32_t>& wrong :
       std::vector<std::vector<int32_t>>{{live[0], 0},
                                         {live[0], -1},
                                         {live[0], 30},
                                         {live[0], live[1], live[0]},
                                         {live[0], clean},
                                         {live[0], 29}}) {
    const Status status = a->free(wrong);
    CHECK(status.code == Code::invalid_argument);
    CHECK_FALSE(status.what.empty());
    check_same(*a, model);
  }
  Growth out;
  CHECK(a->grow(-1, out).code == Code::invalid_argument);
  CHECK(a->shrink(-1, out).code == Code::invalid_argument);
  std::vector<int64_t> cost;
  CHECK(a->cost(-1, cost).code == Code::invalid_argument);
  check_same(*a, model);
  REQUIRE(a->free(live).ok());  // all of them are live still
  for (auto block = live.rbegin(); block != live.rend(); ++block) model.free(*block);
  check_same(*a, model);
}

TEST_CASE("geometries must belong together") {
  std::unique_ptr<BlockAllocator> out;
  const auto create = [&](int64_t n, std::vector<Geometry> geometries) {
    return BlockAllocator::create(n, std::move(geometries), out).code;
  };
  CHECK(create(10, {}) == Code::invalid_argument);
  CHECK(create(10, {{8, 8, 11, 1}}) == Code::invalid_argument);
  CHECK(create(10, {{8, 8, 10, 1}, {16, 8, 10, 1}}) == Code::invalid_argument);
  CHECK(create(10, {{8, 0, 10, 1}}) == Code::invalid_argument);
  CHECK(out == nullptr);
}

// Not a measurement: a million blocks in one step would take minutes if any operation were more
// than a few steps per block.
TEST_CASE("a million blocks, on small and on large pages") {
  constexpr int64_t kBlocks = 1'000'000;
  for (const Geometry& g : {Geometry{8, 8, kBlocks, 1}, Geometry{1, 4096, kBlocks, 1},
                            Geometry{9, 8, kBlocks, 1}, Geometry{1, kBlocks, kBlocks, 1}}) {
    auto a = make({g});
    grow(*a, kBlocks);
    auto blocks = allocate(*a, kBlocks - 1);
    std::shuffle(blocks.begin(), blocks.end(), std::mt19937(3));
    REQUIRE(a->free(blocks).ok());
    blocks = allocate(*a, kBlocks - 1);
    REQUIRE(a->free(blocks).ok());
    shrink(*a, kBlocks * 16);
    CHECK(a->num_live() == 1);
    CHECK(a->maps()[0].committed_pages() == 1 + (g.block_bytes > g.page_bytes));
  }
}

}  // namespace
}  // namespace kvc
