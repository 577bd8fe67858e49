// SPDX-License-Identifier: Apache-2.0
// The ring of the latest events. All of it needs the critical section.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kvcached/ledger.h"
#include "ledger_file.h"

namespace kvc::ledger {

enum class Kind { join, leave, died, refused, policy, trim, ask, passed_over, preempt, overdraft };
inline constexpr std::string_view kKindNames[] = {"join",    "leave",    "died", "refused",
                                                  "policy",  "trim",     "ask",  "passed_over",
                                                  "preempt", "overdraft"};

// `slot` -1: of no member. Name and text are cut where the ring has no room for more.
void record(LedgerFile& file, Kind kind, int slot, uint64_t bytes, const std::string& text = "",
            const std::string& name = "");
void read_events(LedgerFile& file, uint64_t since, std::vector<LedgerEvent>& out);

}  // namespace kvc::ledger
