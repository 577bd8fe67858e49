// SPDX-License-Identifier: Apache-2.0
// Whether a policy may be, and its words in a slot. All of it needs the critical section.
#pragma once

#include <cstdint>
#include <string>

#include "kvcached/ledger.h"
#include "ledger_file.h"

namespace kvc::ledger {

struct Newcomer {
  int slot;  // -1: none yet
  std::string name;
  uint64_t guarantee;
  uint64_t static_bytes;
};

// Refused, and on record, if it does not fit beside the guarantees and static bytes of the others.
Status admit(LedgerFile& file, const Newcomer& who);
Status check_limits(uint64_t guarantee, uint64_t limit);
// Stores what the change names; says what that changed.
std::string apply(Slot& slot, const PolicyChange& change);

}  // namespace kvc::ledger
