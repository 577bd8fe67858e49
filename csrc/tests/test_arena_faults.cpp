// SPDX-License-Identifier: Apache-2.0
// Fails every backend call there is, in turn, and checks that nothing changed and nothing leaked.
#include <optional>
#include <string>
#include <tuple>

#include "support.h"

using namespace kvc;
using namespace kvc::test;

namespace {

constexpr auto kPageSize = static_cast<std::int64_t>(kPage);
constexpr Geometry kGeometry{kPageSize * 3 / 2, kPageSize, 16, 2};

struct Step {
  bool commit;
  std::vector<BlockRange> ranges;
};
const std::vector<Step> kScript = {
    {true, {{1, 4}}},
    {true, {{8, 9}, {12, 15}}},
    {false, {{2, 3}}},
    {true, {{5, 8}}},
    {false, {{1, 2}, {13, 14}}},
    {true, {{1, 3}, {9, 12}}},
    {false, {{5, 12}, {3, 4}}},
    {true, {{4, 6}}},
};

struct State {
  std::vector<bool> committed;
  std::size_t arena_bytes = 0;
  std::size_t held_by_arena = 0;
  std::size_t stuck = 0;
  bool operator==(const State&) const = default;
};

// As a driver that unmaps page by page.
class PageByPage final : public Forwarding {
 public:
  using Forwarding::Forwarding;
  bool unmaps_runs() const override { return false; }
  Status unmap(Address a, std::size_t n) override {
    REQUIRE(n == kPage);
    return Forwarding::unmap(a, n);
  }
};

struct World {
  std::unique_ptr<HostBackend> memory = host();
  PageByPage page_by_page{*memory};
  FaultyBackend backend;
  std::int64_t account = 0;
  std::optional<PagePool> pool;
  std::unique_ptr<Arena> arena;

  World(bool runs, std::size_t ready)
      : backend(runs ? static_cast<Backend&>(*memory) : static_cast<Backend&>(page_by_page)) {
    pool.emplace(backend, kPage, ready, [this](std::int64_t delta) { account += delta; });
  }
  Status open() { return Arena::open(backend, *pool, kGeometry, {true}, &arena); }

  State state() const {
    State s;
    for (std::int64_t b = 0; b < kGeometry.num_blocks; ++b) {
      s.committed.push_back(arena->is_committed(b));
    }
    s.arena_bytes = arena->committed_bytes();
    s.held_by_arena = pool->held_bytes() - pool->ready_bytes();
    s.stuck = arena->stuck_bytes();
    return s;
  }
  void mark_all() {
    for (std::int64_t b = 0; b < kGeometry.num_blocks; ++b) {
      if (arena->is_committed(b)) write_block(*arena, b);
    }
  }
  bool all_marked() const {
    for (std::int64_t b = 0; b < kGeometry.num_blocks; ++b) {
      if (arena->is_committed(b) && !holds_mark(*arena, b)) return false;
    }
    return true;
  }
  Status apply(const Step& step) {
    return step.commit ? arena->commit(step.ranges) : arena->decommit(step.ranges);
  }
  void check_counts() const {
    REQUIRE(memory->physical_bytes() == pool->held_bytes());
    REQUIRE(static_cast<std::size_t>(account) == pool->held_bytes());
  }
  void tear_down() {
    arena.reset();
    pool.reset();
    REQUIRE(account == 0);
    REQUIRE(memory->physical_bytes() == 0);
  }
};

}  // namespace

TEST_CASE("whichever call fails, the step has changed nothing and can be done again") {
  for (const bool runs : {true, false}) {
    for (const std::size_t ready : {std::size_t{0}, 3 * kPage}) {
      for (const Code code : {Code::out_of_memory, Code::driver}) {
        std::uint64_t k = 1;
        for (;; ++k) {
          CAPTURE(runs);
          CAPTURE(ready);
          CAPTURE(k);
          World w(runs, ready);
          w.backend.fail(k, code);
          if (Status opened = w.open(); !opened.ok()) {
            REQUIRE(opened.code == code);
            REQUIRE(w.arena == nullptr);
            w.check_counts();
            REQUIRE_OK(w.open());
          }
          int failures = 0;
          for (const Step& step : kScript) {
            w.mark_all();
            const State before = w.state();
            const std::size_t bytes_before = w.memory->physical_bytes();
            const Status status = w.apply(step);
            w.check_counts();
            if (status.ok()) continue;
            ++failures;
            REQUIRE(status.code == code);
            REQUIRE(w.state() == before);
            REQUIRE(w.all_marked());
            if (ready == 0) REQUIRE(w.memory->physical_bytes() == bytes_before);
            REQUIRE_OK(w.apply(step));
          }
          REQUIRE(failures <= 1);
          const bool reached = w.backend.calls() >= k;
          w.tear_down();
          if (!reached && w.backend.calls() < k) break;
        }
        CHECK(k > 100);  // the loop went through the script, not past it
      }
    }
  }
}

TEST_CASE("a failure while a failure is put right is repaired later") {
  for (const bool runs : {true, false}) {
    std::size_t stuck_seen = 0;
    std::size_t lost_seen = 0;
    std::uint64_t k = 1;
    for (;; ++k) {
      for (const std::uint64_t times : {2, 3, 5}) {
        CAPTURE(runs);
        CAPTURE(k);
        CAPTURE(times);
        World w(runs, 0);
        REQUIRE_OK(w.open());
        w.backend.fail(k, Code::driver, {}, times);
        for (const Step& step : kScript) {
          const State before = w.state();
          const Status status = w.apply(step);
          w.check_counts();
          if (status.ok()) continue;
          const State after = w.state();
          REQUIRE(after.committed == before.committed);
          REQUIRE(after.arena_bytes == before.arena_bytes);
          stuck_seen += after.stuck > 0;
          lost_seen += status.code == Code::lost;
          w.backend.clear();
          REQUIRE_OK(w.apply(step));
          REQUIRE(w.state().stuck == 0);
          w.mark_all();  // faults if a page is not back
        }
        w.backend.clear();
        w.tear_down();
      }
      World dry(runs, 0);
      REQUIRE_OK(dry.open());
      const std::uint64_t opening = dry.backend.calls();
      for (const Step& step : kScript) REQUIRE_OK(dry.apply(step));
      if (k > dry.backend.calls() - opening) break;
    }
    CHECK(stuck_seen > 0);
    CHECK(lost_seen > 0);
  }
}

TEST_CASE("content survives a decommit whose repair had to wait") {
  World w(true, 0);
  REQUIRE_OK(w.open());
  REQUIRE_OK(commit(*w.arena, {{2, 4}, {8, 10}}));
  w.mark_all();
  // Segment 0's first run goes, the second refuses, and putting the first back fails too.
  w.backend.fail(2, Code::driver, Op::unmap);
  FaultyBackend& b = w.backend;
  Status status;
  SUBCASE("the map fails") {
    std::atomic<bool> done{false};
    b.fail(2, Code::driver, {}, 2);  // unmap ok, unmap fails, map fails
    status = decommit(*w.arena, {{2, 4}, {8, 10}});
    CHECK(status.code == Code::lost);
    CHECK(w.arena->stuck_bytes() > 0);
  }
  SUBCASE("nothing else fails") {
    status = decommit(*w.arena, {{2, 4}, {8, 10}});
    CHECK(status.code == Code::driver);
    CHECK(w.arena->stuck_bytes() == 0);
  }
  b.clear();
  REQUIRE_OK(commit(*w.arena, {{14, 15}}));  // any call repairs
  write_block(*w.arena, 14);
  CHECK(w.arena->stuck_bytes() == 0);
  CHECK(w.all_marked());
  w.check_counts();
  w.tear_down();
}

TEST_CASE("a page that cannot be unmapped is used where it is") {
  World w(true, 0);
  REQUIRE_OK(w.open());
  // Both pages of block 8 get mapped in segment 0; setting access fails, and so does all unmapping.
  w.backend.fail(1, Code::driver, Op::set_access);
  Status status = commit(*w.arena, {{8, 10}});
  REQUIRE(status.code == Code::driver);
  REQUIRE(w.arena->stuck_bytes() == 0);

  w.backend.fail(4, Code::driver, {}, 2);  // create, map, create, MAP, UNMAP
  status = commit(*w.arena, {{8, 10}});
  REQUIRE(status.code == Code::driver);
  CHECK(w.arena->stuck_bytes() == kPage);
  CHECK(w.arena->committed_bytes() == 2 * 2 * kPage);
  w.check_counts();
  w.backend.fail(1, Code::driver, Op::unmap);  // the retry at the start of the next call
  REQUIRE_OK(commit(*w.arena, {{8, 10}}));
  CHECK(w.arena->stuck_bytes() == 0);
  w.mark_all();
  CHECK(w.all_marked());
  w.backend.clear();
  w.tear_down();
}

TEST_CASE("close can be tried again, and destruction tries twice") {
  for (const Op op : {Op::unmap, Op::release_range}) {
    World w(true, 0);
    REQUIRE_OK(w.open());
    REQUIRE_OK(commit(*w.arena, {{8, 10}}));
    w.backend.fail(1, Code::driver, op);
    CHECK(w.arena->close().code == Code::driver);
    w.check_counts();
    REQUIRE_OK(w.arena->close());
    REQUIRE_OK(w.open());
    w.backend.fail(1, Code::driver, op);
    w.tear_down();
  }
}
