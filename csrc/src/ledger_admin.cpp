// SPDX-License-Identifier: Apache-2.0
// Policies: who may set which, and what they are told if not.
#include <algorithm>
#include <cstdlib>

#include "kvcached/ledger.h"
#include "ledger_account.h"
#include "ledger_admission.h"
#include "ledger_bell.h"
#include "ledger_events.h"

namespace kvc {

using namespace ledger;

namespace {

Status wrong(const std::string& what) {
  return Status::error(Code::invalid_argument, "ledger: " + what);
}

std::string text_of(uint64_t value) { return value == kNone ? "none" : std::to_string(value); }

struct Field {
  const char* name;
  Word Slot::* word;
  std::optional<uint64_t> value;
};

std::optional<uint64_t> word_of(const std::optional<int64_t>& value) {
  if (!value) return std::nullopt;
  return *value < 0 ? kNone : static_cast<uint64_t>(*value);
}

}  // namespace

Status PolicyChange::check() const {
  constexpr int64_t kMost = static_cast<int64_t>(kMaxBytes);
  const struct {
    const char* name;
    const std::optional<int64_t>& value;
    int64_t least;
    int64_t most;
    const char* range;
  } fields[] = {{"guarantee", guarantee, 0, kMost, "0 to 2^56 bytes"},
                {"limit", limit, -1, kMost, "0 to 2^56 bytes, or -1 for none"},
                {"weight", weight, 1, kMaxWeight, "1 to 10000"},
                {"priority", priority, 0, kMaxPriority, "0 to 100"},
                {"cache_limit", cache_limit, -1, kMost, "0 to 2^56 bytes, or -1 for none"}};
  for (const auto& field : fields) {
    if (!field.value || (*field.value >= field.least && *field.value <= field.most)) continue;
    return wrong(std::string(field.name) + " must be " + field.range + ", not " +
                 std::to_string(*field.value));
  }
  return check_limits(word_of(guarantee).value_or(0), word_of(limit).value_or(kNone));
}

namespace ledger {

Status check_limits(uint64_t guarantee, uint64_t limit) {
  if (limit >= guarantee) return {};
  return wrong("a limit of " + text_of(limit) + " bytes is below the guarantee of " +
               text_of(guarantee) + "; lower the guarantee, or raise the limit");
}

std::string apply(Slot& slot, const PolicyChange& change) {
  Field fields[] = {{"guarantee", &Slot::guarantee, word_of(change.guarantee)},
                    {"limit", &Slot::limit, word_of(change.limit)},
                    {"weight", &Slot::weight, word_of(change.weight)},
                    {"priority", &Slot::priority, word_of(change.priority)},
                    {"cache_limit", &Slot::cache_limit, word_of(change.cache_limit)}};
  // Whoever dies in between leaves no limit below a guarantee.
  if (fields[1].value && *fields[1].value > slot.limit.load()) std::swap(fields[0], fields[1]);
  std::string text;
  for (const Field& field : fields) {
    Word& word = slot.*field.word;
    const uint64_t before = word.load();
    if (!field.value || *field.value == before) continue;
    word.store(*field.value);
    text += (text.empty() ? "" : ", ") + std::string(field.name) + " " + text_of(before) + " to " +
            text_of(*field.value);
  }
  return text;
}

Status admit(LedgerFile& file, const Newcomer& who) {
  if (who.guarantee == 0 && who.static_bytes == 0) return {};  // it claims nothing
  const uint64_t capacity = file.header().capacity.load();
  const uint64_t headroom = file.header().headroom.load();
  uint64_t taken = headroom;
  std::string holders;
  int unnamed = 0;
  for (int index = 0; index < kSlots; ++index) {
    const Slot& slot = file.slot(index);
    if (slot.generation.load() == 0 || index == who.slot) continue;
    if (Status status = check_slot(slot, index, capacity); !status.ok()) return status;
    const uint64_t guarantee = slot.guarantee.load();
    const uint64_t static_bytes = slot.static_bytes.load();
    if (guarantee == 0 && static_bytes == 0) continue;
    taken += guarantee + static_bytes;
    if (holders.size() > 400) {
      ++unnamed;
      continue;
    }
    holders += "; slot " + std::to_string(index) + " (" + slot_name(slot) +
               ") has a guarantee of " + std::to_string(guarantee) + " and " +
               std::to_string(static_bytes) + " static";
  }
  const uint64_t room = taken < capacity ? capacity - taken : 0;
  if (who.guarantee + who.static_bytes <= room) return {};
  if (unnamed != 0) holders += "; and " + std::to_string(unnamed) + " more";
  const uint64_t most = room > who.static_bytes ? room - who.static_bytes : 0;
  const std::string remedy =
      room < who.static_bytes
          ? "; stop a member, or lower a guarantee"
          : "; ask for " + std::to_string(most) + " at most, lower a guarantee, or stop a member";
  record(file, Kind::refused, who.slot, who.guarantee,
         "no room for it and " + std::to_string(who.static_bytes) + " static bytes", who.name);
  return Status::error(
      Code::refused, "ledger " + file.path() + ": a guarantee of " + std::to_string(who.guarantee) +
                         " bytes and " + std::to_string(who.static_bytes) + " static for " +
                         who.name + " do not fit in " + std::to_string(capacity) +
                         " less a headroom of " + std::to_string(headroom) + holders + remedy);
}

}  // namespace ledger

Status Ledger::find_member(int slot, uint64_t generation) const {
  if (slot < 0 || slot >= kSlots) {
    return wrong("slot " + std::to_string(slot) + " is not in 0.." + std::to_string(kSlots - 1));
  }
  if (generation != 0 && file_->slot(slot).generation.load() == generation && file_->alive(slot)) {
    return {};
  }
  return Status::error(Code::lost, "ledger " + path() + ": the member of slot " +
                                       std::to_string(slot) + ", generation " +
                                       std::to_string(generation) +
                                       ", has left or died; start its engine again");
}

Status Ledger::set_policy(int index, uint64_t generation, const PolicyChange& change,
                          uint64_t& version) {
  if (Status status = change.check(); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = find_member(index, generation); !status.ok()) return status;
  reap_dead(*file_, nullptr);
  Slot& slot = file_->slot(index);
  version = slot.desired_version.load();
  if (change.expected_version && *change.expected_version != version) {
    return Status::error(Code::refused, "ledger " + path() + ": the policy of slot " +
                                            std::to_string(index) + " (" + slot_name(slot) +
                                            ") is at version " + std::to_string(version) +
                                            ", not " + std::to_string(*change.expected_version) +
                                            ": somebody else changed it; look again, then retry");
  }
  const uint64_t guarantee = word_of(change.guarantee).value_or(slot.guarantee.load());
  const uint64_t limit = word_of(change.limit).value_or(slot.limit.load());
  if (Status status = check_limits(guarantee, limit); !status.ok()) return status;
  if (guarantee > slot.guarantee.load()) {
    const Newcomer who{index, slot_name(slot), guarantee, slot.static_bytes.load()};
    if (Status status = admit(*file_, who); !status.ok()) return status;
  }
  const std::string text = apply(slot, change);
  if (text.empty()) return {};  // as it was: nothing to acknowledge
  slot.desired_version.store(++version);
  record(*file_, Kind::policy, index, 0, text);
  ring(slot.bell);
  ring_waiting(*file_);  // those may now get more
  return replan(*file_);
}

Status Ledger::trim(int index, uint64_t generation, int64_t bytes, bool cached, uint64_t& version) {
  if (bytes != -1) {
    if (Status status = check_bytes(bytes, "a trim"); !status.ok()) return status;
  }
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  if (Status status = find_member(index, generation); !status.ok()) return status;
  Slot& slot = file_->slot(index);
  slot.trim_bytes.store(bytes < 0 ? kNone : static_cast<uint64_t>(bytes));
  slot.trim_cached.store(cached ? 1 : 0);
  version = slot.trim_version.load() + 1;
  slot.trim_version.store(version);
  record(*file_, Kind::trim, index, bytes < 0 ? 0 : static_cast<uint64_t>(bytes),
         std::string(bytes < 0 ? "all " : "") + (cached ? "parked and cached" : "parked"));
  ring(slot.bell);
  return replan(*file_);
}

Status Ledger::events(uint64_t since, std::vector<LedgerEvent>& out) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  read_events(*file_, since, out);
  return {};
}

Status Ledger::note(const std::string& kind, int slot, int64_t bytes) {
  const auto* found = std::find(std::begin(kKindNames), std::end(kKindNames), kind);
  if (found == std::end(kKindNames)) return wrong("there is no kind of event '" + kind + "'");
  if (slot < -1 || slot >= kSlots) return wrong("there is no slot " + std::to_string(slot));
  if (Status status = check_bytes(bytes, "the bytes of an event"); !status.ok()) return status;
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  record(*file_, static_cast<Kind>(found - std::begin(kKindNames)), slot,
         static_cast<uint64_t>(bytes));
  return {};
}

Status Ledger::overdraft(uint64_t& bytes) {
  Section section;
  if (Status status = section.enter(*file_); !status.ok()) return status;
  reap_dead(*file_, nullptr);
  Tally sum;
  if (Status status = tally(*file_, sum); !status.ok()) return status;
  bytes = sum.overdraft();
  return {};
}

}  // namespace kvc
