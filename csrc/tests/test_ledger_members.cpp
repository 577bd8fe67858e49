// SPDX-License-Identifier: Apache-2.0
// Policies, asks, bells and records as the processes of a ledger see them.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <csignal>
#include <functional>
#include <iostream>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../src/ledger_account.h"
#include "../src/ledger_file.h"
#include "temp_dir.h"

namespace kvc {
namespace {

using std::chrono::milliseconds;

bool mentions(const Status& status, const std::string& text) {
  return status.what.find(text) != std::string::npos;
}

MemberInfo info(Member& member) {
  MemberInfo out;
  REQUIRE(member.info(out).ok());
  return out;
}

std::pair<uint64_t, uint64_t> ask(Member& member) {
  std::pair<uint64_t, uint64_t> out;
  REQUIRE(member.ask(out.first, out.second).ok());
  return out;
}

bool others_wait(Member& member) {
  bool wait = false;
  REQUIRE(member.others_wait(wait).ok());
  return wait;
}

uint64_t claimable(Member& member) {
  uint64_t out = 0;
  REQUIRE(member.claimable(out).ok());
  return out;
}

uint32_t bell(Member& member) {
  uint32_t out = 0;
  REQUIRE(member.bell(out).ok());
  return out;
}

Status change(Ledger& ledger, Member& member, const PolicyChange& policy) {
  uint64_t version = 0;
  return ledger.set_policy(member.slot(), member.generation(), policy, version);
}

PolicyChange of(std::optional<int64_t> PolicyChange::* field, int64_t value) {
  PolicyChange policy;
  policy.*field = value;
  return policy;
}

std::vector<LedgerEvent> events(Ledger& ledger, const std::string& kind = "") {
  std::vector<LedgerEvent> out;
  REQUIRE(ledger.events(0, out).ok());
  if (!kind.empty()) std::erase_if(out, [&](const auto& event) { return event.kind != kind; });
  return out;
}

// The file as another process of the same user sees it.
struct Raw {
  explicit Raw(const std::string& path) {
    const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    void* mapped = mmap(nullptr, sizeof(ledger::File), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(mapped != MAP_FAILED);
    close(fd);
    file = static_cast<ledger::File*>(mapped);
  }
  ~Raw() { munmap(static_cast<void*>(file), sizeof(ledger::File)); }
  ledger::Slot& slot(const Member& member) const { return file->slots[member.slot()]; }
  // As if a time of the slot had been stamped so much earlier.
  static void age(ledger::Word& stamp, int64_t ns) {
    stamp.store(stamp.load() - static_cast<uint64_t>(ns));
  }
  ledger::File* file;
};

TEST_CASE("who joins without a policy has one that constrains nothing") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  const MemberInfo seen = info(*m);
  CHECK_FALSE(seen.limit.has_value());
  CHECK_FALSE(seen.cache_limit.has_value());
  CHECK(seen.weight == 100);
  CHECK(seen.guarantee + seen.priority + seen.asked + seen.asked_running + seen.returning == 0);
  CHECK(seen.desired_version == 1);
  CHECK(seen.observed_version == 1);
  CHECK_FALSE(seen.trim_pending);
  CHECK(seen.idle_s < 5);
  CHECK(claimable(*m) == 1000);
}

TEST_CASE("a policy takes effect for leases at once, and is acknowledged later") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  auto n = join(*a);
  REQUIRE(lease(*m, 500));
  REQUIRE(m->set_cached(200).ok());
  const uint32_t before = bell(*m);
  uint64_t version = 0;
  PolicyChange policy = of(&PolicyChange::limit, 250);
  REQUIRE(a->set_policy(m->slot(), m->generation(), policy, version).ok());
  CHECK(version == 2);
  CHECK(bell(*m) != before);
  CHECK_FALSE(lease(*m, 1));
  CHECK(ask(*m) == std::pair<uint64_t, uint64_t>{200, 50});
  Policy now;
  REQUIRE(m->policy(now).ok());
  CHECK(now.limit == 250);
  CHECK(now.version == 2);
  CHECK(now.observed == 1);
  CHECK(m->observe(3).code == Code::invalid_argument);
  REQUIRE(m->observe(2).ok());
  CHECK(info(*m).observed_version == 2);
  // The same once more changes nothing, so there is nothing to acknowledge.
  REQUIRE(a->set_policy(m->slot(), m->generation(), policy, version).ok());
  CHECK(version == 2);
  policy.expected_version = 1;
  policy.weight = 5;
  const Status conflict = a->set_policy(m->slot(), m->generation(), policy, version);
  CHECK(conflict.code == Code::refused);
  CHECK(mentions(conflict, "version 2, not 1"));
  CHECK(info(*m).weight == 100);
  REQUIRE(change(*a, *m, of(&PolicyChange::limit, -1)).ok());
  CHECK_FALSE(info(*m).limit.has_value());
  CHECK(ask(*m).second == 0);
  CHECK(a->set_policy(n->slot(), n->generation() + 1, policy, version).code == Code::lost);
  CHECK(a->set_policy(-1, 1, policy, version).code == Code::invalid_argument);
  CHECK(events(*a, "policy").size() == 2);
  CHECK(events(*a, "policy")[0].text == "limit none to 250");
}

TEST_CASE("numbers no policy may have are refused with what may be") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  const struct {
    std::optional<int64_t> PolicyChange::* field;
    int64_t value;
    const char* remedy;
  } wrong[] = {{&PolicyChange::weight, 0, "1 to 10000"},
               {&PolicyChange::weight, 10001, "1 to 10000"},
               {&PolicyChange::priority, -1, "0 to 100"},
               {&PolicyChange::priority, 101, "0 to 100"},
               {&PolicyChange::guarantee, -1, "0 to 2^56"},
               {&PolicyChange::limit, -2, "-1 for none"},
               {&PolicyChange::cache_limit, std::numeric_limits<int64_t>::max(), "-1 for none"}};
  for (const auto& entry : wrong) {
    const Status status = change(*a, *m, of(entry.field, entry.value));
    CHECK(status.code == Code::invalid_argument);
    CHECK(mentions(status, entry.remedy));
    std::unique_ptr<Member> none;
    CHECK(a->join("x", 0, of(entry.field, entry.value), none).code == Code::invalid_argument);
  }
  REQUIRE(change(*a, *m, of(&PolicyChange::guarantee, 300)).ok());
  CHECK(mentions(change(*a, *m, of(&PolicyChange::limit, 299)), "below the guarantee of 300"));
  REQUIRE(change(*a, *m, of(&PolicyChange::limit, 300)).ok());
  CHECK(mentions(change(*a, *m, of(&PolicyChange::guarantee, 301)), "limit of 300"));
  PolicyChange both = of(&PolicyChange::guarantee, 500);
  both.limit = 600;
  REQUIRE(change(*a, *m, both).ok());
  both = of(&PolicyChange::guarantee, 10);
  both.limit = 20;
  REQUIRE(change(*a, *m, both).ok());
  CHECK(info(*m).desired_version == 5);
}

TEST_CASE("guarantees and static bytes must fit, or the holders are named") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000, 100);
  std::unique_ptr<Member> one;
  std::unique_ptr<Member> two;
  REQUIRE(a->join("one", 50, of(&PolicyChange::guarantee, 400), one).ok());
  Status status = a->join("two", 50, of(&PolicyChange::guarantee, 401), two);
  CHECK(status.code == Code::refused);
  CHECK(mentions(status, "slot 0 (one) has a guarantee of 400 and 50 static"));
  CHECK(mentions(status, "ask for 400 at most"));
  CHECK(mentions(a->join("two", 460, {}, two), "stop a member"));
  REQUIRE(a->join("two", 50, of(&PolicyChange::guarantee, 400), two).ok());
  CHECK(claimable(*one) == 400);
  status = change(*a, *one, of(&PolicyChange::guarantee, 401));
  CHECK(status.code == Code::refused);
  CHECK(mentions(status, "(two)"));
  CHECK(info(*one).guarantee == 400);
  REQUIRE(change(*a, *one, of(&PolicyChange::guarantee, 300)).ok());
  REQUIRE(change(*a, *two, of(&PolicyChange::guarantee, 500)).ok());
  CHECK(events(*a, "refused").size() == 3);
  CHECK(events(*a, "refused")[0].name == "two");
  // Who claims nothing is let in, and finds what is left.
  auto three = join(*a, "three");
  CHECK(claimable(*three) == 0);
  two.reset();
  CHECK(claimable(*three) == 1000 - 100 - 50 - 300);
}

TEST_CASE("demand counts for five seconds") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a, "m");
  auto n = join(*a, "n");
  REQUIRE(lease(*m, 900));
  REQUIRE(m->set_cached(300).ok());
  const uint32_t before = bell(*m);
  REQUIRE(n->set_demand(250, 3).ok());
  CHECK(bell(*m) == before + 1);
  CHECK(info(*n).waiting == 3);
  CHECK(ask(*m) == std::pair<uint64_t, uint64_t>{150, 0});
  CHECK(others_wait(*m));
  CHECK_FALSE(others_wait(*n));
  CHECK(claimable(*m) == 0);
  CHECK(events(*a, "ask").at(0).text == "for slot 1, n");
  const Raw raw(dir.ledger());
  Raw::age(raw.slot(*n).demand_ns, 4'000'000'000);
  CHECK(ask(*m).first == 150);
  Raw::age(raw.slot(*n).demand_ns, 1'100'000'000);
  CHECK(ask(*m).first == 0);
  CHECK_FALSE(others_wait(*m));
  CHECK(claimable(*m) == 100);
  CHECK(info(*n).demand == 0);
  uint64_t sum = 1;
  REQUIRE(a->total_demand(-1, sum).ok());
  CHECK(sum == 0);
  REQUIRE(n->set_demand(250).ok());  // which is a rise
  CHECK(info(*m).asked == 150);
  for (const uint64_t stamp : {uint64_t{0}, ~uint64_t{0}, uint64_t{1} << 63}) {
    raw.slot(*n).demand_ns.store(stamp);
    CHECK(ask(*m).first == 0);
  }
}

TEST_CASE("who does not answer in time is passed over, reported, and tried again") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto slow = join(*a, "slow");
  auto other = join(*a, "other");
  auto needy = join(*a, "needy");
  REQUIRE(lease(*slow, 600));
  REQUIRE(slow->set_cached(600).ok());
  REQUIRE(lease(*other, 400));
  REQUIRE(other->set_parked(400).ok());
  REQUIRE(other->set_parked(0).ok());
  REQUIRE(other->set_cached(400).ok());
  REQUIRE(needy->set_demand(200).ok());
  const Raw raw(dir.ledger());
  CHECK(info(*slow).asked == 200);
  Raw::age(raw.slot(*slow).ask_since_ns, 600'000'000);
  CHECK(ask(*slow).first == 200);
  // What it decommits is an answer, though its workers have not released it yet.
  REQUIRE(slow->set_returning(50).ok());
  CHECK(ask(*slow).first == 150);
  Raw::age(raw.slot(*slow).ask_since_ns, 600'000'000);
  CHECK(ask(*slow).first == 150);
  CHECK(info(*slow).passed_over == 0);
  Raw::age(raw.slot(*slow).ask_since_ns, 600'000'000);
  CHECK(ask(*needy).first == 0);
  CHECK(info(*slow).asked == 0);
  CHECK(info(*slow).passed_over == 1);
  CHECK(info(*other).asked == 150);
  CHECK(events(*a, "passed_over").at(0).name == "slow");
  Raw::age(raw.slot(*slow).passed_until_ns, 3'100'000'000);
  CHECK(ask(*slow).first == 150);
  CHECK(ask(*other).first == 0);
  CHECK(ask(*slow).first == 150);  // it has time again
  CHECK(info(*slow).passed_over == 1);
  // Stamps nobody wrote keep nobody out of the plan.
  raw.slot(*slow).passed_until_ns.store(uint64_t{1} << 62);
  for (const uint64_t stamp : {~uint64_t{0}, uint64_t{1} << 62, uint64_t{1} << 63}) {
    raw.slot(*slow).ask_since_ns.store(stamp);
    raw.slot(*slow).touched_ns.store(stamp);
    CHECK(ask(*slow).first == 150);
  }
}

TEST_CASE("an ask nobody has a use for any more is withdrawn, not held against its member") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a, "m");
  auto n = join(*a, "n");
  REQUIRE(lease(*m, 1000));
  REQUIRE(m->set_cached(500).ok());
  REQUIRE(n->set_demand(100).ok());
  CHECK(info(*m).asked == 100);
  REQUIRE(n->set_demand(0).ok());
  CHECK(info(*m).asked == 0);
  REQUIRE(n->set_demand(100).ok());
  CHECK(info(*m).asked == 100);
  n.reset();
  CHECK(info(*m).asked == 0);
  CHECK(info(*m).passed_over == 0);
}

TEST_CASE("foreign memory that grows into what was promised is asked back") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  REQUIRE(lease(*m, 800));
  REQUIRE(m->add_committed(800).ok());
  REQUIRE(m->set_cached(30).ok());
  REQUIRE(a->set_device_used(1050).ok());
  uint64_t over = 0;
  REQUIRE(a->overdraft(over).ok());
  CHECK(over == 50);
  CHECK(available(*a) == 0);
  CHECK(info(*m).asked == 30);
  CHECK(info(*m).asked_running == 20);
  REQUIRE(a->set_device_used(1060).ok());
  CHECK(events(*a, "overdraft").size() == 1);  // it was one already
  REQUIRE(a->set_device_used(900).ok());
  REQUIRE(a->overdraft(over).ok());
  CHECK(over == 0);
  CHECK(info(*m).asked == 0);
}

TEST_CASE("bytes that are about to be mapped hide nothing that is in use") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto owner = join(*a, "owner");
  auto waking = join(*a, "waking");
  REQUIRE(a->set_device_used(500).ok());
  REQUIRE(lease(*waking, 300));
  REQUIRE(waking->set_unmapped(300).ok());
  REQUIRE(waking->add_committed(300).ok());
  for (const int64_t used : {500, 650, 800}) {
    REQUIRE(a->set_device_used(used).ok());
    CHECK(a->external() == 500);
    CHECK(available(*a) == 200);
  }
  REQUIRE(a->set_device_used(900).ok());  // by others
  CHECK(a->external() == 600);
  REQUIRE(a->set_device_used(800).ok());
  CHECK(a->external() == 600);  // maybe; it is known when all is mapped
  const uint64_t reading = a->reading();
  REQUIRE(owner->adopt(*waking, 300).ok());
  CHECK(a->external() == 900);
  CHECK(available(*a) == 100);
  REQUIRE(a->set_device_used(550, reading).ok());
  CHECK(a->external() == 900);
  REQUIRE(a->set_device_used(800, a->reading()).ok());
  CHECK(a->external() == 800);
  CHECK(available(*a) == 200);
  CHECK(waking->set_unmapped(-1).code == Code::invalid_argument);
}

TEST_CASE("where no driver tells what is in use, static bytes are all there is") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto owner = join(*a, "owner");
  auto waking = join(*a, "waking");
  REQUIRE(lease(*waking, 300));
  REQUIRE(waking->add_committed(300).ok());
  REQUIRE(owner->adopt(*waking, 300).ok());
  CHECK(available(*a) == 700);
  REQUIRE(owner->add_static(-300).ok());
  CHECK(available(*a) == 1000);
}

TEST_CASE("a trim waits for its member") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  uint64_t version = 0;
  Policy policy;
  REQUIRE(a->trim(m->slot(), m->generation(), 70, true, version).ok());
  REQUIRE(m->policy(policy).ok());
  REQUIRE(policy.trim.has_value());
  CHECK(policy.trim->version == version);
  CHECK(policy.trim->bytes == 70);
  CHECK(policy.trim->cached);
  CHECK(info(*m).trim_pending);
  const uint64_t first = version;
  REQUIRE(a->trim(m->slot(), m->generation(), -1, false, version).ok());
  REQUIRE(m->trim_done(first).ok());  // of the one it was about; the new one is pending
  REQUIRE(m->policy(policy).ok());
  REQUIRE(policy.trim.has_value());
  CHECK_FALSE(policy.trim->bytes.has_value());
  REQUIRE(m->trim_done(version).ok());
  CHECK_FALSE(info(*m).trim_pending);
  CHECK(a->trim(m->slot(), m->generation(), -2, false, version).code == Code::invalid_argument);
  CHECK(a->trim(m->slot(), 99, -1, false, version).code == Code::lost);
}

TEST_CASE("calm is who nobody wants anything of") {
  const TempDir dir;
  auto ledger = open_ledger(dir.ledger(), 1000);
  auto holder = join(*ledger, "holder");
  auto other = join(*ledger, "other");
  const auto calm = [](Member& member) {
    bool out = false;
    REQUIRE(member.calm(out).ok());
    return out;
  };
  bool granted = false;
  uint64_t bytes = 0;
  REQUIRE(holder->lease(1000, granted).ok());
  REQUIRE(holder->leased(bytes).ok());
  CHECK(bytes == 1000);
  REQUIRE(holder->set_parked(400).ok());
  CHECK(calm(*holder));

  // Its own demand is no claim on a member.
  REQUIRE(other->set_demand(100).ok());
  CHECK_FALSE(calm(*holder));
  CHECK(calm(*other));
  CHECK(ask(*holder).first == 100);
  REQUIRE(other->set_demand(0).ok());
  CHECK(calm(*holder));

  // What others take of the device is asked back without anybody's demand.
  REQUIRE(ledger->set_device_used(300).ok());
  CHECK_FALSE(calm(*holder));
  REQUIRE(ledger->set_device_used(0).ok());
  CHECK(calm(*holder));

  uint64_t version = 0;
  REQUIRE(ledger->trim(holder->slot(), holder->generation(), 10, false, version).ok());
  CHECK_FALSE(calm(*holder));
  REQUIRE(holder->trim_done(version).ok());
  CHECK(calm(*holder));

  PolicyChange change;
  change.weight = 50;
  REQUIRE(ledger->set_policy(holder->slot(), holder->generation(), change, version).ok());
  CHECK_FALSE(calm(*holder));
  REQUIRE(holder->observe(version).ok());
  CHECK(calm(*holder));

  REQUIRE(holder->leave().ok());
  bool out = false;
  CHECK(holder->calm(out).code == Code::lost);
  CHECK(holder->leased(bytes).code == Code::lost);
}

TEST_CASE("bytes that come back ring for those who wait, whoever they come from") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto giver = join(*a, "giver");
  auto needy = join(*a, "needy");
  auto calm = join(*a, "calm");
  REQUIRE(lease(*giver, 1000));
  REQUIRE(needy->set_demand(100).ok());
  uint32_t seen = bell(*needy);
  const uint32_t calm_seen = bell(*calm);
  REQUIRE(giver->release(0).ok());
  CHECK(bell(*needy) == seen);
  REQUIRE(giver->release(1).ok());
  CHECK(bell(*needy) == seen + 1);
  SUBCASE("by release") { REQUIRE(giver->release(10).ok()); }
  SUBCASE("by leaving") { REQUIRE(giver->leave().ok()); }
  SUBCASE("by dying") {
    const Raw raw(dir.ledger());
    raw.file->slots[9].leased.store(0);
    raw.file->slots[9].generation.store(5);  // nobody holds its byte
    std::vector<MemberInfo> reaped;
    REQUIRE(a->reap(reaped).ok());
    CHECK(events(*a, "died").size() == 1);
  }
  CHECK(bell(*needy) == seen + 2);
  CHECK(bell(*calm) == calm_seen);
}

struct Child {
  explicit Child(const std::function<bool()>& body) {
    std::cout.flush();  // lest the child write it once more
    pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) _exit(body() ? 0 : 1);
  }
  int wait() {
    int status = -1;
    REQUIRE(waitpid(std::exchange(pid, -1), &status, 0) > 0);
    return status;
  }
  ~Child() {
    if (pid > 0 && ::kill(pid, SIGKILL) == 0) waitpid(pid, nullptr, 0);
  }
  pid_t pid = -1;
};

TEST_CASE("a bell wakes another process, at once") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  auto other = join(*a);
  for (int round = 0; round < 50; ++round) {
    const uint32_t seen = bell(*m);
    Child child([&] {
      std::unique_ptr<Ledger> own;
      std::unique_ptr<Member> share;
      uint32_t now = 0;
      return Ledger::open(dir.ledger(), std::nullopt, std::nullopt, own).ok() &&
             own->attach(m->slot(), m->generation(), share).ok() &&
             share->wait_bell(seen, 20'000, now).ok() && now != seen;
    });
    // Sometimes before it waits, sometimes while it does.
    std::this_thread::sleep_for(milliseconds(round % 5));
    const auto start = std::chrono::steady_clock::now();
    uint64_t version = 0;
    REQUIRE(a->trim(m->slot(), m->generation(), -1, false, version).ok());
    CHECK(child.wait() == 0);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
  }
}

TEST_CASE("waiting for a bell ends in time, and when the member leaves") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  uint32_t now = 0;
  const auto start = std::chrono::steady_clock::now();
  REQUIRE(m->wait_bell(bell(*m), 30, now).ok());
  CHECK(std::chrono::steady_clock::now() - start >= milliseconds(30));
  CHECK(now == bell(*m));
  REQUIRE(m->wait_bell(bell(*m) + 1, 100'000, now).ok());
  REQUIRE(m->wait_bell(bell(*m), -5, now).ok());
  Status status;
  std::thread waiter([&] { status = m->wait_bell(bell(*m), 100'000, now); });
  std::this_thread::sleep_for(milliseconds(20));
  REQUIRE(m->leave().ok());
  waiter.join();
  CHECK(mentions(status, "has left"));
}

TEST_CASE("counters and times add up") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  REQUIRE(m->count(Counter::commits, 3).ok());
  REQUIRE(m->count(Counter::commits).ok());
  for (const double s : {0.0, 1e-5, 1.1e-5, 2e-5, 0.5, 5.0, 1e300, -1.0, std::nan("")}) {
    REQUIRE(m->time(Timed::map, s).ok());
  }
  const MemberInfo seen = info(*m);
  CHECK(seen.counters[static_cast<int>(Counter::commits)] == 4);
  const Histogram& map = seen.times[static_cast<int>(Timed::map)];
  CHECK(map.counts[0] == 4);
  CHECK(map.counts[1] == 2);
  CHECK(map.counts[16] == 1);
  CHECK(map.counts[19] == 2);
  CHECK(map.sum_s == doctest::Approx(1e6 + 5.5).epsilon(1e-6));
  CHECK(Histogram::bound(18) == doctest::Approx(2.62144));
  m.reset();
  CHECK(info(*join(*a)).counters[static_cast<int>(Counter::commits)] == 0);
}

TEST_CASE("the latest events are kept, in order") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  {
    auto m = join(*a, "m", 7);
    REQUIRE(lease(*m, 3));
  }
  std::vector<LedgerEvent> seen = events(*a);
  REQUIRE(seen.size() == 2);
  CHECK(seen[0].kind == "join");
  CHECK(seen[0].bytes == 7);
  CHECK(seen[1].kind == "leave");
  CHECK(seen[1].name == "m");
  CHECK(seen[1].bytes == 3);
  CHECK(seen[1].time > 1e9);
  for (int i = 0; i < 300; ++i) REQUIRE(a->note("preempt", i % 64, i).ok());
  seen = events(*a);
  REQUIRE(seen.size() == 256);
  CHECK(seen.front().seq == 302 - 255);
  CHECK(seen.back().bytes == 299);
  REQUIRE(a->events(300, seen).ok());
  CHECK(seen.size() == 2);
  CHECK(a->note("nonsense", 0, 0).code == Code::invalid_argument);
  CHECK(a->note("preempt", 64, 0).code == Code::invalid_argument);
  CHECK(a->note("preempt", -1, -1).code == Code::invalid_argument);
  // What nobody wrote is not shown, and text is harmless.
  const Raw raw(dir.ledger());
  ledger::Event& event = raw.file->events[302 % ledger::kEvents];
  for (char& c : event.text) c = '\x1b';
  event.slot = 1000;
  CHECK(events(*a).back().text == std::string(ledger::kTextBytes, '?'));
  CHECK(events(*a).back().slot == -1);
  event.kind = 77;
  CHECK(events(*a).size() == 255);
  raw.file->header.next_event.store(0);
  CHECK(events(*a).empty());
  raw.file->header.next_event.store(~uint64_t{0});
  REQUIRE(a->note("preempt", 0, 1).ok());
  REQUIRE(a->note("preempt", 0, 2).ok());
}

TEST_CASE("a file of version 1 is rebuilt if unused, and left alone if not") {
  const TempDir dir;
  // Its header, and as many bytes as it had.
  const auto write_old = [&] {
    const int fd = open(dir.ledger().c_str(), O_CREAT | O_RDWR | O_TRUNC | O_CLOEXEC, 0600);
    REQUIRE(fd >= 0);
    REQUIRE(ftruncate(fd, 4096 + 64 * 512) == 0);
    const uint64_t words[] = {
        ledger::kMagic, uint64_t{12345} << 32 | 1, 36864, 1000000, 0, 0, 0, 0, 1000};
    REQUIRE(pwrite(fd, words, sizeof(words), 0) == sizeof(words));
    close(fd);
  };
  write_old();
  std::unique_ptr<Ledger> none;
  ledger::LockFd old_member;
  REQUIRE(old_member.open(AT_FDCWD, dir.ledger().c_str(), O_RDWR) == 0);
  REQUIRE(old_member.try_lock(ledger::kMemberBytes + 3, false) == 0);
  const Status status = Ledger::open(dir.ledger(), 2000, std::nullopt, none);
  CHECK(status.code == Code::not_supported);
  CHECK(mentions(status, "its members are alive: stop them"));
  CHECK(std::filesystem::file_size(dir.ledger()) == 36864);
  old_member.close();
  CHECK(mentions(Ledger::open(dir.ledger(), std::nullopt, std::nullopt, none), "start an engine"));
  auto a = open_ledger(dir.ledger(), 2000);
  CHECK(a->version() == 2);
  CHECK(lease(*join(*a), 2000));
}

}  // namespace
}  // namespace kvc
