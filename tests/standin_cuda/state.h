// SPDX-License-Identifier: Apache-2.0
// The state of the stand-in driver: what exists, what to fail, and what was done wrong.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <string>

namespace standin {

enum Result {
  kSuccess = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kInvalidDevice = 101,
  kInvalidContext = 201,
  kIllegalAddress = 700,
  kNotSupported = 801,
};
constexpr int kDevices = 2;
constexpr std::uint64_t kMiB = 1 << 20;

struct Location {
  int type, id;
};
struct AllocationProp {
  int type, handle_types;
  Location location;
  void* win32;
  unsigned char compression, rdma_capable;
  unsigned short usage;
  unsigned char reserved[4];
};
struct AccessDesc {
  Location location;
  int flags;
};

struct Handle {
  std::uint64_t offset, bytes;
  int device;
  bool released = false;
  int mappings = 0;
};
struct Mapping {
  std::uint64_t bytes, handle;
  bool accessible;
};

inline std::uint64_t setting(const char* name, std::uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

struct Driver {
  std::mutex mutex;
  bool initialized = false;
  int fd = ::memfd_create("standin", MFD_CLOEXEC);
  std::uint64_t granularity = setting("STANDIN_GRANULARITY", 2 * kMiB);
  std::uint64_t total = setting("STANDIN_TOTAL_BYTES", 1024 * kMiB);
  std::uint64_t used[kDevices] = {};
  std::uint64_t next_handle = 0x1000, file_end = 0;
  std::map<std::uint64_t, Handle> handles;
  std::map<std::uint64_t, std::uint64_t> ranges;
  std::map<std::uint64_t, Mapping> mappings;
  // Copies are done when somebody waits for them, and not before: as late as a device may.
  std::map<void*, std::deque<std::function<void()>>> streams = {{nullptr, {}}};
  std::map<void*, void*> events;  // the stream each was recorded on
  std::map<std::uint64_t, std::uint64_t> pinned;
  int contexts[kDevices] = {};
  std::uint64_t next_stream = 0x5000;

  std::uint64_t calls = 0, misuses = 0;
  std::map<std::string, std::uint64_t> calls_of;
  std::string misuse_text;
  std::uint64_t skip = 0, failing = 0;
  int fail_code = 0;
  std::string fail_op;

  void run(void* stream) {
    auto& work = streams[stream];
    while (!work.empty()) {
      const auto next = work.front();
      work.pop_front();
      next();
    }
  }
  int misuse(const char* what, int code = kInvalidValue) {
    ++misuses;
    misuse_text = what;
    return code;
  }
  // Frees what was released and is no longer mapped.
  void collect(std::uint64_t id) {
    const auto found = handles.find(id);
    if (!found->second.released || found->second.mappings != 0) return;
    ::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                static_cast<off_t>(found->second.offset), static_cast<off_t>(found->second.bytes));
    used[found->second.device] -= found->second.bytes;
    handles.erase(found);
  }
  // Whether all of the bytes can be touched, wherever the mappings begin and end.
  bool touchable(std::uint64_t address, std::uint64_t bytes) {
    auto it = mappings.upper_bound(address);
    if (it == mappings.begin()) return false;
    std::uint64_t next = (--it)->first;
    for (; it != mappings.end() && it->first == next && it->second.accessible; ++it) {
      next += it->second.bytes;
      if (next > address && next - address >= bytes) return true;
    }
    return false;
  }
  // The end of the unbroken run of mappings from `address`, looking no further than `bytes`.
  bool whole_run(std::uint64_t address, std::uint64_t bytes) {
    std::uint64_t next = address;
    for (auto it = mappings.find(address);
         it != mappings.end() && it->first == next && next - address < bytes; ++it) {
      next += it->second.bytes;
    }
    return bytes != 0 && next - address == bytes;
  }
};

inline Driver& driver() {
  static Driver instance;
  return instance;
}

// What is current on a thread: nothing at first with CUDA, device 0 with HIP.
#ifdef STANDIN_HIP
inline thread_local int current_device = 0;
#else
inline thread_local int current_device = -1;
#endif

// Holds the driver for one call, and decides whether that call is to fail.
class Call {
 public:
  explicit Call(const char* name) : lock_(driver().mutex) {
    Driver& d = driver();
    ++d.calls;
    ++d.calls_of[name];
    if (d.failing == 0 || (!d.fail_op.empty() && d.fail_op != name)) return;
    if (d.skip > 0) {
      --d.skip;
      return;
    }
    --d.failing;
    result_ = d.fail_code;
  }
  int result() const { return result_; }

 private:
  std::lock_guard<std::mutex> lock_;
  int result_ = kSuccess;
};

inline void* pointer(std::uint64_t address) { return reinterpret_cast<void*>(address); }

}  // namespace standin
