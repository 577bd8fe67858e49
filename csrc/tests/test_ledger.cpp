// SPDX-License-Identifier: Apache-2.0
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstddef>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../src/ledger_file.h"
#include "temp_dir.h"

namespace kvc {
namespace {

Status try_open(const std::string& path, std::optional<int64_t> capacity = 1000,
                std::optional<int64_t> headroom = std::nullopt) {
  std::unique_ptr<Ledger> ledger;
  Status status = Ledger::open(path, capacity, headroom, ledger);
  CHECK(status.ok() == (ledger != nullptr));
  CHECK(status.ok() == status.what.empty());
  return status;
}

bool mentions(const Status& status, const std::string& text) {
  return status.what.find(text) != std::string::npos;
}

MemberInfo info(Member& member) {
  MemberInfo out;
  REQUIRE(member.info(out).ok());
  return out;
}

std::vector<MemberInfo> members(Ledger& ledger) {
  std::vector<MemberInfo> out;
  REQUIRE(ledger.members(out).ok());
  return out;
}

// The file as another, possibly hostile, process of the same user sees it.
struct Raw {
  explicit Raw(const std::string& path) {
    const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
    REQUIRE(fd >= 0);
    void* mapped = mmap(nullptr, sizeof(ledger::File), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REQUIRE(mapped != MAP_FAILED);
    close(fd);
    file = static_cast<ledger::File*>(mapped);
  }
  ~Raw() { munmap(static_cast<void*>(file), sizeof(ledger::File)); }
  ledger::File* file;
};

TEST_CASE("leases are all or nothing and never exceed the capacity") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000, 100);
  auto b = open_ledger(dir.ledger(), 1000);
  CHECK(b->headroom() == 100);
  auto one = join(*a, "one");
  auto two = join(*b, "two", 200);
  CHECK(available(*a) == 700);
  CHECK(lease(*one, 600));
  CHECK_FALSE(lease(*two, 101));
  CHECK(info(*two).leased == 0);
  CHECK(lease(*two, 100));
  CHECK_FALSE(lease(*one, 1));
  CHECK(lease(*one, 0));
  CHECK(available(*b) == 0);
  CHECK(leased(*b) == 700);
  REQUIRE(one->release(600).ok());
  CHECK(available(*b) == 600);
}

TEST_CASE("a lease of what there is comes in whole quanta") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  int64_t granted = -1;
  REQUIRE(m->lease_up_to(95, 10, granted).ok());
  CHECK(granted == 90);
  REQUIRE(m->lease_up_to(2000, 300, granted).ok());
  CHECK(granted == 900);
  REQUIRE(m->lease_up_to(50, 20, granted).ok());
  CHECK(granted == 0);
  CHECK(m->lease_up_to(50, 0, granted).code == Code::invalid_argument);
  CHECK(info(*m).leased == 990);
}

TEST_CASE("wrong amounts are refused and change nothing") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  REQUIRE(lease(*m, 10));
  constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();
  bool granted = true;
  for (const int64_t wrong : {int64_t{-1}, kHuge, std::numeric_limits<int64_t>::min()}) {
    CHECK(m->lease(wrong, granted).code == Code::invalid_argument);
    CHECK(m->release(wrong).code == Code::invalid_argument);
    CHECK(m->add_committed(wrong).code == Code::invalid_argument);
    CHECK(m->set_parked(wrong).code == Code::invalid_argument);
    CHECK(m->set_static(wrong).code == Code::invalid_argument);
    CHECK(a->set_device_used(wrong).code == Code::invalid_argument);
  }
  CHECK(mentions(m->release(11), "only 10"));
  CHECK(info(*m).leased == 10);
  CHECK(info(*m).committed == 0);
  std::unique_ptr<Member> none;
  for (const std::string& name : {std::string(), std::string(96, 'x'), std::string("a\nb")}) {
    CHECK(a->join(name, 0, none).code == Code::invalid_argument);
  }
  CHECK(a->join("x", -1, none).code == Code::invalid_argument);
}

TEST_CASE("what members do not account for is external, and only the larger of it counts") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a, "m", 50);
  REQUIRE(m->add_committed(300).ok());
  REQUIRE(a->set_device_used(420).ok());
  CHECK(a->external() == 120);
  CHECK(available(*a) == 880);
  REQUIRE(m->add_committed(100).ok());  // the next total will know of it
  CHECK(a->external() == 120);
  REQUIRE(a->set_device_used(390).ok());
  CHECK(a->external() == 0);
  CHECK(available(*a) == 950);
  REQUIRE(m->set_static(2000).ok());
  CHECK(available(*a) == 0);
}

TEST_CASE("what a member was promised and has not taken counts, whoever else is on the device") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a, "m", 300);
  REQUIRE(m->set_to_come(100).ok());
  CHECK(available(*a) == 700);            // nobody knows what is in use: it is in the 300
  REQUIRE(a->set_device_used(500).ok());  // 200 of the member, 300 of others
  CHECK(available(*a) == 400);
  REQUIRE(m->set_to_come(40).ok());
  REQUIRE(a->set_device_used(560).ok());
  CHECK(available(*a) == 400);
  REQUIRE(m->set_to_come(5000).ok());  // no more than all its own
  CHECK(available(*a) == 140);
  CHECK(m->set_to_come(-1).code == Code::invalid_argument);
  CHECK(members(*a).at(0).to_come == 300);
}

TEST_CASE("a guess of what a member holds counts until the driver's figure is there") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a, "m", 300);
  REQUIRE(m->set_guessed(100).ok());
  CHECK(available(*a) == 700);
  REQUIRE(a->set_device_used(260).ok());  // it was 60
  CHECK(available(*a) == 740);
  REQUIRE(a->set_device_used(150).ok());  // from before it took what it says it holds
  CHECK(available(*a) == 800);
  CHECK(m->set_guessed(-1).code == Code::invalid_argument);
  CHECK(members(*a).at(0).guessed == 100);
}

TEST_CASE("a member shows what it published") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a, "vllm:some/model", 5);
  REQUIRE(m->add_committed(40).ok());
  REQUIRE(m->add_committed(-10).ok());
  REQUIRE(m->set_parked(3).ok());
  REQUIRE(m->set_cached(4).ok());
  REQUIRE(m->set_demand(6).ok());
  const MemberInfo seen = members(*a).at(0);
  CHECK(seen.name == "vllm:some/model");
  CHECK(seen.pid == getpid());
  CHECK(seen.alive);
  CHECK(seen.committed == 30);
  CHECK(seen.parked == 3);
  CHECK(seen.cached == 4);
  CHECK(seen.static_bytes == 5);
  CHECK(seen.demand == 6);
  CHECK(seen.started > 1e9);
  uint64_t demand = 0;
  REQUIRE(a->total_demand(-1, demand).ok());
  CHECK(demand == 6);
  REQUIRE(a->total_demand(m->slot(), demand).ok());
  CHECK(demand == 0);
}

TEST_CASE("a slot is free once the last process of its member left") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto leader = join(*a);
  auto b = open_ledger(dir.ledger());
  std::unique_ptr<Member> worker;
  REQUIRE(b->attach(leader->slot(), leader->generation(), worker).ok());
  REQUIRE(lease(*leader, 100));
  REQUIRE(worker->release(40).ok());  // one account
  REQUIRE(leader->leave().ok());
  REQUIRE(leader->leave().ok());  // again, harmlessly
  bool granted = false;
  CHECK(leader->lease(1, granted).code == Code::lost);
  CHECK(leader->add_committed(1).code == Code::lost);
  CHECK(leased(*a) == 60);
  const uint64_t old = worker->generation();
  worker.reset();
  CHECK(leased(*a) == 0);
  CHECK(members(*a).empty());
  // The slot's next member is not the one before.
  auto next = join(*a);
  CHECK(next->slot() == 0);
  CHECK(b->attach(0, old, worker).code == Code::lost);
  CHECK(b->attach(0, 0, worker).code == Code::lost);
  CHECK(b->attach(1, 1, worker).code == Code::lost);
  CHECK(b->attach(64, 1, worker).code == Code::invalid_argument);
  CHECK(b->attach(-1, 1, worker).code == Code::invalid_argument);
}

TEST_CASE("two members and two processes of one member may share a Ledger object") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto one = join(*a, "one");
  auto two = join(*a, "two");
  std::unique_ptr<Member> again;
  REQUIRE(a->attach(one->slot(), one->generation(), again).ok());
  REQUIRE(lease(*one, 10));
  one.reset();
  CHECK(members(*a).size() == 2);
  CHECK(members(*a).at(0).alive);
  again.reset();
  CHECK(members(*a).size() == 1);
  a.reset();  // a member outlives the object it was made by
  CHECK(lease(*two, 1000));
}

TEST_CASE("all slots taken is a clear refusal") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  std::vector<std::unique_ptr<Member>> all;
  for (int i = 0; i < 64; ++i) all.push_back(join(*a));
  std::unique_ptr<Member> more;
  const Status status = a->join("one too many", 0, more);
  CHECK(status.code == Code::not_supported);
  CHECK(mentions(status, "64 slots"));
  all[17].reset();
  CHECK(join(*a)->slot() == 17);
}

TEST_CASE("numbers that differ are refused while members live, and replace the old after") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000, 10);
  auto m = join(*a);
  REQUIRE(a->set_device_used(77).ok());
  CHECK(mentions(try_open(dir.ledger(), 2000), "capacity of 1000 bytes, not 2000"));
  CHECK(mentions(try_open(dir.ledger(), 1000, 20), "headroom of 10 bytes, not 20"));
  m.reset();
  auto b = open_ledger(dir.ledger(), 2000, 20);
  CHECK(a->capacity() == 2000);
  CHECK(a->headroom() == 20);
  CHECK(a->external() == 0);
  std::unique_ptr<Member> none;
  CHECK(mentions(a->join("late", 0, none), "capacity of 2000 bytes, not 1000"));
  CHECK(join(*b) != nullptr);
  for (const int64_t wrong : {int64_t{0}, int64_t{-5}, std::numeric_limits<int64_t>::max()}) {
    CHECK(try_open(dir.ledger(), wrong).code == Code::invalid_argument);
  }
  CHECK(try_open(dir.ledger(), 100, 101).code == Code::invalid_argument);
}

TEST_CASE("what is not safely ours is refused with the remedy") {
  const TempDir dir;
  const std::string path = dir.ledger();
  SUBCASE("a symbolic link") {
    REQUIRE(symlink("/dev/shm/elsewhere", path.c_str()) == 0);
    CHECK(mentions(try_open(path), "symbolic link"));
  }
  SUBCASE("a linked directory") {
    REQUIRE(symlink(dir.path.c_str(), (dir.path + "/link").c_str()) == 0);
    CHECK(mentions(try_open(dir.path + "/link/ledger"), "symbolic link"));
  }
  SUBCASE("a second name") {
    {
      auto a = open_ledger(path, 1000);
    }
    REQUIRE(link(path.c_str(), (dir.path + "/other").c_str()) == 0);
    CHECK(mentions(try_open(path), "more than one name"));
  }
  SUBCASE("a file that others may read") {
    {
      auto a = open_ledger(path, 1000);
    }
    REQUIRE(chmod(path.c_str(), 0640) == 0);
    CHECK(mentions(try_open(path), "chmod 600"));
  }
  SUBCASE("a directory that others may enter") {
    REQUIRE(chmod(dir.path.c_str(), 0755) == 0);
    CHECK(mentions(try_open(path), "chmod 700"));
  }
  SUBCASE("a fifo") {
    REQUIRE(mkfifo(path.c_str(), 0600) == 0);
    CHECK(mentions(try_open(path), "not a regular file"));
  }
  SUBCASE("a directory") {
    REQUIRE(mkdir(path.c_str(), 0700) == 0);
    CHECK_FALSE(try_open(path).ok());
  }
  SUBCASE("nothing there, and none asked to be made") {
    CHECK(mentions(try_open(path, std::nullopt), "start an engine first"));
    CHECK_FALSE(std::filesystem::exists(path));
  }
  SUBCASE("no file name") { CHECK_FALSE(try_open(dir.path + "/").ok()); }
  SUBCASE("somebody else's") {
    if (geteuid() == 0) {
      {
        auto a = open_ledger(path, 1000);
      }
      REQUIRE(chown(path.c_str(), 12345, 12345) == 0);
      CHECK(mentions(try_open(path), "belongs to user 12345"));
      REQUIRE(chown(dir.path.c_str(), 12345, 12345) == 0);
      CHECK(mentions(try_open(path), "belongs to user 12345"));
    } else {
      MESSAGE("only root can give a file away");
    }
  }
}

TEST_CASE("the directory and the file are made for their owner only") {
  const TempDir dir;
  const std::string path = dir.path + "/new/ledger";
  auto a = open_ledger(path, 1000);
  struct stat info = {};
  REQUIRE(stat((dir.path + "/new").c_str(), &info) == 0);
  CHECK((info.st_mode & 07777) == 0700);
  REQUIRE(stat(path.c_str(), &info) == 0);
  CHECK((info.st_mode & 07777) == 0600);
}

TEST_CASE("a file that is no ledger is left alone") {
  const TempDir dir;
  const std::string text(50000, 'x');
  for (const size_t size : {size_t{1}, size_t{63}, size_t{4096}, text.size()}) {
    {
      std::ofstream file(dir.ledger(), std::ios::binary);
      file << text.substr(0, size);
    }
    REQUIRE(chmod(dir.ledger().c_str(), 0600) == 0);
    CHECK(mentions(try_open(dir.ledger()), "is not a ledger"));
    CHECK(std::filesystem::file_size(dir.ledger()) == size);
  }
}

TEST_CASE("a truncated file is refused, a blank one is finished") {
  const TempDir dir;
  for (const off_t size : {64, 100, 4096, 10000}) {
    {
      auto a = open_ledger(dir.ledger(), 1000);
    }
    REQUIRE(truncate(dir.ledger().c_str(), size) == 0);
    CHECK(mentions(try_open(dir.ledger()), "damaged"));
    std::filesystem::remove(dir.ledger());
  }
  for (const off_t size : {0, 1, 4096, 100000}) {
    std::ofstream(dir.ledger()).close();
    REQUIRE(chmod(dir.ledger().c_str(), 0600) == 0);
    REQUIRE(truncate(dir.ledger().c_str(), size) == 0);
    CHECK_FALSE(try_open(dir.ledger(), std::nullopt).ok());
    auto a = open_ledger(dir.ledger(), 1000);
    CHECK(lease(*join(*a), 1000));
    std::filesystem::remove(dir.ledger());
  }
}

TEST_CASE("another format is rebuilt if unused, and refused if used") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  Raw raw(dir.ledger());
  SUBCASE("older") { raw.file->header.version.store(1); }
  SUBCASE("unfinished") { raw.file->header.version.store(0); }
  SUBCASE("newer") { raw.file->header.version.store(ledger::kVersion + 1); }
  SUBCASE("other layout") { raw.file->header.layout ^= 1; }
  const Status refused = try_open(dir.ledger());
  CHECK(refused.code == Code::not_supported);
  CHECK(mentions(refused, "one release"));
  const bool same_version = raw.file->header.version.load() == ledger::kVersion;
  m.reset();
  CHECK(mentions(try_open(dir.ledger(), std::nullopt), "start an engine"));
  auto b = open_ledger(dir.ledger(), 2000);
  CHECK(lease(*join(*b), 2000));
  uint64_t bytes = 0;
  if (!same_version) CHECK(mentions(a->available(bytes), "restart this process"));
}

TEST_CASE("impossible values are reported while in use and dropped when not") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  auto n = join(*a);
  auto o = join(*a);
  Raw raw(dir.ledger());
  ledger::Header& header = raw.file->header;
  ledger::Slot& other = raw.file->slots[n->slot()];
  constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();
  SUBCASE("leases") { other.leased.store(kHuge); }
  SUBCASE("leases that add up to too much") {
    other.leased.store(1000);
    raw.file->slots[o->slot()].leased.store(1);
  }
  SUBCASE("committed bytes") { other.committed.store(kHuge); }
  SUBCASE("a guarantee") { other.guarantee.store(kHuge); }
  SUBCASE("a limit") { other.limit.store(kHuge - 1); }
  SUBCASE("a weight") { other.weight.store(ledger::kMaxWeight + 1); }
  SUBCASE("a priority") { other.priority.store(ledger::kMaxPriority + 1); }
  SUBCASE("returning bytes") { other.returning.store(kHuge); }
  SUBCASE("demand") { other.demand.store(kHuge); }
  SUBCASE("the capacity") { header.capacity.store(kHuge); }
  SUBCASE("no capacity") {
    header.capacity.store(0);
    header.headroom.store(1);
  }
  SUBCASE("the headroom") { header.headroom.store(kHuge); }
  SUBCASE("the external use") { header.external.store(kHuge); }
  bool granted = false;
  uint64_t bytes = 0;
  CHECK(mentions(m->lease(1, granted), "damaged"));
  CHECK_FALSE(granted);
  CHECK(mentions(a->available(bytes), "damaged"));
  std::vector<MemberInfo> seen;
  CHECK(a->members(seen).ok());  // to look at it is safe
  m.reset();
  n.reset();
  o.reset();
  auto b = open_ledger(dir.ledger(), 1000);
  CHECK(lease(*join(*b), 1000));
}

TEST_CASE("impossible values of a dead member go with it") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  Raw raw(dir.ledger());
  ledger::Slot& dead = raw.file->slots[9];
  dead.leased.store(std::numeric_limits<uint64_t>::max());
  dead.generation.store(5);
  CHECK(lease(*m, 1));
  CHECK(dead.generation.load() == 0);
  dead.generation.store(5);
  m.reset();
  auto b = open_ledger(dir.ledger(), 1000);
  CHECK(available(*b) == 1000);
}

TEST_CASE("a slot that is taken from its living member is noticed") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  Raw raw(dir.ledger());
  raw.file->slots[m->slot()].generation.store(99);
  bool granted = false;
  CHECK(m->lease(1, granted).code == Code::lost);
  CHECK_FALSE(granted);
  REQUIRE(m->leave().ok());
  CHECK(raw.file->slots[0].generation.load() == 99);  // not ours to free
}

TEST_CASE("a name of any bytes is shown harmlessly") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  Raw raw(dir.ledger());
  for (char& c : raw.file->slots[0].name) c = '\xff';
  CHECK(info(*m).name == std::string(ledger::kNameBytes, '?'));
}

TEST_CASE("a ledger that was deleted and made anew is noticed") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  std::filesystem::remove(dir.ledger());
  std::vector<MemberInfo> reaped;
  CHECK(a->reap(reaped).code == Code::lost);
  auto b = open_ledger(dir.ledger(), 1000);
  std::unique_ptr<Member> none;
  CHECK(mentions(a->join("late", 0, none), "deleted or replaced"));
  CHECK(mentions(a->attach(m->slot(), m->generation(), none), "deleted or replaced"));
  CHECK(lease(*m, 1000));  // what is held stays
}

TEST_CASE("a ledger that is deleted while it is being opened is not used") {
  const TempDir dir;
  {
    auto before = open_ledger(dir.ledger(), 1000);
  }
  ledger::LockFd holder;
  REQUIRE(holder.open(AT_FDCWD, dir.ledger().c_str(), O_RDWR) == 0);
  REQUIRE(holder.try_lock(ledger::kMutexByte, true) == 0);
  std::unique_ptr<Ledger> opened;
  Status status;
  std::thread opener([&] { status = Ledger::open(dir.ledger(), 1000, std::nullopt, opened); });
  // Once it waits for the lock it has the old file open; if it is slower it sees the new one.
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  std::filesystem::remove(dir.ledger());
  holder.close();
  opener.join();
  REQUIRE_MESSAGE(status.ok(), status.what);
  CHECK(join(*opened) != nullptr);
  CHECK(std::filesystem::exists(dir.ledger()));
}

TEST_CASE("a free slot whose byte is held is not given out") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  ledger::LockFd stray;
  REQUIRE(stray.open(AT_FDCWD, dir.ledger().c_str(), O_RDWR) == 0);
  REQUIRE(stray.try_lock(ledger::kMemberBytes, false) == 0);
  CHECK(join(*a)->slot() == 1);
}

TEST_CASE("a path is absolute from the moment it is opened") {
  const TempDir dir;
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(dir.path);
  auto a = open_ledger("ledger", 1000);
  std::filesystem::current_path(before);
  CHECK(a->path() == dir.ledger());
  CHECK(join(*a) != nullptr);
}

TEST_CASE("a holder that is stopped makes others fail, not hang") {
  const TempDir dir;
  auto a = open_ledger(dir.ledger(), 1000);
  auto m = join(*a);
  ledger::LockFd holder;
  REQUIRE(holder.open(AT_FDCWD, dir.ledger().c_str(), O_RDWR) == 0);
  REQUIRE(holder.try_lock(ledger::kMutexByte, true) == 0);
  const auto usual = std::exchange(ledger::Section::patience, std::chrono::milliseconds(20));
  bool granted = true;
  CHECK(mentions(m->lease(1, granted), "frozen"));
  CHECK_FALSE(granted);
  CHECK(m->add_committed(1).ok());  // needs no lock
  ledger::Section::patience = usual;
  holder.close();
  CHECK(lease(*m, 1));
}

}  // namespace
}  // namespace kvc
