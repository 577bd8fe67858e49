// SPDX-License-Identifier: Apache-2.0
// A set of small integers that finds its lowest, highest and next member in a handful of word
// operations: a bitmap, with a bitmap of its non-empty words above it, and so on up to one word.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

namespace kvc {

class BitTree {
 public:
  static constexpr int64_t kNone = -1;

  explicit BitTree(int64_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  int64_t size() const { return size_; }  // how many members
  bool test(int64_t i) const { return levels_[0][i >> 6] >> (i & 63) & 1; }

  void set(int64_t i) {
    size_ += !test(i);
    for (auto& level : levels_) {
      uint64_t& word = level[i >> 6];
      const bool was_empty = word == 0;
      word |= uint64_t{1} << (i & 63);
      if (!was_empty) return;  // the levels above know this word already
      i >>= 6;
    }
  }

  void clear(int64_t i) {
    size_ -= test(i);
    for (auto& level : levels_) {
      uint64_t& word = level[i >> 6];
      word &= ~(uint64_t{1} << (i & 63));
      if (word != 0) return;
      i >>= 6;
    }
  }

  // The lowest member that is at least i, or kNone.
  int64_t next(int64_t i) const {
    for (size_t height = 0; height < levels_.size(); ++height, i = (i >> 6) + 1) {
      const auto& level = levels_[height];
      const auto index = static_cast<size_t>(i >> 6);
      if (index >= level.size()) return kNone;
      const uint64_t word = level[index] & (~uint64_t{0} << (i & 63));
      if (word != 0) return descend<false>(height, i & ~int64_t{63}, word);
    }
    return kNone;
  }

  int64_t first() const { return next(0); }

  int64_t last() const {
    const uint64_t top = levels_.back()[0];
    return top == 0 ? kNone : descend<true>(levels_.size() - 1, 0, top);
  }

 private:
  template <bool kHighest>
  static int pick(uint64_t word) {
    return kHighest ? 63 - std::countl_zero(word) : std::countr_zero(word);
  }

  template <bool kHighest>
  int64_t descend(size_t height, int64_t base, uint64_t word) const {
    int64_t i = base + pick<kHighest>(word);
    while (height-- > 0) i = i * 64 + pick<kHighest>(levels_[height][i]);
    return i;
  }

  std::vector<std::vector<uint64_t>> levels_;
  int64_t size_ = 0;
};

}  // namespace kvc
