// SPDX-License-Identifier: Apache-2.0
// The ledger file, version 2: one header page, then 64 slots, one per member, then a ring of
// events.
//
// Nothing in it needs repair after a process died at any instruction. Each operation takes effect
// with one 64-bit store, made last; sums and plans are computed when needed and never relied on
// later; a slot belongs to a member exactly while its generation is not zero. The file is written
// by other processes, so every value read from it is checked before it is used.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "kvcached/ledger_stats.h"
#include "kvcached/status.h"

namespace kvc::ledger {

inline constexpr uint64_t kMagic = 0x524547444C43564B;  // "KVCLDGER", little-endian
inline constexpr uint32_t kVersion = 2;
inline constexpr int kSlots = 64;
inline constexpr size_t kNameBytes = 96;
inline constexpr size_t kTextBytes = 112;
inline constexpr int kEvents = 256;

// No honest byte count is larger, and the sum of one per slot cannot overflow.
inline constexpr uint64_t kMaxBytes = uint64_t{1} << 56;

inline constexpr uint64_t kNone = ~uint64_t{0};  // no limit, no cache limit; of a trim, all

inline constexpr uint64_t kMaxWeight = 10'000;
inline constexpr uint64_t kDefaultWeight = 100;
inline constexpr uint64_t kMaxPriority = 100;

// Byte ranges that are locked, never stored to. They lie behind the data and are the same in every
// version, so that any build can tell whether a file of another version is in use.
inline constexpr int64_t kMutexByte = (int64_t{1} << 20) - 1;  // held inside a critical section
inline constexpr int64_t kMemberBytes = int64_t{1} << 20;      // + slot: held while a member lives
inline constexpr int64_t kMemberBytesLength = int64_t{1} << 20;

using Word = std::atomic<uint64_t>;
static_assert(Word::is_always_lock_free && sizeof(Word) == 8);

struct Header {
  // The first 64 bytes mean the same in every version.
  Word magic;
  std::atomic<uint32_t> version;  // written last when the file is built: 0 is an unfinished file
  uint32_t layout;                // kLayout of the build that made it
  uint64_t file_bytes;
  int64_t created_ns;  // also tells a rebuilt file from the one that was opened
  unsigned char reserved_prefix[32];

  Word capacity;
  Word headroom;
  Word external;  // bytes in use on the device by no member
  Word next_generation;
  Word next_event;
  Word adoptions;  // how often mapped bytes have left the leases: older readings are out of date
  Word told;       // 1 once the driver's figure was: without a driver static bytes are all there is
  unsigned char reserved[3976];
};

// Aligned so that a later release of this layout has room in it.
struct alignas(2048) Slot {
  Word generation;  // 0: free. Written last by join, first by leave.
  Word leased;
  Word committed;
  Word parked;
  Word cached;
  Word static_bytes;
  Word demand;
  // Policy. Each word takes effect when it is stored; the version tells the member, and is stored
  // last.
  Word limit;
  Word guarantee;
  Word weight;
  Word priority;
  Word cache_limit;
  Word desired_version;
  Word observed_version;
  Word trim_bytes;
  Word trim_cached;
  Word trim_version;  // stored after the two above; differs from trim_done while one is pending
  Word trim_done;
  // What the member says of itself beyond bytes held. Times are of the monotonic clock.
  Word demand_ns;
  Word waiting;
  Word returning;
  Word pinned;  // of leased: what no answer to an ask can bring
  Word touched_ns;
  // The latest plan, and since when the member has not answered it.
  Word asked;
  Word asked_running;
  Word ask_since_ns;
  Word ask_held;
  Word passed_until_ns;
  Word passed_over;
  std::atomic<uint32_t> bell;
  int64_t started_ns;
  int64_t pid;  // as the member sees itself; other PID namespaces know it by another number
  char name[kNameBytes];
  Word counters[kCounters];
  struct {
    Word counts[kBuckets];
    Word sum_ns;
  } times[kTimes];
  Word unmapped;  // of committed: what the driver may not count yet
  // Of static_bytes: what the driver does not count yet, and what is a guess of what it counts.
  Word to_come;
  Word guessed;
};

struct alignas(256) Event {
  Word seq;  // stored last; 0 while the entry is written
  int64_t time_ns;
  uint64_t bytes;
  int32_t kind;
  int32_t slot;
  char name[kNameBytes];
  char text[kTextBytes];
};

struct File {
  Header header;
  Slot slots[kSlots];
  Event events[kEvents];
};

static_assert(offsetof(Header, capacity) == 64 && sizeof(Header) == 4096);
static_assert(sizeof(Slot) == 2048 && sizeof(Event) == 256);
static_assert(std::atomic<uint32_t>::is_always_lock_free && offsetof(Slot, bell) % 4 == 0);
static_assert(sizeof(File) < kMutexByte);

// Differs between builds that would lay the file out differently under one version number.
inline constexpr uint32_t kLayout = [] {
  uint32_t hash = 2166136261u;
  for (const uint64_t value :
       {sizeof(Header), sizeof(Slot), sizeof(File), offsetof(Header, capacity),
        offsetof(Header, next_generation), offsetof(Slot, demand), offsetof(Slot, observed_version),
        offsetof(Slot, name), offsetof(Slot, bell), offsetof(Slot, times), offsetof(File, events),
        offsetof(Event, name), offsetof(Event, text), static_cast<size_t>(kSlots),
        static_cast<size_t>(kMemberBytes)}) {
    hash = (hash ^ static_cast<uint32_t>(value)) * 16777619u;
  }
  return hash;
}();

// Fails with `lost` if the slot holds what no sequence of operations could have written.
Status check_slot(const Slot& slot, int index, uint64_t capacity);
// Text of the file, whatever bytes it has there.
std::string printable(const char* text, size_t size);
inline std::string slot_name(const Slot& slot) { return printable(slot.name, kNameBytes); }
Status check_name(const std::string& name);
// Makes a free slot ready for a new member, all but its generation.
void fill_slot(Slot& slot, const std::string& name, uint64_t static_bytes);
// Lays out a new file; the version is stored last.
void build(File& file, uint64_t capacity, uint64_t headroom);

int64_t now_ns();        // wall clock, for people
int64_t monotonic_ns();  // the same for every process of the machine

}  // namespace kvc::ledger
