// SPDX-License-Identifier: Apache-2.0
#include "ledger_account.h"

#include <algorithm>

#include "ledger_bell.h"
#include "ledger_events.h"

namespace kvc::ledger {
namespace {

// Of a stamp from the file: one from the future counts as now, so a damaged one does no lasting
// harm. Stamps a little ahead are right: others store theirs without the lock.
int64_t age_ns(const Word& stamp, int64_t now) {
  const auto then = static_cast<int64_t>(stamp.load());
  return then >= 0 && then < now ? now - then : 0;
}

bool passed(const Slot& slot, int64_t now) {
  const auto until = static_cast<int64_t>(slot.passed_until_ns.load());
  return until > now && until - now <= kPassedNs;
}

void view(const Slot& slot, int index, int64_t now, View& out) {
  out.slot = index;
  out.leased = slot.leased.load();
  out.returning = slot.returning.load();
  out.parked = slot.parked.load();
  out.cached = slot.cached.load();
  out.pinned = slot.pinned.load();
  out.demand = fresh_demand(slot, now);
  out.limit = slot.limit.load();
  out.guarantee = std::min(slot.guarantee.load(), out.limit);
  out.weight = std::max<uint64_t>(slot.weight.load(), 1);
  out.priority = slot.priority.load();
  out.idle_ns = age_ns(slot.touched_ns, now);
  out.passed = passed(slot, now);
}

std::optional<uint64_t> unless_none(uint64_t value) {
  return value == kNone ? std::nullopt : std::optional(value);
}

std::string cause_of(LedgerFile& file, const Ask& ask) {
  if (ask.cause == kForLimit) return "it is above its limit";
  if (ask.cause == kForOverdraft) return "others use memory that was promised";
  return "for slot " + std::to_string(ask.cause) + ", " + slot_name(file.slot(ask.cause));
}

// Passes over who has not answered the last plan in time.
void check_answer(LedgerFile& file, View& member, int64_t now) {
  Slot& slot = file.slot(member.slot);
  const uint64_t asked = slot.asked.load() + slot.asked_running.load();
  if (asked == 0) return;
  const auto since = static_cast<int64_t>(slot.ask_since_ns.load());
  if (held(member) < slot.ask_held.load() || since < 0 || since > now + kPassedNs) {
    slot.ask_held.store(held(member));
    slot.ask_since_ns.store(static_cast<uint64_t>(now));
  } else if (!member.passed && now - since > kAnswerNs) {
    member.passed = true;
    slot.passed_until_ns.store(static_cast<uint64_t>(now + kPassedNs));
    slot.ask_since_ns.store(static_cast<uint64_t>(now + kPassedNs));  // then it has time again
    slot.passed_over.fetch_add(1);
    record(file, Kind::passed_over, member.slot, asked, "gave nothing back in time");
  }
}

void store_ask(LedgerFile& file, const View& member, const Ask& ask, int64_t now) {
  Slot& slot = file.slot(member.slot);
  const uint64_t soft = slot.asked.load();
  const uint64_t running = slot.asked_running.load();
  if (ask.soft == soft && ask.running == running) return;
  if (soft == 0 && running == 0) {
    slot.ask_held.store(held(member));
    slot.ask_since_ns.store(static_cast<uint64_t>(now));
    record(file, Kind::ask, member.slot, ask.total(), cause_of(file, ask));
  }
  slot.asked.store(ask.soft);
  slot.asked_running.store(ask.running);
  if (ask.soft > soft || ask.running > running) ring(slot.bell);
}

}  // namespace

uint64_t fresh_demand(const Slot& slot, int64_t now) {
  const uint64_t demand = slot.demand.load();
  if (demand == 0) return 0;
  const auto ahead = static_cast<int64_t>(slot.demand_ns.load() - static_cast<uint64_t>(now));
  return ahead > -kDemandNs && ahead < kDemandNs ? demand : 0;
}

Status tally(LedgerFile& file, Tally& out) {
  const Header& header = file.header();
  const uint64_t capacity = header.capacity.load();
  const uint64_t headroom = header.headroom.load();
  const uint64_t external = header.external.load();
  const int64_t now = monotonic_ns();
  out.leased = 0;
  uint64_t claimed = 0;  // for anything but KV
  uint64_t guessed = 0;
  uint64_t to_come = 0;
  out.state.count = 0;
  for (int index = 0; index < kSlots; ++index) {
    const Slot& slot = file.slot(index);
    if (slot.generation.load() == 0) continue;
    if (Status status = check_slot(slot, index, capacity); !status.ok()) return status;
    View& member = out.state.members[out.state.count++];
    view(slot, index, now, member);
    out.leased += member.leased;
    const uint64_t own = slot.static_bytes.load();  // once: it may change, and parts are no more
    claimed += own;
    guessed += std::min(slot.guessed.load(), own);
    to_come += std::min(slot.to_come.load(), own);
  }
  if (capacity > kMaxBytes || headroom > capacity || external > kMaxBytes ||
      out.leased > capacity) {
    return Status::error(Code::lost, "ledger " + file.path() +
                                         " promises more than its capacity, or has an impossible "
                                         "one; it is damaged. Stop its members and delete it");
  }
  // The driver knows what is in use, and not what members were promised on top. Its figure may be
  // a moment old, so what they say they hold counts if that is more.
  const uint64_t beside =
      header.told.load() != 0 ? std::max(external + to_come, claimed - guessed) : claimed;
  out.state.avail = Wide{capacity} - headroom - beside - out.leased;
  return {};
}

Status demand_of_others(LedgerFile& file, int except_slot, uint64_t& bytes) {
  const int64_t now = monotonic_ns();
  uint64_t sum = 0;
  for (int index = 0; index < kSlots; ++index) {
    const Slot& slot = file.slot(index);
    if (slot.generation.load() == 0 || index == except_slot) continue;
    if (Status status = check_slot(slot, index, kMaxBytes); !status.ok()) return status;
    const uint64_t demand = fresh_demand(slot, now);
    if (demand != 0 && file.alive(index)) sum += demand;
  }
  bytes = sum;
  return {};
}

MemberInfo describe(LedgerFile& file, int index) {
  const Slot& slot = file.slot(index);
  const int64_t now = monotonic_ns();
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
  info.to_come = std::min(slot.to_come.load(), info.static_bytes);
  info.guessed = std::min(slot.guessed.load(), info.static_bytes);
  info.demand = fresh_demand(slot, now);
  info.limit = unless_none(slot.limit.load());
  info.cache_limit = unless_none(slot.cache_limit.load());
  info.guarantee = slot.guarantee.load();
  info.weight = slot.weight.load();
  info.priority = slot.priority.load();
  info.desired_version = slot.desired_version.load();
  info.observed_version = slot.observed_version.load();
  info.asked = slot.asked.load();
  info.asked_running = slot.asked_running.load();
  info.returning = slot.returning.load();
  info.pinned = slot.pinned.load();
  info.waiting = info.demand != 0 ? slot.waiting.load() : 0;
  info.idle_s = static_cast<double>(age_ns(slot.touched_ns, now)) * 1e-9;
  info.passed_over = slot.passed_over.load();
  info.trim_pending = slot.trim_version.load() != slot.trim_done.load();
  for (int i = 0; i < kCounters; ++i) info.counters[i] = slot.counters[i].load();
  for (int i = 0; i < kTimes; ++i) {
    for (int k = 0; k < kBuckets; ++k) info.times[i].counts[k] = slot.times[i].counts[k].load();
    info.times[i].sum_s = static_cast<double>(slot.times[i].sum_ns.load()) * 1e-9;
  }
  info.started = static_cast<double>(slot.started_ns) * 1e-9;
  return info;
}

void reap_dead(LedgerFile& file, std::vector<MemberInfo>* reaped) {
  bool any = false;
  for (int index = 0; index < kSlots; ++index) {
    Slot& slot = file.slot(index);
    if (slot.generation.load() == 0 || file.alive(index)) continue;
    if (reaped != nullptr) reaped->push_back(describe(file, index));
    record(file, Kind::died, index, slot.leased.load());
    slot.generation.store(0);
    any = true;
  }
  if (any) ring_waiting(file);
}

void ring_waiting(LedgerFile& file) {
  int64_t now = 0;  // hardly ever does anybody wait
  for (int index = 0; index < kSlots; ++index) {
    Slot& slot = file.slot(index);
    if (slot.generation.load() == 0 || slot.demand.load() == 0) continue;
    if (now == 0) now = monotonic_ns();
    if (fresh_demand(slot, now) != 0) ring(slot.bell);
  }
}

Status replan(LedgerFile& file) {
  reap_dead(file, nullptr);
  Tally sum;
  if (Status status = tally(file, sum); !status.ok()) return status;
  const int64_t now = monotonic_ns();
  State& state = sum.state;
  for (int i = 0; i < state.count; ++i) check_answer(file, state.members[i], now);
  Asks asks;
  plan(state, asks);
  for (int i = 0; i < state.count; ++i) store_ask(file, state.members[i], asks[i], now);
  return {};
}

Status check_bytes(int64_t bytes, const char* what) {
  if (bytes >= 0 && static_cast<uint64_t>(bytes) <= kMaxBytes) return {};
  return Status::error(
      Code::invalid_argument,
      std::string("ledger: ") + what + " must be 0 to 2^56 bytes, not " + std::to_string(bytes));
}

}  // namespace kvc::ledger
