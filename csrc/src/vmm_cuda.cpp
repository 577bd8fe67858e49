// SPDX-License-Identifier: Apache-2.0
#include <cstdio>

#include "driver_table.h"
#include "kvcached/vmm_driver.h"

namespace kvc {

struct CudaBackend::Context {
  Result (*get)(void**) = nullptr;
  Result (*set)(void*) = nullptr;
  Result (*retain)(void**, int device) = nullptr;
  Result (*release)(int device) = nullptr;
  Result (*attribute)(int* value, int attribute, int device) = nullptr;
  int device = 0;
  void* primary = nullptr;  // the context that the CUDA runtime, and so the engine, uses
};

namespace {

constexpr int kVirtualMemorySupported = 102;
constexpr int kRdmaWithVirtualMemorySupported = 110;

void bind(DriverLibrary& library, DriverTable& api) {
  library.bind(api.error_name, "cuGetErrorName");
  library.bind(api.init, "cuInit");
  library.bind(api.device_get, "cuDeviceGet");
  library.bind(api.device_uuid, "cuDeviceGetUuid_v2");
  library.bind(api.granularity, "cuMemGetAllocationGranularity");
  library.bind(api.reserve, "cuMemAddressReserve");
  library.bind(api.release_range, "cuMemAddressFree");
  library.bind(api.create, "cuMemCreate");
  library.bind(api.destroy, "cuMemRelease");
  library.bind(api.map, "cuMemMap");
  library.bind(api.set_access, "cuMemSetAccess");
  library.bind(api.unmap, "cuMemUnmap");
  library.bind(api.synchronize, "cuCtxSynchronize");
  library.bind(api.stream_create, "cuStreamCreate");
  library.bind(api.stream_destroy, "cuStreamDestroy_v2");
  library.bind(api.stream_synchronize, "cuStreamSynchronize");
  library.bind(api.memset_async, "cuMemsetD8Async");
  library.bind(api.memory_info, "cuMemGetInfo_v2");
  library.bind(api.upload, "cuMemcpyHtoDAsync_v2");
  library.bind(api.download, "cuMemcpyDtoHAsync_v2");
  library.bind(api.event_create, "cuEventCreate");
  library.bind(api.event_record, "cuEventRecord");
  library.bind(api.event_destroy, "cuEventDestroy_v2");
  library.bind(api.stream_wait, "cuStreamWaitEvent");
  library.bind(api.pin, "cuMemHostRegister_v2");
  library.bind(api.unpin, "cuMemHostUnregister");
}

// As NVML and nvidia-smi print it.
std::string uuid_text(const unsigned char (&bytes)[16]) {
  std::string text = "GPU-";
  for (int i = 0; i < 16; ++i) {
    char hex[3];
    std::snprintf(hex, sizeof hex, "%02x", bytes[i]);
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += hex;
  }
  return text;
}

}  // namespace

CudaBackend::CudaBackend() : context_(std::make_unique<Context>()) {}

CudaBackend::~CudaBackend() {
  if (context_->primary == nullptr) return;
  stop();
  if (context_->release(context_->device) != kSuccess) context_->release(context_->device);
}

Status CudaBackend::open(int ordinal, std::unique_ptr<CudaBackend>* backend) {
  std::unique_ptr<CudaBackend> opened(new CudaBackend);
  Status status = opened->connect(ordinal);
  if (status.ok()) *backend = std::move(opened);
  return status;
}

Status CudaBackend::connect(int ordinal) {
  DriverLibrary library("KVCACHED_LIBCUDA", {"libcuda.so.1"});
  bind(library, *api_);
  library.bind(context_->get, "cuCtxGetCurrent");
  library.bind(context_->set, "cuCtxSetCurrent");
  library.bind(context_->retain, "cuDevicePrimaryCtxRetain");
  library.bind(context_->release, "cuDevicePrimaryCtxRelease_v2");
  library.bind(context_->attribute, "cuDeviceGetAttribute");
  if (!library.status().ok()) return library.status();

  int device = 0;
  if (Result r = api_->init(0); r != kSuccess) return error("cuInit", r);
  if (Result r = api_->device_get(&device, ordinal); r != kSuccess) {
    Status status = error("cuDeviceGet", r);
    status.what += "; device " + std::to_string(ordinal) + " is not visible to this process";
    return status;
  }
  int supported = 0;
  if (Result r = context_->attribute(&supported, kVirtualMemorySupported, device); r != kSuccess) {
    return error("cuDeviceGetAttribute", r);
  }
  if (supported == 0) {
    return Status::error(Code::not_supported,
                         "this GPU or its mode (vGPU, WSL) has no virtual memory management; run "
                         "the engine without kvcached here");
  }
  unsigned char uuid[16] = {};
  if (Result r = api_->device_uuid(uuid, device); r != kSuccess) {
    return error("cuDeviceGetUuid", r);
  }
  device_key_ = "gpu-" + uuid_text(uuid);
  // Connectors register the KV cache with network cards, which needs pages made for it.
  int rdma = 0;
  if (context_->attribute(&rdma, kRdmaWithVirtualMemorySupported, device) != kSuccess) rdma = 0;

  void* primary = nullptr;
  if (Result r = context_->retain(&primary, device); r != kSuccess) {
    return error("cuDevicePrimaryCtxRetain", r);
  }
  context_->device = device;
  context_->primary = primary;
  own_token_ = reinterpret_cast<std::uint64_t>(primary);
  return start(ordinal, device, rdma != 0);
}

int CudaBackend::get_current(std::uint64_t* token) {
  void* context = nullptr;
  const Result result = context_->get(&context);
  *token = reinterpret_cast<std::uint64_t>(context);
  return result;
}

int CudaBackend::set_current(std::uint64_t token) {
  return context_->set(reinterpret_cast<void*>(token));
}

}  // namespace kvc
