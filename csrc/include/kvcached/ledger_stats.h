// SPDX-License-Identifier: Apache-2.0
// What members count and time, in the ledger so that anyone can read it without asking them.
#pragma once

#include <array>
#include <cstdint>
#include <iterator>
#include <string_view>

namespace kvc {

inline constexpr std::string_view kCounterNames[] = {
    "cache_hits", "cache_evictions", "preemptions", "reclaimed_bytes",
    "shortages",  "commits",         "decommits"};
inline constexpr std::string_view kTimeNames[] = {"map", "step", "wait", "reclaim"};
inline constexpr int kCounters = std::size(kCounterNames);
inline constexpr int kTimes = std::size(kTimeNames);
inline constexpr int kBuckets = 20;

enum class Counter { commits = 5, decommits = 6 };  // those the core itself counts
enum class Timed { map = 0 };
static_assert(kCounterNames[static_cast<int>(Counter::commits)] == "commits");
static_assert(kCounterNames[static_cast<int>(Counter::decommits)] == "decommits");
static_assert(kTimeNames[static_cast<int>(Timed::map)] == "map");

struct Histogram {
  std::array<uint64_t, kBuckets> counts = {};  // bucket i: up to bound(i); the last: the rest
  double sum_s = 0;

  static constexpr double bound(int i) { return 1e-5 * static_cast<double>(uint64_t{1} << i); }
};

}  // namespace kvc
