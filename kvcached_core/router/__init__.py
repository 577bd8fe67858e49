# SPDX-License-Identifier: Apache-2.0
"""``kvcached-router``: one OpenAI-compatible front for any number of engines.

Requests go to a replica of their model, in the order of their deadlines; models that are asleep are
woken for them, and put to sleep when nobody asks. Engines do not import this package; it needs what
``pip install kvcached-core[router]`` adds.
"""
