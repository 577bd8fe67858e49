// SPDX-License-Identifier: Apache-2.0
#include "ledger_locks.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <cerrno>
#include <mutex>
#include <string>

namespace kvc::ledger {

// Every open LockFd of this process. Its mutex is held across fork, so no descriptor is half-way
// between open and registered when a child comes to be.
struct Registry {
  std::mutex mutex;
  LockFd* head = nullptr;

  static Registry& get() {
    static Registry* registry = [] {
      pthread_atfork([] { get().mutex.lock(); }, [] { get().mutex.unlock(); }, [] { in_child(); });
      return new Registry;  // never destroyed: a LockFd may outlive static destruction
    }();
    return *registry;
  }

  static void in_child() {
    Registry& registry = get();
    while (LockFd* lock = registry.head) {
      registry.drop(lock);
      lock->lost_in_fork_.store(true);
    }
    registry.mutex.unlock();
  }

  void add(LockFd* lock, int fd) {
    lock->fd_.store(fd);
    lock->lost_in_fork_.store(false);
    lock->prev_ = nullptr;
    lock->next_ = head;
    if (head != nullptr) head->prev_ = lock;
    head = lock;
  }

  void drop(LockFd* lock) {
    const int fd = lock->fd_.exchange(-1);
    if (fd < 0) return;
    ::close(fd);
    (lock->prev_ == nullptr ? head : lock->prev_->next_) = lock->next_;
    if (lock->next_ != nullptr) lock->next_->prev_ = lock->prev_;
  }
};

namespace {

int set_lock(int fd, short type, int64_t byte) {
  struct flock range = {};
  range.l_type = type;
  range.l_whence = SEEK_SET;
  range.l_start = byte;
  range.l_len = 1;
  while (fcntl(fd, F_OFD_SETLK, &range) != 0) {
    if (errno != EINTR) return errno == EACCES ? EAGAIN : errno;
  }
  return 0;
}

}  // namespace

int LockFd::open(int directory, const char* path, int flags, mode_t mode) {
  Registry& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  registry.drop(this);
  const int fd = ::openat(directory, path, flags | O_CLOEXEC, mode);
  if (fd < 0) return errno;
  registry.add(this, fd);
  return 0;
}

int LockFd::reopen(const LockFd& other) {
  const std::string path = "/proc/self/fd/" + std::to_string(other.get());
  return open(AT_FDCWD, path.c_str(), O_RDWR);
}

void LockFd::close() {
  Registry& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  registry.drop(this);
}

int LockFd::try_lock(int64_t byte, bool exclusive) {
  return set_lock(get(), exclusive ? F_WRLCK : F_RDLCK, byte);
}

int LockFd::unlock(int64_t byte) { return set_lock(get(), F_UNLCK, byte); }

bool LockFd::held_elsewhere(int64_t start, int64_t length) const {
  struct flock range = {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  range.l_start = start;
  range.l_len = length;
  return fcntl(get(), F_OFD_GETLK, &range) != 0 || range.l_type != F_UNLCK;
}

}  // namespace kvc::ledger
