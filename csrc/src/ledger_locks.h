// SPDX-License-Identifier: Apache-2.0
// A file descriptor whose open file description carries byte-range locks.
//
// Such locks belong to the description, not to a process or a thread. The kernel drops them when
// the last descriptor of the description is closed, however its owner died, and it compares no
// process ids, so they hold across containers. Two things would keep a dead owner's locks: a
// program it started (hence O_CLOEXEC) and a child it forked (hence every LockFd of a process is
// closed in its children, before fork returns there).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>

#include "kvcached/status.h"

namespace kvc::ledger {

class LockFd {
 public:
  LockFd() = default;
  ~LockFd() { close(); }
  LockFd(const LockFd&) = delete;
  LockFd& operator=(const LockFd&) = delete;

  // openat(2); returns errno, 0 for success. Closes what was open before.
  int open(int directory, const char* path, int flags, mode_t mode = 0);
  // A new description of the same file, even if the file has no name any more; returns errno.
  int reopen(const LockFd& other);
  void close();

  int get() const { return fd_.load(std::memory_order_relaxed); }  // -1: closed
  // Whether it was closed because this process is a fork of the one that opened it.
  bool lost_in_fork() const { return lost_in_fork_.load(std::memory_order_relaxed); }

  // Each returns errno, 0 for success, EAGAIN where another description is in the way.
  int try_lock(int64_t byte, bool exclusive);
  int unlock(int64_t byte);
  // Whether a description other than this one has a lock in the range. True when in doubt.
  bool held_elsewhere(int64_t start, int64_t length) const;

 private:
  friend struct Registry;
  std::atomic<int> fd_{-1};
  std::atomic<bool> lost_in_fork_{false};
  LockFd* next_ = nullptr;  // in the registry of open ones
  LockFd* prev_ = nullptr;
};

}  // namespace kvc::ledger
