// SPDX-License-Identifier: Apache-2.0
// What the tests of the memory side share.
#pragma once

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kvcached/arena.h"
#include "kvcached/page_pool.h"
#include "kvcached/vmm_fault.h"
#include "kvcached/vmm_host.h"

namespace kvc::test {

inline constexpr std::size_t kKiB = 1024;
inline constexpr std::size_t kPage = 64 * kKiB;
inline constexpr std::size_t kCapacity = 64 * 1024 * kKiB;

#define REQUIRE_OK(expression)                   \
  do {                                           \
    const ::kvc::Status status_ = (expression);  \
    REQUIRE_MESSAGE(status_.ok(), status_.what); \
  } while (false)

inline std::unique_ptr<HostBackend> host(std::size_t capacity = kCapacity) {
  std::unique_ptr<HostBackend> backend;
  REQUIRE_OK(HostBackend::open("test", capacity, &backend));
  return backend;
}

// Does what another backend does, for tests that change one thing of it.
class Forwarding : public Backend {
 public:
  explicit Forwarding(Backend& inner) : inner_(inner) {}
  std::size_t granularity() const override { return inner_.granularity(); }
  std::string device_key() const override { return inner_.device_key(); }
  DlpackDevice dlpack_device() const override { return inner_.dlpack_device(); }
  bool unmaps_runs() const override { return inner_.unmaps_runs(); }
  Status reserve(std::size_t n, Address* a) override { return inner_.reserve(n, a); }
  Status release_range(Address a, std::size_t n) override { return inner_.release_range(a, n); }
  Status create(std::size_t n, Page* p) override { return inner_.create(n, p); }
  Status destroy(Page p) override { return inner_.destroy(p); }
  Status map(Address a, std::size_t n, Page p) override { return inner_.map(a, n, p); }
  Status set_access(Address a, std::size_t n) override { return inner_.set_access(a, n); }
  Status unmap(Address a, std::size_t n) override { return inner_.unmap(a, n); }
  Status zero(Address a, std::size_t n) override { return inner_.zero(a, n); }
  Status fence() override { return inner_.fence(); }
  Status memory_info(MemoryInfo* i) override { return inner_.memory_info(i); }
  Status upload(Address a, const void* p, std::size_t n) override { return inner_.upload(a, p, n); }
  Status download(void* p, Address a, std::size_t n) override { return inner_.download(p, a, n); }
  Status finish_copies() override { return inner_.finish_copies(); }
  Status copies_before(std::uint64_t s) override { return inner_.copies_before(s); }
  Status pin(void* p, std::size_t n) override { return inner_.pin(p, n); }
  Status unpin(void* p) override { return inner_.unpin(p); }

 protected:
  Backend& inner_;
};

inline unsigned char* pointer(Address address) { return reinterpret_cast<unsigned char*>(address); }

// Whether touching the address kills a process, tried in a child.
inline bool faults(Address address, bool write) {
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGSEGV, SIG_DFL);
    std::signal(SIGBUS, SIG_DFL);
    volatile unsigned char* byte = pointer(address);
    if (write) {
      *byte = 1;
    } else {
      (void)*byte;
    }
    ::_exit(0);
  }
  int state = 0;
  REQUIRE(::waitpid(child, &state, 0) == child);
  return WIFSIGNALED(state) && WTERMSIG(state) == SIGSEGV;
}

// Whether the kernel can read the address on our behalf: cheaper than a child.
inline bool readable(Address address) {
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  const bool copied = ::write(ends[1], pointer(address), 1) == 1;
  ::close(ends[0]);
  ::close(ends[1]);
  return copied;
}

inline Status commit(Arena& arena, std::vector<BlockRange> ranges) { return arena.commit(ranges); }
inline Status decommit(Arena& arena, std::vector<BlockRange> ranges) {
  return arena.decommit(ranges);
}

inline Address block_address(const Arena& arena, std::int64_t block, std::int64_t segment) {
  return arena.base() + static_cast<Address>(segment) * arena.segment_stride() +
         static_cast<Address>(block * arena.geometry().block_bytes);
}

inline unsigned char mark_of(std::int64_t block, std::int64_t segment) {
  return static_cast<unsigned char>(1 + block * 7 + segment * 31);
}

// Fills a committed block with bytes of its own, and tells whether they are all there still.
inline void write_block(const Arena& arena, std::int64_t block) {
  for (std::int64_t s = 0; s < arena.geometry().segments; ++s) {
    std::memset(pointer(block_address(arena, block, s)), mark_of(block, s),
                static_cast<std::size_t>(arena.geometry().block_bytes));
  }
}
inline bool holds_mark(const Arena& arena, std::int64_t block) {
  for (std::int64_t s = 0; s < arena.geometry().segments; ++s) {
    const unsigned char* bytes = pointer(block_address(arena, block, s));
    for (std::int64_t i = 0; i < arena.geometry().block_bytes; ++i) {
      if (bytes[i] != mark_of(block, s)) return false;
    }
  }
  return true;
}

}  // namespace kvc::test
