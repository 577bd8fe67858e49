// SPDX-License-Identifier: Apache-2.0
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>

#include "ledger_file.h"

namespace kvc::ledger {
namespace {

constexpr auto kLongestSleep = std::chrono::microseconds(1000);
constexpr int kSpins = 16;  // a critical section takes microseconds

}  // namespace

std::chrono::milliseconds Section::patience{10'000};

Status Section::enter_unchecked(LedgerFile& file) {
  // First of all: in a forked child the mutex may be held by a thread that does not exist there.
  if (file.fd_.get() < 0) return file.lost_in_fork();
  wait_.acquire(file.threads_);
  int error = 0;
  auto sleep = std::chrono::microseconds(20);
  // Of this thread, not of the clock: where the whole machine stood still, nobody is at fault.
  std::chrono::microseconds waited{0};
  for (int attempt = 0;; ++attempt) {
    error = file.fd_.try_lock(kMutexByte, true);
    if (error != EAGAIN) break;
    if (attempt < kSpins) {
      sched_yield();
      continue;
    }
    wait_.begin();
    if (waited >= patience) break;
    std::this_thread::sleep_for(sleep);
    waited += sleep;
    sleep = std::min(sleep * 2, kLongestSleep);
  }
  if (error == 0) {
    file_ = &file;
    return {};
  }
  file.threads_.unlock();
  if (error == EAGAIN) {
    return Status::error(Code::lost,
                         "ledger " + file.path_ +
                             " has been locked by another process for too long; it must be stopped "
                             "or frozen; let that process go on, or end it");
  }
  return Status::error(Code::lost,
                       describe_errno("ledger " + file.path_ + ": locking failed", error));
}

Status Section::enter(LedgerFile& file) {
  if (Status status = enter_unchecked(file); !status.ok()) return status;
  const Header& header = file.header();
  if (header.magic.load() != kMagic || header.version.load() != kVersion ||
      header.created_ns != file.created_ns_) {
    return Status::error(Code::lost, "ledger " + file.path_ +
                                         " was rebuilt by another release of kvcached after this "
                                         "process opened it; restart this process");
  }
  return {};
}

void Section::leave() {
  if (file_ != nullptr) {
    (void)file_->fd_.unlock(kMutexByte);
    file_->threads_.unlock();
    file_ = nullptr;
  }
  wait_.end();
}

}  // namespace kvc::ledger
