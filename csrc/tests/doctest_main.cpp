// SPDX-License-Identifier: Apache-2.0
// The test programs' main, which takes longer to compile than most of them.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
