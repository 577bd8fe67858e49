// SPDX-License-Identifier: Apache-2.0
// What the driver alone takes to move pages: its calls in a loop, with no allocator around.
//
//     cc -O2 -o driver_cost driver_cost.c -ldl && ./driver_cost PAGES PAGE_BYTES
//
// Prints "ready", waits for a line (or the end) of its input, so that several can begin together,
// and prints JSON: seconds to take the pages from the driver, and to give them back. The driver is
// opened by name and its few types are declared here, so that no CUDA toolkit is needed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct {
  int type, id;
} Location;

// CUmemAllocationProp.
typedef struct {
  int type, handle_types;
  Location location;
  void* win32;
  unsigned char flags[8];
} Properties;

// CUmemAccessDesc.
typedef struct {
  Location location;
  int flags;
} Access;

static void* function(const char* name) {
  static void* driver;
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
  void* found = driver ? dlsym(driver, name) : NULL;
  if (!found) {
    fprintf(stderr, "%s is not there: %s\n", name, dlerror());
    exit(1);
  }
  return found;
}

static void check(int code, const char* name) {
  if (code == 0) return;
  fprintf(stderr, "%s failed with %d\n", name, code);
  exit(1);
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s PAGES PAGE_BYTES\n", argv[0]);
    return 2;
  }
  const size_t pages = strtoull(argv[1], NULL, 10), size = strtoull(argv[2], NULL, 10);
  int (*init)(unsigned) = function("cuInit");
  int (*device_get)(int*, int) = function("cuDeviceGet");
  int (*retain)(void**, int) = function("cuDevicePrimaryCtxRetain");
  int (*set_current)(void*) = function("cuCtxSetCurrent");
  int (*reserve)(uint64_t*, size_t, size_t, uint64_t, uint64_t) = function("cuMemAddressReserve");
  int (*create)(uint64_t*, size_t, const Properties*, uint64_t) = function("cuMemCreate");
  int (*map)(uint64_t, size_t, size_t, uint64_t, uint64_t) = function("cuMemMap");
  int (*set_access)(uint64_t, size_t, const Access*, size_t) = function("cuMemSetAccess");
  int (*unmap)(uint64_t, size_t) = function("cuMemUnmap");
  int (*release)(uint64_t) = function("cuMemRelease");

  int device = 0;
  void* context = NULL;
  uint64_t base = 0;
  check(init(0), "cuInit");
  check(device_get(&device, 0), "cuDeviceGet");
  check(retain(&context, device), "cuDevicePrimaryCtxRetain");
  check(set_current(context), "cuCtxSetCurrent");
  check(reserve(&base, pages * size, 0, 0, 0), "cuMemAddressReserve");
  Properties properties;
  memset(&properties, 0, sizeof properties);
  properties.type = 1;  // pinned
  properties.location = (Location){1, device};
  const Access access = {{1, device}, 3};  // read and write
  uint64_t* handles = calloc(pages, sizeof *handles);
  if (!handles) return 1;

  puts("ready");
  fflush(stdout);
  for (int c = getchar(); c != '\n' && c != EOF;) c = getchar();
  const double begin = now();
  for (size_t i = 0; i < pages; ++i) {
    check(create(&handles[i], size, &properties, 0), "cuMemCreate");
    check(map(base + i * size, size, 0, handles[i], 0), "cuMemMap");
    check(set_access(base + i * size, size, &access, 1), "cuMemSetAccess");
  }
  const double taken = now();
  for (size_t i = 0; i < pages; ++i) {
    check(unmap(base + i * size, size), "cuMemUnmap");
    check(release(handles[i]), "cuMemRelease");
  }
  const double given = now();
  printf("{\"pages\": %zu, \"take_s\": %.6f, \"give_s\": %.6f}\n", pages, taken - begin,
         given - taken);
  return 0;
}
