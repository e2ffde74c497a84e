"""The loops: one curator, or a federation. They only ever see noised sums."""
