// SPDX-License-Identifier: Apache-2.0
#include "kvcached/vmm_host.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>

namespace kvc {
namespace {

Status os_error(const char* call, int error, const char* remedy = "") {
  const bool memory = error == ENOMEM || error == ENOSPC;
  return Status::error(memory ? Code::out_of_memory : Code::driver,
                       std::string(call) + " failed: " + std::strerror(error) + remedy, error);
}

Status misuse(const char* what) { return Status::error(Code::invalid_argument, what); }

void* pointer(Address address) { return reinterpret_cast<void*>(address); }

bool valid_name(const std::string& name) {
  auto plain = [](unsigned char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_' || c == '.';
  };
  return !name.empty() && name.size() <= 64 && name.front() != '.' &&
         std::all_of(name.begin(), name.end(), plain);
}

}  // namespace

Status HostBackend::open(const std::string& name, std::size_t capacity_bytes,
                         std::unique_ptr<HostBackend>* backend) {
  // The name becomes part of a file name.
  if (!valid_name(name)) {
    return misuse("a host backend's name is 1 to 64 of the characters A-Z a-z 0-9 . _ -");
  }
  const int fd = ::memfd_create("kvcached", MFD_CLOEXEC);
  if (fd < 0) return os_error("memfd_create", errno);
  backend->reset(new HostBackend(name, capacity_bytes, fd));
  return {};
}

HostBackend::HostBackend(std::string name, std::size_t capacity_bytes, int fd)
    : name_(std::move(name)),
      capacity_(capacity_bytes),
      granularity_(static_cast<std::size_t>(::sysconf(_SC_PAGESIZE))),
      fd_(fd),
      file_end_(granularity_) {}  // offset 0 stays unused: it would be the handle of no page

HostBackend::~HostBackend() {
  for (const auto& [address, bytes] : ranges_) ::munmap(pointer(address), bytes);
  ::close(fd_);
}

Status HostBackend::reserve(std::size_t bytes, Address* address) {
  if (!aligned(bytes)) return misuse("reserve: size is not a multiple of the granularity");
  void* base =
      ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    Status status = os_error("reserving addresses", errno, "; raise the limit (ulimit -v)");
    status.code = Code::driver;  // addresses ran out, not memory: waiting would not help
    return status;
  }
  std::lock_guard lock(mutex_);
  *address = reinterpret_cast<Address>(base);
  ranges_[*address] = bytes;
  return {};
}

Status HostBackend::release_range(Address address, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  const auto range = ranges_.find(address);
  if (range == ranges_.end() || range->second != bytes) {
    return misuse("release_range: not a reserved range");
  }
  if (overlaps_mapping(address, bytes)) return misuse("release_range: pages are still mapped");
  if (::munmap(pointer(address), bytes) != 0) return os_error("munmap", errno);
  ranges_.erase(range);
  return {};
}

Status HostBackend::create(std::size_t bytes, Page* page) {
  if (!aligned(bytes)) return misuse("create: size is not a multiple of the granularity");
  std::lock_guard lock(mutex_);
  if (bytes > capacity_ - used_) {
    return Status::error(Code::out_of_memory, "the host backend's capacity is used up");
  }
  auto& holes = holes_[bytes];
  const std::uint64_t offset = holes.empty() ? file_end_ : holes.back();
  int rc;
  do {  // the kernel undoes a partial allocation when a signal arrives
    rc = ::fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes));
  } while (rc != 0 && errno == EINTR);
  if (rc != 0) return os_error("allocating host memory", errno);
  if (holes.empty()) {
    file_end_ += bytes;
  } else {
    holes.pop_back();
  }
  pages_[offset] = {bytes, false};
  used_ += bytes;
  page->handle = offset;
  return {};
}

Status HostBackend::destroy(Page page) {
  std::lock_guard lock(mutex_);
  const auto found = pages_.find(page.handle);
  if (found == pages_.end()) return misuse("destroy: no such page");
  if (found->second.mapped) return misuse("destroy: the page is still mapped");
  const std::size_t bytes = found->second.bytes;
  if (::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(page.handle),
                  static_cast<off_t>(bytes)) != 0) {
    return os_error("giving host memory back", errno);
  }
  pages_.erase(found);
  holes_[bytes].push_back(page.handle);
  used_ -= bytes;
  return {};
}

Status HostBackend::map(Address address, std::size_t bytes, Page page) {
  std::lock_guard lock(mutex_);
  const auto found = pages_.find(page.handle);
  if (found == pages_.end()) return misuse("map: no such page");
  if (found->second.bytes != bytes) return misuse("map: only a whole page can be mapped");
  if (found->second.mapped) return misuse("map: the page is already mapped");
  if (!inside_range(address, bytes)) return misuse("map: outside every reserved range");
  if (overlaps_mapping(address, bytes)) return misuse("map: the addresses are already mapped");
  // Not accessible yet, as on a GPU, so that a missing set_access shows on the host too.
  if (::mmap(pointer(address), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, fd_,
             static_cast<off_t>(page.handle)) == MAP_FAILED) {
    Status status = os_error("mmap", errno, "; raise vm.max_map_count or use larger pages");
    status.code = Code::driver;  // the memory is there: the kernel's table of mappings is full
    return status;
  }
  found->second.mapped = true;
  mappings_[address] = {bytes, page, false};
  return {};
}

Status HostBackend::set_access(Address address, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  Mappings::iterator first, last;
  if (!find_run(address, bytes, &first, &last)) {
    return misuse("set_access: not a run of whole mappings");
  }
  if (::mprotect(pointer(address), bytes, PROT_READ | PROT_WRITE) != 0) {
    Status status = os_error("mprotect", errno, "; raise vm.max_map_count or use larger pages");
    status.code = Code::driver;
    return status;
  }
  for (auto it = first; it != last; ++it) it->second.accessible = true;
  return {};
}

Status HostBackend::unmap(Address address, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  Mappings::iterator first, last;
  if (!find_run(address, bytes, &first, &last)) return misuse("unmap: not a run of whole mappings");
  // Put inaccessible addresses in the place of the pages, in one step, so that the range stays
  // ours.
  if (::mmap(pointer(address), bytes, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) == MAP_FAILED) {
    return os_error("unmapping", errno);
  }
  for (auto it = first; it != last; ++it) pages_[it->second.page.handle].mapped = false;
  mappings_.erase(first, last);
  return {};
}

Status HostBackend::zero(Address address, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  Mappings::iterator first, last;
  if (!find_run(address, bytes, &first, &last)) return misuse("zero: not a run of whole mappings");
  if (!std::all_of(first, last, [](const auto& entry) { return entry.second.accessible; })) {
    return misuse("zero: access was not set");
  }
  std::memset(pointer(address), 0, bytes);
  return {};
}

Status HostBackend::upload(Address to, const void* from, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  if (!accessible(to, bytes)) return misuse("upload: the addresses are not mapped");
  std::memcpy(pointer(to), from, bytes);
  return {};
}

Status HostBackend::download(void* to, Address from, std::size_t bytes) {
  std::lock_guard lock(mutex_);
  if (!accessible(from, bytes)) return misuse("download: the addresses are not mapped");
  std::memcpy(to, pointer(from), bytes);
  return {};
}

Status HostBackend::memory_info(MemoryInfo* info) {
  std::lock_guard lock(mutex_);
  *info = {capacity_ - used_, capacity_};
  return {};
}

std::size_t HostBackend::physical_bytes() const {
  struct stat info{};
  return ::fstat(fd_, &info) == 0 ? static_cast<std::size_t>(info.st_blocks) * 512 : 0;
}

bool HostBackend::find_run(Address address, std::size_t bytes, Mappings::iterator* first,
                           Mappings::iterator* last) {
  *first = mappings_.find(address);
  Address next = address;
  auto it = *first;
  while (it != mappings_.end() && it->first == next && next - address < bytes) {
    next += it->second.bytes;
    ++it;
  }
  *last = it;
  return bytes != 0 && next - address == bytes;
}

bool HostBackend::overlaps_mapping(Address address, std::size_t bytes) const {
  const auto after = mappings_.lower_bound(address);
  if (after != mappings_.end() && after->first < address + bytes) return true;
  if (after == mappings_.begin()) return false;
  const auto before = std::prev(after);
  return before->first + before->second.bytes > address;
}

bool HostBackend::accessible(Address address, std::size_t bytes) const {
  auto it = mappings_.upper_bound(address);
  if (it == mappings_.begin()) return false;
  --it;
  Address next = it->first;
  for (; it != mappings_.end() && it->first == next && it->second.accessible; ++it) {
    next += it->second.bytes;
    if (next > address && next - address >= bytes) return true;
  }
  return false;
}

bool HostBackend::inside_range(Address address, std::size_t bytes) const {
  const auto after = ranges_.upper_bound(address);
  if (after == ranges_.begin()) return false;
  const auto range = std::prev(after);
  // Subtract rather than add: a caller's sum could wrap around.
  const std::size_t offset = address - range->first;
  return offset < range->second && bytes <= range->second - offset && address % granularity_ == 0;
}

}  // namespace kvc
