// SPDX-License-Identifier: Apache-2.0
// What BlockAllocator promises, written down as slowly and plainly as possible.
#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <vector>

#include "kvcached/geometry.h"

namespace kvc {

struct AllocatorModel {
  explicit AllocatorModel(std::vector<Geometry> all) : geometries(std::move(all)) {
    committed.insert(0);
    live.insert(0);
  }

  const Geometry& primary() const { return geometries[0]; }
  int64_t home(int64_t block) const { return primary().first_page(block); }

  static std::set<int64_t> pages(const Geometry& g, const std::set<int64_t>& blocks) {
    std::set<int64_t> out;
    for (const int64_t block : blocks) {
      for (int64_t page = g.first_page(block); page <= g.last_page(block); ++page) out.insert(page);
    }
    return out;
  }

  std::vector<int64_t> committed_pages() const {
    std::vector<int64_t> out;
    for (const Geometry& g : geometries) {
      out.push_back(static_cast<int64_t>(pages(g, committed).size()));
    }
    return out;
  }

  std::set<int64_t> parked() const {
    const std::set<int64_t> all = pages(primary(), committed);
    const std::set<int64_t> used = pages(primary(), live);
    std::set<int64_t> out;
    std::set_difference(all.begin(), all.end(), used.begin(), used.end(),
                        std::inserter(out, out.end()));
    return out;
  }

  std::set<int64_t> grow(int64_t n) {
    std::set<int64_t> grown;
    const auto take = [&](int64_t block) {
      committed.insert(block);
      grown.insert(block);
    };
    for (;;) {
      const std::set<int64_t> have = pages(primary(), committed);
      for (int64_t block = 0; block < primary().num_blocks; ++block) {
        const std::set<int64_t> needs = pages(primary(), {block});
        if (committed.count(block) == 0 &&
            std::includes(have.begin(), have.end(), needs.begin(), needs.end())) {
          take(block);
        }
      }
      if (static_cast<int64_t>(grown.size()) >= n) break;
      int64_t lowest = 0;
      while (committed.count(lowest) != 0) ++lowest;
      if (lowest == primary().num_blocks) break;
      take(lowest);
    }
    for (const int64_t block : grown) {
      if (clean[home(block)].empty()) recency.push_back(home(block));
      clean[home(block)].push_back(block);
    }
    return grown;
  }

  void uncommit(int64_t block) {
    committed.erase(block);
    auto& list = clean[home(block)];
    list.erase(std::find(list.begin(), list.end(), block));
    if (list.empty()) std::erase(recency, home(block));
  }

  std::set<int64_t> shrink(int64_t max_bytes) {
    std::set<int64_t> gone;
    const int64_t before = committed_pages()[0];
    while ((before - committed_pages()[0]) * primary().unit_bytes() < max_bytes) {
      const std::set<int64_t> candidates = parked();
      if (candidates.empty()) break;
      for (int64_t block = 0; block < primary().num_blocks; ++block) {
        if (committed.count(block) != 0 && pages(primary(), {block}).count(*candidates.rbegin())) {
          uncommit(block);
          gone.insert(block);
        }
      }
    }
    return gone;
  }

  // Pages by how full they are, then by how recently that changed.
  std::vector<int32_t> order() const {
    std::vector<int64_t> by_fullness = recency;
    const auto fullness = [&](int64_t page) {
      return std::count_if(live.begin(), live.end(), [&](int64_t b) { return home(b) == page; });
    };
    std::stable_sort(by_fullness.begin(), by_fullness.end(),
                     [&](int64_t a, int64_t b) { return fullness(a) > fullness(b); });
    std::vector<int32_t> out;
    for (const int64_t page : by_fullness) {
      for (const int64_t block : clean.at(page)) out.push_back(static_cast<int32_t>(block));
    }
    return out;
  }

  int32_t allocate() { return take(order().front()); }

  int32_t allocate_beside(int64_t beside) {
    if (beside != 0 && !clean[home(beside)].empty()) return take(clean[home(beside)].front());
    for (const int64_t page : recency) {
      const bool used =
          std::any_of(live.begin(), live.end(), [&](int64_t block) { return home(block) == page; });
      if (!used) return take(clean[page].front());
    }
    return allocate();
  }

  int32_t take(int64_t block) {
    auto& list = clean[home(block)];
    list.erase(std::find(list.begin(), list.end(), block));
    std::erase(recency, home(block));
    if (!list.empty()) recency.insert(recency.begin(), home(block));
    live.insert(block);
    return static_cast<int32_t>(block);
  }

  void free(int64_t block) {
    live.erase(block);
    std::erase(recency, home(block));
    recency.insert(recency.begin(), home(block));
    clean[home(block)].push_front(block);
  }

  std::vector<Geometry> geometries;
  std::set<int64_t> committed;
  std::set<int64_t> live;
  std::vector<int64_t> recency;                  // pages with clean blocks, latest change first
  std::map<int64_t, std::deque<int64_t>> clean;  // per home page
};

}  // namespace kvc
