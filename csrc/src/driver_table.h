// SPDX-License-Identifier: Apache-2.0
// The driver calls in use, declared here because neither vendor's headers are needed to build.
//
// HIP declares addresses and handles as pointers where CUDA has 64-bit integers. Both travel in the
// same registers on every platform either vendor supports, so one table of types serves both.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kvcached/status.h"

namespace kvc {

using Result = int;

enum : Result {
  kSuccess = 0,
  kOutOfMemory = 2,
  kNotSupported = 801,
};

struct MemLocation {
  int type = 1;  // device
  int id = 0;
};

struct AllocationProp {
  int type = 1;  // pinned
  int handle_types = 0;
  MemLocation location;
  void* win32 = nullptr;
  unsigned char compression = 0;
  unsigned char rdma_capable = 0;
  unsigned short usage = 0;
  unsigned char reserved[4] = {};
};
static_assert(sizeof(AllocationProp) == 32);

struct AccessDesc {
  MemLocation location;
  int flags = 3;  // read and write
};
static_assert(sizeof(AccessDesc) == 12);

struct DriverTable {
  Result (*error_name)(Result, const char**);
  Result (*init)(unsigned flags);
  Result (*device_get)(int* device, int ordinal);
  Result (*device_uuid)(unsigned char* bytes16, int device);
  Result (*granularity)(std::size_t*, const AllocationProp*, int option);
  Result (*reserve)(std::uint64_t*, std::size_t, std::size_t align, std::uint64_t hint,
                    unsigned long long flags);
  Result (*release_range)(std::uint64_t, std::size_t);
  Result (*create)(std::uint64_t* handle, std::size_t, const AllocationProp*,
                   unsigned long long flags);
  Result (*destroy)(std::uint64_t handle);
  Result (*map)(std::uint64_t, std::size_t, std::size_t offset, std::uint64_t handle,
                unsigned long long flags);
  Result (*set_access)(std::uint64_t, std::size_t, const AccessDesc*, std::size_t count);
  Result (*unmap)(std::uint64_t, std::size_t);
  Result (*synchronize)();
  Result (*stream_create)(void** stream, unsigned flags);
  Result (*stream_destroy)(void* stream);
  Result (*stream_synchronize)(void* stream);
  Result (*memset_async)(std::uint64_t, unsigned char, std::size_t, void* stream);
  Result (*memory_info)(std::size_t* free, std::size_t* total);
  Result (*upload)(std::uint64_t to, const void* from, std::size_t, void* stream);
  Result (*download)(void* to, std::uint64_t from, std::size_t, void* stream);
  Result (*event_create)(void** event, unsigned flags);
  Result (*event_record)(void* event, void* stream);
  Result (*event_destroy)(void* event);
  Result (*stream_wait)(void* stream, void* event, unsigned flags);
  Result (*pin)(void* memory, std::size_t, unsigned flags);
  Result (*unpin)(void* memory);
};

// A driver library. It stays loaded: drivers do not survive being unloaded.
class DriverLibrary {
 public:
  // Opens the library that the environment variable names, else the first candidate that is in the
  // process already, else the first that can be loaded.
  DriverLibrary(const char* environment, const std::vector<const char*>& candidates);

  template <typename Function>
  void bind(Function*& slot, const char* symbol) {
    slot = reinterpret_cast<Function*>(find(symbol));
  }
  // Not ok if the library could not be opened or lacks a symbol asked for.
  const Status& status() const { return status_; }

 private:
  void* find(const char* symbol);

  void* library_ = nullptr;
  Status status_;
};

}  // namespace kvc
