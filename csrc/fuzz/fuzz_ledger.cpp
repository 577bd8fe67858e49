// SPDX-License-Identifier: Apache-2.0
// A ledger file of any bytes: used or refused, never a crash, a hang, or more than its capacity.
//
// With clang: -fsanitize=fuzzer,address,undefined -DKVCACHED_LIBFUZZER. Without, main replays
// random mutations of a valid file: fuzz_ledger [rounds [seed]].
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "../src/ledger_format.h"
#include "kvcached/ledger.h"

namespace {

using namespace kvc;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "fuzz_ledger: %s\n", what);
  std::abort();
}

struct Scratch {
  Scratch() {
    const bool shm = access("/dev/shm", W_OK) == 0;
    std::string name = std::string(shm ? "/dev/shm" : "/tmp") + "/kvcached-fuzz-XXXXXX";
    require(mkdtemp(name.data()) != nullptr, "no scratch directory");
    directory = name;
  }
  ~Scratch() { std::filesystem::remove_all(directory); }
  std::string path() const { return directory + "/ledger"; }
  std::string directory;
};

const Scratch& scratch() {
  static const Scratch instance;
  return instance;
}

void write_file(const std::string& path, const uint8_t* data, size_t size, off_t offset) {
  const int fd = open(path.c_str(), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  require(fd >= 0, "cannot write the file");
  for (size_t done = 0; done < size;) {
    const ssize_t put = pwrite(fd, data + done, size - done, offset + static_cast<off_t>(done));
    require(put > 0, "cannot write the file");
    done += static_cast<size_t>(put);
  }
  close(fd);
}

void use_member(Ledger& ledger, Member& member) {
  bool granted = false;
  int64_t some = 0;
  uint64_t soft = 0;
  uint64_t running = 0;
  uint64_t claim = 0;
  uint64_t version = 0;
  Policy policy;
  MemberInfo info;
  (void)member.set_demand(1000, 1);
  if (member.claimable(claim).ok()) {
    require(claim <= ledger.capacity(), "more is claimable than the capacity");
    // Only a negative number can be refused as an argument; "not now" would be wrong.
    const Status status = member.lease(static_cast<int64_t>(claim), granted);
    require(!status.ok() || granted, "what is claimable cannot be leased");
  }
  (void)member.lease_up_to(int64_t{1} << 40, 4096, some);
  if (member.info(info).ok()) {
    uint64_t total = 0;
    if (ledger.total_leased(total).ok()) {
      require(total <= ledger.capacity(), "more is promised than the capacity");
      require(info.leased <= total, "a lease is not in the sum");
    }
  }
  if (member.ask(soft, running).ok() && member.info(info).ok()) {
    require(soft <= info.leased && running <= info.leased - soft, "asked for more than is leased");
  }
  (void)member.policy(policy);
  (void)member.observe(policy.version);
  if (policy.trim) (void)member.trim_done(policy.trim->version);
  PolicyChange change;
  change.limit = 4096;
  change.guarantee = 10;
  (void)ledger.set_policy(member.slot(), member.generation(), change, version);
  (void)ledger.trim(member.slot(), member.generation(), -1, true, version);
  (void)member.count(Counter::commits);
  (void)member.time(Timed::map, 0.1);
  uint32_t rung = 0;
  if (member.bell(rung).ok()) (void)member.wait_bell(rung + 1, 1000, rung);
  (void)member.release(some);
}

void use_ledger(Ledger& ledger) {
  std::vector<MemberInfo> infos;
  std::vector<LedgerEvent> events;
  uint64_t bytes = 0;
  (void)ledger.members(infos);
  (void)ledger.events(0, events);
  require(events.size() <= ledger::kEvents, "too many events");
  if (ledger.available(bytes).ok()) require(bytes <= ledger.capacity(), "too much is available");
  (void)ledger.overdraft(bytes);
  (void)ledger.total_demand(-1, bytes);
  (void)ledger.set_device_used(12345);
  std::unique_ptr<Member> member;
  if (ledger.join("fuzz", 5, member).ok()) use_member(ledger, *member);
  (void)ledger.note("preempt", 0, 1);
  (void)ledger.reap(infos);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string path = scratch().path();
  const auto capacities = {std::optional<int64_t>(), std::optional<int64_t>(1 << 30)};
  std::unique_ptr<Ledger> ledger;
  for (const auto& capacity : capacities) {  // unused
    unlink(path.c_str());
    write_file(path, data, std::min<size_t>(size, 1 << 19), 0);
    if (Ledger::open(path, capacity, std::nullopt, ledger).ok()) {
      require(ledger->capacity() <= ledger::kMaxBytes, "an impossible capacity is accepted");
      use_ledger(*ledger);
    }
    ledger.reset();
  }
  // In use: the same bytes, over a ledger with two living members.
  unlink(path.c_str());
  std::unique_ptr<Member> first;
  std::unique_ptr<Member> second;
  bool granted = false;
  require(Ledger::open(path, 1 << 30, 4096, ledger).ok() && ledger->join("a", 1, first).ok() &&
              ledger->join("b", 1, second).ok() && first->lease(1 << 20, granted).ok(),
          "a new ledger cannot be used");
  write_file(path, data, std::min(size, sizeof(ledger::File)), 0);
  use_ledger(*ledger);
  use_member(*ledger, *first);
  use_member(*ledger, *second);
  std::unique_ptr<Ledger> other;
  if (Ledger::open(path, std::nullopt, std::nullopt, other).ok()) use_ledger(*other);
  return 0;
}

#ifndef KVCACHED_LIBFUZZER
namespace {

// A ledger with members, leases, policies, asks and events.
std::vector<uint8_t> valid_file() {
  const std::string path = scratch().path() + ".valid";
  std::unique_ptr<Ledger> ledger;
  std::unique_ptr<Member> members[3];
  require(Ledger::open(path, 1 << 30, 4096, ledger).ok(), "no valid file");
  uint64_t version = 0;
  bool granted = false;
  for (auto& member : members) {
    require(ledger->join("valid", 10, member).ok() && member->lease(300 << 20, granted).ok() &&
                member->set_cached(100 << 20).ok(),
            "no valid file");
  }
  PolicyChange change;
  change.guarantee = 1000;
  change.limit = 200 << 20;
  require(ledger->set_policy(0, members[0]->generation(), change, version).ok() &&
              members[1]->set_demand(400 << 20, 2).ok(),
          "no valid file");
  std::vector<uint8_t> bytes(sizeof(ledger::File));
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  require(fd >= 0 && pread(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()),
          "no valid file");
  close(fd);
  return bytes;
}

void mutate(std::vector<uint8_t>& bytes, std::mt19937_64& random) {
  constexpr size_t kEventsAt = offsetof(ledger::File, events);
  constexpr uint64_t kTelling[] = {0,       1,          ~uint64_t{0},       uint64_t{1} << 63,
                                   1 << 30, 1 << 20,    uint64_t{1} << 56,  (uint64_t{1} << 56) + 1,
                                   255,     1000000000, ~uint64_t{0} - 255, 5};
  const auto below = [&](size_t n) { return random() % n; };
  for (size_t n = 1 + below(6); n > 0; --n) {
    // Words that matter far more often than the rest.
    const size_t bases[] = {
        0, sizeof(ledger::Header), sizeof(ledger::Header) + below(4) * sizeof(ledger::Slot),
        kEventsAt + below(8) * sizeof(ledger::Event), below(bytes.size() - 512)};
    const size_t at = (bases[below(5)] + below(512)) & ~size_t{7};
    uint64_t word = kTelling[below(std::size(kTelling))];
    if (below(3) == 0) word = random() >> below(64);
    std::memcpy(&bytes[std::min(at, bytes.size() - 8)], &word, 8);
  }
  if (below(20) == 0) bytes.resize(below(bytes.size()));
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 2000;
  const auto seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}();
  std::printf("fuzz_ledger: %d rounds, seed %llu\n", rounds, static_cast<unsigned long long>(seed));
  std::fflush(stdout);
  std::mt19937_64 random(seed);
  const std::vector<uint8_t> valid = valid_file();
  for (int round = 0; round < rounds; ++round) {
    std::vector<uint8_t> bytes = valid;
    if (round != 0) mutate(bytes, random);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  return 0;
}
#endif
