// SPDX-License-Identifier: Apache-2.0
// The slots of a ledger taken together. All of it needs the critical section.
#pragma once

#include <cstdint>
#include <vector>

#include "kvcached/ledger.h"
#include "ledger_file.h"
#include "ledger_policy.h"

namespace kvc::ledger {

struct Tally {
  uint64_t leased = 0;
  State state;
  uint64_t overdraft() const { return state.avail < 0 ? static_cast<uint64_t>(-state.avail) : 0; }
  uint64_t available() const { return state.avail > 0 ? static_cast<uint64_t>(state.avail) : 0; }
};

// A demand counts for this long unless it is posted again: who stopped waiting may have died.
inline constexpr int64_t kDemandNs = 5'000'000'000;
inline constexpr int64_t kAnswerNs =
    1'000'000'000;  // how long a member may leave an ask unanswered
inline constexpr int64_t kPassedNs = 3'000'000'000;  // and is left in peace afterwards

// Fails with `lost` if the file holds what no sequence of operations could have written. Counts
// the dead too, until they are reaped.
Status tally(LedgerFile& file, Tally& out);
// 0 if it was posted too long ago.
uint64_t fresh_demand(const Slot& slot, int64_t now);
// What all members but one wait for; the dead wait for nothing.
Status demand_of_others(LedgerFile& file, int except_slot, uint64_t& bytes);
MemberInfo describe(LedgerFile& file, int index);
// Frees the slots of the dead; says who they were if asked to.
void reap_dead(LedgerFile& file, std::vector<MemberInfo>* reaped);
// Tells those who wait that bytes came back.
void ring_waiting(LedgerFile& file);
// Works out anew what every member is asked for, stores it, and tells those asked for more.
Status replan(LedgerFile& file);
Status check_bytes(int64_t bytes, const char* what);

}  // namespace kvc::ledger
