// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <random>
#include <thread>
#include <vector>

#include "temp_dir.h"

namespace kvc {
namespace {

constexpr int64_t kCapacity = 1000;
constexpr int64_t kHeadroom = 60;
constexpr int64_t kStatic = 10;  // of every member

// Counts what its member holds into `held`, never more than is leased at that moment.
void lease_and_release(Member& member, std::atomic<int64_t>& held, std::atomic<int64_t>& grants,
                       int64_t limit, unsigned seed, int rounds) {
  std::mt19937 random(seed);
  std::vector<int64_t> leases;
  for (int round = 0; round < rounds; ++round) {
    const auto wanted = static_cast<int64_t>(random() % 300);
    int64_t granted = 0;
    bool all = false;
    // doctest's assertions are not for threads: failures end up in the sums instead.
    if (random() % 2 == 0) {
      if (member.lease(wanted, all).ok() && all) granted = wanted;
    } else if (!member.lease_up_to(wanted, 7, granted).ok()) {
      granted = 0;
    }
    if (granted > 0) {
      ++grants;
      leases.push_back(granted);
      if (held.fetch_add(granted) + granted > limit) held.fetch_add(1'000'000);
    }
    (void)member.set_demand(wanted - granted);
    (void)member.add_committed(granted);
    (void)member.add_committed(-granted);
    while (leases.size() > random() % 3) {
      held.fetch_sub(leases.back());
      if (!member.release(leases.back()).ok()) held.fetch_add(1'000'000);
      leases.pop_back();
    }
  }
  for (const int64_t bytes : leases) {
    held.fetch_sub(bytes);
    if (!member.release(bytes).ok()) held.fetch_add(1'000'000);
  }
}

TEST_CASE("threads over several objects never hold more than there is") {
  const TempDir dir;
  constexpr int kLedgers = 4;
  constexpr int kThreads = 3;  // per member
  std::vector<std::unique_ptr<Ledger>> ledgers;
  std::vector<std::unique_ptr<Member>> members;
  for (int i = 0; i < kLedgers; ++i) {
    ledgers.push_back(open_ledger(dir.ledger(), kCapacity, kHeadroom));
    members.push_back(join(*ledgers.back(), "m", kStatic));
  }
  constexpr int64_t kLimit = kCapacity - kHeadroom - kLedgers * kStatic;
  std::atomic<int64_t> held = 0;
  std::atomic<int64_t> grants = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (int i = 0; i < kLedgers * kThreads; ++i) {
    threads.emplace_back(lease_and_release, std::ref(*members[i % kLedgers]), std::ref(held),
                         std::ref(grants), kLimit, static_cast<unsigned>(i), 3000);
  }
  // A reader that also frees the dead, of whom there are none.
  std::atomic<int64_t> wrong = 0;
  std::thread reader([&] {
    while (!stop) {
      uint64_t sum = 0;
      std::vector<MemberInfo> infos;
      if (!ledgers[0]->total_leased(sum).ok() || sum > kLimit) ++wrong;
      if (!ledgers[1]->reap(infos).ok() || !infos.empty()) ++wrong;
      if (!ledgers[2]->members(infos).ok() || infos.size() != kLedgers) ++wrong;
      std::this_thread::yield();
    }
  });
  for (std::thread& thread : threads) thread.join();
  stop = true;
  reader.join();
  CHECK(grants > 100);
  CHECK(held == 0);
  CHECK(wrong == 0);
  CHECK(available(*ledgers[0]) == kLimit);
}

TEST_CASE("threads that share a member lose no update") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity, 0);
  auto member = join(*ledger);
  std::atomic<int64_t> failures = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < 60'000; ++round) {
        bool granted = false;
        if (!member->lease(1, granted).ok() || !granted || !member->release(1).ok()) ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  CHECK(leased(*ledger) == 0);
}

TEST_CASE("threads join and leave while others lease") {
  const TempDir dir;
  std::atomic<int64_t> failures = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int round = 0; round < 40; ++round) {
        std::unique_ptr<Ledger> ledger;
        if (!Ledger::open(dir.ledger(), kCapacity, kHeadroom, ledger).ok()) {
          ++failures;
          continue;
        }
        std::unique_ptr<Member> leader;
        std::unique_ptr<Member> worker;
        if (!ledger->join("m", 0, leader).ok() ||
            !ledger->attach(leader->slot(), leader->generation(), worker).ok()) {
          ++failures;
          continue;
        }
        bool granted = false;
        if (!leader->lease(static_cast<int64_t>(random() % 500), granted).ok()) ++failures;
        if (random() % 2 == 0) std::swap(leader, worker);
        leader.reset();
        MemberInfo info;
        if (!worker->info(info).ok() || !info.alive) ++failures;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(failures == 0);
  auto ledger = open_ledger(dir.ledger());
  CHECK(leased(*ledger) == 0);
  std::vector<MemberInfo> infos;
  REQUIRE(ledger->members(infos).ok());
  CHECK(infos.empty());
}

TEST_CASE("leaving in one thread while others use the member") {
  const TempDir dir;
  for (int round = 0; round < 30; ++round) {
    auto ledger = open_ledger(dir.ledger(), kCapacity, 0);
    auto member = join(*ledger);
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        bool granted = false;
        while (member->lease(1, granted).ok() && member->add_committed(1).ok()) {
        }
      });
    }
    std::this_thread::yield();
    CHECK(member->leave().ok());
    for (std::thread& thread : threads) thread.join();
    auto next = join(*ledger);  // takes the same slot; nothing of the one before lands in it
    MemberInfo info;
    REQUIRE(next->info(info).ok());
    CHECK(info.leased == 0);
    CHECK(info.committed == 0);
  }
}

TEST_CASE("a fork in the middle of everything leaves the child able to speak") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), kCapacity, 0);
  auto member = join(*ledger);
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      bool granted = false;
      while (!stop) {
        if (member->lease(1, granted).ok() && granted) (void)member->release(1);
      }
    });
  }
  for (int round = 0; round < 20; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a child that hangs is a child that fails
      bool granted = false;
      uint64_t bytes = 0;
      const bool refused = member->lease(1, granted).code == Code::lost &&
                           member->add_committed(1).code == Code::lost &&
                           ledger->available(bytes).code == Code::lost && member->leave().ok();
      std::unique_ptr<Ledger> own;
      std::unique_ptr<Member> share;
      const bool attached = Ledger::open(dir.ledger(), std::nullopt, std::nullopt, own).ok() &&
                            own->attach(member->slot(), member->generation(), share).ok() &&
                            share->release(0).ok() && share->leave().ok();
      _exit(refused && attached ? 0 : 1);
    }
    REQUIRE(child > 0);
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(status == 0);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  CHECK(lease(*member, kCapacity));
}

}  // namespace
}  // namespace kvc
