// SPDX-License-Identifier: Apache-2.0
// Host memory with the semantics of device memory, for CPU engines and for tests without a GPU.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "kvcached/vmm.h"

namespace kvc {

// Pages are slots of one sparse memory file. A page is really taken when created and really given
// back when destroyed, and misuse is refused as strictly as a GPU driver refuses it.
class HostBackend final : public Backend {
 public:
  // `name` tells apart the "devices" of one host: processes that use the same name share a ledger.
  static Status open(const std::string& name, std::size_t capacity_bytes,
                     std::unique_ptr<HostBackend>* backend);
  ~HostBackend() override;

  std::size_t granularity() const override { return granularity_; }
  std::string device_key() const override { return "host-" + name_; }
  DlpackDevice dlpack_device() const override { return {1 /* kDLCPU */, 0}; }
  bool unmaps_runs() const override { return true; }

  Status reserve(std::size_t bytes, Address* address) override;
  Status release_range(Address address, std::size_t bytes) override;
  Status create(std::size_t bytes, Page* page) override;
  Status destroy(Page page) override;
  Status map(Address address, std::size_t bytes, Page page) override;
  Status set_access(Address address, std::size_t bytes) override;
  Status unmap(Address address, std::size_t bytes) override;
  Status zero(Address address, std::size_t bytes) override;
  Status fence() override { return {}; }  // the host has no work in flight
  Status memory_info(MemoryInfo* info) override;
  Status upload(Address to, const void* from, std::size_t bytes) override;
  Status download(void* to, Address from, std::size_t bytes) override;
  // Copies are done when the call returns, and no memory need be locked for them.
  Status finish_copies() override { return {}; }
  Status copies_before(std::uint64_t) override { return {}; }
  Status pin(void*, std::size_t) override { return {}; }
  Status unpin(void*) override { return {}; }

  // Bytes the kernel holds for the pages, as it counts them.
  std::size_t physical_bytes() const;

 private:
  struct PageState {
    std::size_t bytes = 0;
    bool mapped = false;
  };
  struct Mapping {
    std::size_t bytes = 0;
    Page page;
    bool accessible = false;
  };
  using Mappings = std::map<Address, Mapping>;

  HostBackend(std::string name, std::size_t capacity_bytes, int fd);
  bool aligned(std::size_t bytes) const { return bytes != 0 && bytes % granularity_ == 0; }
  // The mappings that exactly tile [address, address + bytes), or an empty span.
  bool find_run(Address address, std::size_t bytes, Mappings::iterator* first,
                Mappings::iterator* last);
  bool overlaps_mapping(Address address, std::size_t bytes) const;
  // Whether every byte can be touched.
  bool accessible(Address address, std::size_t bytes) const;
  bool inside_range(Address address, std::size_t bytes) const;

  const std::string name_;
  const std::size_t capacity_;
  const std::size_t granularity_;
  const int fd_;

  std::mutex mutex_;
  std::size_t used_ = 0;
  std::uint64_t file_end_;
  std::unordered_map<std::uint64_t, PageState>
      pages_;  // by offset in the file, which is the handle
  std::unordered_map<std::size_t, std::vector<std::uint64_t>>
      holes_;  // offsets free again, by size
  std::map<Address, std::size_t> ranges_;
  Mappings mappings_;
};

}  // namespace kvc
