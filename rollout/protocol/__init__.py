"""What a rollout server and its clients say to each other: messages, their checks, their bytes. No sockets.

`docs/protocol.md` is the same for readers of other languages; a test compares the two.
"""
