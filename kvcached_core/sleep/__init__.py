# SPDX-License-Identifier: Apache-2.0
"""Sleep and wake: an engine's weights leave the device and come back, under the ledger."""
