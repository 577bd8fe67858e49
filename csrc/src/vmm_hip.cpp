// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cctype>
#include <cstdio>

#include "driver_table.h"
#include "kvcached/vmm_driver.h"

namespace kvc {
namespace {

void bind(DriverLibrary& library, DriverTable& api) {
  library.bind(api.error_name, "hipDrvGetErrorName");
  library.bind(api.init, "hipInit");
  library.bind(api.device_get, "hipDeviceGet");
  library.bind(api.device_uuid, "hipDeviceGetUuid");
  library.bind(api.granularity, "hipMemGetAllocationGranularity");
  library.bind(api.reserve, "hipMemAddressReserve");
  library.bind(api.release_range, "hipMemAddressFree");
  library.bind(api.create, "hipMemCreate");
  library.bind(api.destroy, "hipMemRelease");
  library.bind(api.map, "hipMemMap");
  library.bind(api.set_access, "hipMemSetAccess");
  library.bind(api.unmap, "hipMemUnmap");
  // hipCtxSynchronize is declared but answers "not supported" on AMD devices.
  library.bind(api.synchronize, "hipDeviceSynchronize");
  library.bind(api.stream_create, "hipStreamCreateWithFlags");
  library.bind(api.stream_destroy, "hipStreamDestroy");
  library.bind(api.stream_synchronize, "hipStreamSynchronize");
  library.bind(api.memset_async, "hipMemsetD8Async");
  library.bind(api.memory_info, "hipMemGetInfo");
  library.bind(api.upload, "hipMemcpyHtoDAsync");
  library.bind(api.download, "hipMemcpyDtoHAsync");
  library.bind(api.event_create, "hipEventCreateWithFlags");
  library.bind(api.event_record, "hipEventRecord");
  library.bind(api.event_destroy, "hipEventDestroy");
  library.bind(api.stream_wait, "hipStreamWaitEvent");
  library.bind(api.pin, "hipHostRegister");
  library.bind(api.unpin, "hipHostUnregister");
}

// AMD's driver fills the bytes with text, the hexadecimal digits that rocminfo prints.
std::string uuid_text(const unsigned char (&bytes)[16]) {
  if (std::all_of(bytes, bytes + 16, [](unsigned char c) { return std::isxdigit(c) != 0; })) {
    return "GPU-" + std::string(bytes, bytes + 16);
  }
  std::string text = "GPU-";
  for (const unsigned char byte : bytes) {
    char hex[3];
    std::snprintf(hex, sizeof hex, "%02x", byte);
    text += hex;
  }
  return text;
}

}  // namespace

HipBackend::~HipBackend() {
  if (granularity() != 0) stop();
}

Status HipBackend::open(int ordinal, std::unique_ptr<HipBackend>* backend) {
  std::unique_ptr<HipBackend> opened(new HipBackend);
  Status status = opened->connect(ordinal);
  if (status.ok()) *backend = std::move(opened);
  return status;
}

Status HipBackend::connect(int ordinal) {
  DriverLibrary library("KVCACHED_LIBHIP",
                        {"libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so"});
  bind(library, *api_);
  library.bind(get_device_, "hipGetDevice");
  library.bind(set_device_, "hipSetDevice");
  if (!library.status().ok()) return library.status();

  int device = 0;
  if (Result r = api_->init(0); r != kSuccess) return error("hipInit", r);
  if (Result r = api_->device_get(&device, ordinal); r != kSuccess) {
    Status status = error("hipDeviceGet", r);
    status.what += "; device " + std::to_string(ordinal) + " is not visible to this process";
    return status;
  }
  unsigned char uuid[16] = {};
  if (Result r = api_->device_uuid(uuid, device); r != kSuccess) {
    return error("hipDeviceGetUuid", r);
  }
  device_key_ = "gpu-" + uuid_text(uuid);
  own_token_ = static_cast<std::uint64_t>(ordinal);
  return start(ordinal, device, false);
}

int HipBackend::get_current(std::uint64_t* token) {
  int device = 0;
  const Result result = get_device_(&device);
  *token = static_cast<std::uint64_t>(device);
  return result;
}

int HipBackend::set_current(std::uint64_t token) { return set_device_(static_cast<int>(token)); }

}  // namespace kvc
