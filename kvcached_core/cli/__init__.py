# SPDX-License-Identifier: Apache-2.0
"""The operator's tools: ``kvctl`` changes and shows ledgers, ``kvtop`` watches them.

Nothing here opens a device: a ledger is a file. Engines do not import this package.
"""
