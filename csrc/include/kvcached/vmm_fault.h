// SPDX-License-Identifier: Apache-2.0
// A backend that wraps another one and fails or delays its calls on demand. For tests.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>

#include "kvcached/vmm.h"

namespace kvc {

enum class Op {
  reserve,
  release_range,
  create,
  destroy,
  map,
  set_access,
  unmap,
  zero,
  fence,
  memory_info,
  upload,
  download,
  finish_copies,
  copies_before,
  pin,
  unpin,
};
inline constexpr std::size_t kOps = 16;
inline constexpr std::array<const char*, kOps> kOpNames = {
    "reserve",       "release_range", "create", "destroy",     "map",    "set_access",
    "unmap",         "zero",          "fence",  "memory_info", "upload", "download",
    "finish_copies", "copies_before", "pin",    "unpin"};

class FaultyBackend final : public Backend {
 public:
  explicit FaultyBackend(Backend& inner) : inner_(inner) {}

  // Fails the `nth` call from now (1 is the next one), counting only calls of `op` if given, and
  // the `times - 1` such calls after it. Replaces an earlier order.
  void fail(std::uint64_t nth, Code code, std::optional<Op> op = {}, std::uint64_t times = 1);
  void clear();
  // Delays every call of `op` before it reaches the wrapped backend.
  void set_latency(Op op, std::uint64_t microseconds);

  std::uint64_t calls(Op op) const { return calls_[static_cast<std::size_t>(op)]; }
  std::uint64_t calls() const;

  std::size_t granularity() const override { return inner_.granularity(); }
  std::string device_key() const override { return inner_.device_key(); }
  DlpackDevice dlpack_device() const override { return inner_.dlpack_device(); }
  bool unmaps_runs() const override { return inner_.unmaps_runs(); }

  Status reserve(std::size_t bytes, Address* address) override;
  Status release_range(Address address, std::size_t bytes) override;
  Status create(std::size_t bytes, Page* page) override;
  Status destroy(Page page) override;
  Status map(Address address, std::size_t bytes, Page page) override;
  Status set_access(Address address, std::size_t bytes) override;
  Status unmap(Address address, std::size_t bytes) override;
  Status zero(Address address, std::size_t bytes) override;
  Status fence() override;
  Status memory_info(MemoryInfo* info) override;
  Status upload(Address to, const void* from, std::size_t bytes) override;
  Status download(void* to, Address from, std::size_t bytes) override;
  Status finish_copies() override;
  Status copies_before(std::uint64_t stream) override;
  Status pin(void* memory, std::size_t bytes) override;
  Status unpin(void* memory) override;

 private:
  Status before(Op op);

  Backend& inner_;
  std::array<std::atomic<std::uint64_t>, kOps> calls_{};
  std::array<std::atomic<std::uint64_t>, kOps> latency_us_{};

  std::mutex mutex_;
  std::uint64_t skip_ = 0;       // matching calls to let through first
  std::uint64_t remaining_ = 0;  // calls to fail then
  std::optional<Op> op_;
  Code code_ = Code::driver;
};

}  // namespace kvc
