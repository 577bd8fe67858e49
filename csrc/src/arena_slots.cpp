// SPDX-License-Identifier: Apache-2.0
// The arena's physical side: pages in and out of slots, and repair of what the driver refused.
#include <algorithm>

#include "kvcached/arena.h"

namespace kvc {

bool Arena::intact(std::int64_t slot) const {
  const Slot& s = slots_[slot];
  return pages_.committed(slot % pages_per_segment_) ? s.mapped && s.accessible : !s.page;
}

Status Arena::fill(SlotRun run) {
  std::vector<bool> recycled(static_cast<std::size_t>(run.end - run.begin));
  for (std::int64_t slot = run.begin; slot < run.end; ++slot) {
    // A page is here already if it is stuck; it does as well as any other.
    bool old = true;
    if (!slots_[slot].page) {
      if (Status status = pool_.acquire(&slots_[slot].page, &old); !status.ok()) return status;
    }
    recycled[slot - run.begin] = old;
    if (slots_[slot].mapped) continue;
    if (Status status = map(slot); !status.ok()) return status;
  }
  if (Status status = grant_access(run); !status.ok()) return status;
  return options_.zero_recycled ? zero(run, recycled) : Status{};
}

Status Arena::zero(SlotRun run, const std::vector<bool>& recycled) {
  for (std::int64_t slot = run.begin; slot < run.end;) {
    if (!recycled[slot - run.begin]) {
      ++slot;
      continue;
    }
    std::int64_t end = slot + 1;
    while (end < run.end && recycled[end - run.begin]) ++end;
    ++calls_.zero;
    Status status = backend_.zero(address(slot), bytes({slot, end}));
    if (!status.ok()) return status;
    slot = end;
  }
  return {};
}

Status Arena::map(std::int64_t slot) {
  ++calls_.map;
  Status status = backend_.map(address(slot), bytes({slot, slot + 1}), slots_[slot].page);
  if (status.ok()) slots_[slot].mapped = true;
  return status;
}

Status Arena::grant_access(SlotRun run) {
  ++calls_.set_access;
  Status status = backend_.set_access(address(run.begin), bytes(run));
  if (status.ok()) {
    for (std::int64_t slot = run.begin; slot < run.end; ++slot) slots_[slot].accessible = true;
  }
  return status;
}

Status Arena::remap(SlotRun run) {
  Status first_error;
  for (std::int64_t slot = run.begin; slot < run.end; ++slot) {
    if (!slots_[slot].page || slots_[slot].accessible) continue;
    Status status = slots_[slot].mapped ? Status{} : map(slot);
    if (status.ok()) status = grant_access({slot, slot + 1});
    if (!status.ok() && first_error.ok()) first_error = status;
  }
  return first_error;
}

Status Arena::unmap(SlotRun run) {
  Status first_error;
  for (std::int64_t slot = run.begin; slot < run.end;) {
    if (!slots_[slot].mapped) {
      ++slot;
      continue;
    }
    std::int64_t end = slot + 1;
    while (backend_.unmaps_runs() && end < run.end && slots_[end].mapped) ++end;
    ++calls_.unmap;
    Status status = backend_.unmap(address(slot), bytes({slot, end}));
    if (status.ok()) {
      for (; slot < end; ++slot) slots_[slot].mapped = slots_[slot].accessible = false;
    } else if (first_error.ok()) {
      first_error = status;
    }
    slot = end;
  }
  return first_error;
}

void Arena::recycle_unmapped(SlotRun run) {
  for (std::int64_t slot = run.begin; slot < run.end; ++slot) {
    if (!slots_[slot].page || slots_[slot].mapped) continue;
    pool_.recycle(slots_[slot].page);
    slots_[slot].page = {};
  }
}

void Arena::note_stuck(SlotRun run) {
  for (std::int64_t slot = run.begin; slot < run.end; ++slot) {
    if (!intact(slot) && std::find(stuck_.begin(), stuck_.end(), slot) == stuck_.end()) {
      stuck_.push_back(slot);
    }
  }
}

void Arena::retry_stuck() {
  if (stuck_.empty() || closed_) return;
  for (const std::int64_t slot : stuck_) {
    const SlotRun one{slot, slot + 1};
    if (intact(slot)) continue;
    if (pages_.committed(slot % pages_per_segment_)) {
      (void)remap(one);
    } else {
      (void)unmap(one);
      recycle_unmapped(one);
    }
  }
  std::erase_if(stuck_, [this](std::int64_t slot) { return intact(slot); });
}

}  // namespace kvc
