// SPDX-License-Identifier: Apache-2.0
#include "ledger_format.h"

#include <unistd.h>

#include <chrono>
#include <cstring>

namespace kvc::ledger {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

int64_t monotonic_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

Status check_slot(const Slot& slot, int index, uint64_t capacity) {
  const struct {
    const char* name;
    const Word& value;
    uint64_t limit;
    uint64_t besides = 0;  // a value that is right too
  } fields[] = {{"leased bytes", slot.leased, capacity},
                {"committed bytes", slot.committed, kMaxBytes},
                {"parked bytes", slot.parked, kMaxBytes},
                {"cached bytes", slot.cached, kMaxBytes},
                {"static bytes", slot.static_bytes, kMaxBytes},
                {"bytes of demand", slot.demand, kMaxBytes},
                {"returning bytes", slot.returning, kMaxBytes},
                {"pinned bytes", slot.pinned, kMaxBytes},
                {"unmapped bytes", slot.unmapped, kMaxBytes},
                {"bytes to come", slot.to_come, kMaxBytes},
                {"guessed bytes", slot.guessed, kMaxBytes},
                {"guaranteed bytes", slot.guarantee, kMaxBytes},
                {"bytes of limit", slot.limit, kMaxBytes, kNone},
                {"of priority", slot.priority, kMaxPriority},
                {"of weight", slot.weight, kMaxWeight}};
  for (const auto& field : fields) {
    const uint64_t value = field.value.load();
    if (value <= field.limit || (field.besides != 0 && value == field.besides)) continue;
    return Status::error(Code::lost, "ledger: slot " + std::to_string(index) + " claims " +
                                         std::to_string(value) + " " + field.name +
                                         ", which cannot be; the file is damaged. Stop its "
                                         "members and delete it");
  }
  return {};
}

std::string printable(const char* text, size_t size) {
  std::string copy(text, strnlen(text, size));
  for (char& c : copy) {
    if (c < ' ' || c > '~') c = '?';
  }
  return copy;
}

Status check_name(const std::string& name) {
  bool printable = !name.empty() && name.size() < kNameBytes;
  for (const char c : name) printable = printable && c >= ' ' && c <= '~';
  if (printable) return {};
  return Status::error(Code::invalid_argument, "ledger: a member's name must be 1 to " +
                                                   std::to_string(kNameBytes - 1) +
                                                   " printable ASCII characters");
}

void fill_slot(Slot& slot, const std::string& name, uint64_t static_bytes) {
  std::memset(static_cast<void*>(&slot), 0, sizeof(slot));
  slot.static_bytes.store(static_bytes);
  slot.limit.store(kNone);
  slot.cache_limit.store(kNone);
  slot.weight.store(kDefaultWeight);
  slot.desired_version.store(1);
  slot.observed_version.store(1);
  slot.touched_ns.store(static_cast<uint64_t>(monotonic_ns()));
  slot.started_ns = now_ns();
  slot.pid = getpid();
  std::memcpy(slot.name, name.data(), name.size());
}

void build(File& file, uint64_t capacity, uint64_t headroom) {
  Header& header = file.header;
  header.version.store(0);
  header.magic.store(kMagic);
  const int64_t before = header.created_ns;
  auto* rest = reinterpret_cast<unsigned char*>(&file) + offsetof(Header, layout);
  std::memset(rest, 0, sizeof(file) - offsetof(Header, layout));
  header.layout = kLayout;
  header.file_bytes = sizeof(File);
  header.created_ns = now_ns();
  if (header.created_ns == before) ++header.created_ns;
  header.capacity.store(capacity);
  header.headroom.store(headroom);
  header.next_generation.store(1);
  header.next_event.store(1);
  header.version.store(kVersion);
}

}  // namespace kvc::ledger
