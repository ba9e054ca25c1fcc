"""The ops on Paddle's GPU tensors: Paddle owns memory and streams, every computation is a Triton kernel of this room.

Importing this package alone loads neither Paddle nor Triton.
"""
