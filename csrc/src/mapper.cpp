// SPDX-License-Identifier: Apache-2.0
#include "kvcached/mapper.h"

#include <algorithm>
#include <utility>

namespace kvc {
namespace {

constexpr std::size_t kManyJobs = 16;  // with more than these, no rest
constexpr std::chrono::milliseconds kTellAgain{100};

}  // namespace

Mapper::Mapper(Arena& arena, std::chrono::milliseconds retry, OnFreed on_freed, OnMoved on_moved,
               Pace pace)
    : arena_(arena),
      retry_(retry),
      on_freed_(std::move(on_freed)),
      on_moved_(std::move(on_moved)),
      pace_(std::move(pace)),
      mapped_seen_(arena.calls().map),
      thread_([this] { work(); }) {}

bool Mapper::share_a_page(std::span<const BlockRange> a, std::span<const BlockRange> b) const {
  const Geometry& geometry = arena_.geometry();
  return std::any_of(a.begin(), a.end(), [&](const BlockRange& x) {
    if (x.size() <= 0) return false;  // the arena will refuse it
    const PageRun mine = geometry.pages_of(x);
    return std::any_of(b.begin(), b.end(), [&](const BlockRange& y) {
      if (y.size() <= 0) return false;
      const PageRun other = geometry.pages_of(y);
      return mine.begin < other.end && other.begin < mine.end;
    });
  });
}

void Mapper::freed(std::size_t bytes) {
  bytes += untold_.exchange(0);
  if (bytes == 0 || !on_freed_ || on_freed_(bytes)) return;
  untold_ += bytes;
  const Lock lock(mutex_);  // the worker looks before it waits, or hears of it
  changed_.notify_all();
}

Status Mapper::commit_now(std::span<const BlockRange> ranges) {
  {
    Lock lock(mutex_);
    Status status = wait_for(lock, ticket([this, ranges](const Job& job) {
                               return job.kind == Kind::commit || share_a_page(job.ranges, ranges);
                             }));
    if (!status.ok()) return status;
  }
  return commit_timed(ranges);
}

Status Mapper::commit_ahead(std::span<const BlockRange> ranges) {
  return enqueue(Kind::commit, ranges);
}

Status Mapper::decommit_later(std::span<const BlockRange> ranges) {
  return enqueue(Kind::decommit, ranges);
}

Status Mapper::wait_commits() {
  Lock lock(mutex_);
  return wait_for(lock, ticket([](const Job& job) { return job.kind == Kind::commit; }));
}

Status Mapper::drain() {
  Lock lock(mutex_);
  return wait_for(lock, ticket([](const Job&) { return true; }));
}

Status Mapper::take_error() {
  Lock lock(mutex_);
  return std::exchange(kept_, {});
}

void Mapper::stop() {
  {
    Lock lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::size_t Mapper::pending() const {
  Lock lock(mutex_);
  return queue_.size();
}

Status Mapper::enqueue(Kind kind, std::span<const BlockRange> ranges) {
  {
    Lock lock(mutex_);
    if (!kept_.ok()) return std::exchange(kept_, {});
    if (stopping_) return Status::error(Code::invalid_argument, "the mapper is stopped");
    queue_.push_back({kind, {ranges.begin(), ranges.end()}});
  }
  changed_.notify_all();
  return {};
}

template <typename Chosen>
std::uint64_t Mapper::ticket(Chosen chosen) const {
  for (std::size_t i = queue_.size(); i > 0; --i) {
    if (chosen(queue_[i - 1])) return done_ + i;
  }
  return done_;
}

Status Mapper::wait_for(Lock& lock, std::uint64_t ticket) {
  ++waiting_;
  changed_.notify_all();  // a worker that rests
  changed_.wait(lock, [&] { return done_ >= ticket; });
  --waiting_;
  return std::exchange(kept_, {});
}

// Both threads may be at it: what one counts for the other is not counted again.
std::uint64_t Mapper::newly_mapped() {
  const std::uint64_t now = arena_.calls().map;
  std::uint64_t before = mapped_seen_.load();
  while (before < now && !mapped_seen_.compare_exchange_weak(before, now)) {
  }
  return before < now ? now - before : 0;
}

Status Mapper::commit_timed(std::span<const BlockRange> ranges) {
  if (!on_moved_) return commit_with_retry(ranges);
  const auto start = std::chrono::steady_clock::now();
  Status status = commit_with_retry(ranges);
  if (status.ok()) {
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    on_moved_({took.count(), newly_mapped(), 0});
  }
  return status;
}

Status Mapper::commit_with_retry(std::span<const BlockRange> ranges) {
  using Clock = std::chrono::steady_clock;
  const Clock::time_point deadline = Clock::now() + retry_;
  Clock::duration pause = std::chrono::milliseconds(1);
  for (;;) {
    std::size_t spared = 0;
    Status status = arena_.commit(ranges, &spared);
    freed(spared);
    const Clock::time_point now = Clock::now();
    if (status.code != Code::out_of_memory || now >= deadline) return status;
    Lock lock(mutex_);
    // A decommit of our own that gets done may be all that is missing.
    const std::uint64_t before = done_;
    changed_.wait_until(lock, std::min(now + pause, deadline),
                        [&] { return stopping_ || done_ != before; });
    if (stopping_) return status;
    pause = std::min<Clock::duration>(pause * 2, std::chrono::milliseconds(50));
  }
}

Status Mapper::run(const Job& job) {
  if (job.kind == Kind::commit) return commit_timed(job.ranges);
  if (Status status = arena_.backend().fence(); !status.ok()) return status;
  // Piece by piece: whoever waits for the bytes takes the first while we give up the last.
  const Geometry& geometry = arena_.geometry();
  const std::int64_t most =
      std::max<std::int64_t>(1, pace_.pages * geometry.page_bytes / geometry.block_bytes);
  std::vector<BlockRange> piece;
  std::int64_t room = most;
  for (BlockRange rest : job.ranges) {
    while (rest.begin < rest.end) {
      const std::int64_t end = std::min(rest.end, rest.begin + room);
      piece.push_back({rest.begin, end});
      room -= end - rest.begin;
      rest.begin = end;
      if (room != 0) continue;
      if (Status status = decommit(piece); !status.ok()) return status;
      piece.clear();
      room = most;
    }
  }
  return piece.empty() ? Status{} : decommit(piece);
}

Status Mapper::decommit(std::span<const BlockRange> ranges) {
  const auto begin = std::chrono::steady_clock::now();
  std::size_t returned = 0;
  Status status = arena_.decommit(ranges, &returned);
  freed(returned);
  const std::size_t pages = returned / static_cast<std::size_t>(arena_.geometry().page_bytes);
  if (on_moved_ && pages != 0) on_moved_({-1, 0, pages});
  rest_after(std::chrono::steady_clock::now() - begin);
  return status;
}

bool Mapper::in_a_hurry() const {
  return stopping_ || waiting_ != 0 || queue_.size() > kManyJobs ||
         std::any_of(queue_.begin(), queue_.end(),
                     [](const Job& job) { return job.kind == Kind::commit; });
}

void Mapper::rest_after(std::chrono::steady_clock::duration work) {
  if (pace_.rest == 0 || (pace_.hurry && pace_.hurry())) return;
  const auto rest = std::min<std::chrono::nanoseconds>(pace_.rest * work, pace_.longest);
  Lock lock(mutex_);
  changed_.wait_for(lock, rest, [this] { return in_a_hurry(); });
}

void Mapper::work() {
  Lock lock(mutex_);
  for (;;) {
    const auto called = [this] { return stopping_ || !queue_.empty(); };
    changed_.wait(lock, [&] { return called() || untold_ != 0; });
    if (queue_.empty()) {
      if (!stopping_ && changed_.wait_for(lock, kTellAgain, called)) continue;
      const bool last = stopping_;
      lock.unlock();
      freed(0);
      if (last) return;
      lock.lock();
      continue;
    }
    const Job& job = queue_.front();  // a deque's elements stay put while others are added
    lock.unlock();
    Status status = run(job);
    lock.lock();
    if (!status.ok() && kept_.ok()) {
      const char* kind = job.kind == Kind::commit ? "commit" : "decommit";
      kept_ = Status::error(Code::lost, std::string("a queued ") + kind + " failed: " + status.what,
                            status.driver_code);
    }
    queue_.pop_front();
    ++done_;
    changed_.notify_all();
  }
}

}  // namespace kvc
