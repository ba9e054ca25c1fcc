"""The load of every speed part, ours and the peer's: tokens of a prompt, new tokens, samples of a prompt."""

PROMPT, OUTPUT, SAMPLES = 256, 256, 8
