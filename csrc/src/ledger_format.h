// SPDX-License-Identifier: Apache-2.0
// The ledger file, version 1: one header page, then 64 slots, one per member.
//
// Nothing in it needs repair after a process died at any instruction. Each operation takes effect
// with one 64-bit store, made last; sums are computed when needed and never stored; a slot belongs
// to a member exactly while its generation is not zero. The file is written by other processes, so
// every value read from it is checked before it is used.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "kvcached/status.h"

namespace kvc::ledger {

inline constexpr uint64_t kMagic = 0x524547444C43564B;  // "KVCLDGER", little-endian
inline constexpr uint32_t kVersion = 1;
inline constexpr int kSlots = 64;
inline constexpr size_t kNameBytes = 96;

// No honest byte count is larger, and the sum of one per slot cannot overflow.
inline constexpr uint64_t kMaxBytes = uint64_t{1} << 56;

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
  unsigned char reserved[4000];
};

struct Slot {
  Word generation;  // 0: free. Written last by join, first by leave.
  Word leased;
  Word committed;
  Word parked;
  Word cached;
  Word static_bytes;
  Word demand;
  // Reserved for policy: kept and shown, not yet acted on.
  Word limit;
  Word guarantee;
  Word weight;
  Word priority;
  Word desired_version;
  Word observed_version;
  int64_t started_ns;
  int64_t pid;  // as the member sees itself; other PID namespaces know it by another number
  char name[kNameBytes];
  unsigned char reserved[296];
};

struct File {
  Header header;
  Slot slots[kSlots];
};

static_assert(offsetof(Header, capacity) == 64 && sizeof(Header) == 4096);
static_assert(offsetof(Slot, name) == 120 && sizeof(Slot) == 512);
static_assert(sizeof(File) < kMutexByte);

// Differs between builds that would lay the file out differently under one version number.
inline constexpr uint32_t kLayout = [] {
  uint32_t hash = 2166136261u;
  for (const uint64_t value :
       {sizeof(Header), sizeof(Slot), sizeof(File), offsetof(Header, capacity),
        offsetof(Header, next_generation), offsetof(Slot, demand), offsetof(Slot, observed_version),
        offsetof(Slot, name), static_cast<size_t>(kSlots), static_cast<size_t>(kMemberBytes)}) {
    hash = (hash ^ static_cast<uint32_t>(value)) * 16777619u;
  }
  return hash;
}();

// What a slot holds, summed or checked; see check_slot.
Status check_slot(const Slot& slot, int index, uint64_t capacity);
// The name, whatever bytes the file has there.
std::string slot_name(const Slot& slot);
Status check_name(const std::string& name);
// Makes a free slot ready for a new member, all but its generation.
void fill_slot(Slot& slot, const std::string& name, uint64_t static_bytes);
// Lays out a new file; the version is stored last.
void build(File& file, uint64_t capacity, uint64_t headroom);

int64_t now_ns();

}  // namespace kvc::ledger
