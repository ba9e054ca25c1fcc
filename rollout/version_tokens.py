"""How many tokens each version of the policy has sampled, with a bound on the versions that are kept."""

from __future__ import annotations

from collections import Counter

KEPT_VERSIONS = 8


class VersionTokens:
    """One thread counts; any thread may read. What versions before the newest few have sampled is kept as one sum."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._older = 0

    def count(self, version: int, num_tokens: int) -> None:
        """A version has sampled so many more."""
        counts = self._counts
        if version not in counts and len(counts) == KEPT_VERSIONS:
            counts, older = counts.copy(), self._older  # a reader has the old ones, or the new ones
            older += counts.pop(min(counts))
            self._older, self._counts = older, counts
        counts[version] += num_tokens

    def tokens(self) -> dict[str, int]:
        """Tokens by version, rising, then those of "older" ones."""
        return {**{str(version): count for version, count in sorted(self._counts.items())}, "older": self._older}
