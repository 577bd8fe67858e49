// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <mutex>

#include "kvcached/ledger.h"
#include "ledger_account.h"
#include "ledger_file.h"

namespace kvc {

using namespace ledger;

Member::Member(std::shared_ptr<LedgerFile> file, std::unique_ptr<LockFd> life, int index,
               uint64_t generation)
    : file_(std::move(file)), life_(std::move(life)), index_(index), generation_(generation) {}

Member::~Member() { (void)leave(); }

// Asked before the lock is taken, so that leave need not wait for calls that come after it, and
// so that a forked child does not wait for a thread it does not have.
Status Member::check_usable() const {
  if (life_->lost_in_fork()) return file_->still_at_path();
  if (!left_.load()) return {};
  return Status::error(Code::lost,
                       "ledger " + file_->path() + ": this member has left; join again");
}

Status Member::stay(Wait& wait, std::shared_lock<std::shared_mutex>& staying) const {
  if (Status status = check_usable(); !status.ok()) return status;
  wait.acquire(staying);
  return check_usable();
}

// Needs the critical section. While the byte is held nobody frees the slot, so only a damaged file
// can take it away from its holder.
Status Member::check_owned() const {
  if (file_->slot(index_).generation.load() == generation_) return {};
  return Status::error(Code::lost, "ledger " + file_->path() + ": slot " + std::to_string(index_) +
                                       " was taken from its living member; the file is damaged. "
                                       "Stop its members and delete it");
}

Status Member::grant(int64_t bytes, int64_t quantum, bool partial, int64_t& granted) {
  granted = 0;
  if (Status status = check_bytes(bytes, "a lease"); !status.ok()) return status;
  if (quantum <= 0) {
    return Status::error(Code::invalid_argument, "ledger: the quantum must be positive");
  }
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = check_owned(); !status.ok()) return status;
  const auto wanted = static_cast<uint64_t>(bytes - bytes % quantum);
  Tally sum;
  if (!tally(*file_, sum).ok() || sum.available < wanted) {
    reap_dead(*file_, nullptr);
    if (Status status = tally(*file_, sum); !status.ok()) return status;
  }
  uint64_t given = std::min(wanted, sum.available);
  if (given < wanted) given = partial ? given - given % static_cast<uint64_t>(quantum) : 0;
  Word& leased = file_->slot(index_).leased;
  leased.store(leased.load() + given);
  granted = static_cast<int64_t>(given);
  return {};
}

Status Member::lease(int64_t bytes, bool& granted) {
  int64_t given = 0;
  Status status = grant(bytes, 1, false, given);
  granted = status.ok() && given == bytes;
  return status;
}

Status Member::lease_up_to(int64_t bytes, int64_t quantum, int64_t& granted) {
  return grant(bytes, quantum, true, granted);
}

Status Member::release(int64_t bytes) {
  if (Status status = check_bytes(bytes, "a release"); !status.ok()) return status;
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = check_owned(); !status.ok()) return status;
  Word& leased = file_->slot(index_).leased;
  const uint64_t held = leased.load();
  if (static_cast<uint64_t>(bytes) > held) {
    return Status::error(Code::invalid_argument, "ledger: cannot release " + std::to_string(bytes) +
                                                     " bytes, only " + std::to_string(held) +
                                                     " are leased; nothing was released");
  }
  leased.store(held - static_cast<uint64_t>(bytes));
  return {};
}

Status Member::add_committed(int64_t delta) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  Word& committed = file_->slot(index_).committed;
  uint64_t old = committed.load();
  do {
    // Both fit in 57 bits unless the file or the caller is wrong.
    const bool fits = delta >= 0
                          ? old <= kMaxBytes && static_cast<uint64_t>(delta) <= kMaxBytes - old
                          : uint64_t{0} - static_cast<uint64_t>(delta) <= old;
    if (!fits) {
      return Status::error(Code::invalid_argument, "ledger: " + std::to_string(old) +
                                                       " committed bytes cannot change by " +
                                                       std::to_string(delta));
    }
  } while (!committed.compare_exchange_weak(old, old + static_cast<uint64_t>(delta)));
  return {};
}

Status Member::store(Word Slot::* field, int64_t bytes, const char* name) {
  if (Status status = check_bytes(bytes, name); !status.ok()) return status;
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  (file_->slot(index_).*field).store(static_cast<uint64_t>(bytes));
  return {};
}

Status Member::set_parked(int64_t bytes) { return store(&Slot::parked, bytes, "parked"); }
Status Member::set_cached(int64_t bytes) { return store(&Slot::cached, bytes, "cached"); }
Status Member::set_static(int64_t bytes) { return store(&Slot::static_bytes, bytes, "static"); }
Status Member::set_demand(int64_t bytes) { return store(&Slot::demand, bytes, "demand"); }

Status Member::info(MemberInfo& out) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = check_owned(); !status.ok()) return status;
  out = describe(*file_, index_);
  return {};
}

Status Member::leave() {
  // A forked child never held the byte.
  if (life_->lost_in_fork() || left_.exchange(true)) return {};
  Wait wait;
  std::unique_lock leaving(leaving_, std::defer_lock);
  wait.acquire(leaving);
  Section section;
  Status status = section.enter(*file_);
  life_->close();
  // If we die here, or could not enter, the slot has no living process and is reaped.
  Slot& slot = file_->slot(index_);
  if (status.ok() && slot.generation.load() == generation_ && !file_->alive(index_)) {
    slot.generation.store(0);
  }
  return status;
}

}  // namespace kvc
