// SPDX-License-Identifier: Apache-2.0
// Applies commits and decommits to an arena, in the background where they can wait.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

#include "kvcached/arena.h"

namespace kvc {

// A long decommit is done in pieces of `pages`, since a piece holds the arena's lock, with a rest
// after each that is `rest` times as long as the piece took: else a commit on another thread could
// wait for piece after piece. Without rests while somebody waits for it, or `hurry` says so, and
// none longer than `longest`: a piece may take seconds where a machine stands still.
struct Pace {
  std::int64_t pages = 4;
  int rest = 3;
  std::function<bool()> hurry;
  std::chrono::milliseconds longest{100};
};

// One background thread runs what is queued in order, one at a time. commit_now runs on the
// caller's thread; it waits for every commit queued before it and for every decommit that shares a
// page with it (so that pages come and go in the order they were promised), but passes other
// decommits: these wait for the device, which an engine's next step must not.
//
// A queued call that fails has changed nothing (a long decommit: nothing of the piece that failed
// and of those behind it), and whoever queued it no longer knows what is committed. So its error is
// kept, with the code `lost`, and returned by the next call of any method but stop, which does
// nothing else then. Thread-safe.
class Mapper {
 public:
  // A commit for which physical memory is short is tried again for as long as `retry`: another
  // process may be about to give back what was leased to this one. `on_freed`, from either thread,
  // is told the bytes that Arena says are freed; if it says false it is told again, with later ones
  // or after a while.
  using OnFreed = std::function<bool(std::size_t bytes)>;
  // Is told of every call that took effect, from either thread: the time a commit took, waits for
  // memory included (negative for a decommit), and the pages that were mapped or went back.
  struct Moved {
    double commit_s = -1;
    std::uint64_t mapped = 0;
    std::uint64_t returned = 0;
  };
  using OnMoved = std::function<void(const Moved&)>;
  explicit Mapper(Arena& arena, std::chrono::milliseconds retry = {}, OnFreed on_freed = {},
                  OnMoved on_moved = {}, Pace pace = {});
  Mapper(const Mapper&) = delete;
  Mapper& operator=(const Mapper&) = delete;
  ~Mapper() { stop(); }

  Status commit_now(std::span<const BlockRange> ranges);
  Status commit_ahead(std::span<const BlockRange> ranges);
  // Decommits once all device work issued by then is done.
  Status decommit_later(std::span<const BlockRange> ranges);

  Status wait_commits();
  Status drain();
  Status take_error();
  // Finishes what is queued, without further retries, and ends the thread.
  void stop();

  std::size_t pending() const;

 private:
  enum class Kind { commit, decommit };
  struct Job {
    Kind kind;
    std::vector<BlockRange> ranges;
  };
  using Lock = std::unique_lock<std::mutex>;

  Status enqueue(Kind kind, std::span<const BlockRange> ranges);
  // How many jobs must have been done before whatever the predicate chooses is done.
  template <typename Chosen>
  std::uint64_t ticket(Chosen chosen) const;
  Status wait_for(Lock& lock, std::uint64_t ticket);
  bool share_a_page(std::span<const BlockRange> a, std::span<const BlockRange> b) const;
  void freed(std::size_t bytes);
  Status commit_timed(std::span<const BlockRange> ranges);
  Status commit_with_retry(std::span<const BlockRange> ranges);
  std::uint64_t newly_mapped();
  Status run(const Job& job);
  Status decommit(std::span<const BlockRange> ranges);
  void rest_after(std::chrono::steady_clock::duration work);
  bool in_a_hurry() const;
  void work();

  Arena& arena_;
  const std::chrono::milliseconds retry_;
  const OnFreed on_freed_;
  const OnMoved on_moved_;
  const Pace pace_;
  std::atomic<std::uint64_t> mapped_seen_;  // of the arena's calls, those on_moved_ was told
  std::atomic<std::size_t> untold_{0};      // bytes freed that on_freed_ could not take yet

  mutable std::mutex mutex_;
  std::condition_variable changed_;  // a job was queued or done, or stop was asked for
  std::deque<Job> queue_;            // the job at work is still at the front
  std::uint64_t done_ = 0;
  int waiting_ = 0;
  bool stopping_ = false;
  Status kept_;
  std::thread thread_;  // last: it uses all of the above
};

}  // namespace kvc
