# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import signal

# A runner in the background ignores Ctrl-C, and under nohup the end of its terminal; programs it
# starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
