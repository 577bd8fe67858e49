// SPDX-License-Identifier: Apache-2.0
// A GPU driver library without a GPU: the driver calls that kvcached uses, over host memory.
//
// Built as a stand-in for libcuda, or with -DSTANDIN_HIP for libamdhip64. It refuses misuse as the
// real drivers do (and counts it), can fail any call on demand, and tells what is still alive.
// Two devices, STANDIN_TOTAL_BYTES each, pages in multiples of STANDIN_GRANULARITY.
#include "state.h"

#ifdef STANDIN_HIP
#define DRIVER_CALL(cuda, hip) extern "C" __attribute__((visibility("default"))) int hip
#define NAME(cuda, hip) #hip
#else
#define DRIVER_CALL(cuda, hip) extern "C" __attribute__((visibility("default"))) int cuda
#define NAME(cuda, hip) #cuda
#endif
#define TEST_CALL(type, name) extern "C" __attribute__((visibility("default"))) type name

#define BEGIN(cuda, hip)                               \
  Call call(NAME(cuda, hip));                          \
  Driver& d = driver();                                \
  if (call.result() != kSuccess) return call.result(); \
  if (!d.initialized) return d.misuse("not initialized", kNotInitialized)

#define NEED_DEVICE()                                        \
  if (current_device < 0 || d.contexts[current_device] == 0) \
  return d.misuse("no live context is current", kInvalidContext)

using namespace standin;

DRIVER_CALL(cuInit, hipInit)(unsigned) {
  Call call(NAME(cuInit, hipInit));
  if (call.result() != kSuccess) return call.result();
  driver().initialized = true;
#ifdef STANDIN_HIP
  for (int& context : driver().contexts) context = 1;  // HIP makes them by itself
#endif
  return kSuccess;
}

// Not counted: it is only asked about calls that failed.
DRIVER_CALL(cuGetErrorName, hipDrvGetErrorName)(int code, const char** name) {
  static const std::map<int, const char*> kNames = {
      {kInvalidValue, "INVALID_VALUE"},     {kOutOfMemory, "OUT_OF_MEMORY"},
      {kNotInitialized, "NOT_INITIALIZED"}, {kInvalidDevice, "INVALID_DEVICE"},
      {kInvalidContext, "INVALID_CONTEXT"}, {kIllegalAddress, "ILLEGAL_ADDRESS"},
      {kNotSupported, "NOT_SUPPORTED"}};
  const auto found = kNames.find(code);
  *name = found != kNames.end() ? found->second : nullptr;
  return found != kNames.end() ? kSuccess : kInvalidValue;
}

DRIVER_CALL(cuDeviceGet, hipDeviceGet)(int* device, int ordinal) {
  BEGIN(cuDeviceGet, hipDeviceGet);
  if (ordinal < 0 || ordinal >= kDevices) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}

DRIVER_CALL(cuDeviceGetUuid_v2, hipDeviceGetUuid)(unsigned char* bytes, int device) {
  BEGIN(cuDeviceGetUuid_v2, hipDeviceGetUuid);
#ifdef STANDIN_HIP
  std::memcpy(bytes, device == 0 ? "00c0ffee00c0ffee" : "11c0ffee11c0ffee", 16);
#else
  for (int i = 0; i < 16; ++i) bytes[i] = static_cast<unsigned char>(i * 17 + device);
#endif
  return kSuccess;
}

#ifdef STANDIN_HIP
DRIVER_CALL(, hipGetDevice)(int* device) {
  BEGIN(, hipGetDevice);
  *device = current_device;
  return kSuccess;
}

DRIVER_CALL(, hipSetDevice)(int device) {
  BEGIN(, hipSetDevice);
  if (device < 0 || device >= kDevices) return d.misuse("no such device", kInvalidDevice);
  current_device = device;
  return kSuccess;
}
#else
namespace {
int primary_context[kDevices];  // their addresses are the contexts
}

DRIVER_CALL(cuDeviceGetAttribute, )(int* value, int attribute, int) {
  BEGIN(cuDeviceGetAttribute, );
  *value = attribute == 102 ? static_cast<int>(setting("STANDIN_VMM", 1)) : 0;
  return kSuccess;
}

DRIVER_CALL(cuDevicePrimaryCtxRetain, )(void** context, int device) {
  BEGIN(cuDevicePrimaryCtxRetain, );
  ++d.contexts[device];
  *context = &primary_context[device];
  return kSuccess;
}

DRIVER_CALL(cuDevicePrimaryCtxRelease_v2, )(int device) {
  BEGIN(cuDevicePrimaryCtxRelease_v2, );
  if (d.contexts[device] == 0) return d.misuse("context released too often", kInvalidContext);
  --d.contexts[device];
  return kSuccess;
}

DRIVER_CALL(cuCtxGetCurrent, )(void** context) {
  BEGIN(cuCtxGetCurrent, );
  *context = current_device < 0 ? nullptr : &primary_context[current_device];
  return kSuccess;
}

DRIVER_CALL(cuCtxSetCurrent, )(void* context) {
  BEGIN(cuCtxSetCurrent, );
  current_device =
      context == nullptr ? -1 : static_cast<int>(static_cast<int*>(context) - primary_context);
  return kSuccess;
}
#endif

DRIVER_CALL(cuCtxSynchronize, hipDeviceSynchronize)() {
  BEGIN(cuCtxSynchronize, hipDeviceSynchronize);
  NEED_DEVICE();
  for (const auto& [stream, work] : d.streams) d.run(stream);
  return kSuccess;
}

DRIVER_CALL(cuStreamCreate, hipStreamCreateWithFlags)(void** stream, unsigned) {
  BEGIN(cuStreamCreate, hipStreamCreateWithFlags);
  NEED_DEVICE();
  *stream = pointer(d.next_stream += 16);
  d.streams[*stream];
  return kSuccess;
}

DRIVER_CALL(cuStreamDestroy_v2, hipStreamDestroy)(void* stream) {
  BEGIN(cuStreamDestroy_v2, hipStreamDestroy);
  NEED_DEVICE();
  if (stream == nullptr || d.streams.count(stream) == 0) return d.misuse("no such stream");
  d.run(stream);
  d.streams.erase(stream);
  return kSuccess;
}

DRIVER_CALL(cuStreamSynchronize, hipStreamSynchronize)(void* stream) {
  BEGIN(cuStreamSynchronize, hipStreamSynchronize);
  NEED_DEVICE();
  if (d.streams.count(stream) == 0) return d.misuse("no such stream");
  d.run(stream);
  return kSuccess;
}

DRIVER_CALL(cuMemsetD8Async, hipMemsetD8Async)
(std::uint64_t address, unsigned char value, std::size_t bytes, void* stream) {
  BEGIN(cuMemsetD8Async, hipMemsetD8Async);
  NEED_DEVICE();
  if (d.streams.count(stream) == 0) return d.misuse("no such stream");
  if (!d.whole_run(address, bytes)) return d.misuse("memset outside mapped memory");
  for (auto it = d.mappings.find(address); it != d.mappings.end() && it->first < address + bytes;
       ++it) {
    if (!it->second.accessible) return d.misuse("memset without access", kIllegalAddress);
  }
  std::memset(pointer(address), value, bytes);
  return kSuccess;
}

DRIVER_CALL(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync)
(std::uint64_t to, const void* from, std::size_t bytes, void* stream) {
  BEGIN(cuMemcpyHtoDAsync_v2, hipMemcpyHtoDAsync);
  NEED_DEVICE();
  if (d.streams.count(stream) == 0) return d.misuse("no such stream");
  if (!d.touchable(to, bytes)) return d.misuse("copy to unmapped memory", kIllegalAddress);
  d.streams[stream].push_back([=] { std::memcpy(pointer(to), from, bytes); });
  return kSuccess;
}

DRIVER_CALL(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync)
(void* to, std::uint64_t from, std::size_t bytes, void* stream) {
  BEGIN(cuMemcpyDtoHAsync_v2, hipMemcpyDtoHAsync);
  NEED_DEVICE();
  if (d.streams.count(stream) == 0) return d.misuse("no such stream");
  if (!d.touchable(from, bytes)) return d.misuse("copy of unmapped memory", kIllegalAddress);
  d.streams[stream].push_back([=] { std::memcpy(to, pointer(from), bytes); });
  return kSuccess;
}

DRIVER_CALL(cuEventCreate, hipEventCreateWithFlags)(void** event, unsigned) {
  BEGIN(cuEventCreate, hipEventCreateWithFlags);
  NEED_DEVICE();
  *event = pointer(d.next_stream += 16);
  d.events[*event] = nullptr;
  return kSuccess;
}

DRIVER_CALL(cuEventRecord, hipEventRecord)(void* event, void* stream) {
  BEGIN(cuEventRecord, hipEventRecord);
  NEED_DEVICE();
  if (d.events.count(event) == 0 || d.streams.count(stream) == 0) return d.misuse("no such event");
  d.events[event] = stream;
  return kSuccess;
}

DRIVER_CALL(cuEventDestroy_v2, hipEventDestroy)(void* event) {
  BEGIN(cuEventDestroy_v2, hipEventDestroy);
  NEED_DEVICE();
  return d.events.erase(event) == 1 ? int{kSuccess} : d.misuse("no such event");
}

DRIVER_CALL(cuStreamWaitEvent, hipStreamWaitEvent)(void* stream, void* event, unsigned) {
  BEGIN(cuStreamWaitEvent, hipStreamWaitEvent);
  NEED_DEVICE();
  if (d.events.count(event) == 0 || d.streams.count(stream) == 0) return d.misuse("no such event");
  void* const other = d.events[event];
  d.streams[stream].push_back([&d, other] { d.run(other); });
  return kSuccess;
}

DRIVER_CALL(cuMemHostRegister_v2, hipHostRegister)(void* memory, std::size_t bytes, unsigned) {
  BEGIN(cuMemHostRegister_v2, hipHostRegister);
  NEED_DEVICE();
  if (!d.pinned.emplace(reinterpret_cast<std::uint64_t>(memory), bytes).second) {
    return d.misuse("locked already");
  }
  return kSuccess;
}

DRIVER_CALL(cuMemHostUnregister, hipHostUnregister)(void* memory) {
  BEGIN(cuMemHostUnregister, hipHostUnregister);
  NEED_DEVICE();
  for (const auto& [stream, work] : d.streams) d.run(stream);
  if (d.pinned.erase(reinterpret_cast<std::uint64_t>(memory)) == 0) return d.misuse("not locked");
  return kSuccess;
}

DRIVER_CALL(cuMemGetInfo_v2, hipMemGetInfo)(std::size_t* free, std::size_t* total) {
  BEGIN(cuMemGetInfo_v2, hipMemGetInfo);
  NEED_DEVICE();
  *free = d.total - d.used[current_device];
  *total = d.total;
  return kSuccess;
}

DRIVER_CALL(cuMemGetAllocationGranularity, hipMemGetAllocationGranularity)
(std::size_t* granularity, const AllocationProp* prop, int) {
  BEGIN(cuMemGetAllocationGranularity, hipMemGetAllocationGranularity);
  if (prop->type != 1 || prop->location.type != 1) return d.misuse("not pinned device memory");
  *granularity = d.granularity;
  return kSuccess;
}

DRIVER_CALL(cuMemCreate, hipMemCreate)
(std::uint64_t* handle, std::size_t bytes, const AllocationProp* prop, unsigned long long flags) {
  BEGIN(cuMemCreate, hipMemCreate);
  const int device = prop->location.id;
  if (prop->type != 1 || prop->location.type != 1 || prop->handle_types != 0 || flags != 0 ||
      prop->compression != 0 || prop->usage != 0) {
    return d.misuse("create: properties");
  }
  if (device < 0 || device >= kDevices) return d.misuse("create: device", kInvalidDevice);
  if (bytes == 0 || bytes % d.granularity != 0) return d.misuse("create: size");
  if (bytes > d.total - d.used[device]) return kOutOfMemory;
  if (::fallocate(d.fd, 0, static_cast<off_t>(d.file_end), static_cast<off_t>(bytes)) != 0) {
    return kOutOfMemory;
  }
  d.used[device] += bytes;
  *handle = d.next_handle += 16;
  d.handles[*handle] = {d.file_end, bytes, device};
  d.file_end += bytes;
  return kSuccess;
}

DRIVER_CALL(cuMemRelease, hipMemRelease)(std::uint64_t handle) {
  BEGIN(cuMemRelease, hipMemRelease);
  const auto found = d.handles.find(handle);
  if (found == d.handles.end() || found->second.released) return d.misuse("release: no handle");
  found->second.released = true;
  d.collect(handle);
  return kSuccess;
}

DRIVER_CALL(cuMemAddressReserve, hipMemAddressReserve)
(std::uint64_t* address, std::size_t bytes, std::size_t, std::uint64_t, unsigned long long flags) {
  BEGIN(cuMemAddressReserve, hipMemAddressReserve);
  if (bytes == 0 || bytes % d.granularity != 0 || flags != 0) return d.misuse("reserve: size");
  void* base =
      ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return kOutOfMemory;
  *address = reinterpret_cast<std::uint64_t>(base);
  d.ranges[*address] = bytes;
  return kSuccess;
}

DRIVER_CALL(cuMemAddressFree, hipMemAddressFree)(std::uint64_t address, std::size_t bytes) {
  BEGIN(cuMemAddressFree, hipMemAddressFree);
  const auto found = d.ranges.find(address);
  if (found == d.ranges.end() || found->second != bytes) return d.misuse("free: no such range");
  const auto inside = d.mappings.lower_bound(address);
  if (inside != d.mappings.end() && inside->first < address + bytes) {
    return d.misuse("free: still mapped");
  }
  ::munmap(pointer(address), bytes);
  d.ranges.erase(found);
  return kSuccess;
}

DRIVER_CALL(cuMemMap, hipMemMap)
(std::uint64_t address, std::size_t bytes, std::size_t offset, std::uint64_t handle,
 unsigned long long flags) {
  BEGIN(cuMemMap, hipMemMap);
  const auto found = d.handles.find(handle);
  if (found == d.handles.end() || found->second.released) return d.misuse("map: no such handle");
  if (offset != 0 || bytes != found->second.bytes) {
    return d.misuse("map: part of a handle", kNotSupported);
  }
  auto range = d.ranges.upper_bound(address);
  if (flags != 0 || range == d.ranges.begin()) return d.misuse("map: outside a range");
  --range;
  if (address + bytes > range->first + range->second) return d.misuse("map: outside a range");
  const auto after = d.mappings.lower_bound(address);
  if (after != d.mappings.end() && after->first < address + bytes) return d.misuse("map: overlap");
  if (after != d.mappings.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second.bytes > address) return d.misuse("map: overlap");
  }
  if (::mmap(pointer(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, d.fd,
             static_cast<off_t>(found->second.offset)) == MAP_FAILED) {
    return kOutOfMemory;
  }
  ++found->second.mappings;
  d.mappings[address] = {bytes, handle, false};
  return kSuccess;
}

DRIVER_CALL(cuMemSetAccess, hipMemSetAccess)
(std::uint64_t address, std::size_t bytes, const AccessDesc* desc, std::size_t count) {
  BEGIN(cuMemSetAccess, hipMemSetAccess);
  if (count != 1 || desc->flags != 3 || desc->location.type != 1) return d.misuse("access: desc");
  if (!d.whole_run(address, bytes)) return d.misuse("access: not a run of whole mappings");
  for (auto it = d.mappings.find(address); it != d.mappings.end() && it->first < address + bytes;
       ++it) {
    if (d.handles[it->second.handle].device != desc->location.id) {
      return d.misuse("access: another device");
    }
    it->second.accessible = true;
  }
  ::mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE);
  return kSuccess;
}

DRIVER_CALL(cuMemUnmap, hipMemUnmap)(std::uint64_t address, std::size_t bytes) {
  BEGIN(cuMemUnmap, hipMemUnmap);
  if (!d.whole_run(address, bytes)) return d.misuse("unmap: not a run of whole mappings");
#ifdef STANDIN_HIP
  if (d.mappings[address].bytes != bytes) return d.misuse("unmap: more than one mapping");
#endif
  ::mmap(pointer(address), bytes, PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  auto it = d.mappings.find(address);
  while (it != d.mappings.end() && it->first < address + bytes) {
    const std::uint64_t handle = it->second.handle;
    it = d.mappings.erase(it);
    --d.handles[handle].mappings;
    d.collect(handle);
  }
  return kSuccess;
}

// For the tests.

// Fails the nth driver call from now and the `times - 1` after it, of one name if not empty.
TEST_CALL(void, standin_fail)(std::uint64_t nth, std::uint64_t times, int code, const char* op) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  d.skip = nth > 0 ? nth - 1 : 0;
  d.failing = nth > 0 ? times : 0;
  d.fail_code = code;
  d.fail_op = op;
}

TEST_CALL(std::uint64_t, standin_calls)(const char* op) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  return *op == '\0' ? d.calls : d.calls_of[op];
}

// Everything that a user of the driver could leak.
TEST_CALL(void, standin_live)(std::uint64_t (*counts)[6]) {
  Driver& d = driver();
  std::lock_guard lock(d.mutex);
  (*counts)[0] = d.handles.size();
  (*counts)[1] = d.mappings.size();
  (*counts)[2] = d.ranges.size();
  (*counts)[3] = d.streams.size() - 1 + d.events.size() + d.pinned.size();  // less the default one
#ifdef STANDIN_HIP
  (*counts)[4] = 0;
#else
  (*counts)[4] = static_cast<std::uint64_t>(d.contexts[0] + d.contexts[1]);
#endif
  (*counts)[5] = d.used[0] + d.used[1];
}

TEST_CALL(std::uint64_t, standin_misuses)() { return driver().misuses; }
TEST_CALL(const char*, standin_misuse_text)() { return driver().misuse_text.c_str(); }
TEST_CALL(int, standin_current_device)() { return current_device; }
TEST_CALL(void, standin_set_current_device)(int device) { current_device = device; }
