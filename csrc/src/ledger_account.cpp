// SPDX-License-Identifier: Apache-2.0
#include "ledger_account.h"

#include <algorithm>

namespace kvc::ledger {

Status tally(LedgerFile& file, Tally& out) {
  const Header& header = file.header();
  const uint64_t capacity = header.capacity.load();
  const uint64_t headroom = header.headroom.load();
  const uint64_t external = header.external.load();
  Tally sum;
  for (int index = 0; index < kSlots; ++index) {
    const Slot& slot = file.slot(index);
    if (slot.generation.load() == 0) continue;
    if (Status status = check_slot(slot, index, capacity); !status.ok()) return status;
    sum.leased += slot.leased.load();
    sum.static_bytes += slot.static_bytes.load();
  }
  if (capacity > kMaxBytes || headroom > capacity || external > kMaxBytes ||
      sum.leased > capacity) {
    return Status::error(Code::lost, "ledger " + file.path() +
                                         " promises more than its capacity, or has an impossible "
                                         "one; it is damaged. Stop its members and delete it");
  }
  const uint64_t taken = headroom + std::max(external, sum.static_bytes) + sum.leased;
  sum.available = taken < capacity ? capacity - taken : 0;
  out = sum;
  return {};
}

MemberInfo describe(LedgerFile& file, int index) {
  const Slot& slot = file.slot(index);
  MemberInfo info;
  info.slot = index;
  info.generation = slot.generation.load();
  info.name = slot_name(slot);
  info.pid = slot.pid;
  info.alive = file.alive(index);
  info.leased = slot.leased.load();
  info.committed = slot.committed.load();
  info.parked = slot.parked.load();
  info.cached = slot.cached.load();
  info.static_bytes = slot.static_bytes.load();
  info.demand = slot.demand.load();
  info.limit = slot.limit.load();
  info.guarantee = slot.guarantee.load();
  info.weight = slot.weight.load();
  info.priority = slot.priority.load();
  info.started = static_cast<double>(slot.started_ns) * 1e-9;
  return info;
}

void reap_dead(LedgerFile& file, std::vector<MemberInfo>* reaped) {
  for (int index = 0; index < kSlots; ++index) {
    Slot& slot = file.slot(index);
    if (slot.generation.load() == 0 || file.alive(index)) continue;
    if (reaped != nullptr) reaped->push_back(describe(file, index));
    slot.generation.store(0);
  }
}

Status check_bytes(int64_t bytes, const char* what) {
  if (bytes >= 0 && static_cast<uint64_t>(bytes) <= kMaxBytes) return {};
  return Status::error(
      Code::invalid_argument,
      std::string("ledger: ") + what + " must be 0 to 2^56 bytes, not " + std::to_string(bytes));
}

}  // namespace kvc::ledger
