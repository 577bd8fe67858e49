// SPDX-License-Identifier: Apache-2.0
// The one seam between kvcached and whatever gives it memory: a GPU driver or the host's kernel.
//
// A backend reserves ranges of addresses, creates pages of physical memory, and maps whole pages
// into ranges. The rules below hold for every backend, so that code tested on one runs on all:
//
//  - Sizes and addresses are multiples of granularity().
//  - A mapped page can be used only after set_access. A new page reads as zero.
//  - An address that is not mapped faults when touched.
//  - map takes exactly one whole page and an address range that holds no mapping.
//  - A page is mapped at most once, and is unmapped before it is destroyed.
//  - unmap and set_access take a contiguous run of one or more whole mappings.
//  - A call that fails has changed nothing. One that cannot for want of physical memory says
//    out_of_memory, which callers may take as "not now".
//  - All calls are thread-safe, and leave the calling thread's current device as they found it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kvcached/status.h"

namespace kvc {

using Address = std::uint64_t;

// One physical allocation. Zero is no page.
struct Page {
  std::uint64_t handle = 0;
  explicit operator bool() const { return handle != 0; }
};

struct MemoryInfo {
  std::size_t free = 0;
  std::size_t total = 0;
};

// How tensors on this backend's memory name their device (DLPack's DLDevice).
struct DlpackDevice {
  int type = 0;
  int id = 0;
};

class Backend {
 public:
  Backend() = default;
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;
  virtual ~Backend() = default;

  virtual std::size_t granularity() const = 0;
  // Names the device's ledger file: the same for every process that uses this device.
  virtual std::string device_key() const = 0;
  virtual DlpackDevice dlpack_device() const = 0;
  // False where the driver must be asked to unmap one page at a time.
  virtual bool unmaps_runs() const = 0;

  virtual Status reserve(std::size_t bytes, Address* address) = 0;
  virtual Status release_range(Address address, std::size_t bytes) = 0;

  virtual Status create(std::size_t bytes, Page* page) = 0;
  virtual Status destroy(Page page) = 0;

  virtual Status map(Address address, std::size_t bytes, Page page) = 0;
  virtual Status set_access(Address address, std::size_t bytes) = 0;
  virtual Status unmap(Address address, std::size_t bytes) = 0;

  // Returns when the bytes are zero. Does not wait for work the device is busy with otherwise.
  virtual Status zero(Address address, std::size_t bytes) = 0;
  // Waits for all device work issued by this process before the call, on any stream.
  virtual Status fence() = 0;

  virtual Status memory_info(MemoryInfo* info) = 0;

  // Copies between the host and mapped addresses. They take effect in the order of the calls, on a
  // stream of the backend's own that waits for no other; both sides must stay until finish_copies.
  virtual Status upload(Address to, const void* from, std::size_t bytes) = 0;
  virtual Status download(void* to, Address from, std::size_t bytes) = 0;
  // Waits for all copies of this process so far.
  virtual Status finish_copies() = 0;
  // Work issued on this stream of the device from now on waits for the copies so far. The stream is
  // as the driver knows it; 0 is the default one.
  virtual Status copies_before(std::uint64_t stream) = 0;

  // Locks host memory, from which copies then run at the bus's speed and without the host.
  virtual Status pin(void* memory, std::size_t bytes) = 0;
  virtual Status unpin(void* memory) = 0;
};

}  // namespace kvc
