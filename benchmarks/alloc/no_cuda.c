// SPDX-License-Identifier: Apache-2.0
// Stands in for the CUDA calls that the public kvcached's extension is linked against, so that its
// bookkeeping runs without a GPU: there is always memory free, and everything else does nothing.
#include <stddef.h>

typedef unsigned long long Handle;

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)attribute, (void)device;
  *value = 1;
  return 0;
}
int cuGetErrorString(int code, const char** text) {
  (void)code;
  *text = "none";
  return 0;
}
int cuMemAddressFree(Handle at, size_t size) { return (void)at, (void)size, 0; }
int cuMemAddressReserve(Handle* at, size_t size, size_t align, Handle hint, Handle flags) {
  (void)size, (void)align, (void)hint, (void)flags;
  *at = 1ull << 40;
  return 0;
}
int cuMemCreate(Handle* handle, size_t size, const void* properties, Handle flags) {
  (void)size, (void)properties, (void)flags;
  *handle = 1;
  return 0;
}
int cuMemGetAllocationGranularity(size_t* size, const void* properties, int option) {
  (void)properties, (void)option;
  *size = 2u << 20;
  return 0;
}
int cuMemMap(Handle at, size_t size, size_t offset, Handle handle, Handle flags) {
  return (void)at, (void)size, (void)offset, (void)handle, (void)flags, 0;
}
int cuMemRelease(Handle handle) { return (void)handle, 0; }
int cuMemSetAccess(Handle at, size_t size, const void* access, size_t count) {
  return (void)at, (void)size, (void)access, (void)count, 0;
}
int cuMemUnmap(Handle at, size_t size) { return (void)at, (void)size, 0; }

int cudaDeviceSynchronize(void) { return 0; }
int cudaFree(void* at) { return (void)at, 0; }
int cudaGetDevice(int* device) { return *device = 0; }
const char* cudaGetErrorString(int code) { return (void)code, "none"; }
int cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = 80ull << 30;
  return 0;
}
int cudaSetDevice(int device) { return (void)device, 0; }
