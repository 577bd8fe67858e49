// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <atomic>
#include <random>
#include <thread>

#include "support.h"

using namespace kvc;
using namespace kvc::test;

namespace {

constexpr auto kPageSize = static_cast<std::int64_t>(kPage);

struct World {
  std::unique_ptr<HostBackend> backend = host();
  PagePool pool;
  std::unique_ptr<Arena> arena;

  explicit World(Geometry geometry, std::size_t ready = 0, ArenaOptions options = {})
      : pool(*backend, kPage, ready) {
    REQUIRE_OK(Arena::open(*backend, pool, geometry, options, &arena));
  }
};

// Whether exactly the pages of committed blocks can be touched, in every segment.
bool backed_exactly(const Arena& arena) {
  const Geometry& g = arena.geometry();
  for (std::int64_t page = 0; page < g.pages_per_segment(); ++page) {
    bool wanted = false;
    for (std::int64_t block = g.first_block(page); block <= g.last_block(page); ++block) {
      wanted = wanted || arena.is_committed(block);
    }
    for (std::int64_t segment = 0; segment < g.segments; ++segment) {
      const Address at = arena.base() + static_cast<Address>(segment) * arena.segment_stride() +
                         static_cast<Address>(page * g.page_bytes);
      if (readable(at) != wanted || readable(at + kPage - 1) != wanted) return false;
    }
  }
  return true;
}

}  // namespace

TEST_CASE("a new arena backs block 0 and nothing else") {
  World w({kPageSize, kPageSize, 8, 1});
  CHECK(w.arena->committed_bytes() == kPage);
  CHECK(w.arena->is_committed(0));
  CHECK_FALSE(w.arena->is_committed(1));
  CHECK(w.arena->reserved_bytes() == 8 * kPage);
  CHECK(w.backend->physical_bytes() == kPage);
  CHECK(backed_exactly(*w.arena));
  CHECK(decommit(*w.arena, {{0, 1}}).code == Code::invalid_argument);
  CHECK(decommit(*w.arena, {{0, 2}}).code == Code::invalid_argument);
  CHECK(w.arena->is_committed(0));
}

TEST_CASE("blocks may straddle pages, be smaller, or span several") {
  for (const std::int64_t block_bytes :
       {kPageSize / 3, kPageSize / 2, kPageSize, kPageSize * 3 / 2, kPageSize * 5 / 2 + 8}) {
    for (const std::int64_t segments : {1, 3}) {
      CAPTURE(block_bytes);
      CAPTURE(segments);
      World w({block_bytes, kPageSize, 12, segments});
      Arena& arena = *w.arena;
      REQUIRE_OK(commit(arena, {{2, 4}, {7, 8}}));
      for (std::int64_t block : {0, 2, 3, 7}) write_block(arena, block);
      CHECK(backed_exactly(arena));
      CHECK(w.backend->physical_bytes() == arena.committed_bytes());
      REQUIRE_OK(commit(arena, {{4, 7}}));
      for (std::int64_t block : {4, 5, 6}) write_block(arena, block);
      CHECK(backed_exactly(arena));
      REQUIRE_OK(decommit(arena, {{3, 6}}));
      CHECK(backed_exactly(arena));
      for (std::int64_t block : {0, 2, 6, 7}) CHECK(holds_mark(arena, block));
      REQUIRE_OK(decommit(arena, {{7, 8}, {2, 3}, {6, 7}}));  // any order
      CHECK(backed_exactly(arena));
      CHECK(w.backend->physical_bytes() == arena.committed_bytes());
      CHECK(holds_mark(arena, 0));
    }
  }
}

TEST_CASE("a contiguous run costs one set_access, and one unmap, per segment") {
  World w({kPageSize / 2, kPageSize, 64, 2});
  const ArenaCalls before = w.arena->calls();
  REQUIRE_OK(commit(*w.arena, {{2, 10}, {10, 20}, {40, 42}}));
  const ArenaCalls after = w.arena->calls();
  CHECK(after.map - before.map == 2 * 10);
  CHECK(after.set_access - before.set_access == 2 * 2);
  REQUIRE_OK(decommit(*w.arena, {{2, 20}}));
  CHECK(w.arena->calls().unmap == 2);
  CHECK(w.arena->calls().zero == 0);
}

TEST_CASE("invalid ranges change nothing") {
  World w({kPageSize, kPageSize, 8, 1});
  REQUIRE_OK(commit(*w.arena, {{2, 4}}));
  const std::vector<std::vector<BlockRange>> bad_commits = {
      {{3, 5}},          // partly committed
      {{4, 6}, {5, 7}},  // named twice
      {{5, 6}, {4, 6}},  // also when the second finds it late
      {{4, 5}, {2, 3}},  // the second is committed
      {{-1, 2}},        {{7, 9}}, {{5, 5}}, {{6, 5}}, {{INT64_MAX, INT64_MAX}},
  };
  for (const auto& ranges : bad_commits) {
    CHECK(commit(*w.arena, ranges).code == Code::invalid_argument);
  }
  const std::vector<std::vector<BlockRange>> bad_decommits = {
      {{2, 5}}, {{2, 3}, {2, 3}}, {{3, 4}, {1, 2}}, {{8, 9}}};
  for (const auto& ranges : bad_decommits) {
    CHECK(decommit(*w.arena, ranges).code == Code::invalid_argument);
  }
  for (std::int64_t block = 0; block < 8; ++block) {
    CHECK(w.arena->is_committed(block) == (block == 0 || block == 2 || block == 3));
  }
  CHECK(w.arena->committed_bytes() == 3 * kPage);
  CHECK(w.arena->calls().map == 3);
  REQUIRE_OK(commit(*w.arena, {}));
  REQUIRE_OK(decommit(*w.arena, {{2, 4}}));
}

TEST_CASE("geometry, pool and backend must agree") {
  auto backend = host();
  PagePool pool(*backend, kPage, 0);
  std::unique_ptr<Arena> arena;
  CHECK(Arena::open(*backend, pool, {kPageSize, 2 * kPageSize, 4, 1}, {}, &arena).code ==
        Code::invalid_argument);
  CHECK(Arena::open(*backend, pool, {0, kPageSize, 4, 1}, {}, &arena).code ==
        Code::invalid_argument);
  PagePool odd(*backend, 1000, 0);
  CHECK(Arena::open(*backend, odd, {1000, 1000, 4, 1}, {}, &arena).code == Code::invalid_argument);
  CHECK(arena == nullptr);
}

TEST_CASE("recycled pages keep old bytes unless zeroing is asked for; new ones are zero") {
  for (const bool zero : {false, true}) {
    CAPTURE(zero);
    World w({kPageSize, kPageSize, 8, 1}, 4 * kPage, {zero});
    REQUIRE_OK(commit(*w.arena, {{1, 3}}));
    write_block(*w.arena, 1);
    write_block(*w.arena, 2);
    REQUIRE_OK(decommit(*w.arena, {{1, 3}}));
    CHECK(w.pool.ready_bytes() == 2 * kPage);
    CHECK(w.arena->committed_bytes() == kPage);
    REQUIRE_OK(commit(*w.arena, {{4, 7}}));  // two recycled, one new
    CHECK(w.pool.creates() == 4);
    CHECK(w.arena->calls().zero == (zero ? 1 : 0));
    std::size_t nonzero = 0;
    for (std::int64_t block = 4; block < 7; ++block) {
      const unsigned char* bytes = pointer(block_address(*w.arena, block, 0));
      nonzero += std::any_of(bytes, bytes + kPage, [](unsigned char c) { return c != 0; });
    }
    CHECK(nonzero == (zero ? 0 : 2));
  }
}

TEST_CASE("out of memory is all-or-nothing") {
  auto backend = host(4 * kPage);
  PagePool pool(*backend, kPage, 0);
  std::unique_ptr<Arena> arena;
  REQUIRE_OK(Arena::open(*backend, pool, {kPageSize, kPageSize, 8, 1}, {}, &arena));
  CHECK(commit(*arena, {{1, 6}}).code == Code::out_of_memory);
  CHECK(arena->committed_bytes() == kPage);
  CHECK(backend->physical_bytes() == kPage);
  CHECK(backed_exactly(*arena));
  REQUIRE_OK(commit(*arena, {{1, 4}}));
  std::unique_ptr<Arena> second;  // not even its block 0 fits
  CHECK(Arena::open(*backend, pool, {kPageSize, kPageSize, 8, 1}, {}, &second).code ==
        Code::out_of_memory);
}

TEST_CASE("freed is what was promised for the blocks and is not held") {
  World w({kPageSize / 2, kPageSize, 32, 2}, 4 * kPage);
  const auto spared_by_commit = [&](std::vector<BlockRange> ranges) {
    std::size_t freed = 99;
    REQUIRE_OK(w.arena->commit(ranges, &freed));
    return freed;
  };
  const auto freed_by_decommit = [&](std::vector<BlockRange> ranges) {
    std::size_t freed = 99;
    REQUIRE_OK(w.arena->decommit(ranges, &freed));
    return freed;
  };
  CHECK(spared_by_commit({{2, 9}}) == 0);           // four pages in each segment, all new
  CHECK(spared_by_commit({{9, 10}}) == 0);          // the other half of one
  CHECK(freed_by_decommit({{9, 10}}) == 0);         // which stays
  CHECK(freed_by_decommit({{2, 9}}) == 4 * kPage);  // the pool keeps the other four
  CHECK(spared_by_commit({{2, 10}}) == 4 * kPage);
  std::size_t freed = 99;
  CHECK(w.arena->commit(std::vector<BlockRange>{{2, 3}}, &freed).code == Code::invalid_argument);
  CHECK(freed == 0);
  freed = 99;
  CHECK(w.arena->decommit(std::vector<BlockRange>{{0, 3}}, &freed).code == Code::invalid_argument);
  CHECK(freed == 0);
}

TEST_CASE("close gives everything back, once") {
  World w({kPageSize / 2, kPageSize, 16, 2});
  REQUIRE_OK(commit(*w.arena, {{3, 9}}));
  const Address base = w.arena->base();
  REQUIRE_OK(w.arena->close());
  CHECK(w.backend->physical_bytes() == 0);
  CHECK_FALSE(readable(base));
  REQUIRE_OK(w.arena->close());
  CHECK(commit(*w.arena, {{3, 4}}).code == Code::invalid_argument);
  CHECK(w.arena->committed_bytes() == 0);
}

TEST_CASE("any sequence leaves exactly the committed blocks backed") {
  std::mt19937 random(7);
  World w({kPageSize * 2 / 3, kPageSize, 40, 2}, 3 * kPage);
  std::vector<bool> model(40);
  model[0] = true;
  for (int step = 0; step < 200; ++step) {
    const std::int64_t begin = 1 + random() % 39;
    const std::int64_t end = std::min<std::int64_t>(40, begin + 1 + random() % 6);
    const bool committing = random() % 2 == 0;
    const bool valid = std::all_of(model.begin() + begin, model.begin() + end,
                                   [&](bool committed) { return committed != committing; });
    const Status status =
        committing ? commit(*w.arena, {{begin, end}}) : decommit(*w.arena, {{begin, end}});
    REQUIRE(status.ok() == valid);
    if (!valid) continue;
    std::fill(model.begin() + begin, model.begin() + end, committing);
    for (std::int64_t b = begin; committing && b < end; ++b) write_block(*w.arena, b);
    for (std::int64_t b = 1; b < 40; ++b) REQUIRE(w.arena->is_committed(b) == model[b]);
    for (std::int64_t b = 1; b < 40; ++b) REQUIRE((!model[b] || holds_mark(*w.arena, b)));
    REQUIRE(w.backend->physical_bytes() == w.arena->committed_bytes() + w.pool.ready_bytes());
    if (step % 20 == 0) REQUIRE(backed_exactly(*w.arena));
  }
}

TEST_CASE("threads share an arena") {
  World w({kPageSize * 3 / 2, kPageSize, 4 * 16, 1}, 2 * kPage);
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (std::int64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      // Each thread has blocks of its own, on pages shared with its neighbours'.
      for (int i = 0; i < 50; ++i) {
        const std::int64_t begin = t * 16 + 1 + i % 8;
        if (!commit(*w.arena, {{begin, begin + 7}}).ok()) ++failures;
        write_block(*w.arena, begin);
        if (!holds_mark(*w.arena, begin)) ++failures;
        if (!decommit(*w.arena, {{begin, begin + 7}}).ok()) ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(w.arena->committed_bytes() == 2 * kPage);
  CHECK(backed_exactly(*w.arena));
}
