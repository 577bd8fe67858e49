// SPDX-License-Identifier: Apache-2.0
// A private directory for one test, and ledgers in it.
#pragma once

#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "kvcached/ledger.h"

namespace kvc {

struct TempDir {
  TempDir() {
    // tmpfs if there is one, as in use.
    const bool shm = access("/dev/shm", W_OK) == 0;
    std::string name = std::string(shm ? "/dev/shm" : "/tmp") + "/kvcached-test-XXXXXX";
    REQUIRE(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~TempDir() { std::filesystem::remove_all(path); }
  std::string ledger() const { return path + "/ledger"; }

  std::string path;
};

inline std::unique_ptr<Ledger> open_ledger(const std::string& path,
                                           std::optional<int64_t> capacity = std::nullopt,
                                           std::optional<int64_t> headroom = std::nullopt) {
  std::unique_ptr<Ledger> ledger;
  const Status status = Ledger::open(path, capacity, headroom, ledger);
  REQUIRE_MESSAGE(status.ok(), status.what);
  return ledger;
}

inline std::unique_ptr<Member> join(Ledger& ledger, const std::string& name = "member",
                                    int64_t static_bytes = 0) {
  std::unique_ptr<Member> member;
  const Status status = ledger.join(name, static_bytes, member);
  REQUIRE_MESSAGE(status.ok(), status.what);
  return member;
}

inline bool lease(Member& member, int64_t bytes) {
  bool granted = false;
  const Status status = member.lease(bytes, granted);
  REQUIRE_MESSAGE(status.ok(), status.what);
  return granted;
}

inline uint64_t available(Ledger& ledger) {
  uint64_t bytes = 0;
  const Status status = ledger.available(bytes);
  REQUIRE_MESSAGE(status.ok(), status.what);
  return bytes;
}

inline uint64_t leased(Ledger& ledger) {
  uint64_t bytes = 0;
  const Status status = ledger.total_leased(bytes);
  REQUIRE_MESSAGE(status.ok(), status.what);
  return bytes;
}

}  // namespace kvc
