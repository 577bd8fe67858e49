# SPDX-License-Identifier: Apache-2.0
"""Engines that the router starts, watches, starts again and ends."""
