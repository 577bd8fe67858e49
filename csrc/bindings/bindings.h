// SPDX-License-Identifier: Apache-2.0
// Shared by the binding files: the registration functions and the error that crosses into Python.
#pragma once

#include <nanobind/nanobind.h>

#include <stdexcept>
#include <string>

#include "kvcached/status.h"

namespace kvc {

void bind_vmm(nanobind::module_& m);
void bind_blocks(nanobind::module_& m);
void bind_ledger(nanobind::module_& m);

// Becomes kvcached_core._core.VmmError in Python (registered in module.cpp).
struct VmmError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Becomes kvcached_core._core.LedgerRefused, a VmmError.
struct LedgerRefused : VmmError {
  using VmmError::VmmError;
};

// Throws for any status but ok. May be called without the GIL.
inline void check(const Status& status) {
  if (status.ok()) return;
  if (status.code == Code::refused) throw LedgerRefused(status.what);
  throw VmmError(status.what);
}

// For calls whose "not enough memory" is an answer rather than an error.
inline bool check_fits(const Status& status) {
  if (status.code == Code::out_of_memory) return false;
  check(status);
  return true;
}

}  // namespace kvc
