"""Whether somebody is about to ask for what is done between steps: a change that finds two under way waits for both.

update      staging ..... announce() . last bytes, checks . commit asked for | applied: is_near is False again
steps       k | k + 1 ahead | k + 2 ahead | k + 3                  | k + 4   | k + 5 ahead ...
"""

from __future__ import annotations


class AwaitedBoundary:
    """A note that the thread of an update sets, and the loop's reads before each step that it would launch ahead.

    One update at a time announces. Who runs it sets `is_near` to False when it is over, whatever its end: what stays
    would cost speed. By an assignment, since Ctrl-C may come before the first line of a call.
    """

    def __init__(self) -> None:
        self.is_near = False
        """Whether steps are to be taken one by one."""

    def announce(self) -> None:
        """The boundary will be asked for in a few steps' time."""
        self.is_near = True
