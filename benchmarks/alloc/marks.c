// SPDX-License-Identifier: Apache-2.0
// The marks of counted.h for Python, which loads this with ctypes.
#include "counted.h"

int counting(void) { return RUNNING_ON_VALGRIND != 0; }
void begin(void) { CALLGRIND_START_INSTRUMENTATION; }
void zero(void) { CALLGRIND_ZERO_STATS; }
void toggle(void) { CALLGRIND_TOGGLE_COLLECT; }
void dump(const char* name) { CALLGRIND_DUMP_STATS_AT(name); }
