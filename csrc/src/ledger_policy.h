// SPDX-License-Identifier: Apache-2.0
// Who may lease how much, and who is asked to give what back. Pure functions over one moment of
// the ledger, so that every rule can be tested without files, processes or clocks.
#pragma once

#include <array>
#include <cstdint>

#include "ledger_format.h"

namespace kvc::ledger {

// Sums of 64 byte counts, some negative: never wraps, whatever the file holds.
using Wide = __int128;

struct View {  // of one living member
  int slot;
  uint64_t leased;
  uint64_t returning;  // decommitted, and not yet released by its workers
  uint64_t parked;
  uint64_t cached;
  uint64_t pinned;  // it could not give these back, whoever asked
  uint64_t demand;  // 0 unless fresh
  uint64_t guarantee;
  uint64_t limit;  // kNone: no limit
  uint64_t weight;
  uint64_t priority;
  int64_t idle_ns;
  bool passed;  // did not answer in time: left in peace for now
};

struct State {
  Wide avail;  // capacity less headroom, non-KV memory and leases; negative is an overdraft
  int count;
  std::array<View, kSlots> members;  // the first `count`; not cleared, for a lease's sake
};

// What an ask is for; else the slot of the first demander it serves.
inline constexpr int kForLimit = -1;
inline constexpr int kForOverdraft = -2;

struct Ask {
  uint64_t soft = 0;     // parked and cached bytes
  uint64_t running = 0;  // bytes beyond those
  int cause = 0;
  uint64_t total() const { return soft + running; }
};
using Asks = std::array<Ask, kSlots>;  // as State::members

uint64_t held(const View& v);      // leased and not on its way back
uint64_t floor_of(const View& v);  // bytes kept free for it
uint64_t want(const View& v);      // bytes it waits for and may have
// Whether d is served before m where both cannot be. Needs a clear difference of pressure, so that
// two like members do not take the same bytes from each other in turn.
bool ranks_before(const View& d, const View& m);
// What members[index] could lease now. What is `urgent` keeps requests going that run already:
// it yields to guarantees and higher priorities only, not to an equal that waits and holds less.
uint64_t claimable(const State& state, int index, bool urgent = false);
void plan(const State& state, Asks& asks);

}  // namespace kvc::ledger
