// SPDX-License-Identifier: Apache-2.0
#include "kvcached/wait.h"

namespace kvc {
namespace {

WaitHook g_hook;

}  // namespace

void set_wait_hook(WaitHook hook) { g_hook = hook; }

void Wait::begin() {
  if (waiting_) return;
  waiting_ = true;
  if (g_hook.begin != nullptr) token_ = g_hook.begin();
}

void Wait::end() {
  if (waiting_ && g_hook.end != nullptr) g_hook.end(token_);
  waiting_ = false;
}

}  // namespace kvc
