// SPDX-License-Identifier: Apache-2.0
// The account of one device, shared by every process that uses it: who was promised how many
// bytes. Memory is promised here before it is taken from the driver, so the sum never exceeds the
// device and running out is an answer, not a failure.
//
// The ledger is a file in shared memory that only its owner may open. A process may hold several
// Ledger objects for one file; they act on each other as separate processes do. All of this may be
// called from any thread.
//
// After fork the objects of the parent are unusable in the child (every call says so); the child
// opens the ledger itself. After exec, as after death, the members of the process count as dead.
// If the file is deleted while in use, join, attach and reap report it; leases already promised
// stay valid among those that hold them.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <string>
#include <vector>

#include "kvcached/ledger_stats.h"
#include "kvcached/status.h"
#include "kvcached/wait.h"

namespace kvc {

namespace ledger {
class LedgerFile;
class LockFd;
struct Slot;
}  // namespace ledger

struct MemberInfo {
  int slot = 0;
  uint64_t generation = 0;
  std::string name;
  int64_t pid = 0;     // of the process that joined, in its own PID namespace
  bool alive = false;  // some process of the member lives
  uint64_t leased = 0;
  uint64_t committed = 0;
  uint64_t parked = 0;
  uint64_t cached = 0;
  uint64_t static_bytes = 0;
  uint64_t to_come = 0;  // of those: promised, and not taken from the driver yet
  uint64_t guessed = 0;  // of those: what is not known, but taken; the driver's figure has it
  uint64_t demand = 0;
  std::optional<uint64_t> limit;
  std::optional<uint64_t> cache_limit;
  uint64_t guarantee = 0;
  uint64_t weight = 0;
  uint64_t priority = 0;
  uint64_t desired_version = 0;
  uint64_t observed_version = 0;  // equal once the member complies with its policy
  uint64_t asked = 0;             // of parked and cached bytes, by the latest plan
  uint64_t asked_running = 0;     // beyond those: running requests must go
  uint64_t returning = 0;         // decommitted, and not yet released by its workers
  uint64_t pinned = 0;            // of leased: what no answer to an ask can bring
  uint64_t waiting = 0;           // requests
  uint64_t passed_over = 0;       // times it did not answer an ask in time
  bool trim_pending = false;
  double idle_s = 0;  // since it last ran a step
  std::array<uint64_t, kCounters> counters = {};
  std::array<Histogram, kTimes> times = {};
  double started = 0;  // seconds since the epoch
};

struct Trim {
  uint64_t version = 0;
  std::optional<uint64_t> bytes;  // none: all that is unused
  bool cached = false;            // after the parked pages, unreferenced prefix cache too
};

struct Policy {
  uint64_t guarantee = 0;
  std::optional<uint64_t> limit;
  uint64_t weight = 0;
  uint64_t priority = 0;
  std::optional<uint64_t> cache_limit;
  uint64_t version = 0;
  uint64_t observed = 0;
  std::optional<Trim> trim;  // while one is pending
};

// What is absent stays as it is, or as it is for a member without a policy.
struct PolicyChange {
  std::optional<int64_t> guarantee;
  std::optional<int64_t> limit;  // -1: none
  std::optional<int64_t> weight;
  std::optional<int64_t> priority;
  std::optional<int64_t> cache_limit;  // -1: none
  std::optional<uint64_t> expected_version;

  // Whether each number is one a policy may have.
  Status check() const;
};

struct LedgerEvent {
  uint64_t seq = 0;
  double time = 0;  // seconds since the epoch
  std::string kind;
  int slot = -1;  // -1: of no member
  std::string name;
  uint64_t bytes = 0;
  std::string text;
};

// One process's share in a member: a slot of the ledger that stays taken while any process that
// joined or attached to it lives.
class Member {
 public:
  ~Member();
  Member(const Member&) = delete;
  Member& operator=(const Member&) = delete;

  int slot() const { return index_; }
  uint64_t generation() const { return generation_; }

  // All or nothing; `granted` false is "not now": the memory is not there, or it is kept for the
  // guarantee of another, or for one that waits and ranks before. What is `urgent`, for
  // requests that run already, waits for guarantees and higher priorities only. Before it says no,
  // the dead are reaped.
  Status lease(int64_t bytes, bool& granted, bool urgent = false);
  // As much as there is, up to `bytes`, in multiples of `quantum`.
  Status lease_up_to(int64_t bytes, int64_t quantum, int64_t& granted);
  // What could be leased now.
  Status claimable(uint64_t& bytes, bool urgent = false);
  // More than is leased is invalid_argument and changes nothing. Rings for those who wait.
  Status release(int64_t bytes);

  // What the processes of the member take from the driver and give back. Wait-free but for other
  // calls of this one: safe on the mapping path.
  Status add_committed(int64_t delta);
  Status set_parked(int64_t bytes);
  Status set_cached(int64_t bytes);
  Status set_static(int64_t bytes);
  // Of the static bytes: what is promised and not taken from the driver yet, and what is a guess of
  // what it counts. More than the static bytes counts as much as those.
  Status set_to_come(int64_t bytes);
  Status set_guessed(int64_t bytes);
  Status add_static(int64_t delta);
  // Makes bytes that another member leased, committed and mapped static ones of this member, so
  // that nobody sees them twice or not at all: they are in use by no page any more, also before the
  // driver's figure is told again. Both members are this process's, of one ledger. More than the
  // other leased is invalid_argument and changes nothing. Rings for those who wait.
  Status adopt(Member& other, int64_t bytes);
  // What this member waits for, and how many requests of it do. Counts for 5 s, then post it again.
  Status set_demand(int64_t bytes, int64_t waiting = 0);
  Status set_returning(int64_t bytes);
  Status others_wait(bool& wait);  // whether any other member has a demand
  // Of what is leased, the bytes it could not give back whoever asked: they are never asked for.
  Status set_pinned(int64_t bytes);
  // Of what is committed, bytes that are about to be mapped. Until this is 0 again or they are
  // adopted, they may be in the driver's figure or not.
  Status set_unmapped(int64_t bytes);
  Status touch();  // a step ran now
  // Whether nobody wants anything of this member: none waits for memory, nothing is asked of it,
  // and no policy or trim is new to it. Lock-free, for what runs in every step; what expires or is
  // worked out anew is seen by ask alone.
  Status calm(bool& out);
  Status leased(uint64_t& bytes);  // lock-free

  // What this member is asked to give back, worked out anew: of parked and cached bytes, and
  // beyond those. An ask that brings nothing back for 1 s is withdrawn for 3 s and put to
  // others, but for one to keep within the member's own limit.
  Status ask(uint64_t& soft, uint64_t& running);
  Status policy(Policy& out);
  Status observe(uint64_t version);  // the member now complies with it
  Status trim_done(uint64_t version);

  // Lock-free; for any process of the member.
  Status count(Counter counter, uint64_t n = 1);
  Status time(Timed kind, double seconds);

  // Rung when the member is asked for more, its policy changes, or it waits and bytes came back.
  Status bell(uint32_t& out);
  // Returns once the bell is not `seen`, or after the timeout.
  Status wait_bell(uint32_t seen, int64_t timeout_ms, uint32_t& out);

  Status info(MemberInfo& out);
  // Gives up this process's share; the last process of the member frees its slot and its leases.
  // Everything but leave fails afterwards.
  Status leave();

 private:
  friend class Ledger;
  Member(std::shared_ptr<ledger::LedgerFile> file, std::unique_ptr<ledger::LockFd> life, int index,
         uint64_t generation);
  Status check_usable() const;
  Status check_owned() const;
  Status stay(Wait& wait, std::shared_lock<std::shared_mutex>& staying) const;
  Status store(std::atomic<uint64_t> ledger::Slot::* field, int64_t bytes, const char* name);
  Status add(std::atomic<uint64_t> ledger::Slot::* field, int64_t delta, const char* name);
  Status acknowledge(std::atomic<uint64_t> ledger::Slot::* issued,
                     std::atomic<uint64_t> ledger::Slot::* done, uint64_t version,
                     const char* what);
  template <typename Operation>
  Status locked(Operation operation);
  Status grant(int64_t bytes, int64_t quantum, bool partial, bool urgent, int64_t& granted);

  const std::shared_ptr<ledger::LedgerFile> file_;
  const std::unique_ptr<ledger::LockFd> life_;  // holds the slot's byte
  const int index_;
  const uint64_t generation_;
  // Shared by every use of the slot, exclusive in leave: the slot may be another's right after.
  mutable std::shared_mutex leaving_;
  std::atomic<bool> left_ = false;
};

class Ledger {
 public:
  // Opens the ledger at `path`, or creates it and the directory it is in. Without a capacity the
  // file must exist and keeps its own; without a headroom an existing file keeps its own and a new
  // one has none. Other numbers than the file's are refused while it has living members, and
  // replace them otherwise. The directory must be the caller's own with mode 0700, the file 0600.
  static Status open(const std::string& path, std::optional<int64_t> capacity,
                     std::optional<int64_t> headroom, std::unique_ptr<Ledger>& out);

  // Deletes a ledger that no member uses, whatever is in it; one that is gone already is fine.
  static Status remove(const std::string& path);

  const std::string& path() const;
  uint64_t capacity() const;
  uint64_t headroom() const;
  uint64_t external() const;
  uint32_t version() const;
  double create_time() const;

  // Tells the ledger how many bytes the driver says are in use; what members have not committed of
  // that counts as external.
  //
  // With `reading`, what reading() was before the driver was asked: a figure from before the latest
  // adoption is dropped, since it would undo that.
  Status set_device_used(int64_t bytes, std::optional<uint64_t> reading = std::nullopt);
  uint64_t reading() const;
  // Whether the driver's figure was ever told. Without one, static bytes are all there is beside
  // leases; with one it is what the driver says, and what members were promised on top.
  bool told() const;
  // What could be leased now: capacity less headroom, leases, and what is in use or promised
  // beside those. As lease does, it reaps the dead first.
  Status available(uint64_t& bytes);
  Status total_leased(uint64_t& bytes);
  Status total_demand(int except_slot, uint64_t& bytes);
  Status members(std::vector<MemberInfo>& out);
  // Frees the slots of members no process of which lives; their leases return.
  Status reap(std::vector<MemberInfo>& out);

  // Refused if what guarantees and static bytes there are leaves no room for those of this one.
  Status join(const std::string& name, int64_t static_bytes, const PolicyChange& policy,
              std::unique_ptr<Member>& out);
  Status join(const std::string& name, int64_t static_bytes, std::unique_ptr<Member>& out) {
    return join(name, static_bytes, {}, out);
  }
  // A further process of a member, a worker say.
  Status attach(int slot, uint64_t generation, std::unique_ptr<Member>& out);

  // Takes effect at once for leases; the member acknowledges the version once it complies.
  Status set_policy(int slot, uint64_t generation, const PolicyChange& change, uint64_t& version);
  // Asks a member to give back bytes it does not use; -1: all. Replaces one that is pending.
  Status trim(int slot, uint64_t generation, int64_t bytes, bool cached, uint64_t& version);
  // The latest 256 at most, oldest first, with numbers above `since`.
  Status events(uint64_t since, std::vector<LedgerEvent>& out);
  // Records an event; kinds are those of `events`.
  Status note(const std::string& kind, int slot, int64_t bytes);
  // By how much leases, headroom and non-KV memory exceed the capacity.
  Status overdraft(uint64_t& bytes);

 private:
  Status find_member(int slot, uint64_t generation) const;
  explicit Ledger(std::shared_ptr<ledger::LedgerFile> file) : file_(std::move(file)) {}
  Status take_byte(int slot, std::unique_ptr<ledger::LockFd>& out);

  const std::shared_ptr<ledger::LedgerFile> file_;
};

}  // namespace kvc
