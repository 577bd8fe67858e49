// SPDX-License-Identifier: Apache-2.0
// Sums over the slots of a ledger. All of it needs the critical section.
#pragma once

#include <cstdint>
#include <vector>

#include "kvcached/ledger.h"
#include "ledger_file.h"

namespace kvc::ledger {

struct Tally {
  uint64_t leased = 0;
  uint64_t static_bytes = 0;
  uint64_t available = 0;
};

// Fails with `lost` if the file holds what no sequence of operations could have written.
Status tally(LedgerFile& file, Tally& out);
MemberInfo describe(LedgerFile& file, int index);
// Frees the slots of the dead; says who they were if asked to.
void reap_dead(LedgerFile& file, std::vector<MemberInfo>* reaped);
Status check_bytes(int64_t bytes, const char* what);

}  // namespace kvc::ledger
