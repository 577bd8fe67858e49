# SPDX-License-Identifier: Apache-2.0
"""Engine forks: pinned upstream releases plus a short, ordered patch series each.

The tools need git and the standard library only, so that they run before anything is installed.
"""
