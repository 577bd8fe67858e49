# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal

# A runner in the background ignores Ctrl-C, and programs it starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
