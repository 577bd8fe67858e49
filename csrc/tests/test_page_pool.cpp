// SPDX-License-Identifier: Apache-2.0
#include <atomic>
#include <thread>

#include "support.h"

using namespace kvc;
using namespace kvc::test;
using namespace std::chrono_literals;

namespace {

Page take(PagePool& pool, bool expect_recycled) {
  Page page;
  bool recycled = !expect_recycled;
  REQUIRE_OK(pool.acquire(&page, &recycled));
  CHECK(recycled == expect_recycled);
  return page;
}

}  // namespace

TEST_CASE("without a limit nothing is kept") {
  auto backend = host();
  PagePool pool(*backend, kPage, 0);
  pool.recycle(take(pool, false));
  CHECK(pool.ready_bytes() == 0);
  CHECK(pool.held_bytes() == 0);
  CHECK(backend->physical_bytes() == 0);
  CHECK(pool.creates() == 1);
  CHECK(pool.destroys() == 1);
}

TEST_CASE("ready pages are used again, the last one back first, up to the limit") {
  auto backend = host();
  PagePool pool(*backend, kPage, 2 * kPage + 1);
  const Page a = take(pool, false), b = take(pool, false), c = take(pool, false);
  pool.recycle(a);
  pool.recycle(b);
  pool.recycle(c);  // one too many: the longest idle goes
  CHECK(pool.ready_bytes() == 2 * kPage);
  CHECK(pool.held_bytes() == 2 * kPage);
  CHECK(backend->physical_bytes() == 2 * kPage);
  CHECK(take(pool, true).handle == c.handle);
  CHECK(take(pool, true).handle == b.handle);
  CHECK(pool.held_bytes() == 2 * kPage);
  pool.recycle(b);
  pool.recycle(c);
}

TEST_CASE("trim frees what was asked for, trim_idle what is old") {
  auto backend = host();
  PagePool pool(*backend, kPage, 8 * kPage);
  std::vector<Page> pages;
  for (int i = 0; i < 4; ++i) pages.push_back(take(pool, false));
  pool.recycle(pages[0]);
  pool.recycle(pages[1]);
  std::this_thread::sleep_for(60ms);
  pool.recycle(pages[2]);
  pool.recycle(pages[3]);
  std::size_t freed = 1;
  REQUIRE_OK(pool.trim_idle(10s, &freed));
  CHECK(freed == 0);
  REQUIRE_OK(pool.trim_idle(50ms, &freed));
  CHECK(freed == 2 * kPage);
  REQUIRE_OK(pool.trim(0, &freed));
  CHECK(freed == 0);
  REQUIRE_OK(pool.trim(1, &freed));  // part of a page frees one
  CHECK(freed == kPage);
  CHECK(take(pool, true).handle == pages[3].handle);
  pool.recycle(pages[3]);
  REQUIRE_OK(pool.trim(100 * kPage, &freed));
  CHECK(freed == kPage);
  CHECK(backend->physical_bytes() == 0);
}

TEST_CASE("the account never shows less than is held") {
  auto inner = host(2 * kPage);
  FaultyBackend backend(*inner);
  std::int64_t account = 0;
  bool short_of_truth = false;
  std::vector<std::int64_t> deltas;
  PagePool pool(backend, kPage, kPage, [&](std::int64_t delta) {
    account += delta;
    deltas.push_back(delta);
    if (static_cast<std::size_t>(account) < inner->physical_bytes()) short_of_truth = true;
  });
  const auto page = static_cast<std::int64_t>(kPage);
  const Page a = take(pool, false), b = take(pool, false);
  Page none;
  bool recycled = false;
  CHECK(pool.acquire(&none, &recycled).code == Code::out_of_memory);
  CHECK(account == 2 * page);
  CHECK(deltas == std::vector<std::int64_t>{page, page, page, -page});
  pool.recycle(a);
  CHECK(account == 2 * page);  // ready pages count
  pool.recycle(b);
  CHECK(account == page);
  std::size_t freed = 0;
  REQUIRE_OK(pool.trim(kPage, &freed));
  CHECK(account == 0);
  CHECK_FALSE(short_of_truth);
}

TEST_CASE("a page that cannot be destroyed stays usable and counted, and is tried again") {
  auto inner = host();
  FaultyBackend backend(*inner);
  {
    PagePool pool(backend, kPage, 0);
    const Page a = take(pool, false), b = take(pool, false);
    backend.fail(1, Code::driver, Op::destroy);
    pool.recycle(a);
    CHECK(pool.ready_bytes() == kPage);
    CHECK(pool.held_bytes() == 2 * kPage);
    pool.recycle(b);  // destroys both
    CHECK(pool.ready_bytes() == 0);
    CHECK(inner->physical_bytes() == 0);

    pool.recycle(take(pool, false));
    const Page c = take(pool, false);
    backend.fail(1, Code::driver, Op::destroy);
    pool.recycle(c);
    std::size_t freed = 0;
    backend.fail(1, Code::driver, Op::destroy);
    CHECK(pool.trim(kPage, &freed).code == Code::driver);
    CHECK(freed == 0);
    CHECK(take(pool, true).handle == c.handle);
    backend.fail(1, Code::driver, Op::destroy, 2);
    pool.recycle(c);
  }  // the second try of the destructor gets it
  CHECK(inner->physical_bytes() == 0);
}

TEST_CASE("threads share a pool") {
  auto backend = host();
  std::atomic<std::int64_t> account{0};
  {
    PagePool pool(*backend, kPage, 4 * kPage, [&](std::int64_t delta) { account += delta; });
    std::atomic<int> failures{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&, t] {
        std::vector<Page> mine;
        for (int i = 0; i < 300; ++i) {
          if (mine.size() < 3 && (i + t) % 3 != 0) {
            Page page;
            bool recycled = false;
            if (!pool.acquire(&page, &recycled).ok()) ++failures;
            mine.push_back(page);
          } else if (!mine.empty()) {
            pool.recycle(mine.back());
            mine.pop_back();
          }
          std::size_t freed = 0;
          if (i % 50 == t && !pool.trim(kPage, &freed).ok()) ++failures;
        }
        for (const Page page : mine) pool.recycle(page);
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(failures == 0);
    CHECK(pool.ready_bytes() <= 4 * kPage);
    CHECK(pool.held_bytes() == pool.ready_bytes());
    CHECK(pool.held_bytes() == (pool.creates() - pool.destroys()) * kPage);
    CHECK(static_cast<std::size_t>(account) == pool.held_bytes());
    CHECK(backend->physical_bytes() == pool.held_bytes());
  }
  CHECK(account == 0);
  CHECK(backend->physical_bytes() == 0);
}
