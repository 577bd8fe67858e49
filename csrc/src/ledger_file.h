// SPDX-License-Identifier: Apache-2.0
// An open, checked and mapped ledger file, and its critical section.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "kvcached/status.h"
#include "kvcached/wait.h"
#include "ledger_format.h"
#include "ledger_locks.h"

namespace kvc::ledger {

class LedgerFile {
 public:
  // Creates the file, and the directory it is in, unless capacity is absent. See Ledger::open.
  static Status open(const std::string& path, std::optional<uint64_t> capacity,
                     std::optional<uint64_t> headroom, std::shared_ptr<LedgerFile>& out);
  // See Ledger::remove.
  static Status remove(const std::string& path);
  ~LedgerFile();
  LedgerFile(const LedgerFile&) = delete;
  LedgerFile& operator=(const LedgerFile&) = delete;

  const std::string& path() const { return path_; }
  LockFd& fd() { return fd_; }
  Header& header() { return file_->header; }
  const Header& header() const { return file_->header; }
  Slot& slot(int index) { return file_->slots[index]; }
  Event& event(int index) { return file_->events[index]; }
  int64_t created_ns() const { return created_ns_; }
  // Fails if the numbers this object was opened with have been replaced since.
  Status still_as_wanted() const;

  // Whether a process holds a slot's byte. Not from a LockFd that holds it itself.
  bool alive(int index) const { return fd_.held_elsewhere(kMemberBytes + index, 1); }
  // Fails once the file is deleted or another one has its name: those who open the path now would
  // share the device with us and not know of us.
  Status still_at_path() const;

 private:
  friend class Section;
  LedgerFile(std::string path, std::optional<uint64_t> capacity, std::optional<uint64_t> headroom)
      : path_(std::move(path)), capacity_(capacity), headroom_(headroom) {}
  Status open_inode();
  Status check_inode() const;
  Status map_and_check();
  Status build_file(int64_t size);
  Status map(int64_t size);
  Status adopt(bool in_use);
  Status lost_in_fork() const;

  const std::string path_;
  const std::optional<uint64_t> capacity_;  // as asked for in open
  const std::optional<uint64_t> headroom_;
  LockFd fd_;
  File* file_ = nullptr;
  int64_t created_ns_ = 0;
  std::mutex threads_;  // the byte lock keeps other descriptions out, not other threads of this one
};

// The critical section of a ledger: among the threads that share a LedgerFile by its mutex, among
// all others by a lock on one byte of the file, which the kernel gives back if the holder dies.
//
// A robust mutex in the file would be a little faster, but the kernel and the C library know its
// owner by thread id alone. Members in different PID namespaces have equal ids, and then a member
// that is killed while it waits makes the kernel take the mutex away from another that holds it.
class Section {
 public:
  Section() = default;
  ~Section() { leave(); }
  Section(const Section&) = delete;
  Section& operator=(const Section&) = delete;

  // Sleeps for `patience` at most: a holder can be stopped, by a debugger or a frozen container.
  Status enter(LedgerFile& file);
  // As enter, but for a file that is not mapped and checked yet.
  Status enter_unchecked(LedgerFile& file);
  void leave();

  static std::chrono::milliseconds patience;  // only tests change it

 private:
  LedgerFile* file_ = nullptr;
  Wait wait_;
};

std::string describe_errno(const std::string& what, int error);

}  // namespace kvc::ledger
