// SPDX-License-Identifier: Apache-2.0
// The one way an operation reports failure. Nothing in the core throws, aborts or prints.
#pragma once

#include <string>
#include <utility>

namespace kvc {

enum class Code {
  ok,
  out_of_memory,     // physical memory is exhausted: a scheduling answer, not a fault
  invalid_argument,  // the caller is wrong; nothing was changed
  not_supported,     // this machine or driver cannot do it
  driver,            // the driver or the OS refused; driver_code is its own number
  lost,              // shared state can no longer be trusted
  refused,           // a policy says no; the message names the holders and the remedy
};

struct [[nodiscard]] Status {
  Code code = Code::ok;
  int driver_code = 0;
  std::string what;

  bool ok() const { return code == Code::ok; }

  static Status error(Code code, std::string what, int driver_code = 0) {
    return Status{code, driver_code, std::move(what)};
  }
};

}  // namespace kvc
