// SPDX-License-Identifier: Apache-2.0
#include "kvcached/vmm_driver.h"

#include <dlfcn.h>

#include <cstdlib>

#include "driver_table.h"

namespace kvc {
namespace {

AllocationProp pinned_memory(int device, bool rdma) {
  AllocationProp prop;
  prop.location.id = device;
  prop.rdma_capable = rdma ? 1 : 0;
  return prop;
}

}  // namespace

DriverLibrary::DriverLibrary(const char* environment, const std::vector<const char*>& candidates) {
  if (const char* path = std::getenv(environment); path != nullptr && *path != '\0') {
    library_ = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
  } else {
    // A second copy of a runtime in one process would not see the first one's memory.
    for (const int mode : {RTLD_NOLOAD, 0}) {
      for (const char* name : candidates) {
        if (library_ == nullptr) library_ = ::dlopen(name, RTLD_NOW | RTLD_LOCAL | mode);
      }
    }
  }
  if (library_ == nullptr) {
    const char* reason = ::dlerror();
    status_ = Status::error(Code::not_supported,
                            std::string("no GPU driver library: ") +
                                (reason != nullptr ? reason : "unknown reason") +
                                "; install the driver, or name the library in " + environment);
  }
}

void* DriverLibrary::find(const char* symbol) {
  void* found = library_ != nullptr ? ::dlsym(library_, symbol) : nullptr;
  if (found == nullptr && status_.ok()) {
    status_ = Status::error(Code::not_supported, std::string("the GPU driver library lacks ") +
                                                     symbol + "; install a newer driver");
  }
  return found;
}

// Leaves the thread's current device as it was: the caller's framework relies on it.
class DriverBackend::Current {
 public:
  explicit Current(DriverBackend& backend) : backend_(backend) {
    if (Result r = backend_.get_current(&before_); r != kSuccess) {
      status_ = backend_.error("reading the current device", r);
      return;
    }
    if (before_ == backend_.own_token_) return;
    if (Result r = backend_.set_current(backend_.own_token_); r != kSuccess) {
      status_ = backend_.error("making the device current", r);
      return;
    }
    changed_ = true;
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
  ~Current() {
    // There is nobody to tell of a failure here, so try hard.
    if (changed_ && backend_.set_current(before_) != kSuccess) backend_.set_current(before_);
  }
  const Status& status() const { return status_; }

 private:
  DriverBackend& backend_;
  std::uint64_t before_ = 0;
  bool changed_ = false;
  Status status_;
};

DriverBackend::DriverBackend() : api_(std::make_unique<DriverTable>()) {}
DriverBackend::~DriverBackend() = default;

Status DriverBackend::error(const char* call, int result) const {
  const char* name = nullptr;
  if (api_->error_name(result, &name) != kSuccess || name == nullptr) name = "unknown error";
  const Code code = result == kOutOfMemory    ? Code::out_of_memory
                    : result == kNotSupported ? Code::not_supported
                                              : Code::driver;
  return Status::error(
      code, std::string(call) + " failed: " + name + " (" + std::to_string(result) + ")", result);
}

template <typename Function, typename... Args>
Status DriverBackend::call(const char* name, Function function, Args... args) {
  Current current(*this);
  if (!current.status().ok()) return current.status();
  const Result result = function(args...);
  return result == kSuccess ? Status{} : error(name, result);
}

Status DriverBackend::start(int ordinal, int device, bool rdma) {
  ordinal_ = ordinal;
  device_ = device;
  rdma_ = rdma;
  const AllocationProp prop = pinned_memory(device_, rdma_);
  return call("reading the page granularity", api_->granularity, &granularity_, &prop,
              0 /* minimum */);
}

void DriverBackend::stop() {
  for (void** stream : {&stream_, &copy_stream_}) {
    for (int attempt = 0; attempt < 2 && *stream != nullptr; ++attempt) {
      if (call("destroying a stream", api_->stream_destroy, *stream).ok()) *stream = nullptr;
    }
  }
}

Status DriverBackend::reserve(std::size_t bytes, Address* address) {
  std::uint64_t result = 0;
  Status status = call("reserving addresses", api_->reserve, &result, bytes, std::size_t{0},
                       std::uint64_t{0}, 0);
  // Addresses ran out, not memory: waiting would not help.
  if (status.code == Code::out_of_memory) status.code = Code::driver;
  if (status.ok()) *address = result;
  return status;
}

Status DriverBackend::release_range(Address address, std::size_t bytes) {
  return call("releasing addresses", api_->release_range, address, bytes);
}

Status DriverBackend::create(std::size_t bytes, Page* page) {
  const AllocationProp prop = pinned_memory(device_, rdma_);
  std::uint64_t handle = 0;
  Status status = call("creating a page", api_->create, &handle, bytes, &prop, 0);
  if (status.ok()) page->handle = handle;
  return status;
}

Status DriverBackend::destroy(Page page) {
  return call("destroying a page", api_->destroy, page.handle);
}

Status DriverBackend::map(Address address, std::size_t bytes, Page page) {
  return call("mapping a page", api_->map, address, bytes, std::size_t{0}, page.handle, 0);
}

Status DriverBackend::set_access(Address address, std::size_t bytes) {
  AccessDesc desc;
  desc.location.id = device_;
  return call("setting access", api_->set_access, address, bytes, &desc, std::size_t{1});
}

Status DriverBackend::unmap(Address address, std::size_t bytes) {
  return call("unmapping pages", api_->unmap, address, bytes);
}

Status DriverBackend::zero(Address address, std::size_t bytes) {
  // On a stream of our own, which does not wait for the engine's.
  std::lock_guard lock(stream_mutex_);
  if (Status status = make_stream(&stream_); !status.ok()) return status;
  Status status =
      call("zeroing", api_->memset_async, address, static_cast<unsigned char>(0), bytes, stream_);
  if (!status.ok()) return status;
  return call("waiting for zeroing", api_->stream_synchronize, stream_);
}

Status DriverBackend::make_stream(void** stream) {
  if (*stream != nullptr) return {};
  constexpr unsigned kNonBlocking = 1;
  return call("creating a stream", api_->stream_create, stream, kNonBlocking);
}

Status DriverBackend::upload(Address to, const void* from, std::size_t bytes) {
  std::lock_guard lock(stream_mutex_);
  if (Status status = make_stream(&copy_stream_); !status.ok()) return status;
  return call("copying to the device", api_->upload, to, from, bytes, copy_stream_);
}

Status DriverBackend::download(void* to, Address from, std::size_t bytes) {
  std::lock_guard lock(stream_mutex_);
  if (Status status = make_stream(&copy_stream_); !status.ok()) return status;
  return call("copying from the device", api_->download, to, from, bytes, copy_stream_);
}

Status DriverBackend::finish_copies() {
  void* stream = nullptr;
  {
    std::lock_guard lock(stream_mutex_);
    stream = copy_stream_;
  }
  if (stream == nullptr) return {};
  return call("waiting for copies", api_->stream_synchronize, stream);
}

Status DriverBackend::copies_before(std::uint64_t stream) {
  std::lock_guard lock(stream_mutex_);
  if (copy_stream_ == nullptr) return {};
  constexpr unsigned kNoTiming = 2;
  void* event = nullptr;
  if (Status status = call("creating an event", api_->event_create, &event, kNoTiming);
      !status.ok()) {
    return status;
  }
  Status status = call("recording an event", api_->event_record, event, copy_stream_);
  if (status.ok()) {
    status =
        call("waiting for an event", api_->stream_wait, reinterpret_cast<void*>(stream), event, 0u);
  }
  // The driver keeps what is waited for.
  Status destroyed = call("destroying an event", api_->event_destroy, event);
  return status.ok() ? destroyed : status;
}

Status DriverBackend::pin(void* memory, std::size_t bytes) {
  constexpr unsigned kPortable = 1;
  return call("locking host memory", api_->pin, memory, bytes, kPortable);
}

Status DriverBackend::unpin(void* memory) {
  return call("unlocking host memory", api_->unpin, memory);
}

Status DriverBackend::fence() { return call("waiting for the device", api_->synchronize); }

Status DriverBackend::memory_info(MemoryInfo* info) {
  return call("reading memory totals", api_->memory_info, &info->free, &info->total);
}

}  // namespace kvc
