# SPDX-License-Identifier: Apache-2.0
"""Runs the engines' own tests against the released and the patched engine."""
