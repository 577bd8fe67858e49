// SPDX-License-Identifier: Apache-2.0
#include "kvcached/ledger.h"

#include <algorithm>
#include <cstring>

#include "ledger_account.h"
#include "ledger_admission.h"
#include "ledger_events.h"
#include "ledger_file.h"

namespace kvc {

using namespace ledger;

Status Ledger::open(const std::string& path, std::optional<int64_t> capacity,
                    std::optional<int64_t> headroom, std::unique_ptr<Ledger>& out) {
  std::optional<uint64_t> wanted_capacity;
  std::optional<uint64_t> wanted_headroom;
  if (capacity) {
    if (Status status = check_bytes(*capacity, "the capacity"); !status.ok()) return status;
    wanted_capacity = static_cast<uint64_t>(*capacity);
  }
  if (headroom) {
    if (Status status = check_bytes(*headroom, "the headroom"); !status.ok()) return status;
    wanted_headroom = static_cast<uint64_t>(*headroom);
  }
  std::shared_ptr<LedgerFile> file;
  if (Status status = LedgerFile::open(path, wanted_capacity, wanted_headroom, file);
      !status.ok()) {
    return status;
  }
  out.reset(new Ledger(std::move(file)));
  return {};
}

Status Ledger::remove(const std::string& path) { return LedgerFile::remove(path); }

const std::string& Ledger::path() const { return file_->path(); }
uint64_t Ledger::capacity() const { return file_->header().capacity.load(); }
uint64_t Ledger::headroom() const { return file_->header().headroom.load(); }
uint64_t Ledger::external() const { return file_->header().external.load(); }
bool Ledger::told() const { return file_->header().told.load() != 0; }
uint32_t Ledger::version() const { return file_->header().version.load(); }
double Ledger::create_time() const { return static_cast<double>(file_->created_ns()) * 1e-9; }

uint64_t Ledger::reading() const { return file_->header().adoptions.load(); }

// The external use is worked out now and not when it is needed: members that commit later would
// otherwise eat into it, since `bytes` does not know of their pages. What the driver still holds
// for the dead is external too, so nobody is promised it before it is free.
//
// What is committed and may not be mapped yet makes the figure uncertain by so much. Then it only
// moves as far as it is known to be wrong: more would promise those bytes twice, or to nobody.
Status Ledger::set_device_used(int64_t bytes, std::optional<uint64_t> reading) {
  if (Status status = check_bytes(bytes, "the bytes in use"); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (reading && *reading != this->reading()) return {};
  uint64_t committed = 0;
  uint64_t unmapped = 0;
  for (int index = 0; index < kSlots; ++index) {
    const Slot& slot = file_->slot(index);
    if (slot.generation.load() == 0 || !file_->alive(index)) continue;
    if (Status status = check_slot(slot, index, kMaxBytes); !status.ok()) return status;
    committed += slot.committed.load();
    unmapped += slot.unmapped.load();
  }
  Tally sum;
  // A ledger that is damaged says so to those who lease.
  const bool was = tally(*file_, sum).ok() && sum.overdraft() != 0;
  const auto used = static_cast<uint64_t>(bytes);
  const uint64_t least = used > committed ? used - committed : 0;
  Word& external = file_->header().external;
  file_->header().told.store(1);
  external.store(std::clamp(external.load(), least, least + unmapped));
  if (!was && tally(*file_, sum).ok() && sum.overdraft() != 0) {
    record(*file_, Kind::overdraft, -1, sum.overdraft(),
           "others use memory that was promised to members");
  }
  return replan(*file_);
}

Status Ledger::available(uint64_t& bytes) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  reap_dead(*file_, nullptr);
  Tally sum;
  if (Status status = tally(*file_, sum); !status.ok()) return status;
  bytes = sum.available();
  return {};
}

Status Ledger::total_leased(uint64_t& bytes) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  Tally sum;
  if (Status status = tally(*file_, sum); !status.ok()) return status;
  bytes = sum.leased;
  return {};
}

Status Ledger::total_demand(int except_slot, uint64_t& bytes) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  return demand_of_others(*file_, except_slot, bytes);
}

Status Ledger::members(std::vector<MemberInfo>& out) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  out.clear();
  for (int index = 0; index < kSlots; ++index) {
    if (file_->slot(index).generation.load() != 0) out.push_back(describe(*file_, index));
  }
  return {};
}

Status Ledger::reap(std::vector<MemberInfo>& out) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = file_->still_at_path(); !status.ok()) return status;
  out.clear();
  reap_dead(*file_, &out);
  return {};
}

// A description of its own for every Member: locks on one byte through one description would be
// one lock, and the first to leave would drop it for all.
Status Ledger::take_byte(int slot, std::unique_ptr<LockFd>& out) {
  auto life = std::make_unique<LockFd>();
  int error = life->reopen(file_->fd());
  if (error == 0) error = life->try_lock(kMemberBytes + slot, false);
  if (error != 0) {
    return Status::error(
        Code::driver,
        describe_errno(
            "ledger " + path() + ": cannot lock the byte of slot " + std::to_string(slot), error) +
            "; is /proc mounted, and is the file on a local file system?",
        error);
  }
  out = std::move(life);
  return {};
}

Status Ledger::join(const std::string& name, int64_t static_bytes, const PolicyChange& policy,
                    std::unique_ptr<Member>& out) {
  if (Status status = check_name(name); !status.ok()) return status;
  if (Status status = policy.check(); !status.ok()) return status;
  if (Status status = check_bytes(static_bytes, "static_bytes"); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = file_->still_at_path(); !status.ok()) return status;
  // Someone may have opened it with another capacity while nobody was a member.
  if (Status status = file_->still_as_wanted(); !status.ok()) return status;
  reap_dead(*file_, nullptr);
  const auto guarantee = static_cast<uint64_t>(policy.guarantee.value_or(0));
  if (Status status = admit(*file_, {-1, name, guarantee, static_cast<uint64_t>(static_bytes)});
      !status.ok()) {
    return status;
  }
  for (int index = 0; index < kSlots; ++index) {
    Slot& slot = file_->slot(index);
    // Whoever holds the byte of a free slot would hide our death.
    if (slot.generation.load() != 0 || file_->alive(index)) continue;
    std::unique_ptr<LockFd> life;
    if (Status status = take_byte(index, life); !status.ok()) return status;
    Header& header = file_->header();
    const uint64_t generation = std::max<uint64_t>(header.next_generation.load(), 1);
    header.next_generation.store(generation + 1);
    fill_slot(slot, name, static_cast<uint64_t>(static_bytes));
    (void)apply(slot, policy);
    slot.generation.store(generation);
    record(*file_, Kind::join, index, static_cast<uint64_t>(static_bytes));
    out.reset(new Member(file_, std::move(life), index, generation));
    return {};
  }
  return Status::error(Code::not_supported, "ledger " + path() + ": all " + std::to_string(kSlots) +
                                                " slots belong to living members; stop one first");
}

Status Ledger::attach(int slot, uint64_t generation, std::unique_ptr<Member>& out) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = file_->still_at_path(); !status.ok()) return status;
  if (Status status = find_member(slot, generation); !status.ok()) return status;
  std::unique_ptr<LockFd> life;
  if (Status status = take_byte(slot, life); !status.ok()) return status;
  out.reset(new Member(file_, std::move(life), slot, generation));
  return {};
}

}  // namespace kvc
