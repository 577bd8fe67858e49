# SPDX-License-Identifier: Apache-2.0
"""The one exception whose message is meant for the person at the terminal."""


class ForkError(Exception):
    """Something the user can mend; the message says what and how."""
