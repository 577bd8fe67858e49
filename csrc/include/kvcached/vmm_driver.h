// SPDX-License-Identifier: Apache-2.0
// GPU memory through a vendor's driver library, opened at run time: the core builds and installs
// on machines that have no GPU. CUDA and HIP offer the same calls under different names, so all
// but a few differences are written once.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "kvcached/vmm.h"

namespace kvc {

struct DriverTable;

class DriverBackend : public Backend {
 public:
  ~DriverBackend() override;

  std::size_t granularity() const override { return granularity_; }
  std::string device_key() const override { return device_key_; }

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

 protected:
  class Current;  // makes the device current on this thread for a scope

  DriverBackend();
  // Finishes opening once the vendor's part has filled in the table and can make the device
  // current; and its counterpart, to be called first in the vendor's destructor.
  Status start(int ordinal, int device, bool rdma);
  void stop();
  Status error(const char* call, int result) const;

  // What is current on this thread (a context or a device number), and how to change it.
  virtual int get_current(std::uint64_t* token) = 0;
  virtual int set_current(std::uint64_t token) = 0;

  std::unique_ptr<DriverTable> api_;
  std::uint64_t own_token_ = 0;
  int ordinal_ = 0;
  std::string device_key_;

 private:
  template <typename Function, typename... Args>
  Status call(const char* name, Function function, Args... args);

  int device_ = 0;
  bool rdma_ = false;
  std::size_t granularity_ = 0;
  std::mutex stream_mutex_;
  Status make_stream(void** stream);  // if there is none yet; with stream_mutex_ held
  void* stream_ = nullptr;            // for zeroing, made when first needed
  void* copy_stream_ =
      nullptr;  // likewise: zeroing waits for its end, which copies may be far from
};

class CudaBackend final : public DriverBackend {
 public:
  // `ordinal` counts the devices this process sees (CUDA_VISIBLE_DEVICES applies).
  static Status open(int ordinal, std::unique_ptr<CudaBackend>* backend);
  ~CudaBackend() override;

  DlpackDevice dlpack_device() const override { return {2 /* kDLCUDA */, ordinal_}; }
  bool unmaps_runs() const override { return true; }

 private:
  CudaBackend();
  int get_current(std::uint64_t* token) override;
  int set_current(std::uint64_t token) override;
  Status connect(int ordinal);

  struct Context;
  std::unique_ptr<Context> context_;
};

class HipBackend final : public DriverBackend {
 public:
  // `ordinal` counts the devices this process sees (HIP_VISIBLE_DEVICES applies).
  static Status open(int ordinal, std::unique_ptr<HipBackend>* backend);
  ~HipBackend() override;

  DlpackDevice dlpack_device() const override { return {10 /* kDLROCM */, ordinal_}; }
  // Older ROCm releases unmap only the first mapping of a run, and report success.
  bool unmaps_runs() const override { return false; }

 private:
  HipBackend() = default;
  int get_current(std::uint64_t* token) override;
  int set_current(std::uint64_t token) override;
  Status connect(int ordinal);

  int (*get_device_)(int*) = nullptr;
  int (*set_device_)(int) = nullptr;
};

}  // namespace kvc
