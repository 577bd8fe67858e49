// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <future>
#include <thread>

#include "kvcached/mapper.h"
#include "support.h"

using namespace kvc;
using namespace kvc::test;
using namespace std::chrono_literals;

namespace {

constexpr auto kPageSize = static_cast<std::int64_t>(kPage);
using Ranges = std::vector<BlockRange>;

// A fence that opens when the test says so, as a device does that is busy until then.
class Gate final : public Forwarding {
 public:
  using Forwarding::Forwarding;
  Status fence() override {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
    return inner_.fence();
  }
  void close() { set(false); }
  void open() { set(true); }
  void await_fence() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return waiting_ > 0; });
  }

 private:
  void set(bool open) {
    std::lock_guard lock(mutex_);
    open_ = open;
    waiting_ = 0;
    changed_.notify_all();
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
  int waiting_ = 0;
};

struct World {
  std::unique_ptr<HostBackend> memory;
  FaultyBackend faults;
  Gate gate;
  PagePool pool;
  std::unique_ptr<Arena> arena;
  std::optional<Mapper> mapper;

  std::atomic<std::size_t> freed{0};
  std::atomic<bool> deaf{false};  // to what is freed

  explicit World(std::size_t capacity = kCapacity, std::chrono::milliseconds retry = {},
                 Pace pace = {})
      : memory(host(capacity)), faults(*memory), gate(faults), pool(gate, kPage, 0) {
    REQUIRE_OK(Arena::open(gate, pool, {kPageSize, kPageSize, 64, 1}, {}, &arena));
    mapper.emplace(
        *arena, retry,
        [this](std::size_t bytes) {
          if (deaf) return false;
          freed += bytes;
          return true;
        },
        Mapper::OnMoved{}, std::move(pace));
  }
};

}  // namespace

TEST_CASE("queued calls run in the order given") {
  World w;
  // Any other order would commit a committed block or decommit one that is not.
  for (int i = 0; i < 50; ++i) {
    REQUIRE_OK(w.mapper->commit_ahead(Ranges{{1, 9}}));
    REQUIRE_OK(w.mapper->decommit_later(Ranges{{3, 5}}));
    REQUIRE_OK(w.mapper->commit_ahead(Ranges{{4, 5}}));
    REQUIRE_OK(w.mapper->decommit_later(Ranges{{1, 3}, {4, 9}}));
  }
  REQUIRE_OK(w.mapper->commit_ahead(Ranges{{2, 3}}));
  REQUIRE_OK(w.mapper->drain());
  CHECK(w.mapper->pending() == 0);
  CHECK(w.arena->committed_bytes() == 2 * kPage);
  CHECK(w.arena->is_committed(2));
}

TEST_CASE("a decommit waits for the device, and is fenced after it was asked for") {
  World w;
  REQUIRE_OK(w.mapper->commit_now(Ranges{{1, 3}}));
  CHECK(w.faults.calls(Op::fence) == 0);
  w.gate.close();
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{1, 2}}));
  w.gate.await_fence();
  CHECK(w.arena->is_committed(1));
  CHECK(readable(block_address(*w.arena, 1, 0)));
  w.gate.open();
  REQUIRE_OK(w.mapper->drain());
  CHECK_FALSE(w.arena->is_committed(1));
  CHECK_FALSE(readable(block_address(*w.arena, 1, 0)));
  CHECK(w.faults.calls(Op::fence) == 1);
}

// With rests that outlast any test, one piece is done, and no other until somebody is in a hurry.
const Pace kRests{1, 1000000, {}, 1h};

struct Resting : World {
  explicit Resting(Pace pace = kRests) : World(kCapacity, {}, std::move(pace)) {
    REQUIRE_OK(mapper->commit_now(Ranges{{1, 9}}));
    faults.set_latency(Op::unmap, 1000);
    REQUIRE_OK(mapper->decommit_later(Ranges{{1, 9}}));
    while (freed == 0) std::this_thread::yield();
  }
};

TEST_CASE("a long decommit rests between its pieces") {
  Resting w;
  std::this_thread::sleep_for(50ms);
  CHECK(w.freed == kPage);
  CHECK(w.mapper->pending() == 1);
  w.mapper->stop();  // nothing is left undone
  CHECK(w.freed == 8 * kPage);
}

TEST_CASE("a rest ends, however long a piece took") {
  Resting w({1, 1000000, {}, 1ms});
  while (w.mapper->pending() != 0) std::this_thread::yield();
  CHECK(w.freed == 8 * kPage);
}

TEST_CASE("a decommit does not rest while somebody waits for it") {
  Resting w;
  REQUIRE_OK(w.mapper->drain());
  CHECK(w.freed == 8 * kPage);
}

TEST_CASE("a decommit does not rest before a commit") {
  Resting w;
  REQUIRE_OK(w.mapper->commit_ahead(Ranges{{20, 21}}));
  while (w.mapper->pending() != 0) std::this_thread::yield();
  CHECK(w.freed == 8 * kPage);
}

TEST_CASE("a decommit does not rest when told to hurry") {
  Resting w({1, 1000000, [] { return true; }, 1h});
  while (w.mapper->pending() != 0) std::this_thread::yield();
  CHECK(w.freed == 8 * kPage);
}

TEST_CASE("many decommits do not pile up") {
  Resting w;
  REQUIRE_OK(w.mapper->commit_now(Ranges{{20, 60}}));
  for (std::int64_t block = 20; block < 60; ++block) {
    REQUIRE_OK(w.mapper->decommit_later(Ranges{{block, block + 1}}));
  }
  while (w.mapper->pending() > 16) std::this_thread::yield();
  CHECK(w.freed >= 31 * kPage);
}

TEST_CASE("commit_now waits for commits queued before it") {
  World w;
  w.faults.set_latency(Op::map, 20000);
  REQUIRE_OK(w.mapper->commit_ahead(Ranges{{1, 4}}));
  REQUIRE_OK(w.mapper->commit_now(Ranges{{10, 11}}));
  CHECK(w.mapper->pending() == 0);
  for (std::int64_t block : {1, 2, 3, 10}) CHECK(w.arena->is_committed(block));
}

TEST_CASE("commit_now passes a decommit of other blocks, not of its own") {
  World w;
  REQUIRE_OK(w.mapper->commit_now(Ranges{{1, 4}}));
  write_block(*w.arena, 1);
  w.gate.close();
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{1, 2}}));
  w.gate.await_fence();
  REQUIRE_OK(w.mapper->commit_now(Ranges{{20, 22}}));  // would hang if it waited
  REQUIRE_OK(w.mapper->wait_commits());
  CHECK(w.arena->is_committed(20));
  CHECK(w.mapper->pending() == 1);

  auto again = std::async(std::launch::async, [&] { return w.mapper->commit_now(Ranges{{1, 2}}); });
  CHECK(again.wait_for(50ms) == std::future_status::timeout);
  w.gate.open();
  REQUIRE_OK(again.get());
  CHECK(w.arena->is_committed(1));
  CHECK(pointer(block_address(*w.arena, 1, 0))[0] == 0);  // a new page: the old one went
}

TEST_CASE("commit_now waits for a decommit on its own page") {
  World w;
  std::unique_ptr<Arena> small;  // two blocks a page
  REQUIRE_OK(Arena::open(w.gate, w.pool, {kPageSize / 2, kPageSize, 16, 1}, {}, &small));
  Mapper mapper(*small);
  REQUIRE_OK(mapper.commit_now(Ranges{{2, 3}}));
  w.gate.close();
  REQUIRE_OK(mapper.decommit_later(Ranges{{2, 3}}));
  w.gate.await_fence();
  auto neighbour =
      std::async(std::launch::async, [&] { return mapper.commit_now(Ranges{{3, 4}}); });
  CHECK(neighbour.wait_for(50ms) == std::future_status::timeout);
  w.gate.open();
  REQUIRE_OK(neighbour.get());
  CHECK(small->committed_bytes() == 2 * kPage);
  CHECK_FALSE(small->is_committed(2));
}

TEST_CASE("what is freed is told once it is") {
  World w;
  REQUIRE_OK(w.mapper->commit_now(Ranges{{1, 6}}));
  CHECK(w.freed == 0);
  w.gate.close();
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{2, 4}}));
  w.gate.await_fence();
  CHECK(w.freed == 0);
  w.gate.open();
  REQUIRE_OK(w.mapper->drain());
  CHECK(w.freed == 2 * kPage);
  w.faults.fail(1, Code::driver, Op::unmap);
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{4, 5}}));
  CHECK(w.mapper->drain().code == Code::lost);
  CHECK(w.freed == 2 * kPage);
}

TEST_CASE("what nobody could be told of is told later, once") {
  World w;
  REQUIRE_OK(w.mapper->commit_now(Ranges{{1, 9}}));
  w.deaf = true;
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{1, 3}}));
  REQUIRE_OK(w.mapper->drain());
  CHECK(w.freed == 0);
  w.deaf = false;
  while (w.freed == 0) std::this_thread::yield();  // with nothing else to do
  CHECK(w.freed == 2 * kPage);
  w.deaf = true;
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{3, 5}}));
  REQUIRE_OK(w.mapper->drain());
  w.deaf = false;
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{5, 6}}));
  REQUIRE_OK(w.mapper->drain());
  CHECK(w.freed == 5 * kPage);
  w.deaf = true;
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{6, 7}}));
  REQUIRE_OK(w.mapper->drain());
  w.deaf = false;
  w.mapper->stop();
  CHECK(w.freed == 6 * kPage);
}

TEST_CASE("wait_commits waits for commits") {
  World w;
  w.faults.set_latency(Op::create, 20000);
  REQUIRE_OK(w.mapper->commit_ahead(Ranges{{1, 4}}));
  REQUIRE_OK(w.mapper->wait_commits());
  CHECK(w.arena->is_committed(3));
}

TEST_CASE("an error in the background is kept for the next call, which does nothing else") {
  World w;
  using Call = Status (*)(Mapper&);
  const Call calls[] = {
      [](Mapper& m) { return m.commit_now(Ranges{{30, 31}}); },
      [](Mapper& m) { return m.commit_ahead(Ranges{{30, 31}}); },
      [](Mapper& m) { return m.decommit_later(Ranges{{40, 41}}); },
      [](Mapper& m) { return m.wait_commits(); },
      [](Mapper& m) { return m.drain(); },
      [](Mapper& m) { return m.take_error(); },
  };
  REQUIRE_OK(w.mapper->commit_now(Ranges{{40, 41}}));
  for (const Call call : calls) {
    w.faults.fail(1, Code::out_of_memory, Op::create);
    REQUIRE_OK(w.mapper->commit_ahead(Ranges{{1, 2}}));
    while (w.mapper->pending() > 0) std::this_thread::yield();
    const Status kept = call(*w.mapper);
    CHECK(kept.code == Code::lost);
    CHECK(kept.what.find("injected failure of create") != std::string::npos);
    REQUIRE_OK(w.mapper->take_error());
    REQUIRE_OK(w.mapper->drain());
    CHECK(w.arena->committed_bytes() == 2 * kPage);
    CHECK(w.arena->is_committed(40));
  }
  w.faults.fail(1, Code::driver, Op::fence);
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{40, 41}}));
  CHECK(w.mapper->drain().code == Code::lost);
  CHECK(w.arena->is_committed(40));  // never unmapped unfenced
  w.faults.fail(1, Code::driver, Op::unmap);
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{40, 41}}));
  CHECK(w.mapper->drain().code == Code::lost);
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{40, 41}}));
  REQUIRE_OK(w.mapper->drain());
  CHECK_FALSE(w.arena->is_committed(40));
}

TEST_CASE("commit_now reports its own failure as it is") {
  World w(2 * kPage);
  CHECK(w.mapper->commit_now(Ranges{{1, 5}}).code == Code::out_of_memory);
  CHECK(w.mapper->commit_now(Ranges{{0, 1}}).code == Code::invalid_argument);
  w.faults.fail(1, Code::driver, Op::map);
  CHECK(w.mapper->commit_now(Ranges{{1, 2}}).code == Code::driver);
  REQUIRE_OK(w.mapper->commit_now(Ranges{{1, 2}}));
}

TEST_CASE("a commit short of memory is tried again until there is some, or time is up") {
  World w(4 * kPage, 10s);
  Page foreign[2];
  for (Page& page : foreign) REQUIRE_OK(w.memory->create(kPage, &page));
  auto waiting =
      std::async(std::launch::async, [&] { return w.mapper->commit_now(Ranges{{1, 4}}); });
  CHECK(waiting.wait_for(30ms) == std::future_status::timeout);
  for (const Page page : foreign) REQUIRE_OK(w.memory->destroy(page));
  REQUIRE_OK(waiting.get());
  CHECK(w.arena->committed_bytes() == 4 * kPage);

  World brief(2 * kPage, 30ms);
  const auto start = std::chrono::steady_clock::now();
  CHECK(brief.mapper->commit_now(Ranges{{1, 4}}).code == Code::out_of_memory);
  const auto spent = std::chrono::steady_clock::now() - start;
  CHECK(spent >= 30ms);
  CHECK(spent < 5s);
}

TEST_CASE("a commit waiting for memory takes what a queued decommit gives back") {
  World w(4 * kPage, 10s);
  REQUIRE_OK(w.mapper->commit_now(Ranges{{1, 4}}));
  w.gate.close();
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{1, 3}}));
  auto waiting =
      std::async(std::launch::async, [&] { return w.mapper->commit_now(Ranges{{20, 22}}); });
  CHECK(waiting.wait_for(20ms) == std::future_status::timeout);
  w.gate.open();
  REQUIRE_OK(waiting.get());
  CHECK(w.arena->is_committed(21));
}

TEST_CASE("stop finishes the queue and does not sit out retries") {
  World w(4 * kPage, 60s);
  REQUIRE_OK(w.mapper->commit_ahead(Ranges{{1, 20}}));  // can never fit
  REQUIRE_OK(w.mapper->commit_ahead(Ranges{{30, 31}}));
  const auto start = std::chrono::steady_clock::now();
  w.mapper->stop();
  w.mapper->stop();
  CHECK(std::chrono::steady_clock::now() - start < 10s);
  CHECK(w.arena->is_committed(30));
  CHECK(w.mapper->take_error().code == Code::lost);
  CHECK(w.mapper->commit_ahead(Ranges{{31, 32}}).code == Code::invalid_argument);
}

TEST_CASE("several threads use one mapper") {
  World w;
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (std::int64_t t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      const std::int64_t own = 1 + t * 20;
      for (int i = 0; i < 40; ++i) {
        if (!w.mapper->commit_now(Ranges{{own, own + 4}}).ok()) ++failures;
        write_block(*w.arena, own + 3);
        if (!w.mapper->decommit_later(Ranges{{own, own + 4}}).ok()) ++failures;
        if (!w.mapper->commit_ahead(Ranges{{own + 8, own + 9}}).ok()) ++failures;
        if (!w.mapper->decommit_later(Ranges{{own + 8, own + 9}}).ok()) ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  REQUIRE_OK(w.mapper->drain());
  CHECK(failures == 0);
  CHECK(w.arena->committed_bytes() == kPage);
  CHECK(w.memory->physical_bytes() == kPage);
}

TEST_CASE("how much is committed can be read while the driver is slow") {
  World w;
  REQUIRE_OK(w.mapper->commit_now(Ranges{{1, 9}}));
  w.faults.set_latency(Op::unmap, 200'000);
  REQUIRE_OK(w.mapper->decommit_later(Ranges{{1, 2}}));
  const auto begin = std::chrono::steady_clock::now();
  int reads = 0;
  while (w.mapper->pending() != 0) {
    (void)w.arena->committed_bytes();
    ++reads;
  }
  CHECK(w.arena->committed_bytes() == 8 * kPage);
  CHECK(std::chrono::steady_clock::now() - begin >= 200ms);
  CHECK(reads > 100);
}
