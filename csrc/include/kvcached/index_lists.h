// SPDX-License-Identifier: Apache-2.0
// Many doubly linked lists over one set of nodes named 0..n-1, kept in four flat arrays. A node is
// in at most one list; every operation is O(1) and allocates nothing.
#pragma once

#include <cstdint>
#include <vector>

namespace kvc {

class IndexLists {
 public:
  static constexpr int32_t kNone = -1;

  IndexLists(int64_t nodes, int64_t lists)
      : next_(nodes, kNone), prev_(nodes, kNone), head_(lists, kNone), tail_(lists, kNone) {}

  bool empty(int64_t list) const { return head_[list] == kNone; }
  int32_t head(int64_t list) const { return head_[list]; }
  int32_t next(int32_t node) const { return next_[node]; }

  void push_front(int64_t list, int32_t node) { link(list, kNone, node, head_[list]); }
  void push_back(int64_t list, int32_t node) { link(list, tail_[list], node, kNone); }

  void remove(int64_t list, int32_t node) {
    const int32_t before = prev_[node];
    const int32_t after = next_[node];
    (before == kNone ? head_[list] : next_[before]) = after;
    (after == kNone ? tail_[list] : prev_[after]) = before;
  }

 private:
  void link(int64_t list, int32_t before, int32_t node, int32_t after) {
    prev_[node] = before;
    next_[node] = after;
    (before == kNone ? head_[list] : next_[before]) = node;
    (after == kNone ? tail_[list] : prev_[after]) = node;
  }

  std::vector<int32_t> next_, prev_;
  std::vector<int32_t> head_, tail_;
};

}  // namespace kvc
