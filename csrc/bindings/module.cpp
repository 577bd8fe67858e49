// SPDX-License-Identifier: Apache-2.0
#include "bindings.h"

namespace nb = nanobind;

NB_MODULE(_core, m) {
  // Tensors on an arena live until the interpreter ends, so there is always something "leaked"
  // then.
  nb::set_leak_warnings(false);
  m.doc() = "The native core of kvcached: elastic device memory and its shared account.";
  nb::handle error = nb::exception<kvc::VmmError>(m, "VmmError", PyExc_RuntimeError);
  nb::exception<kvc::LedgerRefused>(m, "LedgerRefused", error);
  kvc::bind_vmm(m);
  kvc::bind_blocks(m);
  kvc::bind_ledger(m);
}
