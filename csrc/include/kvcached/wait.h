// SPDX-License-Identifier: Apache-2.0
// What to do around a wait for other threads or processes. The Python bindings let go of the GIL
// there and only there: giving it up around every call would let a busy thread keep it for 5 ms
// after a call that took one microsecond.
#pragma once

namespace kvc {

struct WaitHook {
  void* (*begin)() = nullptr;
  void (*end)(void* token) = nullptr;  // gets what begin returned
};
// Once, before any wait.
void set_wait_hook(WaitHook hook);

// The hook's begin and end around the waits of one operation. Give back every lock that others may
// wait for with the GIL held before this goes out of scope.
class Wait {
 public:
  Wait() = default;
  ~Wait() { end(); }
  Wait(const Wait&) = delete;
  Wait& operator=(const Wait&) = delete;

  void begin();
  void end();

  template <typename Lock>
  void acquire(Lock& lock) {
    if (lock.try_lock()) return;
    begin();
    lock.lock();
  }

 private:
  bool waiting_ = false;
  void* token_ = nullptr;
};

}  // namespace kvc
