// SPDX-License-Identifier: Apache-2.0
// The block allocator and the ledger called from C++: a line of JSON for every measurement.
//
//     blocks DIRECTORY ROUNDS                             all of one process; counted under
//     callgrind blocks contend DIRECTORY MEMBERS SECONDS PAUSE_US   processes that lease and
//     release
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "counted.h"
#include "kvcached/block_allocator.h"
#include "kvcached/ledger.h"

namespace {

using kvc::BlockAllocator;
using Clock = std::chrono::steady_clock;

constexpr int64_t kBlock = 2 << 20;  // 16 tokens of an 8B model, all layers
constexpr int64_t kPage = 16 << 20;
constexpr int64_t kPool = 8192;
constexpr int kSizes[] = {1, 4, 16, 64, 256, 1024};

void check(const kvc::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.what.c_str());
  std::exit(1);
}

double seconds(Clock::duration time) { return std::chrono::duration<double>(time).count(); }

// Times every call, or lets callgrind count all of them together.
class Probe {
 public:
  explicit Probe(std::string name) : name_(std::move(name)) { CALLGRIND_ZERO_STATS; }
  template <typename Call>
  void measure(Call call) {
    const auto begin = Clock::now();
    CALLGRIND_TOGGLE_COLLECT;
    call();
    CALLGRIND_TOGGLE_COLLECT;
    times_.push_back(seconds(Clock::now() - begin));
  }
  void report() {
    CALLGRIND_DUMP_STATS_AT(name_.c_str());
    std::sort(times_.begin(), times_.end());
    std::printf("{\"name\": \"%s\", \"calls\": %zu, \"median_s\": %.9f}\n", name_.c_str(),
                times_.size(), times_[times_.size() / 2]);
  }

 private:
  std::string name_;
  std::vector<double> times_;
};

std::unique_ptr<BlockAllocator> make() {
  std::unique_ptr<BlockAllocator> blocks;
  check(BlockAllocator::create(
      kPool, {{.block_bytes = kBlock, .page_bytes = kPage, .num_blocks = kPool}}, blocks));
  return blocks;
}

// Takes n blocks and gives them back, again and again.
void turns(BlockAllocator& blocks, const std::string& pool, int rounds) {
  for (const int n : kSizes) {
    std::vector<int32_t> got;
    const std::string what = pool + " " + std::to_string(n);
    Probe take("take " + what);
    for (int i = 0; i < rounds; ++i) {
      got.clear();
      take.measure([&] { check(blocks.allocate(n, got)); });
      check(blocks.free(got));
    }
    take.report();
    Probe give("give " + what);
    for (int i = 0; i < rounds; ++i) {
      got.clear();
      check(blocks.allocate(n, got));
      give.measure([&] { check(blocks.free(got)); });
    }
    give.report();
  }
}

void allocator(int rounds) {
  kvc::Growth growth;
  const auto empty = make();
  check(empty->grow(kPool - 1, growth));
  turns(*empty, "mapped", rounds);

  const auto half = make();
  check(half->grow(kPool - 1, growth));
  std::vector<int32_t> all;
  check(half->allocate(kPool - 1, all));
  std::shuffle(all.begin(), all.end(), std::mt19937(7));
  all.resize(all.size() / 2);
  check(half->free(all));
  turns(*half, "half", rounds);

  for (const int n : kSizes) {
    const auto fresh = make();
    std::vector<int32_t> got;
    const std::string what = "unmapped " + std::to_string(n);
    Probe take("take " + what);
    for (int i = 0; i < rounds; ++i) {
      got.clear();
      take.measure([&] {
        check(fresh->grow(n, growth));
        check(fresh->allocate(n, got));
      });
      check(fresh->free(got));
      check(fresh->shrink(INT64_MAX, growth));
    }
    take.report();
    Probe give("give " + what);
    for (int i = 0; i < rounds; ++i) {
      got.clear();
      check(fresh->grow(n, growth));
      check(fresh->allocate(n, got));
      give.measure([&] {
        check(fresh->free(got));
        check(fresh->shrink(INT64_MAX, growth));
      });
    }
    give.report();
  }
}

// One leases and releases, beside members that only are there.
void ledger(const std::string& directory, int members, int rounds) {
  std::unique_ptr<kvc::Ledger> ledger;
  check(kvc::Ledger::open(directory + "/" + std::to_string(members), int64_t{80} << 30, 0, ledger));
  std::vector<std::unique_ptr<kvc::Member>> all(members);
  for (int i = 0; i < members; ++i) check(ledger->join("m" + std::to_string(i), 0, all[i]));
  Probe lease("lease " + std::to_string(members)), release("release " + std::to_string(members));
  for (int i = 0; i < rounds; ++i) {
    bool granted = false;
    lease.measure([&] { check(all[0]->lease(kPage, granted)); });
    if (!granted) std::exit(2);
    check(all[0]->release(kPage));
  }
  lease.report();
  CALLGRIND_ZERO_STATS;
  for (int i = 0; i < rounds; ++i) {
    bool granted = false;
    check(all[0]->lease(kPage, granted));
    release.measure([&] { check(all[0]->release(kPage)); });
  }
  release.report();
}

struct Shared {
  std::atomic<int> ready;
  std::atomic<bool> go;
  struct {
    uint64_t calls;
    double mean, median, p99, max;
  } each[64];
};

void contender(const std::string& path, int index, double for_s, int pause_us, Shared& shared) {
  std::unique_ptr<kvc::Ledger> ledger;
  std::unique_ptr<kvc::Member> member;
  check(kvc::Ledger::open(path, std::nullopt, std::nullopt, ledger));
  check(ledger->join("m" + std::to_string(index), 0, member));
  std::vector<double> times;
  times.reserve(1 << 20);
  shared.ready.fetch_add(1);
  while (!shared.go.load()) usleep(100);
  const auto end = Clock::now() + std::chrono::duration<double>(for_s);
  while (true) {
    bool granted = false;
    const auto begin = Clock::now();
    if (begin >= end) break;
    check(member->lease(kPage, granted));
    times.push_back(seconds(Clock::now() - begin));
    if (granted) check(member->release(kPage));
    if (pause_us > 0) usleep(pause_us);
  }
  std::sort(times.begin(), times.end());
  shared.each[index] = {times.size(),
                        std::accumulate(times.begin(), times.end(), 0.0) / times.size(),
                        times[times.size() / 2], times[times.size() * 99 / 100], times.back()};
}

void contend(const std::string& directory, int members, double for_s, int pause_us) {
  const std::string path =
      directory + "/contended" + std::to_string(members) + "-" + std::to_string(pause_us);
  std::unique_ptr<kvc::Ledger> ledger;
  check(kvc::Ledger::open(path, int64_t{80} << 30, 0, ledger));
  auto* shared = static_cast<Shared*>(
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::vector<pid_t> children;
  for (int i = 0; i < members; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      contender(path, i, for_s, pause_us, *shared);
      _exit(0);
    }
    children.push_back(child);
  }
  bool failed = false;
  while (shared->ready.load() < members && !failed) {
    for (const pid_t child : children) failed |= waitpid(child, nullptr, WNOHANG) > 0;
    usleep(1000);
  }
  shared->go.store(true);
  for (const pid_t child : children) {
    int status = 0;
    if (waitpid(child, &status, 0) == child) failed |= status != 0;
  }
  if (failed) std::exit(3);
  uint64_t calls = 0;
  double mean = 0, median = 0, p99 = 0, most = 0;
  for (int i = 0; i < members; ++i) {
    const auto& one = shared->each[i];
    calls += one.calls;
    mean += one.mean * static_cast<double>(one.calls);
    median = std::max(median, one.median);
    p99 = std::max(p99, one.p99);
    most = std::max(most, one.max);
  }
  std::printf(
      "{\"name\": \"contend %d pause %d\", \"pairs_per_s\": %.0f, \"lease_mean_s\": %.9f, "
      "\"lease_worst_median_s\": %.9f, \"lease_worst_p99_s\": %.9f, \"lease_max_s\": %.9f}\n",
      members, pause_us, static_cast<double>(calls) / for_s, mean / static_cast<double>(calls),
      median, p99, most);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 6 && std::string(argv[1]) == "contend") {
    contend(argv[2], std::atoi(argv[3]), std::atof(argv[4]), std::atoi(argv[5]));
    return 0;
  }
  if (argc != 3) return 64;
  CALLGRIND_START_INSTRUMENTATION;
  const int rounds = std::atoi(argv[2]);
  Probe nothing("nothing");
  for (int i = 0; i < rounds; ++i) nothing.measure([] {});
  nothing.report();
  allocator(rounds);
  ledger(argv[1], 1, rounds);
  ledger(argv[1], 64, rounds);
  return 0;
}
