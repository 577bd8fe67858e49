// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <mutex>

#include "kvcached/ledger.h"
#include "ledger_account.h"
#include "ledger_bell.h"
#include "ledger_events.h"
#include "ledger_file.h"

namespace kvc {

using namespace ledger;

namespace {

uint64_t claim_of(const State& state, int slot, bool urgent) {
  for (int i = 0; i < state.count; ++i) {
    if (state.members[i].slot == slot) return claimable(state, i, urgent);
  }
  return 0;
}

}  // namespace

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

template <typename Operation>
Status Member::locked(Operation operation) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = check_owned(); !status.ok()) return status;
  return operation();
}

Status Member::grant(int64_t bytes, int64_t quantum, bool partial, bool urgent, int64_t& granted) {
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
  uint64_t claim = 0;
  if (!tally(*file_, sum).ok() || (claim = claim_of(sum.state, index_, urgent)) < wanted) {
    reap_dead(*file_, nullptr);
    if (Status status = tally(*file_, sum); !status.ok()) return status;
    claim = claim_of(sum.state, index_, urgent);
  }
  uint64_t given = std::min(wanted, claim);
  if (given < wanted) given = partial ? given - given % static_cast<uint64_t>(quantum) : 0;
  Word& leased = file_->slot(index_).leased;
  leased.store(leased.load() + given);
  granted = static_cast<int64_t>(given);
  return {};
}

Status Member::lease(int64_t bytes, bool& granted, bool urgent) {
  int64_t given = 0;
  Status status = grant(bytes, 1, false, urgent, given);
  granted = status.ok() && given == bytes;
  return status;
}

Status Member::lease_up_to(int64_t bytes, int64_t quantum, int64_t& granted) {
  return grant(bytes, quantum, true, false, granted);
}

Status Member::claimable(uint64_t& bytes, bool urgent) {
  return locked([&] {
    reap_dead(*file_, nullptr);
    Tally sum;
    if (Status status = tally(*file_, sum); !status.ok()) return status;
    bytes = claim_of(sum.state, index_, urgent);
    return Status{};
  });
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
  // What comes back is no longer on its way. First, so that no byte ever counts as both.
  Word& returning = file_->slot(index_).returning;
  returning.store(returning.load() - std::min(returning.load(), static_cast<uint64_t>(bytes)));
  leased.store(held - static_cast<uint64_t>(bytes));
  if (bytes != 0) ring_waiting(*file_);
  return {};
}

Status Member::add_committed(int64_t delta) { return add(&Slot::committed, delta, "committed"); }

Status Member::add_static(int64_t delta) {
  if (Status status = add(&Slot::static_bytes, delta, "static"); !status.ok() || delta >= 0) {
    return status;
  }
  return locked([&] {
    ring_waiting(*file_);
    return Status{};
  });
}

Status Member::add(Word Slot::* field, int64_t delta, const char* name) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  Word& word = file_->slot(index_).*field;
  uint64_t old = word.load();
  do {
    // Both fit in 57 bits unless the file or the caller is wrong.
    const bool fits = delta >= 0
                          ? old <= kMaxBytes && static_cast<uint64_t>(delta) <= kMaxBytes - old
                          : uint64_t{0} - static_cast<uint64_t>(delta) <= old;
    if (!fits) {
      return Status::error(Code::invalid_argument, "ledger: " + std::to_string(old) + " " + name +
                                                       " bytes cannot change by " +
                                                       std::to_string(delta));
    }
  } while (!word.compare_exchange_weak(old, old + static_cast<uint64_t>(delta)));
  return {};
}

Status Member::adopt(Member& other, int64_t bytes) {
  if (Status status = check_bytes(bytes, "what is adopted"); !status.ok()) return status;
  if (&other == this || other.file_ != file_) {
    return Status::error(Code::invalid_argument,
                         "ledger: only another member of the same ledger has bytes to adopt");
  }
  Wait wait;
  std::shared_lock others(other.leaving_, std::defer_lock);
  if (Status status = other.stay(wait, others); !status.ok()) return status;
  return locked([&] {
    if (Status status = other.check_owned(); !status.ok()) return status;
    Slot& from = file_->slot(other.index_);
    const auto amount = static_cast<uint64_t>(bytes);
    const uint64_t leased = from.leased.load();
    if (amount > leased) {
      return Status::error(Code::invalid_argument, "ledger: cannot adopt " + std::to_string(bytes) +
                                                       " bytes, the other member leased only " +
                                                       std::to_string(leased));
    }
    // In this order: who dies in the middle leaves too much in the account, until the driver's
    // figure is told again or as long as any process of the member lives, and never too little.
    const uint64_t committed = std::min(from.committed.load(), amount);
    Header& header = file_->header();
    header.adoptions.fetch_add(1);
    if (header.told.load() != 0) {
      header.external.store(std::min(header.external.load() + committed, kMaxBytes));
    }
    Word& owned = file_->slot(index_).static_bytes;
    owned.store(owned.load() + amount);
    from.committed.store(from.committed.load() - committed);
    from.unmapped.store(from.unmapped.load() - std::min(from.unmapped.load(), amount));
    from.leased.store(leased - amount);
    return Status{};
  });
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
Status Member::set_to_come(int64_t bytes) { return store(&Slot::to_come, bytes, "to come"); }
Status Member::set_guessed(int64_t bytes) { return store(&Slot::guessed, bytes, "guessed"); }
Status Member::set_returning(int64_t bytes) { return store(&Slot::returning, bytes, "returning"); }
Status Member::set_pinned(int64_t bytes) { return store(&Slot::pinned, bytes, "pinned"); }
Status Member::set_unmapped(int64_t bytes) { return store(&Slot::unmapped, bytes, "unmapped"); }
Status Member::touch() {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  file_->slot(index_).touched_ns.store(static_cast<uint64_t>(monotonic_ns()));
  return {};
}

Status Member::calm(bool& out) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  const Slot& own = file_->slot(index_);
  out = own.asked.load() == 0 && own.asked_running.load() == 0 &&
        own.trim_version.load() == own.trim_done.load() &&
        own.desired_version.load() == own.observed_version.load();
  for (int index = 0; out && index < kSlots; ++index) {
    const Slot& slot = file_->slot(index);
    out = index == index_ || slot.generation.load() == 0 || slot.demand.load() == 0;
  }
  return {};
}

Status Member::leased(uint64_t& bytes) {
  Wait wait;
  std::shared_lock staying(leaving_, std::defer_lock);
  if (Status status = stay(wait, staying); !status.ok()) return status;
  bytes = file_->slot(index_).leased.load();
  return {};
}

// Under steady load it is zero and stays zero, and then costs no lock.
Status Member::set_demand(int64_t bytes, int64_t waiting) {
  if (Status status = check_bytes(bytes, "demand"); !status.ok()) return status;
  if (Status status = check_bytes(waiting, "waiting"); !status.ok()) return status;
  const auto demand = static_cast<uint64_t>(bytes);
  {
    Wait wait;
    std::shared_lock staying(leaving_, std::defer_lock);
    if (Status status = stay(wait, staying); !status.ok()) return status;
    Slot& slot = file_->slot(index_);
    const int64_t now = monotonic_ns();
    // When it falls as well: an ask for it that stays would count as unanswered.
    const bool changed = demand != fresh_demand(slot, now);
    slot.waiting.store(static_cast<uint64_t>(waiting));
    slot.demand_ns.store(static_cast<uint64_t>(now));
    slot.demand.store(demand);
    if (!changed) return {};
  }
  return locked([&] { return replan(*file_); });
}

Status Member::ask(uint64_t& soft, uint64_t& running) {
  return locked([&] {
    if (Status status = replan(*file_); !status.ok()) return status;
    soft = file_->slot(index_).asked.load();
    running = file_->slot(index_).asked_running.load();
    return Status{};
  });
}

Status Member::others_wait(bool& wait) {
  return locked([&] {
    uint64_t bytes = 0;
    Status status = demand_of_others(*file_, index_, bytes);
    wait = bytes != 0;
    return status;
  });
}

Status Member::policy(Policy& out) {
  return locked([&] {
    const Slot& slot = file_->slot(index_);
    const auto unless_none = [](uint64_t value) {
      return value == kNone ? std::nullopt : std::optional(value);
    };
    if (Status status = check_slot(slot, index_, kMaxBytes); !status.ok()) return status;
    out.guarantee = slot.guarantee.load();
    out.limit = unless_none(slot.limit.load());
    out.weight = slot.weight.load();
    out.priority = slot.priority.load();
    out.cache_limit = unless_none(slot.cache_limit.load());
    out.version = slot.desired_version.load();
    out.observed = slot.observed_version.load();
    out.trim.reset();
    if (const uint64_t version = slot.trim_version.load(); version != slot.trim_done.load()) {
      out.trim = Trim{version, unless_none(slot.trim_bytes.load()), slot.trim_cached.load() != 0};
    }
    return Status{};
  });
}

Status Member::observe(uint64_t version) {
  return acknowledge(&Slot::desired_version, &Slot::observed_version, version, "policy");
}

Status Member::trim_done(uint64_t version) {
  return acknowledge(&Slot::trim_version, &Slot::trim_done, version, "trim");
}

Status Member::acknowledge(Word Slot::* issued, Word Slot::* done, uint64_t version,
                           const char* what) {
  return locked([&] {
    Slot& slot = file_->slot(index_);
    if (version > (slot.*issued).load()) {
      return Status::error(Code::invalid_argument, std::string("ledger: there is no ") + what +
                                                       " version " + std::to_string(version) +
                                                       " yet");
    }
    (slot.*done).store(version);
    return Status{};
  });
}

Status Member::info(MemberInfo& out) {
  return locked([&] {
    out = describe(*file_, index_);
    return Status{};
  });
}

Status Member::leave() {
  // A forked child never held the byte.
  if (life_->lost_in_fork() || left_.exchange(true)) return {};
  ring(file_->slot(index_).bell);  // those of our threads that wait for it see that we left
  Wait wait;
  std::unique_lock leaving(leaving_, std::defer_lock);
  wait.acquire(leaving);
  Section section;
  Status status = section.enter(*file_);
  life_->close();
  // If we die here, or could not enter, the slot has no living process and is reaped.
  Slot& slot = file_->slot(index_);
  if (status.ok() && slot.generation.load() == generation_ && !file_->alive(index_)) {
    record(*file_, Kind::leave, index_, slot.leased.load());
    slot.generation.store(0);
    ring_waiting(*file_);
    (void)replan(*file_);
  }
  return status;
}

}  // namespace kvc
