// SPDX-License-Identifier: Apache-2.0
#include "ledger_events.h"

#include <algorithm>
#include <cstring>

namespace kvc::ledger {
namespace {

template <size_t size>
void copy_text(char (&out)[size], const std::string& text) {
  std::memset(out, 0, size);
  std::memcpy(out, text.data(), std::min(text.size(), size));
}

}  // namespace

void record(LedgerFile& file, Kind kind, int slot, uint64_t bytes, const std::string& text,
            const std::string& name) {
  Word& next = file.header().next_event;
  const uint64_t seq = std::max<uint64_t>(next.load(), 1);
  next.store(seq + 1);
  Event& event = file.event(static_cast<int>(seq % kEvents));
  event.seq.store(0);
  event.time_ns = now_ns();
  event.bytes = bytes;
  event.kind = static_cast<int32_t>(kind);
  event.slot = slot;
  copy_text(event.name, name.empty() && slot >= 0 ? slot_name(file.slot(slot)) : name);
  copy_text(event.text, text);
  event.seq.store(seq);
}

void read_events(LedgerFile& file, uint64_t since, std::vector<LedgerEvent>& out) {
  out.clear();
  const uint64_t next = file.header().next_event.load();
  for (int index = 0; index < kEvents; ++index) {
    const Event& event = file.event(index);
    const uint64_t seq = event.seq.load();
    const int32_t kind = event.kind;
    if (seq == 0 || seq % kEvents != static_cast<uint64_t>(index) || seq >= next ||
        next - seq > kEvents || seq <= since || kind < 0 ||
        kind >= static_cast<int>(std::size(kKindNames))) {
      continue;  // never written, half written by one who died, or not by us
    }
    const int32_t slot = event.slot;
    out.push_back({seq, static_cast<double>(event.time_ns) * 1e-9, std::string(kKindNames[kind]),
                   slot >= 0 && slot < kSlots ? slot : -1, printable(event.name, kNameBytes),
                   event.bytes, printable(event.text, kTextBytes)});
  }
  std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.seq < b.seq; });
}

}  // namespace kvc::ledger
